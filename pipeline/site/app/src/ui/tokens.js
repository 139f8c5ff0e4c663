// Draws text as tokens coloured by activation. A token is data: control characters, line separators
// and direction
// marks become visible signs, each token is isolated for bidirectional text, long tokens are cut.

import { h } from "../dom.js";
import { clip, short } from "../format.js";

const LONGEST = 60;
export const LEVELS = 9;
// eslint-disable-next-line no-control-regex
const UNSEEN = new RegExp(
  "[\\u0000-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u200b-\\u200f\\u2028-\\u202e" +
    "\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]|\\p{Surrogate}",
  "gu",
);

const ODD_SPACES = /[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]/g;

/** The text with every invisible character written as a sign: ↵ ⇥ ␀ ⟨U+202E⟩. */
export function visible(text) {
  return text.replace(UNSEEN, (c) => {
    const code = c.codePointAt(0);
    if (c === "\n") return "↵";
    if (c === "\t") return "⇥";
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    if (code >= 0xd800 && code <= 0xdfff) return "\ufffd";
    return codeSign(code);
  });
}

const codeSign = (code) => `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;

/** A token by itself, in a table or a chip: quiet dots for spaces at its ends, other kinds of space
 *  by code, cut when long. */
export function tokenChip(text) {
  const body = visible(clip(text, LONGEST)).replace(ODD_SPACES, (c) => codeSign(c.codePointAt(0)))
    .replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));
  return h("span", { class: "token-chip", title: text.length > LONGEST
    ? `${text.length} characters` : null }, body === "" ? "(empty)" : body);
}

/** 0 for silent, 1..LEVELS by share of the feature's largest activation. */
export const level = (value, max) => (value > 0 && max > 0
  ? Math.max(1, Math.min(LEVELS, Math.ceil((LEVELS * value) / max))) : 0);

/** One example: { tokens: [string], values: [number], peak: index, special?: [boolean] } around its
 *  peak. */
export function exampleText(example, { max, width, newlines, unit = "" }) {
  const { tokens, values, peak, special } = example;
  const from = Math.max(0, peak - Math.ceil(width * 0.65));
  const to = Math.min(tokens.length, Math.max(peak + 1, from + width));
  const spans = [];
  for (let i = from; i < to; i++) spans.push(...tokenSpan(tokens[i], values[i],
    { max, newlines, unit, peak: i === peak, special: special?.[i] }));
  return h("span", { class: "example-text", dir: "ltr" }, from > 0 && h("span", { class: "quiet" },
    "…"), spans, to < tokens.length && h("span", { class: "quiet" }, "…"));
}

function tokenSpan(text, value, { max, newlines, unit, peak, special }) {
  const shade = level(value, max);
  const body = visible(clip(text, LONGEST));
  const title = shade ? `${body.trim()} ${short(value)}${unit}` : null;
  // the space before a word is not shaded: at the end of a line it would stand there as a block of
  // its own
  const space = shade && /^ \S/.test(body) ? h("span", { class: "token" }, " ") : null;
  const span = h(shade ? "mark" : "span",
    { class: `token${shade ? ` a${shade}` : ""}${peak ? " peak" : ""}${special ? " special" : ""}`,
    title }, space ? body.slice(1) : body);
  return [space, span, newlines && text.includes("\n") && h("br")];
}

/** The key of the colours. */
export function shadeKey(max) {
  const steps = Array.from({ length: LEVELS }, (_, i) =>
    h("span", { class: `token a${i + 1}`, "aria-hidden": "true" }, " "));
  return h("span", { class: "shade-key", role: "img",
    "aria-label": `Shade and underline: activation from 0 to ${short(max)}` },
    h("span", { "aria-hidden": "true" }, "0"), steps, h("span", { "aria-hidden": "true" },
    short(max)));
}
