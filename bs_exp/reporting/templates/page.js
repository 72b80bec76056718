"use strict";
// A click on a heading sorts its table; a second click turns it round.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const value = (row, i) => {
    const cell = row.cells[i];
    return cell.dataset.v === undefined ? cell.textContent.trim() : Number(cell.dataset.v);
  };
  const compare = (a, b) =>
    typeof a === typeof b ? (typeof a === "number" ? a - b : a.localeCompare(b)) : typeof a === "number" ? -1 : 1;
  [...table.tHead.rows[0].cells].forEach((heading, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const fixed = [...body.rows].filter((row) => row.classList.contains("dense"));
      const rows = [...body.rows].filter((row) => !row.classList.contains("dense"));
      rows.sort((a, b) => (down ? -1 : 1) * compare(value(a, i), value(b, i)));
      table.classList.add("sorted");
      body.replaceChildren(...fixed, ...rows);
    });
  });
}
// The settings in which two runs differ. Texts of records are set as text, never as markup.
const compare = document.getElementById("compare");
if (compare) {
  const { keys, runs } = JSON.parse(compare.dataset.settings);
  const [one, other] = compare.querySelectorAll("select");
  for (const [i, select] of [one, other].entries()) {
    select.append(...runs.map((run, j) => new Option(`${run.run} ${run.label}`, j, false, i === j)));
    select.addEventListener("change", () => show());
  }
  const show = () => {
    const left = runs[one.value].values, right = runs[other.value].values;
    const rows = keys.flatMap((key, i) => (left[i] === right[i] ? [] : [[key, left[i] ?? "-", right[i] ?? "-"]]));
    const lines = (rows.length ? rows : [["none", "", ""]]).map((texts) => {
      const row = document.createElement("tr");
      row.append(...texts.map((text) => Object.assign(document.createElement("td"), { textContent: text, className: "wrap" })));
      return row;
    });
    compare.querySelector("tbody").replaceChildren(...lines);
  };
  compare.hidden = false;
  show();
}
// A link to a run opens it.
const open = () => {
  const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.scrollIntoView();
  }
};
addEventListener("hashchange", open);
open();
