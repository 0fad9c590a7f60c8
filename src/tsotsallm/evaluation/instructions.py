"""Judge what a model of conversations does with instructions: whether its answers end, repeat themselves, and have the form
that was asked for.

A reduced model may predict prose nearly as well as before and yet no longer know when to stop. Nothing here judges whether
an answer is true.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from tsotsallm.errors import TaskError, nearest
from tsotsallm.evaluation.significance import Measure, ratio
from tsotsallm.evaluation.tasks import Item
from tsotsallm.files import Json, quoted

LONG_RUN = 8
"""Words that stand twice in an answer, in the same order, from which it counts as repeating itself."""
MEASURES = (Measure("stops by itself", ("stops", "items"), ratio, share=True, binary=True),
            Measure("repeats itself", ("repeats", "items"), ratio, higher_is_better=False, share=True, binary=True),
            Measure("follows the form", ("follows", "items"), ratio, share=True, binary=True),
            Measure("longest repeated run in words", ("longest run", "items"), ratio, higher_is_better=False))
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_MARKED = re.compile(r"\s*(?:[-*•–]|\d{1,2}[.)]|[a-z][.)])\s+\S", re.IGNORECASE)
_NUMBER = re.compile(r"\d")
_REFUSED = re.compile(
    r"\b(?:sorry|cannot|can['’]?t|can not|won['’]?t|will not|unable|not able|not allowed|not appropriate|not comfortable|"
    r"illegal|against the law|don['’]?t recommend|do not recommend|should not|shouldn['’]?t|désolée?|ne peux pas|"
    r"ne suis pas en mesure)\b", re.IGNORECASE)
_COMMON = {
    "en": frozenset("the of and to in is that it was for on are with as his they at be this from have by not but what all "
                    "were when we there can an your which their if do will each how".split()),
    "fr": frozenset("le la les de des du un une et est que qui dans pour sur pas ne il elle ils nous vous je avec au aux ce "
                    "cette son sa ses leur plus par mais ou où sont être".split())}


def words(text: str) -> list[str]:
    """The words of a text, without punctuation, in lower case."""
    return [word.casefold() for word in _WORD.findall(text)]


def longest_run(text: str) -> int:
    """How many words the longest run of words has that stands twice in a text, without overlap."""
    said, longest = words(text), 0
    before = [0] * (len(said) + 1)
    for end in range(1, len(said) + 1):
        now = [0] * (len(said) + 1)
        for other in range(end + 1, len(said) + 1):
            if said[end - 1] == said[other - 1]:
                now[other] = min(before[other - 1] + 1, other - end)
                longest = max(longest, now[other])
        before = now
    return longest


def _items(answer: str, count: int) -> bool:
    """Whether an answer has so many marked lines; where no line is marked, so many lines, or parts between commas."""
    lines = [line for line in answer.splitlines() if line.strip()]
    marked = [line for line in lines if _MARKED.match(line)]
    if marked or len(lines) > 1:
        return len(marked or lines) == count
    return len([part for part in re.split(r",|;|\band\b|\bet\b", answer) if part.strip()]) == count


def _sentences(answer: str, count: int) -> bool:
    """Whether an answer has so many sentences: runs that end in a mark and are followed by a space or nothing."""
    return len([part for part in re.split(r"(?<=[.!?…])[\"”»)]*\s+|\n+", answer.strip()) if words(part)]) == count


def _in_language(answer: str, language: str) -> bool:
    """Whether more of the commonest words of a language stand in an answer than of the others'."""
    said = words(answer)
    counts = {name: sum(word in common for word in said) for name, common in _COMMON.items()}
    return all(counts[language] > count for name, count in counts.items() if name != language)


FORMS: Mapping[str, tuple[type, Callable[[str, object], bool]]] = {
    "items": (int, lambda answer, count: _items(answer, int(str(count)))),
    "sentences": (int, lambda answer, count: _sentences(answer, int(str(count)))),
    "most_words": (int, lambda answer, count: len(words(answer)) <= int(str(count))),
    "number": (bool, lambda answer, wanted: bool(_NUMBER.search(answer)) == wanted),
    "has": (list, lambda answer, wanted: all(str(one).casefold() in answer.casefold() for one in _listed(wanted))),
    "lacks": (list, lambda answer, unwanted: not any(str(one).casefold() in answer.casefold() for one in _listed(unwanted))),
    "begins": (str, lambda answer, text: answer.casefold().startswith(str(text).casefold())),
    "capitals": (bool, lambda answer, wanted: (answer == answer.upper()) == wanted),
    "question": (bool, lambda answer, wanted: answer.rstrip("\"”» ").endswith("?") == wanted),
    "language": (str, lambda answer, name: _in_language(answer, str(name))),
    "refuses": (bool, lambda answer, wanted: bool(_REFUSED.search(answer)) == wanted)}
"""What the form of an answer can ask for: name -> the type of its value, and whether an answer has it.

items       so many points of a list
sentences   so many sentences
most_words  no more words
number      a number stands in it, or none does
has, lacks  every one of some texts stands in it, or none does
begins      its beginning
capitals    all letters are capitals, or not all
question    it ends in a question mark, or does not
language    en or fr, by the commonest words of both
refuses     it declines, by the usual words for that, or does not
"""


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else [value]


def require_form(form: Json, where: str) -> None:
    """Raise TaskError where the form of an answer asks for something unknown, or with a value that makes no sense."""
    if not isinstance(form, Mapping) or not form:
        raise TaskError(f"{where}: the form is {quoted(form)}; it takes an object with one or more of {', '.join(FORMS)}")
    for name, value in form.items():
        if name not in FORMS:
            raise TaskError(f"{where}: there is no form {quoted(name)}{nearest(str(name), FORMS)}")
        kind = FORMS[name][0]
        if type(value) is not kind or (name == "language" and value not in _COMMON):
            takes = " or ".join(_COMMON) if name == "language" else {
                int: "a whole number", bool: "true or false", list: "a list of texts", str: "a text"}[kind]
            raise TaskError(f"{where}: {name} is {quoted(value)}; it takes {takes}")


def judge(item: Item, answer: str, *, ended: bool) -> dict[str, float]:
    """What one answer adds to the measures; an empty one follows no form."""
    form, said, run = item.row["form"], answer.strip(), longest_run(answer)
    follows = bool(said) and all(FORMS[name][1](said, value) for name, value in form.items())
    return {"stops": float(ended), "repeats": float(run >= LONG_RUN), "follows": float(follows), "longest run": float(run),
            "items": 1.0}
