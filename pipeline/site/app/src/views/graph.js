// The focus graph: ancestors and descendants of one feature. Columns are layers; links are as wide
// and as opaque as they
// are strong above chance; limits are sliders; everything shown is in the address.

import { siteOf } from "../data/atlas.js";
import { Flow } from "../data/flow.js";
import { h, show } from "../dom.js";
import { fixed } from "../format.js";
import { figure, saveText } from "../figures/export.js";
import { drawGraph } from "../graph/draw.js";
import { edgeRows, graphDocument } from "../graph/rows.js";
import { select } from "../graph/select.js";
import { link, parseFeature, remember } from "../route.js";
import { checkbox, CLASS_NAMES, copyButton, empty, labelText, ownLabel,
  slider } from "../ui/parts.js";
import { nodePanel } from "./panel.js";
import { labelsOf } from "./search.js";

const DEFAULTS = { b: 3, f: 3, k: 2, t: 0.1, n: 60, m: 0 };

export async function graph({ atlas, key, options, alive }) {
  if (key === undefined || key === null) return { title: "Flow graph",
    node: empty("No feature was named.", "The address of a flow graph is #/graph/L12/402.") };
  if (!atlas.has.flow) return { title: "Flow graph", node: h("div", {}, h("h1", {}, "Flow graph"),
    empty("This atlas was made without a flow graph.",
    "Run the link stage, then the atlas stage again.")) };
  const flow = await Flow.open(atlas);
  const state = readState(atlas, options);
  const stage = h("div", { class: "graph-stage" });
  const panel = h("aside", { class: "graph-panel", "aria-label": "Chosen feature",
    "aria-live": "polite" });
  const status = h("p", { class: "quiet", role: "status" });
  const view = { atlas, flow, key, state, stage, panel, status, alive, turn: 0 };
  const head = await heading(atlas, key);
  const twin = { rows: () => edgeRows(view.picture) };
  const node = h(
    "div",
    { class: "graph-page" },
    head,
    controls(view),
    status,
    h("div", { class: "graph-columns" }, figure({ name: `flow-${atlas.id(key).replace("/", "-")}`,
      drawing: h("div", {}, legend(), stage),
      caption: "A link is wider and more opaque the further it is above chance; solid: each is " +
        "the other’s best; dashed: one way. ◆ removing the source silenced the target in most " +
        "trials; ◇ tested, mostly not. “+3”: links not shown. Keys: arrows walk, Enter opens the " +
        "card, + shows more links.", rows: twin.rows }), panel),
  );
  requestAnimationFrame(() => watchWidth(view));
    // the page is in the document then, and has a width
  return { title: `Flow of ${atlas.id(key)}`, node, wide: true };
}

function readState(atlas, options) {
  const number = (name, low, high) => {
    const value = options.has(name) ? Number(options.get(name)) : DEFAULTS[name];
    return Number.isFinite(value) ? Math.min(high, Math.max(low, value)) : DEFAULTS[name];
  };
  const opened = (options.get("x") ?? "").split(",").filter(Boolean)
    .map((id) => atlas.key(parseFeature(id)));
  return { b: number("b", 0, 40), f: number("f", 0, 40), k: number("k", 1, 8), t: number("t", 0, 1),
    n: number("n", 5, 300), m: number("m", 0, 1),
    opened: new Set(opened.filter((key) => key !== null)),
    chosen: atlas.key(parseFeature(options.get("s") ?? "")) };
}

function legend() {
  const strokes = ["residual", "MLP", "attention"]
    .map((name) => h("li", {}, h("span", { class: `stroke ${name.toLowerCase()}`,
    "aria-hidden": "true" }), name));
  const classes = ["translated", "processed", "newborn", "unexplained"]
    .map((name) => h("li", {}, h("span", { class: `swatch class-${name}`, "aria-hidden": "true" }),
    CLASS_NAMES[name]));
  return h("ul", { class: "legend" }, strokes, classes, h("li", {}, "● how often it fires"));
}

async function heading(atlas, key) {
  const { labels } = await atlas.labels(siteOf(key));
  const id = atlas.id(key);
  return h("div", { class: "feature-head" }, h("nav", { class: "crumbs" },
    h("a", { href: link(id) }, `← card of ${id}`)), h("h1", {}, "Flow of ",
    h("span", { class: "feature" }, id), " ", labelText(ownLabel(id, labels[key % 2 ** 20]), 90)));
}

function controls(view) {
  const { state, atlas } = view;
  let timer;
  const change = (part) => {
    Object.assign(state, part);
    clearTimeout(timer);
    timer = setTimeout(() => redraw(view), 60);
  };
  const hops = Math.max(1, atlas.layers.length);
  return h(
    "div",
    { class: "controls" },
    slider({ label: "back", title: "how many links backward", min: 0, max: hops, value: state.b,
      oninput: (b) => change({ b }) }),
    slider({ label: "onward", title: "how many links onward", min: 0, max: hops, value: state.f,
      oninput: (f) => change({ f }) }),
    slider({ label: "links each", title: "strongest links followed per feature and direction",
      min: 1, max: 8, value: state.k, oninput: (k) => change({ k }) }),
    slider({ label: "strength ≥", title: "(cosine − median of chance) / (1 − median of chance)",
      min: 0, max: 1, step: 0.02, value: state.t, format: (x) => fixed(x), oninput: (t) =>
      change({ t }) }),
    slider({ label: "features ≤", title: "the best-connected are kept", min: 5, max: 300, step: 5,
      value: state.n, oninput: (n) => change({ n }) }),
    checkbox({ label: "mutual only", checked: state.m === 1, onchange: (m) =>
      change({ m: m ? 1 : 0 }) }),
    copyButton(() => location.href, "Copy link"),
    h("button", { type: "button", class: "action", onclick: () =>
      saveText(`flow-${atlas.id(view.key).replace("/", "-")}.json`,
      JSON.stringify(graphDocument(view.picture), null, 1), "application/json") }, "Save JSON"),
  );
}

function watchWidth(view) {
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(view.stage.clientWidth - width) < 4) return;
    width = view.stage.clientWidth;
    redraw(view).catch((error) => show(view.stage, h("p", { class: "warning", role: "alert" },
      error.message)));
  }).observe(view.stage);
}

async function redraw(view) {
  const { atlas, flow, key, state } = view;
  const mine = ++view.turn;
  const limits = { back: state.b, onward: state.f, topK: state.k, strength: state.t,
    budget: state.n, mutual: state.m === 1, opened: state.opened };
  const { nodes, edges } = await select(flow, key, limits);
  const labels = await labelsOf(atlas, [...nodes.keys()]);
  const facts = await factsOf(atlas, [...nodes.keys()]);
  if (mine !== view.turn || !view.alive()) return;
  view.picture = { atlas, focus: key, nodes: [...nodes.values()]
    .map((node) => ({ ...node, id: atlas.id(node.key), label: ownLabel(atlas.id(node.key),
    labels.get(node.key)), ...facts.get(node.key) })), edges };
  show(view.status, summary(view.picture));
  remember({ b: unless("b", state.b), f: unless("f", state.f), k: unless("k", state.k),
    t: unless("t", state.t), n: unless("n", state.n), m: unless("m", state.m), x: [...state.opened]
    .map((one) => atlas.id(one)).join(",") });
  const drawn = drawGraph(view.picture, { width: view.stage.clientWidth || 900,
    chosen: nodes.has(state.chosen) ? state.chosen : key, onchoose: (one) => choose(view, one),
    onopen: (one) => (location.hash = link(atlas.id(one))), onmore: (one) => (state.opened.add(one),
    redraw(view)) });
  const focused = view.stage.contains(document.activeElement);
  show(view.stage, drawn.node);
  drawn.reveal(focused);
  choose(view, nodes.has(state.chosen) ? state.chosen : key);
}

const unless = (name, value) => (value === DEFAULTS[name] ? "" : value);

async function factsOf(atlas, keys) {
  const sites = [...new Set(keys.map(siteOf))];
  const columns =
    new Map(await Promise.all(sites.map(async (site) =>
    [site, [await atlas.overview(site), await atlas.labels(site)]])));
  return new Map(
    keys.map((key) => {
      const [overview, names] = columns.get(siteOf(key));
      const latent = key % 2 ** 20;
      return [key, { density: overview.density[latent], class: atlas.manifest.classes[
        overview.class[latent]], score: names.score[latent] === 255 ? NaN
        : names.score[latent] / 254 }];
    }),
  );
}

function summary({ nodes, edges }) {
  if (nodes.length === 1) return "No link of this feature is within these limits. Lower the " +
    "strength, or allow more links.";
  const layers = new Set(nodes.map((node) => siteOf(node.key)));
  return `${nodes.length} features in ${layers.size} dictionaries, ${edges.length} links.`;
}

function choose(view, key) {
  if (view.state.shown === key && view.panel.firstChild) return;
  Object.assign(view.state, { chosen: key, shown: key });
  remember({ s: key === view.key ? "" : view.atlas.id(key) });
  nodePanel(view.atlas, key, { edges: view.picture.edges, onmore: () => (view.state.opened.add(key),
    redraw(view)) }).then((content) => view.state.shown === key && show(view.panel, content));
}
