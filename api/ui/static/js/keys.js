// @ts-check
import { call, complain, confirmed, make, say, t } from "./app.js";

const DAY_SECONDS = 86400;
const by = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));

by("new-key").addEventListener("submit", async (event) => {
  event.preventDefault();
  const name = /** @type {HTMLInputElement} */ (by("name"));
  const days = Number(/** @type {HTMLSelectElement} */ (by("lifetime")).value), end = days ? Math.floor(Date.now() / 1000) + days * DAY_SECONDS : null;
  try {
    const key = await call("POST", "/v1/api_keys", { name: name.value, expires_at: end, scopes: [.../** @type {NodeListOf<HTMLInputElement>} */ (document.querySelectorAll('input[name="scope"]:checked'))].map((box) => box.value) });
    by("secret").hidden = false;
    by("secret-value").textContent = key.value;
    name.value = "";
    const row = make("tr", { "data-key": key.id }, ...[key.name, `${key.prefix}…`, key.scopes.join(", "), t("now"), end ? new Date(end * 1000).toISOString().slice(0, 10) : "–", t("active"), ""].map((text) => make("td", {}, text)));
    document.querySelector("#keys tbody")?.append(row);
    say(t("The key was made."));
  } catch (error) { complain(error); }
});
by("copy").addEventListener("click", () => navigator.clipboard.writeText(by("secret-value").textContent ?? "").then(() => say(t("Copied."))));
document.addEventListener("click", async (event) => {
  const { revoke, name } = /** @type {HTMLElement} */ (event.target).dataset ?? {};
  if (!revoke || !(await confirmed(t("Revoke {name}? Whoever uses it is shut out at once.", { name: name ?? "" }), t("Revoke the key")))) return;
  try { await call("DELETE", `/v1/api_keys/${revoke}`); location.reload(); } catch (error) { complain(error); }
});
