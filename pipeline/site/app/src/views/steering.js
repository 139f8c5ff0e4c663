// What the model wrote when steered with this feature, beside what it writes without; and the
// command to do it.

import { h, show, svg } from "../dom.js";
import { fixed, short } from "../format.js";
import { figure } from "../figures/export.js";
import { canvasOf, line, linear, responsive, text, ticks, yAxis } from "../figures/plot.js";
import { cancel, stream } from "../live.js";
import { choice, copyButton } from "../ui/parts.js";
import { visible } from "../ui/tokens.js";

const MEASURES = { activation: "activation, of a typical strong one",
  nll: "surprise to the unsteered model, nats a token", coherent: "share of coherent texts" };

export function steeringSection(view) {
  const { steering, id } = view;
  const samples = (steering.samples ?? []).filter((sample) => sample.feature === id
    || sample.features?.includes(id));
  const effects = (steering.effects ?? []).filter((effect) => effect.feature === id);
  const canSteer = view.site.kind === "resid_post" && view.card.count > 0;
  const command = steering.commands?.[id] ?? `featureflow steer --steer.features '["${id}"]'`;
  return h(
    "section",
    { class: "steering" },
    h("h2", {}, "Steering"),
    effects.length > 0 && effectFigure(effects, id),
    samples.length > 0 ? sampleViewer(samples) : h("p", { class: "quiet" }, canSteer
      ? "No samples were made with this feature. This makes some:"
      : "The steer stage takes features of the residual stream that fire."),
    view.live?.steering && liveBox(view),
    canSteer && h("div", { class: "command" }, h("pre", { tabindex: 0 }, command),
      copyButton(command, "Copy command")),
  );
}

// Doses are measured, so every way has its own: one choice for both.
function sampleViewer(samples) {
  const name = ({ arm, dose }) => `${arm}, ${short(dose)} nats`;
  const order = (a, b) => (a.arm < b.arm ? -1 : a.arm > b.arm ? 1 : a.dose - b.dose);
  const kinds = [...new Map(samples.slice().sort(order).map((sample) => [name(sample), sample]))
    .keys()];
  const first = kinds.findLast((kind) => /^flow( additive)?,/.test(kind)) ?? kinds[0];
  const list = h("div", {});
  const draw = (kind) => show(list, samples.filter((sample) => name(sample) === kind).map(pair));
  draw(first);
  return h("div", {}, h("div", { class: "controls" }, choice({ label: "Way and dose", value: first,
    options: kinds.map((kind) => [kind, kind]), onchange: draw })), list);
}

function pair(sample) {
  const side = (name, body, value) => h("div", { class: "side" }, h("h3", { class: "minor" }, name,
    value !== undefined && h("span", { class: "quiet" },
    ` ${sample.measure.name}: ${short(value)}`)), h("blockquote", { dir: "auto" },
    h("span", { class: "quiet" }, visible(sample.prompt)), h("span", {}, visible(body))));
  return h("div", { class: "sample" }, side("unsteered", sample.unsteered,
    sample.measure?.unsteered), side("steered", sample.steered, sample.measure?.steered));
}

function effectFigure(effects, id) {
  const names = [...new Set(effects.map((effect) => effect.name))];
  return names.map((name) => {
    const rows = effects.filter((effect) => effect.name === name);
    return figure({ name: `steering-${id.replace("/", "-")}`,
      title: `${MEASURES[name] ?? name}, by dose`, drawing: effectPlot(rows, name),
      caption: "Change against unsteered text at the same prompts and seeds; bars are 95 % " +
        "intervals.", rows: () => ({ head: ["way", "dose (nats)", "mean", "low", "high", "n"],
        rows: rows.map((row) => [row.arm, row.dose, row.mean, row.low, row.high, row.n]) }) });
  });
}

function effectPlot(rows, name) {
  const arms = [...new Set(rows.map((row) => row.arm))];
  const legend = h("ul", { class: "legend" }, arms.map((arm, i) => h("li", { class: `series${i}` },
    h("span", { class: "swatch community-bar", "aria-hidden": "true" }), arm)));
  const plot = responsive(
    (width) => {
      const height = 200;
      const values = rows.flatMap((row) => [row.low, row.high, 0]).filter(Number.isFinite);
      const doses = [...new Set(rows.map((row) => row.dose))].sort((a, b) => a - b);
      const [left, right, top, bottom] = [44, width - 10, 8, height - 34];
      const x = linear(0, doses.at(-1), left + 8, right - 8);
      const y = linear(Math.min(...values), Math.max(...values), bottom, top);
      const series = arms.map((arm, i) => {
        const own = rows.filter((row) => row.arm === arm).sort((a, b) => a.dose - b.dose);
        const at = (row) => x(row.dose) + 3 * (i - (arms.length - 1) / 2);
          // ways of the same dose stand beside one another
        const bars = own.map((row) =>
          [svg("line", { x1: at(row), x2: at(row), y1: y(row.low), y2: y(row.high),
          class: "effect-line" }), svg("circle", { cx: at(row), cy: y(row.mean), r: 3.2,
          class: "community-bar" },
          svg("title", {},
          `${arm}, ${short(row.dose)} nats: ${fixed(row.mean)} (${fixed(row.low)} to ` +
            `${fixed(row.high)}), n ${row.n}`))]);
        return svg("g", { class: `effect series${i}` },
          line(own.map((row) => [at(row), y(row.mean)]), "effect-line"), bars);
      });
      return canvasOf(width, height, `${name} by dose`,
        yAxis(y, ticks(Math.min(...values), Math.max(...values), 4),
        { left, right, format: short }), svg("line", { x1: left, x2: right, y1: y(0), y2: y(0),
        class: "axis" }), series, ticks(0, doses.at(-1), 5).map((dose) => text(x(dose), bottom + 16,
        short(dose), { anchor: "middle" })), text((left + right) / 2, height - 4,
        "dose (nats of KL on neutral text)", { anchor: "middle" }));
    },
    { label: name },
  );
  return h("div", { class: "effect-box" }, legend, plot);
}

// Live: unsteered and steered samples side by side as the server writes them.
function liveBox(view) {
  const prompt = h("input", { type: "text", value: "I went to the", maxlength: 500,
    "aria-label": "Prompt" });
  const dose = h("input", { type: "number", value: "0.2", min: "0", max: "5", step: "0.05",
    "aria-label": "Dose in nats" });
  const out = { unsteered: h("blockquote", {}), steered: h("blockquote", {}) };
  const status = h("p", { role: "status", class: "quiet" });
  const run = async (event) => {
    event.preventDefault();
    const texts = { unsteered: [], steered: [] };
    let done = false;
    const take = (record) => {
      if (record.status) show(status,
        `${record.status[0].toUpperCase()}${record.status.slice(1)} …`);
      done ||= Boolean(record.done);
      if (!texts[record.arm]) return;
      show(status, "Writing …");
      texts[record.arm][record.sample ?? 0] = record.text;
      show(out[record.arm], texts[record.arm].map((text) => h("p", {}, visible(text))));
    };
    show(status, "Waiting for the model …");
    for (const place of Object.values(out)) show(place);
    try {
      const features = (await view.flow.chain(view.key)).features.map((key) => view.atlas.id(key));
      await stream("steer", { features: features.length ? features : [view.id],
        prompt: prompt.value, dose: Number(dose.value), n_samples: 1, n_new_tokens: 60, seed: 0 },
        take);
      show(status, done ? "" : "Stopped.");
    } catch (error) {
      show(status, error.message);
    }
  };
  const stop = () => (show(status, "Stopping …"), cancel());
  return h("form", { class: "live", onsubmit: run }, h("div", { class: "controls" }, prompt, dose,
    h("button", { class: "action primary" }, "Steer"),
    h("button", { type: "button", class: "action", onclick: stop }, "Stop")), status,
    h("div", { class: "sample" }, h("div", { class: "side" }, h("h3", { class: "minor" },
    "unsteered"), out.unsteered), h("div", { class: "side" }, h("h3", { class: "minor" },
    "steered"), out.steered)));
}
