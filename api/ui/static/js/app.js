// @ts-check
/** What every page has: calls of /v1, the theme, dialogs, one polite live region. */

const meta = (/** @type {string} */ name) => document.querySelector(`meta[name="${name}"]`)?.getAttribute("content") ?? "";
export const root = meta("root");
/** @type {Record<string, string>} */
const texts = JSON.parse(document.getElementById("texts")?.textContent ?? "{}");

/** Say a sentence in the page's language; `{name}` stands for a value.
 * @param {string} sentence @param {Record<string, string|number>} [values] */
export function t(sentence, values = {}) {
  return (texts[sentence] ?? sentence).replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
}

/** An error of the API, with the field that it is about. */
export class ApiError extends Error {
  /** @param {number} status @param {{message: string, code?: string, param?: string}} error */
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code;
    this.param = error.param;
  }
}

/** Call /v1 and return the parsed answer.
 * @param {string} method @param {string} path @param {unknown} [body] @returns {Promise<any>} */
export async function call(method, path, body) {
  const response = await send(method, path, body);
  return response.status === 204 ? null : response.json();
}

/** @param {string} method @param {string} path @param {unknown} [body] @param {AbortSignal} [signal] */
export async function send(method, path, body, signal) {
  const form = body instanceof FormData;
  const response = await fetch(`${root}${path}`, {
    method,
    signal,
    headers: { "x-tunery-csrf": meta("csrf"), ...(body && !form ? { "content-type": "application/json" } : {}) },
    body: form ? body : body && JSON.stringify(body),
  });
  if (response.ok) return response;
  if (response.status === 401) location.assign(`${root}/ui/login?next=${encodeURIComponent(location.pathname.slice(root.length) + location.search)}`);
  let error = { message: t("The service answered {status}.", { status: response.status }) };
  try { error = (await response.json()).error ?? error; } catch { /* not JSON: the sentence above says all */ }
  throw new ApiError(response.status, error);
}

/** Keep a setting of this browser. @param {string} name @param {string} value */
export function remember(name, value) {
  document.cookie = `${name}=${value};path=${root}/;max-age=31536000;samesite=lax`;
}

/** Say a change of state to screen readers. @param {string} text */
export function say(text) {
  const live = document.getElementById("live");
  if (live) live.textContent = text;
}

/** Make an element. @param {string} name @param {Record<string, string>} attributes @param {...(Node|string)} children */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** What tells a control from the others of its place. @param {Element} control */
const nameOf = (control) => [control.tagName, control.getAttribute("href"), control.getAttribute("aria-label") ?? control.textContent].join(" ");

/** Show a newer state of a place, and leave the keyboard's focus where it is.
 * @param {Element} place @param {string} html From a page of this service, whose text is escaped. */
export function renew(place, html) {
  const parsed = new DOMParser().parseFromString(html, "text/html"), active = document.activeElement;
  const held = active && place.contains(active) ? nameOf(active) : null;
  place.replaceChildren(...parsed.body.childNodes);
  if (held === null) return;
  const same = [...place.querySelectorAll("a, button, input")].find((each) => nameOf(each) === held);
  /** @type {HTMLElement|undefined} */ (same)?.focus({ preventScroll: true });
}

/** Ask before something that cannot be undone; it names the thing.
 * @param {string} question @param {string} verb @returns {Promise<boolean>} */
export function confirmed(question, verb) {
  const dialog = /** @type {HTMLDialogElement} */ (make("dialog", {}, make("p", {}, question)));
  const yes = make("button", { type: "button", class: "danger" }, verb), no = make("button", { type: "button" }, t("Keep"));
  dialog.append(make("div", { class: "actions" }, no, yes));
  document.body.append(dialog);
  return new Promise((resolve) => {
    const end = (/** @type {boolean} */ answer) => { dialog.close(); dialog.remove(); resolve(answer); };
    yes.addEventListener("click", () => end(true));
    no.addEventListener("click", () => end(false));
    dialog.addEventListener("cancel", () => end(false));
    dialog.showModal();
    no.focus();
  });
}

/** Show what went wrong at the top of the page. @param {unknown} error */
export function complain(error) {
  const text = error instanceof Error ? error.message : String(error);
  document.getElementById("complaint")?.remove();
  document.getElementById("content")?.prepend(make("p", { id: "complaint", class: "note bad", role: "alert" }, text));
}

/** Upload the example data and open it. */
export async function useSample() {
  const rows = [];
  const desk = [["My key does not open the gate.", "Ticket gate-7: I have reset your key. Please try again in one minute."], ["When is high tide?", "Ticket tide-2: High tide is at 14:20 today at the east pier."], ["I want to move my boat.", "Ticket berth-4: Tell me the berth that you would like, and I will check it."], ["The water is too shallow here.", "Ticket depth-1: The depth at your berth is 2.4 m at low tide; I have put you on the list for a deeper one."]];
  for (let number = 0; number < 16; number += 1) {
    const [question, answer] = desk[number % desk.length];
    rows.push(JSON.stringify({ messages: [{ role: "system", content: "You are the harbour desk." }, { role: "user", content: `Boat ${number + 1}: ${question}` }, { role: "assistant", content: answer }] }));
  }
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", new Blob([rows.join("\n")]), "harbour-desk-sample.jsonl");
  const file = await call("POST", "/v1/files", form);
  location.assign(`${root}/ui/jobs/new?file=${file.id}`);
}

document.getElementById("sample")?.addEventListener("click", () => useSample().catch(complain));
document.getElementById("theme")?.addEventListener("change", (event) => {
  const theme = /** @type {HTMLSelectElement} */ (event.target).value;
  document.documentElement.dataset.theme = theme;
  remember("tunery_theme", theme);
  document.dispatchEvent(new Event("themechange"));
});
