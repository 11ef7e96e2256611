// @ts-check
/** One question from the data to several models beside each other: base and checkpoints, or jobs. */
import { ask } from "./answers.js";
import { complain, root, t } from "./app.js";

const by = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const card = by("samples");
const text = /** @type {HTMLTextAreaElement} */ (by("sample-text"));
const select = /** @type {HTMLSelectElement} */ (by("sample-prompt"));
const slider = /** @type {HTMLInputElement|null} */ (document.getElementById("sample-step"));
const button = /** @type {HTMLButtonElement} */ (by("sample-ask"));
const N_ROWS = 8, MOST_TOKENS = 80, FIRST_BYTES = 65536;
/** @type {{messages: any[], question: string, wanted: string}[]} */ let rows = [];
/** Answers that were given already, by model and question. @type {Record<string, {text: string, facts: string}>} */
const known = JSON.parse(sessionStorage.getItem("tunery_samples") ?? "{}");

/** Read the first rows of the data that have a question and an answer. @param {string} file */
async function readRows(file) {
  const response = await fetch(`${root}/v1/files/${file}/cleaned`);
  if (!response.ok || !response.body) return;
  const reader = response.body.pipeThrough(/** @type {any} */ (new TextDecoderStream())).getReader();
  let start = "";
  for (let part = await reader.read(); !part.done && start.length < FIRST_BYTES; part = await reader.read()) start += part.value;
  await reader.cancel();
  for (const line of start.split("\n")) {
    try {
      const { messages } = JSON.parse(line);
      const last = messages.findLastIndex((/** @type {any} */ each) => each.role === "assistant");
      if (last > 0 && typeof messages[last - 1].content === "string") rows.push({ messages: messages.slice(0, last), question: messages[last - 1].content, wanted: messages[last].content });
    } catch { continue; /* another format, or the line that was cut: the person can type a question */ }
    if (rows.length === N_ROWS) break;
  }
}

/** What to ask: the chosen row with its history, or what was typed. */
function messages() {
  const row = rows[select.selectedIndex];
  return row && row.question === text.value ? row.messages : [{ role: "user", content: text.value }];
}

const checkpoints = () => [.../** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll("#checkpoints tbody tr"))]
  .map((row) => ({ step: Number(row.dataset.step), name: row.querySelector("a")?.textContent ?? "" }))
  .sort((one, other) => one.step - other.step);

/** Point the slider at the checkpoints that there are. */
function showSteps() {
  if (!slider) return;
  const found = checkpoints(), wasLast = slider.value === slider.max;
  slider.max = String(Math.max(0, found.length - 1));
  if (wasLast) slider.value = slider.max;
  const chosen = found[Number(slider.value)];
  by("sample-at").textContent = chosen ? String(chosen.step) : "";
  by("sample-tuned").dataset.model = chosen?.name ?? "";
  by("sample-none").hidden = found.length > 0;
  card.dataset.steps = String(found.length);
  showKnown();
}

const panes = () => [.../** @type {NodeListOf<HTMLElement>} */ (card.querySelectorAll(".sample[data-model]"))].filter((pane) => pane.dataset.model);
const keyOf = (/** @type {HTMLElement} */ pane) => JSON.stringify([pane.dataset.model, messages()]);

/** @param {HTMLElement} pane @param {string} answer @param {string} facts */
function show(pane, answer, facts) {
  const [place, below] = [pane.querySelector("[data-answer]"), pane.querySelector("[data-facts]")];
  if (place) place.textContent = answer;
  if (below) below.textContent = facts;
}

function showKnown() {
  for (const pane of panes()) show(pane, known[keyOf(pane)]?.text ?? "", known[keyOf(pane)]?.facts ?? "");
  const wanted = document.getElementById("sample-wanted"), row = rows[select.selectedIndex];
  if (wanted) wanted.textContent = row && row.question === text.value ? row.wanted : "";
}

async function askAll() {
  if (!text.value.trim()) return;
  button.disabled = true;
  const signal = new AbortController().signal;
  await Promise.all(panes().filter((pane) => !known[keyOf(pane)]).map(async (pane) => {
    const key = keyOf(pane);
    const found = await ask({ model: pane.dataset.model, messages: messages(), temperature: 0, max_tokens: MOST_TOKENS }, signal, (answer) => show(pane, answer, "…"));
    show(pane, found.error || found.text, found.error ? t("no answer") : found.facts);
    if (!found.error) known[key] = { text: found.text, facts: found.facts };
  }));
  sessionStorage.setItem("tunery_samples", JSON.stringify(known));
  button.disabled = false;
}

function choose() {
  text.value = rows[select.selectedIndex]?.question ?? "";
  showKnown();
}

select.addEventListener("change", choose);
text.addEventListener("input", showKnown);
slider?.addEventListener("input", showSteps);
button.addEventListener("click", askAll);
/** Offer the questions of the first file that has any. @param {string} files Their ids. */
async function offer(files) {
  for (const file of files.split(" ").filter(Boolean)) if (!rows.length) await readRows(file);
  select.replaceChildren(...rows.map((row, at) => new Option(`${at + 1}: ${row.question.slice(0, 60)}`)));
  /** @type {HTMLElement} */ (select.closest("label")).hidden = rows.length === 0;
  if (!text.value) choose();
  card.dataset.rows = String(rows.length);
}

document.addEventListener("checkpoint", () => {
  showSteps();
  // A page that was opened before the data was checked has no question yet.
  if (!rows.length) offer(card.dataset.later ?? "").catch(complain);
});
showSteps();
await offer(card.dataset.file ?? "");
