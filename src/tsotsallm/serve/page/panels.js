// The panels at both sides of the conversation: opened by a button, closed by it, by their own button or by Escape.

const $ = (id) => document.getElementById(id);
const NAMES = ["list", "settings"];
const narrow = window.matchMedia("(max-width: 60rem)");      // below, a panel covers the conversation (as in page.css)

export function startPanels() {
  for (const name of NAMES) {
    $(`open-${name}`).addEventListener("click", () => (isOpen(name) ? closePanel(name) : openPanel(name)));
    $(`close-${name}`).addEventListener("click", () => closePanel(name));
    $(name).addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.defaultPrevented) { closePanel(name); }
    });
  }
  narrow.addEventListener("change", cover);
}

export const isOpen = (name) => !$(name).hidden;
export const isNarrow = () => narrow.matches;

export function openPanel(name, focus = true) {
  for (const other of NAMES) { if (other !== name && narrow.matches) { hide(other); } }
  $(name).hidden = false;
  $(`open-${name}`).ariaExpanded = "true";
  cover();
  if (focus) { $(`${name}-title`).focus(); }
}

/** Close a panel; the focus returns to the button that opens it. */
export function closePanel(name) {
  const inside = $(name).contains(document.activeElement);
  hide(name);
  cover();
  if (inside) { $(`open-${name}`).focus(); }
}

/** Close what covers the conversation, if anything does. */
export function uncover() {
  if (narrow.matches) { NAMES.forEach(hide); cover(); }
}

function hide(name) {
  $(name).hidden = true;
  $(`open-${name}`).ariaExpanded = "false";
}

/** What a panel covers cannot be reached by keyboard either. */
function cover() {
  $("main").inert = narrow.matches && NAMES.some(isOpen);
}
