// Notes: the labels and remarks a person wrote, kept in this browser, saved to a file and read back
// from one.

import { h, show } from "../dom.js";
import { saveText } from "../figures/export.js";
import { plural } from "../format.js";
import { allNotes, exportNotes, importNotes, onChange } from "../notes.js";
import { parseFeature } from "../route.js";
import { empty, featureLink } from "../ui/parts.js";
import { visible } from "../ui/tokens.js";

export async function notes({ atlas }) {
  const list = h("div", {});
  const report = h("div", { role: "status" });
  const draw = () => {
    const entries = Object.entries(allNotes());
    show(list, entries.length ? table(entries) : empty("No notes yet.",
      "Open a feature and write what you think it is."));
  };
  const file = h("input", { type: "file", accept: "application/json,.json", id: "notes-file",
    onchange: () => read(file, atlas, report) });
  draw();
  const stop = onChange(() => (list.isConnected ? draw() : stop()));
  const node = h(
    "div",
    {},
    h("h1", {}, "Notes"),
    h("p", { class: "lead" },
      "Notes stay in this browser. Save them to a file to keep them, to give them to others, or " +
        "to read them as labels in a program:"),
    h("pre", {}, "from pipeline.site.imports import import_notes\nlabels = " +
      "import_notes(Path(\"notes.json\"))"),
    h("div", { class: "controls" }, h("button", { type: "button", class: "action", onclick: () =>
      saveText("atlas-notes.json", JSON.stringify(exportNotes(atlas), null, 1),
      "application/json") }, "Save notes to a file"),
      h("label", { class: "file", for: "notes-file" }, "Read notes from a file ", file)),
    report,
    list,
  );
  return { title: "Notes", node };
}

function table(entries) {
  return h("table", { class: "plain" },
    h("thead", {}, h("tr", {}, ["feature", "your label", "remark", "changed"]
    .map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, entries.map(([id, note]) => h("tr", {}, h("td", {}, featureLink(id)),
    h("td", {}, visible(note.label ?? "")), h("td", {}, visible(note.comment ?? "")),
    h("td", { class: "quiet" }, (note.changed ?? "").slice(0, 10))))));
}

async function read(input, atlas, report) {
  const file = input.files[0];
  if (!file) return;
  const content = await file.text();
  input.value = ""; // so that the same file can be chosen again
  let document;
  try {
    document = JSON.parse(content);
  } catch {
    return void show(report, h("p", { class: "warning" }, `${file.name} is not JSON.`));
  }
  const { added, problems } = importNotes(document, (id) => atlas.key(parseFeature(id)) !== null);
  show(report, h("p", {}, `${plural(added, "note")} read.`), problems.length > 0
    && h("ul", { class: "warning" }, problems.slice(0, 20)
    .map((text) => h("li", {}, visible(text)))));
}
