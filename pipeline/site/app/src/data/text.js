// Tokens as people read them: the vocabulary's bytes, joined until they end on a character
// boundary.

/** From the `vocab` container. */
export class Vocabulary {
  constructor({ json, columns }) {
    this.size = json.n_tokens;
    this.special = new Set(json.special ?? []);
    this.parts = json.parts ?? {};
    this.offset = columns.offset;
    this.bytes = columns.bytes;
    this.known = new Map();
  }

  /** One token by itself. A token that is part of a character shows its bytes: \xE2\x80. */
  text(id) {
    let text = this.known.get(id);
    if (text === undefined) {
      text = id < this.size ? decodeUtf8(this.slice(id)) : `⟨token ${id}⟩`;
      this.known.set(id, text);
    }
    return text;
  }

  /** The token for tables: one that is part of a character also says of which it mostly is. */
  name(id) {
    const whole = this.parts[id];
    return whole === undefined ? this.text(id) : `${this.text(id)} of ${whole}`;
  }

  slice(id) {
    return this.bytes.subarray(this.offset[id], this.offset[id + 1]);
  }

  /** A run of token ids as [{ text, from, to, special }]: consecutive tokens of one character are
   *  one piece. */
  pieces(ids) {
    const pieces = [];
    for (let from = 0; from < ids.length; ) {
      let to = from + 1;
      if (ids[from] < this.size && isOpen(this.slice(ids[from]))) to = this.closingToken(ids, from);
      const text = to === from + 1 ? this.text(ids[from]) : decodeUtf8(this.joined(ids, from, to));
      pieces.push({ text, from, to, special: to === from + 1 && this.special.has(ids[from]) });
      from = to;
    }
    return pieces;
  }

  closingToken(ids, from) {
    for (let to = from + 2; to <= Math.min(ids.length, from + 4); to++) {
      const next = ids[to - 1] < this.size ? this.slice(ids[to - 1])[0] : 0;
      if ((next & 0xc0) !== 0x80) break; // not the rest of a character
      if (!isOpen(this.joined(ids, from, to))) return to;
    }
    return from + 1;
  }

  joined(ids, from, to) {
    return Uint8Array.from(Array.from({ length: to - from }, (_, i) =>
      [...this.slice(ids[from + i])]).flat());
  }
}

/** Whether the bytes stop in the middle of a character. */
export function isOpen(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back++) {
    const byte = bytes[bytes.length - back];
    if (byte < 0x80) return false;
    if (byte >= 0xc0) return lengthOf(byte) > back;
  }
  return false;
}

const lengthOf = (lead) => (lead >= 0xc2 && lead < 0xe0 ? 2 : lead >= 0xe0 && lead < 0xf0 ? 3
  : lead >= 0xf0 && lead < 0xf5 ? 4 : 0);

const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** UTF-8 with every byte that cannot be UTF-8 written as \xNN. */
export function decodeUtf8(bytes) {
  try {
    return strict.decode(bytes);
  } catch {
    return decodeBroken(bytes);
  }
}

function decodeBroken(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; ) {
    const length = bytes[i] < 0x80 ? 1 : lengthOf(bytes[i]);
    const character = length && i + length <= bytes.length
      ? tryDecode(bytes.subarray(i, i + length)) : null;
    text += character ?? `\\x${bytes[i].toString(16).toUpperCase().padStart(2, "0")}`;
    i += character === null ? 1 : length;
  }
  return text;
}

function tryDecode(bytes) {
  try {
    return strict.decode(bytes);
  } catch {
    return null;
  }
}
