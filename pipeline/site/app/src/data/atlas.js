// The atlas as the views see it: sites, features, cards, texts. The only module that knows the
// names of shards and
// columns (their meaning is docs/decisions/0003-atlas-shards.md).
//
// A feature is a number, its *key*: site index * 2^20 + latent. `atlas.id(key)` is "L12/402".

import { bisectRight } from "d3-array";
import { cached, shard } from "./shards.js";
import { Vocabulary } from "./text.js";

const SPAN = 2 ** 20;
export const VERSION = 2;
export const keyOf = (site, latent) => site * SPAN + latent;
export const siteOf = (key) => Math.floor(key / SPAN);
export const latentOf = (key) => key % SPAN;
const PAD = { 2: 0xffff, 4: 0xffffffff };

export class WrongAtlas extends Error {}

export async function openAtlas() {
  const { json } = await shard("manifest");
  if (json.format !== "featureflow-atlas") throw new WrongAtlas(
    `manifest.js does not describe an atlas (format: ${String(json.format).slice(0, 60)}).`);
  if (json.version !== VERSION) throw new WrongAtlas(
    `This atlas has format version ${Number(json.version)}, the page reads version ${VERSION}. ` +
      `Make it again with: featureflow atlas`);
  return new Atlas(json);
}

export class Atlas {
  constructor(manifest) {
    this.manifest = manifest;
    this.sites = manifest.sites;
    this.siteIndex = new Map(manifest.sites.map((site, i) => [site.short, i]));
    this.has = manifest.has ?? {};
    this.lenses = manifest.lenses ?? [];
    this.traces = manifest.traces ?? [];
    this.model = manifest.model?.name ?? "";
    this.digest = fingerprint(JSON.stringify([manifest.model?.fingerprint,
      manifest.provenance?.collect, manifest.provenance?.train]));
    this.layers = [...new Set(manifest.sites.map((site) => site.layer))].sort((a, b) => a - b);
  }

  id(key) {
    return `${this.sites[siteOf(key)].short}/${latentOf(key)}`;
  }

  /** { site: "L12", latent: 402 } -> key, or null where this atlas has no such feature. */
  key(feature) {
    const site = feature ? this.siteIndex.get(feature.site) : undefined;
    return site === undefined || feature.latent >= this.sites[site].n_latents ? null
      : keyOf(site, feature.latent);
  }

  overview(site) {
    return shard(`sites/${this.sites[site].short}/overview`).then(({ columns }) => columns);
  }

  /** { labels: [string], method: u8, score: u8 }. */
  labels(site) {
    return shard(`sites/${this.sites[site].short}/labels`).then(({ json, columns }) =>
      ({ labels: json.labels, ...columns }));
  }

  vocabulary() {
    return cached("vocabulary", async () => new Vocabulary(await shard("vocab")));
  }

  flowModel() {
    return this.has.flow ? shard("flow/model").then(({ json }) => json)
      : Promise.resolve({ pairs: [] });
  }

  /** [{ id, label, size, nModules, n_by_site, tokens }], largest first. */
  communities() {
    return this.has.communities ? cached("communities", async () =>
      this.communitiesOf(await shard("flow/communities"))) : Promise.resolve(null);
  }

  communitiesOf({ json, columns }) {
    const [perSite, perToken] = [this.sites.length, columns.token.shape[1]];
    return Array.from(columns.id, (id, i) => {
      const n_by_site = columns.n_by_site.subarray(i * perSite, (i + 1) * perSite);
      const inStream = this.sites.reduce((sum, site, s) => sum + (site.kind === "resid_post"
        ? n_by_site[s] : 0), 0);
      const size = n_by_site.reduce((sum, n) => sum + n, 0);
      return { id, label: json.labels[i], size, nModules: size - inStream, n_by_site,
        tokens: listOf(columns.token.subarray(i * perToken, (i + 1) * perToken)) };
    });
  }

  steering() {
    return shard("attached/steering").then(({ json }) => json,
      () => ({ samples: [], effects: [], commands: {} }));
  }

  /** What a sentence model or a chat model said of some features afterwards: { "L12/402": {...} }.
   *  */
  scores() {
    return shard("attached/scores").then(({ json }) => json.features ?? {}, () => ({}));
  }

  /** A traced prompt: the document of pipeline/trace/document.py. */
  trace(name) {
    return shard(`traces/${name}`).then(({ json }) => json);
  }

  /** What a lens found: { title, text, headline, figure, tables }. */
  lens(name) {
    return shard(`lenses/${name}`).then(({ json }) => json);
  }

  /** What lenses say of one feature: [{ lens, title, name, value }]. */
  async lensColumns(key) {
    const site = this.sites[siteOf(key)];
    if (!site.lenses) return [];
    const { json, columns } = await shard(`sites/${site.short}/lenses`);
    const value = ({ texts }, i) => (texts ?? columns[i])[latentOf(key)];
    const all = json.columns.map((column, i) => ({ ...column, value: value(column, i) }));
    return all.filter(({ value: own }) => own !== null && !Number.isNaN(own));
  }

  /** Everything stored about one feature, columns cut to its row; `labels` best first. */
  async card(key) {
    const perShard = this.manifest.cards_per_shard;
    const number = Math.floor(latentOf(key) / perShard);
    const { json, columns } =
      await shard(`sites/${this.sites[siteOf(key)].short}/cards/${pad3(number)}`);
    const row = latentOf(key) - json.first;
    const card = { key, labels: json.labels[row] ?? [], examples: examplesOf(columns, row,
      this.manifest) };
    for (const [name, column] of Object.entries(columns)) {
      if (name.startsWith("example_") || name.startsWith("act_")
        || column.shape[0] !== json.n) continue;
      card[name] = cutRow(column, row, json.n);
    }
    return card;
  }

  /** The tokens of rows [from, to) of the corpus. */
  async rows(from, to) {
    const per = this.manifest.corpus.rows_per_shard;
    const parts = [];
    for (let start = from; start < to; ) {
      const number = Math.floor(start / per);
      const { columns } = await shard(`corpus/${pad3(number)}`);
      const end = Math.min(to, (number + 1) * per);
      parts.push(...columns.token.subarray(start - number * per, end - number * per));
      start = end;
    }
    return parts;
  }

  /** Where a row lies: its run's first and last row, its position in the context, its document. */
  async place(row) {
    const { json, columns } = await shard("corpus/documents");
    const run = bisectRight(columns.run_row, row) - 1;
    const document = columns.run_document[run];
    const [source, label] = [columns.source[document], columns.label[document]];
    return {
      from: columns.run_row[run],
      to: columns.run_row[run + 1],
      position: columns.run_position[run] + row - columns.run_row[run],
      document,
      title: json.titles?.[document] ?? "",
      image: json.images?.[document] ?? "",
      source: this.manifest.corpus.sources?.[source]?.name ?? "",
      label: label === 255 ? "" : (this.manifest.corpus.labels?.[label]?.name ?? ""),
    };
  }

  /** [{ key, kind, weight }] for a token, strongest first. */
  async tokenFeatures(token) {
    const { tokens_per_shard: per, shards } = this.manifest.search ?? { shards: [] };
    const number = Math.floor(token / per);
    if (!shards.includes(number)) return [];
    const { columns } = await shard(`search/tokens/${pad3(number)}`);
    const at = token - number * per;
    const found = [];
    for (let i = columns.offset[at]; i < columns.offset[at + 1]; i++) {
      found.push({ key: keyOf(columns.site[i], columns.latent[i]), kind: columns.kind[i],
        weight: columns.weight[i] });
    }
    return found;
  }

  method(index) {
    return this.manifest.label_methods?.[index] ?? null;
  }
}

export const pad3 = (n) => String(n).padStart(3, "0");

/** A list column without its pads. */
export function listOf(column) {
  const end = column.indexOf(PAD[column.BYTES_PER_ELEMENT]);
  return Array.from(end < 0 ? column : column.subarray(0, end));
}

function cutRow(column, row, n) {
  if (column.shape.length === 1) return column[row];
  const width = column.length / n;
  return column.subarray(row * width, (row + 1) * width);
}

function examplesOf(columns, row, manifest) {
  const examples = [];
  for (let e = columns.example_offset[row]; e < columns.example_offset[row + 1]; e++) {
    examples.push({
      tab: manifest.example_tabs[columns.example_tab[e]],
      decile: columns.example_decile[e],
      row: columns.example_row[e],
      value: columns.example_value[e],
      gap: columns.example_gap?.[e],
      at: columns.act_at.subarray(columns.act_offset[e], columns.act_offset[e + 1]),
      share: columns.act_value.subarray(columns.act_offset[e], columns.act_offset[e + 1]),
    });
  }
  return examples;
}

function fingerprint(text) {
  let hash = 0x811c9dc5;
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193);
  return (hash >>> 0).toString(16).padStart(8, "0");
}
