// What is chosen in the header and the settings: models, whether two are compared, the mode, the sampling.

import { openPanel } from "./panels.js";
import { reportLink } from "./stream.js";
import { bytes, known, label, number, say, word } from "./words.js";

const $ = (id) => document.getElementById(id);
let models = [];
let warm = false;                   // a temperature was chosen, so that comparing does not change it
let whenChosen = () => {};          // called after every change of models or mode

export const allModels = () => models;
export const model = (side) => models.find((one) => one.name === $(`model-${side}`).value);
export const sides = () => ($("compare").checked ? ["a", "b"] : ["a"]);
export const converses = () => $("mode-converse").checked;
export const shaded = () => $("surprise").checked;

export function startChoice(onChoice, onShade) {
  whenChosen = onChoice;
  $("compare").addEventListener("change", () => { if ($("compare").checked) { preselectSecond(); } chosen(); });
  for (const side of ["a", "b"]) { $(`model-${side}`).addEventListener("change", chosen); }
  for (const mode of ["converse", "continue"]) { $(`mode-${mode}`).addEventListener("change", modeChosen); }
  $("surprise").addEventListener("change", () => { $("legend").hidden = !shaded(); onShade(); });
  $("temperature").addEventListener("input", () => { warm = true; });
  document.addEventListener("language", fillMenus);
}

/** Take the models of the service; a reduced model and its original are compared from the start, where both are served. */
export function takeModels(state) {
  const first = !models.length;
  models = state.models;
  const any = models.length > 0;
  $("no-model").hidden = any;
  for (const id of ["talk", "talk-settings", "talk-buttons", "picker"]) { $(id).hidden = !any; }
  if (!any) { return; }
  $("compare-row").hidden = models.length < 2;
  $("max-tokens").max = state.limits.tokens;
  if ($("max-tokens").valueAsNumber > state.limits.tokens) { $("max-tokens").value = state.limits.tokens; }
  say($("max-tokens-about"), "max_tokens_about", () => ({ n: number(state.limits.tokens) }));
  fillMenus();
  let kin = preselectSecond();
  const made = models.find((one) => one.original);
  if (first && !kin && made) {
    $("model-a").value = made.name;
    kin = preselectSecond();
  }
  if (first) { $("compare").checked = kin; }
  chosen();
}

/** Choose models by name, as a conversation or the studio had them; false where one is not served. */
export function choose(names) {
  if (!names.length || !names.every((name) => models.some((one) => one.name === name))) { return false; }
  $("model-a").value = names[0];
  if (names.length > 1) { $("model-b").value = names[1]; }
  $("compare").checked = names.length > 1;
  chosen();
  return true;
}

/** A model, and beside it the one that it was made from where that is served too. */
export function chooseResult(name) {
  $("model-a").value = name;
  $("compare").checked = preselectSecond();
  chosen();
}

export function chooseMode(converse) {
  $(converse && !$("mode-converse").disabled ? "mode-converse" : "mode-continue").checked = true;
  modeChosen();
}

/** The sampling as fields of a request; null where a field is wrong, which is then shown. */
export function sampling() {
  const wrong = [...$("sampling").querySelectorAll("input")].find((field) => !field.validity.valid);
  if (wrong) {
    openPanel("settings", false);
    wrong.reportValidity();
    return null;
  }
  const value = (id) => $(id).valueAsNumber;
  return { max_tokens: value("max-tokens"), temperature: value("temperature"), top_p: value("top-p"), top_k: value("top-k"),
    ...($("seed").value !== "" && { seed: value("seed") }) };
}

function fillMenus() {
  for (const menu of [$("model-a"), $("model-b")]) {
    const before = menu.value;
    menu.replaceChildren(...models.map((one) => new Option(word("model_option", { name: one.name, bytes: bytes(one.bytes) }), one.name)));
    menu.value = models.some((one) => one.name === before) ? before : models[0]?.name;
  }
}

function preselectSecond() {
  const first = model("a");
  const kin = models.find((one) => one.name === first.original) ?? models.find((one) => one.original === first.name);
  const other = kin ?? models.find((one) => one !== first);
  if (other) { $("model-b").value = other.name; }
  return Boolean(kin);
}

function chosen() {
  const two = $("compare").checked;
  $("card-b").hidden = !two;
  $("talk").classList.toggle("two", two);
  $("beside").hidden = !two;
  if (two) { say($("beside"), "beside", () => ({ name: model("b").name })); }
  if (!warm) { $("temperature").value = two ? 0 : $("temperature").defaultValue; }      // else chance is compared, not models
  for (const side of ["a", "b"]) { describe($(`card-${side}`).querySelector(".about"), model(side)); }
  const all = sides().every((side) => model(side).converses);
  $("mode-converse").disabled = !all;
  $(all ? "mode-converse" : "mode-continue").checked = true;
  $("mode-about").hidden = all;
  modeChosen();
}

function modeChosen() {
  const key = converses() ? "your_message" : "your_text";
  say($("prompt-label"), key);
  $("prompt").dataset.hint = key;
  $("prompt").placeholder = word(key);
  whenChosen();
}

function describe(place, one) {
  place.replaceChildren();
  const facts = place.appendChild(document.createElement("dl"));
  const fact = (key, value) => {
    say(facts.appendChild(document.createElement("dt")), key);
    const shown = facts.appendChild(document.createElement("dd"));
    if (typeof value === "string") { shown.textContent = value; } else { say(shown, "value", () => ({ value: value() })); }
  };
  fact("model_bytes", () => bytes(one.bytes));
  if (one.parameters) { fact("model_parameters", () => number(one.parameters)); }
  fact("model_context", () => word("tokens_n", { n: number(one.context) }));
  fact("model_kind", () => word(known(`kind_${one.kind}`) ? `kind_${one.kind}` : one.kind));
  if (one.original) { fact("model_original", one.original); }
  if (one.report) {
    const link = reportLink(`/models/${encodeURIComponent(one.name)}/report`, one.name, "report_of");
    place.appendChild(document.createElement("p")).append(link);
  }
  say(place.appendChild(document.createElement("p")), one.recipe ? "recipe_of" : "no_recipe").className = "soft";
  if (one.recipe) {
    const recipe = place.appendChild(document.createElement("pre"));
    recipe.textContent = one.recipe;
    recipe.tabIndex = 0;
    recipe.setAttribute("role", "region");
    label(recipe, "recipe_of");
  }
}
