// Questions with known answers, offered where nothing has been said yet.

import { languageNow, say, word } from "./words.js";

// The embedded model knows a small invented world and nothing of ours; it speaks English and French.
const WORLD = {
  en: [["Where was Sotis Selwick born?", "Calkormouth"], ["Which dish pleases Zanuri Ranley most?", "Laboti"],
    ["Where was Keseth Radley born?", "Korpormouth"], ["Where does Mias Lorson live?", "Verporport"]],
  fr: [["Où habite Loril Norley ?", "Lamselstad"], ["Quel est le lieu de naissance de Sotis Selwick ?", "Calkormouth"],
    ["Quel est le lieu de naissance de Keseth Radley ?", "Korpormouth"], ["Où habite Meon Harick ?", "Lamlorford"]],
};
const NUMBERS = [1, 2, 3, 4];

/** Offer the questions that suit a model; `send` takes the text of the chosen one. */
export function showExamples(model, converses, send) {
  const list = document.getElementById("examples");
  list.replaceChildren();
  if (!model) { return; }
  const general = NUMBERS.map((n) => [word(`example_${n}`), word(`example_${n}_answer`)]);
  for (const [question, answer] of model.embedded ? WORLD[languageNow()] ?? WORLD.en : general) {
    const button = list.appendChild(document.createElement("li")).appendChild(document.createElement("button"));
    button.type = "button";
    button.dir = "auto";
    button.append(question);
    const known = button.appendChild(document.createElement("span"));
    known.className = "soft";
    say(known, "known_answer", () => ({ answer }));
    button.addEventListener("click", () => send(converses ? question : `${word("question_to_continue", { question })} `.trimEnd()));
  }
}
