// @ts-check
import { ApiError, call, complain, confirmed, make, root, t } from "./app.js";
import { number } from "./lib.js";

const SHOWN = 5;
let offset = 0;
const place = document.getElementById("preview");
const file = place?.dataset.file ?? document.getElementById("pending")?.dataset.file;

/** @param {any} row */
function showRow(row) {
  const text = make("div", { class: "row-preview", "data-line": String(row.line) }, make("p", { class: "dim" }, t("Line {line} · {tokens} tokens, {learned} learned", { line: number(row.line), tokens: number(row.n_tokens), learned: number(row.n_trained) }) + (row.truncated ? ` · ${t("cut")}` : "")));
  if (row.fault) text.append(make("p", { class: "error" }, row.fault));
  for (const span of row.spans) text.append(span.trained ? make("mark", { class: "trained" }, span.text) : span.text);
  return text;
}

/** @param {Record<string, number>} bins @param {number} limit */
function showHistogram(bins, limit) {
  const most = Math.max(1, ...Object.values(bins));
  const bars = Object.entries(bins).map(([end, count]) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    svg.setAttribute("viewBox", "0 0 10 100");
    svg.setAttribute("preserveAspectRatio", "none");
    const height = (100 * count) / most;
    for (const [key, value] of Object.entries({ x: 0, y: 100 - height, width: 10, height })) bar.setAttribute(key, String(value));
    svg.append(bar);
    return make("div", { title: t("{count} rows of at most {limit} tokens", { count: number(count), limit: number(Number(end)) }), ...(Number(end) > limit ? { class: "over" } : {}) }, number(count), svg, `≤ ${number(Number(end))}`);
  });
  const chart = document.getElementById("histogram");
  chart?.replaceChildren(...bars);
  if (chart) chart.dataset.bins = String(Object.values(bins).reduce((sum, count) => sum + count, 0));
}

/** Say which rows are shown, and offer those before and after them. */
function showPlace() {
  const all = Number(place?.dataset.rows ?? 0);
  const where = document.getElementById("place");
  if (where) where.textContent = t("{first} – {last} of {count} usable rows", { first: number(Math.min(all, offset + 1)), last: number(Math.min(all, offset + SHOWN)), count: number(all) });
  for (const button of document.querySelectorAll("#pager button")) {
    const target = offset + Number(/** @type {HTMLElement} */ (button).dataset.move);
    /** @type {HTMLButtonElement} */ (button).disabled = target < 0 || target >= all;
  }
}
document.getElementById("pager")?.addEventListener("click", (event) => {
  const move = Number(/** @type {HTMLElement} */ (event.target).dataset.move ?? 0);
  if (!move) return;
  offset += move;
  preview();
});

async function preview() {
  if (!place || !file) return;
  const model = /** @type {HTMLSelectElement} */ (document.getElementById("preview-model")).value;
  const longest = /** @type {HTMLInputElement} */ (document.getElementById("max-length")).value;
  const statistics = /** @type {HTMLElement} */ (document.getElementById("statistics"));
  try {
    const shown = await call("GET", `/v1/files/${file}/preview?model=${encodeURIComponent(model)}&rows=${SHOWN}&offset=${offset}&max_length=${longest}`);
    const found = shown.statistics;
    statistics.textContent = t("{rows} rows counted, {tokens} tokens, {learned} learned; the longest row has {longest}; {overlong} are over {limit}.", { rows: number(found.n_rows), tokens: number(found.n_tokens), learned: number(found.n_trained), longest: number(found.longest), overlong: number(found.n_overlong), limit: number(shown.max_length) });
    statistics.dataset.overlong = String(found.n_overlong);
    showHistogram(found.histogram, shown.max_length);
    place.replaceChildren(...shown.rows.map(showRow));
    showPlace();
  } catch (error) {
    statistics.textContent = error instanceof Error ? error.message : String(error);
    place.replaceChildren();
    // A service that has just been started: its inference server comes up by itself.
    if (error instanceof ApiError && error.code === "no_inference_server") setTimeout(preview, 3000);
  }
}

async function wait() {
  if (document.hidden) return;
  const state = await call("GET", `/v1/files/${file}`);
  if (state.status !== "uploaded") location.reload();
}

document.getElementById("preview-model")?.addEventListener("change", preview);
const exact = /** @type {HTMLInputElement|null} */ (document.getElementById("max-length"));
const slider = /** @type {HTMLInputElement|null} */ (document.getElementById("max-length-slider"));
exact?.addEventListener("change", () => { if (slider) slider.value = exact.value; preview(); });
slider?.addEventListener("input", () => { if (exact) exact.value = slider.value; });
slider?.addEventListener("change", preview);
document.getElementById("delete")?.addEventListener("click", async (event) => {
  const { name, file: id } = /** @type {HTMLElement} */ (event.target).dataset;
  if (!(await confirmed(t("Delete {name}? Adapters that were trained on it stay.", { name: name ?? "" }), t("Delete the data set")))) return;
  try { await call("DELETE", `/v1/files/${id}`); location.assign(`${root}/ui/datasets`); } catch (error) { complain(error); }
});
if (document.getElementById("pending")) setInterval(() => { wait().catch(() => undefined); }, 1000); else preview();
