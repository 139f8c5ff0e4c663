// A focus graph as a table of links and as a JSON document.

import { fixed, qValue } from "../format.js";
import { RELATION_NAMES } from "../ui/parts.js";
import { visible } from "../ui/tokens.js";

const digits = (x, n = 4) => (Number.isFinite(x) ? Number(x.toFixed(n)) : "");

export function edgeRows({ atlas, nodes, edges }) {
  const label = new Map(nodes.map((node) => [node.key, visible(node.label.slice(0, 200))]));
  return {
    head: ["from", "label", "to", "label", "relation", "cosine", "strength", "q", "Pearson",
      "Jaccard", "mutual", "gradient", "silenced", "trials"],
    rows: edges.map((edge) => [atlas.id(edge.source), label.get(edge.source), atlas.id(edge.target),
      label.get(edge.target), RELATION_NAMES[edge.relation], digits(edge.cosine),
      digits(edge.strength), Number.isFinite(edge.q) ? qValue(edge.q) : "", digits(edge.pearson),
      digits(edge.jaccard), edge.mutual ? "yes" : "no", digits(edge.effect),
      digits(edge.success, 3),
      Number.isFinite(edge.success) ? edge.trials : ""]),
  };
}

export function graphDocument({ atlas, focus, nodes, edges }) {
  return {
    kind: "featureflow-focus-graph",
    schema: 1,
    model: atlas.model,
    focus: atlas.id(focus),
    nodes: nodes.map((node) => ({ feature: node.id, label: node.label, class: node.class,
      density: digits(node.density, 8), links_not_shown: node.hiddenIn + node.hiddenOut })),
    links: edges.map((edge) => ({ source: atlas.id(edge.source), target: atlas.id(edge.target),
      relation: atlas.manifest.relations[edge.relation], cosine: digits(edge.cosine),
      strength: digits(edge.strength), q: Number.isFinite(edge.q) ? edge.q : null,
      mutual: edge.mutual, gradient_effect: Number.isFinite(edge.effect) ? edge.effect : null,
      causal_success: Number.isFinite(edge.success) ? edge.success : null })),
  };
}

/** A link in words, for tooltips and screen readers. */
export function edgeText(edge) {
  const parts = [`cosine ${fixed(edge.cosine)}`, `strength ${fixed(edge.strength)}`,
    `q ${qValue(edge.q)}`, edge.mutual ? "mutual" : "one way"];
  if (Number.isFinite(edge.pearson)) parts.push(`Pearson ${fixed(edge.pearson)}`);
  if (Number.isFinite(edge.effect)) parts.push(`gradient effect ${fixed(edge.effect)}`);
  if (Number.isFinite(edge.success)) parts.push(
    `removing the source silenced the target in ${Math.round(100 * edge.success)} % of ` +
      `${edge.trials} trials`);
  return parts.join(", ");
}
