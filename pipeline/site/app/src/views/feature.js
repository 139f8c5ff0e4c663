// The feature card: what it is active on, how sure the label is, what it writes, where it comes
// from and goes to.

import { latentOf, siteOf } from "../data/atlas.js";
import { Flow } from "../data/flow.js";
import { h, show } from "../dom.js";
import { count, percent, plural, short, siteKind } from "../format.js";
import { activationHistogram, histogramRows, positionRows, rateBars, sourceRows,
  topicRows } from "../figures/histogram.js";
import { figure, saveButtons } from "../figures/export.js";
import { link } from "../route.js";
import { chainSection, neighbourSection } from "./connections.js";
import { examplesSection } from "./evidence.js";
import { shown } from "./lens.js";
import { noteBox } from "./notebox.js";
import { steeringSection } from "./steering.js";
import { classBadge, compareButton, copyButton, empty, FLAG, labelText, ownLabel, scoreBar,
  shareBar } from "../ui/parts.js";
import { tokenChip, visible } from "../ui/tokens.js";
import { featureLink } from "../ui/parts.js";

const HELD = 0.1; // the same threshold as for naming a feature by it in lists

export async function feature({ atlas, key, options, live, alive }) {
  const site = siteOf(key);
  const [overview, names, vocabulary, card, flow, steering, scores] =
    await Promise.all([atlas.overview(site), atlas.labels(site), atlas.vocabulary(),
    atlas.card(key), Flow.open(atlas), atlas.steering(), atlas.scores()]);
  const view = { atlas, key, id: atlas.id(key), latent: latentOf(key), site: atlas.sites[site],
    overview, names, vocabulary, card, flow, steering, opinion: scores[atlas.id(key)], options,
    live, alive };
  const body = card.count === 0 ? neverFired(view) : [evidence(view)];
  const node = h("article", { class: "card" }, head(view), body, later(() => chainSection(view)),
    later(() => neighbourSection(view)), card.count > 0 && places(view),
    later(() => lensSection(view)), steeringSection(view));
  return { title: view.id, node };
}

// Sections that need other dictionaries come when they are read; the card itself does not wait for
// them.
function later(make) {
  const place = h("div", { "data-waiting": true });
  make()
    .catch((error) => h("p", { class: "warning", role: "alert" }, error.message))
    .then((node) => (show(place, node), place.removeAttribute("data-waiting")));
  return place;
}

async function lensSection({ atlas, key }) {
  const found = await atlas.lensColumns(key);
  const item = ({ lens, title, name, value }) =>
    h("div", {}, h("dt", {}, h("a", { href: link(`lens/${lens}`), title: visible(title) },
    visible(name.replaceAll("_", " ")))), h("dd", {}, shown(value)));
  return found.length > 0 && h("section", { class: "lens-columns" }, h("h2", {}, "What lenses say"),
    h("dl", { class: "facts" }, found.map(item)));
}

function head(view) {
  const { atlas, id, latent, site, overview, names, card } = view;
  const step = (to, text) => to >= 0 && to < site.n_latents
    && h("a", { href: link(`${site.short}/${to}`), rel: text, "aria-label": `${text} latent` },
    text === "previous" ? "← " : " →");
  const kind = atlas.manifest.classes[overview.class[latent]];
  return h(
    "header",
    { class: "feature-head" },
    h("nav", { class: "crumbs", "aria-label": "Dictionary" },
      h("a", { href: link(`site/${site.short}`) }, `${site.short} ${siteKind(site)}`),
      step(latent - 1, "previous"), step(latent + 1, "next")),
    h("h1", {}, h("span", { class: "feature" }, id), " ",
      labelText(ownLabel(id, names.labels[latent]), 200)),
    h("p", { class: "facts-line" }, overview.class[latent] > 0 && classBadge(kind), facts(view)
      .map((text) => h("span", {}, text))),
    h("div", { class: "actions" }, h("a", { class: "action primary", href: link(`graph/${id}`) },
      "Flow graph"), compareButton(id), copyButton(() => location.href, "Copy link"),
      card.count > 0 && cardExport(view)),
    noteBox(id),
  );
}

function facts({ overview, latent, card, atlas, site }) {
  const [birth, death] = [overview.birth[latent], overview.death[latent]];
  const out = [`active on ${percent(overview.density[latent])} of tokens`,
    `${plural(card.count, "activation")} in ${plural(card.n_documents, "document")}`,
    `largest ${short(card.max)}, mean ${short(card.mean)}`];
  if (Number.isFinite(card.threshold)) out.push(`threshold ${short(card.threshold)}`);
  // a module's output is not followed through the layers: it flows on in the residual stream
  if (atlas.has.flow && birth >= 0 && site.kind === "resid_post") out.push(birth === death
    ? `lives in L${birth} only` : `lives L${birth} … L${death}`);
  if (overview.flags[latent] & FLAG.dense) out.push("active on more than a tenth of all tokens");
  if (overview.flags[latent] & FLAG.oneToken) out.push("one token carries at least 90 %");
  return card.count ? out : ["never active"];
}

function cardExport(view) {
  const { card, vocabulary, id } = view;
  const rows = () => ({ head: ["kind", "token", "id", "value"],
    rows: [...tokenRows(card, "token", vocabulary).map((row) => ["active on", row.text, row.token,
    row.share]), ...tokenRows(card, "previous", vocabulary).map((row) => ["active after", row.text,
    row.token, row.share]), ...scored(card, "promotes", vocabulary)
    .map((row) => ["promotes", row.text, row.token, row.score]), ...scored(card, "suppresses",
    vocabulary).map((row) => ["suppresses", row.text, row.token, row.score])] });
  return saveButtons({ name: `tokens-${id.replace("/", "-")}`, rows });
}

function neverFired(view) {
  return [empty("This latent was never active on the corpus.",
    `The corpus has ${count(view.atlas.manifest.corpus.n_tokens_seen)} tokens; a larger one may ` +
      `wake it. What it would write is below.`), h("div", { class: "card-grid" }, h("div", {}),
      h("div", {}, outputTables(view)))];
}

function evidence(view) {
  return h("div", { class: "card-grid" }, h("div", {}, labelTable(view), examplesSection(view)),
    h("div", {}, histogram(view), tokenTable(view, "token", "Active on"),
    tokenTable(view, "previous", "Active after"), outputTables(view)));
}

function labelTable({ card, atlas, opinion }) {
  const labels = [...card.labels, ...(opinion?.labels ?? [])];
  if (!labels.length) return h("section", {}, h("h2", {}, "Labels"), empty("No label was tried.",
    "A label needs enough activations in held-out documents."));
  const rows = labels.map((label) =>
    h(
      "tr",
      { class: label.accepted || label.method === "model" ? "" : "rejected" },
      h("td", {}, labelText(label.text, 300), label.score !== null
        && atlas.method(label.method)?.kind === "none" && h("span", { class: "quiet" },
        " (score: of the best rule tried)"), didNotHold(atlas, label), label.from
        && h("span", { class: "quiet" }, " from ", featureLink(label.from),
        Number.isFinite(label.cosine) && ` cosine ${short(label.cosine)}`)),
      label.method === "model"
        ? h("td", { title: "written by a language model; the score is its balanced accuracy at " +
          "telling held-out windows apart" }, `model ${label.model ?? ""}`)
          : h("td", { title: atlas.method(label.method)?.about }, (atlas.method(label.method)?.name
          ?? "–").replaceAll("_", " ")),
      h("td", {}, scoreBar(label.score, label.low, label.high), Number.isFinite(label.fuzz?.score)
        && h("span", { class: "quiet small",
        title: "balanced accuracy at telling windows marked where it is active from the same " +
          "ones marked elsewhere" },
          `marks ${label.fuzz.score.toFixed(2)} ` +
          `(${label.fuzz.low.toFixed(2)}–${label.fuzz.high.toFixed(2)})`)),
      h("td", { class: "number", "data-name": "n", title: label.n_asked > label.n
        ? `${label.n} of ${label.n_asked} windows were answered readably` : null },
        Number.isFinite(label.n) ? count(label.n) : "–"),
      h("td", { class: "number", "data-name": "precision" }, numbers(label.precision)),
      h("td", { class: "number", "data-name": "recall" }, numbers(label.recall)),
      h("td", { class: "number", "data-name": "near-misses" }, numbers(label.near_miss)),
    ),
  );
  const heads = [["label"], ["method"], ["held-out score", "with its 95 % interval"],
    ["n", "held-out activations and near-misses it was scored on"], ["precision"], ["recall"],
    ["near-misses", "share of near-misses that the rule rejects"]];
  return h("section", {}, h("h2", {}, "Labels"),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Labels" },
    h("table", { class: "plain labels" },
    h("thead", {}, h("tr", {}, heads.map(([name, title], i) =>
    h("th", { scope: "col", title, class: i > 2 ? "number" : null }, name)))),
    h("tbody", {}, rows))), opinion && sentenceLine(opinion));
}

/** What a feature was strongest on where labels are proposed need not hold elsewhere. */
function didNotHold(atlas, { method, score }) {
  if (atlas.method(method)?.kind !== "tokens" || score >= HELD) return null;
  return h("span", { class: "quiet" }, score === null
    ? " (no strong activation in held-out documents)" : " (did not hold in held-out documents)");
}

function sentenceLine({ examples_score: examples, label_score: label, n_firing: firing,
  n_silent: silent }) {
  const said = [Number.isFinite(examples) && `its examples belong together ${examples.toFixed(2)}`,
    Number.isFinite(label) && `its label fits them ${label.toFixed(2)}`].filter(Boolean);
  return said.length > 0 && h("p", { class: "quiet small" },
    `A sentence model says: ${said.join(", ")}. 0.5 is chance; from ${firing} held-out windows ` +
      `with it and ${silent} without.`);
}

const numbers = (x) => (Number.isFinite(x) ? x.toFixed(2) : "–");

function histogram({ card, atlas, id }) {
  const drawing = activationHistogram(card, atlas.manifest.histogram);
  return drawing && figure({ name: `activations-${id.replace("/", "-")}`, title: "Activations",
    drawing, rows: () => histogramRows(card, atlas.manifest.histogram) });
}

function tokenRows(card, name, vocabulary) {
  const [share, lift, total] = [card[`${name}_share`], card[`${name}_lift`], card[`${name}_count`]];
  return [...(card[name] ?? [])]
    .map((token, i) => ({ token, text: visible(vocabulary.name(token).slice(0, 200)),
    share: share[i], lift: lift[i], count: total[i] }))
    .filter((row, i) => !isPad(card[name], row.token) && row.count > 0);
}

const isPad = (column, token) => token === (column.BYTES_PER_ELEMENT === 2 ? 0xffff : 0xffffffff);

function tokenTable({ card, vocabulary }, name, title) {
  const rows = tokenRows(card, name, vocabulary).slice(0, name === "token" ? 12 : 6);
  if (!rows.length) return null;
  return h(
    "section",
    { class: "token-table" },
    h("h3", {}, title, h("span", { class: "quiet small" },
      " share of its activation, times chance, activations")),
    h("table", { class: "bars" }, h("thead", { class: "unseen" },
      h("tr", {}, ["token", "share of activation", "times more than by chance", "activations"]
      .map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, rows.map((row) =>
      h("tr", {}, h("th", { scope: "row" }, tokenChip(vocabulary.name(row.token))),
      h("td", { class: "bar-cell" }, shareBar(row.share, percent(row.share))),
      h("td", { class: "number quiet", title: "how many times more than by chance" },
      `×${short(Math.exp(row.lift))}`), h("td", { class: "number quiet", title: "activations" },
      count(row.count)))))),
  );
}

function scored(card, name, vocabulary) {
  return [...(card[name] ?? [])]
    .map((token, i) => ({ token, text: visible(vocabulary.name(token).slice(0, 200)),
    score: card[`${name}_score`][i] })).filter((row) => !isPad(card[name], row.token)
    && Number.isFinite(row.score));
}

function outputTables({ card, vocabulary }) {
  const [up, down] = [scored(card, "promotes", vocabulary), scored(card, "suppresses", vocabulary)];
  if (!up.length && !down.length) return null;
  const list = (title, rows) => h("div", {}, h("h3", { class: "minor" }, title),
    h("ul", { class: "ranked tight" },
    rows.map((row) => h("li", {}, tokenChip(vocabulary.name(row.token)),
    h("span", { class: "number quiet" }, row.score.toFixed(2))))));
  return h("section", {}, h("h2", { class: "figure-title" }, "Writes towards the output"),
    h("div", { class: "columns half" }, list("promotes", up), list("suppresses", down)),
    h("p", { class: "quiet small" },
    `Its decoder direction through the unembedding, in standard deviations over the vocabulary. ` +
      `Excess kurtosis ${short(card.output_kurtosis)}: ` +
      `${card.output_kurtosis > 3 ? "a few tokens stand out" : "no token stands out much"}.`));
}

function places(view) {
  const { card, atlas, id } = view;
  const figureOf = (name, title, rows) => rows.length > 1
    && figure({ name: `${name}-${id.replace("/", "-")}`, title,
    ...(name === "positions" ? { drawing: rateBars(rows, title),
    caption: "How often it is active there; the dashed line is its mean." }
    : { list: shareRows(rows) }), rows: () =>
    ({ head: [name, "activations", "rate", "times the mean"],
    rows: rows.map((row) => [row.name, row.firings, row.rate, row.lift]) }) });
  return h("section", {}, h("h2", {}, "Where it is active"), h("div", { class: "columns three" },
    figureOf("positions", "Position in the context", positionRows(card, atlas.manifest)),
    figureOf("sources", "Sources", sourceRows(card, atlas.manifest)),
    figureOf("topics", "Topics of documents", topicRows(card, atlas.manifest))));
}

function shareRows(rows) {
  const most = Math.max(...rows.map((row) => row.rate).filter(Number.isFinite), 1e-12);
  const shown = rows.filter((row) => row.firings > 0).sort((a, b) => b.rate - a.rate).slice(0, 12);
  return h("table", { class: "bars" },
    h("tbody", {}, shown.map((row) => h("tr", {}, h("th", { scope: "row" }, row.name),
    h("td", { class: "bar-cell" }, shareBar(row.rate / most, percent(row.rate))),
    h("td", { class: "number quiet", title: "times the mean rate" }, `×${short(row.lift)}`),
    h("td", { class: "number quiet", title: "activations" }, count(row.firings))))));
}
