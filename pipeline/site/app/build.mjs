// Turns src/ into dist/: one classic script (a page opened from disk may not load modules), one
// stylesheet, index.html.
// Run as `npm run build`; `npm run watch` rebuilds on change. Refuses a script over the budget of
// 175 kB.
import { copyFile, mkdir, stat } from "node:fs/promises";
import { context } from "esbuild";

const BUDGET = 175_000;
const builder = await context({
  entryPoints: ["src/app.js", "src/app.css"],
  bundle: true,
  format: "iife",
  target: ["chrome109", "firefox115", "safari16.4"],
  minify: true,
  charset: "ascii",
  legalComments: "none",
  outdir: "dist",
  entryNames: "[name]",
  logLevel: "warning",
});

await mkdir("dist", { recursive: true });
await copyFile("src/index.html", "dist/index.html");
if (process.argv.includes("--watch")) {
  await builder.watch();
} else {
  await builder.rebuild();
  await builder.dispose();
  const { size } = await stat("dist/app.js");
  console.log(`dist/app.js ${size} bytes of ${BUDGET}`);
  if (size > BUDGET) process.exit(1);
}
