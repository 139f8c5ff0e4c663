// One dictionary: every latent as a row, sortable, filtered by label, class and flags.

import { keyOf } from "../data/atlas.js";
import { h } from "../dom.js";
import { count, fixed, percent, short, siteKind } from "../format.js";
import { saveButtons } from "../figures/export.js";
import { link, remember } from "../route.js";
import { checkbox, choice, classBadge, CLASS_NAMES, FLAG, labelText,
  ownLabel } from "../ui/parts.js";
import { virtualTable } from "../ui/virtual.js";

export async function site({ atlas, argument, options }) {
  const index = atlas.siteIndex.get(argument);
  if (index === undefined) throw new Error(
    `There is no dictionary “${argument}” in this atlas: it has ` +
      `${atlas.sites.map((item) => item.short).join(", ")}.`);
  const [columns, names] = await Promise.all([atlas.overview(index), atlas.labels(index)]);
  const here = atlas.sites[index];
  const state = { q: options.get("q") ?? "", class: options.get("class") ?? "",
    dead: options.get("dead") === "1", labelled: options.get("labelled") === "1" };
  const table = virtualTable({
    label: `Features of ${here.short}`,
    columns: tableColumns(atlas, index, columns, names),
    rows: matching(atlas, index, columns, names, state),
    link: (latent) => link(`${here.short}/${latent}`),
    sort: options.get("sort") ?? "density",
    down: options.get("down") !== "0",
    onsort: ({ name, down }) => remember({ sort: name, down: down ? "" : "0" }),
  });
  const change = (part) => {
    Object.assign(state, part);
    table.replaceRows(matching(atlas, index, columns, names, state));
    remember({ q: state.q, class: state.class, dead: state.dead ? "1" : "",
      labelled: state.labelled ? "1" : "" });
  };
  const classes = atlas.manifest.classes.filter((name) => here.classes?.[name]);
  const input = h("input", { type: "search", value: state.q, placeholder: "Filter by label",
    "aria-label": "Filter by label", oninput: () => change({ q: input.value }) });
  const node = h(
    "div",
    {},
    crumbs(atlas, index),
    h("h1", {}, `${here.short} `, h("span", { class: "quiet" }, siteKind(here))),
    h("p", { class: "lead" }, describe(here)),
    h(
      "div",
      { class: "controls" },
      input,
      classes.length > 0 && choice({ label: "Class", value: state.class, options: [["", "all"],
        ...classes.map((name) => [name, CLASS_NAMES[name]])], onchange: (value) =>
        change({ class: value }) }),
      checkbox({ label: "only labelled", checked: state.labelled, onchange: (labelled) =>
        change({ labelled }) }),
      checkbox({ label: "also dead", checked: state.dead, onchange: (dead) => change({ dead }) }),
      saveButtons({ name: `features-${here.short}`, rows: () => exported(atlas, index, columns,
        names, table.rowsShown()) }),
    ),
    table,
  );
  return { title: here.short, node };
}

function describe(site) {
  const fvu = Number.isFinite(site.metrics?.fvu)
    ? `, ${percent(site.metrics.fvu)} of variance unexplained` : "";
  const l0 = Number.isFinite(site.metrics?.l0) ? `, ${short(site.metrics.l0)} active per token`
    : "";
  return `${count(site.n_latents)} latents, ${count(site.n_alive)} alive, ` +
    `${count(site.n_labelled)} with an accepted label${fvu}${l0}.`;
}

function crumbs(atlas, index) {
  const same = atlas.sites.map((item, i) => ({ ...item, i }))
    .filter((item) => item.kind === atlas.sites[index].kind);
  const at = same.findIndex((item) => item.i === index);
  const step = (site, text) => (site ? h("a", { href: link(`site/${site.short}`) },
    text(site.short)) : null);
  return h("nav", { class: "crumbs", "aria-label": "Neighbouring dictionaries" },
    step(same[at - 1], (name) => `← ${name}`), step(same[at + 1], (name) => `${name} →`),
    atlas.sites.filter((item) => item.layer === atlas.sites[index].layer
    && item.short !== atlas.sites[index].short)
    .map((item) => h("a", { href: link(`site/${item.short}`) }, item.short)));
}

function tableColumns(atlas, index, columns, names) {
  const id = (latent) => atlas.id(keyOf(index, latent));
  return [
    { name: "latent", class: "site", sort: (latent) => latent, cell: (latent) => id(latent) },
    { name: "label", class: "grow", sort: (latent) => names.labels[latent], cell: (latent) =>
      labelText(ownLabel(id(latent), names.labels[latent]), 120) },
    { name: "score", class: "number", title: "held-out score of the label", sort: (latent) =>
      (names.score[latent] === 255 ? NaN : names.score[latent]), cell: (latent) =>
      fixed(names.score[latent] === 255 ? NaN : names.score[latent] / 254) },
    { name: "density", class: "number", title: "share of tokens on which it is active",
      sort: (latent) => columns.density[latent], cell: (latent) =>
      percent(columns.density[latent]) },
    { name: "max", class: "number roomy", title: "largest activation", sort: (latent) =>
      columns.max[latent], cell: (latent) => short(columns.max[latent]) },
    { name: "class", class: "kind", sort: (latent) => columns.class[latent], cell: (latent) =>
      (columns.class[latent] ? classBadge(atlas.manifest.classes[columns.class[latent]]) : "–") },
    { name: "born", class: "number roomy", title: "layer where its chain starts", sort: (latent) =>
      columns.birth[latent], cell: (latent) => layerText(columns.birth[latent]) },
    { name: "ends", class: "number roomy", title: "layer where its chain ends", sort: (latent) =>
      columns.death[latent], cell: (latent) => layerText(columns.death[latent]) },
    { name: "in", class: "number roomy", title: "links into it", sort: (latent) =>
      columns.n_in[latent], cell: (latent) => columns.n_in[latent] },
    { name: "out", class: "number roomy", title: "links out of it", sort: (latent) =>
      columns.n_out[latent], cell: (latent) => columns.n_out[latent] },
  ];
}

const layerText = (layer) => (layer < 0 ? "–" : `L${layer}`);

function matching(atlas, index, columns, names, { q, class: kind, dead, labelled }) {
  const words = q.toLowerCase().split(/\s+/).filter(Boolean);
  const code = kind ? atlas.manifest.classes.indexOf(kind) : -1;
  const rows = [];
  for (let latent = 0; latent < names.labels.length; latent++) {
    if (!dead && !(columns.flags[latent] & FLAG.alive)) continue;
    if (labelled && !(columns.flags[latent] & FLAG.labelled)) continue;
    if (code >= 0 && columns.class[latent] !== code) continue;
    if (words.length && !words.every((word) => names.labels[latent].toLowerCase()
      .includes(word))) continue;
    rows.push(latent);
  }
  return rows;
}

function exported(atlas, index, columns, names, latents) {
  const head = ["feature", "label", "score", "density", "max", "class", "birth", "death", "n_in",
    "n_out"];
  return { head, rows: latents.map((latent) => [atlas.id(keyOf(index, latent)),
    names.labels[latent], names.score[latent] === 255 ? "" : (names.score[latent] / 254).toFixed(3),
    columns.density[latent], columns.max[latent], atlas.manifest.classes[columns.class[latent]],
    columns.birth[latent], columns.death[latent], columns.n_in[latent], columns.n_out[latent]]) };
}
