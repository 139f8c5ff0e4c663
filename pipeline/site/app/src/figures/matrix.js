// The layer x layer link matrix: how much of each layer's dictionary has an accepted predecessor in
// each earlier one.
// One cell is chosen (arrow keys or pointer); its numbers, with the null of the pair, stand beside
// the drawing.

import { h, show, svg } from "../dom.js";
import { fixed, percent } from "../format.js";
import { choice } from "../ui/parts.js";
import { figure } from "./export.js";
import { pairRows } from "./nullplot.js";
import { everyNth, responsive, text } from "./plot.js";

const MEASURES = {
  share: { name: "share of features linked", of: (pair) => pair.n_links / pair.n_possible,
    low: () => 0, format: percent },
  cosine: { name: "median cosine", of: (pair) => pair.median_cosine, low: () => 0, format: fixed },
  above: { name: "median cosine above chance", of: (pair) =>
    (pair.median_cosine - pair.null_median) / (1 - pair.null_median), low: () => 0, format: fixed },
  mutual: { name: "share of links that are mutual", of: (pair) => pair.mutual, low: () => 0,
    format: percent },
  agreement: { name: "agreement with co-activation", of: (pair) => pair.agreement, low: () => 0,
    format: percent },
};

export function linkMatrix(atlas, model) {
  const sites = atlas.sites.map((site, i) => ({ ...site, i }))
    .filter((site) => site.kind === "resid_post");
  const at = new Map(sites.map((site, i) => [site.i, i]));
  const pairs = model.pairs.filter((pair) => at.has(pair.source) && at.has(pair.target));
  const cells = new Map(pairs.map((pair) => [`${at.get(pair.source)} ${at.get(pair.target)}`,
    pair]));
  const state = { measure: "share", cell: null };
  const detail = h("div", { class: "matrix-detail", "aria-live": "polite" });
  const box = responsive((width) => draw(Math.min(width, 560)), { label: "Link matrix" });
  const usable = Object.entries(MEASURES).filter(([, measure]) =>
    pairs.some((pair) => Number.isFinite(value(measure, pair))));

  function draw(width) {
    const margin = 34;
    const size = (width - margin - 4) / sites.length;
    const nth = everyNth(sites.length, width - margin, 24);
    const measure = MEASURES[state.measure];
    const ground = sites.flatMap((_, s) => sites.map((_, t) => [s, t]))
      .filter(([s, t]) => cells.has(`${s} ${t}`));
    const squares = ground.map(([s, t]) => {
      const share = value(measure, cells.get(`${s} ${t}`));
      const shade = Number.isFinite(share) ? Math.max(1, Math.min(9, Math.ceil(9 * share))) : 0;
      return svg("rect", { x: margin + t * size, y: 4 + s * size, width: Math.max(1, size - 0.6),
        height: Math.max(1, size - 0.6), class: shade ? `shade${shade}` : "shade0",
        "data-cell": `${s} ${t}` });
    });
    const marks = sites.map((site, i) => i % nth === 0
      && [text(margin + (i + 0.5) * size, 4 + sites.length * size + 14, site.layer,
      { anchor: "middle" }), text(margin - 5, 4 + (i + 0.7) * size, site.layer,
      { anchor: "end" })]);
    const height = 4 + sites.length * size + 34;
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, tabindex: 0,
      role: "application",
      "aria-label": "Link matrix. Arrow keys choose a pair of layers; its numbers are read out.",
      onkeydown: walk, onclick: pick, onpointermove: (event) => event.pointerType === "mouse"
      && pick(event) }, squares, marks, text(margin + (sites.length * size) / 2, height - 4,
      "to layer", { anchor: "middle" }), text(0, 0, "from layer",
      { anchor: "middle", transform: `translate(9 ${4 + (sites.length * size) / 2}) rotate(-90)` }),
      frame(margin, size));
    return picture;
  }

  function frame(margin, size) {
    if (!state.cell) return null;
    const [s, t] = state.cell;
    return svg("rect", { x: margin + t * size - 1, y: 3 + s * size, width: size + 1.4, height: size
      + 1.4, class: "chosen-cell" });
  }

  function pick(event) {
    const cell = event.target.dataset?.cell;
    if (cell && cell !== state.cell?.join(" ")) choose(cell.split(" ").map(Number));
  }

  function walk(event) {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[
      event.key];
    if (!step) return;
    event.preventDefault();
    let [s, t] = state.cell ?? [0, 1];
    for (let i = 0; i < sites.length; i++) {
      [s, t] = [s + step[0], t + step[1]];
      if (cells.has(`${s} ${t}`)) return choose([s, t]);
    }
  }

  function choose(cell) {
    state.cell = cell;
    const focused = box.contains(document.activeElement);
    box.redraw();
    if (focused) box.querySelector("svg").focus();
    show(detail, pairText(cells.get(cell.join(" ")), sites));
  }

  const selector = choice({ label: "Show", value: state.measure,
    options: usable.map(([id, measure]) => [id, measure.name]), onchange: (id) =>
    ((state.measure = id), box.redraw()) });
  show(detail, h("p", { class: "quiet" }, "Choose a cell to read its numbers and its null."));
  const key = h("span", { class: "shade-key", role: "img", "aria-label": "Shades from 0 to 1" },
    "0", Array.from({ length: 9 }, (_, i) => h("span", { class: `swatch shade${i + 1}`,
    "aria-hidden": "true" })), "1");
  return figure({ name: "link-matrix", title: "Links between layers",
    drawing: h("div", {}, h("div", { class: "controls" }, selector, key),
    h("div", { class: "matrix-box" }, box, detail)),
    caption: "Rows: the layer a link starts from; columns: the layer it reaches. Pairs of " +
      "neighbouring layers lie next to the diagonal.", rows: () => pairRows(atlas, model) });
  function at2(i) {
    return sites.find((site) => site.i === i)?.short;
  }
  function pairText(pair) {
    const item = (name, shown) => h("div", {}, h("dt", {}, name), h("dd", {}, shown));
    return [
      h("p", {}, h("strong", {}, `${at2(pair.source)} → ${at2(pair.target)}`), pair.initialisation
        && h("span", { class: "quiet" }, ` ${pair.initialisation}`)),
      h("dl", { class: "facts" },
        item("linked", `${percent(pair.n_links / pair.n_possible)} (${pair.n_links} of ` +
          `${pair.n_possible})`), item("median cosine", fixed(pair.median_cosine)),
          item("chance: median", fixed(pair.null_median)), item("chance: 99th percentile",
          fixed(pair.null_p99)), item("threshold", fixed(pair.threshold)),
          item("mutual", percent(pair.mutual ?? NaN)), item("agrees with co-activation",
          percent(pair.agreement ?? NaN))),
    ];
  }
}

function value(measure, pair) {
  const x = measure.of(pair);
  return x === null || Number.isNaN(x) ? NaN : Math.max(0, x);
}
