// One turn: what the user said, which can be copied and edited, and the answers to it.

import { Answer } from "./answer.js";
import { copyButton, quietButton } from "./buttons.js";
import { number, say, word } from "./words.js";

export class Turn {
  /** `before`: the turns that its models know; `separate`: a line says that they know none of those above. */
  constructor({ prompt, converse, before, separate }, models, { again, edit, follow }) {
    Object.assign(this, { prompt, converse, before, separate, failed: false, attempts: 0, onEdit: edit });
    this.place = document.createElement("article");
    this.place.className = "turn";
    if (separate) { say(this.place.appendChild(document.createElement("p")), "new_thread").className = "thread"; }
    this.showPrompt();
    const row = this.place.appendChild(document.createElement("div"));
    row.className = "sides";
    this.answers = models.map(([side, model]) => {
      const answer = new Answer(side, model, row, () => again(this, answer), follow);
      return answer;
    });
    this.about = this.place.appendChild(document.createElement("p"));
    this.about.className = "soft differ";
    this.about.dataset.testid = "differences";
    this.about.hidden = true;
  }

  /** What is kept of the turn. */
  plain() {
    return { prompt: this.prompt, converse: this.converse, separate: this.separate, answers: this.answers.map((answer) => answer.plain()) };
  }

  /** How many words of the answers differ; null where there is nothing to compare. */
  showDifferences(words) {
    this.about.hidden = words === null;
    if (words !== null) { say(this.about, words ? "words_differ" : "no_difference", () => ({ n: number(words) })); }
  }

  showPrompt() {
    const box = document.createElement("div");
    box.className = "said";
    say(box.appendChild(document.createElement("h3")), this.converse ? "you" : "your_text").className = "hidden";
    const said = box.appendChild(document.createElement("p"));
    said.className = "prompt";
    said.lang = "";
    said.dir = "auto";
    said.textContent = this.prompt;
    const under = box.appendChild(document.createElement("div"));
    under.className = "under";
    under.append(copyButton(() => this.prompt), quietButton("edit", () => this.editPrompt()));
    this.replaceBox(box);
  }

  editPrompt() {
    const form = document.createElement("form");
    form.className = "said edit";
    const field = form.appendChild(document.createElement("textarea"));
    field.rows = 3;
    field.value = this.prompt;
    field.dir = "auto";
    field.dataset.testid = "edit-field";
    field.setAttribute("aria-label", word(this.converse ? "your_message" : "your_text"));
    const row = form.appendChild(document.createElement("div"));
    row.className = "row";
    const back = () => { this.showPrompt(); this.box.querySelector('[data-testid="edit"]').focus(); };
    const cancel = row.appendChild(document.createElement("button"));
    cancel.type = "button";
    say(cancel, "cancel").addEventListener("click", back);
    const resend = row.appendChild(document.createElement("button"));
    resend.className = "main";
    resend.dataset.testid = "resend";
    say(resend, "resend");
    form.addEventListener("submit", (event) => { event.preventDefault(); this.onEdit(this, field.value); });
    form.addEventListener("keydown", (event) => { if (event.key === "Escape") { back(); } });
    this.replaceBox(form);
    field.focus();
  }

  replaceBox(box) {
    if (this.box) { this.box.replaceWith(box); } else { this.place.append(box); }
    this.box = box;
  }
}
