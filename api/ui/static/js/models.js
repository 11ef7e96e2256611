// @ts-check
import { call, complain, confirmed, t } from "./app.js";

document.addEventListener("click", async (event) => {
  const { delete: name, serve, merged } = /** @type {HTMLElement} */ (event.target).dataset ?? {};
  if (serve) {
    try { await call("POST", `/v1/adapters/${encodeURIComponent(serve)}/serve`, { merged: merged === "true" }); location.reload(); } catch (error) { complain(error); }
  }
  if (!name || !(await confirmed(t("Delete {name}? Calls of this name will fail from then on.", { name }), t("Delete the model")))) return;
  try { await call("DELETE", `/v1/models/${encodeURIComponent(name)}`); location.reload(); } catch (error) { complain(error); }
});
