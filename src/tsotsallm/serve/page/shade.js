// How surprised a model was by each of its own tokens (−log p), as a shade behind the text.

import { number, say, share, word } from "./words.js";

// Upper ends of the bands in nats: p = 1/2, 1/5, 1/20, 1/100.
const BANDS = [0.7, 1.6, 3, 4.6, Infinity];
const tip = document.getElementById("tip");

/** The tokens of one streamed choice, from either of the API's two forms. */
export function tokensOf(choice) {
  const { logprobs } = choice;
  if (!logprobs) { return []; }
  if (logprobs.content) {
    return logprobs.content.map((entry) => ({
      text: entry.token, logprob: entry.logprob,
      others: (entry.top_logprobs ?? []).map((other) => [other.token, other.logprob]),
    }));
  }
  return (logprobs.tokens ?? []).map((text, i) => ({
    text, logprob: logprobs.token_logprobs?.[i] ?? null, others: Object.entries(logprobs.top_logprobs?.[i] ?? {}),
  }));
}

/** Cut a piece of text into its tokens; a character that took several tokens stays whole and counts them together. */
export function cut(text, tokens) {
  if (tokens.map((one) => one.text).join("") === text) { return tokens.filter((one) => one.text); }
  const given = tokens.filter((one) => one.logprob !== null);
  return [{ text, others: tokens.length === 1 ? tokens[0].others : [],
            logprob: given.length ? given.reduce((sum, one) => sum + one.logprob, 0) : null }];
}

export function tokenElement(token) {
  const span = document.createElement("span");
  span.setAttribute("role", "option");
  span.setAttribute("aria-selected", "false");
  span.tabIndex = -1;
  span.className = "token";
  if (token.logprob !== null) { span.classList.add(`band-${BANDS.findIndex((end) => -token.logprob <= end)}`); }
  span.setAttribute("aria-label", about(token));
  return span;
}

function about(token) {
  if (token.logprob === null) { return word("token_unknown", { token: visible(token.text) }); }
  const lines = [word("token_about", { token: visible(token.text), surprise: number(-token.logprob + 0, 2), share: share(Math.exp(token.logprob)) })];
  const others = token.others.filter(([text]) => text !== token.text).sort((a, b) => b[1] - a[1]).slice(0, 3);
  if (others.length) {
    lines.push(word("token_others", { others: others.map(([text, logprob]) => `${visible(text)} ${share(Math.exp(logprob))}`).join(", ") }));
  }
  return lines.join("\n");
}

const visible = (text) => word("quoted", { text: text.replaceAll("\n", "↵").replaceAll("\t", "⇥") });

/** One stop for the Tab key, arrows from token to token, the same words on hover and on focus. */
export function explore(text) {
  text.setAttribute("role", "listbox");
  text.setAttribute("aria-orientation", "horizontal");
  text.dataset.label = "tokens";
  text.setAttribute("aria-label", word("tokens"));
  if (text.firstElementChild) { text.firstElementChild.tabIndex = 0; }
}

export function plain(text) {
  for (const name of ["role", "aria-orientation", "aria-label", "data-label"]) { text.removeAttribute(name); }
}

export function startShade() {
  const of = (event) => event.target.closest?.(".token");
  document.addEventListener("pointerover", (event) => { const token = of(event); if (token) { show(token, event.clientX, event.clientY); } else { hide(); } });
  document.addEventListener("focusin", (event) => {
    const token = of(event);
    if (!token) { hide(); return; }
    token.parentNode.querySelectorAll('[tabindex="0"]').forEach((one) => { one.tabIndex = -1; one.ariaSelected = "false"; });
    token.tabIndex = 0;
    token.ariaSelected = "true";
    const box = token.getBoundingClientRect();
    show(token, box.left, box.bottom - 10);
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { hide(); }
    const token = of(event);
    const next = token && { ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling,
      Home: token.parentNode.firstElementChild, End: token.parentNode.lastElementChild }[event.key];
    if (next) { event.preventDefault(); next.focus(); }
  });
  window.addEventListener("scroll", hide, { passive: true });

  const scale = document.querySelector("#legend .scale");
  BANDS.forEach((end, band) => {
    const item = scale.appendChild(document.createElement("li"));
    item.className = `band-${band}`;
    const from = band ? BANDS[band - 1] : 0;
    say(item, end === Infinity ? "band_last" : "band", () => ({ from: number(from, 1), to: number(end, 1) }));
  });
}

function show(token, x, y) {
  tip.textContent = token.getAttribute("aria-label");
  tip.hidden = false;
  const wide = tip.offsetWidth, high = tip.offsetHeight;
  tip.style.left = `${Math.max(6, Math.min(x + 8, document.documentElement.clientWidth - wide - 6))}px`;
  tip.style.top = `${y + high + 24 < window.innerHeight ? y + 18 : Math.max(6, y - high - 24)}px`;
}

function hide() { tip.hidden = true; }
