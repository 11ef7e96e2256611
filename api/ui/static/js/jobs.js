// @ts-check
import { renew, root } from "./app.js";

const table = document.getElementById("jobs");
const compare = /** @type {HTMLButtonElement|null} */ (document.getElementById("compare"));

function chosen() {
  return [...document.querySelectorAll('input[name="compare"]:checked')].map((box) => /** @type {HTMLInputElement} */ (box).value);
}
function show() {
  if (compare) compare.hidden = chosen().length < 2;
}
async function refresh() {
  if (!table || document.hidden) return;
  const kept = chosen();
  const response = await fetch(`${root}/ui/jobs/table?${table.dataset.query ?? ""}`);
  if (!response.ok || response.redirected) return;
  renew(table, await response.text());
  for (const box of table.querySelectorAll('input[name="compare"]')) {
    /** @type {HTMLInputElement} */ (box).checked = kept.includes(/** @type {HTMLInputElement} */ (box).value);
  }
  show();
}
table?.addEventListener("change", show);
compare?.addEventListener("click", () => location.assign(`${root}/ui/compare?ids=${chosen().slice(0, 8).join(",")}`));
setInterval(() => { refresh().catch(() => undefined); }, 3000);
document.addEventListener("visibilitychange", () => { refresh().catch(() => undefined); });
