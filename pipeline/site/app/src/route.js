// The state of the page lives in the address: `#/<view>/<argument>?name=value`. A feature is
// `#/L12/402`.
//
// parse(hash) -> { view, feature?, argument?, options: Map-like URLSearchParams }; link(...) ->
// "#/…"

const VIEWS = new Set(["overview", "flow", "community", "trunks", "site", "graph", "search",
  "compare", "lens", "notes", "about", "try", "trace"]);
const FEATURE = /^(L\d+(?:\.(?:mlp|attn|pre|mid|z|mlp_in|mlp_normalized))?|M\d+\.\w[\w.+-]*)\/(\d+)$/;

export function parse(hash) {
  const text = hash.replace(/^#\/?/, "");
  const [path, query = ""] = splitOnce(text, "?");
  const options = new URLSearchParams(query);
  const feature = parseFeature(decode(path));
  if (feature) return { view: "feature", feature, options };
  const [view, rest = ""] = splitOnce(decode(path), "/");
  if (view === "") return { view: "overview", options };
  if (!VIEWS.has(view)) return { view: "unknown", argument: text.slice(0, 200), options };
  return { view, argument: rest, feature: parseFeature(rest), options };
}

/** `L12.mlp/7` -> { site: "L12.mlp", latent: 7 }, anything else -> null. */
export function parseFeature(text) {
  const match = FEATURE.exec(text.trim());
  return match && { site: match[1], latent: Number(match[2]) };
}

export function featureLink(id, options) {
  return link(id, options);
}

export function link(path, options = {}) {
  const query = new URLSearchParams(Object.entries(options)
    .filter(([, value]) => value !== undefined && value !== null && value !== ""));
  const text = query.toString().replaceAll("%2C", ",").replaceAll("%2F", "/");
  return `#/${path}${text ? `?${text}` : ""}`;
}

/** Change options of the present address without a new history entry and without drawing the page
 *  again. */
export function remember(changes) {
  const [path, query = ""] = splitOnce(location.hash.replace(/^#\/?/, ""), "?");
  const options = new URLSearchParams(query);
  for (const [name, value] of Object.entries(changes)) {
    if (value === undefined || value === null || value === "") options.delete(name);
    else options.set(name, value);
  }
  history.replaceState(null, "", link(decode(path), Object.fromEntries(options)));
}

function splitOnce(text, mark) {
  const at = text.indexOf(mark);
  return at < 0 ? [text] : [text.slice(0, at), text.slice(at + 1)];
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
