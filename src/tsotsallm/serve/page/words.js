// The texts of the page in the user's language. Every language is a key of texts.json.

let texts = { en: {} };
let language = "en";
const fillers = new WeakMap();

export async function loadWords() {
  texts = await (await fetch("/page/texts.json")).json();
  const wanted = [remembered(), ...(navigator.languages || [navigator.language])];
  language = wanted.flatMap((tag) => (tag ? [tag, tag.split("-")[0]] : [])).find((tag) => Object.hasOwn(texts, tag)) || "en";
  const menu = document.getElementById("language");
  for (const [tag, words] of Object.entries(texts)) {
    const option = new Option(words.language_name, tag, false, tag === language);
    option.lang = tag;
    menu.add(option);
  }
  menu.addEventListener("change", () => speak(menu.value));
  translate();
}

export function word(key, filled = {}) {
  const text = texts[language][key] ?? texts.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => filled[name] ?? "");
}

export function known(key) {
  return key in texts.en;
}

/** Show a text in a node, now and after every change of language; `filler` gives the values for its {blanks}. */
export function say(node, key, filler) {
  node.dataset.text = key;
  if (filler) { fillers.set(node, filler); } else { fillers.delete(node); }
  show(node);
  return node;
}

export function unsay(node) {
  delete node.dataset.text;
  node.textContent = "";
}

export function number(value, digits = 0) {
  return new Intl.NumberFormat(language, { maximumFractionDigits: digits }).format(value);
}

export function share(value) {
  return new Intl.NumberFormat(language, { style: "percent", maximumSignificantDigits: 2 }).format(value);
}

export function bytes(value) {
  let unit = 0;
  while (value >= 999.5 && unit < 3) { value /= 1000; unit += 1; }
  return word(["bytes_b", "bytes_kb", "bytes_mb", "bytes_gb"][unit], { n: number(value, unit && value < 100 ? 1 : 0) });
}

export function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) { return word("seconds", { n: number(whole) }); }
  if (whole < 3600) { return word("minutes_seconds", { m: number(Math.floor(whole / 60)), s: number(whole % 60) }); }
  return word("hours_minutes", { h: number(Math.floor(whole / 3600)), m: number(Math.floor(whole / 60) % 60) });
}

function speak(tag) {
  language = tag;
  try { localStorage.setItem("language", tag); } catch { /* private windows may refuse: the choice then lasts until the page is closed */ }
  translate();
  document.dispatchEvent(new Event("language"));
}

function remembered() {
  try { return localStorage.getItem("language"); } catch { return null; }
}

function translate() {
  document.documentElement.lang = language;
  document.title = word("title");
  document.querySelectorAll("[data-text]").forEach(show);
  for (const node of document.querySelectorAll("[data-label]")) { node.setAttribute("aria-label", word(node.dataset.label)); }
}

function show(node) {
  node.textContent = word(node.dataset.text, fillers.get(node)?.());
}
