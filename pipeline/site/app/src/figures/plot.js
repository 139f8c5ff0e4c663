// Small plots as SVG: a responsive wrapper, linear scales, axes, bars, lines, sparklines.

import { ticks } from "d3-array";
import { line as path } from "d3-shape";
import { h, show, svg } from "../dom.js";

/** A box that draws `draw(width) -> SVGElement` at its own width, again when that changes. */
export function responsive(draw, { label, min = 260 } = {}) {
  const box = h("div", { class: "responsive", role: "group", "aria-label": label });
  let width = 0;
  const redraw = () => {
    const next = Math.max(min, Math.floor(box.clientWidth));
    if (next === width || !box.isConnected) return;
    width = next;
    show(box, draw(width));
  };
  new ResizeObserver(redraw).observe(box);
  return Object.assign(box, { redraw: () => width && show(box, draw(width)) });
}

export function canvasOf(width, height, label, ...children) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
    "aria-label": label }, children);
}

export const linear = (from, to, a, b) => (x) => a + ((x - from) / (to - from || 1)) * (b - a);
export { ticks };

export function text(x, y, value, { anchor = "start", className = "tick", ...more } = {}) {
  return svg("text", { x, y, "text-anchor": anchor, class: className, ...more }, value);
}

/** Horizontal grid lines with their values at the left. */
export function yAxis(scale, values, { left, right, format = String }) {
  return values.map((value) =>
    [svg("line", { x1: left, x2: right, y1: scale(value), y2: scale(value), class: "grid" }),
    text(left - 6, scale(value) + 4, format(value), { anchor: "end" })]);
}

/** A line through points, broken where one is not finite. */
export function line(points, className) {
  const d = path().defined(([, y]) => Number.isFinite(y)).digits(1)(points);
  return svg("path", { d, class: className, fill: "none" });
}

/** A line without axes, `values` against their index, with a dot at `mark`. Decorative: the numbers
 *  stand in the row. */
export function sparkline(values, { width = 120, height = 22, low = 0, high = 1, mark, className =
  "spark" }) {
  const x = linear(0, Math.max(1, values.length - 1), 2, width - 2);
  const y = linear(low, high, height - 3, 3);
  const points = values.map((value, i) => [x(i), y(Math.max(low, Math.min(high, value)))]);
  return svg("svg", { class: "sparkline", width, height, viewBox: `0 0 ${width} ${height}`,
    "aria-hidden": "true" }, line(points, className), mark !== undefined
    && svg("circle", { cx: points[mark][0], cy: points[mark][1], r: 2.5, class: "spark-dot" }));
}

/** Labels for layers that do not run into each other: every k-th. */
export function everyNth(n, width, each = 26) {
  return Math.max(1, Math.ceil((n * each) / width));
}
