// Numbers and names as people read them.

/** 0.00123 -> "0.12 %", with as many digits as matter. */
export function percent(x) {
  if (!Number.isFinite(x)) return "–";
  const p = 100 * x;
  if (p === 0) return "0 %";
  if (p < 0.001) return `${p.toExponential(0).replace("e-", "e−")} %`;
  return `${p < 1 ? p.toPrecision(2) : p < 10 ? p.toFixed(1) : p.toFixed(0)} %`;
}

export function fixed(x, digits = 2) {
  return Number.isFinite(x) ? x.toFixed(digits).replace("-", "−") : "–";
}

/** Three significant digits without exponent where that stays short. */
export function short(x) {
  if (!Number.isFinite(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-3) return x.toExponential(1).replace("e+", "e").replaceAll("-", "−");
  return String(Number(x.toPrecision(3))).replace("-", "−");
}

export function count(n) {
  return Number.isFinite(n) ? Math.round(n).toLocaleString("en-US").replaceAll(",", " ") : "–";
}

/** A p- or q-value; the smallest that can be told from zero is shown as a bound. */
export function qValue(q) {
  if (!Number.isFinite(q)) return "–";
  return q < 1e-4 ? "< 0.0001" : q.toPrecision(2);
}

/** Cut long text at a whole code point, with an ellipsis. */
export function clip(text, limit) {
  if (text.length <= limit) return text;
  const cut = text.slice(0, limit - 1);
  return `${/[\ud800-\udbff]$/.test(cut) ? cut.slice(0, -1) : cut}…`;
}

export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** `residual` and friends in words for titles. */
const siteKinds = { resid_post: "residual stream", mlp_out: "MLP output",
  attn_out: "attention output", resid_pre: "residual stream before the block",
  resid_mid: "residual stream between attention and MLP", z: "attention heads",
  mlp_in: "MLP input", mlp_normalized: "MLP input before the gain" };

/** What a site is of: a named one (`M0.conv1`) is of a module that is no transformer. */
export const siteKind = (site) => (site.short.startsWith("M") ? "" : siteKinds[site.kind] ?? "");

const LEAD = new RegExp(
  "^(?:(?:no simple rule|too rare to label) · )?" +
    "(?:(?:(?:strongly )?active on|strongest on|as in|promotes) (?:forms of )?" +
    "|(?:strongly )?active (?=\\S))?",
);

/** The words that most labels begin with, and what tells a label from others. */
export function splitLabel(label) {
  const [lead] = LEAD.exec(label);
  return [lead, label.slice(lead.length)];
}

/** A label for narrow places. */
export const briefLabel = (label) => splitLabel(label)[1].replaceAll("‘ ", "‘");
