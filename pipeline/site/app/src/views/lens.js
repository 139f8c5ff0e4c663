// What a lens found: its text, its figure, its headline numbers and its tables. Without a name, the
// list of all lenses. Any lens is shown by this page; it knows none of them.

import { h } from "../dom.js";
import { clip, count, short } from "../format.js";
import { saveButtons } from "../figures/export.js";
import { link, parseFeature } from "../route.js";
import { empty, featureLink } from "../ui/parts.js";
import { visible } from "../ui/tokens.js";
import { virtualTable } from "../ui/virtual.js";

export async function lens({ atlas, argument }) {
  if (!argument) return { title: "Lenses", node: contents(atlas) };
  if (!atlas.lenses.some(({ name }) => name === argument)) {
    throw new Error(`There is no lens “${argument.slice(0, 200)}” in this atlas.`);
  }
  const found = await atlas.lens(argument);
  const node = h(
    "div",
    {},
    h("nav", { class: "crumbs" }, h("a", { href: link("lens") }, "← all lenses")),
    h("h1", {}, visible(found.title)),
    headline(found.headline),
    found.figure && figure(found),
    h("div", { class: "prose" }, paragraphs(found.text)),
    found.tables.map((table) => tableSection(atlas, argument, table)),
  );
  return { title: visible(found.title), node };
}

function contents(atlas) {
  const about = "Each lens looked at this run: tables, a figure and what they say.";
  const item = ({ name, title }) => h("li", {}, h("a", { href: link(`lens/${name}`) },
    visible(title)));
  const list = atlas.lenses.length
    ? h("ul", { class: "links" }, atlas.lenses.map(item))
    : empty("No lens has looked at this run.", "featureflow lens list names them.");
  return h("div", {}, h("h1", {}, "Lenses"), h("p", { class: "lead" }, about), list);
}

function headline(numbers) {
  const item = ([name, value]) =>
    h("div", {}, h("dt", {}, visible(name.replaceAll("_", " "))), h("dd", {}, shown(value)));
  const items = Object.entries(numbers).map(item);
  return items.length > 0 && h("dl", { class: "headline" }, items);
}

/** The figure as an image: a script inside an image never runs. */
function figure({ figure: text, title }) {
  const source = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  const image = h("img", { src: source, alt: `Figure: ${visible(title)}` });
  return h("figure", { class: "figure lens-figure" }, image);
}

/** Paragraphs, headings and lists of Markdown; everything else stays text. */
function paragraphs(text) {
  return text.split(/\n\s*\n/).map((block) => {
    const lines = block.trim().split("\n");
    if (lines.every((line) => /^[-*] /.test(line))) {
      return h("ul", {}, lines.map((line) => h("li", {}, visible(line.slice(2)))));
    }
    const [, heading] = /^#+ (.*)$/.exec(lines[0]) ?? [];
    const rest = visible(lines.slice(heading ? 1 : 0).join(" "));
    return [heading && h("h2", {}, visible(heading)), rest && h("p", {}, rest)];
  });
}

function tableSection(atlas, lensName, { name, n_rows: nRows, columns, rows }) {
  const exported = () => ({ head: columns.map((column) => column.name), rows: table.rowsShown() });
  const table = virtualTable({
    label: name,
    rows,
    columns: columns.map(({ name: title, kind }, i) => ({
      name: visible(title.replaceAll("_", " ")),
      title: visible(title),
      class: { number: "number", feature: "site", site: "site" }[kind] ?? "grow",
      sort: (row) => row[i],
      cell: (row) => cell(atlas, kind, row[i]),
    })),
  });
  const cut = nRows > rows.length && `The first ${count(rows.length)} of ${count(nRows)} rows.`;
  return h(
    "section",
    {},
    h(
      "div",
      { class: "figure-head" },
      h("h2", {}, visible(name.replaceAll("_", " "))),
      saveButtons({ name: `${lensName}-${name}`, rows: exported }),
    ),
    cut && h("p", { class: "quiet" }, cut),
    table,
  );
}

function cell(atlas, kind, value) {
  if (kind === "feature" && atlas.key(parseFeature(String(value))) !== null) {
    return featureLink(value);
  }
  if (kind === "site" && atlas.siteIndex.has(value)) {
    return h("a", { href: link(`site/${value}`) }, value);
  }
  return shown(value);
}

/** A value of any kind as text. */
export function shown(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value === "number") return Number.isInteger(value) ? count(value) : short(value);
  return visible(clip(String(value), 300));
}
