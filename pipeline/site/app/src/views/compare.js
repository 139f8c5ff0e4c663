// Two to four features side by side: labels, facts, tokens, examples, and what links them.

import { latentOf, listOf, siteOf } from "../data/atlas.js";
import { Flow } from "../data/flow.js";
import { h } from "../dom.js";
import { fixed, percent, short } from "../format.js";
import { activationHistogram } from "../figures/histogram.js";
import { saveButtons } from "../figures/export.js";
import { compared, MAX_COMPARED, toggleCompared } from "../notes.js";
import { link, parseFeature } from "../route.js";
import { exampleList } from "../ui/examples.js";
import { classBadge, copyButton, empty, featureLink, labelText, ownLabel,
  scoreBar } from "../ui/parts.js";
import { tokenChip } from "../ui/tokens.js";

export async function compare({ atlas, options }) {
  const wanted = options.has("f") ? options.get("f").split(",") : compared();
  const keys = [...new Set(wanted.map((id) => atlas.key(parseFeature(id))))]
    .filter((key) => key !== null).slice(0, MAX_COMPARED);
  if (!keys.length) return { title: "Compare", node: h("div", {}, h("h1", {}, "Compare"),
    empty("The tray is empty.",
    "“Add to compare” on a card, or in a flow graph, puts a feature here; up to four stand side " +
      "by side."), addForm(atlas, [])) };
  const vocabulary = await atlas.vocabulary();
  const [columns, links] =
    await Promise.all([Promise.all(keys.map((key) => column(atlas, vocabulary, key))),
    linksAmong(atlas, keys)]);
  const address = () =>
    location.href.split("#")[0] +
    link("compare", { f: keys.map((key) => atlas.id(key)).join(",") });
  const node = h("div", {}, h("h1", {}, "Compare"), h("div", { class: "controls" },
    addForm(atlas, keys), copyButton(address, "Copy link")), pairTable(atlas, columns, links),
    h("div", { class: `compare n${keys.length}` }, columns.map((item) => item.node)));
  return { title: "Compare", node, wide: keys.length > 2 };
}

function addForm(atlas, keys) {
  const input = h("input", { type: "text", placeholder: "L12/402", "aria-label": "Feature to add",
    size: 10 });
  const warning = h("span", { class: "warning", role: "status" });
  const add = (event) => {
    event.preventDefault();
    const key = atlas.key(parseFeature(input.value));
    if (key === null) return void (warning.textContent = "No such feature.");
    location.hash = link("compare", { f: [...keys, key].slice(-MAX_COMPARED)
      .map((one) => atlas.id(one)).join(",") });
  };
  return h("form", { class: "controls", onsubmit: add }, input, h("button", { class: "action" },
    "Add"), warning);
}

async function column(atlas, vocabulary, key) {
  const id = atlas.id(key);
  const latent = latentOf(key);
  const [overview, names, card] = await Promise.all([atlas.overview(siteOf(key)),
    atlas.labels(siteOf(key)), atlas.card(key)]);
  const top = card.examples.filter((example) => example.tab === "top").slice(0, 6);
  const best = card.labels[0];
  const chips = (title, tokens) => tokens.length > 0 && [h("h3", {}, title),
    h("p", { class: "chips" }, tokens.map((token) => tokenChip(vocabulary.name(token))))];
  const leave = () => {
    const rest = (new URLSearchParams(location.hash.split("?")[1] ?? "").get("f") ?? compared()
      .join(",")).split(",").filter((one) => one && one !== id);
    if (compared().includes(id)) toggleCompared(id);
    const next = link("compare", rest.length ? { f: rest.join(",") } : {});
    if (location.hash === next) dispatchEvent(new HashChangeEvent("hashchange"));
    else location.hash = next;
  };
  const node = h(
    "section",
    { class: "compare-column", "aria-label": id },
    h("h2", {}, featureLink(id), h("button", { type: "button", class: "action small",
      onclick: leave, "aria-label": `Take ${id} out` }, "✕")),
    h("p", {}, labelText(ownLabel(id, names.labels[latent]), 160)),
    h("p", { class: "facts-line" }, overview.class[latent] > 0
      && classBadge(atlas.manifest.classes[overview.class[latent]]),
      h("span", {}, `active on ${percent(overview.density[latent])}`),
      h("span", {}, `largest ${short(card.max)}`)),
    best && h("p", {}, scoreBar(best.score, best.low, best.high)),
    card.count > 0 && activationHistogram(card, atlas.manifest.histogram),
    chips("Active on", listOf(card.token).slice(0, 10)),
    chips("Promotes", listOf(card.promotes).slice(0, 10)),
    top.length > 0 && [h("h3", {}, "Examples"), await exampleList(atlas, vocabulary, card, top,
      { width: 18, newlines: false, compact: true })],
  );
  return { key, id, node, tokens: new Set(listOf(card.token)),
    promotes: new Set(listOf(card.promotes)), similar: new Map(listOf(card.similar)
    .map((other, i) => [other, card.similar_cosine[i]])) };
}

async function linksAmong(atlas, keys) {
  if (!atlas.has.flow) return new Map();
  const flow = await Flow.open(atlas);
  const found = new Map();
  for (const key of keys) for (const item of await flow.incoming(key)) if (
    keys.includes(item.source)) found.set(`${item.source} ${key}`, item);
  return found;
}

function pairTable(atlas, columns, links) {
  if (columns.length < 2) return null;
  const rows = [];
  columns.forEach((a, i) =>
    columns.slice(i + 1).forEach((b) => {
      const direct = links.get(`${a.key} ${b.key}`) ?? links.get(`${b.key} ${a.key}`);
      const same = siteOf(a.key) === siteOf(b.key) ? a.similar.get(latentOf(b.key)) : undefined;
      const relation = direct ? `link, cosine ${fixed(direct.cosine)}` : same !== undefined
        ? `same dictionary, cosine ${fixed(same)}` : "no link kept";
      rows.push([a.id, b.id, relation, direct ? fixed(direct.pearson) : "–",
        overlap(a.tokens, b.tokens), overlap(a.promotes, b.promotes)]);
    }),
  );
  const head = ["feature", "feature", "directions", "Pearson", "shared tokens",
    "shared promoted tokens"];
  return h("div", {}, h("div", { class: "scroll", tabindex: 0, role: "region",
    "aria-label": "Pairs" }, h("table", { class: "plain" },
    h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell))))))),
    saveButtons({ name: "compare", rows: () => ({ head, rows }) }));
}

const overlap = (a, b) =>
  `${[...a].filter((token) => b.has(token)).length} of ${Math.min(a.size, b.size)}`;
