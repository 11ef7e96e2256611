// @ts-check
/** Pure functions of the page: no DOM, no network. Tested with `node --test`. */

/** Bias-corrected exponential moving average; `share` 0 leaves the values as they are.
 * @param {(number|null)[]} values @param {number} share @returns {(number|null)[]} */
export function smooth(values, share) {
  let mean = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = share * mean + (1 - share) * value;
    weight = share * weight + (1 - share);
    return mean / weight;
  });
}

/** @param {number|null|undefined} value */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return String(value).replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");
  return Math.abs(value) >= 1000 ? number(Math.round(value)) : String(Number(value.toPrecision(4)));
}

/** @param {number} bytes */
export function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (bytes >= 1000 && at < units.length - 1) { bytes /= 1000; at += 1; }
  return `${at ? Number(bytes.toPrecision(3)) : Math.round(bytes)} ${units[at]}`;
}

/** @param {number} seconds */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${whole % 60} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** Cut a stream of text into the data of server-sent events.
 * @returns {(text: string) => string[]} */
export function eventReader() {
  let rest = "";
  return (text) => {
    const parts = (rest + text).split("\n\n");
    rest = parts.pop() ?? "";
    return parts.flatMap((part) => part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)));
  };
}

/** Add points to others, by step: a step that is there already is replaced.
 * @template {{step: number}} P @param {P[]} points @param {P[]} more @returns {P[]} */
export function merge(points, more) {
  const all = new Map(points.map((point) => [point.step, point]));
  for (const point of more) all.set(point.step, point);
  return [...all.values()].sort((one, other) => one.step - other.step);
}

/** Seconds from the first step to each; never back, though clocks of several workers may differ.
 * @param {{recorded_at: number}[]} points @returns {number[]} */
export function elapsed(points) {
  let latest = 0;
  return points.map((point) => (latest = Math.max(latest, point.recorded_at - points[0].recorded_at)));
}

/** Seconds until the last step, from the pace of the newest 50; null for the first 10 steps.
 * @param {{step: number, at: number}[]} seen @param {number} total */
export function remaining(seen, total) {
  const newest = seen.slice(-50);
  const first = newest[0], last = newest[newest.length - 1];
  if (!first || !last || last.step < 10 || last.step === first.step) return null;
  return ((total - last.step) * (last.at - first.at)) / (last.step - first.step);
}

/** Put a value into a nested object: `set({}, "a.b", 1)` is `{a: {b: 1}}`.
 * @param {Record<string, any>} target @param {string} path @param {unknown} value */
export function put(target, path, value) {
  const parts = path.split(".");
  const last = /** @type {string} */ (parts.pop());
  let here = target;
  for (const part of parts) here = here[part] ??= {};
  here[last] = value;
  return target;
}

/** A job's body as a shell command or as Python.
 * @param {string} kind @param {Record<string, any>} body @param {string} origin */
export function asCode(kind, body, origin) {
  const text = JSON.stringify(body, null, 2);
  if (kind === "curl") return `curl ${origin}/v1/fine_tuning/jobs \\\n  -H "Authorization: Bearer $TUNERY_KEY" -H "Content-Type: application/json" \\\n  -d '${text.replaceAll("'", "'\\''")}'`;
  if (kind !== "Python") return text;
  const own = ["model", "training_file", "validation_file", "suffix", "seed"];
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !own.includes(name)));
  const lines = own.filter((name) => name in body).map((name) => `    ${name}=${JSON.stringify(body[name])},`);
  const python = JSON.stringify(extra, null, 4).replaceAll(": true", ": True").replaceAll(": false", ": False").replaceAll("\n", "\n    ");
  return `from openai import OpenAI\n\nclient = OpenAI(base_url="${origin}/v1")\njob = client.fine_tuning.jobs.create(\n${lines.join("\n")}\n    extra_body=${python},\n)\nprint(job.id)`;
}
