// The studio: choose a model and a goal, see the plan, start, watch, and talk to the result.

import { drawCandidates } from "./chart.js";
import { HUB, hideFault, put, remember, restore, showFault } from "./form.js";
import { askJson, fileLink, reportLink, send } from "./stream.js";
import { bytes, duration, known, number, say, share, unsay, word } from "./words.js";

const $ = (id) => document.getElementById(id);
const BUSY = ["waiting", "running"];
const MOST_TEXT = 20 * 1024 * 1024;
let choices = { models: [], devices: [], texts: [], recipes: [] };
const names = new Map();            // id of an added text -> the name of its file
let drawn = "";                     // the candidates that the chart shows
let job = null;                     // the job on view
let jobs = [];
let timer = 0;
let lost = false;                   // the server did not answer the last request

export function startStudio(onResult) {
  $("studio-form").addEventListener("submit", (event) => { event.preventDefault(); attempt(begin, $("start-job"), showFault); });
  $("see-plan").addEventListener("click", () => {
    if ($("studio-form").reportValidity()) { attempt(plan, $("see-plan"), showFault); }
  });
  $("studio-model").addEventListener("change", showChoice);
  $("device").addEventListener("change", showChoice);
  for (const radio of document.getElementsByName("goal")) { radio.addEventListener("change", showGoal); }
  $("studio-form").addEventListener("input", () => { $("plan").hidden = true; hideFault(); remember(); });
  startTexts();
  $("stop-job").addEventListener("click", () => attempt(async () => { showJob(await askJson(`/studio/jobs/${job.id}/stop`, {})); watch(); }));
  $("resume-job").addEventListener("click", () => attempt(async () => { showJob(await askJson(`/studio/jobs/${job.id}/resume`, {})); watch(); }));
  $("talk-to-result").addEventListener("click", () => attempt(async () => {
    const served = await askJson(`/studio/jobs/${job.id}/serve`, {});
    await onResult(served.model);
    if (served.original) { return; }
    trouble({ message: served.why ? word("original_not_served", { reason: served.why }) : word("original_elsewhere") });
  }, $("talk-to-result")));
  $("log").addEventListener("toggle", toLogEnd);
  document.addEventListener("language", () => { fillChoices(); if (job) { showJob(job); } showList(); });
  showGoal();
}

export async function openStudio() {
  choices = await askJson("/studio/choices");
  fillChoices();
  restore();
  showChoice();
  showGoal();
  jobs = (await askJson("/studio/jobs")).jobs;
  const shown = jobs.find((one) => one.id === job?.id) ?? jobs.find((one) => BUSY.includes(one.state));
  if (shown) { showJob(shown); watch(); }
  showList();
}

/** Do something, and show why it failed: at the top of the page unless `show` does. */
async function attempt(action, button, show = trouble) {
  document.dispatchEvent(new Event("no-trouble"));
  if (show === showFault) { hideFault(); }
  if (button) { button.disabled = true; }
  try {
    await action();
  } catch (error) {
    (error.status === 401 ? trouble : show)(error);
  } finally {
    if (button) { button.disabled = false; }
  }
}

const trouble = ({ message }) => document.dispatchEvent(new CustomEvent("trouble", { detail: message }));

const goal = () => document.querySelector('input[name="goal"]:checked').value;

function wish() {
  const kept = [...$("keep-texts").querySelectorAll("input:checked")].map((box) => box.value);
  return { model: $("studio-model").value === HUB ? `hub:${$("hub").value.trim()}` : $("studio-model").value, quick: $("quick").checked,
    ...(goal() !== "here" && { [goal()]: $(goal()).value.trim() }),
    ...(!Number.isNaN($("minutes").valueAsNumber) && { minutes: $("minutes").valueAsNumber }),
    ...($("calibration").value && { calibration: $("calibration").value }),
    ...(goal() !== "recipe" && kept.length && { keep: kept }) };
}

/** Ask for a text to calibrate on, where the usual one is out of reach. */
function needText() {
  $("calibration-about").hidden = false;
  put($("calibration"), "self");
  $("calibration").focus();
}

function startTexts() {
  const drop = $("drop"), file = $("text-file");
  $("add-text").addEventListener("click", () => file.click());
  file.addEventListener("change", () => { attempt(() => addTexts([...file.files]), $("add-text"), showFault); });
  for (const kind of ["dragenter", "dragover"]) {
    drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    attempt(() => addTexts([...event.dataTransfer.files]), $("add-text"), showFault);
  });
}

/** Send texts to the studio's folder, and calibrate on the last of them. */
async function addTexts(files) {
  try {
    for (const file of files) {
      if (file.size > MOST_TEXT) { throw new Error(word("text_large", { name: file.name })); }
      const { id } = await send(`/studio/texts?kind=${/\.jsonl$/i.test(file.name) ? "jsonl" : "txt"}`, file);
      names.set(id, file.name);
      choices.texts.push(id);
      say($("added").appendChild(document.createElement("li")), "text_added", () => ({ name: file.name, place: id }));
      $("said").textContent = word("text_added", { name: file.name, place: id });
      fillTexts();
      put($("calibration"), id);
      $("calibration-about").hidden = true;
    }
  } finally {
    $("text-file").value = "";
  }
}

function fillTexts() {
  const named = (id) => (names.has(id) ? `${names.get(id)} (${id})` : id);
  refill($("calibration"), [["", word("calibration_usual")], ["self", word("calibration_self")], ...choices.texts.map((id) => [id, named(id)])]);
  const before = new Set([...$("keep-texts").querySelectorAll("input:checked")].map((box) => box.value));
  $("keep-texts").replaceChildren(...choices.texts.filter((id) => id.endsWith(".txt")).map((id) => {
    const row = document.createElement("p"), box = document.createElement("input"), label = document.createElement("label");
    row.className = "check";
    Object.assign(box, { type: "checkbox", id: `keep-${encodeURIComponent(id)}`, value: id, checked: before.has(id) });
    label.htmlFor = box.id;
    label.textContent = named(id);
    row.append(box, " ", label);
    return row;
  }));
  showGoal();
}

async function plan() {
  const plan = await askJson("/studio/plan", wish());
  const facts = $("plan-facts");
  facts.replaceChildren();
  for (const { key, value } of plan.facts) {
    const name = facts.appendChild(document.createElement("dt"));
    if (known(`plan_${key}`)) { say(name, `plan_${key}`); } else { name.textContent = key; }
    facts.appendChild(document.createElement("dd")).textContent = value;
  }
  fillList($("plan-warnings"), plan.warnings, (item, text) => { item.textContent = text; });
  $("plan-command").textContent = plan.command;
  $("plan").hidden = false;
  $("calibration-about").hidden = true;
  if (plan.needs_text) { needText(); } else { $("plan-title").focus(); }
  return plan;
}

async function begin() {
  if ((await plan()).needs_text) { return; }
  const { id } = await askJson("/studio/jobs", wish());
  $("plan").hidden = true;
  await take(await status(id));
  $("job-title").focus();
  watch();
}

const status = (id) => askJson(`/studio/jobs/${encodeURIComponent(id)}`);

async function take(latest) {
  const before = job?.id === latest.id ? job.state : null;
  showJob(latest);
  if (job.state === before) { return; }
  if (before) { $("said").textContent = `${titleOf(job)}: ${word(`state_${job.state}`)}`; }
  jobs = (await askJson("/studio/jobs")).jobs;
  showList();
}

function watch() {
  clearTimeout(timer);
  if (!job || !BUSY.includes(job.state)) { refreshList(); return; }
  timer = setTimeout(async () => {
    const id = job.id;
    try {
      const latest = await status(id);
      if (job.id !== id) { return; }          // another job was chosen meanwhile, and is watched
      await take(latest);
      if (lost) { lost = false; document.dispatchEvent(new Event("no-trouble")); }
    } catch (error) {
      if (error.status === 401) { return; }
      if (!lost) { trouble(error); }
      lost = true;
    }
    watch();
  }, 1000);
}

async function refreshList() {
  try { jobs = (await askJson("/studio/jobs")).jobs; showList(); } catch { /* the job on view stays true without the list */ }
}

function fillChoices() {
  refill($("studio-model"), [...choices.models.map((one) => [one.id, one.label]), [HUB, word("from_hub")]]);
  fillTexts();
  refill($("device"), choices.devices.map((one) => [
    one.name, word("device_option", { name: wordFor("device", one.name) ?? one.name, bytes: bytes(one.bytes) })]));
  $("folder").hidden = !choices.folder;
  say($("folder"), "folder", () => ({ folder: choices.folder }));
  $("packaged").hidden = choices.recipes.length === 0;
  $("packaged").replaceChildren(...choices.recipes.map(({ name, text }) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => {
      put($("recipe"), name);
      $("packaged-text").textContent = text;
      $("packaged-text").hidden = false;
      $("plan").hidden = true;
    });
    return button;
  }));
  showChoice();
}

function refill(menu, options) {
  const before = menu.value;
  menu.replaceChildren(...options.map(([value, label]) => new Option(label, value)));
  if (options.some(([value]) => value === before)) { menu.value = before; }
}

function showChoice() {
  const far = $("studio-model").value === HUB;
  $("hub-row").hidden = !far;
  $("hub").required = far;
  $("hub").disabled = !far;
  const one = choices.models.find(({ id }) => id === $("studio-model").value);
  if (one) {
    say($("studio-model-about"), "studio_model_about", () => ({
      bytes: bytes(one.bytes), parameters: one.parameters ? number(one.parameters) : "?", layers: one.layers ? number(one.layers) : "?" }));
  } else {
    unsay($("studio-model-about"));
  }
  const device = choices.devices.find(({ name }) => name === $("device").value);
  $("device-about").textContent = device ? wordFor("device_about", device.name) ?? device.about : "";
}

function showGoal() {
  for (const radio of document.getElementsByName("goal")) {
    radio.closest(".goal").querySelector(".field").hidden = !radio.checked;
    if (radio.value !== "here") { $(radio.value).required = radio.checked; }
  }
  $("keep").hidden = goal() === "recipe" || !$("keep-texts").childElementCount;
}

function showJob(latest) {
  const fresh = job?.id !== latest.id;
  job = latest;
  const lines = latest.lines.join("\n");
  $("job").hidden = false;
  $("job-title").textContent = titleOf(job);
  say($("job-state"), `state_${job.state}`);
  $("job-state").dataset.state = job.state;
  $("job-step").textContent = step();
  say($("job-seconds"), BUSY.includes(job.state) ? "elapsed" : "took", () => ({ time: duration(job.seconds) }));
  showProgress();
  showLeft();
  $("job-error").hidden = !job.error;
  $("job-reason").textContent = job.error ?? "";
  showOutcome();
  $("chart").hidden = !job.candidates.length;
  const candidates = JSON.stringify(job.candidates) + word("chart_best");
  if (candidates !== drawn) {
    drawn = candidates;
    drawCandidates($("chart-place"), $("chart-rows"), job.candidates, word("chart_best"));
  }
  toggle($("stop-job"), BUSY.includes(job.state));
  toggle($("resume-job"), job.can_resume && !BUSY.includes(job.state));
  toggle($("talk-to-result"), job.state === "done");
  if (!job.file) {
    $("file-place").replaceChildren();
  } else if (fresh || !$("download")) {
    const place = `/studio/jobs/${encodeURIComponent(job.id)}`;
    const link = fileLink(`${place}/file`, `${place}/link`, `${job.title}.gguf`.replace(/[^\w.-]+/g, "-"), "download");
    Object.assign(link, { id: "download", className: "button" });
    $("file-place").replaceChildren(link);
  }
  $("report-place").hidden = !job.report;
  if (job.report && (fresh || !$("open-report"))) {
    const link = reportLink(`/studio/jobs/${encodeURIComponent(job.id)}/report`, job.title, "report");
    link.id = "open-report";
    link.dataset.testid = "open-report";
    link.className = "button";
    $("report-place").replaceChildren(link);
  } else if (!job.report) {
    $("report-place").replaceChildren();
  }
  $("job-command").textContent = job.command;
  const log = $("job-log");
  if (log.textContent !== lines) {
    const atEnd = fresh || log.scrollHeight - log.clientHeight - log.scrollTop < 30;
    log.textContent = lines;
    if (atEnd) { toLogEnd(); }
  }
}

function toLogEnd() { $("job-log").scrollTop = $("job-log").scrollHeight; }

/** How much longer it may take: until the search ends, or by the share that is done. */
function showLeft() {
  const done = job.share;
  if (job.state !== "running") {
    unsay($("job-left"));
  } else if (job.left_s !== null) {
    say($("job-left"), job.left_s > 0 ? "left_most" : "left_finishing", () => ({ time: duration(job.left_s) }));
  } else if (done > 0.05) {
    say($("job-left"), "left_about", () => ({ time: duration(job.seconds * (1 - done) / done) }));
  } else {
    unsay($("job-left"));
  }
}

/** Sizes before and after, and what was lost in words and numbers. */
function showOutcome() {
  const found = job.state === "done" ? job.result : null;
  $("outcome").hidden = !found;
  if (!found) { return; }
  say($("size-before"), "value", () => ({ value: job.before ? bytes(job.before) : "?" }));
  say($("size-after"), "value", () => ({ value: bytes(found.bytes) }));
  say($("size-share"), "size_share", () => ({ share: job.before ? share(found.bytes / job.before) : "?" }));
  if (found.kl === undefined) {
    say($("lost"), "lost_unknown");
    unsay($("lost-numbers"));
    return;
  }
  const same = found.same_top_token;
  say($("lost"), same >= 0.98 ? "lost_nothing" : same >= 0.93 ? "lost_little" : same >= 0.85 ? "lost_some" : "lost_much", () => ({ share: share(same) }));
  say($("lost-numbers"), found.tokens_per_s ? "lost_numbers_speed" : "lost_numbers", () => ({ kl: found.kl.toPrecision(2),
    before: number(found.reference_perplexity, 2), after: number(found.perplexity, 2), speed: number(found.tokens_per_s ?? 0) }));
}

function showProgress() {
  const bar = $("job-progress"), at = job.state === "done" ? 1 : job.share;
  bar.classList.toggle("unknown", at === null && BUSY.includes(job.state));
  bar.classList.toggle("halted", ["failed", "stopped"].includes(job.state));
  bar.firstElementChild.style.width = at === null ? "" : `${100 * at}%`;
  if (at === null) {
    bar.removeAttribute("aria-valuenow");
    bar.setAttribute("aria-valuetext", word("progress_unknown"));
  } else {
    bar.setAttribute("aria-valuenow", Math.round(100 * at));
    bar.setAttribute("aria-valuetext", [share(at), step()].filter(Boolean).join(", "));
  }
}

/** What the job is doing, in words; as the command line names it where there are none. */
function step() {
  if (!BUSY.includes(job.state)) { return ""; }
  const { stage = "", layer, layers, done } = job.at;
  const what = stage.split(" + ").map((name) => wordFor("stage", name));
  if (what.includes(null)) { return job.step; }
  return word(layers ? "step_layer" : "step", { what: what.join(", "), layer: number(layer), layers: number(layers), share: share(Math.round(100 * done) / 100) });
}

/** The words for a stage or a device, by the name that the command line gives it; null where there are none. */
function wordFor(kind, name) {
  const key = `${kind}_${name.replace(/\W+/g, "_")}`;
  return known(key) ? word(key) : null;
}

/** The title of a job; it ends with its goal, which may be a device. */
const titleOf = ({ title }) => title.replace(/[\w-]+$/, (goal) => wordFor("device", goal) ?? goal);

/** Hide a button; the focus goes to the title of the job instead of nowhere. */
function toggle(button, on) {
  if (!on && document.activeElement === button) { $("job-title").focus(); }
  button.hidden = !on;
}

function showList() {
  $("jobs").hidden = jobs.length === 0;
  fillList($("job-list"), jobs, (item, one) => {
    const button = item.appendChild(document.createElement("button"));
    button.type = "button";
    button.textContent = titleOf(one);
    button.dataset.testid = "job-choice";
    if (one.id === job?.id) { button.setAttribute("aria-current", "true"); }
    button.addEventListener("click", () => attempt(async () => {
      await take(await status(one.id));
      $("job-title").focus();
      watch();
    }));
    const state = item.appendChild(document.createElement("span"));
    say(state, BUSY.includes(one.state) ? `state_${one.state}` : "job_line", () => ({ state: word(`state_${one.state}`), time: duration(one.seconds) }));
    state.className = "soft";
  });
}

function fillList(list, items, fill) {
  list.replaceChildren();
  for (const one of items) { fill(list.appendChild(document.createElement("li")), one); }
  list.hidden = items.length === 0;
}
