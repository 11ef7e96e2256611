// @ts-check
import { root } from "./app.js";

const place = /** @type {HTMLElement} */ (document.getElementById("workers"));
async function refresh() {
  if (document.hidden) return;
  const response = await fetch(`${root}/ui/workers/table`);
  if (!response.ok || response.redirected) return;
  const parsed = new DOMParser().parseFromString(await response.text(), "text/html");
  place.replaceChildren(...parsed.body.childNodes);
}
setInterval(() => { refresh().catch(() => undefined); }, 3000);
document.addEventListener("visibilitychange", () => { refresh().catch(() => undefined); });
