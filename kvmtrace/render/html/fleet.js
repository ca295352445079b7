"use strict";
(() => {
  const element = document.getElementById("heat-data");
  if (!element) return;
  const data = JSON.parse(element.textContent);
  const bytes = Uint8Array.from(atob(data.levels), (c) => c.charCodeAt(0));
  const columns = data.reasons.length, rowHeight = 16, headHeight = 96, labelWidth = 190;
  const unlike = new Set(data.unlike);
  const frame = document.getElementById("heat-frame"), space = document.getElementById("heat-space");
  const canvas = document.getElementById("heat"), pen = canvas.getContext("2d");
  const sort = document.getElementById("heat-sort"), search = document.getElementById("heat-search");
  const shown = document.getElementById("heat-shown"), hover = document.getElementById("heat-hover");
  let order = data.hosts.map((_, i) => i);

  const option = (value, text) => { const o = document.createElement("option"); o.value = value; o.textContent = text; sort.append(o); };
  option("unlike", "unlike their peers first"); option("host", "host"); option("group", "kernel and CPU model");
  data.reasons.forEach((name, i) => option(String(i), name));

  const share = (level) => level === 0 ? null : data.faintest ** (1 - (level - 1) / 254);
  const percent = (value) => value === null ? "none" : value >= 0.001 ? (value * 100).toFixed(1) + " %" : "<0.1 %";

  function arrange() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    order = data.hosts.map((_, i) => i).filter((i) => {
      const text = (data.hosts[i] + " " + data.groups[i]).toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const by = sort.value;
    const compare = by === "unlike" ? (a, b) => unlike.has(b) - unlike.has(a)
      : by === "host" ? (a, b) => data.hosts[a] < data.hosts[b] ? -1 : 1
      : by === "group" ? (a, b) => data.groups[a] < data.groups[b] ? -1 : data.groups[a] > data.groups[b] ? 1 : 0
      : (a, b) => bytes[b * columns + Number(by)] - bytes[a * columns + Number(by)];
    order.sort((a, b) => compare(a, b) || a - b);
    shown.textContent = order.length === data.hosts.length ? `${order.length} hosts` : `${order.length} of ${data.hosts.length} hosts`;
    space.style.height = Math.max(headHeight + order.length * rowHeight, 518) + "px";
    frame.scrollTop = 0;
    draw();
  }

  function draw() {
    const style = getComputedStyle(document.documentElement), ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * ratio; canvas.height = height * ratio;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.fillStyle = style.getPropertyValue("--bg"); pen.fillRect(0, 0, width, height);
    const text = style.getPropertyValue("--text"), cell = (width - labelWidth) / columns;
    pen.font = "11px system-ui, sans-serif"; pen.textBaseline = "middle";
    const first = Math.floor(frame.scrollTop / rowHeight), offset = frame.scrollTop % rowHeight;
    for (let line = 0; line <= (height - headHeight) / rowHeight + 1; line++) {
      const row = order[first + line];
      if (row === undefined) break;
      const y = headHeight + line * rowHeight - offset;
      for (let c = 0; c < columns; c++) {
        const level = bytes[row * columns + c];
        if (level) { pen.fillStyle = `rgba(0, 114, 178, ${0.05 + 0.95 * level / 255})`; pen.fillRect(labelWidth + c * cell, y, Math.max(cell - 1, 1), rowHeight - 1); }
      }
      pen.fillStyle = text; pen.textAlign = "left";
      pen.fillText((unlike.has(row) ? "\u25cf " : "") + data.hosts[row], 4, y + rowHeight / 2, labelWidth - 8);
    }
    pen.fillStyle = style.getPropertyValue("--bg"); pen.fillRect(0, 0, width, headHeight);
    pen.fillStyle = text;
    data.reasons.forEach((name, c) => {
      pen.save(); pen.translate(labelWidth + (c + 0.5) * cell, headHeight - 4); pen.rotate(-Math.PI / 3);
      pen.textAlign = "left"; pen.fillText(name, 0, 0, headHeight + 6); pen.restore();
    });
  }

  function tell(event) {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const column = Math.floor((x - labelWidth) / ((canvas.clientWidth - labelWidth) / columns));
    const row = order[Math.floor((y - headHeight + frame.scrollTop) / rowHeight)];
    if (row === undefined || y < headHeight) { hover.textContent = "\u00a0"; return; }
    const what = column >= 0 && column < columns ? `, ${data.reasons[column]}: ${percent(share(bytes[row * columns + column]))} of vCPU time` : "";
    hover.textContent = `${data.hosts[row]} (${data.groups[row]})${what}`;
  }

  frame.addEventListener("scroll", draw, { passive: true });
  window.addEventListener("resize", draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  canvas.addEventListener("mousemove", tell);
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 20, PageUp: -20 }, step = steps[event.key];
    if (event.key === "Home") frame.scrollTop = 0; else if (event.key === "End") frame.scrollTop = space.clientHeight;
    else if (step) frame.scrollTop += step * rowHeight; else return;
    event.preventDefault();
  });
  sort.addEventListener("change", arrange);
  search.addEventListener("input", arrange);
  function follow() {
    const match = /^#host=(.+)$/.exec(location.hash);
    if (!match) return;
    try { search.value = decodeURIComponent(match[1]); } catch { return; }
    arrange();
    document.getElementById("heat-map").scrollIntoView();
  }
  window.addEventListener("hashchange", follow);
  arrange();
  follow();
})();
