// The start of the page: its texts, the key, the two tabs, the panels, and error messages.

import { startList } from "./list.js";
import { closePanel, isOpen, startPanels } from "./panels.js";
import { startShade } from "./shade.js";
import { askJson, hasKey, useKey } from "./stream.js";
import { openStudio, startStudio } from "./studio.js";
import { showModels, startTalk, talkTo } from "./talk.js";
import { loadWords, say, unsay } from "./words.js";

const $ = (id) => document.getElementById(id);
const tabs = [$("tab-talk"), $("tab-studio")];

function trouble(message) {
  $("trouble").hidden = false;
  $("error").textContent = message;
}

function noTrouble() {
  $("trouble").hidden = true;
  unsay($("error"));
}

function askForKey(wrong) {
  for (const id of ["work", "picker", "tabs", "talk-buttons", "talk-settings"]) { $(id).hidden = true; }
  $("key-form").hidden = false;
  if (wrong) { $("trouble").hidden = false; say($("error"), "key_wrong"); }
  $("key").focus();
}

async function load() {
  const state = await askJson("/page/state");
  say($("version"), "version", () => ({ version: state.version }));
  if (state.needs_key && !state.key_ok) { askForKey(hasKey()); return null; }
  $("key-form").hidden = true;
  $("work").hidden = false;
  $("tabs").hidden = !state.studio;
  showModels(state);
  return state;
}

async function begin() {
  noTrouble();
  try {
    const state = await load();
    if (!state) { return; }
    if (state.studio) { await openStudio(); }
    open(state.studio && (location.hash === "#studio" || !state.models.length) ? $("tab-studio") : $("tab-talk"));
    if (!$("panel-talk").hidden) { $("prompt").focus(); }
  } catch (error) {
    if (error.status !== 401) { trouble(error.message); }
  }
}

function open(tab) {
  for (const one of tabs) {
    one.ariaSelected = String(one === tab);
    one.tabIndex = one === tab ? 0 : -1;
    $(one.getAttribute("aria-controls")).hidden = one !== tab;
  }
  const talking = tab === $("tab-talk") && !$("talk").hidden;
  for (const id of ["picker", "talk-buttons", "talk-settings"]) { $(id).hidden = !talking; }
  if (!talking && isOpen("list")) { closePanel("list"); }
}

function startTabs() {
  for (const tab of tabs) {
    tab.addEventListener("click", () => {
      open(tab);
      history.replaceState(null, "", tab === $("tab-studio") ? "#studio" : "#talk");
    });
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: 0, ArrowRight: 1, Home: 0, End: 1 }[event.key];
      if (to === undefined) { return; }
      event.preventDefault();
      tabs[to].focus();
      tabs[to].click();
    });
  }
}

function startKey() {
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = $("key").value.trim();
    $("key").value = "";
    if (/^[\x21-\x7e]+$/.test(key)) { useKey(key); begin(); } else { askForKey(true); }   // a header can hold nothing else
  });
  document.addEventListener("key-needed", () => askForKey(hasKey()));
}

async function showResult(name) {
  await load();
  open($("tab-talk"));
  talkTo(name);
}

document.addEventListener("trouble", (event) => trouble(event.detail));
document.addEventListener("no-trouble", noTrouble);
$("close-error").addEventListener("click", () => { noTrouble(); $("main").focus(); });
await loadWords();
startTabs();
startKey();
startPanels();
startShade();
startTalk();
startList();
startStudio(showResult);
await begin();
document.documentElement.dataset.ready = "true";
