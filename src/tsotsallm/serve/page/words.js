// The texts of the page in the user's language: languages.json lists the languages, languages/TAG.json has the texts of one.

let texts = {};
let language = "en";
const fillers = new WeakMap();

const json = async (name) => (await fetch(`/page/${name}.json`)).json();

export async function loadWords() {
  const names = await json("languages");
  const wanted = [remembered(), ...(navigator.languages || [navigator.language])];
  const tag = wanted.flatMap((one) => (one ? [one, one.split("-")[0]] : [])).find((one) => Object.hasOwn(names, one)) || "en";
  const menu = document.getElementById("language");
  for (const [one, name] of Object.entries(names)) {
    const option = new Option(name, one, false, one === tag);
    option.lang = one;
    menu.add(option);
  }
  menu.addEventListener("change", async () => {
    try { localStorage.setItem("language", menu.value); } catch { /* private windows may refuse: the choice then lasts until the page is closed */ }
    await speak(menu.value);
    document.dispatchEvent(new Event("language"));
  });
  await speak(tag);
}

export const languageNow = () => language;

export function word(key, filled = {}) {
  return (texts[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => filled[name] ?? "");
}

export function known(key) {
  return Object.hasOwn(texts, key);
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

/** Name a node for those who cannot see it, now and after every change of language. */
export function label(node, key) {
  node.dataset.label = key;
  node.setAttribute("aria-label", word(key));
  return node;
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

export function day(milliseconds) {
  return new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" }).format(milliseconds);
}

async function speak(tag) {
  texts = await json(`languages/${tag}`);
  language = tag;
  document.documentElement.lang = tag;
  document.title = word("title");
  document.querySelectorAll("[data-text]").forEach(show);
  for (const node of document.querySelectorAll("[data-label]")) { node.setAttribute("aria-label", word(node.dataset.label)); }
  for (const node of document.querySelectorAll("[data-hint]")) { node.placeholder = word(node.dataset.hint); }
}

function remembered() {
  try { return localStorage.getItem("language"); } catch { return null; }
}

function show(node) {
  node.textContent = word(node.dataset.text, fillers.get(node)?.());
}
