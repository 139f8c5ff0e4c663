// Examples of a feature: reads the corpus around each peak, joins tokens into pieces, shades them.

import { h } from "../dom.js";
import { short } from "../format.js";
import { exampleText, visible } from "./tokens.js";

/** The example's text, ready to draw at any width: { tokens, values, peak, place }. Reads as far as
 *  its run allows. */
export async function readExample(atlas, vocabulary, card, example, reach = 64) {
  const place = await atlas.place(example.row);
  const from = Math.max(place.from, example.row - reach);
  const to = Math.min(place.to, example.row + reach + 1);
  const ids = await atlas.rows(from, to);
  const shares = new Float64Array(ids.length);
  example.at.forEach((offset, i) => {
    const at = example.row + offset - from;
    if (at >= 0 && at < shares.length) shares[at] = example.share[i];
  });
  const pieces = vocabulary.pieces(ids);
  const peak = pieces.findIndex((piece) => piece.to > example.row - from);
  const values = pieces.map((piece) =>
    (Math.max(...shares.subarray(piece.from, piece.to)) / 255) * card.max);
  return { tokens: pieces.map((piece) => piece.text), special: pieces.map((piece) => piece.special),
    values, peak, place };
}

/** One list item: value, text, where it stands. */
export function exampleItem(example, read, { card, width, newlines, compact = false }) {
  const percent = card.max > 0 ? `${Math.round((100 * example.value) / card.max)} %` : "";
  const near = example.tab === "near_miss";
  const below = Math.round(100 * example.gap);
  const gap = Number.isFinite(example.gap) ? `, ${below} % below its threshold` : "";
  const title = near
    ? `pre-activation ${short(example.value)}${gap}`
    : `activation ${short(example.value)}, ${percent} of the largest`;
  return h(
    "li",
    { class: "example" },
    h("span", { class: "example-value number", title }, short(example.value)),
    read.place.image
      ? h("img", { class: "thumbnail", src: read.place.image, alt: read.place.title }) : null,
    exampleText(read, { max: card.max, width, newlines }),
    !compact && h("span", { class: "example-place quiet" }, placeText(read.place)),
  );
}

function placeText({ title, source, label, document, position }) {
  const name = title ? visible(title.slice(0, 60)) : `document ${document}`;
  return [source, label, name, `position ${position}`].filter(Boolean).join(" · ");
}

export async function exampleList(atlas, vocabulary, card, examples, options) {
  const texts = await Promise.all(examples.map((example) => readExample(atlas, vocabulary, card,
    example)));
  return h("ul", { class: "examples" }, examples.map((example, i) => exampleItem(example, texts[i],
    { card, ...options })));
}
