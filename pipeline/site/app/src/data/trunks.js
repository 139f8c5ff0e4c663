// All trunks of the atlas: every living feature of the residual stream is on exactly one of them.
//
// Trunks.open(atlas) -> { all: [Trunk], begins, ends, written, modules }; what a trunk's row shows
// is made when it is asked for.

import { keyOf } from "./atlas.js";
import { cached, shard } from "./shards.js";

export class Trunks {
  static open(atlas) {
    return atlas.has.trunks ? cached("trunks opened", async () => new Trunks(atlas,
      await shard("flow/trunks"))) : Promise.resolve(null);
  }

  constructor(atlas, { json, columns }) {
    Object.assign(this, { atlas, columns, begins: json.begins, ends: json.ends, labels: json.labels,
      written: json.written, modules: json.modules });
    this.nTokens = atlas.manifest.corpus.n_tokens_seen;
    this.all = [];
    for (let i = 0, at = 0; i < columns.length.length; at += columns.length[i++]) this.all.push(
      new Trunk(this, i, at));
    this.nFeatures = columns.site.length;
  }
}

class Trunk {
  constructor(home, index, at) {
    Object.assign(this, { home, index, at, length: home.columns.length[index] });
  }
  get label() {
    return this.home.labels[this.index];
  }
  get score() {
    const score = this.home.columns.score[this.index];
    return score === 255 ? NaN : score / 254;
  }
  get begin() {
    return this.home.begins[this.home.columns.begin[this.index]];
  }
  get end() {
    return this.home.ends[this.home.columns.end[this.index]];
  }
  /** −1: none. */
  get community() {
    const own = this.home.columns.community[this.index];
    return own === 0xffffffff ? -1 : own;
  }
  /** Site index of its feature number `n`; of the last for −1. */
  site(n = 0) {
    return this.home.columns.site[n < 0 ? this.at + this.length + n : this.at + n];
  }
  id(n = 0) {
    return this.home.atlas.id(keyOf(this.site(n), this.home.columns.latent[n < 0 ? this.at
      + this.length + n : this.at + n]));
  }
  get middle() {
    return this.id(Math.floor(this.length / 2));
  }
  get features() {
    return Array.from({ length: this.length }, (_, n) => this.id(n));
  }
  /** One number a step, so one fewer than features. */
  get cosine() {
    return Array.from(this.home.columns.cosine.subarray(this.at + 1, this.at + this.length), (x) =>
      x / 10000);
  }
  get density() {
    return Array.from(this.home.columns.count.subarray(this.at, this.at + this.length), (n) =>
      n / this.home.nTokens);
  }
  get least() {
    return this.length > 1 ? Math.min(...this.cosine) : NaN;
  }
  get product() {
    return this.cosine.reduce((product, x) => product * x, 1);
  }
}
