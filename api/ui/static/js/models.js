// @ts-check
import { call, complain, confirmed, t } from "./app.js";

document.addEventListener("click", async (event) => {
  const name = /** @type {HTMLElement} */ (event.target).dataset?.delete;
  if (!name || !(await confirmed(t("Delete {name}? Calls of this name will fail from then on.", { name }), t("Delete the model")))) return;
  try { await call("DELETE", `/v1/models/${encodeURIComponent(name)}`); location.reload(); } catch (error) { complain(error); }
});
