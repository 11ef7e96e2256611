// @ts-check
import { call, complain, renew, root, say, t } from "./app.js";

const place = /** @type {HTMLElement} */ (document.getElementById("workers"));
async function refresh() {
  if (document.hidden) return;
  const response = await fetch(`${root}/ui/workers/table`);
  if (!response.ok || response.redirected) return;
  renew(place, await response.text());
}
place.addEventListener("click", async (event) => {
  const { workerAction: action, worker } = /** @type {HTMLElement} */ (event.target).dataset;
  if (!action || !worker) return;
  try {
    await call("POST", `/v1/workers/${encodeURIComponent(worker)}/${action}`);
    await refresh();
    say(action === "drain" ? t("It takes no new job; what it trains goes on to its end.") : t("The worker takes jobs again."));
  } catch (error) { complain(error); }
});
setInterval(() => { refresh().catch(() => undefined); }, 3000);
document.addEventListener("visibilitychange", () => { refresh().catch(() => undefined); });
