// One answer of one model: its text as it arrives, what it cost, the marks on it, and what can be done with it.

import { copyButton, quietButton } from "./buttons.js";
import { render, textNodes } from "./markdown.js";
import { cut, explore, plain, tokenElement } from "./shade.js";
import { bytes, number, say, unsay, word } from "./words.js";

const DRAW_MS = 60;                 // between two drawings of a text that arrives; more where drawing takes long

export class Answer {
  /** `model` as the service describes it, or only its name where it is not served any more; `onAgain` regenerates;
   *  `follow` changes the page without losing the reader's place. */
  constructor(side, model, place, onAgain, follow) {
    this.side = side;
    this.follow = follow;
    this.model = model;
    this.element = place.appendChild(document.createElement("section"));
    this.element.className = "answer";
    this.element.dataset.testid = `answer-${side}`;
    const title = this.element.appendChild(document.createElement("h4"));
    title.textContent = model.name;
    this.body = this.element.appendChild(document.createElement("div"));
    this.body.className = "text";
    this.body.dataset.testid = "text";
    this.body.lang = "";            // nobody knows which language a model will write
    this.body.dir = "auto";
    this.note = this.element.appendChild(document.createElement("p"));
    this.note.className = "note";
    this.under = this.element.appendChild(document.createElement("div"));
    this.under.className = "under";
    this.facts = this.under.appendChild(document.createElement("details"));
    this.facts.className = "facts";
    this.facts.dataset.testid = "facts";
    this.under.append(copyButton(() => this.text));
    if (model.bytes !== undefined) { this.under.append(this.again = quietButton("regenerate", onAgain)); }
    this.empty();
  }

  /** Forget what was written, before it is written again. */
  empty() {
    this.text = "";
    this.tokens = [];               // the text split into tokens; empty where no log-probabilities were requested
    this.waiting = [];              // tokens whose characters are not complete yet
    this.shown = "";                // the text as it is shown, without Markdown's signs
    this.count = 0;
    this.drawing = 0;
    this.failed = false;
    this.end = { note: null, tokens: 0, speed: null };
    plain(this.body);
    this.body.replaceChildren();
    this.body.className = "text writing";
    this.element.ariaBusy = "true";
    this.under.hidden = true;
    unsay(this.note);
    this.note.hidden = true;
  }

  wait() { this.tell("waiting"); }

  begin() { this.note.hidden = true; }

  add(text, tokens) {
    this.count += Math.max(tokens.length, text ? 1 : 0);
    this.waiting.push(...tokens);
    if (!text) { return; }
    this.text += text;
    const fresh = this.waiting.length ? cut(text, this.waiting) : [];
    if (fresh.length || this.tokens.length) { this.tokens.push(...(fresh.length ? fresh : [{ text, logprob: null, others: [] }])); }
    this.waiting = [];
    this.drawing ||= setTimeout(() => this.draw(), Math.max(DRAW_MS, 5 * (this.took ?? 0)));
  }

  draw() {
    const began = performance.now();
    this.drawing = 0;
    this.follow(() => this.body.replaceChildren(render(this.text)));
    this.took = performance.now() - began;
  }

  finish({ usage = null, timings = null, note = null, filler = null }) {
    this.end = { note: this.failed ? null : note, tokens: usage?.completion_tokens ?? this.count, speed: timings?.tokens_per_s ?? null };
    this.close(note, filler, timings);
  }

  /** Show what was kept of an earlier answer. */
  restore({ text, note, tokens, speed }) {
    this.text = text;
    this.end = { note: note ?? (text ? null : "stopped"), tokens, speed };
    this.close(this.end.note, null, null);
  }

  close(note, filler, timings) {
    clearTimeout(this.drawing);
    this.drawing = 0;
    this.body.classList.remove("writing");
    this.element.ariaBusy = "false";
    if (note) { this.tell(note, filler); } else { this.note.hidden = true; }
    this.count = this.end.tokens;
    this.showFacts(timings);
    this.under.hidden = false;
  }

  tell(key, filler) {
    say(this.note, key, filler);
    this.note.hidden = false;
  }

  showFacts(timings) {
    const { tokens, speed } = this.end;
    const short = [["fact_tokens", () => ({ n: number(tokens) })]];
    if (speed) { short.unshift(["fact_speed", () => ({ n: number(speed, speed < 100 ? 1 : 0) })]); }
    const more = [];
    if (timings?.ram_bytes) { more.push(["fact_ram", () => ({ n: bytes(timings.ram_bytes) })]); }
    if (this.model.bytes) { more.push(["fact_bytes", () => ({ n: bytes(this.model.bytes) })]); }
    if (timings?.energy_wh != null) {
      more.push(["fact_energy", () => ({ n: energy(timings.energy_wh), label: word(timings.energy_label ?? "estimated") })]);
    }
    this.facts.replaceChildren();
    say(this.facts.appendChild(document.createElement("summary")), "value",
        () => ({ value: short.map(([key, values]) => word(key, values())).join(" · ") }));
    const list = this.facts.appendChild(document.createElement("ul"));
    for (const [key, values] of more) { say(list.appendChild(document.createElement("li")), key, values); }
  }

  /** Show the text: as Markdown, or token by token and shaded by surprise if asked for and known. */
  paint(shade) {
    const shaded = shade && this.tokens.length > 0;
    plain(this.body);
    this.body.classList.toggle("shaded", shaded);
    if (shaded) {
      this.body.replaceChildren(...this.tokens.map((token) => {
        const element = tokenElement(token);
        element.textContent = token.text;
        return element;
      }));
      explore(this.body);
    } else {
      this.body.replaceChildren(render(this.text));
    }
    this.shown = textNodes(this.body).map((node) => node.data).join("");
  }

  /** Mark ranges of the text that is shown. */
  mark(ranges) {
    let from = 0;
    for (const node of textNodes(this.body)) {
      const to = from + node.data.length;
      const parts = [];
      let here = from;
      for (const [start, end] of ranges) {
        if (end <= here || start >= to) { continue; }
        parts.push(node.data.slice(here - from, Math.max(here, start) - from), marked(node.data.slice(Math.max(here, start) - from, end - from)));
        here = Math.min(end, to);
      }
      if (parts.length) {
        const token = node.parentElement.closest(".token");
        if (token) { token.ariaLabel += `\n${word("differs")}`; }
        node.replaceWith(...parts, node.data.slice(here - from));
      }
      from = to;
    }
  }

  plain() { return { model: this.model.name, text: this.text, ...this.end }; }
}

function marked(text) {
  const mark = document.createElement("mark");
  mark.dataset.before = word("differs_from");           // read aloud through the style sheet: the text itself stays unchanged
  mark.dataset.after = word("differs_to");
  mark.textContent = text;
  return mark;
}

function energy(wh) {
  return wh < 0.1 ? word("milliwatt_hours", { n: number(wh * 1000, wh < 0.001 ? 3 : 1) }) : word("watt_hours", { n: number(wh, 2) });
}
