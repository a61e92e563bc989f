"use strict";
// The search among the errors: every word must occur somewhere in a row. Without it the page is whole.
const field = document.getElementById("search");
if (field) {
  const rows = [...document.querySelectorAll(".error")].map((row) => [row, row.textContent.toLowerCase()]);
  const count = document.getElementById("count");
  const filter = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [row, text] of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = words.length ? `${shown} of ${rows.length}` : "";
  };
  field.closest(".search").hidden = false;
  field.addEventListener("input", filter);
  filter();
}
