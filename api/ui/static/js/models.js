// @ts-check
import { call, complain, confirmed } from "./app.js";

document.addEventListener("click", async (event) => {
  const name = /** @type {HTMLElement} */ (event.target).dataset?.delete;
  if (!name || !(await confirmed(`Delete ${name}? Calls of this name will fail from then on.`, "Delete the model"))) return;
  try { await call("DELETE", `/v1/models/${encodeURIComponent(name)}`); location.reload(); } catch (error) { complain(error); }
});
