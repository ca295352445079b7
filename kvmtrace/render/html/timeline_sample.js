"use strict";
// What the charts over time show of a stretch, from the timeline's segments: as sharp as one zooms.
// Returns null where the segments of that stretch are not all here.
kvmtrace.sampler = (data, windowsOf) => {
  const GUEST = 0, n = data.parts.length, vmm = data.parts.indexOf("VMM");
  const pauses = new Set(["preempted", "blocked"].map((name) => data.parts.indexOf(name)));
  const quantile = (sorted, share) => sorted[Math.max(Math.ceil(share * sorted.length), 1) - 1];

  // VM-exits that begin in the stretch: when, and how long to the next VM-entry (null: it is not here)
  const exits = (w, from, to, add) => {
    let stop = 0;
    for (let k = 0; k < w.exits.length; k++) {
      const begin = w.exits[k], next = k + 1 < w.exits.length ? w.exits[k + 1] : w.code.length;
      if (w.at[begin] < from || w.at[begin] >= to) continue;
      stop = Math.max(stop, begin);
      while (stop < next && (stop === begin || w.code[stop] % n !== GUEST)) stop++;
      add(w.at[begin], stop < next ? w.at[stop] - w.at[begin] : null);
    }
  };
  // times at which the VMM begins to run; being switched out meanwhile is no second time
  const stays = (w, from, to, add) => {
    let inside = false;
    for (let i = kvmtrace.position(w.at, from); i < w.code.length && w.at[i] < to; i++) {
      const part = w.code[i] % n;
      if (part === vmm && !inside && w.at[i] >= from) add(w.at[i]);
      inside = part === vmm || (inside && pauses.has(part));
    }
  };
  return (from, to, count) => {
    const windows = windowsOf(from, to);
    if (!windows) return null;
    const step = (to - from) / count, of = (t) => Math.min(Math.floor((t - from) / step), count - 1);
    const made = { x: [], exits: new Array(count).fill(0), userspace: new Array(count).fill(0), p50: [], p99: [], max: [], ns: step };
    const took = Array.from({ length: count }, () => []);
    for (const w of windows) {
      exits(w, from, to, (t, ns) => { made.exits[of(t)]++; if (ns !== null) took[of(t)].push(ns); });
      stays(w, from, to, (t) => { made.userspace[of(t)]++; });
    }
    for (let i = 0; i < count; i++) {
      made.x.push(from + (i + 0.5) * step);
      made.exits[i] *= 1e9 / step;
      made.userspace[i] *= 1e9 / step;
      const sorted = took[i].sort((a, b) => a - b), none = !sorted.length;
      made.p50.push(none ? null : quantile(sorted, 0.5));
      made.p99.push(none ? null : quantile(sorted, 0.99));
      made.max.push(none ? null : sorted[sorted.length - 1]);
    }
    return made;
  };
};
