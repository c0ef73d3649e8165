// Tables that sort by a click on a header, and boxes that fade where there is more to the side.
"use strict";

// What a cell sorts by: data-sort, or the number that its text begins with, or the text. Dashes are no values.
function key(cell) {
  const text = cell.dataset.sort ?? cell.textContent.trim();
  const number = /^[+−-]?\d[\d.]*(e[+-]?\d+)?/.exec(text);
  return text === "–" || text === "" ? null : number ? Number(number[0].replace("−", "-")) : text;
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number"
    ? a - b
    : String(a).localeCompare(String(b), undefined, { numeric: true });
}

function makeSortable(table) {
  const body = table.tBodies[0];
  if (!table.tHead || !body || body.rows.length < 2) return;
  const original = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const keyed = original.map((row) => [key(row.cells[column]), row]);
      const known = keyed.filter(([value]) => value !== null);
      // Numbers begin with the largest, unless data-first says otherwise, names with the first; a third click brings the order of the page back.
      const numbers = known.every(([value]) => typeof value === "number");
      const first = header.dataset.first ?? (numbers ? "descending" : "ascending");
      const second = first === "descending" ? "ascending" : "descending";
      const now = { [first]: second, [second]: null }[header.getAttribute("aria-sort")];
      const order = now === undefined ? first : now;
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      if (order) {
        header.setAttribute("aria-sort", order);
        known.sort(([a], [b]) => (order === "ascending" ? compare(a, b) : compare(b, a)));
        const unknown = keyed.filter(([value]) => value === null);
        body.append(...[...known, ...unknown].map(([, row]) => row));
      } else {
        body.append(...original);
      }
    });
  });
}

function watchEdges(box) {
  const mark = () => box.classList.toggle("more", box.scrollWidth - box.clientWidth - box.scrollLeft > 1);
  box.addEventListener("scroll", mark, { passive: true });
  new ResizeObserver(mark).observe(box);
}

document.querySelectorAll("table").forEach(makeSortable);
document.querySelectorAll(".scroll").forEach(watchEdges);
