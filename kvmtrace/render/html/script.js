"use strict";
const kvmtrace = {};  // what the scripts of a page share
kvmtrace.duration = (ns) => {
  const units = [["s", 1e9], ["ms", 1e6], ["us", 1e3], ["ns", 1]];
  const [unit, size] = units.find(([, s]) => Math.abs(ns) >= s) ?? units[3];
  return `${Number((ns / size).toPrecision(4))} ${unit}`;
};
// labels of ticks that are `step` apart, so precise that no two are alike
kvmtrace.timeLabels = (times, step, to) => {
  const [unit, size] = [["s", 1e9], ["ms", 1e6], ["us", 1e3], ["ns", 1]].find(([, s]) => Math.max(to, 1) >= s) ?? ["ns", 1];
  const digits = Math.max(0, Math.ceil(-Math.log10(step / size) - 1e-9));
  return times.map((t) => `${(t / size).toFixed(Math.min(digits, 9))} ${unit}`);
};
(() => {
  const value = (cell) => {
    const raw = cell.dataset.v ?? cell.textContent.trim();
    const number = Number(raw);
    return raw !== "" && !Number.isNaN(number) ? number : raw.toLowerCase();
  };
  const sortBy = (table, column, descending) => {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    rows.sort((a, b) => {
      const x = value(a.cells[column]), y = value(b.cells[column]);
      const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1;
      return descending ? -order : order;
    });
    rows.forEach((row) => body.append(row));
    [...table.tHead.rows[0].cells].forEach((th, i) => {
      if (i === column) th.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
  };
  document.querySelectorAll("table.sortable").forEach((table) => {
    [...table.tHead.rows[0].cells].forEach((th, i) => {
      th.querySelector("button")?.addEventListener("click", () => {
        const now = th.getAttribute("aria-sort");
        sortBy(table, i, now ? now === "ascending" : th.classList.contains("num"));
      });
    });
  });
  document.querySelectorAll("input[data-filter]").forEach((input) => {
    const table = document.getElementById(input.dataset.filter);
    const status = document.getElementById(`${input.dataset.filter}-count`);
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      let shown = 0;
      for (const row of table.tBodies[0].rows) {
        row.hidden = wanted !== "" && !row.textContent.toLowerCase().includes(wanted);
        shown += row.hidden ? 0 : 1;
      }
      status.textContent = `${shown} of ${table.tBodies[0].rows.length} rows`;
    });
  });
  // long tables show a page of rows; filtering and sorting look at all of them
  const PAGE = 15;
  document.querySelectorAll("table.sortable").forEach((table) => {
    const rows = table.tBodies[0].rows;
    if (rows.length <= PAGE + 5) return;
    const button = document.createElement("button");
    let shown = PAGE;
    const update = () => {
      const filtered = document.querySelector(`input[data-filter="${table.id}"]`)?.value.trim();
      let left = shown;
      for (const row of table.tBodies[0].rows) row.classList.toggle("paged", !filtered && !row.hidden && left-- <= 0);
      button.hidden = Boolean(filtered) || shown >= rows.length;
      button.textContent = `Show more rows (${shown} of ${rows.length})`;
    };
    button.type = "button";
    button.className = "more";
    button.addEventListener("click", () => { shown = shown < 4 * PAGE ? 4 * PAGE : rows.length; update(); });
    table.closest(".scroll").after(button);
    table.tHead.addEventListener("click", update);
    document.querySelector(`input[data-filter="${table.id}"]`)?.addEventListener("input", update);
    update();
  });
  // a link into a folded section opens it
  const open = () => {
    if (!/^#[a-z][a-z-]*$/.test(location.hash)) return;
    const target = document.querySelector(location.hash);
    const section = target?.matches("details") ? target : target?.closest("details");
    section?.setAttribute("open", "");
    target?.scrollIntoView();
  };
  window.addEventListener("hashchange", open);
  open();
})();
