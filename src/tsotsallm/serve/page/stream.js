// Requests to the server: the key, refusals as text, and answers that arrive in pieces (server-sent events).

import { say, word } from "./words.js";

let key = remembered();

/** The server refused, or did not answer; the message is for the user, `param` the field of the request that is wrong. */
export class Refusal extends Error {
  constructor(message, status = 0, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export function useKey(text) {
  key = text;
  try { sessionStorage.setItem("key", text); } catch { /* a window without storage asks for the key again after a reload */ }
}

export const hasKey = () => Boolean(key);

/** GET, or POST when there is a body; gives the response or throws a Refusal. */
export const ask = (path, body, signal) => request(path, body && JSON.stringify(body), "application/json", signal);

/** POST a file as it is, and give the answer. */
export const send = async (path, file) => (await request(path, file, "application/octet-stream")).json();

async function request(path, body, kind, signal) {
  const headers = {};
  if (key) { headers.Authorization = `Bearer ${key}`; }
  if (body) { headers["Content-Type"] = kind; }
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") { throw error; }
    throw new Refusal(word("no_connection"));
  }
  if (response.ok) { return response; }
  if (response.status === 401) { document.dispatchEvent(new Event("key-needed")); }
  throw await refusal(response);
}

export const askJson = async (path, body) => (await ask(path, body)).json();

async function refusal(response) {
  let reason = "", param = null;
  try { ({ message: reason, param } = (await response.json()).error); } catch { /* not every proxy answers in JSON */ }
  const message = [word("refused", { status: response.status, reason: (reason || response.statusText).replace(/[^.!?]$/, "$&.") })];
  const wait = response.headers.get("Retry-After");
  if (response.status === 429) { message.push(wait ? word("retry_after", { seconds: wait }) : word("retry_later")); }
  return new Refusal(message.join(" "), response.status, param);
}

/** The JSON pieces of a streamed answer; an error among them, or an end without "[DONE]", is thrown. */
export async function* pieces(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      const lines = (rest + (value ?? "")).split(/\r\n|\n/);
      rest = done ? "" : lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) { continue; }
        const data = line.slice(5).trim();
        if (data === "[DONE]") { return; }
        const piece = JSON.parse(data);
        if (piece.error) { throw new Refusal(word("broken_off", { reason: piece.error.message })); }
        yield piece;
      }
      if (done) { throw new Refusal(word("broken_off", { reason: word("no_end") })); }
    }
  } catch (error) {
    if (error instanceof Refusal || error.name === "AbortError") { throw error; }
    throw new Refusal(word("broken_off", { reason: word("no_connection") }));
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A link to a report. Where a key is needed the browser cannot follow it by itself: the page fetches the report and
 *  saves it as a file, since a blob of this page would be shown without its styles (it inherits the page's policy). */
export function reportLink(path, name, text) {
  const link = document.createElement("a");
  link.href = path;
  say(link, `${key ? "save" : "open"}_${text}`, () => ({ name }));
  if (!key) {
    link.target = "_blank";
    link.rel = "noopener";
    return link;
  }
  saveOnClick(link, path, `${name}-report.html`.replace(/[^\w.-]+/g, "-"));
  return link;
}

/** A link that saves a file under a name. Where a key is needed the server signs a link that the browser follows by
 *  itself: the file may be larger than the memory of this computer. */
export function fileLink(path, signed, name, text) {
  const link = document.createElement("a");
  link.href = path;
  link.download = name;
  say(link, text);
  if (key) { onClick(link, async () => clickOn((await askJson(signed, {})).href, name)); }
  return link;
}

function saveOnClick(link, path, name) {
  onClick(link, async () => {
    const address = URL.createObjectURL(await (await ask(path)).blob());
    clickOn(address, name);
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  });
}

function clickOn(address, name) {
  const file = document.createElement("a");
  file.href = address;
  file.download = name;
  file.click();
}

/** Do something in place of following a link, once at a time. */
function onClick(link, action) {
  let running = false;
  link.addEventListener("click", async (event) => {
    event.preventDefault();
    if (running) { return; }
    running = true;
    link.setAttribute("aria-busy", "true");
    try {
      await action();
    } catch (error) {
      document.dispatchEvent(new CustomEvent("trouble", { detail: error.message }));
    } finally {
      running = false;
      link.removeAttribute("aria-busy");
    }
  });
}

function remembered() {
  try { return sessionStorage.getItem("key"); } catch { return null; }
}
