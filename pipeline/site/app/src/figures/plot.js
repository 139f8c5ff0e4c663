// Small plots as SVG: a responsive wrapper, linear scales, axes, bars, lines, sparklines.

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
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label }, children);
}

export const linear = (from, to, a, b) => (x) => a + ((x - from) / (to - from || 1)) * (b - a);

/** Round tick values that cover [from, to]. */
export function ticks(from, to, about = 4) {
  const raw = (to - from) / about || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw) ?? power;
  const values = [];
  for (let i = Math.ceil(from / step); i * step <= to + step * 1e-6; i++) values.push(Number((i * step).toPrecision(12)));
  return values;
}

export function text(x, y, value, { anchor = "start", className = "tick", ...more } = {}) {
  return svg("text", { x, y, "text-anchor": anchor, class: className, ...more }, value);
}

/** Horizontal grid lines with their values at the left. */
export function yAxis(scale, values, { left, right, format = String }) {
  return values.map((value) => [svg("line", { x1: left, x2: right, y1: scale(value), y2: scale(value), class: "grid" }), text(left - 6, scale(value) + 4, format(value), { anchor: "end" })]);
}

export function line(points, className) {
  const parts = points.map(([x, y], i) => `${i && Number.isFinite(y) && Number.isFinite(points[i - 1][1]) ? "L" : "M"}${x.toFixed(1)} ${Number.isFinite(y) ? y.toFixed(1) : 0}`);
  return svg("path", { d: parts.filter((_, i) => Number.isFinite(points[i][1])).join(""), class: className, fill: "none" });
}

/** A line without axes, `values` against their index, with a dot at `mark`. Decorative: the numbers stand in the row. */
export function sparkline(values, { width = 120, height = 22, low = 0, high = 1, mark, className = "spark" }) {
  const x = linear(0, Math.max(1, values.length - 1), 2, width - 2);
  const y = linear(low, high, height - 3, 3);
  const points = values.map((value, i) => [x(i), y(Math.max(low, Math.min(high, value)))]);
  return svg("svg", { class: "sparkline", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, line(points, className), mark !== undefined && svg("circle", { cx: points[mark][0], cy: points[mark][1], r: 2.5, class: "spark-dot" }));
}

/** Labels for layers that do not run into each other: every k-th. */
export function everyNth(n, width, each = 26) {
  return Math.max(1, Math.ceil((n * each) / width));
}
