// The page's life: follows the gateway's events, says so when they end, and tries again.

import { Charts } from "./charts.js";
import { showInstances, showTiles } from "./figures.js";
import { History } from "./history.js";

const RETRY_MS = 3000;
const SILENT_MS = 5000;

const history = new History();
const charts = new Charts(history);
let heardAt = Date.now();

function say(state, text) {
  const place = document.querySelector("#state");
  if (place.textContent === text) return;
  place.dataset.state = state;
  place.textContent = text;
}

function show(frame) {
  const gateway = frame.instances[0];
  if (gateway.is_ready) say("live", "live");
  else say("unready", `not ready: ${gateway.detail}`);
  document.querySelector("#model").textContent = frame.model;
  document.title = frame.model ? `kvmesh · ${frame.model}` : "kvmesh";
  showTiles(frame.rates);
  showInstances(frame.instances);
}

function connect() {
  const events = new EventSource("/events");
  events.onmessage = (event) => {
    const frame = JSON.parse(event.data);
    heardAt = Date.now();
    history.add(frame);
    show(frame);
    if (!document.hidden) charts.update();
  };
  events.onerror = () => {
    say("gone", "the gateway is gone, trying again");
    if (events.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
    explain();
    setTimeout(connect, RETRY_MS);
  };
}

// A refusal is not an absence.
async function explain() {
  try {
    await fetch("/healthz", { cache: "no-store" });
    say("gone", "the gateway refuses more viewers, trying again");
  } catch {
    say("gone", "the gateway is gone, trying again");
  }
}

setInterval(() => {
  const silent = Date.now() - heardAt;
  const { state } = document.querySelector("#state").dataset;
  if (silent > SILENT_MS && state !== "gone") say("gone", "the gateway is silent");
}, 1000);
document.addEventListener("visibilitychange", () => document.hidden || charts.update());
connect();
