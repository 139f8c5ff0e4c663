// What the model wrote when steered with this feature, beside what it writes without; and the command to do it.

import { h, show, svg } from "../dom.js";
import { fixed, short } from "../format.js";
import { figure } from "../figures/export.js";
import { canvasOf, line, linear, responsive, text, ticks, yAxis } from "../figures/plot.js";
import { cancel, stream } from "../live.js";
import { choice, copyButton } from "../ui/parts.js";
import { visible } from "../ui/tokens.js";

export function steeringSection(view) {
  const { steering, id } = view;
  const samples = (steering.samples ?? []).filter((sample) => sample.feature === id || sample.features?.includes(id));
  const effects = (steering.effects ?? []).filter((effect) => effect.feature === id);
  const command = steering.commands?.[id] ?? `featureflow steer --features ${id}`;
  return h(
    "section",
    { class: "steering" },
    h("h2", {}, "Steering"),
    effects.length > 0 && effectFigure(effects, id),
    samples.length > 0 ? sampleViewer(samples) : h("p", { class: "quiet" }, "No samples were made with this feature. This makes some:"),
    view.live?.steering && liveBox(view),
    h("div", { class: "command" }, h("pre", { tabindex: 0 }, command), copyButton(command, "Copy command")),
  );
}

function sampleViewer(samples) {
  const arms = [...new Set(samples.map((sample) => sample.arm))];
  const doses = [...new Set(samples.map((sample) => sample.dose))].sort((a, b) => a - b);
  const state = { arm: arms.includes("flow additive") ? "flow additive" : arms[0], dose: String(doses.at(-1)) };
  const list = h("div", {});
  const draw = () => {
    const shown = samples.filter((sample) => sample.arm === state.arm && String(sample.dose) === state.dose);
    show(list, shown.length ? shown.map(pair) : h("p", { class: "quiet" }, "No sample with this arm at this dose."));
  };
  draw();
  return h("div", {}, h("div", { class: "controls" }, choice({ label: "Way", value: state.arm, options: arms.map((arm) => [arm, arm]), onchange: (arm) => ((state.arm = arm), draw()) }), choice({ label: "Dose", value: state.dose, options: doses.map((dose) => [String(dose), `${short(dose)} nats`]), onchange: (dose) => ((state.dose = dose), draw()) })), list);
}

function pair(sample) {
  const side = (name, body, value) => h("div", { class: "side" }, h("h3", { class: "minor" }, name, value !== undefined && h("span", { class: "quiet" }, ` ${sample.measure.name}: ${short(value)}`)), h("blockquote", { dir: "auto" }, h("span", { class: "quiet" }, visible(sample.prompt)), h("span", {}, visible(body))));
  return h("div", { class: "sample" }, side("unsteered", sample.unsteered, sample.measure?.unsteered), side("steered", sample.steered, sample.measure?.steered));
}

function effectFigure(effects, id) {
  const names = [...new Set(effects.map((effect) => effect.name))];
  return names.map((name) => {
    const rows = effects.filter((effect) => effect.name === name);
    return figure({ name: `steering-${id.replace("/", "-")}`, title: `${name}, by dose`, drawing: effectPlot(rows, name), caption: "Change against unsteered text at the same prompts and seeds; bars are 95 % intervals.", rows: () => ({ head: ["way", "dose (nats)", "mean", "low", "high", "n"], rows: rows.map((row) => [row.arm, row.dose, row.mean, row.low, row.high, row.n]) }) });
  });
}

function effectPlot(rows, name) {
  const arms = [...new Set(rows.map((row) => row.arm))];
  const legend = h("ul", { class: "legend" }, arms.map((arm, i) => h("li", { class: `series${i}` }, h("span", { class: "swatch community-bar", "aria-hidden": "true" }), arm)));
  const plot = responsive(
    (width) => {
      const height = 200;
      const values = rows.flatMap((row) => [row.low, row.high, 0]).filter(Number.isFinite);
      const doses = [...new Set(rows.map((row) => row.dose))].sort((a, b) => a - b);
      const [left, right, top, bottom] = [44, width - 10, 8, height - 34];
      const x = linear(0, Math.max(1, doses.length - 1), left + 24, right - 24);
      const y = linear(Math.min(...values), Math.max(...values), bottom, top);
      const series = arms.map((arm, i) => {
        const own = doses.map((dose, d) => [d, rows.find((row) => row.arm === arm && row.dose === dose)]).filter(([, row]) => row);
        const shift = (i - (arms.length - 1) / 2) * Math.min(7, 40 / arms.length);
        return svg("g", { class: `effect series${i}` }, line(own.map(([d, row]) => [x(d) + shift, y(row.mean)]), "effect-line"), own.map(([d, row]) => [svg("line", { x1: x(d) + shift, x2: x(d) + shift, y1: y(row.low), y2: y(row.high), class: "effect-line" }), svg("circle", { cx: x(d) + shift, cy: y(row.mean), r: 3.2, class: "community-bar" }, svg("title", {}, `${arm}, ${short(row.dose)} nats: ${fixed(row.mean)} (${fixed(row.low)} to ${fixed(row.high)}), n ${row.n}`))]));
      });
      return canvasOf(width, height, `${name} by dose`, yAxis(y, ticks(Math.min(...values), Math.max(...values), 4), { left, right, format: short }), svg("line", { x1: left, x2: right, y1: y(0), y2: y(0), class: "axis" }), series, doses.map((dose, d) => text(x(d), bottom + 16, short(dose), { anchor: "middle" })), text((left + right) / 2, height - 4, "dose (nats of KL on neutral text)", { anchor: "middle" }));
    },
    { label: name },
  );
  return h("div", { class: "effect-box" }, legend, plot);
}

// Live: unsteered and steered samples side by side as the server writes them.
function liveBox(view) {
  const prompt = h("input", { type: "text", value: "I went to the", maxlength: 500, "aria-label": "Prompt" });
  const dose = h("input", { type: "number", value: "0.2", min: "0", max: "5", step: "0.05", "aria-label": "Dose in nats" });
  const out = { unsteered: h("blockquote", {}), steered: h("blockquote", {}) };
  const status = h("p", { role: "status", class: "quiet" });
  const run = async (event) => {
    event.preventDefault();
    show(status, "Writing …");
    for (const place of Object.values(out)) show(place);
    try {
      const features = (await view.flow.chain(view.key)).features.map((key) => view.atlas.id(key));
      await stream("steer", { features: features.length ? features : [view.id], prompt: prompt.value, dose: Number(dose.value), n_samples: 1, n_new_tokens: 60, seed: 0 }, (record) => record.arm && out[record.arm]?.append(visible(record.text), h("br")));
      show(status, "");
    } catch (error) {
      show(status, error.message);
    }
  };
  return h("form", { class: "live", onsubmit: run }, h("div", { class: "controls" }, prompt, dose, h("button", { class: "action primary" }, "Steer"), h("button", { type: "button", class: "action", onclick: cancel }, "Stop")), status, h("div", { class: "sample" }, h("div", { class: "side" }, h("h3", { class: "minor" }, "unsteered"), out.unsteered), h("div", { class: "side" }, h("h3", { class: "minor" }, "steered"), out.steered)));
}
