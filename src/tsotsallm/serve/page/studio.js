// The studio: choose a model and a goal, see the plan, start, watch, and talk to the result.

import { askJson, reportLink } from "./stream.js";
import { bytes, duration, known, number, say, share, unsay, word } from "./words.js";

const $ = (id) => document.getElementById(id);
const BUSY = ["waiting", "running"];
let choices = { models: [], devices: [], recipes: [] };
let job = null;                     // the job on view
let jobs = [];
let timer = 0;
let lost = false;                   // the server did not answer the last request

export function startStudio(onResult) {
  $("studio-form").addEventListener("submit", (event) => { event.preventDefault(); attempt(begin, $("start-job")); });
  $("see-plan").addEventListener("click", () => { if ($("studio-form").reportValidity()) { attempt(plan, $("see-plan")); } });
  $("studio-model").addEventListener("change", showChoice);
  $("device").addEventListener("change", showChoice);
  for (const radio of document.getElementsByName("goal")) { radio.addEventListener("change", showGoal); }
  $("studio-form").addEventListener("input", () => { $("plan").hidden = true; });
  $("stop-job").addEventListener("click", () => attempt(async () => { showJob(await askJson(`/studio/jobs/${job.id}/stop`, {})); watch(); }));
  $("resume-job").addEventListener("click", () => attempt(async () => { showJob(await askJson(`/studio/jobs/${job.id}/resume`, {})); watch(); }));
  $("talk-to-result").addEventListener("click", () => attempt(async () => {
    await onResult((await askJson(`/studio/jobs/${job.id}/serve`, {})).model);
  }, $("talk-to-result")));
  document.addEventListener("language", () => { fillChoices(); if (job) { showJob(job); } showList(); });
  showGoal();
}

export async function openStudio() {
  choices = await askJson("/studio/choices");
  fillChoices();
  jobs = (await askJson("/studio/jobs")).jobs;
  const shown = jobs.find((one) => one.id === job?.id) ?? jobs.find((one) => BUSY.includes(one.state));
  if (shown) { showJob(shown); watch(); }
  showList();
}

async function attempt(action, button) {
  document.dispatchEvent(new Event("no-trouble"));
  if (button) { button.disabled = true; }
  try {
    await action();
  } catch (error) {
    document.dispatchEvent(new CustomEvent("trouble", { detail: error.message }));
  } finally {
    if (button) { button.disabled = false; }
  }
}

const goal = () => document.querySelector('input[name="goal"]:checked').value;

function wish() {
  return { model: $("studio-model").value, [goal()]: $(goal()).value.trim(), minutes: $("minutes").valueAsNumber, quick: $("quick").checked };
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
  $("plan-title").focus();
}

async function begin() {
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
  if (before) { $("said").textContent = `${job.title}: ${word(`state_${job.state}`)}`; }
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
      if (!lost) { document.dispatchEvent(new CustomEvent("trouble", { detail: error.message })); }
      lost = true;
    }
    watch();
  }, 1000);
}

async function refreshList() {
  try { jobs = (await askJson("/studio/jobs")).jobs; showList(); } catch { /* the job on view stays true without the list */ }
}

function fillChoices() {
  refill($("studio-model"), choices.models.map((one) => [one.id, one.label]));
  refill($("device"), choices.devices.map((one) => [one.name, word("device_option", { name: one.name, bytes: bytes(one.bytes) })]));
  $("folder").hidden = !choices.folder;
  say($("folder"), "folder", () => ({ folder: choices.folder }));
  $("packaged").hidden = choices.recipes.length === 0;
  $("packaged").replaceChildren(...choices.recipes.map(({ name, text }) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => {
      $("recipe").value = name;
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
  const one = choices.models.find(({ id }) => id === $("studio-model").value);
  if (one) {
    say($("studio-model-about"), "studio_model_about", () => ({
      bytes: bytes(one.bytes), parameters: one.parameters ? number(one.parameters) : "?", layers: one.layers ? number(one.layers) : "?" }));
  } else {
    unsay($("studio-model-about"));
  }
  $("device-about").textContent = choices.devices.find(({ name }) => name === $("device").value)?.about ?? "";
}

function showGoal() {
  for (const radio of document.getElementsByName("goal")) {
    radio.closest(".goal").querySelector(".field").hidden = !radio.checked;
    $(radio.value).required = radio.checked;
  }
}

function showJob(latest) {
  const fresh = job?.id !== latest.id;
  job = latest;
  const lines = latest.lines.join("\n");
  $("job").hidden = false;
  $("job-title").textContent = job.title;
  say($("job-state"), `state_${job.state}`);
  $("job-state").dataset.state = job.state;
  $("job-step").textContent = BUSY.includes(job.state) ? job.step ?? "" : "";
  say($("job-seconds"), BUSY.includes(job.state) ? "elapsed" : "took", () => ({ time: duration(job.seconds) }));
  showProgress();
  $("job-error").hidden = !job.error;
  $("job-error").textContent = job.error ?? "";
  toggle($("stop-job"), BUSY.includes(job.state));
  toggle($("resume-job"), job.can_resume && !BUSY.includes(job.state));
  toggle($("talk-to-result"), job.state === "done");
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
    if (atEnd) { log.scrollTop = log.scrollHeight; }
  }
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
    bar.setAttribute("aria-valuetext", [share(at), job.step].filter(Boolean).join(", "));
  }
}

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
    button.textContent = one.title;
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
