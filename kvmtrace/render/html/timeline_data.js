"use strict";
// What Python packed (timeline_data.py): its length, words as JSON, then numbers; all of it deflated.
kvmtrace.NOTHING = 0xffff;
kvmtrace.unpack = async (packed) => {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = new DataView(bytes.buffer).getUint32(0, true);
  const data = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
  let offset = 4 + size;
  const read = (count, width) => {
    const made = new Uint32Array(count);
    for (let byte = 0; byte < width; byte++, offset += count) {
      for (let i = 0; i < count; i++) made[i] |= bytes[offset + i] << (8 * byte);
    }
    return made;
  };
  const summed = (steps, Kind, start = 0, far = []) => {
    const more = new Map(far), made = new Kind(steps.length);
    let sum = start;
    for (let i = 0; i < steps.length; i++) made[i] = sum += more.get(i) ?? steps[i];
    return made;
  };
  data.windows = data.windows.map((w) => {
    const ends = summed(read(w.n, 4), Float64Array, w.start, w.long);
    const at = new Float64Array(w.n + 1);
    at[0] = w.start;
    at.set(ends, 1);
    const code = read(w.n, 2), cpuAt = summed(read(w.cpus, 4), Uint32Array), cpus = read(w.cpus, 2);
    const levelAt = summed(read(w.levels, 4), Uint32Array), levels = read(w.levels, 1);
    const exits = summed(read(w.exits, 4), Uint32Array), rips = read(w.exits, 4).map((i) => i);
    const eventAt = summed(read(w.events, 4), Float64Array, w.start, w.far), eventKey = read(w.events, 4);
    return { lane: w.lane, first: w.first, at, code, cpuAt, cpus, levelAt, levels, exits, rips, eventAt, eventKey, of: data };
  });
  data.bins = data.bins.map((b) => {
    const shares = [];
    for (const part of b.parts) { shares[part] = bytes.subarray(offset, offset + b.n); offset += b.n; }
    return { lane: b.lane, start: b.start, ns: b.ns, n: b.n, before: b.before, shares, code: read(b.n, 2), cpu: read(b.n, 2), levels: read(b.levels, 1), exits: read(b.n, 4), events: read(b.n, 4) };
  });
  // each place's cells: number of the stretch * lanes + lane
  const steps = read((data.places ?? []).reduce((sum, place) => sum + place[4], 0), 4);
  let used = 0;
  for (const place of data.places ?? []) {
    const own = steps.subarray(used, used + place[4]);
    used += place[4];
    place[4] = summed(own, Float64Array);
  }
  data.nested = [...data.windows, ...data.bins].some((one) => one.levels.length);
  return data;
};
// the largest i with at[i] <= t, 0 if there is none
kvmtrace.position = (at, t) => {
  let low = 0, high = at.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (at[middle] <= t) low = middle; else high = middle - 1;
  }
  return low;
};
// the VM-exit that is handled at segment i of a window, or null
kvmtrace.exitAt = (w, i, parts) => {
  const guest = 0, n = parts.length;
  if (w.code[i] % n === guest || !w.exits.length) return null;
  const k = kvmtrace.position(w.exits, i), begin = w.exits[k];
  if (begin > i) return null;
  let stop = begin;
  while (stop < w.code.length && (stop === begin || w.code[stop] % n !== guest) && !(k + 1 < w.exits.length && stop >= w.exits[k + 1])) stop++;
  if (i >= stop) return null;
  const from = w.at[begin], to = w.at[stop], keys = [];
  if (w.eventAt.length) {
    let e = kvmtrace.position(w.eventAt, from);
    if (w.eventAt[e] < from) e++;
    for (; e < w.eventAt.length && w.eventAt[e] < Math.max(to, from + 1) && keys.length < 3; e++) keys.push(w.of.keys[w.eventKey[e]]);
  }
  return { begin: from, end: to, number: w.first === null ? null : w.first + k, rip: w.of.rips[w.rips[k]], code: w.code[begin], keys };
};
// what words in the search field mean: words of a name; a number in hexadecimal is meant as a whole, if there is such a one
kvmtrace.matcher = (words, names) => {
  const wanted = words.trim().toLowerCase(), lower = names.map((name) => name.toLowerCase());
  if (wanted.startsWith("0x")) {
    const whole = lower.map((name) => name.split(/[^0-9a-z_]+/).includes(wanted));
    if (whole.some(Boolean)) return whole;
  }
  return lower.map((name) => name.includes(wanted));
};
