"use strict";
// The timeline: levels of detail of a recording on a canvas that zooms to any moment; the view is in the URL's fragment.
// In `kvmtrace view`, what the page does not hold comes from the recording (canvas.dataset.live is its address).
(async () => {
  const canvas = document.getElementById("timeline");
  if (!canvas) return;
  const frame = document.getElementById("timeline-frame"), space = document.getElementById("timeline-space");
  const details = document.getElementById("timeline-details"), search = document.getElementById("timeline-search");
  const tip = document.getElementById("timeline-tip");
  if (typeof DecompressionStream === "undefined") {
    details.textContent = "This browser is too old to draw the timeline.";
    return;
  }
  const text = document.getElementById("timeline-data").textContent;
  const data = await kvmtrace.unpack(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  const { position, duration, exitAt, matcher, NOTHING, TOP: top, LEFT: left } = kvmtrace;
  const laneHeight = kvmtrace.LANE.height, n = data.parts.length, end = data.end, live = canvas.dataset.live;
  const paint = kvmtrace.painter(canvas, data);
  let from = 0, to = end, cursor = null, box = null, lane0 = 0, sharper = null, describes = false; // describes: the words below tell of the cursor

  const layers = () => (sharper && sharper.from <= from && sharper.to >= to ? [data, sharper] : [data]);
  const draw = () => {
    paint(from, to, layers(), { scroll: frame.scrollTop, cursor, box, lanes: data.lanes.length });
    canvas.dataset.from = from;
    canvas.dataset.to = to;
    canvas.dataset.sharp = isSharp() ? "yes" : "";
  };
  const partOf = (code) => data.parts[code % n], reasonOf = (code) => data.reasons[Math.floor(code / n) - 1];

  // --- what the page does not hold
  let asked = 0, waiting = 0;
  const isSharp = () => {
    if (data.complete || layers().length > 1) return true;
    const finest = Math.min(...data.bins.map((b) => b.ns));
    return (to - from) / canvas.clientWidth >= finest;
  };
  const fetchSharper = () => {
    clearTimeout(waiting);
    if (!live || isSharp()) return;
    waiting = setTimeout(async () => {
      const number = ++asked, span = to - from, a = Math.max(0, Math.floor(from - span / 2)), b = Math.min(end, Math.ceil(to + span / 2));
      try {
        const answer = await fetch(`${live}stretch?from=${a}&to=${b}&bins=${Math.min(4096, Math.ceil(canvas.clientWidth * 2))}`);
        const made = await kvmtrace.unpack(await answer.arrayBuffer());
        if (number !== asked) return;
        sharper = { ...made, from: a, to: b };
        if (describes) details.textContent = tell(cursor, lane0);
        draw();
        told();
      } catch { details.textContent = "kvmtrace view has ended: only what the page holds is shown."; }
    }, 80);
  };

  // --- the view
  let remembering = 0;
  const remember = () => {
    clearTimeout(remembering);
    remembering = setTimeout(() => {
      const whole = from <= 0 && to >= end, at = cursor === null ? "" : `,${Math.round(cursor)}`;
      const fragment = `#t=${Math.round(from)}-${Math.round(to)},${lane0}${at}`;
      try { history.replaceState(null, "", whole && cursor === null ? location.pathname + location.search : fragment); } catch { /* some viewers have no history */ }
    }, 200);
  };
  const view = (a, b) => {
    const span = Math.min(Math.max(b - a, 100), end);
    from = Math.min(Math.max(0, (a + b - span) / 2), end - span);
    to = from + span;
    draw();
    fetchSharper();
    remember();
    told();
  };
  const told = () => document.dispatchEvent(new CustomEvent("kvmtrace:view", { detail: { from, to, end } }));
  // all segments of a stretch, null if some are not here: those of the page, or of every lane what was fetched of it
  const windowsOf = (a, b) => {
    if (data.complete) return data.windows;
    return sharper?.whole && sharper.from <= a && sharper.to >= b ? sharper.windows : null;
  };
  kvmtrace.sample = kvmtrace.sampler(data, windowsOf);
  kvmtrace.view = view;
  const zoom = (factor, centre = (from + to) / 2) => view(centre - (centre - from) * factor, centre + (to - centre) * factor);
  const pan = (share) => { const by = (to - from) * share; view(from + by, to + by); };
  const timeAt = (px) => Math.min(Math.max(from + ((px - left) / (canvas.clientWidth - 2 * left)) * (to - from), 0), end);
  const laneAt = (py) => Math.min(Math.max(Math.floor((py - top + frame.scrollTop) / laneHeight), 0), data.lanes.length - 1);

  // --- words
  const windowAt = (lane, t) => {
    for (const layer of layers().reverse()) {
      const found = layer.windows.find((w) => w.lane === lane && w.at[0] <= t && t < w.at[w.at.length - 1]);
      if (found) return found;
    }
    return null;
  };
  const tellBins = (lane, t) => {
    const b = layers().reverse().flatMap((layer) => layer.bins).find((one) => one.lane === lane && one.start <= t && t < one.start + one.n * one.ns);
    const i = b ? Math.floor((t - b.start) / b.ns) : 0;
    if (!b || b.code[i] === NOTHING) return "nothing was recorded";
    const shares = data.parts.map((part, p) => [part, b.shares[p] ? b.shares[p][i] / 255 : 0]).filter(([, share]) => share > 0.004);
    const words = shares.sort((x, y) => y[1] - x[1]).map(([part, share]) => `${part} ${Math.round(share * 100)} %`).join(", ");
    const reason = reasonOf(b.code[i]);
    return `in the ${duration(b.ns)} around: ${words}${reason ? `; longest: ${partOf(b.code[i])}, handling ${reason}` : ""}; ${b.exits[i]} VM-exits, ${b.events[i]} follow-up events`;
  };
  const tell = (t, lane) => {
    const span = (to - from) / canvas.clientWidth;
    const mark = data.marks.filter((m) => m.lane === lane && Math.abs(m.at - t) < 5 * span && m.kind !== "slow")[0];
    const marked = mark ? `${mark.words}. ` : "";
    const w = windowAt(lane, t), name = data.lanes[lane] ?? "";
    if (!w) return `${marked}${name}: ${tellBins(lane, t)}; ${duration(t)} after the start.`;
    const i = position(w.at, t), exit = exitAt(w, i, data.parts);
    const cpu = w.cpus.length ? `, CPU ${w.cpus[position(w.cpuAt, i)]}` : "";
    const level = w.levels.length ? w.levels[position(w.levelAt, i)] : 0;
    const segment = `${partOf(w.code[i])}${level > 1 ? " (L2, a guest's guest)" : level ? " (L1)" : ""} for ${duration(w.at[i + 1] - w.at[i])}${cpu}, from ${duration(w.at[i])} after the start`;
    if (!exit) return `${marked}${name}: ${segment}.`;
    const about = exit.keys.length ? `, ${exit.keys.join(", ")}` : "";
    const number = exit.number === null ? "" : ` ${exit.number}`;
    return `${marked}${name}: VM-exit${number}, ${reasonOf(exit.code) ?? "unknown reason"}${about}, ${duration(exit.end - exit.begin)} in all, rip ${exit.rip}; here: ${segment}.`;
  };
  const show = (t, lane) => {
    cursor = t;
    lane0 = lane;
    const y = lane * laneHeight;
    if (y < frame.scrollTop || y + laneHeight > frame.scrollTop + frame.clientHeight - top) frame.scrollTop = Math.max(y - laneHeight, 0);
    details.textContent = tell(t, lane);
    describes = true;
    draw();
    remember();
  };
  const goTo = (lane, ts, dur, at = ts) => {
    const span = Math.max(dur * 1.6, 4000);
    view(ts - span * 0.3, ts - span * 0.3 + span);
    show(at + Math.min(dur / 2, 1), lane);
  };

  // --- search: the next place behind the cursor
  const places = (words) => {
    const found = [], start = cursor ?? -1;
    const number = /^\d+$/.test(words) ? Number(words) : null;
    const reasons = matcher(words, data.reasons), rips = matcher(words, data.rips), keys = matcher(words, data.keys);
    for (const w of data.windows) {
      for (let k = 0; k < w.exits.length; k++) {
        const reason = Math.floor(w.code[w.exits[k]] / n) - 1;
        if (number !== null ? w.first + k === number : reasons[reason] || rips[w.rips[k]]) found.push([w.at[w.exits[k]], w.lane]);
      }
      if (number === null) for (let e = 0; e < w.eventAt.length; e++) if (keys[w.eventKey[e]]) found.push([w.eventAt[e], w.lane]);
    }
    if (number !== null) found.push(...numbered(number).filter(([, lane]) => !found.some((one) => one[1] === lane)));
    let total = found.length;
    if (!data.complete && number === null) {
      const known = matcher(words, data.places.map(([name]) => name));
      total = 0;
      const cells = new Set();
      data.places.forEach(([, count, lanes, times, own], i) => {
        if (!known[i]) return;
        total += count;
        times.forEach((t, j) => found.push([t, lanes[j]]));
        // up to the last of those times every place is told
        for (const cell of own) if ((Math.floor(cell / data.lanes.length) + 1) * data.cell > times[times.length - 1]) cells.add(cell);
      });
      for (const cell of cells) found.push([(Math.floor(cell / data.lanes.length) + 0.5) * data.cell, cell % data.lanes.length, data.cell]);
    }
    found.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    const next = found.find(([t]) => t > start + 1) ?? found[0];
    return next ? { at: next[0], lane: next[1], within: next[2] ?? 0, total: Math.max(total, 1) } : null;
  };
  // in which bin of each lane a VM-exit's number falls
  const numbered = (number) => (data.complete ? [] : data.bins.flatMap((b) => {
    let seen = b.before;
    for (let i = 0; i < b.n; i++) {
      if (number > seen && number <= seen + b.exits[i]) return [[b.start + (i + 0.5) * b.ns, b.lane]];
      seen += b.exits[i];
    }
    return [];
  }));
  const look = async (words) => {
    const wanted = words.trim();
    if (!wanted) return;
    let found = null;
    if (live) {
      try { found = await (await fetch(`${live}find?words=${encodeURIComponent(wanted)}&after=${Math.round(cursor ?? -1)}`)).json(); } catch { found = places(wanted); }
    } else found = places(wanted);
    if (!found) {
      describes = false;
      details.textContent = data.unnamed ? `Nothing that this page names is called ${wanted}; it leaves out ${data.unnamed.toLocaleString("en")} rare addresses, which kvmtrace view finds.` : `Nothing in this recording is called ${wanted}.`;
      return;
    }
    const w = windowAt(found.lane, found.at), exit = w ? exitAt(w, position(w.at, found.at), data.parts) : null;
    const finest = data.bins.find((b) => b.lane === found.lane)?.ns ?? 2500;
    if (exit) goTo(found.lane, exit.begin, exit.end - exit.begin, found.at);
    else if (found.dur !== undefined) goTo(found.lane, found.begin, found.dur, found.at);
    else { const around = Math.max(finest * 20, found.within ?? 0); view(found.at - around, found.at + around); show(found.at, found.lane); }
    if (live || found.total < 2) return;
    describes = false;
    const place = found.within ? `, somewhere in the ${duration(found.within)} around: kvmtrace view tells where` : "";
    details.textContent += ` One of ${found.total.toLocaleString("en")}${place}.`;
  };

  // --- pointer, keys, buttons
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.shiftKey && document.activeElement !== canvas) return; // plain scrolling stays the page's
    event.preventDefault();
    if (event.deltaX && !event.deltaY) pan(Math.sign(event.deltaX) * 0.1);
    else zoom(event.deltaY > 0 ? 1.3 : 1 / 1.3, timeAt(event.offsetX));
  }, { passive: false });
  let grabbed = null;
  const hover = (event) => {
    tip.textContent = tell(timeAt(event.offsetX), laneAt(event.offsetY));
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(event.offsetX + 14, canvas.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${event.offsetY + canvas.offsetTop + 18}px`;
  };
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("pointerdown", (event) => {
    grabbed = { x: event.offsetX, from, to, moves: event.shiftKey, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!grabbed) { hover(event); return; }
    tip.hidden = true;
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
    } else if (was && !was.moved) { canvas.focus({ preventScroll: true }); show(timeAt(event.offsetX), laneAt(event.offsetY)); }
  });
  canvas.addEventListener("dblclick", () => view(0, end));
  const steps = { ArrowUp: -1, ArrowDown: 1 };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const lane = Math.min(Math.max(lane0 + (steps[event.key] ?? 0), 0), data.lanes.length - 1);
    const act = { "+": () => zoom(1 / 1.5), "=": () => zoom(1 / 1.5), "-": () => zoom(1.5), ArrowLeft: () => pan(-0.2), ArrowRight: () => pan(0.2), ArrowUp: () => show(cursor ?? (from + to) / 2, lane), ArrowDown: () => show(cursor ?? (from + to) / 2, lane), ",": () => step(-1), ".": () => step(1), Home: () => view(0, end), 0: () => view(0, end), "/": () => search?.focus(), n: () => look(search?.value ?? "") }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  // to the segment before or behind the cursor's
  const step = (by) => {
    const t = cursor ?? (from + to) / 2, w = windowAt(lane0, t);
    if (!w) { pan(by * 0.2); return; }
    const i = Math.min(Math.max(position(w.at, t) + by, 0), w.code.length - 1), middle = (w.at[i] + w.at[i + 1]) / 2;
    if (middle < from || middle > to) view(middle - (to - from) / 2, middle + (to - from) / 2);
    show(middle, lane0);
  };
  document.querySelectorAll("[data-zoom]").forEach((button) => button.addEventListener("click", () => {
    if (button.dataset.zoom === "all") view(0, end); else zoom(Number(button.dataset.zoom));
  }));
  document.getElementById("timeline-exit")?.addEventListener("change", (event) => {
    const exit = data.chosen[Number(event.target.value)];
    if (exit && event.target.value !== "") goTo(...exit);
  });
  search?.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); look(search.value); } });
  document.getElementById("timeline-next")?.addEventListener("click", () => look(search?.value ?? ""));
  frame.addEventListener("scroll", draw, { passive: true });

  const fromFragment = () => {
    const wanted = /^#t=(\d+)-(\d+)(?:,(\d+))?(?:,(\d+))?$/.exec(location.hash);
    if (!wanted) return false;
    canvas.closest("details")?.setAttribute("open", "");
    view(Number(wanted[1]), Number(wanted[2]));
    const lane = Math.min(Number(wanted[3] ?? 0), data.lanes.length - 1);
    show(wanted[4] ? Number(wanted[4]) : (from + to) / 2, lane);
    return true;
  };
  const size = () => {
    const wanted = top + data.lanes.length * laneHeight + 6;
    space.style.height = `${wanted}px`;
    canvas.style.height = `${Math.min(wanted, frame.clientHeight || wanted)}px`;
    draw();
  };
  window.addEventListener("hashchange", () => { if (fromFragment()) canvas.scrollIntoView({ block: "center" }); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  frame.style.height = `${Math.min(top + data.lanes.length * laneHeight + 8, 620)}px`;
  new ResizeObserver(size).observe(frame);
  size();
  if (!fromFragment()) view(0, end);
  canvas.dataset.ready = "yes";
})();
