// Chooses what a focus graph shows: the features best connected to the focus, within hops, strength
// and a budget.
//
// Best-first from the focus, backward and forward: a feature's worth is the largest product of link
// strengths on a path
// from the focus; the `budget` worthiest are shown. Each node takes its `topK` strongest links per
// direction. Features
// listed in `opened` show their neighbours whatever the limits. What is left out is counted per
// node ("+n").
// Cost: O(budget * links per feature) after the shards of the layers concerned are read.

const MOST_EDGES = 900;

/** limits: { back, onward, topK, strength, budget, mutual, opened: Set } -> { nodes: Map(key ->
 *  node), edges } */
export async function select(flow, focus, limits) {
  const links = linkReader(flow, limits);
  const nodes = new Map([[focus, { key: focus, worth: 1, back: 0, onward: 0 }]]);
  const frontier = [];
  await reach(nodes.get(focus), true);
  await reach(nodes.get(focus), false);
  while (frontier.length && nodes.size < limits.budget) {
    frontier.sort((a, b) => b.worth - a.worth || a.key - b.key);
    const best = frontier.shift();
    const known = nodes.get(best.key);
    if (known) continue;
    nodes.set(best.key, best);
    await reach(best, best.back > 0);
    if (limits.opened.has(best.key)) await reach(best, best.back === 0);
  }
  for (const key of limits.opened) if (nodes.has(key)) await open(nodes, links, key, limits);
  return { nodes, edges: await edgesAmong(nodes, links) };

  async function reach(node, backward) {
    const hops = backward ? node.back : node.onward;
    if (hops >= (backward ? limits.back : limits.onward)) return;
    const found = await (backward ? links.incoming(node.key) : links.outgoing(node.key));
    for (const link of found.slice(0, limits.topK)) {
      const key = backward ? link.source : link.target;
      frontier.push({ key, worth: node.worth * (0.05 + 0.95 * link.strength), back: backward ? hops
        + 1 : 0, onward: backward ? 0 : hops + 1 });
    }
  }
}

async function open(nodes, links, key, limits) {
  const found = [...(await links.incoming(key)).slice(0, 12), ...(await links.outgoing(key))
    .slice(0, 12)];
  for (const link of found) {
    const other = link.source === key ? link.target : link.source;
    if (!nodes.has(other) && nodes.size < limits.budget + 60) nodes.set(other,
      { key: other, worth: nodes.get(key).worth * link.strength, back: 0, onward: 0 });
  }
}

// Links above the limits, strongest first, remembered for this one selection.
function linkReader(flow, { strength, mutual }) {
  const fits = (link) => link.strength >= strength && (!mutual || link.mutual);
  const memory = { incoming: new Map(), outgoing: new Map() };
  const reader = (side) => async (key) => {
    if (!memory[side].has(key)) memory[side].set(key, (await flow[side](key)).filter(fits)
      .sort((a, b) => b.strength - a.strength));
    return memory[side].get(key);
  };
  return { incoming: reader("incoming"), outgoing: reader("outgoing") };
}

async function edgesAmong(nodes, links) {
  const edges = [];
  for (const node of nodes.values()) {
    const [into, out] = [await links.incoming(node.key), await links.outgoing(node.key)];
    const shown = into.filter((link) => nodes.has(link.source));
    edges.push(...shown);
    node.hiddenIn = into.length - shown.length;
    node.hiddenOut = out.filter((link) => !nodes.has(link.target)).length;
  }
  edges.sort((a, b) => b.strength - a.strength);
  return edges.slice(0, MOST_EDGES);
}

/** Every node on a path of shown edges through `key`. */
export function pathsThrough(key, edges) {
  const lit = new Set([key]);
  for (const [from, to] of [["target", "source"], ["source", "target"]]) {
    const queue = [key];
    for (let at = queue.pop(); at !== undefined; at = queue.pop()) {
      for (const edge of edges) {
        if (edge[from] !== at || lit.has(edge[to])) continue;
        lit.add(edge[to]);
        queue.push(edge[to]);
      }
    }
  }
  return lit;
}
