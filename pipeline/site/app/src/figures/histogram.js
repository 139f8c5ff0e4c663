// Histograms and bars of one feature's card.

import { svg } from "../dom.js";
import { count, percent, short } from "../format.js";
import { canvasOf, linear, responsive, text } from "./plot.js";

/** Activations over firings, logarithmic bins, with the deciles marked. */
export function activationHistogram(card, { log2_low, bins_per_octave }) {
  const used = [...card.histogram.keys()].filter((bin) => card.histogram[bin] > 0);
  if (!used.length) return null;
  const [first, last] = [Math.max(0, used[0] - 1), Math.min(card.histogram.length - 1, used.at(-1)
    + 1)];
  const edge = (bin) => log2_low + bin / bins_per_octave;
  return responsive((width) => draw(width), { label: "Histogram of activations", min: 220 });

  function draw(width) {
    const height = 150;
    const [left, right, top, bottom] = [16, width - 16, 14, height - 34];
    const x = linear(edge(first), edge(last + 1), left, right);
    const most = Math.max(...card.histogram);
    const y = linear(0, most, bottom, top);
    const bars = [];
    for (let bin = first; bin <= last; bin++) {
      const n = card.histogram[bin];
      if (n) bars.push(
        svg("rect", { x: x(edge(bin)) + 0.5,
        width: Math.max(1, x(edge(bin + 1)) - x(edge(bin)) - 1), y: Math.min(y(n), bottom - 1),
        height: Math.max(1, bottom - y(n)), class: "bar" },
        svg("title", {},
        `${short(2 ** edge(bin))} to ${short(2 ** edge(bin + 1))}: ${count(n)} activations`)));
    }
    const octaves = [];
    for (let power = Math.ceil(edge(first)); power <= edge(last + 1); power++) octaves.push(power);
    const every = Math.ceil(octaves.length / Math.max(2, width / 60));
    const marks = octaves.filter((_, i) => i % every === 0)
      .map((power) => text(x(power), bottom + 15, short(2 ** power), { anchor: "middle" }));
    const deciles = Array.from(card.decile.slice(1, 10)).filter((value) => value > 0)
      .map((value) => svg("line", { x1: x(Math.log2(value)), x2: x(Math.log2(value)), y1: bottom,
      y2: bottom + 4, class: "axis" }));
    return canvasOf(width, height,
      `Histogram of ${count(card.count)} activations, largest ${short(card.max)}`, bars,
      svg("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }), deciles, marks,
      text(left, top - 3, `at most ${count(most)} per bin`), text(right, height - 4,
      "activation (ticks: deciles)", { anchor: "end" }));
  }
}

export function histogramRows(card, { log2_low, bins_per_octave }) {
  const edge = (bin) => 2 ** (log2_low + bin / bins_per_octave);
  return { head: ["from", "to", "activations"], rows: [...card.histogram]
    .map((n, bin) => [edge(bin), edge(bin + 1), n]).filter(([, , n]) => n > 0) };
}

/** Where in the context it fires, as a multiple of how often tokens stand there. */
export function positionRows(card, manifest) {
  return rates(card.position, manifest.position_totals, (i) => rangeText(manifest.position_edges,
    i));
}

export function sourceRows(card, manifest) {
  return rates(card.source, manifest.source_totals, (i) => manifest.corpus.sources[i].name);
}

export function topicRows(card, manifest) {
  return card.topic?.length ? rates(card.topic, manifest.label_totals, (i) =>
    manifest.corpus.labels[i].name) : [];
}

function rates(firings, totals, name) {
  const all = totals.reduce((sum, n) => sum + n, 0);
  const fired = firings.reduce((sum, n) => sum + n, 0);
  return Array.from(firings, (n, i) => ({ name: name(i), firings: n, rate: totals[i]
    ? n / totals[i] : NaN, lift: totals[i] && fired ? n / fired / (totals[i] / all) : NaN }));
}

function rangeText(edges, i) {
  const [from, to] = [edges[i], edges[i + 1]];
  return to === undefined ? `${from}+` : to === from + 1 ? String(from) : `${from}–${to - 1}`;
}

/** Vertical bars of rates per position; the line is the overall rate. */
export function rateBars(rows, label) {
  return responsive(
    (width) => {
      const height = 110;
      const [left, right, top, bottom] = [6, width - 6, 8, height - 22];
      const most = Math.max(1.2, ...rows.map((row) => row.lift).filter(Number.isFinite));
      const y = linear(0, most, bottom, top);
      const step = (right - left) / rows.length;
      const every = Math.ceil((rows.length * 40) / (right - left));
      return canvasOf(width, height, label, rows.map((row, i) => Number.isFinite(row.lift)
        && svg("rect", { x: left + i * step + 1, width: Math.max(1, step - 2), y: y(row.lift),
        height: bottom - y(row.lift), class: "bar" },
        svg("title", {},
        `${row.name}: ${percent(row.rate)} of tokens, ${short(row.lift)} times the mean`))),
        svg("line", { x1: left, x2: right, y1: y(1), y2: y(1), class: "threshold" }),
        rows.map((row, i) => i % every === 0 && text(left + (i + 0.5) * step, height - 6, row.name,
        { anchor: "middle" })));
    },
    { label, min: 200 },
  );
}
