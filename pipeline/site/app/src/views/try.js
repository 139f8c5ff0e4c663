// Live only: type a text, see which features fire on each of its tokens and which links were live.

import { keyOf } from "../data/atlas.js";
import { h, show } from "../dom.js";
import { percent, plural, short } from "../format.js";
import { cancel, stream } from "../live.js";
import { empty, featureLink, labelText } from "../ui/parts.js";
import { visible } from "../ui/tokens.js";
import { labelsOf } from "./search.js";

export async function tryText({ atlas, live }) {
  if (!live) return { title: "Try a text", node: h("div", {}, h("h1", {}, "Try a text"),
    empty("This needs the model.",
    "Open the atlas with the command below; the page from disk has only what was stored."),
    h("pre", {}, "featureflow atlas serve")) };
  const limit = live.limits?.max_tokens ?? 256;
  const area = h("textarea", { rows: 3, maxlength: 4000, "aria-label": "Text",
    placeholder: `at most ${limit} tokens` });
  const [status, result] = [h("p", { class: "quiet", role: "status" }), h("div", {})];
  const run = async (event) => {
    event.preventDefault();
    const seen = { pieces: [], fired: [], links: [], position: null };
    show(status, "Reading the text through the model …");
    try {
      await stream("text", { text: area.value }, (record) => take(atlas, seen, record));
      await draw(atlas, seen, result);
      show(status, `${plural(seen.pieces.length, "token")}, ` +
        `${plural(seen.fired.length, "activation")}, ` +
        `${plural(seen.links.length, "live link")}${seen.cut ? " (the first of more)" : ""}. ` +
        `Choose a token.`);
    } catch (error) {
      show(status, error.message);
    }
  };
  const node = h("div", {}, h("h1", {}, "Try a text"), h("p", { class: "lead" },
    `Which features of every dictionary are active on it, read by ${live.model}.`),
    h("form", { class: "try", onsubmit: run }, area, h("div", { class: "actions" },
    h("button", { class: "action primary" }, "Read"), h("button", { type: "button", class: "action",
    onclick: cancel }, "Stop"))), status, result);
  return { title: "Try a text", node };
}

function take(atlas, seen, record) {
  if (record.pieces) seen.pieces = record.pieces;
  if (record.site !== undefined) record.at.forEach((position, i) =>
    seen.fired.push({ key: keyOf(record.site, record.latent[i]), position, value: record.value[i],
    share: record.share[i] }));
  if (record.links) seen.cut = record.cut;
  if (record.links) seen.links =
    record.links.map(([targetSite, target, sourceSite, source, position]) =>
    ({ source: keyOf(sourceSite, source), target: keyOf(targetSite, target), position }));
}

async function draw(atlas, seen, place) {
  const labels = await labelsOf(atlas, seen.fired.map((item) => item.key));
  const list = h("div", {});
  const choose = (position) => {
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === position));
    show(list, fired(atlas, seen, position, labels));
  };
  const buttons = seen.pieces.map((piece, position) => h("button", { type: "button", class: "token",
    onclick: () => choose(position) }, visible(piece)));
  show(place, h("p", { class: "example-text live-text" }, buttons), list);
  if (buttons.length) choose(buttons.length - 1);
}

function fired(atlas, seen, position, labels) {
  const rows = seen.fired.filter((item) => item.position === position)
    .sort((a, b) => b.share - a.share).slice(0, 80);
  const links = seen.links.filter((item) => item.position === position);
  const from = new Map(links.map((item) => [item.target, item.source]));
  return h("table", { class: "plain" },
    h("thead", {}, h("tr", {}, ["feature", "label", "activation", "of its largest",
    "live link from"].map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, h("td", {}, featureLink(atlas.id(row.key))),
    h("td", {}, labelText(labels.get(row.key) ?? "", 80)), h("td", { class: "number" },
    short(row.value)), h("td", { class: "number" }, percent(row.share)),
    h("td", {}, from.has(row.key) ? featureLink(atlas.id(from.get(row.key))) : "–")))));
}
