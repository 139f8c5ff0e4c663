// The flow graph, read site by site as it is walked: links into a feature stand in its own site's
// shard, links out of it
// in the shards of the sites it has pairs with; each shard is indexed by source once.
//
// A link: { source, target, relation, rank, cosine, strength, q, pearson, jaccard, margin, mutual,
// success, change, trials, effect }
// with feature keys, NaN where nothing was measured; strength = (cosine - null median) / (1 - null
// median) of its pair.

import { bisectRight } from "d3-array";
import { cached, shard } from "./shards.js";
import { keyOf, latentOf, siteOf } from "./atlas.js";

export class Flow {
  static open(atlas) {
    return cached("flow opened", async () => new Flow(atlas, await atlas.flowModel()));
  }

  constructor(atlas, model) {
    this.atlas = atlas;
    this.model = model;
    this.nullOf = new Map(model.pairs.map((pair) => [`${pair.source} ${pair.target}`, pair]));
    this.targets = new Map();
    for (const { source, target } of model.pairs) {
      if (!this.targets.has(source)) this.targets.set(source, new Set());
      this.targets.get(source).add(target);
    }
  }

  /** Links into a feature, best rank first. */
  async incoming(key) {
    if (!this.atlas.has.flow) return [];
    const columns = await this.columns(siteOf(key));
    const latent = latentOf(key);
    const links = [];
    for (let i = columns.target_offset[latent]; i < columns.target_offset[latent + 1];
      i++) links.push(this.link(columns, i, key));
    return links;
  }

  /** Links out of a feature, strongest first. */
  async outgoing(key) {
    const links = [];
    for (const site of this.targets.get(siteOf(key)) ?? []) {
      const columns = await this.columns(site);
      const index = sourceIndex(columns, siteOf(key), this.atlas.sites[siteOf(key)].n_latents);
      const latent = latentOf(key);
      for (let j = index.offset[latent]; j < index.offset[latent + 1]; j++) {
        const i = index.entry[j];
        links.push(this.link(columns, i, keyOf(site, targetOf(columns, i))));
      }
    }
    return links.sort((a, b) => b.strength - a.strength);
  }

  /** The chain through a feature (as far as the page is not left): best predecessor repeatedly,
   *  best successor repeatedly, along the residual stream. */
  async chain(key, { floor = -1, alive = () => true } = {}) {
    const back = await this.walk(key, floor, alive, async (at) => (await this.incoming(at))
      .find((link) => link.rank === 0 && link.relation === 0), "source");
    const onward = await this.walk(key, floor, alive, async (at) => (await this.outgoing(at))
      .find((link) => link.rank === 0 && link.relation === 0 && this.isNext(link)), "target");
    return { features: [...back.map((link) => link.source).reverse(), key,
      ...onward.map((link) => link.target)], links: [...back.reverse(), ...onward] };
  }

  async walk(key, floor, alive, step, end) {
    const links = [];
    const seen = new Set([key]);
    for (let at = key; ; ) {
      const link = await step(at);
      if (!link || !(link.cosine > floor) || seen.has(link[end]) || !alive()) return links;
      links.push(link);
      at = link[end];
      seen.add(at);
    }
  }

  isNext(link) {
    return this.nullOf.get(`${siteOf(link.source)} ${siteOf(link.target)}`)?.adjacent !== false;
  }

  columns(site) {
    return shard(`sites/${this.atlas.sites[site].short}/flow`).then(({ columns }) => columns);
  }

  link(c, i, target) {
    const source = keyOf(c.source_site[i], c.source[i]);
    const cosine = c.cosine[i] / 10000;
    const base = this.nullOf.get(`${c.source_site[i]} ${siteOf(target)}`)?.null_median ?? 0;
    return {
      source,
      target,
      relation: c.relation[i],
      rank: c.rank[i],
      cosine,
      strength: Math.max(0, (cosine - base) / (1 - base)),
      q: c.q[i] === 255 ? NaN : 10 ** (-c.q[i] / 10),
      pearson: c.pearson[i] === -32768 ? NaN : c.pearson[i] / 10000,
      jaccard: c.jaccard[i] === 65535 ? NaN : c.jaccard[i] / 10000,
      margin: c.margin[i] === -32768 ? NaN : c.margin[i] / 10000,
      mutual: c.mutual[i] === 1,
      success: c.causal_success[i] === 255 ? NaN : c.causal_success[i] / 200,
      change: c.causal_change[i],
      trials: c.causal_n[i],
      effect: c.gradient_effect?.[i] ?? NaN,
    };
  }
}

/** For one flow shard: the entries that start at `site`, grouped by source latent (counting sort,
 *  once per pair). */
function sourceIndex(columns, site, nLatents) {
  columns.index ??= new Map();
  if (!columns.index.has(site)) columns.index.set(site, buildIndex(columns, site, nLatents));
  return columns.index.get(site);
}

function buildIndex({ source_site, source }, site, nLatents) {
  const offset = new Uint32Array(nLatents + 1);
  for (let i = 0; i < source.length; i++) if (source_site[i] === site) offset[source[i] + 1] += 1;
  for (let i = 0; i < nLatents; i++) offset[i + 1] += offset[i];
  const entry = new Uint32Array(offset[nLatents]);
  const next = offset.slice();
  for (let i = 0; i < source.length; i++) if (source_site[i] === site) entry[next[source[i]]++] = i;
  return { offset, entry };
}

/** The target latent of entry i: the last latent whose entries start at or before i. */
const targetOf = ({ target_offset }, i) => bisectRight(target_offset, i) - 1;
