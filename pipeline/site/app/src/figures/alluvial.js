// Groups of features through the layers: one stack per layer, ribbons where features go on in their
// group.
// A group: { id, name, about, href, n_by_site, n_on: Map("site site" -> n) }; groups are stacked in
// the order given.

import { max, sum } from "d3-array";
import { area, curveBumpX } from "d3-shape";
import { svg } from "../dom.js";
import { everyNth, responsive, text } from "./plot.js";

export function alluvial(atlas, groups, label) {
  const columns = atlas.sites.map((site, i) => ({ ...site, i }))
    .filter((site) => groups.some((item) => item.n_by_site[site.i] > 0));
  return responsive((width) => draw(columns, groups, width, label), { label, min: 320 });
}

function draw(columns, groups, width, label) {
  const height = Math.max(340, Math.min(560, width * 0.42));
  const [left, right, top, bottom] = [4, width - 4, 8, height - 22];
  const step = (right - left) / columns.length;
  const bar = Math.max(2, Math.min(10, step * 0.3));
  const gap = groups.length > 1 ? Math.min(2.5, 60 / groups.length) : 0;
  const most = max(columns, (site) => sum(groups, (item) => item.n_by_site[site.i])) ?? 0;
  const scale = (bottom - top - gap * groups.length) / Math.max(1, most);
  const placed = columns.map((site, c) => stack(site, left + (c + 0.5) * step, groups,
    { scale, gap, top }));
  const shapes = groups.map((item, rank) => group(item, rank, placed, { scale, bar, columns }));
  const taken = [];
  const names = groups.map((item, rank) => nameOf(item, rank, placed, { bar, right, taken }));
  const nth = everyNth(columns.length, right - left, 30);
  const marks = columns.map((site, c) => c % nth === 0 && text(left + (c + 0.5) * step, height - 6,
    site.layer, { anchor: "middle" }));
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
    "aria-label": label, class: "alluvial" }, shapes, names, marks);
}

function stack(site, x, groups, { scale, gap, top }) {
  let y = top;
  const bars = new Map();
  for (const item of groups) {
    const high = item.n_by_site[site.i] * scale;
    if (high > 0) {
      bars.set(item.id, { x, y, height: high });
      y += high + gap;
    }
  }
  return bars;
}

// A name stands beside the group's tallest bar, within the drawing, where it is high enough for one
// and no other name stands.
function nameOf(item, rank, placed, { bar, right, taken }) {
  const at = placed.map((bars) => bars.get(item.id))
    .reduce((best, one) => ((one?.height ?? 0) > (best?.height ?? 0) ? one : best), null);
  if (!at || at.height < 11) return null;
  const side = at.x > right - 100 ? -1 : 1;
  const [from, y] = [side < 0 ? at.x - 6.4 * item.name.length : at.x, at.y + at.height / 2];
  if (taken.some((other) => Math.abs(other.y - y) < 11
    && Math.abs(other.from - from) < 6.4 * item.name.length + 8)) return null;
  taken.push({ from, y });
  const label = text(at.x + side * (bar / 2 + 4), at.y + at.height / 2 + 4, item.name,
    { anchor: side < 0 ? "end" : "start", className: "community-label" });
  return svg("a", { href: item.href, class: `community series${rank}`, tabindex: -1,
    "aria-hidden": "true" }, label);
}

function group(item, rank, placed, { scale, bar, columns }) {
  const ribbons = columns.slice(1).map((site, c) => ribbonPath(placed[c].get(item.id), placed[c + 1]
    .get(item.id), (item.n_on.get(`${columns[c].i} ${site.i}`) ?? 0) * scale, bar));
  const bars = placed.map((bars_) => bars_.get(item.id)).filter(Boolean);
  const rects = bars.map(({ x, y, height }) => svg("rect", { x: x - bar / 2, y, width: bar,
    height: Math.max(0.5, height), class: "community-bar" }));
  return svg("a", { href: item.href, class: `community series${rank}` },
    svg("title", {}, item.about), ribbons, rects);
}

const ribbon = area().x(([x]) => x).y0(([, y]) => y).y1(([, , y]) => y).curve(curveBumpX).digits(1);

function ribbonPath(from, to, size, bar) {
  if (!from || !to) return null;
  const high = Math.min(size, from.height, to.height);
  const ends = [[from.x + bar / 2, from], [to.x - bar / 2, to]];
  return high > 0 && svg("path", { d: ribbon(ends.map(([x, { y }]) => [x, y, y + high])),
    class: "ribbon" });
}

/** How many of its features stand in each layer, for a row of a list. */
export function layerBars(values, { width = 150, height = 22, className = "" }) {
  const most = Math.max(1, ...values);
  const step = width / values.length;
  return svg("svg", { class: `sparkline ${className}`, width, height,
    viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, Array.from(values, (n, i) => n > 0
    && svg("rect", { x: i * step, y: height - (n / most) * (height - 2),
    width: Math.max(1, step - 0.7), height: (n / most) * (height - 2), class: "community-bar" })));
}
