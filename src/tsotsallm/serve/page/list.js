// The list of conversations: open, rename, delete, export and import.

import { quietButton } from "./buttons.js";
import { asFile, forget, fromFile, keep, kept, load, titleOf } from "./kept.js";
import { isNarrow, openPanel, uncover } from "./panels.js";
import { begin, currentId, openConversation } from "./talk.js";
import { day, label, word } from "./words.js";

const $ = (id) => document.getElementById(id);

export function startList() {
  for (const event of ["kept", "language", "opened"]) { document.addEventListener(event, show); }
  window.addEventListener("storage", show);
  $("export-all").addEventListener("click", () => download(kept(), "conversations"));
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", take);
  show();
  if (!isNarrow() && kept().length) { openPanel("list", false); }
}

function show() {
  const all = kept();
  $("kept").replaceChildren(...all.map(entry));
  $("kept").hidden = $("export-all").hidden = all.length === 0;
  $("none-kept").hidden = all.length > 0;
}

function entry(one) {
  const item = document.createElement("li");
  const open = item.appendChild(document.createElement("button"));
  open.type = "button";
  open.className = "title";
  open.dir = "auto";
  open.textContent = titleOf(one);
  open.title = day(one.changed);
  open.addEventListener("click", () => { openConversation(one.id); uncover(); });
  if (one.id !== currentId()) { return item; }
  item.className = "now";
  open.setAttribute("aria-current", "true");
  const row = item.appendChild(document.createElement("div"));
  row.className = "row";
  row.append(quietButton("rename", () => rename(item, one)), quietButton("export", () => download([one], titleOf(one))),
             quietButton("delete", () => remove(one)));
  return item;
}

function rename(item, one) {
  const form = document.createElement("form");
  const field = form.appendChild(document.createElement("input"));
  field.value = titleOf(one);
  field.maxLength = 200;
  field.dataset.testid = "rename-field";
  label(field, "new_title");
  const back = () => { show(); $("kept").querySelector('.now [data-testid="rename"]')?.focus(); };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const latest = load(one.id);
    if (latest && field.value.trim()) {
      attempt(() => keep({ ...latest, title: field.value.trim() }));
      document.dispatchEvent(new CustomEvent("renamed", { detail: { id: one.id, title: field.value.trim() } }));
    }
    back();
  });
  field.addEventListener("keydown", (event) => { if (event.key === "Escape") { event.preventDefault(); back(); } });
  item.replaceChildren(form);
  field.select();
}

function remove(one) {
  if (!window.confirm(word("delete_sure", { title: titleOf(one) }))) { return; }
  begin();
  forget(one.id);
  if (!isNarrow()) { $("list-title").focus(); }
}

function download(conversations, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([asFile(conversations)], { type: "application/json" }));
  link.download = `${name.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "conversation"}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function take() {
  const [file] = $("import-file").files;
  $("import-file").value = "";
  if (!file) { return; }
  await attempt(async () => {
    const n = await fromFile(file);
    $("said").textContent = word("imported", { n });
  });
}

async function attempt(action) {
  document.dispatchEvent(new Event("no-trouble"));
  try { await action(); } catch (error) { document.dispatchEvent(new CustomEvent("trouble", { detail: error.message })); }
}
