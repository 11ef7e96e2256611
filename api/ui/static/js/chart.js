// @ts-check
import { t } from "./app.js";

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

/** The smallest value on a logarithmic axis: uPlot's ticks never end far below it. */
const LEAST = 1e-9;

/** One chart. @param {HTMLElement|null} place @param {{label: string, token: string, width?: number, dash?: number[], alpha?: number, points?: boolean}[]} lines
 * @param {(value: number) => string} [label] How a place on the x axis is written.
 * @returns {{draw: (data: (number|null)[][], log?: boolean) => void}} */
export function chart(place, lines, label) {
  /** @type {any} */ let plot = null;
  let wasLog = false;
  /** @type {(number|null)[][]} */ let shown = [];
  function build() {
    const uPlot = /** @type {any} */ (window).uPlot;
    if (!place || !uPlot) return;
    plot?.destroy();
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") }, font: "11px Inter, system-ui" };
    plot = new uPlot({
      width: place.clientWidth, height: place.clientHeight - legendHeight(place, lines.length), legend: { show: lines.length > 1 },
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: { distr: wasLog ? 3 : 1 } },
      axes: [label ? { ...axis, incrs: [1, 2, 7, 14, 30], values: (/** @type {unknown} */ _, /** @type {number[]} */ ticks) => ticks.map(label) } : axis, { ...axis, size: 62, values: (/** @type {unknown} */ _, /** @type {(number|null)[]} */ ticks) => ticks.map((tick) => (tick === null ? "" : brief(tick))) }],
      series: [{ label: label ? t("Day") : t("Step"), ...(label ? { value: (/** @type {unknown} */ _, /** @type {number|null} */ at) => (at === null ? "–" : label(at)) } : {}) }, ...lines.map((line) => ({ label: line.label, stroke: colour(line.token), width: line.width ?? 1.5, dash: line.dash, alpha: line.alpha ?? 1, spanGaps: true, points: { show: line.points ?? false, size: 5 } }))],
    }, shown, place);
  }
  document.addEventListener("themechange", () => requestAnimationFrame(build));
  window.addEventListener("resize", () => plot?.setSize({ width: place?.clientWidth ?? 300, height: (place?.clientHeight ?? 200) - legendHeight(place, lines.length) }));
  return {
    draw(data, log = false) {
      shown = log ? data.map((values, at) => (at ? values.map((value) => (value !== null && value > 0 ? Math.max(value, LEAST) : null)) : values)) : data;
      if (!plot || log !== wasLog) { wasLog = log; build(); } else plot.setData(shown);
    },
  };
}
