// What happens to trunks, layer by layer, in three lanes with a scale each: where they begin and
// what wrote them there, what is
// written into them on their way, where they end. The first layer, where all begin, and the last,
// where all end, are left
// out of their lanes: their bars would hide the others.

import { max, sum } from "d3-array";
import { h, svg } from "../dom.js";
import { count } from "../format.js";
import { link } from "../route.js";
import { everyNth, linear, responsive, text, ticks, yAxis } from "./plot.js";

export const BEGIN_NAMES = { first: "in the first layer", branch: "branches off",
  mlp: "written by the MLP", attention: "written by attention",
  both: "written by MLP and attention", unexplained: "written by neither",
  unread: "modules not looked at" };
export const END_NAMES = { last: "in the last layer", joins: "joins another",
  ends: "no link onward" };
const LANES = [
  { name: "begin", part: "begin", kinds: ["mlp", "attention", "both", "branch", "unexplained",
    "unread"], hidden: ["first"], href: (site) => link("trunks", { from: site.short }) },
  { name: "written to", part: "written", kinds: ["mlp", "attention", "both"], href: (site) =>
    link(`site/${site.short}`, { class: "processed" }) },
  { name: "end", part: "end", kinds: ["joins", "ends"], hidden: ["last"], href: (site) =>
    link("trunks", { to: site.short }) },
];
const [LANE, GAP] = [104, 22];

export function turnover(atlas, bySite) {
  const sites = residual(atlas);
  const lanes = LANES.map((lane) =>
    ({ ...lane, kinds: lane.kinds.filter((kind) => sites.some(({ i }) => bySite.get(i)?.[lane.part][
    kind])) })).filter((lane) => lane.kinds.length);
  const used = [...new Set(lanes.flatMap((lane) => lane.kinds))];
  const legend = h("ul", { class: "legend" },
    used.map((kind) =>
    h("li", {}, h("span", { class: `swatch how-${kind}`, "aria-hidden": "true" }),
    BEGIN_NAMES[kind] ?? END_NAMES[kind])));
  return h("div", {}, legend, responsive((width) => draw(sites, lanes, bySite, width),
    { label: "Trunks that begin, are written to and end, by layer" }));
}

export function turnoverRows(atlas, bySite) {
  const all = LANES.flatMap(({ name, part, kinds, hidden = [] }) => [...hidden, ...kinds]
    .map((kind) => [name, part, kind]));
  const cells = (counts) => all.map(([, part, kind]) => counts?.[part][kind] ?? 0);
  return { head: ["layer", ...all.map(([name, , kind]) =>
    `${name}: ${BEGIN_NAMES[kind] ?? END_NAMES[kind]}`)], rows: residual(atlas)
    .map((site) => [site.short, ...cells(bySite.get(site.i))]) };
}

const residual = (atlas) => atlas.sites.map((site, i) => ({ ...site, i }))
  .filter((site) => site.kind === "resid_post");

function draw(sites, lanes, bySite, width) {
  const height = lanes.length * (LANE + GAP) + 20;
  const [left, right] = [46, width - 4];
  const step = (right - left) / sites.length;
  const nth = everyNth(sites.length, right - left, 30);
  const marks = sites.map((site, i) => i % nth === 0 && text(left + (i + 0.5) * step, height - 6,
    site.layer, { anchor: "middle" }));
  const drawn = lanes.map((lane, number) => {
    const top = number * (LANE + GAP) + GAP;
    const most = Math.max(1,
      max(sites, ({ i }) => sum(lane.kinds, (kind) => bySite.get(i)?.[lane.part][kind])));
    const y = linear(0, most, top + LANE, top);
    const columns = sites.map((site, c) => column(site, lane, bySite.get(site.i)?.[lane.part] ?? {},
      { x: left + c * step, step, y, top }));
    return [text(left, top - 7, lane.name, { className: "tick strong" }),
      yAxis(y, ticks(0, most, 4), { left, right, format: count }), columns,
      svg("line", { x1: left, x2: right, y1: y(0), y2: y(0), class: "axis" })];
  });
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
    "aria-label": "Trunks that begin, are written to and end, by layer" }, drawn, marks);
}

function column(site, lane, counts, { x, step, y, top }) {
  const kinds = lane.kinds.filter((kind) => counts[kind]);
  if (!kinds.length) return null;
  const [gap, wide] = [Math.min(2, step * 0.15), Math.max(1, step - Math.min(4, step * 0.3))];
  let base = 0;
  const bars = kinds.map((kind) => {
    const from = base;
    base += counts[kind];
    return svg("rect", { x: x + gap, width: wide, y: y(base),
      height: Math.max(0.5, y(from) - y(base)), class: `how-${kind}` });
  });
  const said = kinds.map((kind) =>
    `${count(counts[kind])} ${BEGIN_NAMES[kind] ?? END_NAMES[kind]}`);
  return svg("a", { href: lane.href(site), class: "strip-column" },
    svg("title", {}, `${site.short}, ${lane.name}: ${said.join(", ")}`),
    svg("rect", { x, y: top, width: step, height: LANE, class: "hit" }), bars);
}
