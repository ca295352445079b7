"use strict";
// The timeline: every segment of the recording (or, of a long one, what each thread did longest in each of many bins,
// and all segments around chosen VM-exits), drawn on a canvas that zooms to any moment. The view is in the URL's fragment.
(async () => {
  const source = document.getElementById("timeline-data");
  const canvas = document.getElementById("timeline");
  if (!source || !canvas) return;
  const data = JSON.parse(source.textContent);
  const details = document.getElementById("timeline-details");
  const search = document.getElementById("timeline-search");
  if (typeof DecompressionStream === "undefined") {
    details.textContent = "This browser is too old to draw the timeline.";
    return;
  }
  const packed = Uint8Array.from(atob(data.blob), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  let offset = 0;
  const read = (Kind, count) => {
    const made = new Kind(bytes.slice(offset, offset + count * Kind.BYTES_PER_ELEMENT));
    offset += count * Kind.BYTES_PER_ELEMENT;
    return made;
  };
  const n = data.parts.length, guest = 0, end = data.end;
  const windows = data.windows.map((w) => {
    const dur = read(Uint32Array, w.n), code = read(Uint16Array, w.n), exits = read(Uint32Array, w.exits), rips = read(Uint32Array, w.exits);
    const at = new Float64Array(w.n + 1);
    const long = new Map(w.long);
    at[0] = w.start;
    for (let i = 0; i < w.n; i++) at[i + 1] = at[i] + (long.get(i) ?? dur[i]);
    return { lane: w.lane, at, code, exits, rips, first: w.first };
  });
  const bins = data.bins.map((b) => ({ lane: b.lane, ns: b.ns, code: read(Uint16Array, b.n) }));
  const NOTHING = 0xffff;
  const context = canvas.getContext("2d");
  const laneHeight = 44, top = 24, left = 8, labelHeight = 22;
  let from = 0, to = end, cursor = null, box = null;

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const duration = (ns) => {
    const units = [["s", 1e9], ["ms", 1e6], ["us", 1e3], ["ns", 1]];
    const [unit, size] = units.find(([, s]) => Math.abs(ns) >= s) ?? units[3];
    return `${Number((ns / size).toPrecision(4))} ${unit}`;
  };
  // ticks at round times, told so precisely that no two are alike
  const ticks = (width) => {
    const raw = (to - from) / Math.max(2, Math.floor(width / 130));
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw);
    const [unit, size] = [["s", 1e9], ["ms", 1e6], ["us", 1e3], ["ns", 1]].find(([, s]) => Math.max(to, 1) >= s) ?? ["ns", 1];
    const digits = Math.max(0, Math.ceil(-Math.log10(step / size) - 1e-9));
    const made = [];
    for (let t = Math.ceil(from / step) * step; t <= to; t += step) made.push([t, `${(t / size).toFixed(Math.min(digits, 9))} ${unit}`]);
    return made;
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
  // the VM-exit that is handled at segment i: [first segment, number, RIP, begin, end], or null
  const exitAt = (w, i) => {
    if (w.code[i] % n === guest || !w.exits.length) return null;
    const k = position(w.exits, i);
    const begin = w.exits[k];
    if (begin > i) return null;
    let stop = begin;
    while (stop < w.code.length && w.code[stop] % n !== guest) stop++;
    if (i >= stop) return null;
    return { k, begin: w.at[begin], end: w.at[stop], number: w.first === null ? null : w.first + k, rip: data.rips[w.rips[k]], reason: data.reasons[Math.floor(w.code[begin] / n) - 1] };
  };

  const draw = () => {
    const ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = top + data.lanes.length * laneHeight + 6;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.height = `${height}px`;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const inner = width - 2 * left, scale = inner / (to - from), x = (t) => left + (t - from) * scale;
    const colours = data.css.map(style), inks = data.css.map((name) => style(`${name}-ink`) || style("--bg"));
    const text = style("--text"), line = style("--line");
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "alphabetic";
    context.fillStyle = text;
    context.textAlign = "center";
    for (const [t, label] of ticks(inner)) {
      const at = x(t), half = context.measureText(label).width / 2;
      context.fillText(label, Math.min(Math.max(at, left + half), width - left - half), 12);
      context.fillStyle = line;
      context.fillRect(Math.round(at), 16, 1, height - 20);
      context.fillStyle = text;
    }
    for (const b of bins) {
      const y = top + b.lane * laneHeight + labelHeight, tall = laneHeight - labelHeight - 4;
      for (let p = 0; p < inner; p++) {
        const code = b.code[Math.min(b.code.length - 1, Math.floor((from + p / scale) / b.ns))];
        if (code === NOTHING) continue;
        context.fillStyle = colours[code % n];
        context.fillRect(left + p, y, 1, tall);
      }
    }
    for (const { lane, at, code } of windows) {
      if (at[at.length - 1] < from || at[0] > to) continue;
      const y = top + lane * laneHeight + labelHeight, tall = laneHeight - labelHeight - 4;
      let i = position(at, Math.max(from, at[0]));
      while (i < code.length && at[i] <= to) {
        const x0 = Math.max(x(at[i]), left);
        if (x0 >= width - left) break;
        // what shares a pixel is drawn by its shares of the time, from below
        let j = i + 1;
        while (j < code.length && x(at[j]) < x0 + 1) j++;
        const x1 = Math.min(x(at[j]), width - left);
        if (j - i === 1) {
          context.fillStyle = colours[code[i] % n];
          context.fillRect(x0, y, Math.max(x1 - x0, 1), tall);
          if (x1 - x0 > 70) {
            context.fillStyle = inks[code[i] % n];
            context.textAlign = "left";
            context.fillText(nameOf(code[i]).slice(0, Math.floor((x1 - x0) / 6.5)), x0 + 4, y + tall - 4);
          }
        } else {
          const share = new Float64Array(n);
          for (let k = i; k < j; k++) share[code[k] % n] += at[k + 1] - at[k];
          const whole = at[j] - at[i] || 1;
          let base = y + tall;
          for (let part = 0; part < n; part++) {
            const part_tall = (tall * share[part]) / whole;
            if (!part_tall) continue;
            base -= part_tall;
            context.fillStyle = colours[part];
            context.fillRect(x0, base, Math.max(x1 - x0, 1), part_tall);
          }
        }
        i = j;
      }
    }
    context.textAlign = "left";
    data.lanes.forEach((label, lane) => {
      const y = top + lane * laneHeight;
      context.fillStyle = text;
      context.fillText(label, left, y + 11);
      context.strokeStyle = line;
      context.strokeRect(left + 0.5, y + labelHeight + 0.5, inner - 1, laneHeight - labelHeight - 5);
    });
    for (const mark of data.marks) {
      if (mark.at < from || mark.at > to) continue;
      const at = x(mark.at), y = top + mark.lane * laneHeight + 13;
      context.fillStyle = style(mark.kind === "violation" ? "--bad" : "--faint");
      context.beginPath();
      context.moveTo(at - 5, y);
      context.lineTo(at + 5, y);
      context.lineTo(at, y + 8);
      context.fill();
    }
    if (cursor !== null && cursor >= from && cursor <= to) {
      context.fillStyle = text;
      context.fillRect(Math.round(x(cursor)), top - 6, 1, height - top + 2);
    }
    if (box) {
      context.fillStyle = style("--accent");
      context.globalAlpha = 0.22;
      context.fillRect(Math.min(box.a, box.b), top - 4, Math.abs(box.b - box.a), height - top);
      context.globalAlpha = 1;
    }
    canvas.dataset.from = from;
    canvas.dataset.to = to;
  };
  let waiting = 0;
  const remember = () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      const whole = from <= 0 && to >= end;
      try { history.replaceState(null, "", whole ? location.pathname : `#t=${Math.round(from)}-${Math.round(to)}`); } catch { /* some viewers have no history */ }
    }, 200);
  };
  const view = (a, b) => {
    const span = Math.min(Math.max(b - a, 100), end);
    from = Math.min(Math.max(0, (a + b - span) / 2), end - span);
    to = from + span;
    draw();
    remember();
  };
  const zoom = (factor, centre = (from + to) / 2) => view(centre - (centre - from) * factor, centre + (to - centre) * factor);
  const pan = (share) => { const by = (to - from) * share; view(from + by, to + by); };
  const timeAt = (px) => from + ((px - left) / (canvas.clientWidth - 2 * left)) * (to - from);
  const laneAt = (py) => Math.min(Math.max(Math.floor((py - top) / laneHeight), 0), data.lanes.length - 1);
  const find = (lane, t) => windows.find((w) => w.lane === lane && w.at[0] <= t && t < w.at[w.at.length - 1]);
  const tell = (t, lane) => {
    const hit = find(lane, t);
    if (!hit) {
      const b = bins.find((one) => one.lane === lane);
      const code = b ? b.code[Math.min(b.code.length - 1, Math.floor(t / b.ns))] : NOTHING;
      const near = code === NOTHING ? "nothing was recorded" : `mostly ${nameOf(code)} in the ${duration(b.ns)} around`;
      return `${data.lanes[lane] ?? ""}: ${near} ${duration(t)} after the start.`;
    }
    const i = position(hit.at, t), exit = exitAt(hit, i);
    const segment = `${data.parts[hit.code[i] % n]} for ${duration(hit.at[i + 1] - hit.at[i])}, from ${duration(hit.at[i])} after the start`;
    if (!exit) return `${data.lanes[lane]}: ${segment}.`;
    const number = exit.number === null ? "" : ` ${exit.number}`;
    return `${data.lanes[lane]}: VM-exit${number}, ${exit.reason}, ${duration(exit.end - exit.begin)} in all, rip ${exit.rip}; here: ${segment}.`;
  };
  const show = (t, lane) => { cursor = t; details.textContent = tell(t, lane); draw(); };
  const goTo = (lane, ts, dur) => {
    const span = Math.max(dur * 1.6, 4000);
    view(ts - span * 0.3, ts - span * 0.3 + span);
    show(ts + Math.min(dur / 2, 1), lane);
  };
  // the next place after the cursor that the words name: an exit's number, a RIP, or a reason
  const look = (words) => {
    const wanted = words.trim().toLowerCase();
    if (!wanted) return false;
    const start = cursor ?? -1;
    const number = /^\d+$/.test(wanted) ? Number(wanted) : null;
    const reasons = new Set(data.reasons.flatMap((name, i) => (name.toLowerCase().includes(wanted) ? [i] : [])));
    const rips = new Set(data.rips.flatMap((rip, i) => (wanted.startsWith("0x") && rip.includes(wanted) ? [i] : [])));
    let best = null, first = null;
    for (const w of windows) {
      for (let k = 0; k < w.exits.length; k++) {
        const at = w.at[w.exits[k]];
        const hit = number !== null ? w.first !== null && w.first + k === number : rips.has(w.rips[k]) || reasons.has(Math.floor(w.code[w.exits[k]] / n) - 1);
        if (!hit) continue;
        if (first === null || at < first.at) first = { at, w, k };
        if (at > start + 1 && (best === null || at < best.at)) best = { at, w, k };
      }
    }
    const found = best ?? first;
    if (!found) { details.textContent = `No VM-exit here is called ${words}.`; return false; }
    const exit = exitAt(found.w, found.w.exits[found.k]);
    goTo(found.w.lane, found.at, exit ? exit.end - exit.begin : 1000);
    return true;
  };

  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.shiftKey && document.activeElement !== canvas) return; // plain scrolling stays the page's
    event.preventDefault();
    if (event.deltaX && !event.deltaY) pan(Math.sign(event.deltaX) * 0.1);
    else zoom(event.deltaY > 0 ? 1.3 : 1 / 1.3, timeAt(event.offsetX));
  }, { passive: false });
  let grabbed = null;
  canvas.addEventListener("pointerdown", (event) => {
    grabbed = { x: event.offsetX, from, to, moves: event.shiftKey, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!grabbed) { details.textContent = tell(timeAt(event.offsetX), laneAt(event.offsetY)); return; }
    grabbed.moved ||= Math.abs(grabbed.x - event.offsetX) > 3;
    if (grabbed.moves) {
      const by = ((grabbed.x - event.offsetX) / canvas.clientWidth) * (grabbed.to - grabbed.from);
      view(grabbed.from + by, grabbed.to + by);
    } else if (grabbed.moved) { box = { a: grabbed.x, b: event.offsetX }; draw(); }
  });
  canvas.addEventListener("pointerup", (event) => {
    const was = grabbed;
    grabbed = null;
    if (box) {
      const [a, b] = [timeAt(Math.min(box.a, box.b)), timeAt(Math.max(box.a, box.b))];
      box = null;
      view(a, b);
    } else if (was && !was.moved) { canvas.focus(); show(timeAt(event.offsetX), laneAt(event.offsetY)); }
  });
  canvas.addEventListener("dblclick", () => view(0, end));
  canvas.addEventListener("keydown", (event) => {
    const act = { "+": () => zoom(1 / 1.5), "=": () => zoom(1 / 1.5), "-": () => zoom(1.5), ArrowLeft: () => pan(-0.2), ArrowRight: () => pan(0.2), Home: () => view(0, end), 0: () => view(0, end), "/": () => search?.focus(), n: () => look(search?.value ?? "") }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  document.querySelectorAll("[data-zoom]").forEach((button) => button.addEventListener("click", () => {
    if (button.dataset.zoom === "all") view(0, end); else zoom(Number(button.dataset.zoom));
  }));
  document.getElementById("timeline-exit")?.addEventListener("change", (event) => {
    const exit = data.chosen[Number(event.target.value)];
    if (exit && event.target.value !== "") goTo(...exit);
  });
  search?.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); look(search.value); } });
  document.getElementById("timeline-next")?.addEventListener("click", () => look(search?.value ?? ""));
  const fromFragment = () => {
    const asked = /^#t=(\d+)-(\d+)(?:,(\d+))?$/.exec(location.hash);
    if (!asked) return false;
    canvas.closest("details")?.setAttribute("open", "");
    view(Number(asked[1]), Number(asked[2]));
    show((from + to) / 2, Number(asked[3] ?? 0));
    return true;
  };
  window.addEventListener("hashchange", () => { if (fromFragment()) canvas.scrollIntoView({ block: "center" }); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  new ResizeObserver(draw).observe(canvas.parentElement);
  if (!fromFragment()) { from = 0; to = end; draw(); }
  canvas.dataset.ready = "yes";
})();
