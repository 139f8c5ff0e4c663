// A table of any length: only the rows in view are in the document. Sortable by its column heads,
// read by a screen
// reader as a table (row count and indices given), walked with the arrow keys.

import { h, show } from "../dom.js";

const ROW = 30;

/** columns: [{ name, title, class, sort?: (row) => number|string, cell: (row) => Node|string }]
 *  rows: array; `link(row)` gives the address of a row. `state` = { sort, down } is kept by
 * `onsort`. */
export function virtualTable({ columns, rows, link, label, sort, down = true, onsort, height =
  ROW }) {
  let shown = rows;
  const body = h("div", { class: "v-body", role: "rowgroup" });
  const head = h("div", { class: "v-row v-head", role: "row", "aria-rowindex": 1 });
  const scroller = h("div", { class: "v-scroll", tabindex: -1, style: { "--row": `${height}px` } },
    h("div", { class: "v-table", role: "table", "aria-label": label },
    h("div", { role: "rowgroup", class: "v-headgroup" }, head), body));
  const table = scroller.firstChild;
  let sorting = { name: sort, down };

  function drawHead() {
    show(head, columns.map((column) => {
      const mine = sorting.name === column.name;
      const mark = mine ? (sorting.down ? " ↓" : " ↑") : "";
      const button = column.sort ? h("button", { type: "button", class: "v-sort",
        title: column.title, onclick: () => sortBy(column.name, mine ? !sorting.down : true) },
        column.name, h("span", { "aria-hidden": "true" }, mark))
        : h("span", { title: column.title }, column.name);
      return h("div", { class: `v-cell ${column.class ?? ""}`, role: "columnheader",
        "aria-sort": column.sort && (mine ? (sorting.down ? "descending" : "ascending") : "none") },
        button);
    }));
  }

  function sortBy(name, isDown) {
    sorting = { name, down: isDown };
    const column = columns.find((item) => item.name === name);
    if (column?.sort) shown = sorted(rows, column.sort, isDown);
    onsort?.(sorting);
    drawHead();
    scroller.scrollTop = 0;
    draw(true);
  }

  let first = -1;
  let last = -1;
  function draw(force = false) {
    const from = Math.max(0, Math.floor(scroller.scrollTop / height) - 8);
    const to = Math.min(shown.length, from + Math.ceil((scroller.clientHeight || 600) / height)
      + 18);
    if (!force && from === first && to === last) return;
    [first, last] = [from, to];
    const focused = body.contains(document.activeElement) ? document.activeElement.closest(
      ".v-row")?.dataset.at : null;
    table.setAttribute("aria-rowcount", shown.length + 1);
    body.style.setProperty("height", `${shown.length * height}px`);
    show(body, shown.slice(from, to).map((row, i) => drawRow(row, from + i)));
    if (focused) body.querySelector(`[data-at="${focused}"] a`)?.focus({ preventScroll: true });
  }

  function drawRow(row, at) {
    const cells = columns.map((column, i) => {
      const content = column.cell(row);
      return h("div", { class: `v-cell ${column.class ?? ""}`, role: "cell" }, i === 0 && link
        ? h("a", { href: link(row) }, content) : content);
    });
    return h("div", { class: "v-row", role: "row", "aria-rowindex": at + 2, "data-at": at,
      style: { transform: `translateY(${at * height}px)` } }, cells);
  }

  body.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15 }[event.key];
    const at = Number(event.target.closest(".v-row")?.dataset.at);
    if (!step || Number.isNaN(at)) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(shown.length - 1, at + step));
    scroller.scrollTop = Math.max(0, Math.min(next * height - scroller.clientHeight / 2,
      shown.length * height));
    draw(true);
    body.querySelector(`[data-at="${next}"] a`)?.focus({ preventScroll: true });
  });
  scroller.addEventListener("scroll", () => draw(), { passive: true });
  new ResizeObserver(() => draw()).observe(scroller);
  drawHead();
  if (sort) {
    const column = columns.find((item) => item.name === sort);
    if (column?.sort) shown = sorted(rows, column.sort, down);
    drawHead();
  }
  draw(true);
  return Object.assign(scroller, {
    replaceRows(next) {
      rows = next;
      const column = columns.find((item) => item.name === sorting.name);
      shown = column?.sort ? sorted(rows, column.sort, sorting.down) : rows;
      draw(true);
    },
    rowsShown: () => shown,
  });
}

function sorted(rows, key, down) {
  const keys = new Map(rows.map((row) => [row, key(row)]));
  const sign = down ? -1 : 1;
  const missing = (x) => x === null || x === undefined || Number.isNaN(x);
  return rows.slice().sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    return sign * (x < y ? -1 : x > y ? 1 : 0);
  });
}
