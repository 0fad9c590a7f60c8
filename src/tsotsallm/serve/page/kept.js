// Conversations in the browser's own storage, and as files: what is kept, and what a file may hold.

import { word } from "./words.js";

const START = "conversation-";
const FORMAT = "tsotsallm-conversations";
const VERSION = 1;
const MOST_BYTES = 20e6;
const NOTES = ["stopped", "at_limit"];
const memory = new Map();           // where the browser refuses storage, conversations last until the page is closed

const storage = {
  keys() { try { return [...new Set([...Object.keys(localStorage), ...memory.keys()])].filter((key) => key.startsWith(START)); } catch { return [...memory.keys()]; } },
  get(key) { try { return memory.get(key) ?? localStorage.getItem(key); } catch { return memory.get(key) ?? null; } },
  set(key, text) {
    try {
      localStorage.setItem(key, text);
      memory.delete(key);
    } catch (error) {
      memory.set(key, text);
      if (error.name === "QuotaExceededError") { throw new Error(word("storage_full")); }
    }
  },
  remove(key) { memory.delete(key); try { localStorage.removeItem(key); } catch { /* it was never there */ } },
};

export const fresh = () => ({ id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random().toString(36).slice(2)}`, title: "", system: "", changed: Date.now(), turns: [] });

export const titleOf = (one) => one.title || one.turns[0]?.prompt.replace(/\s+/g, " ").slice(0, 80) || word("untitled");

/** All conversations, the latest first. */
export function kept() {
  return storage.keys().map((key) => load(key.slice(START.length))).filter(Boolean).sort((a, b) => b.changed - a.changed);
}

export function load(id) {
  try { return { ...checked(JSON.parse(storage.get(START + id))), id }; } catch { return null; }
}

/** Keep a conversation; throws where the browser's storage is full (it then lasts until the page is closed). */
export function keep(one) {
  try { storage.set(START + one.id, JSON.stringify(one)); } finally { changed(); }
}

export function forget(id) {
  storage.remove(START + id);
  changed();
}

const changed = () => document.dispatchEvent(new Event("kept"));

/** Conversations as the text of a file. */
export function asFile(conversations) {
  return JSON.stringify({ format: FORMAT, version: VERSION, conversations: conversations.map(({ id, ...rest }) => rest) }, null, 2);
}

/** Keep the conversations of a file under new ids, and count them; throws, with words for the user, where it is none of ours. */
export async function fromFile(file) {
  if (file.size > MOST_BYTES) { throw new Error(word("import_large", { name: file.name })); }
  let content;
  try { content = JSON.parse(await file.text()); } catch { throw new Error(word("import_no_json", { name: file.name })); }
  if (content?.format !== FORMAT || !Array.isArray(content.conversations)) { throw new Error(word("import_foreign", { name: file.name })); }
  if (content.version !== VERSION) { throw new Error(word("import_version", { name: file.name })); }
  const found = content.conversations.map((one, place) => {
    try { return checked(one); } catch (error) { throw new Error(word("import_wrong", { name: file.name, n: place + 1, field: error.message })); }
  });
  for (const one of found) { keep({ ...one, id: fresh().id }); }
  return found.length;
}

/** A conversation with the fields that we know, each of its kind; throws the name of a field that is not. */
function checked(one) {
  return {
    title: text(one, "title"), system: text(one, "system"), changed: finite(one, "changed"),
    turns: list(one, "turns", 1, Infinity).map((turn) => ({
      prompt: text(turn, "prompt"), converse: truth(turn, "converse"), separate: truth(turn, "separate"),
      answers: list(turn, "answers", 1, 2).map((answer) => ({
        model: text(answer, "model"), text: text(answer, "text"), note: NOTES.includes(answer.note) ? answer.note : null,
        tokens: finite(answer, "tokens"), speed: answer.speed === null ? null : finite(answer, "speed") })) })) };
}

function of(right, value, name) { if (!right) { throw new Error(name); } return value; }
const text = (one, name) => of(typeof one?.[name] === "string", one?.[name], name);
const truth = (one, name) => of(typeof one?.[name] === "boolean", one?.[name], name);
const finite = (one, name) => of(Number.isFinite(one?.[name]), one?.[name], name);
const list = (one, name, least, most) => of(Array.isArray(one?.[name]) && one[name].length >= least && one[name].length <= most, one?.[name], name);
