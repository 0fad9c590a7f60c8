// The conversation: what is sent to one model, or the same to two of them, and how their answers arrive.

import { differences } from "./compare.js";
import { allModels, chooseMode, chooseResult, choose, converses, model, sampling, shaded, sides, startChoice, takeModels } from "./choice.js";
import { showExamples } from "./examples.js";
import { forget, fresh, keep, load } from "./kept.js";
import { uncover } from "./panels.js";
import { tokensOf } from "./shade.js";
import { ask, pieces } from "./stream.js";
import { showSystem, startSystem } from "./system.js";
import { Turn } from "./turn.js";
import { number, say, word } from "./words.js";

const $ = (id) => document.getElementById(id);
const touch = window.matchMedia("(pointer: coarse)");       // there, a field with the focus opens a keyboard over the answer
let current = fresh();              // the conversation on view: what is kept of it, its turns aside
let turns = [];                     // its turns
let restored = false;
let atEnd = true;                   // whether the reader is at the end of the conversation
let running = null;                 // the AbortController of the answers that are arriving

export function startTalk() {
  startChoice(() => showExamples(model("a"), converses(), send), paintAll);
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
  });
  $("prompt").addEventListener("input", fitPrompt);
  $("stop").addEventListener("click", stop);
  $("new-conversation").addEventListener("click", begin);
  $("scroller").addEventListener("scroll", () => { atEnd = isAtEnd(); });
  new ResizeObserver(() => { if (atEnd) { toEnd(); } }).observe($("scroller"));        // a panel opens, the window is turned
  startSystem((text) => { current.system = text; save(); });
  document.addEventListener("renamed", ({ detail }) => { if (detail.id === current.id) { current.title = detail.title; } });
  document.addEventListener("language", () => { paintAll(); showExamples(model("a"), converses(), send); });
}

/** Take the models; the conversation that this window had before it was loaded again is opened. */
export function showModels(state) {
  takeModels(state);
  if (restored) { return; }
  restored = true;
  let before = null;
  try { before = sessionStorage.getItem("conversation"); } catch { /* nothing was remembered */ }
  if (before && allModels().length) { openConversation(before); }
}

/** A model that was just made, beside the one that it was made from where that is served too. */
export function talkTo(name) {
  begin();
  chooseResult(name);
  $("prompt").focus();
}

function stop() { running?.abort(); }

/** A new conversation. */
export function begin() {
  show(fresh());
  uncover();
  $("prompt").focus();
}

export const currentId = () => current.id;

export function openConversation(id) {
  const found = load(id);
  if (!found) { return; }
  show(found);
  const last = found.turns.at(-1);
  if (choose(last.answers.map((one) => one.model))) { chooseMode(last.converse); }
  for (const one of found.turns) {
    const before = one.separate || !turns.length ? [] : [...turns.at(-1).before, turns.at(-1)];
    const models = one.answers.map(({ model: name }, place) => ["ab"[place], allModels().find((served) => served.name === name) ?? { name }]);
    const turn = place(new Turn({ ...one, before }, models, { again, edit, follow }));
    turn.answers.forEach((answer, number) => answer.restore(one.answers[number]));
    compare(turn);
  }
  toEnd();
}

function show({ turns: _, ...rest }) {
  if (running) { save(); stop(); }
  current = rest;
  turns = [];
  $("conversation").replaceChildren();
  $("empty").hidden = false;
  showSystem(current.system);
  remember();
  document.dispatchEvent(new Event("opened"));
}

function place(turn) {
  turns.push(turn);
  $("empty").hidden = true;
  $("conversation").append(turn.place);
  return turn;
}

/** Keep the conversation in the browser, once something was said. */
function save() {
  const said = turns.filter((turn) => !turn.failed);
  if (!said.length) {
    if (load(current.id)) { forget(current.id); }           // its only prompt failed
    return;
  }
  current.changed = Date.now();
  remember();
  try {
    keep({ ...current, turns: said.map((turn) => turn.plain()) });
  } catch (error) {
    document.dispatchEvent(new CustomEvent("trouble", { detail: error.message }));
  }
}

function remember() {
  try { sessionStorage.setItem("conversation", current.id); } catch { /* a window that is loaded again then begins a new one */ }
}

/** The turns that the models are reminded of: none after another model or mode was chosen. */
function thread() {
  const last = turns.findLast((turn) => !turn.failed);
  const same = last && last.converse === converses() && last.answers.map((one) => one.model.name).join() === sides().map((side) => model(side).name).join();
  return same ? [...last.before, last] : [];
}

async function submit() {
  const prompt = $("prompt").value;
  if (running || !prompt.trim()) { return; }
  if (await send(prompt) && !$("prompt").value) {           // no model answered: nothing that was typed is lost
    $("prompt").value = prompt;
    fitPrompt();
  }
}

/** Send a prompt; true where every model failed. */
async function send(prompt) {
  const chosen = sampling();
  if (running || !chosen) { return false; }
  const before = thread();
  const turn = place(new Turn({ prompt, converse: converses(), before, separate: !before.length && turns.length > 0 },
                              sides().map((side) => [side, model(side)]), { again, edit, follow }));
  $("prompt").value = "";
  fitPrompt();
  toEnd();
  save();                           // the prompt is kept even if the window is closed before the answer
  await answerAll(turn, turn.answers, chosen);
  return turn.failed;
}

/** Regenerate one answer; what was said after it is dropped. */
async function again(turn, answer) {
  const chosen = sampling();
  if (running || !chosen || !drop(turns.indexOf(turn) + 1)) { return; }
  turn.attempts += 1;
  if (chosen.seed !== undefined) { chosen.seed = (chosen.seed + turn.attempts) % 2147483648; }     // else the answer is the same
  answer.empty();
  turn.showDifferences(null);
  $("stop").focus();
  await answerAll(turn, [answer], chosen);
}

/** Send an edited prompt in place of the first one, without what was said after it. */
async function edit(turn, prompt) {
  if (running || !prompt.trim() || !drop(turns.indexOf(turn))) { return; }
  chooseMode(turn.converse);
  await send(prompt);
}

/** Drop the turns from a place on; where that is more than one turn the user is asked. */
function drop(from) {
  const gone = turns.slice(from);
  if (gone.length > 1 && !window.confirm(word("drop_turns", { n: number(gone.length) }))) { return false; }
  turns.length = from;
  for (const turn of gone) { turn.place.remove(); }
  return true;
}

async function answerAll(turn, answers, chosen) {
  document.dispatchEvent(new Event("no-trouble"));
  const stopping = running = new AbortController();
  busy(true);
  // One after the other: two models at once would share the processor, and neither speed would be right.
  for (const answer of answers.slice(1)) { answer.wait(); }
  for (const answer of answers) {
    if (stopping.signal.aborted) { answer.finish({ note: "stopped" }); continue; }
    await answerInto(answer, turn, chosen, stopping.signal);
  }
  if (running === stopping) { running = null; }
  busy(false);
  turn.failed = turn.answers.every((one) => !one.text && one.failed);
  if (turns.includes(turn)) { finishTurn(turn); save(); }
}

async function answerInto(answer, turn, chosen, signal) {
  answer.begin();
  const end = { usage: null, timings: null };
  try {
    const response = await ask(turn.converse ? "/v1/chat/completions" : "/v1/completions", request(answer, turn, chosen), signal);
    for await (const piece of pieces(response)) {
      if (piece.usage) { end.usage = piece.usage; }
      if (piece.timings) { end.timings = piece.timings; }
      for (const choice of piece.choices ?? []) {
        if (choice.finish_reason === "length") { end.note = "at_limit"; }
        answer.add(choice.delta?.content ?? choice.text ?? "", tokensOf(choice));
      }
    }
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
  follow(() => { answer.finish(end); answer.paint(shaded()); });
}

function request(answer, turn, chosen) {
  const asked = { model: answer.model.name, ...chosen, stream: true, stream_options: { include_usage: true } };
  if (!turn.converse) { return { ...asked, prompt: turn.prompt, ...(shaded() && { logprobs: 3 }) }; }
  const side = turn.answers.indexOf(answer);
  const messages = current.system.trim() ? [{ role: "system", content: current.system }] : [];
  for (const earlier of turn.before) {
    const reply = earlier.answers[side]?.text;
    if (reply) { messages.push({ role: "user", content: earlier.prompt }, { role: "assistant", content: reply }); }
  }
  messages.push({ role: "user", content: turn.prompt });
  return { ...asked, messages, ...(shaded() && { logprobs: true, top_logprobs: 3 }) };
}

function finishTurn(turn) {
  const lines = turn.answers.map((answer) => `${answer.model.name}: ${answer.text}`);
  const changes = compare(turn);
  if (changes) { lines.push(word(changes.words ? "words_differ" : "no_difference", { n: number(changes.words) })); }
  $("said").textContent = lines.join("\n");
}

/** Paint the answers of a turn, with the words marked in which they differ; null where there are not two. */
function compare(turn) {
  const [first, second] = turn.answers;
  let changes = null;
  follow(() => {
    for (const answer of turn.answers) { answer.paint(shaded()); }
    if (!second?.text || !first.text) { return; }
    changes = differences(first.shown, second.shown);
    first.mark(changes.left);
    second.mark(changes.right);
    turn.showDifferences(changes.words);
  });
  return changes;
}

function paintAll() {
  for (const turn of turns) {
    if (turn.answers.every((one) => one.element.ariaBusy === "false")) { compare(turn); }
  }
}

function busy(on) {
  const focused = document.activeElement;
  $("send").disabled = $("send").hidden = on;
  $("stop").disabled = $("stop").hidden = !on;
  // A hidden button loses the focus, so that somebody who uses the keyboard loses their place.
  if (focused === $("send") && on) { $("stop").focus(); }
  if ((focused === $("stop") || focused === document.body) && !on) { (touch.matches ? $("send") : $("prompt")).focus(); }
}

/** Change the conversation; somebody who reads at its end stays there. */
function follow(change) {
  const stay = isAtEnd();
  change();
  if (stay) { toEnd(); }
}

function isAtEnd() {
  const place = $("scroller");
  return place.scrollHeight - place.clientHeight - place.scrollTop < 80;
}

function toEnd() { $("scroller").scrollTop = $("scroller").scrollHeight; }

function fitPrompt() {
  const field = $("prompt");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, window.innerHeight / 3)}px`;
}
