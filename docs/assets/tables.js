// A click on a heading sorts a table by this column, and a second one the other way; empty cells stay last.
document$.subscribe(() => {
  const number = (text) => {
    const found = /^[~<>≤≥]?\s*([+\-−]?[\d.,]*\d(?:e[+\-]?\d+)?)/i.exec(text);
    return found ? Number(found[1].replaceAll(",", "").replace("−", "-")) : NaN;
  };
  for (const table of document.querySelectorAll("article table:not([data-sortable])")) {
    const body = table.tBodies[0];
    if (!table.tHead || !body || body.rows.length < 3) continue;
    // a class would take the theme's style from the table
    table.dataset.sortable = "";
    for (const heading of table.tHead.rows[0].cells) {
      const column = heading.cellIndex;
      const sort = () => {
        const down = heading.getAttribute("aria-sort") === "ascending";
        for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const keyed = [...body.rows].map((row) => [(row.cells[column]?.textContent ?? "").trim(), row]);
        const numeric = keyed.every(([text]) => text === "" || !Number.isNaN(number(text)));
        const compare = numeric
          ? ([a], [b]) => number(a) - number(b)
          : ([a], [b]) => a.localeCompare(b, "en", { numeric: true });
        const given = keyed.filter(([text]) => text !== "").sort((a, b) => (down ? -1 : 1) * compare(a, b));
        for (const [, row] of [...given, ...keyed.filter(([text]) => text === "")]) body.append(row);
      };
      heading.tabIndex = 0;
      heading.title = "sort by this column";
      heading.addEventListener("click", sort);
      heading.addEventListener("keydown", (event) => {
        if (event.key === "Enter") sort();
      });
    }
  }
});
