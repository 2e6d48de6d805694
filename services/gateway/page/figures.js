// Figures as text, and the places that show them: the tiles and the table of instances.

const NOTHING = "–";
const short = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

export function rate(value) {
  if (value == null) return NOTHING;
  return value >= 100 ? whole.format(value) : value.toFixed(1);
}

export function count(value) {
  return value == null ? NOTHING : whole.format(value);
}

export function seconds(value) {
  if (value == null) return NOTHING;
  if (value >= 1) return `${Number(value.toPrecision(3))} s`;
  const ms = value * 1e3;
  return `${ms >= 100 ? ms.toFixed(0) : Number(ms.toPrecision(3))} ms`;
}

export function percent(share) {
  return share == null ? NOTHING : `${(share * 100).toFixed(1)} %`;
}

// Marks of an axis: round numbers, as short as they can be.
export function plain(value) {
  return short.format(value);
}

export function plainPercent(share) {
  return `${short.format(share * 100)} %`;
}

function duration(value) {
  if (value < 60) return `${value.toFixed(0)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min`;
  if (value < 86400) return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
  return `${Math.floor(value / 86400)} d ${Math.floor((value % 86400) / 3600)} h`;
}

const TILES = {
  tokens_per_s: (r) => rate(r.tokens_per_s),
  steps_per_s: (r) => rate(r.steps_per_s),
  step_tokens_p50: (r) => count(r.step_tokens_p50),
  step_tokens_p95: (r) => `p95 ${count(r.step_tokens_p95)}`,
  inter_token_p50_s: (r) => seconds(r.inter_token_p50_s),
  inter_token_p95_s: (r) => `p95 ${seconds(r.inter_token_p95_s)}`,
  gap_share: (r) => percent(r.gap_share),
  wasted_share: (r) => percent(r.wasted_share),
  num_running: (r) => count(r.num_running),
  num_waiting: (r) => `${count(r.num_waiting)} waiting`,
  preemptions_per_s: (r) => rate(r.preemptions_per_s),
};

export function showTiles(rates) {
  for (const place of document.querySelectorAll("[data-figure]")) {
    place.textContent = rates ? TILES[place.dataset.figure](rates) : NOTHING;
  }
}

export function showInstances(instances) {
  const body = document.querySelector("#instances tbody");
  body.replaceChildren(...instances.map(row));
}

function row(instance) {
  const isWorker = instance.role === "prefill" || instance.role === "decode";
  const line = document.createElement("tr");
  line.append(
    cell("", instance.name, "name"),
    state(instance),
    cell("Address", instance.address, "address"),
    cell("Requests", count(instance.num_requests), "number"),
    cell("Waiting", count(instance.num_waiting), "number"),
    blocks(instance),
    cell("Tokens/s", isWorker ? rate(instance.tokens_per_s) : "", "number"),
    cell("Gap share", instance.steps ? percent(instance.steps.gap_share) : "", "number"),
    cell("Up", duration(instance.uptime_s), "number"),
  );
  return line;
}

function cell(label, text, kind) {
  const place = document.createElement("td");
  place.className = text === "" ? `${kind} empty` : kind;
  place.textContent = text;
  if (label) place.dataset.label = label;
  return place;
}

function state(instance) {
  const place = cell("", instance.is_ready ? "ready" : "not ready", "state");
  place.classList.add(instance.is_ready ? "ready" : "unready");
  if (!instance.is_ready && instance.detail) {
    const note = document.createElement("div");
    note.className = "note";
    note.textContent = instance.detail;
    place.append(note);
  }
  return place;
}

function blocks(instance) {
  const place = cell("Blocks", instance.num_blocks ? " " : "", "used");
  if (!instance.num_blocks) return place;
  const shown = document.createElement("div");
  const bar = document.createElement("i");
  const fill = document.createElement("b");
  shown.className = "blocks";
  fill.style.width = `${(100 * instance.num_blocks_used) / instance.num_blocks}%`;
  bar.append(fill);
  shown.append(bar, `${count(instance.num_blocks_used)} / ${count(instance.num_blocks)}`);
  place.replaceChildren(shown);
  return place;
}
