// Adjacent residual layers: median cosine of best links, the null's median and 99th percentile, the
// threshold.

import { h, svg } from "../dom.js";
import { fixed } from "../format.js";
import { canvasOf, everyNth, line, linear, responsive, text, ticks, yAxis } from "./plot.js";

export function nullFigure(atlas, model) {
  const pairs = adjacent(atlas, model);
  const legend = h("ul", { class: "legend" },
    h("li", {}, h("span", { class: "stroke observed", "aria-hidden": "true" }),
    "best links, median"), h("li", {}, h("span", { class: "swatch null", "aria-hidden": "true" }),
    "chance, median to 99th percentile"),
    h("li", {}, h("span", { class: "stroke threshold", "aria-hidden": "true" }), "threshold"));
  return h("div", {}, legend, responsive((width) => draw(atlas, pairs, width),
    { label: "Cosine of best links against chance" }));
}

export function pairRows(atlas, model) {
  const names = ["relation", "n_links", "n_possible", "median_cosine", "mutual", "threshold",
    "null_median", "null_p99", "agreement", "initialisation"];
  return { head: ["source", "target", ...names], rows: model.pairs.map((pair) =>
    [atlas.sites[pair.source].short, atlas.sites[pair.target].short,
    ...names.map((name) => shown(pair[name]))]) };
}

const shown = (value) => (typeof value === "number" ? Number(value.toPrecision(6)) : (value ?? ""));

function adjacent(atlas, model) {
  const kind = (i) => atlas.sites[i].kind;
  return model.pairs.filter((pair) => pair.adjacent !== false && kind(pair.source) === "resid_post"
    && kind(pair.target) === "resid_post").sort((a, b) => a.target - b.target);
}

function draw(atlas, pairs, width) {
  const height = 300;
  const [left, right, top, bottom] = [38, width - 6, 8, height - 36];
  const x = linear(0, Math.max(1, pairs.length - 1), left + 6, right - 6);
  const y = linear(0, 1, bottom, top);
  const series = (name) => pairs.map((pair, i) => [x(i), pair[name] === null
    || pair[name] === undefined ? NaN : y(Math.min(1, Math.max(0, pair[name])))]);
  const [low, high] = [series("null_median"), series("null_p99")];
  const band = [...high, ...low.slice().reverse()].filter(([, value]) => Number.isFinite(value))
    .map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`);
  const nth = everyNth(pairs.length, right - left, 30);
  return canvasOf(
    width,
    height,
    summary(pairs),
    yAxis(y, ticks(0, 1, 5), { left, right, format: (value) => fixed(value, 1) }),
    svg("polygon", { points: band.join(" "), class: "null" }),
    line(series("threshold"), "threshold"),
    line(series("median_cosine"), "observed"),
    series("median_cosine").map(([a, b], i) => Number.isFinite(b)
      && svg("circle", { cx: a, cy: b, r: 2.6, class: "observed-dot" },
      svg("title", {},
      `${atlas.sites[pairs[i].source].short} → ${atlas.sites[pairs[i].target].short}: ` +
        `${fixed(pairs[i].median_cosine)}, chance ${fixed(pairs[i].null_median)}`))),
    pairs.map((pair, i) => i % nth === 0 && text(x(i), bottom + 16, atlas.sites[pair.target].layer,
      { anchor: "middle" })),
    text((left + right) / 2, height - 4, "layer reached", { anchor: "middle" }),
  );
}

function summary(pairs) {
  const values = pairs.map((pair) => pair.median_cosine).filter(Number.isFinite);
  return values.length
    ? `Median cosine of best links, from ${fixed(Math.min(...values))} to ` +
      `${fixed(Math.max(...values))}` : "No links were measured";
}
