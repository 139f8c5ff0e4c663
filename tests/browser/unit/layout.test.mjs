// The pure parts of the app against slow references: layout, character joining, containers, addresses.
import assert from "node:assert/strict";
import test from "node:test";
import { DamagedShard, parseContainer } from "../../../pipeline/site/app/src/data/container.js";
import { decodeUtf8, isOpen, Vocabulary } from "../../../pipeline/site/app/src/data/text.js";
import { briefLabel, percent, short } from "../../../pipeline/site/app/src/format.js";
import { countCrossings, layout, spread } from "../../../pipeline/site/app/src/graph/layout.js";
import { pathsThrough } from "../../../pipeline/site/app/src/graph/select.js";
import { link, parse, parseFeature } from "../../../pipeline/site/app/src/route.js";
import { level, visible } from "../../../pipeline/site/app/src/ui/tokens.js";

function random(seed) {
  let state = seed;
  return () => ((state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32);
}

test("spread keeps order and gaps and is no worse than many small changes of it", () => {
  const next = random(1);
  for (let round = 0; round < 50; round++) {
    const n = 1 + Math.floor(next() * 7);
    const wanted = Array.from({ length: n }, () => next() * 6);
    const weight = Array.from({ length: n }, () => 0.1 + next());
    const placed = spread(wanted, weight, 1);
    const cost = (y) => y.reduce((sum, value, i) => sum + weight[i] * (value - wanted[i]) ** 2, 0);
    for (let i = 1; i < n; i++) assert.ok(placed[i] - placed[i - 1] > 1 - 1e-9);
    for (let trial = 0; trial < 100; trial++) {
      const other = placed.map((value) => value + (next() - 0.5) * 0.2);
      if (other.every((value, i) => i === 0 || value - other[i - 1] >= 1)) assert.ok(cost(other) >= cost(placed) - 1e-9);
    }
  }
});

test("layout leaves a planted ladder without crossings and its trunk straight", () => {
  const nodes = [];
  const edges = [];
  for (let column = 0; column < 8; column++) for (const row of [2, 0, 1]) nodes.push({ column, row });
  nodes.forEach((a, i) => nodes.forEach((b, j) => b.column === a.column + 1 && a.row === b.row && edges.push({ a: i, b: j, weight: 1 })));
  // the ladder is shuffled: every other column lists its rows in another order
  nodes.forEach((node, i) => node.column % 2 && (node.row = (node.row + 1) % 3) && i);
  const y = layout(nodes, edges);
  const crossed = edges.filter((e) => edges.some((f) => nodes[e.a].column === nodes[f.a].column && (y[e.a] - y[f.a]) * (y[e.b] - y[f.b]) < 0));
  assert.equal(crossed.length, 0);
  for (const edge of edges) assert.ok(Math.abs(y[edge.a] - y[edge.b]) < 0.05);
});

test("layout has far fewer crossings than the order it was given, and is the same every time", () => {
  const next = random(7);
  const nodes = Array.from({ length: 120 }, (_, i) => ({ column: i % 12 }));
  const edges = [];
  nodes.forEach((a, i) => {
    for (let k = 0; k < 2; k++) {
      const b = nodes.findIndex((node, j) => node.column === a.column + 1 && j >= next() * 120);
      if (b >= 0) edges.push({ a: i, b, weight: 0.2 + next() });
    }
  });
  const y = layout(nodes, edges);
  assert.deepEqual(y, layout(nodes, edges));
  const count = (rank) => countCrossings([], edges, nodes, rank);
  assert.ok(count(y) < 0.4 * count(nodes.map((_, i) => i)));
});

test("crossings are counted as the definition says", () => {
  const nodes = [0, 0, 1, 1].map((column) => ({ column }));
  const rank = [0, 1, 0, 1];
  assert.equal(countCrossings([], [{ a: 0, b: 3, weight: 2 }, { a: 1, b: 2, weight: 3 }], nodes, rank), 2);
  assert.equal(countCrossings([], [{ a: 0, b: 2, weight: 2 }, { a: 1, b: 3, weight: 3 }], nodes, rank), 0);
});

test("paths through a node are its ancestors and descendants", () => {
  const edges = [[1, 2], [2, 3], [2, 4], [5, 4], [4, 6]].map(([source, target]) => ({ source, target }));
  assert.deepEqual([...pathsThrough(4, edges)].sort(), [1, 2, 4, 5, 6]);
});

test("UTF-8 is decoded as the platform does, and broken bytes are named", () => {
  const next = random(3);
  for (let round = 0; round < 300; round++) {
    const bytes = Uint8Array.from({ length: 1 + Math.floor(next() * 6) }, () => [0x41, 0xe2, 0x80, 0x99, 0xf0, 0x9f, 0xc3, 0xa9, 0xed, 0xa0][Math.floor(next() * 10)]);
    const text = decodeUtf8(bytes);
    const back = Buffer.from(text.replace(/\\x([0-9A-F]{2})/g, (_, hex) => String.fromCharCode(0xe000 + parseInt(hex, 16))));
    const restored = Buffer.from([...back.toString()].flatMap((c) => (c >= "\ue000" && c <= "\ue0ff" ? [c.codePointAt(0) - 0xe000] : [...Buffer.from(c)])));
    assert.deepEqual([...restored], [...bytes]);
    assert.ok(!text.includes("\ufffd"));
  }
});

test("tokens that make one character together are one piece", () => {
  const parts = ["a", [0xe2], [0x80, 0x99], [0xff], "é", [0xf0, 0x9f], [0x98], [0x80]].map((part) => Buffer.from(part));
  const offset = Uint32Array.from(parts.reduce((list, part) => [...list, list.at(-1) + part.length], [0]));
  const vocabulary = new Vocabulary({ json: { n_tokens: parts.length, special: [0], parts: { 1: "’" } }, columns: { offset, bytes: new Uint8Array(Buffer.concat(parts)) } });
  assert.deepEqual(vocabulary.pieces([0, 1, 2, 3, 4]).map((p) => [p.text, p.from, p.to]), [["a", 0, 1], ["’", 1, 3], ["\\xFF", 3, 4], ["é", 4, 5]]);
  assert.deepEqual(vocabulary.pieces([5, 6, 7]).map((p) => p.text), ["😀"]);
  assert.deepEqual(vocabulary.pieces([1, 0, 5]).map((p) => p.text), ["\\xE2", "a", "\\xF0\\x9F"]);
  assert.equal(vocabulary.text(99), "⟨token 99⟩");
  assert.deepEqual([vocabulary.name(1), vocabulary.name(0)], ["\\xE2 of ’", "a"]);
  assert.deepEqual(vocabulary.pieces([0, 1, 2]).map((p) => p.special), [true, false]);
  assert.ok(isOpen(Uint8Array.of(0x41, 0xe2, 0x80)) && !isOpen(Uint8Array.of(0xe2, 0x80, 0x99)) && !isOpen(Uint8Array.of(0x80, 0x80)));
});

test("a container is read by its own header, and a cut one is refused", () => {
  const header = JSON.stringify({ json: { a: 1 }, columns: [{ name: "x", dtype: "i16", shape: [2, 2], offset: 0 }, { name: "__proto__", dtype: "f32", shape: [1], offset: 8 }] });
  const padded = header + " ".repeat((8 - (header.length % 8)) % 8);
  const bytes = new Uint8Array(8 + padded.length + 16);
  bytes.set(Buffer.from("FFC1"));
  new DataView(bytes.buffer).setUint32(4, padded.length, true);
  bytes.set(Buffer.from(padded), 8);
  bytes.set(new Uint8Array(Int16Array.of(-1, 2, 3, -4).buffer), 8 + padded.length);
  bytes.set(new Uint8Array(Float32Array.of(0.5).buffer), 16 + padded.length);
  const { json, columns } = parseContainer(bytes, "k");
  assert.deepEqual([json, [...columns.x], columns.x.shape, columns["__proto__"][0]], [{ a: 1 }, [-1, 2, 3, -4], [2, 2], 0.5]);
  assert.throws(() => parseContainer(bytes.subarray(0, 10 + padded.length), "k"), DamagedShard);
  assert.throws(() => parseContainer(bytes.subarray(0, 20), "k"), DamagedShard);
  assert.throws(() => parseContainer(Uint8Array.of(1, 2, 3), "k"), DamagedShard);
});

test("addresses go round, features are recognised, junk is not", () => {
  for (const place of ["", ".pre", ".z", ".attn", ".mid", ".mlp_normalized", ".mlp_in", ".mlp"])
    assert.deepEqual(parseFeature(`L12${place}/7`), { site: `L12${place}`, latent: 7 });
  for (const junk of ["L12", "L12/", "M1/2", "L1/2/3", "L1/-2", "__proto__/1"]) assert.equal(parseFeature(junk), null);
  const { view, feature, options } = parse(link("graph/L3/4", { x: "L1/2,L2/3", q: "a&b=c#d" }));
  assert.deepEqual([view, feature, options.get("x"), options.get("q")], ["graph", { site: "L3", latent: 4 }, "L1/2,L2/3", "a&b=c#d"]);
  assert.equal(parse("#/%E0%A4%A").view, "unknown");
});

test("shades, signs and numbers", () => {
  assert.deepEqual([level(0, 5), level(5, 5), level(0.01, 5), level(1, 0)], [0, 9, 1, 0]);
  assert.equal(visible("a\nb\u202e\u0000\ud800"), "a↵b⟨U+202E⟩␀\ufffd");
  assert.deepEqual([percent(0.5), percent(0.00123), percent(0), percent(NaN)], ["50 %", "0.12 %", "0 %", "–"]);
  assert.deepEqual([short(1234.5), short(-0.5), short(1e-5)], ["1230", "−0.5", "1.0e−5"]);
});

test("a brief label keeps what tells it from others", () => {
  for (const [label, brief] of [
    ["strongly active on ‘ between’, ‘ both’", "‘between’, ‘both’"],
    ["active on forms of ‘clas’", "‘clas’"],
    ["active after ‘ the’", "after ‘the’"],
    ["no simple rule · strongest on ‘ x’", "‘x’"],
    ["no simple rule · as in “the «cat» sat”", "“the «cat» sat”"],
    ["no simple rule", "no simple rule"],
    ["too rare to label · as in “the «cat» sat”", "“the «cat» sat”"],
    ["my own note", "my own note"],
  ]) assert.equal(briefLabel(label), brief);
});
