// One community: its tokens, its share of every layer, and all its members from every dictionary.

import { keyOf } from "../data/atlas.js";
import { h } from "../dom.js";
import { count, fixed, percent } from "../format.js";
import { layerBars } from "../figures/alluvial.js";
import { saveButtons } from "../figures/export.js";
import { link } from "../route.js";
import { classBadge, empty, labelText } from "../ui/parts.js";
import { tokenChip, visible } from "../ui/tokens.js";
import { virtualTable } from "../ui/virtual.js";

export async function community({ atlas, argument, alive }) {
  const communities = await atlas.communities();
  const item = communities?.find((one) => String(one.id) === argument);
  if (!item) throw new Error(`There is no community “${argument}” in this atlas.`);
  const [vocabulary, members] = await Promise.all([atlas.vocabulary(), membersOf(atlas, item.id,
    alive)]);
  const residual = atlas.sites.map((site, i) => i)
    .filter((i) => atlas.sites[i].kind === "resid_post").map((i) => item.n_by_site[i]);
  const title = visible(item.label || `community ${item.id}`);
  const node = h(
    "div",
    {},
    h("nav", { class: "crumbs" }, h("a", { href: link("flow") }, "← all communities")),
    h("h1", {}, title, h("span", { class: "quiet" }, ` community ${item.id}`)),
    h("p", { class: "chips" }, item.tokens.map((token) => tokenChip(vocabulary.name(token)))),
    h("p", {}, h("a", { href: link("trunks", { community: item.id }) }, "Its trunks")),
    h("figure", { class: "figure series0" }, layerBars(residual, { width: 600, height: 70,
      className: "fluid" }),
      h("figcaption", {},
      `${count(item.size)} features; one bar per layer, the first layer at the left.`)),
    h("div", { class: "figure-head" }, h("h2", {}, "Members"),
      saveButtons({ name: `community-${item.id}`, rows: () =>
      ({ head: ["feature", "label", "density"], rows: members.map((row) => [atlas.id(row.key),
      row.label, row.density]) }) })),
    members.length ? table(atlas, members) : empty("No member is listed."),
  );
  return { title, node };
}

async function membersOf(atlas, id, alive) {
  const members = [];
  for (const site of atlas.sites.keys()) {
    const [columns, names] = await Promise.all([atlas.overview(site), atlas.labels(site)]);
    if (!alive()) return [];
    columns.community.forEach((own, latent) => {
      if (own === id) members.push({ key: keyOf(site, latent), label: names.labels[latent],
        score: names.score[latent] === 255 ? NaN : names.score[latent] / 254,
        density: columns.density[latent], class: atlas.manifest.classes[columns.class[latent]] });
    });
  }
  return members;
}

function table(atlas, rows) {
  return virtualTable({
    label: "Members",
    rows,
    link: (row) => link(atlas.id(row.key)),
    sort: "feature",
    down: false,
    columns: [
      { name: "feature", class: "site", sort: (row) => row.key, cell: (row) => atlas.id(row.key) },
      { name: "label", class: "grow", sort: (row) => row.label, cell: (row) => labelText(row.label,
        120) },
      { name: "score", class: "number", sort: (row) => row.score, cell: (row) => fixed(row.score) },
      { name: "density", class: "number", sort: (row) => row.density, cell: (row) =>
        percent(row.density) },
      { name: "class", class: "kind roomy", sort: (row) => row.class, cell: (row) =>
        (row.class === "unknown" ? "–" : classBadge(row.class)) },
    ],
  });
}
