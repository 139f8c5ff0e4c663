// A page that was left reads no further dictionaries: they would hold up the page that came after it.
import assert from "node:assert/strict";
import { test } from "node:test";

globalThis.window = {};
const { labelsOf } = await import("../../../pipeline/site/app/src/views/search.js");
const { keyOf } = await import("../../../pipeline/site/app/src/data/atlas.js");

const keys = Array.from({ length: 30 }, (_, site) => keyOf(site, 1));
const atlasOf = (read) => ({ labels: async (site) => (read.push(site), { labels: ["", `of ${site}`] }) });

test("labels of features of many dictionaries", async () => {
  const read = [];
  const names = await labelsOf(atlasOf(read), keys);
  assert.equal(read.length, 30);
  assert.equal(names.get(keys[29]), "of 29");
});

test("reading stops when the page is left", async () => {
  const read = [];
  const names = await labelsOf(atlasOf(read), keys, () => read.length < 6);
  assert.equal(read.length, 8);
  assert.equal(names.get(keys[29]), "");
});
