// @ts-check
import { call, complain, confirmed, make, root, say, t } from "./app.js";
import { chart, SECONDS, STEPS } from "./chart.js";
import { duration, elapsed, merge, number, remaining, smooth } from "./lib.js";

const json = (/** @type {string} */ id) => JSON.parse(document.getElementById(id)?.textContent ?? "null");
const by = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
let job = json("job");
/** @type {any[]} */ let points = json("points");
/** @type {{step: number, at: number}[]} */ let seen = [];
let position = `${points.at(-1)?.step ?? 0}-${by("events").dataset.sequence}-${Math.max(0, ...[...document.querySelectorAll("#checkpoints tbody tr")].map((row) => Number(/** @type {HTMLElement} */ (row).dataset.step)))}`;
const mayChange = by("actions").dataset.may === "yes";
const ENDS = ["succeeded", "failed", "cancelled"];

const loss = chart(by("loss-chart"), [
  { label: t("train"), token: "--accent", alpha: 0.25 }, { label: t("smoothed"), token: "--accent", width: 2 },
  { label: t("held-out"), token: "--second", width: 2, dash: [6, 4], points: true }]);
const rate = chart(by("rate-chart"), [{ label: t("Learning rate"), token: "--accent" }]);
const speed = chart(by("speed-chart"), [{ label: t("Tokens/s"), token: "--accent" }]);
const accuracy = chart(by("accuracy-chart"), [{ label: t("Token accuracy"), token: "--accent" }]);
const norm = chart(by("norm-chart"), [{ label: t("Gradient norm"), token: "--accent" }]);

function drawCharts() {
  const share = Number(/** @type {HTMLInputElement} */ (by("smoothing")).value);
  const column = (/** @type {string} */ name) => points.map((point) => point[name] ?? null);
  for (const each of ["loss-chart", "rate-chart", "speed-chart", "norm-chart", "accuracy-chart"]) {
    if (points.length) delete by(each).dataset.empty; else by(each).dataset.empty = t("no step yet");
  }
  const timed = points.length > 0 && points.every((point) => point.recorded_at);
  const along = /** @type {HTMLSelectElement} */ (by("along"));
  along.disabled = !timed;
  if (!timed) along.value = "step";
  const x = along.value === "time" ? SECONDS : STEPS, log = /** @type {HTMLInputElement} */ (by("log")).checked;
  const places = x === SECONDS ? elapsed(points) : column("step");
  by("loss-chart").dataset.lastX = String(places.at(-1) ?? "");
  const train = column("train_loss"), smoothed = smooth(train, share);
  by("loss-chart").dataset.points = String(points.length);
  by("loss-chart").dataset.raw = JSON.stringify(train.slice(-20));
  by("loss-chart").dataset.smoothed = JSON.stringify(smoothed.slice(-20));
  by("loss-chart").dataset.series = points.some((point) => "valid_loss" in point || "full_valid_loss" in point) ? "train,valid" : "train";
  if (points.length) {
    loss.draw([places, train, smoothed, column("full_valid_loss").map((value, at) => value ?? points[at].valid_loss ?? null)], log, x);
    rate.draw([places, column("learning_rate")], false, x);
    speed.draw([places, column("tokens_per_second")], false, x);
    accuracy.draw([places, column("train_mean_token_accuracy")], false, x);
    norm.draw([places, column("grad_norm")], false, x);
  }
  if (!by("loss-table").hidden) drawTable();
}

function drawTable() {
  const rows = points.slice(-200).map((point) => make("tr", {}, ...["step", "train_loss", "valid_loss", "full_valid_loss"].map((name) => make("td", { class: "num" }, number(point[name])))));
  by("loss-table").replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...[t("Step"), t("Train loss"), t("Held-out batch"), t("Held-out loss")].map((name) => make("th", { scope: "col", class: "num" }, name)))), make("tbody", {}, ...rows)));
}

function drawJob() {
  const total = job.total_steps ?? 0, ended = ENDS.includes(job.status), last = points.at(-1);
  const step = Math.max(job.step, last?.step ?? 0);
  const mark = make("span", { class: `status ${job.status}`, "data-status": job.status }, make("i", { "aria-hidden": "true" }), t(job.status.replaceAll("_", " ")));
  by("status").replaceChildren(mark);
  by("queue").hidden = !job.queue_position;
  by("queue").textContent = job.queue_position ? t("Place {position} of {length} in the queue", { position: number(job.queue_position), length: number(job.queue_length) }) : "";
  const bar = /** @type {HTMLProgressElement} */ (by("bar"));
  bar.max = total || 1;
  bar.value = step;
  by("step").textContent = `${number(step)} / ${number(total || null)}`;
  by("step").dataset.lastStep = String(step);
  for (const name of ["epoch", "train_loss", "tokens_per_second"]) by(name).textContent = number(last?.[name]);
  by("valid_loss").textContent = number([...points].reverse().find((point) => "full_valid_loss" in point)?.full_valid_loss);
  const left = job.status === "running" ? remaining(seen, total) : null;
  by("eta").dataset.seconds = left === null ? "" : left.toFixed(3);
  by("eta").textContent = left === null ? "–" : t("about {time}", { time: duration(left) });
  const stage = ended ? 3 : job.status === "running" || job.status === "paused" ? (step || total ? 2 : 1) : 0;
  // How far a job came that did not succeed.
  const reached = !ended || job.status === "succeeded" ? stage : step ? 2 : job.started_at ? 1 : 0;
  by("stages").querySelectorAll("li").forEach((item, at) => {
    item.toggleAttribute("data-done", at < reached || (at === 3 && job.status === "succeeded"));
    item.toggleAttribute("data-failed", at === 3 && ["failed", "cancelled"].includes(job.status));
    if (at === stage && !ended) item.setAttribute("aria-current", "step"); else item.removeAttribute("aria-current");
    if (at === 3 && ended) item.textContent = t(job.status);
  });
  const show = (/** @type {string} */ name, /** @type {boolean} */ wanted) => {
    const visible = wanted && mayChange; /** @type {HTMLElement} */ (document.querySelector(`[data-action="${name}"]`)).hidden = !visible;
  };
  show("pause", !ended && job.status !== "paused" && !job.pause_requested);
  show("resume", job.status === "paused" || (!ended && job.pause_requested));
  show("cancel", !ended && !job.cancel_requested);
  show("rerun", ended);
  const link = /** @type {HTMLAnchorElement} */ (by("try"));
  link.hidden = !job.fine_tuned_model;
  link.href = `${root}/ui/playground?left=${encodeURIComponent(job.base_model)}&right=${encodeURIComponent(job.fine_tuned_model ?? "")}`;
  by("failure").hidden = !job.error;
  if (job.error) by("failure").textContent = `${job.error.code}: ${job.error.message}`;
  by("remedies").hidden = !mayChange || job.error?.code !== by("remedies").dataset.codes;
  const name = job.user_provided_suffix ?? job.id;
  document.title = `${job.status === "running" && total ? `${Math.floor((100 * step) / total)} % ` : ""}${name} · Tunery`;
  drawClock();
}

function drawClock() {
  if (job.started_at) by("elapsed").textContent = duration((job.finished_at ?? Date.now() / 1000) - job.started_at);
}

/** @param {any} event */
function addEvent(event) {
  by("events").prepend(make("li", { class: event.level, ...(isShown(event.level) ? {} : { hidden: "" }) }, make("time", {}, new Date(event.created_at * 1000).toLocaleTimeString()), event.message));
}
/** @param {string} level */
function isShown(level) {
  const least = /** @type {HTMLSelectElement} */ (by("event-level")).value;
  return !least || level === "error" || level === least;
}
by("event-level").addEventListener("change", () => {
  for (const item of by("events").querySelectorAll("li")) item.hidden = !isShown(item.className);
});
/** @param {any} saved */
function addCheckpoint(saved) {
  const body = /** @type {HTMLElement} */ (document.querySelector("#checkpoints tbody"));
  if (body.querySelector(`[data-step="${saved.step_number}"]`)) return;
  const name = saved.fine_tuned_model_checkpoint;
  body.prepend(make("tr", { "data-step": String(saved.step_number) }, make("td", {}, number(saved.step_number)), make("td", { class: "num" }, number(saved.metrics.train_loss)), make("td", { class: "num" }, number(saved.metrics.full_valid_loss)),
    make("td", { class: "mono small" }, make("a", { href: `${root}/ui/playground?right=${encodeURIComponent(name)}` }, name))));
  document.dispatchEvent(new Event("checkpoint"));
}

/** @type {EventSource|null} */ let stream = null;
function open() {
  if (stream || document.hidden || by("mark").dataset.state === "ended") return;
  stream = new EventSource(`${root}/v1/fine_tuning/jobs/${job.id}/stream?after=${position}`);
  const on = (/** @type {string} */ name, /** @type {(data: any) => void} */ take) => stream?.addEventListener(name, (event) => {
    if (event.lastEventId) position = event.lastEventId;
    take(JSON.parse(event.data));
  });
  stream.onopen = () => { by("mark").dataset.state = "open"; };
  stream.onerror = () => { by("mark").dataset.state = "lost"; if (stream?.readyState === EventSource.CLOSED) { close(); setTimeout(open, 2000); } };
  on("metrics", (more) => {
    points = merge(points, more);
    seen.push({ step: more.at(-1).step, at: Date.now() / 1000 });
    drawCharts();
    drawJob();
  });
  on("event", addEvent);
  on("checkpoint", addCheckpoint);
  on("job", (fresh) => {
    if (fresh.status !== job.status) say(t("The job is {status}.", { status: t(fresh.status.replaceAll("_", " ")) }));
    job = fresh;
    drawJob();
  });
  on("end", () => { close(); by("mark").dataset.state = "ended"; });
}
function close() {
  stream?.close();
  stream = null;
}

by("actions").addEventListener("click", async (event) => {
  const action = /** @type {HTMLElement} */ (event.target).dataset.action;
  if (!action) return;
  const name = job.user_provided_suffix ?? job.id;
  const kept = document.querySelector("#checkpoints tbody tr") ? t("Its checkpoints stay usable.") : t("It has no checkpoint yet.");
  if (action === "cancel" && !(await confirmed(`${t("Cancel {name}?", { name })} ${kept}`, t("Cancel the job")))) return;
  try {
    const answer = await call("POST", `/v1/fine_tuning/jobs/${job.id}/${action}`);
    if (action === "rerun") location.assign(`${root}/ui/jobs/${answer.id}`);
    else { job = answer; drawJob(); open(); }
  } catch (error) { complain(error); }
});
by("smoothing").addEventListener("input", drawCharts);
by("log").addEventListener("change", drawCharts);
by("along").addEventListener("change", drawCharts);
by("as-table").addEventListener("click", () => { by("loss-table").hidden = !by("loss-table").hidden; drawCharts(); });
document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
setInterval(drawClock, 1000);
// The stream tells of this job; its place also changes when others start.
setInterval(async () => {
  if (job.status !== "queued" || document.hidden) return;
  try {
    const fresh = await call("GET", `/v1/fine_tuning/jobs/${job.id}`);
    if (job.status === "queued" && fresh.status === "queued") { job = fresh; drawJob(); }
  } catch (error) { complain(error); }
}, 5000);
drawCharts();
drawJob();
if (ENDS.includes(job.status)) by("mark").dataset.state = "ended"; else open();
