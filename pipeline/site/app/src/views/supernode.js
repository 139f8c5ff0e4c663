// The chosen supernode of a trace: what it is called and promotes, what the model says without it,
// how much of it does how much, its members and examples, the heads that write it; live, what
// happens when it is changed.

import { h, show, svg } from "../dom.js";
import { clip, fixed, short } from "../format.js";
import { saveText } from "../figures/export.js";
import { canvasOf, line, linear, text, ticks, yAxis } from "../figures/plot.js";
import { edgeText } from "../figures/tracegraph.js";
import { stream } from "../live.js";
import { parseFeature } from "../route.js";
import { exampleList } from "../ui/examples.js";
import { featureLink, labelText } from "../ui/parts.js";
import { tokenChip, visible } from "../ui/tokens.js";

export async function supernodePanel({ atlas, live, trace, node }) {
  const ours = !trace.foreign && trace.options.through !== "transcoders";
  return [
    h("h2", {}, `S${node.id} `, labelText(node.name, 140)),
    h("p", { class: "quiet" }, `on token ${node.token} ${visible(trace.pieces[node.token])}, ` +
      `layers ${node.first_layer} to ${node.last_layer}`),
    node.label && node.label !== node.name && h("p", {}, labelText(node.label, 140)),
    node.promotes.length > 0 && h("p", { class: "chips" }, h("span", { class: "quiet" },
      "Promotes "), node.promotes.map((token) => tokenChip(token))),
    effects(trace, node),
    live?.tracing && ours && changeBox(trace, node),
    h("h3", {}, "Members"),
    members(ours && atlas, node),
    ours && await examples(atlas, node),
    heads(trace, node),
    neighbours(trace, node),
  ];
}

function effects(trace, node) {
  const fact = (name, value) => value !== null && h("div", {}, h("dt", {}, name),
    h("dd", {}, fixed(value)));
  const says = (top) => top.map(([token, p]) => `${visible(token)} ${fixed(p)}`).join(", ");
  return [
    h("dl", { class: "facts" }, fact("real effect", node.removed), fact("predicted",
      node.predicted), fact("random features", node.control), fact("KL", node.kl)),
    node.differs && h("p", { class: "warning" }, "≠ The gradient predicted something else: trust " +
      "the removal."),
    node.breaks && h("p", { class: "warning" }, "✕ Without it neither answer nor foil is likely: " +
      "this is damage, no mechanism."),
    node.top.length > 0 && h("p", {}, h("span", { class: "quiet" }, "Without it: "),
      says(node.top)),
    node.doses.length > 1 && h("figure", { class: "figure" }, doseChart(trace, node),
      h("figcaption", {}, "What is explained (y) when the supernode is set to a multiple of its " +
        "value: real (line) and predicted (dashed).")),
  ];
}

function doseChart(trace, node) {
  const [width, height] = [290, 150];
  const last = Math.max(...node.doses.map(([dose]) => dose));
  const guess = (dose) => trace.y + (dose - 1) * node.predicted;
  const values = [...node.doses.map(([, y]) => y), guess(0), guess(last), 0];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const x = linear(0, last, 44, width - 10);
  const y = linear(low, high, height - 24, 8);
  const said = node.doses.map(([dose, value]) => `${dose}: ${fixed(value)}`).join(", ");
  return canvasOf(width, height, `y by factor, real ${said}; predicted ${fixed(guess(0))} at 0`,
    yAxis(y, ticks(low, high, 4), { left: 40, right: width - 10, format: short }),
    svg("g", { class: "series0" }, line(node.doses.map(([dose, value]) => [x(dose), y(value)]),
      "effect-line"), node.doses.map(([dose, value]) => svg("circle", { cx: x(dose), cy: y(value),
      r: 3, class: "community-bar" }))), svg("g", { "stroke-dasharray": "5 4", class: "series1" },
    line([[x(0), y(guess(0))], [x(last), y(guess(last))]], "effect-line")),
    ticks(0, last, 4).map((dose) => text(x(dose), height - 6, `×${dose}`,
      { anchor: "middle" })));
}

function members(atlas, node) {
  const name = (id) => {
    const feature = parseFeature(id);
    return atlas && feature && atlas.key(feature) !== null ? featureLink(id) : visible(id);
  };
  return h("ul", { class: "link-lines" }, node.members.map(({ feature, z, score }) => h("li", {},
    name(feature), h("span", { class: "quiet" }, [z !== null && ` active at ${short(z)}`,
      score !== null && `score ${fixed(score)}`].filter(Boolean).join(", ")))));
}

async function examples(atlas, node) {
  const peak = node.members.find(({ feature }) => feature.startsWith(`${node.peak}/`));
  const key = peak ? atlas.key(parseFeature(peak.feature)) : null;
  if (key === null) return null;
  const [vocabulary, card] = await Promise.all([atlas.vocabulary(), atlas.card(key)]);
  const top = card.examples.filter((example) => example.tab === "top").slice(0, 3);
  return top.length > 0 && [h("h3", {}, `Examples of ${peak.feature}`), await exampleList(atlas,
    vocabulary, card, top, { width: 14, newlines: false, compact: true })];
}

function heads(trace, node) {
  if (!node.heads.length) return null;
  const { heads: all, mlps } = node.heads[0];
  const from = ({ source }) => (source < 0 ? "" : ` from ${visible(trace.pieces[source])}`);
  return [h("h3", {}, "Heads that write it"), h("p", { class: "quiet" },
    `Of its strength at ${node.peak} all heads write ${fixed(all)}, all MLPs ${fixed(mlps)} ` +
      "directly."), h("ul", { class: "link-lines" }, node.heads.map((head) => h("li", {},
    `L${head.layer} head ${head.head}${from(head)} `, h("span", { class: "quiet" },
      fixed(head.part)))))];
}

function neighbours(trace, node) {
  const own = trace.edges.filter(({ source, target }) => source === node.id || target === node.id)
    .slice(0, 8);
  const name = (id) => clip(visible(trace.supernodes.find((each) => each.id === id)?.name ?? ""),
    40);
  return own.length > 0 && [h("h3", {}, "Writes into and is written by"), h("ul",
    { class: "link-lines" }, own.map((edge) => h("li", {}, edge.target === node.id
    ? `from S${edge.source} ${name(edge.source)}` : `to S${edge.target} ${name(edge.target)}`,
  h("span", { class: "quiet" }, ` ${edgeText(edge)}`))))];
}

// Live: set the supernode to a multiple of its value, or to its value in another prompt.
function changeBox(trace, node) {
  const status = h("p", { class: "quiet", role: "status" });
  const result = h("div", {});
  const other = h("input", { type: "text", "aria-label": "Another prompt",
    placeholder: "another prompt", maxlength: 4000 });
  const base = { prompt: trace.prompt, chat: trace.chat, token: node.token,
    features: node.members.map(({ feature }) => feature) };
  const ask = async (path, body, take) => {
    show(status, "Waiting for the model …");
    try {
      await stream(path, { ...base, ...body }, take);
      show(status);
    } catch (error) {
      show(status, visible(error.message));
    }
  };
  const change = (body) => ask("trace/edit", body, (record) => record.changed
    && show(result, changed(record.changed)));
  const button = (name, act) => h("button", { type: "button", class: "action", onclick: act },
    name);
  const plan = () => ask("trace/plan", { factor: 0 }, (record) => record.plan
    && saveText(`S${node.id}-plan.json`, record.plan, "application/json"));
  return h("section", { class: "live change" }, h("h3", {}, "Change it"), h("div",
    { class: "actions" }, button("Remove", () => change({ factor: 0 })), button("Half", () =>
    change({ factor: 0.5 })), button("Double", () => change({ factor: 2 })), button("Save plan",
    plan)), h("div", { class: "actions" }, other, button("Value from it", () =>
    change({ other: other.value }))), status, result);
}

function changed({ before, after, kl, text: said }) {
  const top = (list) => list.map(([token, p]) => `${visible(token)} ${fixed(p)}`).join(", ");
  return [h("p", {}, h("span", { class: "quiet" }, "Before: "), top(before)), h("p", {},
    h("span", { class: "quiet" }, "Then: "), top(after)), h("p", { class: "quiet" },
    `KL ${fixed(kl)}`), h("blockquote", { dir: "auto" }, visible(said))];
}
