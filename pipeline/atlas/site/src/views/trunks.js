// Trunks: long chains of strong links, one row each, with the cosine of every step and the density of every feature.

import { h } from "../dom.js";
import { count, fixed, percent } from "../format.js";
import { saveButtons } from "../figures/export.js";
import { sparkline } from "../figures/plot.js";
import { featureLink as address, remember } from "../route.js";
import { empty, labelText } from "../ui/parts.js";
import { virtualTable } from "../ui/virtual.js";

export async function trunks({ atlas, options }) {
  const all = await atlas.trunks();
  if (!all?.length) return { title: "Trunks", node: h("div", {}, h("h1", {}, "Trunks"), empty("This atlas has no trunks.", "The link stage found no chain of accepted links, or was not run.")) };
  const rows = all.map((trunk) => ({ ...trunk, first: site(trunk.features[0]), last: site(trunk.features.at(-1)), least: Math.min(...trunk.cosine) }));
  const table = virtualTable({
    label: "Trunks",
    columns: columns(),
    rows: filtered(rows, options.get("q") ?? ""),
    link: (row) => address(`graph/${row.features[Math.floor(row.features.length / 2)]}`, { b: 30, f: 30, k: 1 }),
    sort: options.get("sort") ?? "layers",
    down: options.get("down") !== "0",
    height: 34,
    onsort: ({ name, down }) => remember({ sort: name, down: down ? "" : "0" }),
  });
  const input = h("input", { type: "search", value: options.get("q") ?? "", placeholder: "Filter by label or feature", "aria-label": "Filter trunks", oninput: () => (table.replaceRows(filtered(rows, input.value)), remember({ q: input.value })) });
  const node = h(
    "div",
    {},
    h("h1", {}, "Trunks"),
    h("p", { class: "lead" }, `${count(all.length)} chains in which each feature is the best predecessor of the next. A flat line near the top is a feature that passes unchanged; a dip is where it is rewritten.`),
    h("div", { class: "controls" }, input, saveButtons({ name: "trunks", rows: () => exported(table.rowsShown()) })),
    table,
  );
  return { title: "Trunks", node };
}

function columns() {
  return [
    { name: "label", class: "grow", sort: (row) => row.label, cell: (row) => labelText(row.label ?? "", 90) },
    { name: "from", class: "site", sort: (row) => layer(row.first), cell: (row) => row.first },
    { name: "to", class: "site", sort: (row) => layer(row.last), cell: (row) => row.last },
    { name: "layers", class: "number", sort: (row) => row.features.length, cell: (row) => row.features.length },
    { name: "cosine per step", class: "plot", title: "0 at the bottom, 1 at the top", cell: (row) => sparkline(row.cosine, {}) },
    { name: "weakest", class: "number", sort: (row) => row.least, cell: (row) => fixed(row.least) },
    { name: "product", class: "number roomy", title: "product of all cosines", sort: (row) => row.product, cell: (row) => fixed(row.product, 3) },
    { name: "density", class: "plot roomy", title: "share of tokens on which each feature fires, logarithmic from 0.001 % to 10 %", sort: (row) => Math.max(...row.density), cell: (row) => sparkline(row.density.map((x) => Math.log10(Math.max(x, 1e-6))), { low: -5, high: -1, className: "spark second" }) },
    { name: "label score", class: "number roomy", sort: (row) => row.score, cell: (row) => fixed(row.score) },
  ];
}

const site = (id) => id.slice(0, id.indexOf("/"));
const layer = (short) => Number(/\d+/.exec(short)?.[0]);

function filtered(rows, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  return words.length ? rows.filter((row) => words.every((word) => (row.label ?? "").toLowerCase().includes(word) || row.features.some((id) => id.toLowerCase() === word))) : rows;
}

function exported(rows) {
  return { head: ["label", "layers", "product", "weakest", "score", "features", "cosine", "density"], rows: rows.map((row) => [row.label, row.features.length, row.product, row.least, row.score ?? "", row.features.join(" "), row.cosine.join(" "), row.density.map((x) => percent(x)).join("; ")]) };
}
