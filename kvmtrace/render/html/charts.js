"use strict";
// The charts (uPlot): made when they come into sight, zoomed together with the timeline.
(() => {
  const source = document.getElementById("charts-data");
  if (!source) return;
  const charts = JSON.parse(source.textContent), made = new Map();
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const duration = kvmtrace.duration;
  const short = (value) => { const [size, unit] = [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([s]) => Math.abs(value) >= s) ?? [1, ""]; return `${Number((value / size).toPrecision(3))}${unit}`; };
  const told = (chart, value) => (value === null || value === undefined ? "-" : chart.unit === "%" ? `${value} %` : chart.unit === "ns" ? duration(value) : chart.unit === "per second" ? `${short(value)}/s` : value.toLocaleString("en"));
  const zoomed = new Map();
  let sets = false;
  const round = Array.from({ length: 57 }, (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3));

  const options = (chart, width) => ({
    width, height: 230,
    cursor: { sync: chart.kind === "time" ? { key: "time" } : undefined, drag: { x: true, y: false } },
    scales: {
      x: { time: false, range: (u, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
      y: { distr: chart.log ? 3 : 1, range: chart.log ? undefined : (u, low, high) => [0, Math.max(high * 1.06, 1)] },
    },
    axes: [
      { stroke: () => style("--text"), grid: { stroke: () => style("--line"), width: 1 }, ticks: { stroke: () => style("--line") }, space: 110, values: (u, splits) => (chart.kind === "time" ? kvmtrace.timeLabels(splits, splits[1] - splits[0] || 1, splits[splits.length - 1]) : splits.map((v) => duration(Math.round(2 ** v)))), incrs: round, splits: chart.kind === "durations" ? durations : undefined },
      { stroke: () => style("--text"), grid: { stroke: () => style("--line"), width: 1 }, ticks: { stroke: () => style("--line") }, size: 68, incrs: chart.unit === "samples" ? round.filter((step) => step >= 1) : undefined, splits: chart.log ? decades : undefined, filter: (u, splits) => splits, values: (u, splits) => splits.map((v) => (chart.unit === "ns" ? duration(v) : short(v))) },
    ],
    series: [
      { label: chart.kind === "time" ? "after the start" : "took", value: (u, v) => (v === null ? "-" : duration(chart.kind === "time" ? v : Math.round(2 ** v))) },
      ...chart.series.map((one) => ({
        label: one.label, stroke: () => style(one.colour), width: 1.6, dash: one.dashed ? [3, 3] : undefined,
        fill: chart.bars ? () => style(one.colour) : undefined, paths: chart.bars ? uPlot.paths.bars({ size: [0.92, 60] }) : undefined,
        spanGaps: false, points: chart.bars ? { show: false } : { size: 4 }, value: (u, v) => told(chart, v),
      })),
    ],
    hooks: { setScale: [(u, key) => { if (key === "x" && chart.kind === "time" && !sets) follow(u.scales.x.min, u.scales.x.max, chart.end); }] },
  });
  // durations at round places: decades, with 2 and 5 of each where there is room
  const durations = (u, axis, low, high) => {
    const room = Math.max(2, Math.floor(u.bbox.width / devicePixelRatio / 70));
    for (const steps of [[1, 2, 5], [1]]) {
      const found = [];
      for (let power = 0; power < 19; power++) found.push(...steps.map((k) => Math.log2(k * 10 ** power)).filter((at) => at >= low && at <= high));
      if (found.length <= room) return found;
    }
    return [low, high];
  };
  const decades = (u, axis, low, high) => {
    for (const steps of [[1], [1, 2, 5]]) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) found.push(...steps.map((k) => k * 10 ** power).filter((at) => at >= low * 0.999 && at <= high * 1.001));
      if (found.length > 1) return found;
    }
    return [low, high];
  };
  // a stretch chosen in one chart is that of all of them, and of the timeline
  const follow = (from, to, end) => {
    const now = zoomed.get("time") ?? [0, end];
    if (Math.abs(now[0] - from) < 1 && Math.abs(now[1] - to) < 1) return;
    if (kvmtrace.view) kvmtrace.view(from, to); else setTime(from, to);
  };
  // points of the stretch that is shown: from the timeline's segments where those are sharper and here
  const SHARP = 400;
  let sampled = null;
  const sharper = (chart, from, to) => {
    if (!chart.bin || !kvmtrace.sample || (to - from) / SHARP >= chart.bin / 2) return null;
    if (sampled?.from !== from || sampled.to !== to || !sampled.made) sampled = { from, to, made: kvmtrace.sample(from, to, SHARP) };
    return sampled.made;
  };
  const stretch = (figure, u, from, to) => {
    const chart = charts[figure.dataset.chart], found = sharper(chart, from, to);
    const data = found ? [found.x, ...chart.series.map((one) => found[one.of])] : [chart.x, ...chart.series.map((one) => one.values)];
    u.batch(() => { u.setData(data, false); u.setScale("x", { min: from, max: to }); });
    const each = found ? found.ns : chart.bin, note = figure.querySelector(".each");
    if (!note || !each) return;
    const coarse = !found && (to - from) / each < 60;
    note.textContent = `, a point for every ${duration(each)}${coarse ? " (the sharpest that this page has; kvmtrace view has all)" : ""}`;
    figure.dataset.each = each;
  };
  const setTime = (from, to) => {
    zoomed.set("time", [from, to]);
    sets = true;
    for (const [figure, u] of made) {
      if (charts[figure.dataset.chart].kind === "time") stretch(figure, u, from, to);
      figure.dataset.from = u.scales.x.min;
      figure.dataset.to = u.scales.x.max;
    }
    sets = false;
  };
  document.addEventListener("kvmtrace:view", ({ detail }) => setTime(detail.from, detail.to));

  const make = (figure) => {
    const chart = charts[figure.dataset.chart], width = Math.floor(figure.clientWidth);
    if (width < 40) return;
    const known = made.get(figure);
    if (known) { if (known.width !== width) known.setSize({ width, height: 230 }); return; }
    sets = true;
    const u = new uPlot(options(chart, width), [chart.x, ...chart.series.map((one) => one.values)], figure);
    const [min, max] = zoomed.get("time") ?? [0, chart.end];
    if (chart.kind === "time") {
      figure.querySelector("figcaption").insertAdjacentHTML("beforeend", '<span class="each faint"></span>');
      stretch(figure, u, min, max);
    }
    sets = false;
    u.over.addEventListener("dblclick", () => { if (chart.kind === "time") (kvmtrace.view ?? setTime)(0, chart.end); });
    figure.dataset.ready = "yes";
    made.set(figure, u);
  };
  const watcher = new ResizeObserver((seen) => seen.forEach(({ target }) => make(target)));
  document.querySelectorAll("figure[data-chart]").forEach((figure) => watcher.observe(figure));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { for (const u of made.values()) u.redraw(false, true); });
})();
