// Trunks as rows: where each begins and ends and how, the cosine of every step and the density of
// every feature. The
// figures of the flow page lead here with a filter in the address.

import { Trunks } from "../data/trunks.js";
import { h, show } from "../dom.js";
import { count, fixed, percent, plural } from "../format.js";
import { saveButtons } from "../figures/export.js";
import { sparkline } from "../figures/plot.js";
import { BEGIN_NAMES, END_NAMES } from "../figures/turnover.js";
import { featureLink as address, link, remember } from "../route.js";
import { choice, empty, labelText } from "../ui/parts.js";
import { virtualTable } from "../ui/virtual.js";

const FILTERS = ["q", "from", "to", "begins", "ends", "layers", "community"];

export async function trunks({ atlas, options }) {
  const trunks = await Trunks.open(atlas);
  if (!trunks?.all.length) return { title: "Trunks", node: h("div", {}, h("h1", {}, "Trunks"),
    empty("This atlas has no trunks.",
    "The link stage found no chain of accepted links, or was not run.")) };
  const state = Object.fromEntries(FILTERS.map((name) => [name, options.get(name) ?? ""]));
  const status = h("p", { class: "quiet", role: "status" });
  const table = virtualTable({
    label: "Trunks",
    columns: columns(),
    rows: [],
    link: (trunk) => (trunk.length > 1 ? address(`graph/${trunk.middle}`, { b: 30, f: 30, k: 1 })
      : address(trunk.id())),
    sort: options.get("sort") ?? "layers",
    down: options.get("down") !== "0",
    height: 34,
    onsort: ({ name, down }) => remember({ sort: name, down: down ? "" : "0" }),
  });
  const change = (part) => {
    Object.assign(state, part);
    const rows = trunks.all.filter(test(atlas, state));
    table.replaceRows(rows);
    const features = rows.reduce((sum, trunk) => sum + trunk.length, 0);
    show(status, `${plural(rows.length, "trunk")} with ${plural(features, "feature")}, ` +
      `${percent(features / trunks.nFeatures)} of the living ones of the residual stream.`);
    remember(state);
  };
  const controls = filterControls(atlas, trunks, state, change);
  change({});
  const node = h(
    "div",
    {},
    h("h1", {}, "Trunks"),
    h("p", { class: "lead" },
      "Paths on which each feature is the best predecessor of the next; every living feature of " +
        "the residual stream is on one. A flat line near the top is a feature that passes " +
        "unchanged; a dip is where it is rewritten. The label leads to the trunk’s graph, its " +
        "ends to their features."),
    h("div", { class: "controls" }, controls,
      saveButtons({ name: "trunks", rows: () => exported(table.rowsShown()) })),
    status,
    table,
  );
  return { title: "Trunks", node };
}

function filterControls(atlas, trunks, state, change) {
  const residual = atlas.sites.filter((site) => site.kind === "resid_post")
    .map((site) => site.short);
  const sites = (value) => [["", "any layer"], ...(value && !residual.includes(value)
    ? [[value, value.replace("-", "–")]] : []), ...residual.map((short) => [short, short])];
  const kinds = (names, column, codes) => [["", "any way"], ...codes.filter((_, code) =>
    trunks.columns[column].includes(code)).map((kind) => [kind, names[kind]])];
  const input = h("input", { type: "search", value: state.q,
    placeholder: "Filter by label or feature", "aria-label": "Filter trunks", oninput: () =>
    change({ q: input.value }) });
  const lengths = [["", "any number"], ["1", "1 only"], ["3-", "3 or more"], ["10-", "10 or more"],
    [`${residual.length}`, `all ${residual.length}`]];
  const clear = state.community && h("button", { type: "button", class: "action small",
    onclick: () => (change({ community: "" }), clear.remove()) }, `Community ${state.community} ×`);
  return [
    input,
    choice({ label: "begins", value: state.from, options: sites(state.from), onchange: (from) =>
      change({ from }) }),
    choice({ label: "how", value: state.begins, options: kinds(BEGIN_NAMES, "begin", trunks.begins),
      onchange: (begins) => change({ begins }) }),
    choice({ label: "ends", value: state.to, options: sites(state.to), onchange: (to) =>
      change({ to }) }),
    choice({ label: "how it ends", value: state.ends, options: kinds(END_NAMES, "end", trunks.ends),
      onchange: (ends) => change({ ends }) }),
    choice({ label: "layers", value: state.layers, options: lengths, onchange: (layers) =>
      change({ layers }) }),
    clear,
  ];
}

function test(atlas, { q, from, to, begins, ends, layers, community }) {
  const words = q.toLowerCase().split(/\s+/).filter(Boolean);
  const [low, high] = range(layers, /^(\d+)(-?)(\d*)$/);
  const [first, second] = [range(from, /^L(\d+)(-?)(\d*)$/), range(to, /^L(\d+)(-?)(\d*)$/)];
  const within = (layer, [least, most]) => layer >= least && layer <= most;
  const layerOf = (site) => atlas.sites[site].layer;
  return (trunk) =>
    within(trunk.length, [low, high]) &&
    within(layerOf(trunk.site()), first) &&
    within(layerOf(trunk.site(-1)), second) &&
    (!begins || trunk.begin === begins) &&
    (!ends || trunk.end === ends) &&
    (!community || String(trunk.community) === community) &&
    words.every((word) => trunk.label.toLowerCase().includes(word) || (word.includes("/")
      && trunk.features.some((id) => id.toLowerCase() === word)));
}

/** "L3" -> [3, 3], "L3-5" -> [3, 5], "3-" -> [3, ∞], anything else -> everything. */
function range(text, pattern) {
  const match = pattern.exec(text);
  if (!match) return [0, Infinity];
  const low = Number(match[1]);
  return [low, match[3] ? Number(match[3]) : match[2] ? Infinity : low];
}

function columns() {
  const site = (trunk, n) => trunk.home.atlas.sites[trunk.site(n)];
  const end = (trunk, n) => h("a", { href: address(trunk.id(n)), title: trunk.id(n) },
    site(trunk, n).short);
  return [
    { name: "label", class: "grow", sort: (trunk) => trunk.label, cell: (trunk) =>
      labelText(trunk.label, 90) },
    { name: "from", class: "layer", sort: (trunk) => site(trunk, 0).layer, cell: (trunk) =>
      end(trunk, 0) },
    { name: "to", class: "layer", sort: (trunk) => site(trunk, -1).layer, cell: (trunk) =>
      end(trunk, -1) },
    { name: "layers", class: "number", sort: (trunk) => trunk.length, cell: (trunk) =>
      trunk.length },
    { name: "begins", class: "how roomy", sort: (trunk) => trunk.begin, cell: (trunk) =>
      BEGIN_NAMES[trunk.begin] },
    { name: "cosine per step", class: "plot", title: "0 at the bottom, 1 at the top",
      cell: (trunk) => sparkline(trunk.cosine, {}) },
    { name: "weakest", class: "number roomy", sort: (trunk) => trunk.least, cell: (trunk) =>
      fixed(trunk.least) },
    { name: "density", class: "plot roomy",
      title: "share of tokens on which each feature is active, logarithmic from 0.001 % to 10 %",
      sort: (trunk) => Math.max(...trunk.density), cell: (trunk) =>
      sparkline(trunk.density.map((x) => Math.log10(Math.max(x, 1e-6))),
      { low: -5, high: -1, className: "spark second" }) },
    { name: "score", class: "number roomy", title: "held-out score of the label", sort: (trunk) =>
      trunk.score, cell: (trunk) => fixed(trunk.score) },
    { name: "group", class: "number roomy", title: "its community", cell: (trunk) =>
      trunk.community >= 0 && h("a", { href: link(`community/${trunk.community}`) },
      trunk.community) },
  ];
}

function exported(rows) {
  return { head: ["label", "layers", "begins", "ends", "product", "weakest", "score", "community",
    "features", "cosine", "density"], rows: rows.map((trunk) => [trunk.label, trunk.length,
    trunk.begin, trunk.end, trunk.product.toFixed(4), trunk.length > 1 ? trunk.least : "",
    Number.isFinite(trunk.score) ? trunk.score.toFixed(3) : "", trunk.community,
    trunk.features.join(" "), trunk.cosine.join(" "), trunk.density.map((x) => percent(x))
    .join("; ")]) };
}
