"use strict";
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

  const source = document.getElementById("timeline-data");
  const canvas = document.getElementById("timeline");
  if (!source || !canvas) return;
  const data = JSON.parse(source.textContent);
  const n = data.parts.length;
  const windows = data.windows.map(([lane, start, dur, code]) => {
    const at = new Float64Array(dur.length + 1);
    at[0] = start;
    for (let i = 0; i < dur.length; i++) at[i + 1] = at[i] + dur[i];
    return { lane, at, code };
  });
  const end = data.end;
  const details = document.getElementById("timeline-details");
  const picker = document.getElementById("timeline-exit");
  const context = canvas.getContext("2d");
  const laneHeight = 30, top = 22, left = 8;
  let from = 0, to = end, cursor = null;

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const duration = (ns) => {
    const units = [["s", 1e9], ["ms", 1e6], ["us", 1e3], ["ns", 1]];
    const [unit, size] = units.find(([, s]) => Math.abs(ns) >= s) ?? units[3];
    return `${(ns / size).toPrecision(4).replace(/\.?0+$/, "")} ${unit}`;
  };
  const nameOf = (code) => {
    const part = data.parts[code % n], reason = Math.floor(code / n) - 1;
    return reason < 0 ? part : `${part}, handling ${data.reasons[reason]}`;
  };
  // largest i with at[i] <= t
  const position = (at, t) => {
    let low = 0, high = at.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (at[middle] <= t) low = middle; else high = middle - 1;
    }
    return low;
  };
  const draw = () => {
    const ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = top + data.lanes.length * laneHeight + 6;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.height = `${height}px`;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const scale = (width - 2 * left) / (to - from), x = (t) => left + (t - from) * scale;
    const colours = data.parts.map((part) => style(`--${part}`));
    const text = style("--text"), line = style("--line");
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = text;
    for (let i = 0; i <= 4; i++) {
      const t = from + ((to - from) * i) / 4;
      context.textAlign = i === 0 ? "left" : i === 4 ? "right" : "center";
      context.fillText(duration(t), x(t), 13);
    }
    for (let lane = 0; lane < data.lanes.length; lane++) {
      context.strokeStyle = line;
      context.strokeRect(left, top + lane * laneHeight, width - 2 * left, laneHeight - 6);
    }
    for (const { lane, at, code } of windows) {
      if (at[at.length - 1] < from || at[0] > to) continue;
      const y = top + lane * laneHeight;
      let i = position(at, Math.max(from, at[0]));
      while (i < code.length && at[i] <= to) {
        const x0 = Math.max(x(at[i]), left);
        let j = i + 1, longest = i;
        // what is narrower than a pixel shares it: the longest of them gives the colour
        while (j < code.length && x(at[j]) < x0 + 1) {
          if (at[j + 1] - at[j] > at[longest + 1] - at[longest]) longest = j;
          j++;
        }
        const x1 = Math.min(x(at[j]), width - left);
        context.fillStyle = colours[code[longest] % n];
        context.fillRect(x0, y, Math.max(x1 - x0, 1), laneHeight - 6);
        if (x1 - x0 > 70) {
          context.fillStyle = style("--bg");
          context.textAlign = "left";
          context.fillText(nameOf(code[longest]).slice(0, Math.floor((x1 - x0) / 6.5)), x0 + 4, y + 16);
        }
        i = j;
      }
    }
    if (cursor !== null && cursor >= from && cursor <= to) {
      context.strokeStyle = text;
      context.beginPath();
      context.moveTo(x(cursor), top - 4);
      context.lineTo(x(cursor), height - 4);
      context.stroke();
    }
    canvas.dataset.from = from;
    canvas.dataset.to = to;
  };
  const view = (a, b) => {
    const span = Math.min(Math.max(b - a, 200), end);
    from = Math.min(Math.max(0, (a + b - span) / 2), end - span);
    to = from + span;
    draw();
  };
  const zoom = (factor, centre = (from + to) / 2) => view(centre - (centre - from) * factor, centre + (to - centre) * factor);
  const pan = (share) => { const by = (to - from) * share; view(from + by, to + by); };
  const timeAt = (event) => from + ((event.offsetX - left) / (canvas.clientWidth - 2 * left)) * (to - from);
  const show = (t, lane) => {
    cursor = t;
    const hit = windows.find((w) => w.lane === lane && w.at[0] <= t && t < w.at[w.at.length - 1]);
    if (hit) {
      const i = position(hit.at, t);
      details.textContent = `${data.lanes[lane]}: ${nameOf(hit.code[i])} for ${duration(hit.at[i + 1] - hit.at[i])}, from ${duration(hit.at[i])} after the start.`;
    } else details.textContent = `${data.lanes[lane] ?? ""}: not in the stored windows at ${duration(t)}; choose an exit from the list.`;
    draw();
  };
  const goTo = (index) => {
    const exit = data.chosen[index];
    if (!exit) return;
    const [lane, ts, dur] = exit;
    const span = Math.max(dur * 1.6, 4000);
    view(ts - span * 0.3, ts - span * 0.3 + span);
    show(ts + Math.min(dur / 2, 1), lane);
  };
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.shiftKey) return; // plain scrolling stays the page's
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.3 : 1 / 1.3, timeAt(event));
  }, { passive: false });
  let grabbed = null;
  canvas.addEventListener("pointerdown", (event) => { grabbed = { x: event.offsetX, from, to, moved: false }; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", (event) => {
    if (!grabbed) return;
    const by = ((grabbed.x - event.offsetX) / canvas.clientWidth) * (grabbed.to - grabbed.from);
    grabbed.moved ||= Math.abs(grabbed.x - event.offsetX) > 3;
    view(grabbed.from + by, grabbed.to + by);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (grabbed && !grabbed.moved) show(timeAt(event), Math.floor((event.offsetY - top) / laneHeight));
    grabbed = null;
  });
  canvas.addEventListener("keydown", (event) => {
    const act = { "+": () => zoom(1 / 1.5), "=": () => zoom(1 / 1.5), "-": () => zoom(1.5), ArrowLeft: () => pan(-0.2), ArrowRight: () => pan(0.2), Home: () => view(0, end), 0: () => view(0, end) }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  document.querySelectorAll("[data-zoom]").forEach((button) => button.addEventListener("click", () => {
    if (button.dataset.zoom === "all") view(0, end); else zoom(Number(button.dataset.zoom));
  }));
  picker?.addEventListener("change", () => goTo(Number(picker.value)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  new ResizeObserver(draw).observe(canvas.parentElement);
  view(0, end);
})();
