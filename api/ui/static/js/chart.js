// @ts-check
import { t } from "./app.js";
import { duration } from "./lib.js";

/** uPlot charts that read the page's colours, so that they follow the theme. */

/** @param {string} token */
const colour = (token) => {
  const probe = document.createElement("span");
  probe.style.color = `var(${token})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
};

/** Room for the legend, which takes two lines on a phone. @param {HTMLElement|null} place @param {number} n_lines */
const legendHeight = (place, n_lines) => (n_lines < 2 ? 0 : (place?.clientWidth ?? 600) < 420 ? 64 : 34);

/** A tick's value, short enough for the axis. @param {number} value */
const brief = (value) => (value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(1).replace("e", " e") : String(Number(value.toPrecision(4))));

/** What lies along the x axis: its name, how a place on it is written, and the steps of its ticks.
 * @typedef {{name: string, write?: (value: number) => string, ticks: number[]}} Axis */

/** Days, of which `write` makes a date. @param {(value: number) => string} write @returns {Axis} */
export const daysAs = (write) => ({ name: t("Day"), write, ticks: [1, 2, 7, 14, 30] });
/** @type {Axis} */
export const STEPS = { name: t("Step"), ticks: [1, 2, 5].flatMap((each) => Array.from({ length: 8 }, (_, power) => each * 10 ** power)).sort((one, other) => one - other) };
/** Seconds since the first step. @type {Axis} */
export const SECONDS = { name: t("Time"), write: duration, ticks: [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400, 604800] };

/** The smallest value on a logarithmic axis: uPlot's ticks never end far below it. */
const LEAST = 1e-9;

/** One chart. @param {HTMLElement|null} place @param {{label: string, token: string, width?: number, dash?: number[], alpha?: number, points?: boolean}[]} lines
 * @param {Axis} [along]
 * @returns {{draw: (data: (number|null)[][], log?: boolean, x?: Axis) => void}} */
export function chart(place, lines, along = STEPS) {
  /** @type {any} */ let plot = null;
  let wasLog = false, axisOfX = along;
  /** @type {(number|null)[][]} */ let shown = [];
  function build() {
    const uPlot = /** @type {any} */ (window).uPlot;
    if (!place || !uPlot) return;
    plot?.destroy();
    const write = axisOfX.write;
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") }, font: "11px Inter, system-ui" };
    plot = new uPlot({
      width: place.clientWidth, height: place.clientHeight - legendHeight(place, lines.length), legend: { show: lines.length > 1 },
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: { distr: wasLog ? 3 : 1 } },
      axes: [{ ...axis, incrs: axisOfX.ticks, ...(write ? { values: (/** @type {unknown} */ _, /** @type {number[]} */ ticks) => ticks.map(write) } : {}) }, { ...axis, size: 62, values: (/** @type {unknown} */ _, /** @type {(number|null)[]} */ ticks) => ticks.map((tick) => (tick === null ? "" : brief(tick))) }],
      series: [{ label: axisOfX.name, ...(write ? { value: (/** @type {unknown} */ _, /** @type {number|null} */ at) => (at === null ? "–" : write(at)) } : {}) }, ...lines.map((line) => ({ label: line.label, stroke: colour(line.token), width: line.width ?? 1.5, dash: line.dash, alpha: line.alpha ?? 1, spanGaps: true, points: { show: line.points ?? false, size: 5 } }))],
    }, shown, place);
  }
  document.addEventListener("themechange", () => requestAnimationFrame(build));
  window.addEventListener("resize", () => plot?.setSize({ width: place?.clientWidth ?? 300, height: (place?.clientHeight ?? 200) - legendHeight(place, lines.length) }));
  return {
    draw(data, log = false, x = along) {
      shown = log ? data.map((values, at) => (at ? values.map((value) => (value !== null && value > 0 ? Math.max(value, LEAST) : null)) : values)) : data;
      if (!plot || log !== wasLog || x !== axisOfX) { wasLog = log; axisOfX = x; build(); } else plot.setData(shown);
    },
  };
}
