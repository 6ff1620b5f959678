// Sorting and filtering. The page reads the same without it.
"use strict";

// A click on a heading sorts its table: numbers by data-value, largest first; texts from A on.
for (const table of document.querySelectorAll("table.sorts")) {
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const column = Number(button.dataset.column);
    const head = button.parentElement;
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const numeric = rows.some((row) => row.cells[column].dataset.value !== undefined);
    const before = head.getAttribute("aria-sort");
    const falling = before ? before === "ascending" : numeric;
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // no number: last
      const order = numeric ? x - y : x.localeCompare(y);
      return falling ? -order : order;
    });
    for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    body.append(...rows);
  });
}

// A form.filter shows what fits all its fields: of #target the children with data-NAME. A field
// of type search looks for a part of the text, a select for the whole of it.
for (const form of document.querySelectorAll("form.filter")) {
  const target = document.getElementById(form.dataset.target);
  const items = [...(target.tBodies ? target.tBodies[0].rows : target.children)];
  const count = form.querySelector("output");
  const apply = () => {
    let shown = 0;
    for (const item of items) {
      item.hidden = ![...form.elements].every((field) => {
        if (!field.name || !field.value) return true;
        const text = item.dataset[field.name] ?? "";
        if (field.type !== "search") return text === field.value;
        return text.toLowerCase().includes(field.value.toLowerCase());
      });
      shown += !item.hidden;
    }
    count.textContent = `${shown} of ${items.length}`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
}

// On paper nothing can be opened.
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
