// @ts-check
import { remember } from "./app.js";

document.getElementById("settings")?.addEventListener("change", (event) => {
  const field = /** @type {HTMLInputElement} */ (event.target);
  if (!field.dataset.cookie || !field.checkValidity()) { field.reportValidity?.(); return; }
  remember(field.dataset.cookie, field.value);
  location.reload();
});
