// The candidates of a search: their loss over their size, as a small chart and as rows of a table.

import { bytes } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT] = [480, 240, 64, 34, 12, 14];

/** Draw candidates ({number, name, bytes, kl, error}) in `place` and list them in `rows`; `mark` follows the best one's name. */
export function drawCandidates(place, rows, all, mark) {
  const candidates = all.filter((one) => Number.isFinite(one.kl));
  if (!candidates.length) { place.replaceChildren(); rows.replaceChildren(); return; }
  const best = candidates.reduce((one, other) => (other.kl < one.kl ? other : one));
  const size = scale(candidates.map((one) => one.bytes), LEFT, WIDTH - RIGHT);
  const loss = scale(candidates.map((one) => one.kl), HEIGHT - BOTTOM, TOP);
  const svg = node("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" });        // the table says the same
  svg.append(node("path", { class: "axis", fill: "none", d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}` }));
  for (const value of size.marks) { svg.append(text(size.of(value), HEIGHT - BOTTOM + 18, bytes(value), "middle")); }
  for (const value of loss.marks) { svg.append(text(LEFT - 6, loss.of(value) + 4, value.toPrecision(2), "end")); }
  svg.append(text(LEFT + 6, TOP + 8, "KL", "start"));
  for (const one of candidates) {
    const point = node("circle", { cx: size.of(one.bytes), cy: loss.of(one.kl), r: 5, class: one === best ? "best" : "" });
    point.append(Object.assign(node("title", {}), { textContent: one.name }));
    svg.append(point);
  }
  place.replaceChildren(...(candidates.length > 1 ? [svg] : []));         // one point is no picture
  rows.replaceChildren(...candidates.map((one) => {
    const row = document.createElement("tr");
    for (const value of [one === best ? `${one.name} ${mark}` : one.name, bytes(one.bytes), lossOf(one)]) {
      row.appendChild(document.createElement("td")).textContent = value;
    }
    if (one === best) { row.style.fontWeight = "700"; }
    return row;
  }));
}

const lossOf = ({ kl, error }) => `${kl.toPrecision(3)}${Number.isFinite(error) ? ` ± ${error.toPrecision(1)}` : ""}`;

/** A logarithmic scale over positive values, with a margin, and the values to mark. */
function scale(values, from, to) {
  const positive = values.map((value) => Math.max(value, 1e-9));
  let [low, high] = [Math.min(...positive), Math.max(...positive)];
  const marks = high > 1.02 * low ? [low, high] : [low];
  [low, high] = [low / 1.05, high * 1.05];
  const at = (value) => (Math.log(Math.max(value, 1e-9)) - Math.log(low)) / (Math.log(high) - Math.log(low));
  return { marks, of: (value) => from + (to - from) * at(value) };
}

function node(kind, values) {
  const made = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(values)) { made.setAttribute(name, value); }
  return made;
}

function text(x, y, content, anchor) {
  const made = node("text", { x, y, "text-anchor": anchor });
  made.textContent = content;
  return made;
}
