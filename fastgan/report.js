"use strict";
// The slider over the sample grids, and the curves. Everything else on the page is plain HTML.
const HEIGHT = 210, LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 22;
const state = { log: false, smooth: 0, axis: "kimg" };
const charts = JSON.parse(document.getElementById("data").textContent);

function make(name, attributes, parent, text) {
  const svg = ["svg", "path", "line", "text", "g"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

// Four significant digits, without the zeros that say nothing.
function shown(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

// Round numbers that divide low..high in about `count` parts: 1, 2 or 5 times a power of ten apart.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) found.push(v);
  return found;
}

// Moving average whose first values weigh only what has been seen; gaps stay gaps.
function smoothed(values, keep) {
  let sum = 0, weight = 0;
  return values.map((v) => {
    if (v === null) return null;
    sum = keep * sum + (1 - keep) * v;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

function nearest(xs, x) {
  let best = 0;
  xs.forEach((v, i) => { if (Math.abs(v - x) < Math.abs(xs[best] - x)) best = i; });
  return best;
}

// The horizontal axis: thousand images, or time in the largest unit that leaves a number above one.
function axis() {
  if (state.axis === "kimg") return { name: "kimg", scale: 1 };
  const most = Math.max(0, ...charts.flatMap((c) => c.lines.flatMap((l) => l.seconds)));
  return most > 7200 ? { name: "hours", scale: 3600 } : most > 120 ? { name: "minutes", scale: 60 } : { name: "seconds", scale: 1 };
}

// Eight colours, then the same with dashes.
const look = (line) => `c${line.color % 8}` + (Math.floor(line.color / 8) % 2 ? " dashed" : "");

function draw(chart) {
  const { svg, lines } = chart, width = svg.clientWidth || 400, { name, scale } = axis();
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  chart.curves = lines.map((line) => ({
    look: look(line),
    xs: (state.axis === "kimg" ? line.kimg : line.seconds).map((x) => x / scale),
    raw: line.y,
    ys: state.smooth > 0 ? smoothed(line.y, state.smooth) : line.y,
  }));
  const seen = chart.curves.flatMap((c) => c.ys.filter((y) => y !== null));
  const log = state.log && seen.length > 0 && seen.every((y) => y > 0);
  const bend = log ? Math.log10 : (y) => y;
  let low = Math.min(...seen.map(bend)), high = Math.max(...seen.map(bend));
  if (!seen.length) [low, high] = [0, 1];
  const air = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  low -= air; high += air;
  const last = Math.max(...chart.curves.map((c) => c.xs[c.xs.length - 1] ?? 0)) || 1;
  const px = (x) => LEFT + (x / last) * (width - LEFT - RIGHT);
  const py = (y) => TOP + ((high - bend(y)) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  for (const v of ticks(low, high, 5)) {
    const value = log ? 10 ** v : v, y = py(value);
    make("line", { class: "rule", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }, svg);
    make("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, svg, shown(value));
  }
  for (const v of ticks(0, last, Math.max(2, width / 110)))
    make("text", { x: px(v), y: HEIGHT - 6, "text-anchor": v > last * 0.95 ? "end" : "middle" }, svg, shown(v) + (v === 0 ? " " + name : ""));
  const path = (xs, ys) => {
    let pen = "M";
    return xs.map((x, i) => {
      if (ys[i] === null || (log && ys[i] <= 0)) { pen = "M"; return ""; }
      const move = `${pen}${px(x).toFixed(1)} ${py(ys[i]).toFixed(1)}`;
      pen = "L";
      return move;
    }).join("") || "M0 0";
  };
  const clamp = (ys) => ys.map((y) => (y === null ? y : Math.min(Math.max(bend(y), low), high))).map((y) => (y === null || !log ? y : 10 ** y));
  chart.curves.forEach((c) => {
    if (state.smooth > 0) make("path", { class: `raw ${c.look}`, d: path(c.xs, clamp(c.raw)) }, svg);
    const d = path(c.xs, c.ys);
    // A single point has no length to be seen by; the style makes it a dot.
    const dot = c.ys.filter((y) => y !== null).length === 1;
    make("path", { class: c.look + (dot ? " dot" : ""), d: dot ? d + "h0" : d }, svg);
  });
  chart.here = make("line", { class: "here", y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 }, svg);
  chart.at = (x) => (x - LEFT) / (width - LEFT - RIGHT) * last;
  chart.px = px;
  read(chart, last);
}

// Values of all curves nearest to x go to the legend.
function read(chart, x) {
  const xs = chart.curves.flatMap((c) => c.xs), here = xs[nearest(xs, x)];
  chart.read = here;
  chart.where.textContent = `${shown(here)} ${axis().name}`;
  chart.curves.forEach((c, i) => { chart.values[i].textContent = shown(c.ys[nearest(c.xs, here)]); });
  return here;
}

const section = document.getElementById("charts");
for (const chart of charts) {
  const box = make("figure", { class: "chart" }, section);
  const head = make("h3", {}, box, chart.title);
  chart.where = make("span", {}, head);
  chart.svg = make("svg", { role: "img", "aria-label": chart.title, tabindex: 0 }, box);
  const legend = make("ul", {}, box);
  chart.values = chart.lines.map((line) => {
    const item = make("li", { class: look(line) }, legend);
    make("span", {}, item, line.name + " ");
    return make("span", {}, item);
  });
  const show = (at) => {
    const x = chart.px(read(chart, at));
    chart.here.setAttribute("x1", x);
    chart.here.setAttribute("x2", x);
  };
  const point = (event) => show(chart.at(event.offsetX));
  chart.svg.addEventListener("pointermove", point);
  chart.svg.addEventListener("pointerdown", point);
  chart.svg.addEventListener("pointerleave", () => draw(chart));
  chart.svg.addEventListener("blur", () => draw(chart));
  chart.svg.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    const xs = [...new Set(chart.curves.flatMap((c) => c.xs))].sort((a, b) => a - b);
    show(xs[xs.indexOf(chart.read) + way] ?? chart.read);
    event.preventDefault(); // a wide page is not to scroll
  });
}

const drawAll = () => charts.forEach(draw);
if (section) { // a run without ticks has no curves
  document.getElementById("log").addEventListener("change", (event) => { state.log = event.target.checked; drawAll(); });
  document.getElementById("smooth").addEventListener("input", (event) => { state.smooth = Number(event.target.value); drawAll(); });
  document.getElementById("axis").addEventListener("change", (event) => { state.axis = event.target.value; drawAll(); });
  addEventListener("resize", drawAll);
  drawAll();
}

const slider = document.getElementById("tick");
if (slider) {
  const grids = [...document.querySelectorAll("#grids img")], label = document.getElementById("shown");
  slider.addEventListener("input", () => {
    grids.forEach((grid, i) => { grid.hidden = i !== Number(slider.value); });
    label.textContent = grids[slider.value].alt;
  });
  slider.value = grids.length - 1; // a reloaded page may remember another
}
