// A person's own label and remark on a feature, kept in their browser.

import { h } from "../dom.js";
import { noteOf, setNote } from "../notes.js";

export function noteBox(id) {
  const note = noteOf(id) ?? { label: "", comment: "" };
  const status = h("span", { class: "quiet", role: "status" });
  const label = h("input", { type: "text", value: note.label, maxlength: 200,
    placeholder: "what you think it is" });
  const comment = h("textarea", { value: note.comment, rows: 2, maxlength: 4000,
    placeholder: "why; what speaks against it" });
  const save = () => {
    setNote(id, { label: label.value.trim(), comment: comment.value.trim() });
    status.textContent = "Kept in this browser.";
  };
  label.addEventListener("input", save);
  comment.addEventListener("input", save);
  const details = h("details", { class: "note" }, h("summary", {}, note.label || note.comment
    ? "Your note" : "Add a note"), h("div", { class: "note-fields" }, h("label", {}, "Your label ",
    label), h("label", {}, "Remark ", comment), status));
  if (note.label || note.comment) details.open = true;
  return details;
}
