"use strict";

// Empty cells come last in both directions; words with numbers in them are compared as a person would.
const words = new Intl.Collator("en", { numeric: true });

function compare(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const [x, y] = [Number(a), Number(b)];
  return sign * (Number.isNaN(x) || Number.isNaN(y) ? words.compare(a, b) : x - y || 0);
}

// What is sorted by, of a row or of a group of rows whose first row counts.
function valueOf(item, column) {
  const cell = (item.rows ? item.rows[0] : item).cells[column];
  return cell.dataset.value ?? cell.textContent.trim();
}

function arrange(parent, items, column, sign) {
  const values = new Map(items.map((item) => [item, valueOf(item, column)]));
  const sorted = [...items].sort((a, b) => compare(values.get(a), values.get(b), sign));
  parent.append(...sorted);
}

function sort(table, head) {
  const opposite = { ascending: "descending", descending: "ascending" };
  const order = opposite[head.getAttribute("aria-sort")] ?? head.dataset.first;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  if (table.classList.contains("runs")) {
    arrange(table, [...table.tBodies], head.cellIndex, sign);
  } else {
    for (const body of table.tBodies) {
      arrange(body, [...body.rows].filter((row) => !("pinned" in row.dataset)), head.cellIndex, sign);
    }
  }
}

for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) sort(table, button.closest("th"));
  });
}

const form = document.querySelector("form.filter");
const search = form.querySelector("input");
const choices = [...form.querySelectorAll("select")];
const runs = [...document.querySelector("table.runs").tBodies].map((body) => ({
  body,
  keys: choices.map((choice) => body.rows[0].cells[choice.dataset.column].textContent.trim()),
  text: `${body.rows[0].textContent} ${body.querySelector("summary").textContent}`.toLowerCase(),
}));

function filter() {
  const terms = search.value.toLowerCase().split(/\s+/);
  let shown = 0;
  for (const run of runs) {
    const chosen = choices.every((choice, at) => choice.value === "" || choice.value === run.keys[at]);
    run.body.hidden = !(chosen && terms.every((term) => run.text.includes(term)));
    shown += !run.body.hidden;
  }
  form.querySelector("output").textContent = `${shown} of ${runs.length} runs`;
}

for (const event of ["input", "change"]) form.addEventListener(event, filter);
form.querySelector("button").addEventListener("click", () => {
  form.reset();
  filter();
});
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
filter();
