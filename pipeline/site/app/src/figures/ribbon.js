// A feature's chain through every layer, as one line: thick where a link is strong, broken where
// the chain ends.

import { latentOf, siteOf } from "../data/atlas.js";
import { svg } from "../dom.js";
import { clip, fixed } from "../format.js";
import { link } from "../route.js";
import { visible } from "../ui/tokens.js";
import { everyNth, linear, responsive, text } from "./plot.js";

/** chain: { features: [key], links }; labels, classes: Map(key -> string); feeds: Map(key -> [links
 *  of modules]). */
export function chainRibbon(atlas, chain, { key, labels, classes, feeds }) {
  const layers = atlas.layers;
  return responsive(
    (width) => {
      const height = 92;
      const [left, right, y] = [18, width - 18, 34];
      const x = linear(layers[0], layers.at(-1), left, right);
      const at = (one) => x(atlas.sites[siteOf(one)].layer);
      const nth = everyNth(layers.length, right - left, 24);
      const lines = chain.links.map((item) =>
        svg("line", { x1: at(item.source), x2: at(item.target), y1: y, y2: y, class: "ribbon-link",
        "stroke-width": (1 + 7 * item.strength).toFixed(1),
        "stroke-opacity": (0.3 + 0.7 * item.strength).toFixed(2) },
        svg("title", {},
        `${atlas.id(item.source)} → ${atlas.id(item.target)}: cosine ${fixed(item.cosine)}`)));
      const dots = chain.features.map((one) => dot(atlas, one, { x: at(one), y, own: one === key,
        label: labels.get(one) ?? "", kind: classes.get(one), feeds: feeds.get(one) ?? [] }));
      return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
        "aria-label": `Chain of ${chain.features.length} features`, class: "ribbon-figure" },
        svg("line", { x1: left, x2: right, y1: y, y2: y, class: "grid" }), lines, dots,
        layers.map((layer, i) => i % nth === 0 && text(x(layer), height - 6, layer,
        { anchor: "middle" })));
    },
    { label: "Chain through the layers", min: 280 },
  );
}

function dot(atlas, key, { x, y, own, label, kind, feeds }) {
  const said = `${atlas.id(key)}: ${visible(clip(label || "never active", 80))}`;
  const marks = feeds.map((feed, i) => svg("line", { x1: x, x2: x - 6 + 0, y1: y + 8, y2: y + 20
    + 6 * i, class: feed.relation === 1 ? "feed mlp" : "feed attention",
    "stroke-width": (1 + 3 * feed.strength).toFixed(1) },
    svg("title", {}, `from ${atlas.id(feed.source)}, cosine ${fixed(feed.cosine)}`)));
  return svg("a", { href: link(atlas.id(key)), class: `ribbon-node class-${kind}`,
    "aria-current": own ? "page" : null }, svg("title", {}, said), marks,
    own && svg("circle", { cx: x, cy: y, r: 9, class: "ring" }),
    svg("circle", { cx: x, cy: y, r: own ? 5.5 : 4.5, class: "bead" }),
    own && text(x, 16, String(latentOf(key)), { anchor: "middle", className: "tick strong" }));
}
