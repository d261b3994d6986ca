// Line charts as SVG. Series differ in colour, dash and marker, and their last values are written at their ends; the
// numbers also stand in a table beside each chart, so the picture has one sentence as its name.

import { h, svg } from "./dom.js";

const HEIGHT = 200;
const EDGE = { top: 12, right: 58, bottom: 26, left: 46 };

function niceTicks(low, high, count = 4) {
  const raw = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw * 0.999);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: Math.max(last - first, 1) + 1 }, (_, index) => (first + index) * step);
}

function marker(kind, x, y) {
  const shapes = {
    0: () => svg("circle", { cx: x, cy: y, r: 3.6 }),
    1: () => svg("rect", { x: x - 3.3, y: y - 3.3, width: 6.6, height: 6.6 }),
    2: () => svg("path", { d: `M${x} ${y - 4.4}L${x + 4.2} ${y + 3.2}H${x - 4.2}Z` }),
  };
  return shapes[kind % 3]();
}

/**
 * A chart of series over the same places on the x axis.
 *
 * name: what it shows, in a sentence; labels: of the places; series: {name, values} with null for a gap; range: of the
 * y axis, else that of the values; format: of the y values; width: px, of the place where it will stand.
 */
export function lineChart({ name, labels, series, range, format, width, tiny = false, dots = true }) {
  const edge = tiny ? { ...EDGE, right: 52 } : EDGE;
  const height = tiny ? 150 : HEIGHT;
  const known = series.flatMap(({ values }) => values).filter((value) => typeof value === "number");
  const low = range ? range[0] : Math.min(...known);
  const high = range ? range[1] : Math.max(...known);
  const ticks = niceTicks(low, high, tiny ? 3 : 4);
  const [bottom, top] = [ticks[0], ticks.at(-1)];
  const right = width - edge.right;
  const x = (index) => edge.left + (labels.length < 2 ? 0.5 : index / (labels.length - 1)) * (right - edge.left);
  const y = (value) => height - edge.bottom - ((value - bottom) / (top - bottom)) * (height - edge.bottom - edge.top);
  const round = (value) => Math.round(value * 10) / 10;
  const parts = ticks.map((tick) => [
    svg("line", { class: "grid", x1: edge.left, x2: right, y1: round(y(tick)), y2: round(y(tick)) }),
    svg("text", { class: "tick", x: edge.left - 8, y: round(y(tick)) + 4, "text-anchor": "end" }, format(tick)),
  ]);
  const every = Math.max(1, Math.ceil(labels.length / Math.max(2, Math.floor((right - edge.left) / 56))));
  labels.forEach((label, index) => {
    if (index % every && index !== labels.length - 1) return;
    if (index !== labels.length - 1 && labels.length - 1 - index < every) return;
    parts.push(svg("text", { class: "tick", x: round(x(index)), y: height - 6, "text-anchor": "middle" }, label));
  });
  const ends = [];
  series.forEach(({ values }, number) => {
    const points = values.map((value, index) => [round(x(index)), value]).filter(([, value]) => typeof value === "number");
    if (!points.length) return;
    const line = points.map(([px, value], index) => `${index ? "L" : "M"}${px} ${round(y(value))}`).join("");
    parts.push(svg("path", { class: `line s${number}`, d: line }));
    if (dots) parts.push(svg("g", { class: `dot s${number}` }, points.map(([px, value]) => marker(number, px, round(y(value))))));
    ends.push({ number, at: y(points.at(-1)[1]), x: points.at(-1)[0], value: points.at(-1)[1] });
  });
  ends.sort((one, other) => one.at - other.at);
  ends.forEach((end, index) => {
    if (index) end.at = Math.max(end.at, ends[index - 1].at + 14);
    const label = { class: `end s${end.number}`, x: end.x + 9, y: round(end.at) + 4 };
    parts.push(svg("text", label, format(end.value)));
  });
  const picture = svg("svg", { role: "img", "aria-label": name, viewBox: `0 0 ${width} ${height}`, width, height }, parts);
  const legend = series.length > 1 && h("ul", { class: "legend", role: "list" }, series.map((one, number) => h("li", null, key(number), one.name)));
  return h("figure", { class: "chart" }, picture, legend);
}

function key(number) {
  const line = svg("path", { class: `line s${number}`, d: "M0 6H28" });
  return svg("svg", { class: "key", viewBox: "0 0 28 12", width: 28, height: 12, "aria-hidden": "true" }, line, svg("g", { class: `dot s${number}` }, marker(number, 14, 6)));
}
