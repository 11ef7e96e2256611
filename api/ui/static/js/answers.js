// @ts-check
/** An answer of a model, streamed: what the playground and the samples share. */
import { send, t } from "./app.js";
import { eventReader, number } from "./lib.js";

/** @typedef {{text: string, model: string, facts: string, error: string}} Answer */

/** Ask a model; `onText` gets all of the text so far.
 * @param {Record<string, any>} body @param {AbortSignal} signal @param {(text: string) => void} onText
 * @returns {Promise<Answer>} */
export async function ask(body, signal, onText) {
  const started = performance.now();
  let first = 0, text = "", model = "", usage = null, error = "";
  try {
    const response = await send("POST", "/v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
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
        onText(text);
      }
    }
  } catch (problem) {
    if (!signal.aborted) error = problem instanceof Error ? problem.message : String(problem);
  }
  const seconds = (performance.now() - started - first) / 1000;
  const facts = model ? [model, t("first token {time} ms", { time: Math.round(first) })] : [];
  if (usage) facts.push(t("{count} tokens, {rate}/s", { count: number(usage.completion_tokens), rate: number(Math.round(usage.completion_tokens / Math.max(seconds, 0.001))) }));
  if (signal.aborted) facts.push(t("stopped"));
  return { text, model, facts: facts.join(" · "), error };
}
