"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const several = data.runs.length > 1;
// Okabe and Ito's palette for colour-blind readers, plus two colours.
const COLOURS = ["#1F83C7", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6BB1", "#7F7F7F"];
const DASHES = [[], [6, 4], [2, 3], [10, 3, 2, 3], [4, 2], [1, 2]];
const AXES = { step: "step", tokens: "million tokens", hours: "hours" };
const state = { axis: "step", smoothing: 0, logx: false, logy: false };
const charts = [];

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
function shown(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  return value.toLocaleString("en-US", { maximumSignificantDigits: 5 });
}
/** Compare two items for sorting: step parts and parameter groups have a fixed order; other items are sorted by name. */
function natural(a, b) {
  const indices = [data.order.indexOf(a), data.order.indexOf(b)];
  return indices.includes(-1) ? a.localeCompare(b, "en", { numeric: true }) : indices[0] - indices[1];
}
/** Return the colour of an item. Layers are coloured from dark to bright; all other items use the palette. */
function itemColour(item, index, count) {
  if (!item.startsWith("moe_layer_")) return COLOURS[index % COLOURS.length];
  const place = count > 1 ? index / (count - 1) : 0;
  return `hsl(${265 - 215 * place} 70% ${36 + 24 * place}%)`;
}

// Curves of a metric

/** Return the curves of a metric as [{run, item, group, values}]: the total first, then the items in natural order. */
function curvesOf(metric) {
  const found = [];
  data.runs.forEach((run, number) => {
    for (const group of run.groups) {
      for (const [key, values] of Object.entries(group.curves)) {
        const slash = key.indexOf("/");
        if ((slash < 0 ? key : key.slice(0, slash)) !== metric) continue;
        found.push({ run: number, item: slash < 0 ? "" : key.slice(slash + 1), group, values });
      }
    }
  });
  return found.sort((a, b) => a.run - b.run || natural(a.item, b.item));
}
/** Replace the layers of each run by their mean if the page compares several runs. */
function meansOverLayers(curves) {
  if (!several || !curves.some((curve) => curve.item.startsWith("moe_layer_"))) return curves;
  return data.runs.flatMap((_, run) => {
    const own = curves.filter((curve) => curve.run === run);
    if (!own.length) return [];
    const group = own[0].group;
    const alike = own.filter((curve) => curve.group === group);
    const values = group.step.map((_, i) => {
      const present = alike.map((curve) => curve.values[i]).filter((value) => value !== null);
      return present.length ? present.reduce((sum, value) => sum + value, 0) / present.length : null;
    });
    return [{ run, item: "mean of layers", group, values }];
  });
}
/** Return the training and validation losses for one chart. */
function lossCurves() {
  const named = (name, curve) => ({ ...curve, item: [name, curve.item].filter(Boolean).join(" ") });
  const training = curvesOf("loss").map((curve) => named("training", curve));
  return [...training, ...curvesOf("valid_loss").map((curve) => named("validation", curve))].sort((a, b) => a.run - b.run);
}
function smooth(values) {
  if (!state.smoothing) return values;
  let mean = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = state.smoothing * mean + (1 - state.smoothing) * value;
    weight = state.smoothing * weight + (1 - state.smoothing);
    return mean / weight;
  });
}
function names(curve) {
  const item = curve.item || (several ? "" : "total");
  return [several ? data.runs[curve.run].name : "", item].filter(Boolean).join(" · ");
}

// Charts

class Chart {
  constructor(parent, metric, curves) {
    const known = data.metrics[metric] || { unit: "", meaning: "" };
    this.unit = known.unit;
    this.curves = meansOverLayers(curves);
    this.stacked = metric === "step_seconds" && !several;
    if (this.stacked) this.curves = this.curves.filter((curve) => curve.item);
    this.visible = this.curves.map(() => true);
    const items = [...new Set(this.curves.map((curve) => curve.item))];
    this.colours = this.curves.map((curve) =>
      several ? COLOURS[curve.run % COLOURS.length] : itemColour(curve.item, items.indexOf(curve.item), items.length));
    this.dashes = this.curves.map((curve) => (several ? DASHES[items.indexOf(curve.item) % DASHES.length] : []));
    const unit = known.unit ? ` ${known.unit}` : "";
    this.plotted = element("div", { className: "plot" });
    this.legend = element("div", { className: "legend" });
    const bad = known.bad ? `; bad if it ${known.bad}` : "";
    parent.append(element("section", { className: "card" },
      element("h3", {}, metric, element("small", {}, unit)), element("p", {}, known.meaning + bad), this.plotted, this.legend));
    this.curves.forEach((curve, index) => this.legend.append(this.entry(curve, index)));
    if (this.curves.length === 1 && !several) this.legend.remove();
    charts.push(this);
  }
  entry(curve, index) {
    const line = element("i");
    line.style.borderTopColor = this.colours[index];
    if (this.dashes[index].length) line.style.borderTopStyle = "dashed";
    const button = element("button", { type: "button" }, line, names(curve));
    button.setAttribute("aria-pressed", "true");
    button.onclick = () => {
      this.visible[index] = !this.visible[index];
      button.setAttribute("aria-pressed", String(this.visible[index]));
      this.draw();
    };
    return button;
  }
  /** Return the rows for uPlot, with one x axis that all curves share. */
  rows() {
    const tables = this.curves.map((curve, index) => {
      const x = curve.group[state.axis] || curve.group.step;
      const values = this.visible[index] ? smooth(curve.values) : curve.values.map(() => null);
      const cut = state.logx || state.logy;
      const kept = cut ? x.map((_, i) => (!state.logx || x[i] > 0) && (!state.logy || values[i] === null || values[i] > 0)) : null;
      return kept ? [x.filter((_, i) => kept[i]), values.filter((_, i) => kept[i])] : [x, values];
    });
    const joined = uPlot.join(tables.map(([x, y]) => increasing(x, y)), tables.map(() => [2]));
    return this.stacked ? stack(joined) : joined;
  }
  draw() {
    const rows = this.rows();
    this.tip = element("div", { className: "tip" });
    if (this.plot) this.plot.destroy();
    const axis = { stroke: colour("--faint"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { stroke: colour("--grid") }, font: "11px system-ui, sans-serif" };
    const compact = (_, values) => values.map((value) => (value === null ? "" : label(value)));
    const options = {
      width: Math.max(this.plotted.clientWidth, 200), height: 230, legend: { show: false }, padding: [8, 18, 0, 0],
      cursor: { points: { size: 6 }, drag: { x: true, y: false }, sync: { key: "all" } },
      scales: { x: { time: false, distr: state.logx ? 3 : 1 }, y: { distr: state.logy ? 3 : 1 } },
      axes: [{ ...axis, values: compact, size: 30, label: AXES[state.axis], labelSize: 18, labelFont: axis.font, labelGap: -4 }, { ...axis, values: compact, size: 56 }],
      series: [{}, ...this.curves.map((curve, index) => ({
        label: names(curve), stroke: this.colours[index], dash: this.dashes[index], width: curve.item ? 1.3 : 1.8,
        spanGaps: true, points: { show: curve.values.length < 40, size: 4 },
        fill: this.stacked ? this.colours[index] + "66" : undefined,
      }))],
      bands: this.stacked ? this.bands() : [],
      hooks: { setCursor: [(plot) => this.hover(plot)], drawClear: [(plot) => this.marks(plot)] },
    };
    this.plot = new uPlot(options, rows, this.plotted);
    this.plot.over.append(this.tip);
  }
  /** Return the areas to fill between each visible curve and the next visible curve below it. */
  bands() {
    const shownOnes = this.curves.map((_, index) => index + 1).filter((series) => this.visible[series - 1]);
    return shownOnes.slice(1).map((series, i) => ({ series: [series, shownOnes[i]] }));
  }
  /** Mark the steps at which a run was resumed. */
  marks(plot) {
    const runs = [...new Set(this.curves.map((curve) => curve.run))];
    for (const run of runs) {
      const curve = this.curves.find((each) => each.run === run);
      for (const step of data.runs[run].resumed) {
        const index = curve.group.step.findIndex((each) => each >= step);
        if (index < 0) continue;
        const x = plot.valToPos(state.axis === "step" ? step : curve.group[state.axis][index], "x", true);
        if (!Number.isFinite(x)) continue;
        plot.ctx.save();
        plot.ctx.strokeStyle = several ? COLOURS[run % COLOURS.length] : colour("--mark");
        plot.ctx.setLineDash([4, 4]);
        plot.ctx.beginPath();
        plot.ctx.moveTo(x, plot.bbox.top);
        plot.ctx.lineTo(x, plot.bbox.top + plot.bbox.height);
        plot.ctx.stroke();
        plot.ctx.restore();
      }
    }
  }
  hover(plot) {
    const { idx, left, top } = plot.cursor;
    if (idx === null || idx === undefined || left < 0 || !plot.over.matches(":hover")) {
      this.tip.style.display = "none";
      return;
    }
    const lines = this.curves.map((curve, index) => [curve, index, near(plot.data[index + 1], idx)]).filter((line) => line[2] !== null && this.visible[line[1]]);
    if (this.stacked) {
      const tops = lines.map((line) => line[2]);
      lines.forEach((line, i) => { line[2] -= i ? tops[i - 1] : 0; });
    }
    const x = plot.data[0][idx];
    this.tip.replaceChildren(element("b", {}, `${AXES[state.axis]} ${state.axis === "step" ? x.toLocaleString("en-US") : shown(x)}`));
    for (const [curve, index, value] of lines.slice(0, 16)) {
      const dot = element("i");
      dot.style.background = this.colours[index];
      const name = this.curves.length > 1 ? `${names(curve)}  ` : "";
      this.tip.append(element("br"), dot, `${name}${shown(value)}${this.unit ? ` ${this.unit}` : ""}`);
    }
    if (lines.length > 16) this.tip.append(element("br"), `and ${lines.length - 16} more`);
    this.tip.style.display = "block";
    const wide = this.tip.offsetWidth, space = plot.over.clientWidth;
    const beside = left + 14 + wide > space ? left - wide - 14 : left + 14;
    this.tip.style.left = `${Math.min(Math.max(beside, -50), Math.max(space - wide, -50))}px`;
    this.tip.style.top = `${Math.min(top + 10, Math.max(plot.over.clientHeight - this.tip.offsetHeight, 0))}px`;
  }
}
/** Return the value at an index, or the last value before this index if the curve has a gap on the shared x axis. */
function near(values, index) {
  for (let i = index; i >= 0; i--) if (values[i] !== null && values[i] !== undefined) return values[i];
  return null;
}
function label(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(4)}B`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}K`;
  return size !== 0 && size < 1e-3 ? value.toExponential(0) : String(+value.toPrecision(4));
}
/** Make x strictly increasing: drop points at which x does not increase. The last of their values is kept. */
function increasing(x, y) {
  const xs = [], ys = [];
  for (let i = 0; i < x.length; i++) {
    if (x[i] === null) continue;
    if (xs.length && x[i] <= xs[xs.length - 1]) {
      if (y[i] !== null) ys[ys.length - 1] = y[i];
      continue;
    }
    xs.push(x[i]);
    ys.push(y[i]);
  }
  return [xs, ys];
}
function stack(rows) {
  const sums = rows[0].map(() => 0);
  return [rows[0], ...rows.slice(1).map((row) => row.map((value, i) => (value === null || value === undefined ? null : (sums[i] += value))))];
}

// Heat maps of the loads

function ramp(load) {
  const dark = document.documentElement.dataset.theme === "dark";
  const even = dark ? [58, 64, 76] : [236, 238, 241];
  const end = load < 1 ? (dark ? [86, 180, 233] : [0, 92, 168]) : (dark ? [240, 170, 60] : [213, 94, 0]);
  const part = load < 1 ? 1 - load : Math.min((load - 1) / 2, 1);
  return even.map((from, i) => Math.round(from + (end[i] - from) * part));
}
class HeatMap {
  /** Create an empty heat map; `fill` sets its cells. */
  constructor(parent, title, help) {
    this.canvas = element("canvas", { className: "heat" });
    this.tip = element("div", { className: "tip" });
    this.row = element("div", { className: "heat-row" });
    parent.append(element("section", { className: "card wide" }, element("h3", {}, title), element("p", {}, help),
      this.row, element("div", { className: "heat-plot" }, this.canvas, this.tip)));
    this.canvas.onmousemove = (event) => this.hover(event);
    this.canvas.onmouseleave = () => { this.tip.style.display = "none"; };
    charts.push(this);
  }
  fill(rows, columns, cell, titleOf) {
    Object.assign(this, { rows, columns, cell, titleOf });
    this.draw();
  }
  draw() {
    const { rows, columns } = this;
    Object.assign(this.canvas, { width: columns, height: rows });
    this.canvas.style.height = `${Math.min(Math.max(rows * 12, 60), 420)}px`;
    const context = this.canvas.getContext("2d"), image = context.createImageData(columns, rows);
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        image.data.set([...ramp(this.cell(row, column)), 255], 4 * (row * columns + column));
      }
    }
    context.putImageData(image, 0, 0);
  }
  hover(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.min(Math.floor(((event.clientX - box.left) / box.width) * this.columns), this.columns - 1);
    const row = Math.min(Math.floor(((event.clientY - box.top) / box.height) * this.rows), this.rows - 1);
    if (row < 0 || column < 0) return;
    this.tip.textContent = `${this.titleOf(row, column)}: ${this.cell(row, column).toFixed(2)} of the mean`;
    this.tip.style.display = "block";
    const left = event.clientX - box.left;
    this.tip.style.left = `${left > box.width / 2 ? left - this.tip.offsetWidth - 12 : left + 12}px`;
    this.tip.style.top = `${event.clientY - box.top + 12}px`;
  }
}
function choice(name, options, change) {
  const select = element("select");
  options.forEach((option, value) => select.append(element("option", { value }, option)));
  select.onchange = change;
  return [element("label", {}, name, select), select];
}
function heatMaps(parent) {
  const runs = data.runs.filter((run) => run.loads);
  if (!runs.length) return;
  for (const run of runs) {
    const packed = atob(run.loads.bytes);
    run.loads.at = (bin, layer, expert) => packed.charCodeAt((bin * run.loads.layers + layer) * run.loads.experts + expert) / run.loads.levels;
  }
  const byStep = new HeatMap(parent, "expert load by layer and expert", "one row per layer, one column per expert; load / mean load: blue is below the mean, orange above");
  const [runLabel, run] = choice("run", runs.map((each) => each.name), () => { reset(); });
  const slider = element("input", { type: "range", min: 0, step: 1 }), place = element("span");
  slider.oninput = () => drawStep();
  if (several) byStep.row.append(runLabel);
  byStep.row.append(element("label", {}, "time", slider), place, scaleBar());
  const overTime = new HeatMap(parent, "expert load over time", "one row per expert of a layer, time from left to right; load / mean load");
  const layer = element("select");
  layer.onchange = () => drawLayer();
  const whose = element("span");
  if (several) overTime.row.append(whose);
  overTime.row.append(element("label", {}, "layer", layer), scaleBar());
  const loads = () => runs[Number(run.value || 0)].loads;
  function drawStep() {
    const { layers, experts, at, step } = loads(), bin = Number(slider.value);
    place.textContent = `from step ${step[bin].toLocaleString("en-US")}`;
    byStep.fill(layers, experts, (row, column) => at(bin, row, column), (row, column) => `layer ${row}, expert ${column}`);
  }
  function drawLayer() {
    const { experts, at, step } = loads(), chosen = Number(layer.value || 0);
    overTime.fill(experts, step.length, (row, column) => at(column, chosen, row), (row, column) => `expert ${row}, from step ${step[column].toLocaleString("en-US")}`);
  }
  function reset() {
    whose.textContent = runs[Number(run.value || 0)].name;
    slider.max = loads().step.length - 1;
    slider.value = slider.max;
    layer.replaceChildren(...Array.from({ length: loads().layers }, (_, i) => element("option", { value: i }, String(i))));
    drawStep();
    drawLayer();
  }
  reset();
}
function scaleBar() {
  const bar = element("span", { className: "ramp" });
  bar.draw = () => {
    const stops = [0, 0.5, 1, 2, 3].map((load, i) => `rgb(${ramp(load)}) ${i * 25}%`);
    bar.style.background = `linear-gradient(90deg, ${stops})`;
  };
  charts.push(bar);
  return element("span", {}, "0 ", bar, " 3 x mean");
}

// The page

function table(head, rows, differ = false) {
  const body = rows.map(([name, ...values]) => element("tr", {}, element("th", {}, name),
    ...values.map((value) => element("td", { className: differ && several ? "differs" : "" }, value))));
  const parts = head.length ? [element("thead", {}, element("tr", {}, ...head.map((text) => element("th", {}, text))))] : [];
  return element("div", { className: "scroll" }, element("table", {}, ...parts, element("tbody", {}, ...body)));
}
function section(title) {
  const id = title.toLowerCase().replace(/\W+/g, "-");
  const made = element("section", { id }, element("h2", {}, title));
  document.querySelector("main").append(made);
  document.querySelector("nav").append(element("a", { href: `#${id}` }, title));
  return made;
}
function samples() {
  const runs = data.runs.filter((run) => run.samples.length);
  if (!runs.length) return;
  const made = section("Samples");
  for (const run of runs) {
    const bySteps = new Map();
    for (const sample of run.samples) bySteps.set(sample[0], [...(bySteps.get(sample[0]) || []), sample]);
    let first = true;
    for (const [step, texts] of bySteps) {
      const blocks = texts.map(([, prompt, text]) => element("pre", {}, String(prompt), element("mark", {}, String(text))));
      made.append(element("details", { open: first }, element("summary", {}, `${several ? `${run.name}, ` : ""}step ${step}`), ...blocks));
      first = false;
    }
  }
}
function settings() {
  const made = section("Settings");
  const rows = data.settings.map(([key, values]) => [key, ...values]);
  if (several) {
    made.append(rows.length ? table(["setting", ...data.runs.map((run) => run.name)], rows, true) : element("p", {}, "All settings are the same."));
  } else {
    made.append(element("details", {}, element("summary", {}, `${rows.length} settings`), table([], rows)));
  }
}
function build() {
  document.querySelector("h1").textContent = data.runs.map((run) => run.name).join(" vs ");
  document.querySelector(".made").textContent = `report of ${data.made}`;
  section("Summary").append(table(several ? ["", ...data.runs.map((run) => run.name)] : [], data.summary));
  const keys = new Set(data.runs.flatMap((run) => run.groups.flatMap((group) => Object.keys(group.curves).map((key) => key.split("/")[0]))));
  const order = [...Object.keys(data.metrics), ...[...keys].filter((key) => !data.metrics[key]).sort()];
  for (const [page, title] of Object.entries(data.pages)) {
    const own = order.filter((key) => keys.has(key) && (data.metrics[key]?.page || "other") === page);
    const hasLoads = page === "routing" && data.runs.some((run) => run.loads);
    if (!own.length && !hasLoads) continue;
    const grid = element("div", { className: "charts" });
    section(title).append(grid);
    if (hasLoads) heatMaps(grid);
    for (const metric of own) new Chart(grid, metric, metric === "loss" ? lossCurves() : curvesOf(metric));
  }
  settings();
  samples();
}
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((each) => each.isIntersecting)) {
    watcher.unobserve(entry.target);
    entry.target.chart.draw();
  }
}, { rootMargin: "400px" });
/** Draw the heat maps now and each chart when it scrolls into view. */
function drawAll() {
  watcher.disconnect();
  for (const chart of charts) {
    if (chart instanceof Chart) {
      chart.plotted.chart = chart;
      watcher.observe(chart.plotted);
    } else chart.draw();
  }
}
function theme(name) {
  document.documentElement.dataset.theme = name;
  document.getElementById("theme").textContent = name === "dark" ? "light" : "dark";
}
function controls() {
  const axis = document.getElementById("axis");
  for (const [key, title] of Object.entries(AXES)) {
    if (data.runs.every((run) => run.groups.every((group) => group[key]))) axis.append(element("option", { value: key }, title));
  }
  axis.onchange = () => { state.axis = axis.value; drawAll(); };
  const smoothing = document.getElementById("smoothing");
  smoothing.oninput = () => { state.smoothing = Number(smoothing.value); drawAll(); };
  for (const name of ["logx", "logy"]) {
    const box = document.getElementById(name);
    box.onchange = () => { state[name] = box.checked; drawAll(); };
  }
  document.getElementById("theme").onclick = () => {
    theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    drawAll();
  };
  let waiting;
  window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 150); });
}
theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
build();
controls();
drawAll();
