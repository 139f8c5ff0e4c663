// Where this atlas comes from: model, corpus and filters, digests, versions, licences; what the
// words mean.

import { h } from "../dom.js";
import { count } from "../format.js";
import { CLASS_ABOUT, CLASS_NAMES } from "../ui/parts.js";

export async function about({ atlas }) {
  const { manifest } = atlas;
  const { corpus } = manifest;
  const node = h(
    "div",
    { class: "prose" },
    h("h1", {}, "About this atlas"),
    section("Model", { name: manifest.model.name, fingerprint: manifest.model.fingerprint,
      layers: manifest.model.n_layers, "width of the residual stream": manifest.model.d_model,
      vocabulary: count(manifest.model.d_vocab), context: manifest.model.n_context }),
    section("Corpus", { documents: count(corpus.n_documents),
      "tokens stored": count(corpus.n_tokens), "tokens counted": count(corpus.n_tokens_seen),
      "left out": list(corpus.n_dropped), filters: list(corpus.filters),
      sources: (corpus.sources ?? []).map((item) => `${item.name} (${count(item.n_tokens)})`)
      .join(", "), "share of documents kept for scoring labels": corpus.holdout }),
    section("Made from", Object.fromEntries(Object.entries(manifest.provenance ?? {})
      .map(([name, value]) => [name, value && typeof value === "object" ? JSON.stringify(value)
      : value]))),
    section("Profile", { profile: manifest.profile,
      "examples around an activation": `± ${manifest.window ?? 24} tokens`,
      "cards per file": manifest.cards_per_shard }),
    h("h2", {}, "Labels"),
    h("p", {}, "Every label was scored on documents that were not used to make it. An interval " +
      "is 95 %. “No simple rule” means that no rule reached the accepted score: it is an answer, " +
      "not a gap."),
    h("dl", { class: "wide-facts" }, (manifest.label_methods ?? [])
      .map((method) =>
      h("div", {}, h("dt", {}, `${method.name.replaceAll("_", " ")} (${method.kind})`),
      h("dd", {}, method.about)))),
    h("h2", {}, "Classes of features"),
    h("dl", { class: "wide-facts" }, Object.entries(CLASS_ABOUT).map(([name, meaning]) =>
      h("div", {}, h("dt", {}, CLASS_NAMES[name]), h("dd", {}, meaning)))),
    h("h2", {}, "Keys"),
    h("dl", { class: "wide-facts" },
      [["/", "search"],
      ["c", "on a feature: into the compare tray, or out of it; elsewhere: to the tray"],
      ["← → ↑ ↓", "walk a flow graph, a matrix, tabs or a table"],
      ["Enter", "open the card of the chosen feature"],
      ["+", "show more links of the chosen feature"]].map(([key, meaning]) =>
      h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, meaning)))),
    (manifest.licences ?? []).length > 0 && [h("h2", {}, "Licences"),
      h("ul", {}, manifest.licences.map((text) => h("li", {}, text)))],
  );
  return { title: "About", node };
}

function section(title, facts) {
  const known = Object.entries(facts).filter(([, value]) => value !== undefined && value !== null
    && value !== "");
  return [h("h2", {}, title), h("dl", { class: "wide-facts" }, known.map(([name, value]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))))];
}

const list = (object) => Object.entries(object ?? {}).map(([name, value]) =>
  (value === true ? name.replaceAll("_", " ") : !value ? null
  : `${name.replaceAll("_", " ")} ${value}`)).filter(Boolean).join(", ");
