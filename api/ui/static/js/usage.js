// @ts-check
import { t } from "./app.js";
import { chart, daysAs } from "./chart.js";

/** @type {{day: number, trained: number, served: number}[]} */
const days = JSON.parse(document.getElementById("days-data")?.textContent ?? "[]");
const place = document.getElementById("days");
const plot = chart(place, [
  { label: t("trained"), token: "--accent", points: true }, { label: t("served"), token: "--second", dash: [6, 4], points: true },
], daysAs((day) => new Date(day * 86400000).toISOString().slice(5, 10)));
plot.draw([days.map((each) => each.day), days.map((each) => each.trained), days.map((each) => each.served)]);
if (place) place.dataset.days = String(days.length);
