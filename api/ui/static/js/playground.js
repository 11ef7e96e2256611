// @ts-check
import { make, root, say, send } from "./app.js";
import { eventReader, number } from "./lib.js";

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
  const started = performance.now();
  let first = 0, text = "", model = "", usage = null;
  try {
    const response = await send("POST", "/v1/chat/completions", { model: side.model.value, messages: messages(side), stream: true, stream_options: { include_usage: true }, ...options() }, signal);
    const read = eventReader();
    const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).pipeThrough(/** @type {any} */ (new TextDecoderStream())).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      for (const data of read(/** @type {any} */ (part.value))) {
        if (data === "[DONE]") continue;
        const event = JSON.parse(data);
        if (event.error) throw new Error(event.error.message);
        model = event.model ?? model;
        usage = event.usage ?? usage;
        const piece = event.choices?.[0]?.delta?.content ?? "";
        if (piece && !first) first = performance.now() - started;
        text += piece;
        turn.textContent = text;
        side.answers.scrollTop = side.answers.scrollHeight;
      }
    }
  } catch (error) {
    if (!signal.aborted) { turn.classList.add("failed"); turn.textContent = error instanceof Error ? error.message : String(error); }
  }
  if (text) side.turns.push({ role: "assistant", content: text }); else side.turns.pop();
  const seconds = (performance.now() - started - first) / 1000;
  side.facts.textContent = model ? `${model} · first token ${Math.round(first)} ms${usage ? ` · ${number(usage.completion_tokens)} tokens, ${number(Math.round(usage.completion_tokens / Math.max(seconds, 0.001)))}/s` : ""}${signal.aborted ? " · stopped" : ""}` : "";
  side.pane.dataset.model = model;
  keep();
}

function keep() {
  sessionStorage.setItem("tunery_turns", JSON.stringify(panes.map((side) => side.turns)));
}

by("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const prompt = by("prompt").value.trim();
  if (!prompt || running) return;
  by("prompt").value = "";
  running = new AbortController();
  by("stop").hidden = false;
  const signal = running.signal;
  await Promise.all(panes.filter((side) => side.model.value).map((side) => answer(side, prompt, signal)));
  running = null;
  by("stop").hidden = true;
  say("The answer is complete.");
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
  say("Copied.");
});
for (const [at, turns] of /** @type {any[][]} */ (JSON.parse(sessionStorage.getItem("tunery_turns") ?? "[]")).entries()) {
  if (!panes[at]) continue;
  panes[at].turns = turns;
  for (const turn of turns) panes[at].answers.append(make("div", { class: `turn ${turn.role}` }, turn.content));
}
