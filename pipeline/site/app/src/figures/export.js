// Takes a figure or a table out of the page: SVG with its styles written into it, PNG at twice the
// size, TSV, JSON.

import { h, svg, wellFormed } from "../dom.js";

const STYLES = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity",
  "stroke-dasharray", "stroke-linecap", "font-size", "font-family", "font-weight", "opacity",
  "text-anchor", "dominant-baseline"];

/** A figure element: the drawing, its caption, the buttons that save it and its table twin.
 *  `rows` is () => { head: [...], rows: [[...]] }; `name` starts the names of saved files. A `list`
 * is a table already. */
export function figure({ name, title, drawing, list, caption, rows }) {
  const twin = h("div", { class: "twin" });
  const details = h("details", { class: "twin-details" }, h("summary", {}, "Table"), twin);
  details.addEventListener("toggle", () => details.open && !twin.firstChild
    && twin.append(plainTable(rows(), title)));
  const picture = () => (drawing instanceof SVGElement ? drawing : drawing.querySelector("svg"));
  return h(
    "figure",
    { class: "figure" },
    h("div", { class: "figure-head" }, title && h("h2", { class: "figure-title" }, title),
      saveButtons({ name, picture: drawing && picture, legend: () => drawing.querySelector(
      ".legend"), rows })),
    drawing ? h("div", { class: "drawing" }, drawing) : list,
    caption && h("figcaption", {}, caption),
    rows && drawing && details,
  );
}

export function saveButtons({ name, picture, legend = () => null, rows }) {
  const make = (label, save) => h("button", { type: "button", class: "save", onclick: save,
    "aria-label": `Save ${name} as ${label}` }, label);
  return h(
    "span",
    { class: "saves" },
    picture && make("SVG", () => saveText(`${name}.svg`, svgText(picture(), legend()),
      "image/svg+xml")),
    picture && make("PNG", () => savePng(`${name}.png`, picture(), legend())),
    rows && make("TSV", () => saveText(`${name}.tsv`, tsv(rows()), "text/tab-separated-values")),
  );
}

export function plainTable({ head, rows }, caption) {
  // a node that stands elsewhere is copied; a copy has no listeners
  const cell = (value) => (value instanceof Node && value.parentNode ? value.cloneNode(true)
    : value);
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption ?? "table" },
    h(
      "table",
      { class: "plain" },
      caption && h("caption", { class: "unseen" }, caption),
      h("thead", {}, h("tr", {}, head.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows.slice(0, 2000)
        .map((row) => h("tr", {},
        row.map((value) => h("td", { class: typeof value === "number" ? "number" : null },
        cell(value)))))),
    ),
    rows.length > 2000 && h("p", { class: "quiet" },
      `The first 2000 of ${rows.length} rows; the TSV has all.`),
  );
}

/** Tab-separated text; tabs, line ends and backslashes inside a value are written \t \n \r \\ . */
export function tsv({ head, rows }) {
  return [head, ...rows].map((row) => row.map(tsvCell).join("\t")).join("\n") + "\n";
}

const ESCAPES = { "\t": "\\t", "\n": "\\n", "\r": "\\r", "\\": "\\\\" };
function tsvCell(value) {
  const text = value instanceof Node ? value.textContent : String(value ?? "");
  return wellFormed(text).replace(/[\t\n\r\\]/g, (c) => ESCAPES[c]);
}

export function saveText(name, text, type) {
  saveBlob(name, new Blob([text], { type: `${type};charset=utf-8` }));
}

function saveBlob(name, blob) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name.replace(/[^\w.-]+/g,
    "-") });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** The drawing as a standalone document: computed styles are written as attributes, a background
 *  and the legend are added. */
export function svgText(drawing, legend) {
  const copy = drawing.cloneNode(true);
  inlineStyles(drawing, copy);
  const box = drawing.viewBox.baseVal;
  const [x, y, width, bare] = box && box.width ? [box.x, box.y, box.width, box.height]
    : [0, 0, drawing.clientWidth, drawing.clientHeight];
  const height = bare + addLegend(copy, legend, { x, y: y + bare, width });
  const ground = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  const paper = getComputedStyle(document.body).backgroundColor;
  for (const [key, value] of Object.entries({ x, y, width, height,
    fill: paper })) ground.setAttribute(key, value);
  copy.prepend(ground);
  copy.setAttribute("viewBox", [x, y, width, height].join(" "));
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  return withoutControls(wellFormed(new XMLSerializer().serializeToString(copy)));
}

// The legend stands beside the drawing on the page; under it in a file. Returns the height it
// takes.
function addLegend(copy, legend, { x, y, width }) {
  if (!legend) return 0;
  const { color, fontFamily } = getComputedStyle(legend);
  let [left, base] = [x + 8, y + 16];
  for (const item of legend.children) {
    const mark = item.querySelector(".swatch, .stroke");
    const wide = (mark ? 30 : 14) + 6.5 * item.textContent.length;
    if (left + wide > x + width && left > x + 8) [left, base] = [x + 8, base + 18];
    const style = mark && getComputedStyle(mark);
    if (mark) copy.append(svg("rect", { x: left, y: base - 9, width: 11, height: 11,
      fill: mark.classList.contains("stroke") ? style.borderTopColor : style.backgroundColor }));
    copy.append(svg("text", { x: left + (mark ? 16 : 0), y: base, fill: color,
      "font-family": fontFamily, "font-size": 12 }, item.textContent));
    left += wide;
  }
  return base - y + 10;
}

function inlineStyles(from, to) {
  const style = getComputedStyle(from);
  for (const name of STYLES) {
    const value = style.getPropertyValue(name);
    if (value) to.setAttribute(name, value);
  }
  to.removeAttribute("class");
  to.removeAttribute("style");
  for (let i = 0; i < from.children.length; i++) inlineStyles(from.children[i], to.children[i]);
}

// XML 1.0 has no way to write these.
function withoutControls(text) {
  // eslint-disable-next-line no-control-regex
  return text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "\ufffd");
}

async function savePng(name, drawing, legend) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svgText(drawing, legend))}`;
  await image.decode();
  const canvas = h("canvas", { width: image.width * 2, height: image.height * 2 });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => saveBlob(name, blob), "image/png");
}
