// Where a feature comes from and goes to: its chain through the layers and the tables of its
// neighbours.

import { latentOf, listOf, siteOf, keyOf } from "../data/atlas.js";
import { h } from "../dom.js";
import { fixed, percent, plural, qValue } from "../format.js";
import { figure, saveButtons } from "../figures/export.js";
import { chainRibbon } from "../figures/ribbon.js";
import { featureLink, labelText, RELATION_NAMES, tabs } from "../ui/parts.js";
import { visible } from "../ui/tokens.js";
import { labelsOf } from "./search.js";

const MOST_ROWS = 12;

export async function chainSection({ atlas, flow, key, id, alive }) {
  if (!atlas.has.flow || atlas.sites[siteOf(key)].kind !== "resid_post") return null;
  const chain = await flow.chain(key, { alive });
  if (chain.features.length < 2) return h("section", {}, h("h2", {}, "Through the layers"),
    h("p", { class: "quiet" }, "No accepted link joins this feature to the layers beside it."));
  const labels = await labelsOf(atlas, chain.features, alive);
  if (!alive()) return null;
  const [classes, feeds] = await Promise.all([classesOf(atlas, chain.features),
    feedsOf(flow, chain.features)]);
  const rows = () => ({ head: ["feature", "label", "cosine with the one before", "strength", "q"],
    rows: chain.features.map((one, i) => [atlas.id(one), visible((labels.get(one) ?? "")
    .slice(0, 200)), i ? chain.links[i - 1].cosine : "", i ? chain.links[i - 1].strength : "",
    i ? qValue(chain.links[i - 1].q) : ""]) });
  const weakest = chain.links.reduce((least, item) => (item.cosine < least.cosine ? item : least));
  return h(
    "section",
    {},
    h("h2", {}, "Through the layers"),
    figure({
      name: `chain-${id.replace("/", "-")}`,
      drawing: chainRibbon(atlas, chain, { key, labels, classes, feeds }),
      caption: `Best predecessors and successors: ${plural(chain.features.length, "feature")}, ` +
        `from ${atlas.id(chain.features[0])} to ${atlas.id(chain.features.at(-1))}. Weakest ` +
        `step: ${atlas.id(weakest.source)} → ${atlas.id(weakest.target)}, cosine ` +
        `${fixed(weakest.cosine)}. Strokes below a bead: MLP and attention features that write ` +
        `to it.`,
      rows,
    }),
  );
}

async function classesOf(atlas, keys) {
  const entries = keys.map(async (key) =>
    [key, atlas.manifest.classes[(await atlas.overview(siteOf(key))).class[latentOf(key)]]]);
  return new Map(await Promise.all(entries));
}

async function feedsOf(flow, keys) {
  const entries = keys.map(async (key) => [key, (await flow.incoming(key))
    .filter((item) => item.relation !== 0 && item.rank === 0)]);
  return new Map(await Promise.all(entries));
}

export async function neighbourSection({ atlas, flow, key, card, id, alive }) {
  const [into, out] = await Promise.all([flow.incoming(key), flow.outgoing(key)]);
  const same = (name, value) => listOf(card[name] ?? new Uint32Array())
    .map((latent, i) => ({ key: keyOf(siteOf(key), latent), value: card[value][i] }))
    .filter((row) => row.value > 0);
  const [similar, cofiring] = [same("similar", "similar_cosine"),
    same("cofiring", "cofiring_jaccard")];
  const labels = await labelsOf(atlas, [...into.map((item) => item.source), ...out.slice(0, 60)
    .map((item) => item.target), ...similar.map((row) => row.key),
    ...cofiring.map((row) => row.key)], alive);
  const name = (part) => `${part}-${id.replace("/", "-")}`;
  const inStream = atlas.sites[siteOf(key)].kind === "resid_post";
    // of modules' features nobody looks for predecessors
  const items = [
    atlas.has.flow && inStream && { id: "into", name: `Comes from (${into.length})`, draw: () =>
      linkTable(atlas, into, "source", labels, name("from")) },
    atlas.has.flow && { id: "out", name: `Goes to (${out.length})`, draw: () => linkTable(atlas,
      out.slice(0, 60), "target", labels, name("to")) },
    { id: "similar", name: "Same dictionary: similar", draw: () => pairTable(atlas, similar,
      "cosine", labels, name("similar")) },
    { id: "cofiring", name: "Same dictionary: fire together", draw: () => pairTable(atlas, cofiring,
      "Jaccard of firing", labels, name("cofiring")) },
  ].filter(Boolean);
  return h("section", {}, h("h2", {}, "Neighbours"),
    tabs({ items, label: "Neighbours", chosen: into.length ? "into" : out.length ? "out"
    : items[0].id }));
}

function linkTable(atlas, links, end, labels, name) {
  if (!links.length) return h("p", { class: "quiet" }, end === "source"
    ? "Nothing before it has an accepted link to it." : "It has no accepted link onward.");
  const heads = [["feature"], ["label"], ["through"], ["cosine"],
    ["strength", "(cosine − median of chance) / (1 − median of chance)"],
    ["q", "share of false links expected at this strength"],
    ["Pearson", "of activations on held-out tokens"], ["Jaccard", "of activity on held-out tokens"],
    ["mutual"], ["gradient", "mean part of the target's pre-activation that the source gives, by "
      + "gradient, where both are active"], ["silenced", "share of trials in which removing the source silenced the target"]];
  const values = (item) => [RELATION_NAMES[item.relation], fixed(item.cosine), fixed(item.strength),
    qValue(item.q), fixed(item.pearson), fixed(item.jaccard), item.mutual ? "yes" : "–",
    fixed(item.effect), Number.isFinite(item.success) ? `${percent(item.success)} of ${item.trials}` : "–"];
  const rows = () =>
    ({ head: heads.map(([text]) => text), rows: links.map((item) => [atlas.id(item[end]),
    labels.get(item[end]) ?? "", ...values(item)]) });
  return scrolled(
    name,
    rows,
    heads,
    links.map((item) => [featureLink(atlas.id(item[end])), labelText(labels.get(item[end]) ?? "",
      70), ...values(item)]),
  );
}

function pairTable(atlas, rows, measure, labels, name) {
  if (!rows.length) return h("p", { class: "quiet" }, "None.");
  const heads = [["feature"], ["label"], [measure]];
  return scrolled(name, () => ({ head: ["feature", "label", measure],
    rows: rows.map((row) => [atlas.id(row.key), labels.get(row.key) ?? "", row.value]) }), heads,
    rows.map((row) => [featureLink(atlas.id(row.key)), labelText(labels.get(row.key) ?? "", 90),
    fixed(row.value)]));
}

function scrolled(name, rows, heads, cells) {
  const body = h("tbody", {}, cells.slice(0, MOST_ROWS).map(row));
  const more = cells.length > MOST_ROWS && h("button", { type: "button", class: "action",
    onclick: (event) => (body.append(...cells.slice(MOST_ROWS).map(row)), event.target.remove()) },
    `Show ${cells.length - MOST_ROWS} more`);
  return h("div", {}, h("div", { class: "scroll", tabindex: 0, role: "region",
    "aria-label": "Neighbours" }, h("table", { class: "plain" },
    h("thead", {}, h("tr", {}, heads.map(([text, title], i) =>
    h("th", { scope: "col", title, class: i > 2 || heads.length === 3 && i === 2 ? "number"
    : null }, text)))), body)), h("div", { class: "actions" }, more, saveButtons({ name, rows })));
}

function row(cells) {
  return h("tr", {},
    cells.map((cell, i) => h("td", { class: i > 2 || (cells.length === 3 && i === 2) ? "number"
    : null }, cell)));
}
