// Makes DOM nodes from data. Every string becomes a text node or an attribute value; nothing is
// ever parsed as HTML.
//
// h("button", { class: "quiet", onclick: open, "aria-label": "open" }, "text", node, [more]) ->
// HTMLElement
// svg("path", { d: "…" }) -> SVGElement

const SVG = "http://www.w3.org/2000/svg";

export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Replace all children of `parent`. */
export function show(parent, ...children) {
  parent.replaceChildren(...flat(children));
  return parent;
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) setAttribute(node, name, value);
  node.append(...flat(children));
  return node;
}

function setAttribute(node, name, value) {
  if (value === undefined || value === null || value === false) return;
  if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
  else if (name === "style") for (const [key, item] of Object.entries(
    value)) node.style.setProperty(key, item);
  else if (name === "value" || name === "checked" || name === "selected") node[name] = value;
  else node.setAttribute(name, value === true ? "" : wellFormed(String(value)));
}

function flat(children) {
  const kept = children.flat(Infinity).filter((child) => child !== undefined && child !== null
    && child !== false);
  return kept.map((child) => (child instanceof Node ? child : document.createTextNode(
    wellFormed(String(child)))));
}

/** Lone surrogates become U+FFFD, so that serialising, copying and encoding never fail. */
export function wellFormed(text) {
  return text.toWellFormed ? text.toWellFormed() : text.replace(/\p{Surrogate}/gu, "\ufffd");
}
