for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending", at = head.cellIndex;
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => { const text = row.cells[at].dataset.value ?? row.cells[at].textContent;
    return text === "" ? null : isNaN(text) ? text : Number(text); };
  const sign = up ? 1 : -1;
  const rows = [...body.rows].sort((a, b) => { const [x, y] = [value(a), value(b)];
    return x === null ? 1 : y === null ? -1 : (x > y ? sign : x < y ? -sign : 0); });
  body.append(...rows);
});
