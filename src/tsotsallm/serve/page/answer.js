// One answer of one model: its text as it arrives, what it cost, and the marks on it.

import { bytes, number, say, unsay, word } from "./words.js";
import { cut, explore, plain, tokenElement } from "./shade.js";

export class Answer {
  constructor(side, model, place) {
    this.model = model;
    this.text = "";
    this.tokens = [];               // the text split into tokens; empty where no log-probabilities were requested
    this.waiting = [];              // tokens whose characters are not complete yet
    this.differing = [];
    this.count = 0;
    this.finish = null;
    this.shaded = false;
    this.element = place.appendChild(document.createElement("section"));
    this.element.className = "answer";
    this.element.dataset.testid = `answer-${side}`;
    this.element.ariaBusy = "true";
    const title = this.element.appendChild(document.createElement("h4"));
    title.textContent = model.name;
    this.body = this.element.appendChild(document.createElement("div"));
    this.body.className = "text writing";
    this.body.dataset.testid = "text";
    this.body.lang = "";            // nobody knows which language a model will write
    this.note = this.element.appendChild(document.createElement("p"));
    this.note.className = "note";
    this.facts = this.element.appendChild(document.createElement("ul"));
    this.facts.className = "facts";
    this.facts.dataset.testid = "facts";
    this.facts.hidden = true;
  }

  begin() { unsay(this.note); }

  wait() { say(this.note, "waiting"); }

  add(text, tokens) {
    this.count += Math.max(tokens.length, text ? 1 : 0);
    this.waiting.push(...tokens);
    if (!text) { return; }
    this.text += text;
    const fresh = this.waiting.length ? cut(text, this.waiting) : [];
    if (fresh.length || this.tokens.length) { this.tokens.push(...(fresh.length ? fresh : [{ text, logprob: null, others: [] }])); }
    this.waiting = [];
    this.body.append(text);
  }

  end({ finish = null, usage = null, timings = null, note = null, filler = null }) {
    this.finish = finish;
    this.body.classList.remove("writing");
    this.element.ariaBusy = "false";
    if (note) { say(this.note, note, filler); } else { this.note.remove(); }
    const facts = [];
    if (timings) { facts.push(["fact_speed", () => ({ n: number(timings.tokens_per_s, timings.tokens_per_s < 100 ? 1 : 0) })]); }
    facts.push(["fact_tokens", () => ({ n: number(usage?.completion_tokens ?? this.count) })]);
    if (timings?.ram_bytes) { facts.push(["fact_ram", () => ({ n: bytes(timings.ram_bytes) })]); }
    facts.push(["fact_bytes", () => ({ n: bytes(this.model.bytes) })]);
    if (timings?.energy_wh != null) {
      facts.push(["fact_energy", () => ({ n: energy(timings.energy_wh), label: word(timings.energy_label ?? "estimated") })]);
    } else if (timings) {
      facts.push(["fact_no_energy"]);
    }
    for (const [key, values] of facts) { say(this.facts.appendChild(document.createElement("li")), key, values); }
    this.facts.hidden = false;
  }

  /** Show the text again: shaded by surprise if asked for and known, words that differ marked. */
  paint(shade) {
    const shaded = shade && this.tokens.length > 0;
    this.body.replaceChildren();
    plain(this.body);
    this.body.classList.toggle("shaded", shaded);
    let from = 0;
    for (const token of shaded ? this.tokens : [{ text: this.text }]) {
      const target = shaded ? this.body.appendChild(tokenElement(token)) : this.body;
      this.mark(target, from, from + token.text.length);
      if (shaded && target.querySelector("mark")) { target.ariaLabel += `\n${word("differs")}`; }
      from += token.text.length;
    }
    if (shaded) { explore(this.body); }
  }

  mark(target, from, to) {
    let here = from;
    for (const [start, end] of this.differing) {
      if (end <= here || start >= to) { continue; }
      target.append(this.text.slice(here, Math.max(here, start)));
      const mark = target.appendChild(document.createElement("mark"));
      mark.dataset.before = word("differs_from");       // read aloud through the style sheet: the text itself stays unchanged
      mark.dataset.after = word("differs_to");
      mark.textContent = this.text.slice(Math.max(here, start), Math.min(end, to));
      here = Math.min(end, to);
    }
    target.append(this.text.slice(here, to));
  }
}

function energy(wh) {
  return wh < 0.1 ? word("milliwatt_hours", { n: number(wh * 1000, wh < 0.001 ? 3 : 1) }) : word("watt_hours", { n: number(wh, 2) });
}
