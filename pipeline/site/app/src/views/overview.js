// The model at a glance: headline numbers, what happens to features layer by layer, how strongly
// layers are linked
// against chance, and where to begin.

import { h } from "../dom.js";
import { count, fixed, percent, short } from "../format.js";
import { figure } from "../figures/export.js";
import { layerStrip, stripRows } from "../figures/layerstrip.js";
import { linkMatrix } from "../figures/matrix.js";
import { nullFigure, pairRows } from "../figures/nullplot.js";
import { link } from "../route.js";
import { Trunks } from "../data/trunks.js";
import { featureLink, isNoRule, labelText } from "../ui/parts.js";

const HEADLINES = {
  n_sites: "dictionaries", n_features: "features", n_alive: "alive",
    n_labelled: "with an accepted label", labelled_share: "of the living have a label",
    n_links: "links kept", fvu_median: "variance unexplained, median",
  links_mutual: "mutual links", n_trunks: "trunks of three layers or more",
    n_communities: "communities", l0_median: "active per token, median",
};

export async function overview({ atlas }) {
  const [model, trunks, steering] = await Promise.all([atlas.flowModel(), Trunks.open(atlas),
    atlas.steering()]);
  const node = h(
    "div",
    {},
    h("h1", {}, atlas.manifest.title),
    h("p", { class: "lead" }, describe(atlas)),
    headline(atlas.manifest.headline ?? {}),
    stripFigure(atlas),
    atlas.has.flow ? matrixFigures(atlas, model, beginnings(atlas, trunks, steering))
      : beginnings(atlas, trunks, steering),
    sitesFigure(atlas),
  );
  return { title: "Overview", node };
}

function describe({ manifest, sites }) {
  const { corpus, model } = manifest;
  const documents = corpus.n_documents ? ` from ${count(corpus.n_documents)} documents` : "";
  return `${sites.length} dictionaries over the ${model.n_layers} layers of ${model.name}, read ` +
    `on ${count(corpus.n_tokens_seen)} tokens${documents}.`;
}

function headline(numbers) {
  const items = Object.entries(numbers).filter(([, value]) => value !== null
    && typeof value !== "object");
  const shown = ([name, value]) => (typeof value !== "number" ? String(value)
    : /share|fvu/.test(name) ? percent(value) : Number.isInteger(value) ? count(value)
    : short(value));
  return h("dl", { class: "headline" }, items.map(([name, value]) =>
    h("div", {}, h("dt", {}, HEADLINES[name] ?? name.replaceAll("_", " ")),
    h("dd", {}, shown([name, value])))));
}

function stripFigure(atlas) {
  const { box, rows } = { box: layerStrip(atlas), rows: () => stripRows(atlas) };
  const caption = atlas.has.flow
    ? "Living features of the residual dictionaries. Carried: the same direction stood in the " +
      "layer before. Processed: carried, and also written to by this layer’s MLP or attention. " +
      "Newborn: written by this layer only. Below the line: features with no link onward. "
    : "This atlas was made without a flow graph: the features of a layer are shown as one group.";
  return figure({ name: "layers", title: "What happens to features, layer by layer", drawing: box,
    caption: [caption, atlas.has.flow && h("a", { href: link("flow") }, "The flow in full")],
    rows });
}

function matrixFigures(atlas, model, begin) {
  return h(
    "div",
    { class: "columns" },
    linkMatrix(atlas, model),
    h(
      "div",
      {},
      figure({
        name: "links-and-null",
        title: "Links of neighbouring layers against chance",
        drawing: nullFigure(atlas, model),
        caption: "Median cosine of a feature with its best predecessor one layer earlier, " +
          "against the same number for a null model of the pair. The dashed line is the " +
          "acceptance threshold.",
        rows: () => pairRows(atlas, model),
      }),
      begin,
    ),
  );
}

function beginnings(atlas, trunks, steering) {
  const steered = [...new Set((steering.samples ?? []).map((sample) => sample.feature))]
    .slice(0, 6);
  const labelOf = new Map((steering.samples ?? []).map((sample) => [sample.feature, sample.label]));
  const labelled = (trunks?.all ?? []).filter((trunk) => trunk.length > 2 && !isNoRule(trunk.label))
    .slice(0, 6);
  if (!steered.length && !labelled.length) return null;
  const item = (id, label, note) => h("li", {}, featureLink(id), " ", labelText(label ?? "", 80),
    note && h("span", { class: "quiet" }, ` ${note}`));
  return h(
    "section",
    { class: "begin" },
    h("h2", {}, "Where to begin"),
    h(
      "div",
      {},
      labelled.length > 0 && h("div", {}, h("h3", {}, "Features that run through many layers"),
        h("ul", { class: "links" }, labelled.map((trunk) => item(trunk.middle, trunk.label,
        `${trunk.length} layers`))), h("p", {}, h("a", { href: link("trunks") }, "All trunks"))),
      steered.length > 0 && h("div", {}, h("h3", {}, "Features the model was steered with"),
        h("ul", { class: "links" }, steered.map((id) => item(id, labelOf.get(id))))),
    ),
  );
}

function sitesFigure(atlas) {
  const head = ["site", "latents", "alive", "labelled", "variance unexplained", "active per token"];
  const cells = (site) => [site.short, site.n_latents, site.n_alive, site.n_labelled,
    site.metrics?.fvu, site.metrics?.l0];
  const shown = atlas.sites.map((site) => [h("a", { href: link(`site/${site.short}`) }, site.short),
    count(site.n_latents), count(site.n_alive),
    percent(site.n_labelled / Math.max(1, site.n_alive)), fixed(site.metrics?.fvu, 3),
    fixed(site.metrics?.l0, 1)]);
  return h(
    "section",
    {},
    figure({ name: "dictionaries", title: "Dictionaries", rows: () =>
      ({ head, rows: atlas.sites.map(cells) }), list: h(
      "div",
      { class: "scroll tall", tabindex: 0, role: "region", "aria-label": "Dictionaries" },
      h("table", { class: "plain" },
        h("thead", {}, h("tr", {},
        head.map((name, i) => h("th", { scope: "col", class: i ? "number" : null }, name)))),
        h("tbody", {}, shown.map((row) =>
        h("tr", {}, row.map((cell, i) => h(i ? "td" : "th", { scope: i ? null : "row", class: i
        ? "number" : null }, cell)))))),
    ) }),
  );
}
