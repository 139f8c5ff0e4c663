// One traced prompt as a picture: tokens are columns, layers rows (the last on top), a supernode a
// bar over its layers, as wide as the answer changes without it. Arrow keys walk along the bars.

import { linkVertical } from "d3-shape";
import { svg } from "../dom.js";
import { clip, fixed } from "../format.js";
import { visible } from "../ui/tokens.js";

const [ROW, HEAD, SIDE, SLOT] = [26, 34, 40, 30];
const curve = linkVertical();
const layerOf = (cut) => Number(/^L(\d+)/.exec(cut)?.[1] ?? 0);
export const effect = (node) => node.removed ?? node.predicted ?? 0;

/** What a bar says to a reader who does not see it. */
export function barText(trace, node) {
  const real = node.removed === null ? "" : `, real effect ${fixed(node.removed)}`;
  const breaks = node.breaks ? ", removal breaks the text" : "";
  const differs = node.differs ? ", prediction differs from removal" : "";
  return `S${node.id} ${visible(clip(node.name, 80))} on ${visible(trace.pieces[node.token])}, ` +
    `layers ${node.first_layer} to ${node.last_layer}${real}, predicted ` +
    `${fixed(node.predicted ?? NaN)}${differs}${breaks}`;
}

export function traceGraph(trace, { width, n, chosen, onchoose }) {
  const nodes = trace.supernodes.slice(0, n);
  const place = placed(trace, nodes, width);
  const bars = nodes.map((node) => bar(trace, node, place, onchoose));
  const root = svg("svg", { viewBox: `0 0 ${place.width} ${place.height}`, width: place.width,
    height: place.height, class: "trace-graph", role: "group",
    "aria-label": "Supernodes of the prompt. Arrow keys walk, Enter shows one." },
    hatch(), grid(trace, place), rest(trace, place),
    edges(trace, nodes, place), bars);
  root.addEventListener("keydown", (event) => walk(event, nodes, bars, onchoose));
  const mark = (id) => nodes.forEach((node, i) => {
    bars[i].classList.toggle("chosen", node.id === id);
    bars[i].setAttribute("tabindex", node.id === (id ?? nodes[0]?.id) ? 0 : -1);
  });
  mark(chosen);
  return { node: root, mark };
}

function placed(trace, nodes, width) {
  const layers = trace.cuts.map(layerOf);
  const rows = [...new Set([...layers, ...nodes.flatMap((node) => [node.first_layer,
    node.last_layer])])].sort((a, b) => a - b);
  const slots = new Map();
  const taken = trace.pieces.map(() => []);
  for (const node of nodes) {
    const here = taken[node.token];
    let slot = here.findIndex((one) => one.every((other) => other.first_layer > node.last_layer
      || other.last_layer < node.first_layer));
    if (slot < 0) slot = here.push([]) - 1;
    here[slot].push(node);
    slots.set(node.id, slot);
  }
  const need = trace.pieces.map((piece, i) =>
    Math.max(18 + 7 * Math.min(visible(piece).length, 10), 14 + SLOT * taken[i].length));
  const spare = Math.max(0, (width - SIDE - 8 - need.reduce((a, b) => a + b, 0)) / need.length);
  const x = [];
  let at = SIDE;
  for (const each of need) {
    x.push(at);
    at += each + Math.min(spare, 60);
  }
  const y = new Map(rows.map((layer, i) => [layer, HEAD + (rows.length - 1 - i) * ROW]));
  const most = Math.max(...nodes.map((node) => Math.abs(effect(node))), 1e-9);
  return { x, y, rows, slots, most, width: Math.ceil(at + 8), height: HEAD + rows.length * ROW + 8,
    columns: [...x.slice(1), at].map((right, i) => right - x[i]) };
}

const hatch = () => svg("defs", {}, svg("pattern", { id: "differs", width: 5, height: 5,
  patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
  svg("rect", { width: 5, height: 5, class: "hatch-ground" }),
  svg("line", { x1: 0, y1: 0, x2: 0, y2: 5, class: "hatch-line" })));

function grid(trace, { x, y, rows, width, columns }) {
  const heads = trace.pieces.map((piece, i) => svg("text", { x: x[i] + columns[i] / 2, y: 18,
    "text-anchor": "middle", class: "tick strong" }, clip(visible(piece).trim() || "␣", 12)));
  const lines = rows.map((layer) => [svg("line", { x1: SIDE, x2: width - 8, y1: y.get(layer) + ROW
    - 3, y2: y.get(layer) + ROW - 3, class: "grid" }), svg("text", { x: SIDE - 6, y: y.get(layer)
    + 16, "text-anchor": "end", class: "tick" }, `L${layer}`)]);
  return svg("g", { "aria-hidden": "true" }, lines, heads);
}

// What no feature explains: one cell a token and cut, darker the larger its score; whole rows of
// sinks are framed.
function rest(trace, { x, y, columns }) {
  const errors = trace.rest.filter((each) => each.kind === "error");
  const most = Math.max(...errors.flatMap((each) => each.score.map((s) => Math.abs(s ?? 0))), 1e-9);
  const cells = trace.rest.filter((each) => each.kind !== "bias").flatMap((each) =>
    each.score.map((score, i) => score !== null && svg("rect", { x: x[i] + 2,
      y: y.get(layerOf(each.cut)) + ROW - 8, width: Math.max(columns[i] - 4, 1), height: 4,
      class: `rest ${each.kind}`, "fill-opacity": each.kind === "sink" ? 0.5
        : (0.1 + 0.7 * Math.abs(score) / most).toFixed(2) },
      svg("title", {}, each.kind === "sink" ? `${each.cut}: a sink, kept whole`
        : `${each.cut}: not explained by features, score ${fixed(score)}`))));
  return svg("g", { "aria-hidden": "true" }, cells);
}

function box(node, { x, y, slots, most }) {
  const wide = 4 + 18 * Math.abs(effect(node)) / most;
  const left = x[node.token] + 10 + SLOT * slots.get(node.id) + (22 - wide) / 2;
  const top = y.get(node.last_layer) + 2;
  return { left, top, wide, tall: y.get(node.first_layer) - top + ROW - 8 };
}

function bar(trace, node, place, onchoose) {
  const { left, top, wide, tall } = box(node, place);
  const sign = effect(node) >= 0 ? "helps" : "hurts";
  const kind = `${sign}${node.differs ? " differs" : ""}${node.breaks ? " breaks" : ""}`;
  const badge = `${node.breaks ? "✕" : ""}${node.differs ? "≠" : ""}`;
  return svg("g", { class: `supernode ${kind}`, role: "button", tabindex: -1,
    "data-supernode": node.id, "aria-label": barText(trace, node), onclick: () =>
      onchoose(node.id) }, svg("title", {}, barText(trace, node)), svg("rect", { x: left - 4,
    y: top - 2, width: wide + 8, height: tall + 4, class: "hit" }), svg("rect", { x: left, y: top,
    width: wide, height: tall, rx: 2, class: "body" }), node.differs && svg("rect", { x: left,
    y: top, width: wide, height: tall, rx: 2, fill: "url(#differs)" }), svg("text", { x: left + wide
    / 2, y: top + 11, "text-anchor": "middle", class: "bar-id" }, `${node.id}${badge}`));
}

function edges(trace, nodes, place) {
  const of = new Map(nodes.map((node) => [node.id, node]));
  const size = (edge) => Math.abs(edge.removed ?? edge.predicted ?? 0);
  const shown = trace.edges.filter((edge) => edge.drawn && of.has(edge.source)
    && of.has(edge.target));
  const most = Math.max(...shown.map(size), 1e-9);
  return shown.slice(0, 60).map((edge) => {
    const [a, b] = [of.get(edge.source), of.get(edge.target)];
    const [from, to] = [box(a, place), box(b, place)];
    const line = curve({ source: [from.left + from.wide / 2, from.top],
      target: [to.left + to.wide / 2, to.top + to.tall] });
    const sign = (edge.removed ?? edge.predicted) >= 0 ? "helps" : "hurts";
    return svg("path", { d: line, class: `trace-edge ${sign}`, fill: "none",
      "stroke-width": (0.8 + 3.5 * size(edge) / most).toFixed(1),
      "stroke-dasharray": a.token === b.token ? null : "5 3" },
      svg("title", {}, `S${a.id} → S${b.id}: ${edgeText(edge)}`));
  });
}

export const edgeText = (edge) => [edge.removed !== null && `real ${fixed(edge.removed)}`,
  edge.predicted !== null && `predicted ${fixed(edge.predicted)}`].filter(Boolean).join(", ");

// Up and down along a token, left and right to the nearest bar of the next token that has one.
function walk(event, nodes, bars, onchoose) {
  const at = bars.indexOf(document.activeElement);
  if (at < 0) return;
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    onchoose(nodes[at].id);
    return;
  }
  const order = nodes.map((node, i) => i).sort((a, b) => nodes[a].token - nodes[b].token
    || nodes[b].last_layer - nodes[a].last_layer || a - b);
  const here = order.indexOf(at);
  const token = nodes[at].token;
  const next = { ArrowUp: order[here - 1], ArrowDown: order[here + 1],
    ArrowRight: order.find((i) => nodes[i].token > token),
    ArrowLeft: order.findLast((i) => nodes[i].token < token) }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  bars.forEach((one, i) => one.setAttribute("tabindex", i === next ? 0 : -1));
  bars[next].focus();
}
