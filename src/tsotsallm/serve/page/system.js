// The system prompt of a conversation, and packaged ones: answers in simple words, for school, technical.

import { say, word } from "./words.js";

const $ = (id) => document.getElementById(id);
const LEVELS = ["simple", "school", "technical"];

/** `changed` takes the new text after every change. */
export function startSystem(changed) {
  for (const level of LEVELS) {
    const button = $("levels").appendChild(document.createElement("button"));
    button.type = "button";
    button.dataset.level = level;
    say(button, `level_${level}`);
    button.addEventListener("click", () => {        // once more takes it away
      const text = word(`level_${level}_text`);
      $("system").value = $("system").value === text ? "" : text;
      show();
      changed($("system").value);
    });
  }
  $("system").addEventListener("input", () => { show(); changed($("system").value); });
  document.addEventListener("language", show);
  show();
}

export function showSystem(text) {
  $("system").value = text;
  show();
}

function show() {
  for (const button of $("levels").children) { button.ariaPressed = String($("system").value === word(`level_${button.dataset.level}_text`)); }
}
