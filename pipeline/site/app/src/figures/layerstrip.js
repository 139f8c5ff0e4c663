// One column per layer: living features stacked by class above the line, features that end there
// below it.

import { h, svg } from "../dom.js";
import { count } from "../format.js";
import { link } from "../route.js";
import { CLASS_NAMES } from "../ui/parts.js";
import { everyNth, linear, responsive, text, ticks, yAxis } from "./plot.js";

const STACK = ["translated", "processed", "newborn", "unexplained", "unknown"];

export function layerStrip(atlas) {
  const sites = residual(atlas);
  return h("div", {}, legend(sites), responsive((width) => draw(sites, width),
    { label: "Features per layer by class" }));
}

export function stripRows(atlas) {
  const classes = STACK.filter((name) => atlas.sites.some((site) => counts(site)[name]));
  return {
    head: ["site", "alive", ...classes.map((name) => CLASS_NAMES[name]), "no link onward"],
    rows: atlas.sites.map((site) => [site.short, site.n_alive,
      ...classes.map((name) => counts(site)[name] ?? 0), site.n_dying ?? ""]),
  };
}

function residual(atlas) {
  const sites = atlas.sites.filter((site) => site.kind === "resid_post");
  return sites.length ? sites : atlas.sites;
}

function counts(site) {
  const known = site.classes && Object.keys(site.classes).length ? site.classes
    : { unknown: site.n_alive };
  return known;
}

function legend(sites) {
  const used = STACK.filter((name) => sites.some((site) => counts(site)[name]));
  const items = used.map((name) =>
    h("li", {}, h("span", { class: `swatch class-${name}`, "aria-hidden": "true" }),
    CLASS_NAMES[name]));
  if (sites.some((site) => site.n_dying)) items.push(
    h("li", {}, h("span", { class: "swatch dying", "aria-hidden": "true" }), "no link onward"));
  return h("ul", { class: "legend" }, items);
}

function draw(sites, width) {
  const height = 250;
  const [left, right, top, bottom] = [46, width - 4, 10, height - 22];
  const most = Math.max(1, ...sites.map((site) => site.n_alive));
  const below = Math.max(0, ...sites.map((site) => site.n_dying ?? 0));
  const y = linear(-below, most, bottom, top);
  const step = (right - left) / sites.length;
  const nth = everyNth(sites.length, right - left, 30);
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
      "aria-label": "Features per layer by class" },
    yAxis(y, ticks(0, most, 3), { left, right, format: count }),
    sites.map((site, i) => column(site, left + i * step, step, y, i % nth === 0, height)),
    svg("line", { x1: left, x2: right, y1: y(0), y2: y(0), class: "axis" }),
  );
}

function column(site, x, step, y, labelled, height) {
  const [gap, wide] = [Math.min(2, step * 0.15), Math.max(1, step - Math.min(4, step * 0.3))];
  const kinds = counts(site);
  let base = 0;
  const bars = STACK.filter((name) => kinds[name]).map((name) => {
    const from = base;
    base += kinds[name];
    return svg("rect", { x: x + gap, width: wide, y: y(base),
      height: Math.max(0, y(from) - y(base) - 0.5), class: `class-${name}` });
  });
  if (site.n_dying) bars.push(svg("rect", { x: x + gap, width: wide, y: y(0) + 1,
    height: Math.max(0, y(-site.n_dying) - y(0) - 1), class: "dying" }));
  const said = Object.entries(kinds).map(([name, n]) => `${count(n)} ${CLASS_NAMES[name] ?? name}`);
  const summary =
    `${site.short}: ${count(site.n_alive)} alive; ` +
      `${said.join(", ")}${site.n_dying ? `; ${count(site.n_dying)} without a link onward` : ""}`;
  return svg("a", { href: link(`site/${site.short}`), class: "strip-column" },
    svg("title", {}, summary), svg("rect", { x, y: 0, width: step, height: height - 16,
    class: "hit" }), bars, labelled && text(x + step / 2, height - 6, site.layer,
    { anchor: "middle" }));
}
