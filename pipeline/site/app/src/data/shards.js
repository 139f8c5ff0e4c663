// Reads data shards: classic scripts of the form FF("<key>","<base64 of gzip>"), loaded by adding a
// script tag,
// because a page opened from disk may neither fetch nor import.
//
// 1. `shard(key)` adds <script src="<key>.js"> once and waits for its FF call;
// 2. the payload is base64-decoded and gunzipped with the browser's own DecompressionStream;
// 3. the parsed container is kept: the latest 24 cards and corpus shards, all overviews, labels and
//    links.

import { DamagedShard, parseContainer } from "./container.js";

const KEY = /^[A-Za-z0-9_-][A-Za-z0-9._-]*(\/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$/;
const waiting = new Map();
const kept = new Map();
const KEEP_LAST = 24;
const LARGE = /\/cards\/|^corpus\/\d|^search\//;

export class MissingShard extends Error {
  constructor(key) {
    super(`The file ${key}.js is missing or damaged.`);
    this.key = key;
  }
}

window.FF = (key, payload) => waiting.get(key)?.resolve(payload);

/** The parsed container of one shard: { json, columns }. Rejects with MissingShard or DamagedShard.
 *  */
export function shard(key) {
  return cached(key, async () => parseContainer(await gunzip(decodeBase64(await request(key)), key),
    key));
}

/** `make()` once per key; the promise is shared, failures are forgotten so that a retry is
 *  possible. */
export function cached(key, make) {
  let value = kept.get(key);
  if (value === undefined) {
    value = make();
    value.catch(() => kept.delete(key));
  } else {
    kept.delete(key);
  }
  kept.set(key, value);
  if (LARGE.test(key)) dropOldest();
  return value;
}

// Overviews, labels and links stay (a few megabytes each at most); cards and corpus shards are kept
// while recent.
function dropOldest() {
  const large = [...kept.keys()].filter((key) => LARGE.test(key));
  for (const key of large.slice(0, -KEEP_LAST)) kept.delete(key);
}

function request(key) {
  if (!KEY.test(key)) return Promise.reject(new MissingShard(key.slice(0, 80)));
  if (waiting.has(key)) return waiting.get(key).promise;
  const entry = {};
  entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
  waiting.set(key, entry);
  const script = document.createElement("script");
  script.src = `${key}.js`;
  const fail = () => entry.reject(new MissingShard(key));
  script.onerror = fail;
  script.onload = fail;
    // a script that ran without calling FF with this key; harmless after resolve
  document.head.append(script);
  const done = () => {
    script.remove();
    waiting.delete(key);
  };
  entry.promise.then(done, done);
  return entry.promise;
}

function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function gunzip(bytes, key) {
  try {
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw new DamagedShard(`${key}.js is damaged: its payload cannot be unpacked.`);
  }
}
