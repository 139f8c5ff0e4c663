// Draws a focus graph as SVG: boxes in columns of layers, curved links between them, "+n" where
// links are left out.
// One box is in the tab order (the chosen one); the arrow keys walk along the links.

import { linkHorizontal } from "d3-shape";
import { siteOf } from "../data/atlas.js";
import { svg } from "../dom.js";
import { briefLabel, clip, percent } from "../format.js";
import { CLASS_NAMES, isNoRule } from "../ui/parts.js";
import { visible } from "../ui/tokens.js";
import { layout } from "./layout.js";
import { edgeText } from "./rows.js";
import { pathsThrough } from "./select.js";

const curve = linkHorizontal();
const ROW = 48;
const BOX = 36;
const HEAD = 26;
const RELATION_CLASS = ["residual", "mlp", "attention"];

export function drawGraph(picture, { width, chosen, onchoose, onopen, onmore }) {
  const placed = place(picture, width);
  const root = svg("svg", { viewBox: `0 0 ${placed.width} ${placed.height}`, width: placed.width,
    height: placed.height, class: "graph", role: "application",
    "aria-label": "Flow graph. Arrow keys walk along links, Enter opens the card, plus shows " +
      "more links." });
  const edges = picture.edges.map((edge) => drawEdge(edge, placed));
  const boxes = new Map(picture.nodes.map((node) => [node.key, drawNode(node, placed, picture)]));
  root.append(...columnHeads(placed), ...edges.map((item) => item.node), ...boxes.values());
  const self = { root, picture, placed, edges, boxes, chosen, onchoose, onopen, onmore };
  listen(self);
  mark(self, chosen);
  return { node: root, reveal: (focus) => reveal(self, focus) };
}

function place(picture, width) {
  const columns = columnsOf(picture);
  const columnWidth = Math.max(162, Math.min(250, Math.floor((width - 16) / columns.list.length)));
  const index = new Map(picture.nodes.map((node, i) => [node.key, i]));
  const nodes = picture.nodes.map((node) => ({ column: columns.of.get(siteOf(node.key)) }));
  const edges = picture.edges.map((edge) => ({ a: index.get(edge.source), b: index.get(edge.target),
    weight: 0.05 + edge.strength ** 2 }));
  const y = layout(nodes, edges);
  const least = Math.min(...y);
  const most = Math.max(...y);
  const at = new Map(picture.nodes.map((node, i) =>
    [node.key, { x: 8 + nodes[i].column * columnWidth + 14, y: HEAD + 8 + (y[i] - least) * ROW,
    column: nodes[i].column }]));
  return { at, columns: columns.list, columnWidth, boxWidth: columnWidth - 44,
    width: Math.max(width - 2, 16 + columnWidth * columns.list.length), height: HEAD + 8
    + (most - least) * ROW + BOX + 10 };
}

// Modules of a layer stand in a column of their own, before the residual stream they write to.
function columnsOf({ atlas, nodes }) {
  const rank = (site) => site.layer * 2 + (site.kind === "resid_post" ? 1 : 0);
  const sites = [...new Set(nodes.map((node) => siteOf(node.key)))];
  const ranks = [...new Set(sites.map((i) => rank(atlas.sites[i])))].sort((a, b) => a - b);
  const list = ranks.map((r) => (r % 2 ? `L${(r - 1) / 2}` : `L${r / 2} modules`));
  return { list, of: new Map(sites.map((i) => [i, ranks.indexOf(rank(atlas.sites[i]))])) };
}

function columnHeads({ columns, columnWidth, height }) {
  return columns.map((name, c) => svg("g", { class: "column-head", "aria-hidden": "true" },
    svg("line", { x1: 8 + c * columnWidth + 14, x2: 8 + c * columnWidth + 14, y1: HEAD - 4,
    y2: height, class: "grid" }), svg("text", { x: 8 + c * columnWidth + 14, y: 14, class: "tick" },
    name)));
}

function drawEdge(edge, { at, boxWidth }) {
  const [from, to] = [at.get(edge.source), at.get(edge.target)];
  const [x0, y0, x1, y1] = [from.x + boxWidth, from.y + BOX / 2, to.x, to.y + BOX / 2];
  const wide = 0.8 + 4.7 * edge.strength;
  const path = svg("path", { d: curve({ source: [x0, y0], target: [x1, y1] }),
    "stroke-width": wide.toFixed(2), "stroke-opacity": (0.28 + 0.72 * edge.strength).toFixed(2),
    "stroke-dasharray": edge.mutual ? null : `${(wide + 4).toFixed(1)} ${(wide + 2).toFixed(1)}`,
    fill: "none" });
  const tested = Number.isFinite(edge.success);
  const [mx, my] = [(x0 + x1) / 2, (y0 + y1) / 2];
  const diamond = tested && svg("path", { d: `M${mx} ${my - 5}l5 5-5 5-5-5z`,
    class: edge.success >= 0.5 ? "causal yes" : "causal no" });
  return { edge, node: svg("g", { class: `edge ${RELATION_CLASS[edge.relation]}` },
    svg("title", {}, edgeText(edge)), svg("path", { d: path.getAttribute("d"), class: "edge-hit",
    fill: "none" }), path, diamond) };
}

function drawNode(node, { at, boxWidth }, picture) {
  const { x, y } = at.get(node.key);
  const characters = Math.max(6, Math.floor((boxWidth - 16) / 6.6));
  const label = visible(node.label || "never active");
  const said = `${node.id}, ${clip(label, 80)}; ${CLASS_NAMES[node.class] ?? "unknown"}; active ` +
    `on ${percent(node.density)}; ${node.hiddenIn + node.hiddenOut} links not shown`;
  const focus = node.key === picture.focus;
  return svg(
    "g",
    { class: `node class-${node.class}${focus ? " focus" : ""}`, role: "button", tabindex: -1,
      "data-key": node.key, "data-feature": node.id,
      transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` },
    svg("title", {}, said),
    svg("rect", { width: boxWidth, height: BOX, rx: 3, class: "box" }),
    svg("rect", { width: 4, height: BOX, class: "class-edge" }),
    svg("text", { x: 10, y: 14, class: "node-id" }, node.id),
    svg("circle", { cx: boxWidth - 9, cy: 10, r: (1.2 + 3.4 * densityShare(node.density))
      .toFixed(1), class: "density-dot" }),
    svg("text", { x: 10, y: 29, class: isNoRule(node.label) ? "node-label quiet" : "node-label" },
      clip(briefLabel(label), characters)),
    node.hiddenIn > 0 && stub(-4, node.hiddenIn, "end"),
    node.hiddenOut > 0 && stub(boxWidth + 4, node.hiddenOut, "start"),
  );
}

// 0.001 % -> 0, 10 % -> 1, logarithmic.
const densityShare = (density) =>
  Math.max(0, Math.min(1, (Math.log10(Math.max(density, 1e-9)) + 5) / 4));

function stub(x, n, anchor) {
  return svg("text", { x, y: BOX + 1, "text-anchor": anchor, class: "stub" },
    `+${n > 99 ? "99" : n}`);
}

function listen(self) {
  const { root } = self;
  const keyAt = (event) => {
    const box = event.target.closest?.(".node");
    return box ? Number(box.dataset.key) : null;
  };
  root.addEventListener("click", (event) => {
    const key = keyAt(event);
    if (key === null) return;
    if (event.target.classList.contains("stub")) self.onmore(key);
    else mark(self, key), self.boxes.get(key).focus({ preventScroll: true }), self.onchoose(key);
  });
  root.addEventListener("dblclick", (event) => keyAt(event) !== null && self.onopen(keyAt(event)));
  root.addEventListener("pointerover", (event) => light(self, keyAt(event)));
  root.addEventListener("pointerleave", () => light(self, null));
  root.addEventListener("focusin", (event) => light(self, keyAt(event)));
  root.addEventListener("focusout", () => light(self, null));
  root.addEventListener("keydown", (event) => press(self, event, keyAt(event)));
}

function press(self, event, key) {
  if (key === null) return;
  const walk = { ArrowLeft: () => along(self, key, "source"), ArrowRight: () => along(self, key,
    "target"), ArrowUp: () => beside(self, key, -1), ArrowDown: () => beside(self, key, 1) }[
    event.key];
  if (event.key === "Enter") self.onopen(key);
  else if (event.key === "+" || event.key === "=") self.onmore(key);
  else if (event.key === " ") self.onchoose(key);
  else if (!walk) return;
  event.preventDefault();
  const next = walk?.();
  if (next === undefined || next === null) return;
  mark(self, next);
  reveal(self, true);
  self.onchoose(next);
}

/** The strongest shown link's other end. */
function along({ picture }, key, end) {
  const start = end === "source" ? "target" : "source";
  return picture.edges.find((edge) => edge[start] === key)?.[end];
}

function beside({ placed, picture }, key, step) {
  const here = placed.at.get(key);
  const column = picture.nodes.map((node) => node.key)
    .filter((one) => placed.at.get(one).column === here.column);
  column.sort((a, b) => placed.at.get(a).y - placed.at.get(b).y);
  return column[column.indexOf(key) + step];
}

function mark(self, key) {
  self.boxes.get(self.chosen)?.setAttribute("tabindex", -1);
  self.boxes.get(self.chosen)?.classList.remove("chosen");
  self.chosen = key;
  self.boxes.get(key).setAttribute("tabindex", 0);
  self.boxes.get(key).classList.add("chosen");
}

function light({ root, picture, boxes, edges }, key) {
  root.classList.toggle("lit", key !== null);
  if (key === null) return;
  const lit = pathsThrough(key, picture.edges);
  for (const [own, box] of boxes) box.classList.toggle("on", lit.has(own));
  for (const { edge, node } of edges) node.classList.toggle("on", lit.has(edge.source)
    && lit.has(edge.target));
}

function reveal({ boxes, chosen, root }, focus) {
  const box = boxes.get(chosen);
  const scroller = root.parentElement;
  const x = Number(/translate\(([\d.]+)/.exec(box.getAttribute("transform"))?.[1] ?? 0);
  if (x < scroller.scrollLeft + 60 || x > scroller.scrollLeft
    + scroller.clientWidth - 200) scroller.scrollLeft = x - scroller.clientWidth / 2 + 80;
  if (focus) box.focus({ preventScroll: false });
}
