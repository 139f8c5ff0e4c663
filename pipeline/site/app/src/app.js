// Boots the page: opens the manifest, draws the frame, and on every change of the address draws one
// view.
//
// A view is `async (context) => ({ title, node })`, context = { atlas, options, feature, argument,
// key, alive }.
// A view that fails shows what failed and what fixes it; a newer address always wins over an older,
// slower one.

import { openAtlas } from "./data/atlas.js";
import { h, show } from "./dom.js";
import { openNotes } from "./notes.js";
import { parse } from "./route.js";
import { openFrame } from "./ui/frame.js";
import { errorPage } from "./ui/parts.js";
import { connect } from "./live.js";
import { about } from "./views/about.js";
import { community } from "./views/community.js";
import { compare } from "./views/compare.js";
import { feature } from "./views/feature.js";
import { flow } from "./views/flow.js";
import { graph } from "./views/graph.js";
import { lens } from "./views/lens.js";
import { notes } from "./views/notes.js";
import { overview } from "./views/overview.js";
import { search } from "./views/search.js";
import { site } from "./views/site.js";
import { trace } from "./views/trace.js";
import { trunks } from "./views/trunks.js";
import { tryText } from "./views/try.js";

const VIEWS = { overview, flow, community, trunks, site, feature, graph, search, compare, lens,
  notes, about, trace, try: tryText };

boot();

async function boot() {
  const root = document.getElementById("app");
  const started = performance.now();
  try {
    const atlas = await openAtlas();
    openNotes(atlas.digest);
    const live = await connect();
    const frame = openFrame(root, atlas, live);
    const navigate = () => draw(frame, atlas, live);
    addEventListener("hashchange", navigate);
    await navigate();
    performance.measure("atlas open", { start: started });
  } catch (error) {
    show(root, h("main", { class: "page" }, errorPage(error, { whole: true })));
  }
}

let turn = 0;
async function draw(frame, atlas, live) {
  const mine = ++turn;
  const started = performance.now();
  const route = parse(location.hash);
  const waiting = setTimeout(() => mine === turn && frame.busy(true), 120);
  const alive = () => mine === turn;
  let page;
  try {
    page = await view({ ...route, atlas, live, alive, key: atlas.key(route.feature) });
  } catch (error) {
    page = { title: "Not shown", node: errorPage(error) };
  }
  clearTimeout(waiting);
  if (!alive()) return;
  frame.busy(false);
  frame.show(page, route);
  performance.measure(`view ${route.view}`, { start: started });
}

function view(context) {
  if (context.feature && context.key === null) {
    const { site, latent } = context.feature;
    const where = context.atlas.siteIndex.get(site);
    const found = where === undefined
      ? `it has ${context.atlas.sites.map((item) => item.short).join(", ")}`
      : `${site} has latents 0 to ${context.atlas.sites[where].n_latents - 1}`;
    throw new Error(`There is no feature ${site}/${latent} in this atlas: ${found}.`);
  }
  const draw = VIEWS[context.view];
  if (!draw) throw new Error(`There is no page “${context.argument ?? context.view}” here.`);
  return draw(context);
}
