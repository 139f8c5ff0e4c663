// Why the model says this, here: one traced prompt. `#/trace` lists the traces that were kept and,
// with the live server, traces what is typed; `#/trace/<name>` shows one.

import { h, show } from "../dom.js";
import { clip, fixed, percent, short } from "../format.js";
import { figure, plainTable, saveText } from "../figures/export.js";
import { responsive } from "../figures/plot.js";
import { barText, traceGraph } from "../figures/tracegraph.js";
import { cancel, stream } from "../live.js";
import { link } from "../route.js";
import { empty, slider } from "../ui/parts.js";
import { visible } from "../ui/tokens.js";
import { supernodePanel } from "./supernode.js";

export async function trace(context) {
  const { atlas, argument, live, options } = context;
  if (!argument) {
    return { title: "Traces", node: contents(context), wide: Boolean(live?.tracing) };
  }
  if (!atlas.traces.some(({ name }) => name === argument)) {
    throw new Error(`There is no trace “${argument.slice(0, 200)}” in this atlas.`);
  }
  const document = await atlas.trace(argument);
  const node = h("div", {}, h("nav", { class: "crumbs" }, h("a", { href: link("trace") },
    "← all traces")), traceView({ atlas, live, document, name: argument, n: options.get("n") }));
  return { title: `Trace: ${clip(visible(document.prompt), 60)}`, node, wide: true };
}

function contents({ atlas, live }) {
  const row = ({ name, prompt, headline }) => [h("a", { href: link(`trace/${name}`) },
    clip(visible(prompt), 120)), visible(headline)];
  return h("div", {}, h("h1", {}, "Traces"), h("p", { class: "lead" },
    "Why the model goes on as it does after a prompt: which features on which tokens, each really " +
      "removed."), live?.tracing ? liveForm(atlas, live) : h("pre", { tabindex: 0 },
    "featureflow trace \"The capital of France is\""), atlas.traces.length > 0
    ? plainTable({ head: ["prompt", "what is explained (y: difference of the logits)"],
      rows: atlas.traces.map(row) }, "Traces")
    : empty("No trace was kept with this atlas.", "Trace a prompt, then run featureflow atlas."));
}

// The page draws every record that holds a trace: predictions first, then removals, then the rest.
function liveForm(atlas, live) {
  const limit = live.limits?.max_tokens ?? 256;
  const prompt = h("textarea", { rows: 2, maxlength: 4000, "aria-label": "Prompt",
    placeholder: `a text that the model goes on with, at most ${limit} tokens` });
  const answer = h("input", { type: "text", "aria-label": "Answer", size: 12 });
  const foil = h("input", { type: "text", "aria-label": "Foil", size: 12 });
  const status = h("p", { class: "quiet", role: "status" });
  const place = h("div", { class: "live-trace" });
  const run = async (event) => {
    event.preventDefault();
    let done = false;
    show(place);
    show(status, "Waiting for the model …");
    const take = (record) => {
      if (record.status) show(status, `${record.status} …`);
      if (record.trace) show(place, traceView({ atlas, live, document: record.trace }));
      done ||= Boolean(record.done);
    };
    try {
      const given = { answer: answer.value, foil: foil.value };
      await stream("trace", { prompt: prompt.value,
        ...Object.fromEntries(Object.entries(given).filter(([, text]) => text)) }, take);
      show(status, done ? "" : "Stopped.");
    } catch (error) {
      show(status, visible(error.message));
    }
  };
  return h("form", { class: "try", onsubmit: run }, prompt, h("div", { class: "controls" },
    h("label", {}, "answer ", answer), h("label", {}, "against ", foil),
    h("button", { class: "action primary" }, "Trace"),
    h("button", { type: "button", class: "action", onclick: cancel }, "Stop")), status, place);
}

function traceView({ atlas, live, document: trace, name = "trace", n }) {
  const most = trace.supernodes.length;
  const state = { n: Math.min(Number(n) || trace.options.n_shown, most), chosen: null };
  const panel = h("aside", { class: "graph-panel", "aria-label": "Chosen supernode",
    "aria-live": "polite" });
  let drawn = null;
  const choose = async (id) => {
    state.chosen = id;
    drawn?.mark(id);
    const node = trace.supernodes.find((each) => each.id === id);
    const content = await supernodePanel({ atlas, live, trace, node });
    if (state.chosen === id) show(panel, content);
  };
  const picture = responsive((width) => {
    drawn = traceGraph(trace, { width, n: state.n, chosen: state.chosen, onchoose: choose });
    return drawn.node;
  }, { label: "Trace" });
  const stage = h("div", {}, legend(trace), h("div", { class: "graph-stage" }, picture));
  const controls = h("div", { class: "controls" }, most > 1 && slider({ label: "supernodes",
    min: 1, max: most, value: state.n, oninput: (value) => {
      state.n = value;
      picture.redraw();
    } }), h("button", { type: "button", class: "action", onclick: () =>
    saveText(`${name}.json`, JSON.stringify(trace, null, 1), "application/json") }, "Save JSON"));
  if (most) choose(trace.supernodes[0].id);
  const shown = h("div", {}, figure({ name, drawing: stage, caption: CAPTION, rows: () =>
    supernodeRows(trace) }), flip(trace), h("h2", {}, "All supernodes"),
  plainTable(supernodeRows(trace, choose), "Supernodes, strongest first"), checks(trace));
  return h("div", { class: "trace-page" }, heading(trace), controls,
    h("div", { class: "graph-columns" }, shown, panel));
}

const CAPTION = "Columns are tokens, rows layers; a bar is a supernode, as wide as the number " +
  "that is explained changes when it is really removed. Hatched and ≠: prediction and removal " +
  "differ by more than half. ✕: without it neither answer nor foil is likely, so its effect is " +
  "damage and no mechanism. Lines: what changes in one when the other is removed; dashed: on " +
  "another token. Grey cells: what no feature explains.";

function heading(trace) {
  const { answer, foil, feature, token, text } = trace.target;
  const said = answer ? [" → ", h("strong", {}, visible(answer.text)),
    ` ${fixed(answer.probability)} against `, h("strong", {}, visible(foil.text)),
    ` ${short(foil.probability)}`] : feature ? [` → ${feature} on token ${token}`]
    : [` → ${visible(text ?? "")}`];
  const share = trace.share_removed === null ? "" : ` of ${trace.n_groups} groups, ` +
    `${percent(trace.share_removed)} of their weight`;
  return h("div", { class: "feature-head" }, h("h1", {}, "Trace"), h("p", { class: "trace-prompt" },
    trace.pieces.map((piece) => h("span", { class: "token-chip" }, visible(piece))), said),
  h("p", { class: "facts-line" }, h("span", {}, trace.y === null ? `read from ` +
    visible(String(trace.foreign)) : `y = ${fixed(trace.y)}`), h("span", {},
    `${trace.supernodes.length} supernodes${share}`)), trace.top.length > 0
    && h("p", { class: "quiet" }, "goes on with ", trace.top.map(([token, p]) =>
      `${visible(token)} ${fixed(p)}`).join(", ")));
}

function flip({ flip: found, target }) {
  if (!found) return null;
  const done = found.supernodes.map((id, i) => `${found.factors[i] ? "with twice" : "without"} ` +
    `S${id}`).join(", ");
  return h("section", {}, h("h2", {}, "The smallest change found"), h("p", {}, `${done}: the ` +
    `model ${found.flips ? "says" : "still does not say"} ${visible(target.foil.text)} ` +
    `(${fixed(found.p_foil)}, answer ${fixed(found.p_answer)}).`), h("p", { class: "quiet" },
    `${found.n_tried} sets were tried. KL on the rest of the prompt: ${fixed(found.kl_rest)}, ` +
      `largest ${fixed(found.kl_rest_largest)}. As many random features do it in ` +
      `${percent(found.random_flips)} of draws.`));
}

function legend(trace) {
  const items = [["swatch helps", "for the answer"], ["swatch hurts", "against it"]];
  if (trace.supernodes.some((node) => node.differs)) items.push(["swatch differs", "≠ predicted"]);
  return h("ul", { class: "legend" }, items.map(([name, text]) => h("li", {},
    h("span", { class: name, "aria-hidden": "true" }), text)));
}

function supernodeRows(trace, onchoose) {
  const number = (value) => (value === null || value === undefined ? "–" : fixed(value));
  const name = (node) => (onchoose ? h("button", { type: "button", class: "action small",
    "aria-label": `Show ${barText(trace, node)}`, onclick: () => onchoose(node.id) },
  `S${node.id}`) : `S${node.id}`);
  return { head: ["supernode", "name", "token", "layers", "real effect", "predicted", "random", "KL",
    "says then", "remarks"], rows: trace.supernodes.map((node) => [name(node),
    visible(clip(node.name, 120)), `${node.token} ${visible(trace.pieces[node.token])}`,
    `L${node.first_layer}–L${node.last_layer}`, number(node.removed), number(node.predicted),
    number(node.control), number(node.kl), node.top.slice(0, 2).map(([text, p]) =>
      `${visible(text)} ${fixed(p)}`).join(", "), [node.differs && "≠ predicted",
      node.breaks && "breaks the text"].filter(Boolean).join(", ")]) };
}

function checks(trace) {
  if (!trace.checks.length) return null;
  const rows = trace.checks.map(({ check, value, note }) => [check, value === null ? "–"
    : short(value), note]);
  return h("section", {}, h("h2", {}, "Checks of this trace"), h("p", { class: "quiet" },
    "Kept at all cuts together, no set of features brings the answer back: a trace says what is " +
      "necessary and how much, not that it is the whole computation."),
  plainTable({ head: ["check", "value", "meaning"], rows }, "Checks"));
}
