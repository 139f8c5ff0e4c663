// Trunks counted layer by layer: where they begin and end, and how many features of each layer go
// back to which layer.

import { group, sum } from "d3-array";

const MOST_COHORTS = 8;

/** Per site index: { begin: { kind: n }, end: { kind: n }, written: { kind: n } }. */
export function turnoverOf(trunks) {
  const bySite = new Map();
  const at = (site) => bySite.get(site) ?? bySite.set(site, { begin: {}, end: {}, written: {} })
    .get(site);
  const add = (counts, kind) => (counts[kind] = (counts[kind] ?? 0) + 1);
  for (const trunk of trunks.all) {
    add(at(trunk.site()).begin, trunk.begin);
    add(at(trunk.site(-1)).end, trunk.end);
  }
  for (const [kind, counts] of Object.entries(trunks.written)) counts.forEach((n, site) => n
    && (at(site).written[kind] = n));
  return bySite;
}

/** Features grouped by the layer their trunk begins in: the first layer, then runs of layers that
 *  hold about as many
 *  features each. A group: { from, to (layers), size, n_by_site, n_on (site -> features that go on
 * to the next) }. */
export function cohortsOf(trunks) {
  const { atlas } = trunks;
  const byLayer = group(trunks.all, (trunk) => atlas.sites[trunk.site()].layer);
  const layers = [...byLayer.keys()].sort((a, b) => a - b);
  const size = (layer) => sum(byLayer.get(layer), (trunk) => trunk.length);
  return runs(layers, size)
    .map((run) => counted(atlas, run, run.flatMap((layer) => byLayer.get(layer))));
}

function runs(layers, size) {
  if (layers.length <= MOST_COHORTS) return layers.map((layer) => [layer]);
  const [first, ...rest] = layers;
  const total = sum(rest, size);
  const groups = [];
  let before = 0;
  for (const layer of rest) {
    const number = Math.min(MOST_COHORTS - 2, Math.floor(((before + size(layer) / 2) / total) * (
      MOST_COHORTS - 1)));
    (groups[number] ??= []).push(layer);
    before += size(layer);
  }
  return [[first], ...groups.filter(Boolean)];
}

function counted(atlas, layers, own) {
  const n_by_site = atlas.sites.map(() => 0);
  const n_on = new Map();
  for (const trunk of own) {
    for (let n = 0; n < trunk.length; n++) {
      n_by_site[trunk.site(n)] += 1;
      if (n + 1 < trunk.length) {
        const step = `${trunk.site(n)} ${trunk.site(n + 1)}`;
        n_on.set(step, (n_on.get(step) ?? 0) + 1);
      }
    }
  }
  return { from: layers[0], to: layers.at(-1), size: sum(own, (trunk) => trunk.length), n_by_site,
    n_on };
}
