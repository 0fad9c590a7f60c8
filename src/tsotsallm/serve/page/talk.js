// The conversation: one model, or the same prompt to two of them.

import { Answer } from "./answer.js";
import { differences } from "./compare.js";
import { tokensOf } from "./shade.js";
import { ask, pieces, reportLink } from "./stream.js";
import { bytes, known, number, say, word } from "./words.js";

const $ = (id) => document.getElementById(id);
let models = [];
let turns = [];                     // all turns on the page
let thread = [];                    // the turns that are sent to the models
let running = null;                 // the AbortController of the answers that are arriving

export function startTalk() {
  $("compare").addEventListener("change", () => { if ($("compare").checked) { preselectSecond(); } chosen(); });
  for (const side of ["a", "b"]) { $(`model-${side}`).addEventListener("change", chosen); }
  for (const mode of ["converse", "continue"]) { $(`mode-${mode}`).addEventListener("change", modeChosen); }
  $("surprise").addEventListener("change", () => { $("legend").hidden = !$("surprise").checked; paintAll(); });
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $("prompt").addEventListener("input", fitPrompt);
  $("stop").addEventListener("click", () => running?.abort());
  $("new-conversation").addEventListener("click", () => {
    running?.abort();
    turns = [];
    thread = [];
    $("conversation").replaceChildren();
    $("empty").hidden = false;
    $("prompt").focus();
  });
  document.addEventListener("language", () => { fillMenus(); paintAll(); });
}

export function showModels(state) {
  models = state.models;
  $("no-model").hidden = models.length > 0;
  $("talk").hidden = models.length === 0;
  if (!models.length) { return; }
  $("compare-row").hidden = models.length < 2;
  $("max-tokens").max = state.limits.tokens;
  if ($("max-tokens").valueAsNumber > state.limits.tokens) { $("max-tokens").value = state.limits.tokens; }
  say($("max-tokens-about"), "max_tokens_about", () => ({ n: number(state.limits.tokens) }));
  fillMenus();
  preselectSecond();
  chosen();
}

/** A model, and beside it the one that it was made from where that is served too. */
export function talkTo(name) {
  $("model-a").value = name;
  $("compare").checked = preselectSecond();
  chosen();
  $("prompt").focus();
}

const model = (side) => models.find((one) => one.name === $(`model-${side}`).value);
const sides = () => ($("compare").checked ? ["a", "b"] : ["a"]);
const converses = () => $("mode-converse").checked;

function fillMenus() {
  for (const menu of [$("model-a"), $("model-b")]) {
    const before = menu.value;
    menu.replaceChildren(...models.map((one) => new Option(word("model_option", { name: one.name, bytes: bytes(one.bytes) }), one.name)));
    menu.value = models.some((one) => one.name === before) ? before : models[0]?.name;
  }
}

function preselectSecond() {
  const first = model("a");
  const kin = models.find((one) => one.name === first.original) ?? models.find((one) => one.original === first.name);
  const other = kin ?? models.find((one) => one !== first);
  if (other) { $("model-b").value = other.name; }
  return Boolean(kin);
}

function chosen() {
  const two = $("compare").checked;
  $("card-b").hidden = !two;
  for (const side of ["a", "b"]) { describe($(`card-${side}`).querySelector(".about"), model(side)); }
  const all = sides().every((side) => model(side).converses);
  $("mode-converse").disabled = !all;
  $(all ? "mode-converse" : "mode-continue").checked = true;
  $("mode-about").hidden = all;
  modeChosen();
}

function modeChosen() {
  thread = [];
  say($("prompt-label"), converses() ? "your_message" : "your_text");
}

function describe(place, one) {
  place.replaceChildren();
  const facts = place.appendChild(document.createElement("dl"));
  const fact = (key, value) => {
    say(facts.appendChild(document.createElement("dt")), key);
    const shown = facts.appendChild(document.createElement("dd"));
    if (typeof value === "string") { shown.textContent = value; } else { say(shown, "value", () => ({ value: value() })); }
  };
  fact("model_bytes", () => bytes(one.bytes));
  if (one.parameters) { fact("model_parameters", () => number(one.parameters)); }
  fact("model_context", () => word("tokens_n", { n: number(one.context) }));
  fact("model_kind", () => word(known(`kind_${one.kind}`) ? `kind_${one.kind}` : one.kind));
  if (one.original) { fact("model_original", one.original); }
  if (one.report) {
    const link = reportLink(`/models/${encodeURIComponent(one.name)}/report`, one.name, "report_of");
    place.appendChild(document.createElement("p")).append(link);
  }
  say(place.appendChild(document.createElement("p")), one.recipe ? "recipe_of" : "no_recipe").className = "soft";
  if (one.recipe) {
    const recipe = place.appendChild(document.createElement("pre"));
    recipe.textContent = one.recipe;
    recipe.tabIndex = 0;
    recipe.setAttribute("role", "region");
    recipe.dataset.label = "recipe_of";
    recipe.setAttribute("aria-label", word("recipe_of"));
  }
}

async function send() {
  const prompt = $("prompt").value;
  if (running || !prompt.trim() || !samplingIsRight()) { return; }
  document.dispatchEvent(new Event("no-trouble"));
  const stopping = running = new AbortController();
  busy(true);
  const turn = addTurn(prompt);
  const before = thread;                // another model or mode starts a new thread; this turn still belongs to the old one
  $("prompt").value = "";
  fitPrompt();
  // One after the other: two models at once would share the processor, and neither speed would be right.
  for (const answer of turn.answers) {
    if (stopping.signal.aborted) { answer.end({ note: "stopped" }); continue; }
    await answerInto(answer, turn, stopping.signal);
  }
  before.push(turn);
  running = null;
  busy(false);
  if (turns.includes(turn)) { finishTurn(turn); }
  if (turn.answers.every((one) => !one.text && one.failed)) {
    before.pop();
    if (!$("prompt").value) { $("prompt").value = prompt; fitPrompt(); }
  }
}

async function answerInto(answer, turn, signal) {
  answer.begin();
  const end = { finish: null, usage: null, timings: null };
  try {
    const response = await ask(turn.converse ? "/v1/chat/completions" : "/v1/completions", request(answer, turn), signal);
    for await (const piece of pieces(response)) {
      if (piece.usage) { end.usage = piece.usage; }
      if (piece.timings) { end.timings = piece.timings; }
      for (const choice of piece.choices ?? []) {
        if (choice.finish_reason) { end.finish = choice.finish_reason; }
        follow(() => answer.add(choice.delta?.content ?? choice.text ?? "", tokensOf(choice)));
      }
    }
    if (end.finish === "length") { end.note = "at_limit"; }
  } catch (error) {
    if (error.name === "AbortError") {
      end.note = "stopped";
    } else {
      answer.failed = true;
      end.note = "failed";
      end.filler = () => ({ reason: error.message });
      document.dispatchEvent(new CustomEvent("trouble", { detail: `${answer.model.name}: ${error.message}` }));
    }
  }
  follow(() => { answer.end(end); answer.paint($("surprise").checked); });
}

function request(answer, turn) {
  const value = (id) => $(id).valueAsNumber;
  const asked = { model: answer.model.name, max_tokens: value("max-tokens"), temperature: value("temperature"), top_p: value("top-p"),
    top_k: value("top-k"), stream: true, stream_options: { include_usage: true } };
  if ($("seed").value !== "") { asked.seed = value("seed"); }
  if (!turn.converse) { return { ...asked, prompt: turn.prompt, ...($("surprise").checked && { logprobs: 3 }) }; }
  const side = turn.answers.indexOf(answer);
  const messages = [];
  for (const earlier of turn.before) {
    const reply = earlier.answers[side]?.text;
    if (reply) { messages.push({ role: "user", content: earlier.prompt }, { role: "assistant", content: reply }); }
  }
  messages.push({ role: "user", content: turn.prompt });
  return { ...asked, messages, ...($("surprise").checked && { logprobs: true, top_logprobs: 3 }) };
}

function addTurn(prompt) {
  const place = document.createElement("article");
  place.className = "turn";
  if (!thread.length && turns.length) { say(place.appendChild(document.createElement("p")), "new_thread").className = "thread"; }
  const title = place.appendChild(document.createElement("h3"));
  say(title, converses() ? "you" : "your_text");
  const said = place.appendChild(document.createElement("p"));
  said.className = "prompt";
  said.lang = "";
  said.textContent = prompt;
  const row = place.appendChild(document.createElement("div"));
  row.className = "sides";
  const turn = { prompt, converse: converses(), before: [...thread], place };
  turn.answers = sides().map((side) => new Answer(side, model(side), row));
  turn.answers[1]?.wait();
  turns.push(turn);
  $("empty").hidden = true;
  $("conversation").append(place);
  place.scrollIntoView({ block: "nearest" });
  window.scrollTo({ top: document.documentElement.scrollHeight });
  return turn;
}

function finishTurn(turn) {
  const [first, second] = turn.answers;
  const lines = turn.answers.map((answer) => `${answer.model.name}: ${answer.text}`);
  if (second?.text && first.text) {
    const changes = differences(first.text, second.text);
    first.differing = changes.left;
    second.differing = changes.right;
    turn.answers.forEach((answer) => answer.paint($("surprise").checked));
    const about = document.createElement("p");
    about.className = "soft differ";
    about.dataset.testid = "differences";
    say(about, changes.words ? "words_differ" : "no_difference", () => ({ n: number(changes.words) }));
    follow(() => turn.place.append(about));
    lines.push(about.textContent);
  }
  $("said").textContent = lines.join("\n");
}

function paintAll() {
  for (const turn of turns) {
    for (const answer of turn.answers) { if (answer.element.ariaBusy === "false") { answer.paint($("surprise").checked); } }
  }
}

function busy(on) {
  const focused = document.activeElement;
  $("send").disabled = on;
  $("stop").disabled = !on;
  // A disabled button loses the focus, so that somebody who uses the keyboard loses their place.
  if (focused === $("send") && on) { $("stop").focus(); }
  if (focused === $("stop") && !on) { $("prompt").focus(); }
}

/** Change the page; somebody who reads at its end stays there. */
function follow(change) {
  const page = document.documentElement;
  const atEnd = page.scrollHeight - page.clientHeight - page.scrollTop < 80;
  change();
  if (atEnd) { window.scrollTo({ top: page.scrollHeight }); }
}

function fitPrompt() {
  const field = $("prompt");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, window.innerHeight / 3)}px`;
}

function samplingIsRight() {
  const wrong = [...$("sampling").querySelectorAll("input")].find((field) => !field.validity.valid);
  if (!wrong) { return true; }
  $("sampling").open = true;
  wrong.reportValidity();
  return false;
}
