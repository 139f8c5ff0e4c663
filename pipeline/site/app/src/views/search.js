// Search over labels of every dictionary (substring of each word) and over tokens (which features
// fire on them or
// promote them). Labels are scanned dictionary by dictionary as they load; no index is needed at
// this size.

import { keyOf, latentOf, siteOf } from "../data/atlas.js";
import { h, show } from "../dom.js";
import { count, fixed, percent, plural } from "../format.js";
import { saveButtons } from "../figures/export.js";
import { allNotes } from "../notes.js";
import { link, parseFeature, remember } from "../route.js";
import { choice, classBadge, empty, featureLink, labelText, shareBar } from "../ui/parts.js";
import { tokenChip, visible } from "../ui/tokens.js";
import { virtualTable } from "../ui/virtual.js";

const MOST = 5000;
const MOST_TOKENS = 8;

export async function search({ atlas, options, alive }) {
  const query = options.get("q") ?? "";
  const state = { site: options.get("site") ?? "", run: 0 };
  const [labels, tokens, status] = [h("div", {}), h("div", {}),
    h("p", { class: "quiet", role: "status" })];
  const input = h("input", { type: "search", value: query,
    placeholder: "Words of a label, a token, or L12/402", "aria-label": "Search labels and tokens",
    class: "large" });
  let timer;
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(run, 180);
  };
  async function run() {
    const mine = ++state.run;
    const text = input.value;
    remember({ q: text, site: state.site });
    const current = () => alive() && mine === state.run;
    await Promise.all([searchLabels(atlas, text, state.site, { status, place: labels, current }),
      searchTokens(atlas, text, { place: tokens, current })]);
  }
  input.addEventListener("input", later);
  const form = h("form", { class: "controls", onsubmit: (event) => (event.preventDefault(),
    go(atlas, input.value) || run()) }, input,
    choice({ label: "In", value: state.site, options: [["", "all dictionaries"],
    ...atlas.sites.map((site) => [site.short, site.short])], onchange: (value) =>
    ((state.site = value), run()) }));
  const node = h("div", {}, h("h1", {}, "Search"), form, status,
    h("div", { class: "columns search-results" }, h("section", { "aria-label": "Labels" }, labels),
    h("section", { "aria-label": "Tokens" }, tokens)));
  run();
  requestAnimationFrame(() => input.isConnected && input.focus());
  return { title: query ? `Search: ${visible(query.slice(0, 40))}` : "Search", node };
}

function go(atlas, text) {
  const feature = parseFeature(text);
  if (!feature || atlas.key(feature) === null) return false;
  location.hash = link(text.trim());
  return true;
}

async function searchLabels(atlas, text, only, { status, place, current }) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return void (
    show(status, `${count(atlas.manifest.headline?.n_labelled)} labels in ` +
      `${plural(atlas.sites.length, "dictionary", "dictionaries")}.`), show(place));
  const found = ownNotes(atlas, words);
  let total = found.length;
  for (const [site, { short }] of atlas.sites.entries()) {
    if (only && short !== only) continue;
    const [names, columns] = await Promise.all([atlas.labels(site), atlas.overview(site)]);
    if (!current()) return;
    names.labels.forEach((label, latent) => {
      if (!matches(label, words)) return;
      total += 1;
      if (found.length < MOST) found.push({ key: keyOf(site, latent), label,
        score: names.score[latent] === 255 ? NaN : names.score[latent] / 254,
        density: columns.density[latent], class: atlas.manifest.classes[columns.class[latent]] });
    });
    show(status, `Reading ${short} … ${count(total)} found`);
  }
  show(status, total > MOST ? `${count(total)} labels match; the first ${count(MOST)} are listed.`
    : `${plural(total, "label matches", "labels match")}.`);
  show(place, h("div", { class: "figure-head" }, h("h2", {}, "Labels"),
    saveButtons({ name: "search", rows: () => ({ head: ["feature", "label", "score", "density"],
    rows: found.map((row) => [atlas.id(row.key), row.label, row.score, row.density]) }) })), total
    ? resultTable(atlas, found) : empty("No label has these words.",
    "Labels name what a feature is active on; the token list searches the text itself."));
}

function matches(label, words) {
  const low = label.toLowerCase();
  return words.every((word) => low.includes(word));
}

function ownNotes(atlas, words) {
  return Object.entries(allNotes())
    .filter(([id, note]) => matches(`${note.label} ${note.comment}`, words)
      && atlas.key(parseFeature(id)) !== null)
    .map(([id, note]) =>
      ({ key: atlas.key(parseFeature(id)), label: `${note.label || note.comment} (your note)`,
      score: NaN, density: NaN, class: "unknown" }));
}

function resultTable(atlas, rows) {
  return virtualTable({
    label: "Features whose label matches",
    rows,
    link: (row) => link(atlas.id(row.key)),
    columns: [
      { name: "feature", class: "site", sort: (row) => row.key, cell: (row) => atlas.id(row.key) },
      { name: "label", class: "grow", sort: (row) => row.label, cell: (row) => labelText(row.label,
        110) },
      { name: "score", class: "number", sort: (row) => row.score, cell: (row) => fixed(row.score) },
      { name: "density", class: "number", sort: (row) => row.density, cell: (row) =>
        percent(row.density) },
      { name: "class", class: "kind roomy", sort: (row) => row.class, cell: (row) =>
        (row.class === "unknown" ? "–" : classBadge(row.class)) },
    ],
    sort: "score",
  });
}

async function searchTokens(atlas, text, { place, current }) {
  if (!text.trim()) return void show(place);
  const vocabulary = await atlas.vocabulary();
  if (!current()) return;
  const tokens = likeliest(vocabulary, text);
  const lists = await Promise.all(tokens.map((token) => atlas.tokenFeatures(token)));
  const names = await labelsOf(atlas, lists.flat().map((entry) => entry.key));
  if (!current()) return;
  const known = tokens.map((token, i) => [token, lists[i]]).filter(([, list]) => list.length);
  show(place, h("h2", {}, "Tokens"), known.length ? known.map(([token, list]) => tokenGroup(atlas,
    vocabulary, token, list, names)) : empty("No feature is known by such a token.",
    "Only tokens that some feature fires on or promotes are indexed."));
}

/** Tokens that are the text, then those that start with it, then those that hold it; shorter first.
 *  */
function likeliest(vocabulary, text) {
  const wanted = text.trim().toLowerCase();
  const found = [];
  for (let id = 0; id < vocabulary.size; id++) {
    if (vocabulary.offset[id + 1] - vocabulary.offset[id] > 4000) continue;
    const token = vocabulary.text(id).trim().toLowerCase();
    const at = token.indexOf(wanted);
    if (at >= 0) found.push([token === wanted ? 0 : at === 0 ? 1 : 2, token.length, id]);
  }
  found.sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]);
  return found.slice(0, MOST_TOKENS).map(([, , id]) => id);
}

/** Best labels of features, by key. A few dictionaries at a time, and no more once the page was
 *  left: reading those of all
 *  layers would hold up the next page. */
export async function labelsOf(atlas, keys, alive = () => true) {
  const sites = [...new Set(keys.map((key) => siteOf(key)))];
  const names = new Map();
  for (let i = 0; i < sites.length && alive(); i += 4) await Promise.all(sites.slice(i, i + 4)
    .map(async (site) => names.set(site, (await atlas.labels(site)).labels)));
  return new Map(keys.map((key) => [key, names.get(siteOf(key))?.[latentOf(key)] ?? ""]));
}

function tokenGroup(atlas, vocabulary, token, list, names) {
  const rows = (kind) => list.filter((entry) => entry.kind === kind).slice(0, 6);
  const group = (kind, title) => rows(kind).length > 0 && [h("h4", {}, title),
    h("ul", { class: "ranked" }, rows(kind)
    .map((entry) => h("li", {}, featureLink(atlas.id(entry.key)), " ",
    labelText(names.get(entry.key) ?? "", 70), kind === 0 && shareBar(entry.weight / 255,
    percent(entry.weight / 255)))))];
  return h("div", { class: "token-group" }, h("h3", {}, tokenChip(vocabulary.name(token)),
    h("span", { class: "quiet" }, ` token ${token}`)),
    group(0, "active on it (share of their activation)"), group(1, "promote it"));
}
