// Places the nodes of a focus graph: columns are given (layers), so only the order within a column
// and y are computed.
//
// 1. Order: alternating sweeps over the columns, each node goes to the weighted mean position of
//    its neighbours in the
//    columns before (or after) it; the order with the fewest weighted crossings is kept. 24 sweeps,
// O(sweeps * edges).
// 2. Height: alternating sweeps move each node towards its neighbours; least-squares with a minimal
//    gap (isotonic
//    regression on y - rank*gap), so that a feature that persists becomes a straight line.
// Deterministic: ties keep the order of the input.

const SWEEPS = 24;

/** nodes: [{ column, fixed? }], edges: [{ a, b, weight }] with indices of nodes -> Float64Array of
 *  y, in units of one row. */
export function layout(nodes, edges, { gap = 1, sweeps = SWEEPS } = {}) {
  const columns = groupByColumn(nodes);
  const near = neighbours(nodes, edges);
  const order = bestOrder(columns, nodes, near, edges, sweeps);
  return heights(order, nodes, near, gap);
}

function groupByColumn(nodes) {
  const columns = [];
  nodes.forEach((node, i) => (columns[node.column] ??= []).push(i));
  for (let c = 0; c < columns.length; c++) columns[c] ??= [];
  return columns;
}

function neighbours(nodes, edges) {
  const near = nodes.map(() => ({ before: [], after: [] }));
  for (const { a, b, weight } of edges) {
    const forward = nodes[a].column <= nodes[b].column;
    near[a][forward ? "after" : "before"].push([b, weight]);
    near[b][forward ? "before" : "after"].push([a, weight]);
  }
  return near;
}

function bestOrder(columns, nodes, near, edges, sweeps) {
  let order = columns.map((column) => column.slice());
  const rank = new Float64Array(nodes.length);
  setRanks(order, rank);
  let best = { crossings: countCrossings(order, edges, nodes, rank), order };
  for (let sweep = 0; sweep < sweeps && best.crossings > 0; sweep++) {
    const down = sweep % 2 === 0;
    order = order.map((column) => column.slice());
    const sequence = down ? order : order.slice().reverse();
    for (const column of sequence) {
      sortByBarycentre(column, rank, near, down ? "before" : "after");
      setRanks([column], rank);
    }
    const crossings = countCrossings(order, edges, nodes, rank);
    if (crossings < best.crossings) best = { crossings, order };
  }
  return best.order;
}

// Ranks are centred on zero, so that columns of different height compare.
function setRanks(columns, rank) {
  for (const column of columns) column.forEach((node, i) =>
    (rank[node] = i - (column.length - 1) / 2));
}

function sortByBarycentre(column, rank, near, side) {
  const key = new Map(column.map((node) => [node, weightedMean(near[node][side], rank)
    ?? rank[node]]));
  column.sort((x, y) => key.get(x) - key.get(y) || rank[x] - rank[y]);
}

function weightedMean(pairs, values) {
  let sum = 0;
  let total = 0;
  for (const [node, weight] of pairs) {
    sum += weight * values[node];
    total += weight;
  }
  return total > 0 ? sum / total : null;
}

/** Weighted crossings between edges that join the same two columns. */
export function countCrossings(order, edges, nodes, rank) {
  const bundles = new Map();
  for (const edge of edges) {
    const [a, b] = nodes[edge.a].column <= nodes[edge.b].column ? [edge.a, edge.b]
      : [edge.b, edge.a];
    const key = nodes[a].column * 4096 + nodes[b].column;
    if (!bundles.has(key)) bundles.set(key, []);
    bundles.get(key).push([rank[a], rank[b], edge.weight]);
  }
  let crossings = 0;
  for (const bundle of bundles.values()) {
    for (let i = 0; i < bundle.length; i++) {
      for (let j = 0; j < i; j++) {
        if ((bundle[i][0] - bundle[j][0]) * (bundle[i][1] - bundle[j][
          1]) < 0) crossings += Math.min(bundle[i][2], bundle[j][2]);
      }
    }
  }
  return crossings;
}

function heights(order, nodes, near, gap) {
  const y = new Float64Array(nodes.length);
  for (const column of order) column.forEach((node, i) =>
    (y[node] = (i - (column.length - 1) / 2) * gap));
  for (let sweep = 0; sweep < 12; sweep++) {
    const sequence = sweep % 2 === 0 ? order : order.slice().reverse();
    for (const column of sequence) {
      const wanted = column.map((node) => weightedMean(both(near[node]), y) ?? y[node]);
      const weight = column.map((node) => 0.1 + total(both(near[node])));
      const placed = spread(wanted, weight, gap);
      column.forEach((node, i) => (y[node] = placed[i]));
    }
  }
  return y;
}

function both({ before, after }) {
  return before.concat(after);
}

function total(pairs) {
  return pairs.reduce((sum, [, weight]) => sum + weight * weight, 0);
}

/** The nearest positions (least squares) to `wanted` that keep the order and at least `gap` between
 *  neighbours. */
export function spread(wanted, weight, gap) {
  const blocks = [];
  wanted.forEach((value, i) => {
    let block = { mean: value - i * gap, weight: weight[i], count: 1 };
    while (blocks.length && blocks[blocks.length - 1].mean > block.mean) {
      const last = blocks.pop();
      const sum = last.weight + block.weight;
      block = { mean: (last.mean * last.weight + block.mean * block.weight) / sum, weight: sum,
        count: last.count + block.count };
    }
    blocks.push(block);
  });
  const placed = [];
  for (const { mean, count } of blocks) for (let i = 0; i < count; i++) placed.push(mean
    + placed.length * gap);
  return placed;
}
