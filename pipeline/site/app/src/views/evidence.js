// The examples of a card in tabs, with a width slider and a switch for line breaks.

import { h } from "../dom.js";
import { remember } from "../route.js";
import { exampleItem, readExample } from "../ui/examples.js";
import { checkbox, empty, slider, tabs } from "../ui/parts.js";
import { shadeKey } from "../ui/tokens.js";

const TABS = {
  top: ["Top", "The largest activations, at most one per document."],
  decile: ["By decile",
    "From each tenth of the firings, strongest first: how the meaning holds as the activation " +
      "falls."],
  uniform: ["Uniform", "Firings drawn at random: what it does most of the time."],
  near_miss: ["Near misses", "It almost fired: the largest values below its threshold."],
};
const FIRST = 12;

export function examplesSection(view) {
  const { atlas, card, options } = view;
  const present = atlas.manifest.example_tabs.filter((name) => card.examples.some((example) =>
    example.tab === name));
  const state = { width: Number(options.get("w")) || 28, newlines: options.get("nl") === "1",
    items: [] };
  const items = present.map((name) => ({ id: name, name: TABS[name]?.[0] ?? name, draw: () =>
    panel(view, name, state) }));
  if (!items.length) return h("section", {}, h("h2", {}, "Examples"),
    empty("No example was kept."));
  const redraw = () => state.items.forEach((draw) => draw());
  return h(
    "section",
    { class: "examples-section" },
    h("div", { class: "figure-head" }, h("h2", {}, "Examples"), h("span", { class: "controls" },
      slider({ label: "width", min: 8, max: 96, step: 4, value: state.width, format: (x) =>
      `${x} tokens`, oninput: (width) => ((state.width = width),
      remember({ w: width === 28 ? "" : width }), redraw()) }),
      checkbox({ label: "line breaks", checked: state.newlines, onchange: (newlines) =>
      ((state.newlines = newlines), remember({ nl: newlines ? "1" : "" }), redraw()) }),
      shadeKey(card.max))),
    tabs({ items, label: "Kinds of examples", chosen: options.get("tab"), onchoose: (id) =>
      remember({ tab: id === "top" ? "" : id }) }),
  );
}

function panel(view, name, state) {
  const all = view.card.examples.filter((example) => example.tab === name);
  const list = h("ul", { class: "examples" });
  const more = h("button", { type: "button", class: "action", onclick: () =>
    (more.remove(), add(all.slice(FIRST))) }, `Show ${all.length - FIRST} more`);
  state.items = [];
  add(all.slice(0, FIRST));
  return h("div", {}, TABS[name] && h("p", { class: "quiet small" }, TABS[name][1]), list,
    all.length > FIRST && more);

  function add(examples) {
    let decile = null;
    for (const example of examples) {
      if (name === "decile" && example.decile !== decile) {
        decile = example.decile;
        list.append(h("li", { class: "decile-head quiet" },
          `${10 * decile}–${10 * decile + 10} % of activations`));
      }
      const place = h("li", { class: "example" }, h("span", { class: "quiet" }, "…"));
      list.append(place);
      draw(place, example);
    }
  }

  async function draw(place, example) {
    const read = await readExample(view.atlas, view.vocabulary, view.card, example)
      .catch((error) => error);
    let at = place;
    const fill = () => {
      const item = read instanceof Error ? h("li", { class: "example warning" }, read.message)
        : exampleItem(example, read, { card: view.card, width: state.width,
        newlines: state.newlines });
      at.replaceWith(item);
      at = item;
    };
    fill();
    state.items.push(fill);
  }
}
