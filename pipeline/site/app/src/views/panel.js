// The chosen node of a flow graph, in brief: label, facts, tokens, three examples, what one can do
// with it.

import { listOf, siteOf } from "../data/atlas.js";
import { h } from "../dom.js";
import { fixed, percent, short } from "../format.js";
import { link } from "../route.js";
import { exampleList } from "../ui/examples.js";
import { classBadge, compareButton, featureLink, labelText, ownLabel } from "../ui/parts.js";
import { tokenChip } from "../ui/tokens.js";

export async function nodePanel(atlas, key, { edges, onmore }) {
  const id = atlas.id(key);
  const latent = key % 2 ** 20;
  const [overview, names, vocabulary, card] = await Promise.all([atlas.overview(siteOf(key)),
    atlas.labels(siteOf(key)), atlas.vocabulary(), atlas.card(key)]);
  const top = card.examples.filter((example) => example.tab === "top").slice(0, 3);
  const kind = atlas.manifest.classes[overview.class[latent]];
  return [
    h("h2", {}, featureLink(id), " ", overview.class[latent] > 0 && classBadge(kind)),
    h("p", {}, labelText(ownLabel(id, names.labels[latent]), 140)),
    h("p", { class: "quiet" },
      `active on ${percent(overview.density[latent])} of tokens, largest ` +
        `${short(overview.max[latent])}`),
    chips("Active on", listOf(card.token).slice(0, 6), vocabulary),
    chips("Promotes", listOf(card.promotes).slice(0, 6), vocabulary),
    top.length > 0 && (await exampleList(atlas, vocabulary, card, top, { width: 14, newlines: false,
      compact: true })),
    linkLines(atlas, key, edges),
    h("div", { class: "actions" }, h("a", { class: "action", href: link(id) }, "Open card"),
      h("a", { class: "action", href: link(`graph/${id}`) }, "Focus here"),
      h("button", { type: "button", class: "action", onclick: onmore }, "Show more links"),
      compareButton(id)),
  ];
}

function chips(title, tokens, vocabulary) {
  return tokens.length > 0 && h("p", { class: "chips" }, h("span", { class: "quiet" }, `${title} `),
    tokens.map((token) => tokenChip(vocabulary.name(token))));
}

function linkLines(atlas, key, edges) {
  const own = edges.filter((edge) => edge.source === key || edge.target === key).slice(0, 8);
  return own.length > 0 && h("ul", { class: "link-lines" },
    own.map((edge) => h("li", {}, edge.target === key
    ? ["from ", featureLink(atlas.id(edge.source))] : ["to ", featureLink(atlas.id(edge.target))],
    h("span", { class: "quiet" },
    ` cosine ${fixed(edge.cosine)}${edge.mutual ? ", mutual" : ""}`))));
}
