// @ts-check
import { ask } from "./answers.js";
import { make, root, say, t } from "./app.js";

const by = (/** @type {string} */ id) => /** @type {HTMLInputElement} */ (document.getElementById(id));
const panes = [...document.querySelectorAll(".pane")].map((pane) => ({
  pane: /** @type {HTMLElement} */ (pane),
  model: /** @type {HTMLSelectElement} */ (pane.querySelector("select")),
  answers: /** @type {HTMLElement} */ (pane.querySelector(".answers")),
  facts: /** @type {HTMLElement} */ (pane.querySelector("[data-facts]")),
  /** @type {{role: string, content: string}[]} */ turns: [],
}));
/** @type {AbortController|null} */ let running = null;

function options() {
  const body = { temperature: Number(by("temperature").value), top_p: Number(by("top-p").value), max_tokens: Number(by("max-tokens").value) };
  return by("seed").value ? { ...body, seed: Number(by("seed").value) } : body;
}

/** @param {typeof panes[0]} side */
function messages(side) {
  const system = by("system").value.trim();
  return [...(system ? [{ role: "system", content: system }] : []), ...side.turns];
}

/** @param {typeof panes[0]} side @param {string} prompt @param {AbortSignal} signal */
async function answer(side, prompt, signal) {
  side.turns.push({ role: "user", content: prompt });
  const turn = make("div", { class: "turn assistant" });
  side.answers.append(make("div", { class: "turn user" }, prompt), turn);
  const found = await ask({ model: side.model.value, messages: messages(side), ...options() }, signal, (text) => {
    turn.textContent = text;
    side.answers.scrollTop = side.answers.scrollHeight;
  });
  if (found.error) { turn.classList.add("failed"); turn.textContent = found.error; }
  if (found.text) side.turns.push({ role: "assistant", content: found.text }); else side.turns.pop();
  side.facts.textContent = found.facts;
  side.pane.dataset.model = found.model;
  keep();
}

function keep() {
  sessionStorage.setItem("tunery_turns", JSON.stringify(panes.map((side) => side.turns)));
}

/** @param {string} prompt */
async function answerBoth(prompt) {
  running = new AbortController();
  by("stop").hidden = false;
  const signal = running.signal;
  await Promise.all(panes.filter((side) => side.model.value).map((side) => answer(side, prompt, signal)));
  running = null;
  by("stop").hidden = true;
  say(t("The answer is complete."));
}
by("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = by("prompt").value.trim();
  if (!prompt || running) return;
  by("prompt").value = "";
  answerBoth(prompt);
});
by("retry").addEventListener("click", () => {
  const asked = panes.map((side) => side.turns.findLast((turn) => turn.role === "user")?.content).find(Boolean);
  if (!asked || running) return;
  for (const side of panes) {
    const at = side.turns.findLastIndex((turn) => turn.role === "user" && turn.content === asked);
    if (at < 0) continue;
    side.turns.splice(at);
    side.answers.replaceChildren(...[...side.answers.children].slice(0, 2 * Math.floor(at / 2)));
  }
  answerBoth(asked);
});
by("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); /** @type {any} */ (by("ask")).requestSubmit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
by("stop").addEventListener("click", () => running?.abort());
by("clear").addEventListener("click", () => { for (const side of panes) { side.turns = []; side.answers.replaceChildren(); side.facts.textContent = ""; } keep(); });
by("copy-code").addEventListener("click", () => {
  const side = panes.at(-1)?.model.value ? panes[1] : panes[0];
  const body = { model: side.model.value, messages: messages(side), ...options() };
  navigator.clipboard.writeText(`from openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}${root}/v1")\nanswer = client.chat.completions.create(**${JSON.stringify(body, null, 4)})\nprint(answer.choices[0].message.content)\n`);
  say(t("Copied."));
});
for (const [at, turns] of /** @type {any[][]} */ (JSON.parse(sessionStorage.getItem("tunery_turns") ?? "[]")).entries()) {
  if (!panes[at]) continue;
  panes[at].turns = turns;
  for (const turn of turns) panes[at].answers.append(make("div", { class: `turn ${turn.role}` }, turn.content));
}
