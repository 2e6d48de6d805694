// The last minutes of frames, as columns for the charts.

const LENGTH = 300;
const LEAST_SPAN_S = 60;
export const HOLE_S = 3.5;

export class History {
  constructor() {
    this.times = [];
    this.rates = [];
    this.bounds = { tokens: [], inter_token_s: [] };
  }

  // A hole in time gets an empty column, so that lines break there.
  add(frame) {
    const last = this.times.at(-1);
    if (last !== undefined && frame.time_s <= last) return;
    if (last !== undefined && frame.time_s - last > HOLE_S) this.#push(last + 1, null);
    this.bounds = frame.bounds;
    this.#push(frame.time_s, frame.rates);
  }

  column(pick) {
    return this.rates.map((rates) => (rates ? (pick(rates) ?? null) : null));
  }

  // What the x axes show: all there is, a minute at least.
  get range() {
    const last = this.times.at(-1) ?? Date.now() / 1e3;
    return [Math.min(this.times[0] ?? last, last - LEAST_SPAN_S), last];
  }

  #push(time, rates) {
    this.times.push(time);
    this.rates.push(rates);
    if (this.times.length > LENGTH) {
      this.times.shift();
      this.rates.shift();
    }
  }
}
