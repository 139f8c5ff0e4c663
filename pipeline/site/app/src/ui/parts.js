// Small pieces that several views share: feature links, class badges, score bars, tabs, sliders,
// empty and error states.

import { MissingShard } from "../data/shards.js";
import { h, show } from "../dom.js";
import { clip, fixed, splitLabel } from "../format.js";
import { compared, noteOf, onChange, toggleCompared } from "../notes.js";
import { link } from "../route.js";
import { visible } from "./tokens.js";

export const CLASS_NAMES = { unknown: "unknown", translated: "carried", processed: "processed",
  newborn: "newborn", unexplained: "unexplained" };
export const CLASS_ABOUT = {
  unknown: "no links were computed for it",
  translated: "carried over from the layer before, unchanged in direction",
  processed: "carried over and also written to by this layer's MLP or attention",
  newborn: "written by this layer's MLP or attention; not in the layer before",
  unexplained: "neither the layer before nor this layer's modules explain its direction",
};
export const RELATION_NAMES = ["residual", "MLP", "attention"];
export const FLAG = { alive: 1, labelled: 2, oneToken: 4, dense: 8, dying: 16, trunk: 32 };

export function featureLink(id, text) {
  return h("a", { href: link(id), class: "feature", "data-feature": id }, text ?? id);
}

/** Whether a label says that no rule was found; it may go on with typical tokens. */
export const isNoRule = (label) => label === "" || label.startsWith("no simple rule");

/** A label as text: quiet where it is not a real label. A quoted token's space does not end a line.
 *  */
export function labelText(label, limit = 160) {
  const [lead, rest] = splitLabel(label === "" ? "never active" : visible(clip(label, limit))
    .replaceAll("‘ ", "‘\u00a0"));
  return h("span", { class: isNoRule(label) ? "label quiet" : "label", title: label.length > limit
    ? `${label.length} characters` : null }, lead && h("span", { class: "label-lead" }, lead),
    rest);
}

/** Someone's own note on a feature wins over the measured label in lists. */
export const ownLabel = (id, label) => noteOf(id)?.label || label;

export function classBadge(name) {
  return h("span", { class: `badge class-${name}`, title: CLASS_ABOUT[name] }, CLASS_NAMES[name]
    ?? name);
}

/** score in 0..1 with its interval as a small bar; the numbers stand beside it. */
export function scoreBar(score, low, high) {
  if (score === null || score === undefined || Number.isNaN(score)) return h("span",
    { class: "quiet" }, "–");
  const at = (x) => `${(100 * Math.max(0, Math.min(1, x))).toFixed(1)}%`;
  const known = Number.isFinite(low) && Number.isFinite(high);
  return h(
    "span",
    { class: "score" },
    h("span", { class: "score-track", "aria-hidden": "true" }, known
      && h("span", { class: "score-range", style: { left: at(low), width: at(high - low) } }),
      h("span", { class: "score-dot", style: { left: at(score) } })),
    h("span", { class: "score-number" }, fixed(score), known && h("span", { class: "quiet" },
      ` ${fixed(low)}–${fixed(high)}`)),
  );
}

/** A horizontal bar with its number, for shares. */
export function shareBar(share, text) {
  return h("span", { class: "share" }, h("span", { class: "share-bar", "aria-hidden": "true",
    style: { width: `${(100 * Math.min(1, Math.max(0, share))).toFixed(1)}%` } }),
    h("span", { class: "share-number" }, text));
}

export function compareButton(id) {
  const button = h("button", { type: "button", class: "action", onclick: () =>
    toggleCompared(id) });
  const draw = () => {
    const inside = compared().includes(id);
    button.setAttribute("aria-pressed", inside);
    show(button, inside ? "In the compare tray" : "Add to compare");
  };
  draw();
  const stop = onChange(() => (button.isConnected ? draw() : stop()));
  return button;
}

export function copyButton(text, label = "Copy") {
  const button = h("button", { type: "button", class: "action" }, label);
  button.addEventListener("click", async () => {
    show(button, (await copy(text instanceof Function ? text() : text)) ? "Copied"
      : "Select and copy");
    setTimeout(() => show(button, label), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { value: text, class: "unseen" });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** Tabs with the arrow keys. items: [{ id, name, draw: () => Node }]. */
export function tabs({ items, label, chosen, onchoose }) {
  const panel = h("div", { class: "tab-panel", role: "tabpanel", tabindex: 0 });
  const uid = `tab-${++tabCount}`;
  panel.id = `${uid}-panel`;
  const buttons = items.map((item) => h("button", { type: "button", role: "tab",
    id: `${uid}-${item.id}`, "aria-controls": panel.id, onclick: () => choose(item) }, item.name));
  const list = h("div", { class: "tabs", role: "tablist", "aria-label": label, onkeydown: (event) =>
    walk(event) }, buttons);
  function choose(item, focus = false) {
    items.forEach((other, i) => {
      buttons[i].setAttribute("aria-selected", other === item);
      buttons[i].tabIndex = other === item ? 0 : -1;
      if (other === item && focus) buttons[i].focus();
    });
    panel.setAttribute("aria-labelledby", `${uid}-${item.id}`);
    show(panel, item.draw());
    onchoose?.(item.id);
  }
  function walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = buttons.indexOf(document.activeElement);
    choose(items[(at + step + items.length) % items.length], true);
  }
  choose(items.find((item) => item.id === chosen) ?? items[0]);
  return h("div", {}, list, panel);
}
let tabCount = 0;

/** A labelled range input whose value is shown; `oninput(value)` while it moves. */
export function slider({ label, min, max, step = 1, value, format = String, oninput, title }) {
  const output = h("output", {}, format(value));
  const input = h("input", { type: "range", min, max, step, value, "aria-label": label });
  input.addEventListener("input", () => {
    show(output, format(Number(input.value)));
    oninput(Number(input.value));
  });
  return h("label", { class: "slider", title }, h("span", {}, label), input, output);
}

export function checkbox({ label, checked, onchange, title }) {
  return h("label", { class: "check", title },
    h("input", { type: "checkbox", checked, onchange: (event) => onchange(event.target.checked) }),
    h("span", {}, label));
}

export function choice({ label, options, value, onchange }) {
  const select = h("select", { "aria-label": label, onchange: () => onchange(select.value) },
    options.map(([id, name]) => h("option", { value: id, selected: id === value }, name)));
  return h("label", { class: "choice" }, h("span", {}, label), select);
}

export function empty(what, why) {
  return h("div", { class: "empty" }, h("p", {}, what), why && h("p", { class: "quiet" }, why));
}

export function errorPage(error, { whole = false } = {}) {
  const missing = error instanceof MissingShard;
  const first = whole && missing;
  return h(
    "section",
    { class: "error", role: "alert" },
    h("h1", {}, first ? "There is no atlas beside this page" : "This page cannot be shown"),
    h("p", {}, visible(clip(String(error.message), 600))),
    missing && h("p", { class: "quiet" },
      "An atlas is a whole folder: index.html needs the files that lie beside it. Copy the " +
        "folder again, or check it with the command below."),
    missing && h("pre", {}, "featureflow atlas validate <folder>"),
    !whole && h("p", {}, h("a", { href: "#/" }, "To the overview")),
  );
}
