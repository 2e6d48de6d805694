// Histograms over time: a column a frame, a row a bucket, stronger for a greater share of the steps.

import { HOLE_S } from "./history.js";

const MOST_LABELS = 6;
const COLUMN_S = 1;

// Where a value lies, in rows: row i spans i to i + 1 and holds values up to bounds[i].
export function rowOf(value, bounds) {
  if (value == null) return null;
  const found = bounds.findIndex((bound) => value <= bound);
  const row = found < 0 ? bounds.length - 1 : found;
  const low = row ? bounds[row - 1] : 0;
  return row + Math.min(1, (value - low) / (bounds[row] - low));
}

// The rows that have steps, as [first, last + 1]; never fewer than three.
export function usedRows(columns) {
  let first = Infinity;
  let last = -1;
  for (const column of columns) {
    column?.forEach((steps, row) => {
      if (!steps) return;
      first = Math.min(first, row);
      last = Math.max(last, row);
    });
  }
  if (last < 0) return [0, 3];
  first = Math.max(0, first - 1);
  return [first, Math.max(last + 1, first + 3)];
}

// Every edge of a row gets a line; so many of them a label that they stay readable.
export function edges([first, end]) {
  const every = Math.ceil((end - first + 1) / MOST_LABELS);
  const all = [];
  for (let edge = first; edge <= end; edge += every) all.push(edge);
  return all;
}

export function label(edge, bounds, show) {
  if (edge === 0) return "0";
  return edge > bounds.length ? "more" : show(bounds[edge - 1]);
}

export function drawHeat(plot, times, columns, colour) {
  const { ctx } = plot;
  ctx.save();
  ctx.beginPath();
  ctx.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
  ctx.clip();
  ctx.fillStyle = colour;
  columns.forEach((column, i) => {
    const total = column?.reduce((sum, steps) => sum + steps, 0);
    if (!total) return;
    const before = times[i - 1];
    const begin = before && times[i] - before < HOLE_S ? before : times[i] - COLUMN_S;
    const left = Math.round(plot.valToPos(begin, "x", true));
    const width = Math.round(plot.valToPos(times[i], "x", true)) - left;
    column.forEach((steps, row) => {
      if (!steps) return;
      const top = Math.round(plot.valToPos(row + 1, "y", true));
      const height = Math.round(plot.valToPos(row, "y", true)) - top;
      ctx.globalAlpha = 0.12 + 0.73 * (steps / total);
      ctx.fillRect(left, top, width, height - 1);
    });
  });
  ctx.restore();
}
