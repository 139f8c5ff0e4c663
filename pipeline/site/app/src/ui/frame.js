// The frame around every view: skip link, name, navigation, search box, theme, and the main region.

import { h, show } from "../dom.js";
import { compared, onChange, toggleCompared } from "../notes.js";
import { link, parseFeature } from "../route.js";

const PAGES = [
  ["overview", "Overview"],
  ["flow", "Flow"],
  ["trunks", "Trunks"],
  ["search", "Search"],
  ["compare", "Compare"],
  ["notes", "Notes"],
  ["about", "About"],
];
const THEMES = ["auto", "light", "dark"];

export function openFrame(root, atlas, live) {
  const main = h("main", { class: "page", id: "main", tabindex: -1 });
  const progress = h("div", { class: "progress", role: "status", "aria-live": "polite" });
  const links = new Map(pages(atlas, live)
    .map(([view, name]) => [view, h("a", { href: link(view === "overview" ? "" : view) }, name)]));
  const counter = h("span", { class: "counter" });
  links.get("compare").append(counter);
  const countCompared = () => show(counter, compared().length ? ` ${compared().length}` : null);
  countCompared();
  onChange(countCompared);
  const box = searchBox(atlas);
  show(
    root,
    h("a", { class: "skip", href: "#main", onclick: (event) => (event.preventDefault(),
      main.focus()) }, "Skip to content"),
    h(
      "header",
      { class: "top" },
      h("a", { class: "name", href: "#/" }, h("strong", {}, "Feature atlas"),
        h("span", { class: "quiet" }, atlas.model)),
      h("nav", { "aria-label": "Pages" }, [...links.values()]),
      box,
      themeButton(),
    ),
    progress,
    main,
  );
  addEventListener("keydown", (event) => shortcut(event, box));
  let shown = 0;
  return {
    busy: (is) => show(progress, is ? h("span", {}, "Reading …") : null),
    show({ title, node, wide }, route) {
      document.title = `${title} · ${atlas.model || "feature atlas"}`;
      for (const [view, anchor] of links) anchor.toggleAttribute("aria-current", false);
      links.get(route.view)?.setAttribute("aria-current", "page");
      main.classList.toggle("wide", Boolean(wide));
      show(main, node);
      if (shown) focusHeading(main);
      main.dataset.shown = ++shown;
    },
  };
}

function pages(atlas, live) {
  const more = [live && ["try", "Try a text"], (live?.tracing || atlas.traces.length > 0)
    && ["trace", "Traces"], atlas.lenses.length > 0 && ["lens", "Lenses"]];
  return [...PAGES.slice(0, 4), ...more.filter(Boolean), ...PAGES.slice(4)];
}

// A new page starts at its top, and a screen reader reads its heading; a page that focuses
// something itself is left alone.
function focusHeading(main) {
  scrollTo(0, 0);
  if (main.contains(document.activeElement)) return;
  const heading = main.querySelector("h1");
  if (!heading) return;
  heading.tabIndex = -1;
  heading.focus({ preventScroll: true });
}

function searchBox(atlas) {
  const input = h("input", { type: "search", name: "q", placeholder: "Label, token or L12/402",
    "aria-label": "Search labels and tokens, or go to a feature", autocomplete: "off",
    spellcheck: "false" });
  const go = (event) => {
    event.preventDefault();
    const text = input.value.trim();
    if (!text) return;
    const feature = parseFeature(text);
    location.hash = feature && atlas.key(feature) !== null ? link(text)
      : link("search", { q: text });
    input.blur();
  };
  return h("form", { class: "search-box", role: "search", onsubmit: go }, input);
}

function shortcut(event, box) {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") {
    event.preventDefault();
    box.querySelector("input").focus();
  }
  if (event.key === "c") {
    const feature = document.activeElement?.closest("[data-feature]")?.dataset.feature;
    if (feature) toggleCompared(feature);
    else location.hash = link("compare");
  }
}

function themeButton() {
  const root = document.documentElement;
  const stored = () => {
    try {
      return THEMES.includes(localStorage.getItem("featureflow:theme")) ? localStorage.getItem(
        "featureflow:theme") : "auto";
    } catch {
      return "auto";
    }
  };
  const button = h("button", { type: "button", class: "theme", onclick: () =>
    set(THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % 3]) });
  function set(theme) {
    root.dataset.theme = theme;
    const dark = theme === "dark"
      || (theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
    root.classList.toggle("dark", dark);
    show(button, h("span", { "aria-hidden": "true" }, { auto: "◐", light: "○", dark: "●" }[theme]));
    button.setAttribute("aria-label", `Colours: ${theme}`);
    button.title = `Colours: ${theme}`;
    try {
      localStorage.setItem("featureflow:theme", theme);
    } catch {
      // a browser that keeps nothing still changes colours for this visit
    }
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change",
    () => set(root.dataset.theme));
  set(stored());
  return button;
}
