// Communities of features through the layers: one stack per layer, ribbons where links stay inside a community.
// Communities stand in the order of their mean layer, so early ones run along the top and late ones along the bottom.

import { svg } from "../dom.js";
import { clip, count } from "../format.js";
import { link } from "../route.js";
import { visible } from "../ui/tokens.js";
import { everyNth, responsive, text } from "./plot.js";

export const COLOURS = 8;
const [WIDE, NAMES] = [800, 150];

/** Colour classes: the largest communities get their own, the rest alternate between two greys. */
export function colourOf(rank) {
  return rank < COLOURS ? `series${rank}` : `rest${rank % 2}`;
}

export function alluvial(atlas, { communities, ribbons }) {
  const columns = atlas.sites.map((site, i) => ({ ...site, i })).filter((site) => communities.some((item) => item.n_by_site[site.i] > 0));
  const residual = columns.filter((site) => site.kind === "resid_post");
  const shown = residual.length ? residual : columns;
  const ranked = communities.map((item, rank) => ({ ...item, rank }));
  ranked.sort((a, b) => meanLayer(a, shown) - meanLayer(b, shown));
  return responsive((width) => draw(shown, ranked, ribbons, width), { label: "Communities through the layers", min: 320 });
}

function meanLayer(item, columns) {
  let [sum, total] = [0, 0];
  for (const site of columns) {
    sum += item.n_by_site[site.i] * site.layer;
    total += item.n_by_site[site.i];
  }
  return total ? sum / total : 0;
}

function draw(columns, ranked, ribbons, width) {
  const height = Math.max(360, Math.min(620, width * 0.5));
  const [left, right, top, bottom] = [width < WIDE ? 8 : NAMES, width - 8, 8, height - 22];
  const step = (right - left) / columns.length;
  const bar = Math.max(2, Math.min(10, step * 0.3));
  const gap = ranked.length > 1 ? Math.min(2.5, 60 / ranked.length) : 0;
  const most = Math.max(...columns.map((site) => ranked.reduce((sum, item) => sum + item.n_by_site[site.i], 0)));
  const scale = (bottom - top - gap * ranked.length) / Math.max(1, most);
  const placed = columns.map((site, c) => stack(site, left + (c + 0.5) * step, ranked, { scale, gap, top, bottom }));
  const position = new Map(columns.map((site, c) => [site.i, c]));
  const groups = ranked.map((item) => group(item, placed, ribbons, { position, scale, bar, columns }));
  const names = [...labelPlaces(ranked, placed, bar, width >= WIDE)].map(([item, at]) => svg("a", { href: link(`community/${item.id}`), class: `community ${colourOf(item.rank)}`, tabindex: -1, "aria-hidden": "true" }, text(at.x, at.y + 4, at.name, { anchor: at.anchor, className: "community-label" })));
  const nth = everyNth(columns.length, right - left, 30);
  const marks = columns.map((site, c) => c % nth === 0 && text(left + (c + 0.5) * step, height - 6, site.layer, { anchor: "middle" }));
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": "Communities through the layers", class: "alluvial" }, groups, names, marks);
}

function stack(site, x, ranked, { scale, gap, top, bottom }) {
  const total = ranked.reduce((sum, item) => sum + item.n_by_site[site.i] * scale + (item.n_by_site[site.i] > 0 ? gap : 0), 0);
  let y = top + (bottom - top - total) / 2;
  const bars = new Map();
  for (const item of ranked) {
    const high = item.n_by_site[site.i] * scale;
    if (high > 0) {
      bars.set(item.id, { x, y, height: high });
      y += high + gap;
    }
  }
  return bars;
}

// A community of the first layer has its name in the margin, where there is one; others beside their tallest bar. A name
// is left out where it would run into another.
function labelPlaces(ranked, placed, bar, hasMargin) {
  const taken = [];
  const places = new Map();
  const boxes = ranked.map((item) => ({ item, first: hasMargin && placed[0].get(item.id), at: tallest(placed, item.id) })).filter(({ first, at }) => first || at?.height > 11);
  boxes.sort((a, b) => !!b.first - !!a.first || b.at.height - a.at.height);
  for (const { item, first, at } of boxes) {
    const name = clip(nameOf(item), 24);
    const wide = name.length * 6.4 + 4;
    const box = first ? { x: first.x - bar / 2 - 4, from: 0, to: first.x, y: first.y + first.height / 2, anchor: "end" } : { x: at.x + bar / 2 + 4, from: at.x, to: at.x + bar / 2 + 4 + wide, y: at.y + at.height / 2, anchor: "start" };
    if (taken.some((other) => Math.abs(other.y - box.y) < 10.5 && other.from < box.to && box.from < other.to)) continue;
    taken.push(box);
    places.set(item, { ...box, name });
  }
  return places;
}

const nameOf = (item) => visible(clip(item.label || `community ${item.id}`, 40)).replaceAll("‘ ", "‘");

function tallest(placed, id) {
  return placed.map((bars) => bars.get(id)).reduce((best, one) => ((one?.height ?? 0) > (best?.height ?? 0) ? one : best), null);
}

function group(item, placed, ribbons, { position, scale, bar, columns }) {
  const own = ribbons.filter((ribbon) => ribbon.community === item.id && position.get(ribbon.target) === position.get(ribbon.source) + 1);
  const paths = own.map((ribbon) => ribbonPath(placed[position.get(ribbon.source)].get(item.id), placed[position.get(ribbon.target)].get(item.id), ribbon.n * scale, bar));
  const bars = placed.map((bars_) => bars_.get(item.id)).filter(Boolean);
  const rects = bars.map(({ x, y, height }) => svg("rect", { x: x - bar / 2, y, width: bar, height: Math.max(0.5, height), class: "community-bar" }));
  const top = placed.findIndex((stack_) => stack_.get(item.id) === tallest(placed, item.id));
  const summary = `${nameOf(item)}: ${count(item.size)} features in ${bars.length} layers, most in ${columns[top]?.short ?? "none"}`;
  return svg("a", { href: link(`community/${item.id}`), class: `community ${colourOf(item.rank)}` }, svg("title", {}, summary), paths, rects);
}

function ribbonPath(from, to, size, bar) {
  if (!from || !to) return null;
  const high = Math.min(size, from.height, to.height);
  if (high <= 0) return null;
  const [x0, x1] = [from.x + bar / 2, to.x - bar / 2];
  const middle = (x0 + x1) / 2;
  const [a, b] = [from.y + (from.height - high) / 2, to.y + (to.height - high) / 2];
  const d = `M${x0} ${a}C${middle} ${a} ${middle} ${b} ${x1} ${b}V${b + high}C${middle} ${b + high} ${middle} ${a + high} ${x0} ${a + high}Z`;
  return svg("path", { d: d.replace(/\d+\.\d{2,}/g, (n) => Number(n).toFixed(1)), class: "ribbon" });
}

/** How many of its features stand in each layer, for a row of a list. */
export function layerBars(values, { width = 150, height = 22, className = "" }) {
  const most = Math.max(1, ...values);
  const step = width / values.length;
  return svg("svg", { class: `sparkline ${className}`, width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, values.map((n, i) => n > 0 && svg("rect", { x: i * step, y: height - (n / most) * (height - 2), width: Math.max(1, step - 0.7), height: (n / most) * (height - 2), class: "community-bar" })));
}
