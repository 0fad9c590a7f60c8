// The quiet buttons under what was said.

import { say, word } from "./words.js";

export function quietButton(key, action) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet";
  button.dataset.testid = key;
  say(button, key);
  button.addEventListener("click", () => action(button));
  return button;
}

/** A button that copies a text; it says so for two seconds, and aloud. */
export function copyButton(text) {
  return quietButton("copy", async (button) => {
    await copy(text());
    say(button, "copied");
    document.getElementById("said").textContent = word("copied");
    setTimeout(() => say(button, "copy"), 2000);
  });
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {                         // a page of another computer without TLS has no clipboard
    const field = document.body.appendChild(document.createElement("textarea"));
    const before = document.activeElement;
    field.className = "hidden";
    field.value = text;
    field.select();
    document.execCommand("copy");
    field.remove();
    before?.focus();
  }
}
