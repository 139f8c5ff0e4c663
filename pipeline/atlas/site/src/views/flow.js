// The flow overview: groups of features that are linked to one another, through all layers.

import { h } from "../dom.js";
import { count, plural } from "../format.js";
import { alluvial, colourOf, layerBars } from "../figures/alluvial.js";
import { figure } from "../figures/export.js";
import { link } from "../route.js";
import { empty, labelText } from "../ui/parts.js";
import { tokenChip } from "../ui/tokens.js";

export async function flow({ atlas }) {
  const groups = await atlas.communities();
  if (!groups?.communities.length) return { title: "Flow", node: h("div", {}, h("h1", {}, "Flow"), empty("This atlas has no communities of features.", "They come from the flow graph; the link stage found none, or was not run.")) };
  const vocabulary = await atlas.vocabulary();
  const { communities, other } = groups;
  const node = h(
    "div",
    {},
    h("h1", {}, "Flow through the layers"),
    h("p", { class: "lead" }, `Features that are linked to one another form communities. ${communities.length > 1 ? `The ${communities.length} largest hold` : "The largest holds"} ${count(communities.reduce((sum, item) => sum + item.size, 0))} features${other?.size ? `; ${plural(other.size, "feature")} in smaller ones ${other.size === 1 ? "is" : "are"} not drawn` : ""}.`),
    figure({
      name: "communities",
      title: "Communities by layer",
      drawing: alluvial(atlas, groups),
      caption: "Height: how many features of the community a layer has. Ribbons: links that stay inside it. The eight largest have colours of their own. Choose one to open it.",
      rows: () => ({ head: ["community", "label", "size", ...atlas.sites.map((site) => site.short)], rows: communities.map((item) => [item.id, item.label, item.size, ...item.n_by_site]) }),
    }),
    h("h2", {}, "Communities"),
    h("ol", { class: "communities" }, communities.map((item, rank) => row(atlas, vocabulary, item, rank))),
  );
  return { title: "Flow", node };
}

function row(atlas, vocabulary, item, rank) {
  const residual = atlas.sites.map((site, i) => (site.kind === "resid_post" ? item.n_by_site[i] : -1)).filter((n) => n >= 0);
  return h(
    "li",
    { class: colourOf(rank) },
    h("a", { href: link(`community/${item.id}`) }, labelText(item.label || `community ${item.id}`, 70)),
    h("span", { class: "number quiet" }, plural(item.size, "feature")),
    layerBars(residual, {}),
    h("span", { class: "chips" }, item.tokens.map((token) => tokenChip(vocabulary.name(token)))),
  );
}
