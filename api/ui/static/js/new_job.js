// @ts-check
import { ApiError, call, make, root, t } from "./app.js";
import { asCode, duration, number, put, size } from "./lib.js";

const form = /** @type {HTMLFormElement} */ (document.getElementById("job-form"));
const summary = /** @type {HTMLElement} */ (document.getElementById("summary"));
const shown = /** @type {HTMLElement} */ (document.getElementById("estimate"));
const PRESETS = {
  quick: { "peft.r": "8", "hyperparameters.n_epochs": "1" },
  balanced: { "peft.r": "16", "hyperparameters.n_epochs": "auto" },
  thorough: { "peft.r": "32", "hyperparameters.n_epochs": "5" },
};
let kind = "JSON";

/** @returns {HTMLInputElement[]} */
const fields = () => [...form.querySelectorAll("[data-field]")].filter((field) => !field.closest("fieldset[hidden]")).map((field) => /** @type {HTMLInputElement} */ (field));

/** @param {HTMLInputElement} field */
function valueOf(field) {
  if (field.type === "checkbox") return field.checked;
  const text = field.value.trim(), kind = field.dataset.kind;
  if (kind === "list") return text && text.split(/[\s,]+/);
  if (kind === "object") return text && parsed(text);
  if (kind === "word" || field.type === "select-one" || text === "" || Number.isNaN(Number(text))) return text;
  return Number(text);
}

/** A typed object; as text, which the service refuses with a reason, if it is none. @param {string} text */
function parsed(text) {
  try { return JSON.parse(text); } catch { return text; }
}

/** Whether a field says what the service takes anyway. @param {HTMLInputElement} field @param {unknown} value */
function isDefault(field, value) {
  if (field.type === "checkbox") return field.checked === field.defaultChecked;
  const given = field.dataset.default;
  if (given !== undefined) return field.value.trim() === given || (typeof value === "number" && value === Number(given));
  const options = [.../** @type {any} */ (field).options ?? []];
  const usual = options.find((option) => option.defaultSelected) ?? options[0];
  return usual?.value === field.value && !["training_file", "model"].includes(field.dataset.field ?? "");
}

function body() {
  /** @type {Record<string, any>} */ const made = {};
  for (const field of fields()) {
    const path = /** @type {string} */ (field.dataset.field), value = valueOf(field);
    const isChosen = ["peft.type", "objective.type", "precision.type"].includes(path);
    if (value === "" || (!isChosen && isDefault(field, value))) continue;
    put(made, path, value);
  }
  if (made.validation_file) delete made.validation_split;
  if (String(made.model ?? "").startsWith("ft:")) delete made.peft;
  if (made.hyperparameters) {
    made.method = { type: "supervised", supervised: { hyperparameters: made.hyperparameters } };
    delete made.hyperparameters;
  }
  if (made.optimizer) made.optimizer.type ??= /** @type {HTMLSelectElement} */ (form.querySelector('[data-field="optimizer.type"]')).value;
  return made;
}

function showPlugins() {
  for (const set of form.querySelectorAll("fieldset[data-plugin]")) {
    const { plugin, name } = /** @type {HTMLElement} */ (set).dataset;
    const type = /** @type {HTMLSelectElement} */ (form.querySelector(`[data-field="${plugin}.type"]`)).value;
    /** @type {HTMLElement} */ (set).hidden = type !== name;
  }
}

/** @type {{bases: Record<string, Record<string, Record<string, string>>>, precisions: Record<string, Record<string, string>>}} */
const refusals = JSON.parse(document.getElementById("refusals")?.textContent ?? "null");
const choice = (/** @type {string} */ path) => /** @type {HTMLSelectElement} */ (form.querySelector(`[data-field="${path}"]`));

/** Grey what the service would refuse with the chosen model and method; say why below the field. */
function showRefusals() {
  const ofBase = refusals.bases[choice("model").selectedOptions[0]?.dataset.base ?? ""] ?? {};
  const reasons = { "peft.type": ofBase["peft.type"], "objective.type": ofBase["objective.type"], "precision.type": refusals.precisions[choice("peft.type").value] };
  for (const [path, why] of Object.entries(reasons)) {
    const select = choice(path), place = select.nextElementSibling;
    for (const option of select.options) option.disabled = Boolean(why?.[option.value]);
    const chosen = why?.[select.value];
    const others = [...select.options].filter((option) => option.disabled).map((option) => option.value);
    if (place?.hasAttribute("data-why")) {
      place.textContent = chosen ?? (others.length ? t("Not with this choice: {names}.", { names: others.join(", ") }) : "");
      place.setAttribute("title", [...new Set(Object.values(why ?? {}))].join("\n"));
      place.className = chosen ? "field-error" : "help";
    }
  }
}

/** @param {ApiError} error */
function showError(error) {
  summary.textContent = error.message;
  summary.hidden = false;
  const field = fields().find((each) => each.dataset.field === error.param || error.param?.endsWith(each.dataset.field ?? "?"));
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.after(make("span", { class: "field-error" }, error.message));
  }
}
function forgetErrors() {
  summary.hidden = true;
  form.querySelectorAll(".field-error:not([data-why])").forEach((each) => each.remove());
  form.querySelectorAll("[aria-invalid]").forEach((each) => each.removeAttribute("aria-invalid"));
}

/** Show the peak beside the memory of each worker's device; what fits none cannot be started. @param {number|null} peak */
async function showFit(peak) {
  const place = /** @type {HTMLElement} */ (document.getElementById("fits")), start = /** @type {HTMLButtonElement} */ (document.getElementById("start"));
  start.disabled = false;
  place.replaceChildren();
  delete place.dataset.fits;
  if (peak === null) return;
  const workers = (await call("GET", "/v1/workers")).data.filter((/** @type {any} */ each) => each.kind === "training" && each.status === "online");
  const devices = workers.flatMap((/** @type {any} */ each) => each.devices.map((/** @type {any} */ device) => ({ ...device, host: each.host })));
  if (!devices.length) return;
  const largest = Math.max(...devices.map((/** @type {any} */ each) => each.memory_total));
  place.replaceChildren(...devices.map((/** @type {any} */ each) => make("p", { class: `small device ${peak > each.memory_total ? "over" : ""}` }, `${each.host} · ${each.name}: ${t("{part} of {whole}", { part: size(peak), whole: size(each.memory_total) })}`,
    make("progress", { max: String(each.memory_total), value: String(Math.min(peak, each.memory_total)), "aria-label": t("Peak memory on {device}", { device: each.name }) }))));
  place.dataset.fits = String(peak <= largest);
  if (peak <= largest) return;
  start.disabled = true;
  place.append(make("p", { class: "note bad", role: "alert" }, t("No worker has this much memory: {bytes} are missing on the largest. Choose fewer bits, a smaller method or shorter rows.", { bytes: size(peak - largest) })));
}

let asked = 0;
async function estimate() {
  const mine = (asked += 1), wanted = body();
  if (!wanted.training_file) return;
  try {
    const found = await call("POST", "/v1/fine_tuning/estimate", wanted);
    if (mine !== asked) return;
    shown.dataset.peak = String(found.peak_bytes);
    shown.dataset.of = `${wanted.peft?.type ?? ""} ${wanted.precision?.type ?? ""}`;
    showFit(found.peak_bytes).catch(() => undefined);
    const parts = Object.entries(found.memory).map(([name, bytes]) => [make("dt", { class: "small" }, name), make("dd", { class: "small" }, size(/** @type {number} */ (bytes)))]).flat();
    shown.replaceChildren(
      make("dl", { class: "tiles" }, make("div", {}, make("dt", {}, t("Time")), make("dd", {}, duration(found.seconds))), make("div", {}, make("dt", {}, t("Peak memory")), make("dd", {}, size(found.peak_bytes)))),
      make("p", { class: "small dim" }, `${duration(found.seconds_band.low)} – ${duration(found.seconds_band.high)}, ${size(found.peak_bytes_band.low)} – ${size(found.peak_bytes_band.high)} on ${found.device}`),
      make("dl", { class: "pairs" }, ...parts, make("dt", {}, t("steps")), make("dd", {}, number(found.total_steps)), make("dt", {}, t("tokens")), make("dd", {}, number(found.total_tokens)), make("dt", {}, t("trained")), make("dd", {}, t("{count} parameters", { count: number(found.trainable_parameters) }))));
  } catch (error) {
    if (mine !== asked || !(error instanceof ApiError)) return;
    delete shown.dataset.peak;
    showFit(null).catch(() => undefined);
    shown.replaceChildren(make("p", { class: "dim" }, error.message));
    const passing = ["not_measured_yet", "file_not_linted", "no_inference_server"];
    if (passing.includes(error.code ?? "")) setTimeout(() => { if (mine === asked) estimate(); }, 3000);
  }
}

/** @type {ReturnType<typeof setTimeout>|undefined} */ let waiting;
function changed() {
  showPlugins();
  showRefusals();
  const code = document.getElementById("code");
  if (code) code.textContent = asCode(kind, body(), location.origin + root);
  clearTimeout(waiting);
  waiting = setTimeout(estimate, 300);
}

/** Fill the form with a job's numbers. @param {any} job */
function fill(job) {
  job.suffix = job.user_provided_suffix;
  for (const field of form.querySelectorAll("[data-field]")) {
    const input = /** @type {HTMLInputElement} */ (field);
    const value = (input.dataset.field ?? "").split(".").reduce((/** @type {any} */ here, part) => here?.[part], job);
    const { plugin, name } = /** @type {HTMLElement|null} */ (field.closest("fieldset[data-plugin]"))?.dataset ?? {};
    if (value === undefined || value === null || (plugin && job[plugin]?.type !== name)) continue;
    if (input.type === "checkbox") input.checked = Boolean(value);
    else if (Array.isArray(value)) input.value = value.join(", ");
    else input.value = typeof value === "object" ? JSON.stringify(value) : String(value);
  }
}

form.addEventListener("input", changed);
form.addEventListener("click", (event) => {
  const data = /** @type {HTMLElement} */ (event.target).dataset;
  if (data.preset) {
    for (const [path, value] of Object.entries(PRESETS[/** @type {keyof typeof PRESETS} */ (data.preset)])) {
      const field = fields().find((each) => each.dataset.field === path);
      if (field) field.value = value;
    }
    changed();
  }
  if (data.code) {
    kind = data.code;
    form.querySelectorAll("[data-code]").forEach((tab) => tab.setAttribute("aria-selected", String(/** @type {HTMLElement} */ (tab).dataset.code === kind)));
    changed();
  }
});
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  forgetErrors();
  const start = /** @type {HTMLButtonElement} */ (document.getElementById("start"));
  start.disabled = true;
  try {
    const job = await call("POST", "/v1/fine_tuning/jobs", body());
    location.assign(`${root}/ui/jobs/${job.id}`);
  } catch (error) {
    if (error instanceof ApiError) showError(error);
    else summary.textContent = String(error);
    summary.hidden = false;
    summary.focus();
    start.disabled = false;
  }
});
if (form.dataset.source) fill(await call("GET", `/v1/fine_tuning/jobs/${form.dataset.source}`));
for (const change of new URLSearchParams(location.search).getAll("set")) {
  const [path, value] = change.split(":");
  const field = /** @type {HTMLInputElement|null} */ (form.querySelector(`[data-field="${CSS.escape(path)}"]`));
  if (field) field.value = value;
}
changed();
