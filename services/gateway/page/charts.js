// The charts: what each shows of the history. uPlot draws them.

import { count, percent, plain, plainPercent, rate, seconds } from "./figures.js";
import { drawHeat, edges, label, rowOf, usedRows } from "./heatmap.js";

const HEIGHT = 160;
const CUT_AT_MEDIANS = 4;
const PARTS = [["forward", "blue"], ["sample", "teal"], ["schedule", "violet"], ["emit", "amber"], ["gap", "red"]];
const WASTED = [["cancelled", "amber"], ["discarded", "violet"], ["recomputed", "red"]];

const SPECS = {
  tokens: { show: rate, tick: plain, lines: [{ name: "tokens/s", colour: "blue", fill: true, pick: (r) => r.tokens_per_s }] },
  steps: { show: rate, tick: plain, lines: [{ name: "steps/s", colour: "teal", fill: true, pick: (r) => r.steps_per_s }] },
  sequences: {
    show: count,
    tick: plain,
    lines: [
      { name: "running", colour: "blue", fill: true, pick: (r) => r.num_running },
      { name: "waiting", colour: "amber", pick: (r) => r.num_waiting },
      { name: "preempted/s", colour: "red", show: rate, pick: (r) => r.preemptions_per_s },
    ],
  },
  parts: {
    show: seconds,
    isCut: true,
    stack: PARTS.map(([name, colour]) => ({ name, colour, pick: (r) => r.parts_s?.[name] })),
    lines: [{ name: "gap share", colour: "text", scale: "share", dash: [3, 3], show: percent, pick: (r) => r.gap_share }],
  },
  wasted: {
    show: percent,
    tick: plainPercent,
    least: 0.01,
    stack: WASTED.map(([name, colour]) => ({ name, colour, pick: (r) => r.wasted_shares?.[name] })),
    lines: [],
  },
  step_tokens: {
    show: count,
    heat: (r) => r.steps_by_tokens,
    bounds: (history) => history.bounds.tokens,
    lines: [
      { name: "p50", colour: "text", pick: (r) => r.step_tokens_p50 },
      { name: "p95", colour: "red", pick: (r) => r.step_tokens_p95 },
    ],
  },
  inter_token: {
    show: seconds,
    heat: (r) => r.steps_by_inter_token,
    bounds: (history) => history.bounds.inter_token_s,
    lines: [
      { name: "p50", colour: "text", pick: (r) => r.inter_token_p50_s },
      { name: "p95", colour: "red", pick: (r) => r.inter_token_p95_s },
    ],
  },
};

export class Charts {
  constructor(history) {
    this.history = history;
    this.all = [];
    this.build();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.build());
  }

  build() {
    for (const chart of this.all) chart.close();
    this.all = [...document.querySelectorAll("[data-chart]")].map(
      (place) => new Chart(place, SPECS[place.dataset.chart], this.history),
    );
  }

  update() {
    for (const chart of this.all) chart.update();
  }
}

class Chart {
  constructor(place, spec, history) {
    this.spec = spec;
    this.history = history;
    // Highest first: each fill covers the lower part of the one before.
    this.series = [...[...(spec.stack ?? [])].reverse(), ...spec.lines];
    this.plot = new uPlot(this.#options(place), this.#data(), place);
    this.observer = new ResizeObserver(() => {
      if (place.clientWidth) this.plot.setSize({ width: place.clientWidth, height: HEIGHT });
    });
    this.observer.observe(place);
  }

  close() {
    this.observer.disconnect();
    this.plot.destroy();
  }

  update() {
    this.plot.setData(this.#data());
    if (this.plot.cursor.idx == null) this.plot.setLegend({ idx: this.history.times.length - 1 });
  }

  #data() {
    const columns = this.series.map((series) => this.history.column(series.pick));
    this.values = columns;
    if (this.spec.stack) return [this.history.times, ...stacked(columns, this.spec.stack.length)];
    if (!this.spec.heat) return [this.history.times, ...columns];
    this.heat = this.history.column(this.spec.heat);
    this.rows = usedRows(this.heat);
    const bounds = this.spec.bounds(this.history);
    return [this.history.times, ...columns.map((column) => column.map((v) => rowOf(v, bounds)))];
  }

  #options(place) {
    const { spec } = this;
    return {
      width: place.clientWidth,
      height: HEIGHT,
      cursor: { sync: { key: "time" }, points: { size: 6 }, drag: { x: false, y: false } },
      legend: { live: true },
      scales: {
        x: { time: true, range: () => this.history.range },
        y: { range: (_, low, high) => this.#range(high ?? 0) },
        share: { range: [0, 1] },
      },
      axes: this.#axes(),
      series: [{ value: (_, time) => (time == null ? "" : clock(time)) }, ...this.series.map((s, i) => this.#line(s, i))],
      hooks: { drawAxes: spec.heat ? [(plot) => drawHeat(plot, this.history.times, this.heat, colour("heat"))] : [] },
    };
  }

  #range(high) {
    const { heat, isCut, least = 0 } = this.spec;
    if (heat) return [this.rows[0], this.rows[1] + 0.1];
    const most = isCut ? Math.min(high, CUT_AT_MEDIANS * median(this.plot?.data[1] ?? [])) : high;
    return [0, Math.max(most, least) * 1.1 || 1];
  }

  #axes() {
    const { spec } = this;
    const common = { stroke: colour("dim"), font: "11px system-ui, sans-serif", ticks: { show: false } };
    const grid = { stroke: colour("line"), width: 1 };
    const x = { ...common, grid: { show: false }, space: 70, size: 26, values: (_, times) => times.map(clock) };
    const y = { ...common, grid, size: 54, space: 34, values: (_, values) => values.map(spec.tick ?? spec.show) };
    if (spec.heat) {
      y.splits = () => edges(this.rows);
      y.values = (_, values) => values.map((edge) => label(edge, spec.bounds(this.history), spec.show));
    }
    if (!spec.lines.some((line) => line.scale)) return [x, y];
    const share = { ...common, grid: { show: false }, scale: "share", side: 1, size: 46, values: (_, v) => v.map(plainPercent) };
    return [x, y, share];
  }

  #line(series, index) {
    const isStacked = index < (this.spec.stack?.length ?? 0);
    const own = colour(series.colour);
    return {
      label: series.name,
      scale: series.scale ?? "y",
      stroke: own,
      width: isStacked ? 0 : 1.5,
      dash: series.dash,
      fill: isStacked ? own : series.fill ? `${own}22` : undefined,
      points: { show: false },
      value: (_, __, ___, i) => (series.show ?? this.spec.show)(this.values[index]?.[i]),
    };
  }
}

// Sums from the last of the stack upwards; the columns after the stack stay as they are.
function stacked(columns, numStacked) {
  const sums = columns.map((column) => [...column]);
  for (let s = numStacked - 2; s >= 0; s--) {
    sums[s].forEach((value, i) => {
      if (value != null) sums[s][i] = value + (sums[s + 1][i] ?? 0);
    });
  }
  return sums;
}

function median(column) {
  const values = column.filter((value) => value != null).sort((a, b) => a - b);
  return values[Math.floor(values.length / 2)] ?? Infinity;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function clock(time) {
  return new Date(time * 1e3).toTimeString().slice(0, 8);
}
