// What a person leaves in their own browser: notes (their labels) and the compare tray.
// localStorage, this atlas only.
// Exported as JSON that the program imports as labels, and read back from such JSON.

const listeners = new Set();
let prefix = "featureflow";

/** Notes are kept per atlas, by its digest. */
export function openNotes(digest) {
  prefix = `featureflow:${digest}`;
}

export function onChange(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

export const allNotes = () => read("notes", {});
export const noteOf = (id) => allNotes()[id] ?? null;

/** note: { label, comment }; both empty removes it. */
export function setNote(id, { label, comment }) {
  const notes = allNotes();
  if (!label && !comment) delete notes[id];
  else notes[id] = { label, comment, changed: new Date().toISOString() };
  write("notes", notes);
}

export const MAX_COMPARED = 4;
export const compared = () => read("compared", []);

export function toggleCompared(id) {
  const list = compared();
  const next = list.includes(id) ? list.filter((item) => item !== id) : [...list, id]
    .slice(-MAX_COMPARED);
  write("compared", next);
  return next;
}

/** The document that `pipeline.atlas.imports.import_notes` reads. */
export function exportNotes(atlas) {
  const notes = Object.entries(allNotes()).map(([feature, note]) => ({ feature, ...note }));
  return { kind: "featureflow-notes", schema: 1, atlas: atlas.digest, model: atlas.model, notes };
}

/** Merge a parsed document into the notes; returns how many came in and every problem found. */
export function importNotes(document, isFeature) {
  if (document?.kind !== "featureflow-notes" || document.schema !== 1
    || !Array.isArray(document.notes)) {
    return { added: 0,
      problems: ["This is not a notes file: expected kind featureflow-notes, schema 1, and a " +
        "list of notes."] };
  }
  const notes = allNotes();
  const problems = [];
  let added = 0;
  document.notes.forEach((item, i) => {
    if (typeof item?.feature !== "string" || !isFeature(item.feature)) problems.push(
      `Note ${i + 1}: no such feature here (${String(item?.feature).slice(0, 40)}).`);
    else {
      notes[item.feature] = { label: text(item.label), comment: text(item.comment),
        changed: text(item.changed) };
      added += 1;
    }
  });
  write("notes", notes);
  return { added, problems };
}

const text = (value) => (typeof value === "string" ? value.slice(0, 4000) : "");

function read(name, otherwise) {
  try {
    const value = JSON.parse(localStorage.getItem(`${prefix}:${name}`));
    return value && typeof value === "object" && Array.isArray(value) === Array.isArray(otherwise)
      ? value : otherwise;
  } catch {
    return otherwise;
  }
}

const unsaved = {};
function write(name, value) {
  try {
    localStorage.setItem(`${prefix}:${name}`, JSON.stringify(value));
  } catch {
    unsaved[name] = value; // storage is full or forbidden: the listeners say so
  }
  for (const listener of listeners) listener(name, name in unsaved);
}
