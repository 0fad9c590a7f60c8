// The studio's form: where an error about it stands, and what is kept of it while the page is loaded again.

const $ = (id) => document.getElementById(id);
export const HUB = "hub:";          // stands for a model of the hub among the choices
let wrong = null;                   // the field that the server refused
let restored = false;

/** Show why a wish was refused: beside the field that the server names, else at the foot of the form. */
export function showFault({ message, param }) {
  const error = $("studio-error");
  wrong = fieldOf(param);
  error.textContent = message;
  error.hidden = false;
  if (wrong) {
    (wrong.closest("#keep-texts") ?? wrong).after(error);
    wrong.setAttribute("aria-invalid", "true");
    wrong.setAttribute("aria-describedby", [error.id, wrong.getAttribute("aria-describedby")].filter(Boolean).join(" "));
  }
  (wrong ?? error).focus();
}

export function hideFault() {
  const error = $("studio-error");
  if (error.hidden) { return; }
  error.hidden = true;
  $("studio-form").append(error);
  if (!wrong) { return; }
  const others = wrong.getAttribute("aria-describedby").replace(/^studio-error ?/, "");
  wrong.removeAttribute("aria-invalid");
  if (others) { wrong.setAttribute("aria-describedby", others); } else { wrong.removeAttribute("aria-describedby"); }
  wrong = null;
}

/** The field of the form for one of a wish; null where there is none. */
function fieldOf(param) {
  if (param === "model") { return $("studio-model").value === HUB ? $("hub") : $("studio-model"); }
  if (param === "keep") { return $("keep-texts").querySelector("input:checked"); }
  return $("studio-form").elements.namedItem(param ?? "");
}

const fields = () => [...$("studio-form").querySelectorAll("select, textarea, input:not([type=file])")];
const held = (field) => (["checkbox", "radio"].includes(field.type) ? "checked" : "value");

/** Keep what is in the form for as long as this window is open: a page that is loaded again has it. */
export function remember() {
  const filled = Object.fromEntries(fields().map((field) => [field.id, field[held(field)]]));
  try { sessionStorage.setItem("studio", JSON.stringify(filled)); } catch { /* a window without storage begins with an empty form */ }
}

/** Fill the form, once, with what this window had in it before it was loaded again. */
export function restore() {
  if (restored) { return; }
  restored = true;
  let filled = null;
  try { filled = JSON.parse(sessionStorage.getItem("studio")); } catch { /* nothing was kept */ }
  for (const field of filled ? fields() : []) {
    const before = filled[field.id];
    const offered = field.tagName !== "SELECT" || [...field.options].some(({ value }) => value === before);
    if (before !== undefined && offered) { field[held(field)] = before; }
  }
}

/** Fill a field as a user would. */
export function put(field, value) {
  field.value = value;
  remember();
}
