// @ts-check
import { chart } from "./chart.js";
import { smooth } from "./lib.js";

/** @type {{label: string, points: {step: number, train_loss: number}[]}[]} */
const curves = JSON.parse(document.getElementById("curves-data")?.textContent ?? "[]");
const TOKENS = ["--accent", "--second", "--ok", "--bad", "--warn", "--dim", "--text", "--accent"];
const DASHES = [[], [6, 4], [2, 3], [10, 4], [6, 2, 2, 2], [1, 4], [12, 6], [4, 4]];
const slider = /** @type {HTMLInputElement} */ (document.getElementById("smoothing"));
const plot = chart(document.getElementById("curves"), curves.map((curve, at) => ({ label: curve.label, token: TOKENS[at], dash: DASHES[at], width: 2 })));
const steps = [...new Set(curves.flatMap((curve) => curve.points.map((point) => point.step)))].sort((one, other) => one - other);

function draw() {
  plot.draw([steps, ...curves.map((curve) => {
    const values = new Map(curve.points.map((point) => [point.step, point.train_loss]));
    return smooth(steps.map((step) => values.get(step) ?? null), Number(slider.value));
  })]);
}
const all = /** @type {HTMLInputElement|null} */ (document.getElementById("all-settings"));
all?.addEventListener("change", () => {
  for (const row of document.querySelectorAll("#differences tr[data-same]")) /** @type {HTMLElement} */ (row).hidden = !all.checked;
});
slider.addEventListener("input", draw);
draw();
