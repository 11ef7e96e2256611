// @ts-check
import { complain, root, send, t } from "./app.js";

const drop = /** @type {HTMLElement} */ (document.getElementById("drop"));
const input = /** @type {HTMLInputElement} */ (document.getElementById("file"));
const bar = /** @type {HTMLProgressElement} */ (document.getElementById("upload"));
const text = /** @type {HTMLElement} */ (document.getElementById("upload-text"));

/** Upload with progress, which fetch does not tell of. @param {File} file */
function upload(file) {
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", file, file.name);
  const request = new XMLHttpRequest();
  request.open("POST", `${root}/v1/files`);
  request.setRequestHeader("x-tunery-csrf", document.querySelector('meta[name="csrf"]')?.getAttribute("content") ?? "");
  bar.hidden = false;
  request.upload.onprogress = (event) => {
    bar.value = event.total ? (100 * event.loaded) / event.total : 0;
    text.textContent = t("{share} % of {name}", { share: Math.round(bar.value), name: file.name });
  };
  request.onload = () => {
    const answer = JSON.parse(request.responseText);
    if (request.status < 300) location.assign(`${root}/ui/datasets/${answer.id}`);
    else { bar.hidden = true; text.textContent = ""; complain(answer.error.message); }
  };
  request.onerror = () => { bar.hidden = true; complain(t("The connection was lost during the upload. Try again.")); };
  request.send(form);
}

input.addEventListener("change", () => { if (input.files?.[0]) upload(input.files[0]); });
for (const name of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.toggle("over", name === "dragover"); });
}
drop.addEventListener("drop", (event) => { const file = event.dataTransfer?.files[0]; if (file) upload(file); });
async function watch() {
  for (const row of document.querySelectorAll("tr[data-file]")) {
    if (!row.querySelector(".status.uploaded")) continue;
    const id = /** @type {HTMLElement} */ (row).dataset.file;
    const file = await (await send("GET", `/v1/files/${id}`)).json();
    if (file.status !== "uploaded") { location.reload(); return; }
  }
}
setInterval(() => { if (!document.hidden) watch().catch(() => undefined); }, 2000);
