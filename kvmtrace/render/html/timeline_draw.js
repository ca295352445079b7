"use strict";
// Draws the lanes of a stretch of time: of each vCPU what it did, on which CPU, and its follow-up events.
kvmtrace.LANE = { height: 66, label: 20, state: 26, level: 5, cpu: 6, events: 8 };
kvmtrace.TOP = 24;
kvmtrace.LEFT = 8;
kvmtrace.painter = (canvas, data) => {
  const { height: laneHeight, label: labelHeight, state: stateHeight, level: levelHeight, cpu: cpuHeight, events: eventsHeight } = kvmtrace.LANE;
  const { TOP: top, LEFT: left, NOTHING, position } = kvmtrace;
  const context = canvas.getContext("2d"), n = data.parts.length;
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const nameOf = (code) => {
    const part = data.parts[code % n], reason = Math.floor(code / n) - 1;
    return reason < 0 ? part : `${part}, handling ${data.reasons[reason]}`;
  };
  const ticks = (from, to, width) => {
    const raw = (to - from) / Math.max(2, Math.floor(width / 130)), power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw), made = [];
    for (let t = Math.ceil(from / step) * step; t <= to; t += step) made.push(t);
    return kvmtrace.timeLabels(made, step, to).map((label, i) => [made[i], label]);
  };
  const cpuColour = (cpu) => `hsl(${(cpu * 67 + 200) % 360} 55% 55%)`;

  // one stacked column: shares of the parts, from below
  const column = (x, width, y, share, whole, colours) => {
    let base = y + stateHeight;
    for (let part = 0; part < n; part++) {
      if (!share[part]) continue;
      const tall = (stateHeight * share[part]) / whole;
      base -= tall;
      context.fillStyle = colours[part];
      context.fillRect(x, base, width, tall);
    }
  };
  // covered: [begin, end] that segments tell
  const drawBins = (b, view, y, colours, text, covered) => {
    const share = new Float64Array(n);
    for (let p = 0; p < view.inner; p++) {
      const t = view.from + p / view.scale;
      let i = Math.floor((t - b.start) / b.ns);
      const stop = Math.min(Math.max(Math.ceil((t + 1 / view.scale - b.start) / b.ns), i + 1), b.n);
      if (i < 0 || i >= b.n || covered.some(([begin, stop]) => begin <= t && t < stop)) continue;
      const whole = (stop - i) * 255;
      let events = 0;
      const cpu = b.cpu[i], cell = i;
      share.fill(0);
      for (; i < stop; i++) {
        events += b.events[i];
        for (let part = 0; part < n; part++) if (b.shares[part]) share[part] += b.shares[part][i];
      }
      column(left + p, 1, y, share, whole, colours);
      if (cpu !== NOTHING) { context.fillStyle = cpuColour(cpu); context.fillRect(left + p, y + stateHeight + 1, 1, cpuHeight); }
      if (b.levels[cell] > 1) stripe(left + p, 1, y);
      if (events) tick(left + p, y, events, text);
    }
  };
  const tick = (x, y, events, text) => {
    const tall = Math.min(eventsHeight, 3 + Math.log2(events + 1) * 1.5);
    context.fillStyle = text;
    context.fillRect(x, y + stateHeight + cpuHeight + 3 + eventsHeight - tall, 1, tall);
  };
  const drawSegments = (w, view, y, colours, inks, text) => {
    const { at, code } = w, { x, from, to, right } = view;
    const share = new Float64Array(n);
    let i = position(at, Math.max(from, at[0]));
    while (i < code.length && at[i] <= to) {
      const x0 = Math.max(x(at[i]), left);
      if (x0 >= right) break;
      let j = i + 1;
      while (j < code.length && x(at[j]) < x0 + 1) j++;
      const x1 = Math.min(x(at[j]), right);
      if (j - i === 1) {
        context.fillStyle = colours[code[i] % n];
        context.fillRect(x0, y, Math.max(x1 - x0, 1), stateHeight);
        const room = Math.floor((x1 - x0) / 6.5);
        if (room > 10) {
          context.fillStyle = inks[code[i] % n];
          context.textAlign = "left";
          context.fillText(nameOf(code[i]).slice(0, room), x0 + 4, y + stateHeight - 9);
        }
      } else {
        share.fill(0);
        for (let k = i; k < j; k++) share[code[k] % n] += at[k + 1] - at[k];
        column(x0, Math.max(x1 - x0, 1), y, share, at[j] - at[i] || 1, colours);
      }
      i = j;
    }
    drawLevels(w, view, y);
    drawCpus(w, view, y);
    drawEvents(w, view, y, text);
  };
  // a stripe within the top of the lane where the guest is one of a guest's
  const drawLevels = (w, { x, from, to, right }, y) => {
    for (let k = 0; k < w.levels.length; k++) {
      const begin = w.at[w.levelAt[k]], end = w.at[k + 1 < w.levels.length ? w.levelAt[k + 1] : w.at.length - 1];
      if (w.levels[k] < 2 || end < from || begin > to) continue;
      const x0 = Math.max(x(begin), left);
      stripe(x0, Math.max(Math.min(x(end), right) - x0, 1), y);
    }
  };
  const stripe = (x, width, y) => {
    context.fillStyle = style("--level");
    context.fillRect(x, y, width, levelHeight);
  };
  const drawCpus = (w, { x, from, to, right }, y) => {
    if (!w.cpus.length) return;
    for (let k = 0; k < w.cpus.length; k++) {
      const begin = w.at[w.cpuAt[k]], end = w.at[k + 1 < w.cpus.length ? w.cpuAt[k + 1] : w.at.length - 1];
      if (end < from) continue;
      if (begin > to) break;
      const x0 = Math.max(x(begin), left);
      context.fillStyle = cpuColour(w.cpus[k]);
      context.fillRect(x0, y + stateHeight + 1, Math.max(Math.min(x(end), right) - x0, 1), cpuHeight);
    }
  };
  const drawEvents = (w, { x, from, to }, y, text) => {
    if (!w.eventAt.length) return;
    let e = position(w.eventAt, from), free = -1;
    if (w.eventAt[e] < from) e++;
    while (e < w.eventAt.length && w.eventAt[e] <= to) {
      const px = Math.round(x(w.eventAt[e]));
      let stop = e + 1;
      while (stop < w.eventAt.length && Math.round(x(w.eventAt[stop])) === px) stop++;
      tick(px, y, stop - e, text);
      const words = w.of.keys[w.eventKey[e]];
      const room = x(stop < w.eventAt.length ? w.eventAt[stop] : w.at[w.at.length - 1]) - px;
      if (px > free && room > words.length * 6.2 + 10) {
        context.textAlign = "left";
        context.fillText(words, px + 3, y + stateHeight + cpuHeight + eventsHeight + 4);
        free = px + words.length * 6.2;
      }
      e = stop;
    }
  };
  const drawMark = (mark, view, y) => {
    const at = view.x(mark.at);
    context.fillStyle = style({ violation: "--bad", suspicion: "--warn" }[mark.kind] ?? "--faint");
    context.beginPath();
    context.moveTo(at - 5, y - 7);
    context.lineTo(at + 5, y - 7);
    context.lineTo(at, y);
    context.fill();
  };
  const drawAxis = (view, height, text, line) => {
    context.textAlign = "center";
    for (const [t, label] of ticks(view.from, view.to, view.inner)) {
      const at = view.x(t), half = context.measureText(label).width / 2;
      context.fillStyle = text;
      context.fillText(label, Math.min(Math.max(at, left + half), view.right - half), 12);
      context.fillStyle = line;
      context.fillRect(Math.round(at), 16, 1, height - 20);
    }
  };
  // layers: several times {windows, bins}, the later ones sharper
  return (from, to, layers, { scroll, cursor, box, lanes }) => {
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const inner = width - 2 * left, scale = inner / (to - from);
    const view = { from, to, inner, scale, right: width - left, x: (t) => left + (t - from) * scale };
    const colours = data.css.map(style), inks = data.css.map((name) => style(`${name}-ink`) || style("--bg"));
    const text = style("--text"), line = style("--line");
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "alphabetic";
    drawAxis(view, height, text, line);
    const first = Math.floor(scroll / laneHeight), last = Math.min(Math.ceil((scroll + height - top) / laneHeight), lanes);
    context.save();
    context.beginPath();
    context.rect(0, top - 6, width, height);
    context.clip();
    for (let lane = first; lane < last; lane++) {
      const y = top + lane * laneHeight - scroll + labelHeight;
      // the sharpest layer that has something of this lane
      const layer = layers.findLast((one) => one.bins.some((b) => b.lane === lane) || one.windows.some((w) => w.lane === lane));
      const windows = layer?.windows.filter((w) => w.lane === lane && w.at[w.at.length - 1] >= from && w.at[0] <= to) ?? [];
      const covered = windows.map((w) => [w.at[0], w.at[w.at.length - 1]]);
      for (const b of layer?.bins ?? []) if (b.lane === lane) drawBins(b, view, y, colours, text, covered);
      for (const w of windows) drawSegments(w, view, y, colours, inks, text);
      context.textAlign = "left";
      context.fillStyle = text;
      context.fillText(data.lanes[lane], left, y - 9);
      context.strokeStyle = line;
      context.strokeRect(left + 0.5, y + 0.5, inner - 1, stateHeight + cpuHeight);
      for (const mark of data.marks) if (mark.lane === lane && mark.at >= from && mark.at <= to) drawMark(mark, view, y);
    }
    if (cursor !== null && cursor >= from && cursor <= to) {
      context.fillStyle = text;
      context.fillRect(Math.round(view.x(cursor)), top - 6, 1, height);
    }
    context.restore();
    if (box) {
      context.fillStyle = style("--accent");
      context.globalAlpha = 0.22;
      context.fillRect(Math.min(box.a, box.b), top - 4, Math.abs(box.b - box.a), height - top);
      context.globalAlpha = 1;
    }
  };
};
