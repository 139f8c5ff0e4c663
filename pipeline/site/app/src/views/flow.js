// The whole flow from afar. Every living feature of the residual stream is on one trunk: which
// layer the features of each
// layer go back to, where trunks begin and end and what writes them, and the communities that
// trunks and modules' features
// form. From every figure a click leads to a list of trunks, from there to a feature.

import { h, show } from "../dom.js";
import { count, percent, plural } from "../format.js";
import { alluvial, layerBars } from "../figures/alluvial.js";
import { figure, saveButtons } from "../figures/export.js";
import { turnover, turnoverRows } from "../figures/turnover.js";
import { Trunks } from "../data/trunks.js";
import { cohortsOf, turnoverOf } from "../data/turnover.js";
import { link, remember } from "../route.js";
import { empty, labelText } from "../ui/parts.js";
import { tokenChip } from "../ui/tokens.js";
import { virtualTable } from "../ui/virtual.js";

export async function flow({ atlas, options }) {
  const [trunks, communities] = await Promise.all([Trunks.open(atlas), atlas.communities()]);
  if (!trunks?.all.length) return { title: "Flow", node: h("div", {}, h("h1", {}, "Flow"),
    empty("This atlas has no flow through the layers.",
    "It comes from the flow graph; the link stage found no links, or was not run.")) };
  const vocabulary = await atlas.vocabulary();
  const bySite = turnoverOf(trunks);
  const node = h(
    "div",
    {},
    h("h1", {}, "Flow through the layers"),
    h("p", { class: "lead" }, summary(atlas, trunks), " ", h("a", { href: link("trunks") },
      "All trunks")),
    cohortFigure(atlas, trunks),
    figure({
      name: "turnover",
      title: "Where trunks begin, what is written into them, where they end",
      drawing: turnover(atlas, bySite),
      caption: turnoverCaption(atlas, trunks, bySite),
      rows: () => turnoverRows(atlas, bySite),
    }),
    communities?.length > 0 && communitySection(atlas, vocabulary, communities, options),
  );
  return { title: "Flow", node };
}

function summary(atlas, { all, nFeatures }) {
  const residual = atlas.sites.filter((site) => site.kind === "resid_post");
  const whole = all.filter((trunk) => trunk.length === residual.length);
  const inWhole = whole.reduce((sum, trunk) => sum + trunk.length, 0);
  const alone = all.filter((trunk) => trunk.length === 1).length;
  return `Each of the ${count(nFeatures)} living features of the residual stream is on exactly ` +
    `one of ${plural(all.length, "trunk")}: a path on which every feature is the best ` +
    `predecessor of the next. ${count(whole.length)} run through all ${residual.length} layers ` +
    `and hold ${percent(inWhole / nFeatures)} of the features; ${plural(alone, "feature")} ` +
    `(${percent(alone / nFeatures)}) ${alone === 1 ? "stands" : "stand"} alone in one layer.`;
}

function cohortFigure(atlas, trunks) {
  const cohorts = cohortsOf(trunks).map((item) => {
    const name = item.from === item.to ? `from L${item.from}` : `from L${item.from}–${item.to}`;
    const about = `${count(item.size)} features (${percent(item.size / trunks.nFeatures)}) on ` +
      `trunks that begin in ` +
      `${item.from === item.to ? `layer ${item.from}` : `layers ${item.from} to ${item.to}`}`;
    return { ...item, id: item.from, name, about,
      href: link("trunks", { from: item.from === item.to ? `L${item.from}`
      : `L${item.from}-${item.to}` }) };
  });
  const shown = cohorts.reduce((sum, item) => sum + item.size, 0);
  return figure({
    name: "origins",
    title: "How far back the features of each layer go",
    drawing: alluvial(atlas, cohorts, "Features of each layer by the layer their trunk begins in"),
    caption: `Height: living features of a layer, by the layer their trunk begins in; ` +
      `${percent(shown / trunks.nFeatures)} of them are drawn. Ribbons: features that go on in ` +
      `the next layer; where a ribbon is lower than the bar before it, the rest end there. ` +
      `Choose a band to list its trunks.`,
    rows: () => ({ head: ["trunks that begin in", "features", ...atlas.sites.filter((_, i) =>
      cohorts.some((item) => item.n_by_site[i])).map((site) => site.short)],
      rows: cohorts.map((item) => [item.name, item.size, ...atlas.sites.map((_, i) => i)
      .filter((i) => cohorts.some((one) => one.n_by_site[i])).map((i) => item.n_by_site[i])]) }),
  });
}

function turnoverCaption(atlas, trunks, bySite) {
  const total = (part, kind) => [...bySite.values()].reduce((sum, counts) => sum
    + (counts[part][kind] ?? 0), 0);
  return `${count(total("begin", "first"))} trunks begin in the first layer and ` +
    `${count(total("end", "last"))} end in the last; these two bars are not drawn. Written to: ` +
    `features that come from the layer before and are also linked to a feature of this layer’s ` +
    `MLP or attention. ${modulesRead(atlas, trunks.modules)} Each lane has a scale of its own. ` +
    `Choose a bar for the list.`;
}

function modulesRead(atlas, modules) {
  if (!modules.length) return "This atlas has no dictionaries of MLPs or attention, so nothing " +
    "can be said of what writes.";
  const layers = [...new Set(modules.map(({ site }) => atlas.sites[site].layer))];
  const sum = (name) => modules.reduce((total, one) => total + one[name], 0);
  return `MLP and attention have dictionaries in ${layers.length === 1 ? "layer" : "layers"} ` +
    `${layers.join(", ")} only: ${count(sum("n_linked"))} of their ${count(sum("n_alive"))} ` +
    `living features are linked into the stream; of the other layers nothing can be said of what ` +
    `writes.`;
}

function communitySection(atlas, vocabulary, communities, options) {
  const inAny = communities.reduce((sum, item) => sum + item.size, 0);
  const nAlive = atlas.sites.reduce((sum, site) => sum + site.n_alive, 0);
  const residual = atlas.sites.map((site, i) => i)
    .filter((i) => atlas.sites[i].kind === "resid_post");
  const matching = (q) => communities.filter((item) => !q || item.label.toLowerCase()
    .includes(q.toLowerCase()) || item.tokens.some((token) => vocabulary.text(token).toLowerCase()
    .includes(q.toLowerCase())));
  const status = h("p", { class: "quiet", role: "status" });
  const table = virtualTable({
    label: "Communities",
    rows: [],
    link: (item) => link(`community/${item.id}`),
    height: 34,
    sort: "features",
    columns: [
      { name: "most typical tokens", class: "grow", cell: (item) =>
        labelText(item.label || `community ${item.id}`, 70) },
      { name: "features", class: "number", sort: (item) => item.size, cell: (item) =>
        count(item.size) },
      { name: "of modules", class: "number roomy",
        title: "members from MLP and attention dictionaries", sort: (item) => item.nModules,
        cell: (item) => count(item.nModules) },
      { name: "layers", class: "plot",
        title: "members in each layer of the residual stream, the first layer at the left",
        sort: (item) => residual.findIndex((i) => item.n_by_site[i]), cell: (item) =>
        layerBars(residual.map((i) => item.n_by_site[i]), { width: 120 }) },
      { name: "also", class: "grow roomy", cell: (item) => item.tokens.slice(3)
        .map((token) => [tokenChip(vocabulary.name(token)), " "]) },
    ],
  });
  const change = (q) => {
    const rows = matching(q);
    table.replaceRows(rows);
    show(status, `${plural(rows.length, "community", "communities")} with ` +
      `${plural(rows.reduce((sum, item) => sum + item.size, 0), "feature")}.`);
  };
  const input = h("input", { type: "search", value: options.get("q") ?? "",
    placeholder: "Filter by token", "aria-label": "Filter communities by token", oninput: () =>
    (change(input.value), remember({ q: input.value })) });
  change(input.value);
  const exported = () =>
    ({ head: ["community", "tokens", "features", ...atlas.sites.map((site) => site.short)],
    rows: table.rowsShown().map((item) => [item.id, item.label, item.size, ...item.n_by_site]) });
  return h(
    "section",
    { class: "series0" },
    h("h2", {}, "Communities"),
    h("p", { class: "lead" },
      `Features that are linked to one another, in the stream and in MLPs and attention, form ` +
        `communities: ${count(communities.length)} hold ${count(inAny)} of all ${count(nAlive)} ` +
        `living features (${percent(inAny / nAlive)}); the others have no link.`),
    h("div", { class: "controls" }, input, saveButtons({ name: "communities", rows: exported })),
    status,
    table,
  );
}
