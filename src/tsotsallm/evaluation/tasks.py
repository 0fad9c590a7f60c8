"""Tasks as data: a YAML file says where the items are, how they become prompts, and what counts as right.

Everything is read and checked here, before any model is loaded.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from jinja2 import StrictUndefined, TemplateError, Undefined, meta
from pydantic import Field

from tsotsallm import hub
from tsotsallm.errors import TaskError, nearest
from tsotsallm.files import (
    DATA_BYTES,
    Json,
    JsonObject,
    csv_rows,
    json_lines,
    one_line,
    parse_json,
    parse_yaml,
    quoted,
    read_json,
    read_utf8,
)
from tsotsallm.sandbox import Environment, bounded
from tsotsallm.streaming.corpus import read_text
from tsotsallm.validation import HIDDEN, RULES, Count, checked

Kind = Literal["perplexity", "conversations", "choices", "answers", "bias", "summary", "instructions"]
NEEDS: dict[str, tuple[str, ...]] = {
    "perplexity": ("text",), "conversations": (), "choices": ("prompt", "choices", "answer"),
    "answers": ("prompt", "answers"), "bias": ("prompt", "choices", "answer"),
    "summary": ("prompt", "answers"), "instructions": ("prompt", "form")}
"""The parts that a layout of each kind needs: templates and expressions over an item's columns."""
TEMPLATES = ("prompt", "text")
_NOT_MADE = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, SyntaxError,
             MemoryError)
"""What a template raises where its columns do not fit it, or where no interpreter accepts it."""


@dataclass(frozen=True)
class Item:
    """One item of a task: the model's prompt, and what is right."""

    id: str
    prompt: str
    choices: tuple[str, ...] = ()
    gold: int | None = None
    answers: tuple[str, ...] = ()
    group: str = ""
    row: Mapping[str, Json] = field(default_factory=dict, repr=False)        # JSON as read, for judges that need more


Template = Annotated[str, Field(coerce_numbers_to_str=True)]
"""A template or an expression; a bare number is one too."""


@dataclass(frozen=True)
class HubData:
    """A data set of the Hugging Face hub.

    repository     such as allenai/ai2_arc
    split          such as test
    configuration  where the data set has several
    """

    __pydantic_config__ = RULES
    repository: str
    split: str
    configuration: str | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task as its file defines it; the first of `layouts` that fits the columns of the data is used.

    kind            perplexity of texts, or of the answers in conversations; choices among answers; free answers; bias, as
                    BBQ has it; summary; or instructions
    about           what it is, in a sentence
    layouts         how an item becomes a prompt: {prompt: template, choices: expression, answer: expression} over columns
    files           patterns of its files below the folder that --data gives
    hub             the data set of the hub that it comes from
    packaged        name of a file with its items that the package brings, where --data gives none
    world           closed_book, open_book or text: items of the embedded model's world
    columns         names of a CSV file's columns where it has no header
    delimiter       between a prompt and each of its choices
    judge           of answers: tiers, number or first_integer
    max_new_tokens  tokens that an answer may have
    stop            texts that end an answer
    protocol        of perplexity: windows of a whole text, or its rows one by one
    context         tokens of a window
    """

    __pydantic_config__ = RULES
    name: str = field(default="", metadata={HIDDEN: True})
    kind: Kind
    about: str = ""
    layouts: tuple[dict[str, Template], ...] = ()
    files: tuple[str, ...] = ()
    hub: HubData | None = None
    packaged: str | None = None
    world: Literal["closed_book", "open_book", "text"] | None = None
    columns: tuple[str, ...] = ()
    delimiter: str = " "
    judge: Literal["tiers", "number", "first_integer"] = "tiers"
    max_new_tokens: Count = 50
    stop: tuple[str, ...] = ("\n",)
    protocol: Literal["windows", "rows"] = "windows"
    context: Annotated[int, Field(ge=2)] = 512

    def plain(self) -> dict[str, object]:
        """Everything in the task that a score depends on, as plain data."""
        return {"name": self.name, "kind": self.kind, "layouts": [dict(layout) for layout in self.layouts],
                "delimiter": self.delimiter, "judge": self.judge, "max_new_tokens": self.max_new_tokens,
                "stop": list(self.stop), "protocol": self.protocol, "context": self.context}


def packaged_tasks() -> dict[str, Traversable]:
    """Name -> file of the tasks that the package brings."""
    folder = resources.files("tsotsallm").joinpath("tasks")
    return {file.name.removesuffix(".yaml"): file for file in sorted(folder.iterdir(), key=lambda file: file.name)
            if file.name.endswith(".yaml")}


def read_task(source: str | Path) -> Task:
    """A packaged task by name, or one of the user's own: a YAML file, or a BIG-bench JSON file.

    Raises TaskError where the file is missing, or where what it says is not a task.
    """
    path = Path(source)
    if path.suffix == ".json":
        return big_bench_task(path)
    if path.suffix in (".yaml", ".yml"):
        if not path.exists():
            raise TaskError(f"{source} does not exist; give the name of a task or its YAML file")
        name, text = path.stem, read_utf8(path, TaskError)
    else:
        known, name = packaged_tasks(), str(source).replace("_", "-")
        if name not in known:
            raise TaskError(f"there is no task {str(source)!r}{nearest(name, known)}")
        text = known[name].read_text("utf-8")
    return _task(name, parse_yaml(text, f"task {name}", TaskError))


def _task(name: str, content: object) -> Task:
    task = replace(checked(Task, content, f"task {name}", TaskError), name=name)
    if not task.layouts and not task.world and task.kind != "conversations":
        raise TaskError(f"task {name} has no layouts: give at least one, which says how an item becomes a prompt")
    for layout in task.layouts:
        missing = [part for part in NEEDS[task.kind] if part not in layout]
        extra = [part for part in layout if part not in (*NEEDS[task.kind], "group")]
        if missing or extra:
            raise TaskError(f"task {name}: a layout of kind {task.kind} has {', '.join(NEEDS[task.kind])} and may have "
                            f"group; this one {f'lacks {missing[0]}' if missing else f'also has {quoted(extra[0])}'}")
        for part, text in layout.items():
            _compiled(part in TEMPLATES, text, name)
    if any(not pattern or pattern.startswith(("/", "\\")) or ".." in pattern for pattern in task.files):
        raise TaskError(f"task {name}: files is {quoted(list(task.files))}; it takes patterns such as data/*.jsonl, below "
                        "the folder that --data gives")
    return task


# -- templates ------------------------------------------------------------------------------------------------------


@cache
def _environment() -> Environment:
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["wikihow"] = _without_wikihow_marks
    environment.filters["shortest"] = lambda texts: min(texts, key=len)
    return environment


def _without_wikihow_marks(text: str) -> str:
    """HellaSwag's texts without the marks of WikiHow, their source, cleaned as lm-eval does."""
    import re

    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


@dataclass(frozen=True)
class _Compiled:
    fields: frozenset[str]
    render: Callable[[Mapping[str, object]], object]


@cache
def _compiled(is_template: bool, source: str, task: str) -> _Compiled:
    """Compile a template that makes text, or an expression that makes a value, from the columns of an item."""
    environment = _environment()
    try:
        with bounded():
            text = source if is_template else "{{ " + source + " }}"
            fields = frozenset(meta.find_undeclared_variables(environment.parse(text)))
            if is_template:
                return _Compiled(fields, environment.from_string(source).render)
            return _Compiled(fields, environment.compile_expression(source, undefined_to_none=False))
    except _NOT_MADE as error:
        raise TaskError(f"task {task}: {quoted(source)} is not a valid template ({one_line(error)}); write columns as "
                        "{{column}} in prompts, and bare in choices, answer and group") from None


def _layout_for(task: Task, columns: set[str], where: str) -> Mapping[str, str]:
    """The first layout whose columns the data has."""
    lacking = []
    for layout in task.layouts:
        fields = set().union(*(_compiled(part in TEMPLATES, text, task.name).fields for part, text in layout.items()))
        if fields <= columns:
            return layout
        lacking.append(fields - columns)
    fewest = min(lacking, key=len)
    raise TaskError(f"{where} has no column {', '.join(sorted(fewest))}, which task {task.name} asks for; its columns are "
                    f"{', '.join(sorted(columns)) or 'none'}: rename them, or write a task file with a layout for them")


# -- rows -----------------------------------------------------------------------------------------------------------


def read_items(task: Task, data: str | Path | None = None, *, limit: int | None = None, seed: int = 0) -> list[Item]:
    """The items of a task from local data, the embedded world, or the hub; `limit` draws that many by `seed`.

    Raises TaskError where there is no data, or where an item does not fit the task's layouts.
    """
    where = str(data) if data is not None else f"task {task.name}"
    items: list[Item] = []
    layout: Mapping[str, str] = {}
    for number, row in enumerate(_rows(task, data), 1):
        layout = layout or _layout_for(task, set(row), where)
        items.append(_item(task, layout, row, number, where))
    if not items:
        raise TaskError(f"{where} holds no items; give a file with at least one")
    seen: dict[str, int] = {}
    unique = []
    for item in items:
        seen[item.id] = seen.get(item.id, 0) + 1
        unique.append(item if seen[item.id] == 1 else Item(**{**item.__dict__, "id": f"{item.id}-{seen[item.id]}"}))
    if limit is not None and limit < 1:
        raise TaskError(f"--limit is {limit}; it takes 1 or more items")
    if limit is None or limit >= len(unique):
        return unique
    import random

    return [unique[index] for index in sorted(random.Random(seed).sample(range(len(unique)), limit))]


@dataclass(frozen=True)
class TaskText:
    """A text whose perplexity is measured, and the group that it belongs to."""

    content: str
    group: str
    source: str


def read_texts(task: Task, data: str | Path | None = None) -> list[TaskText]:
    """The texts of a perplexity task: one per file, each of a group where the layout names groups."""
    if task.world:
        from tsotsallm.lab.texts import world_text

        return [TaskText(world_text(test=True, characters=60_000), "", "the embedded world, test")]
    rows: list[dict[str, str]]
    if data is None:
        rows = [{"file": task.name, "text": "".join(row["text"] for row in _hub_rows(task))}]
    else:
        rows = [{"file": path.stem, "text": read_text(path)} for path in data_files(task, Path(data))]
    layout = _layout_for(task, set(rows[0]), str(data))
    return [TaskText(_made(task, layout, "text", row, str(data)),
                     _made(task, layout, "group", row, str(data)) if "group" in layout else "", row["file"]) for row in rows]


def _made(task: Task, layout: Mapping[str, str], name: str, row: Mapping[str, object], where: str) -> Any:
    """A part of a layout, made from the columns of a row; raises TaskError where the columns do not fit.

    `choices` and `answers` are lists of texts, `answer` and `form` are any values, all else is text.
    """
    try:
        with bounded(sum(len(str(value)) for value in row.values())):
            value: Json = _compiled(name in TEMPLATES, layout[name], task.name).render(row)
            if name == "answers":
                value = [answer for answer in (value if isinstance(value, (list, tuple)) else [value]) if answer is not None]
            if name in ("choices", "answers"):
                return [str(text) for text in value]
            return value if name in ("answer", "form") and not isinstance(value, Undefined) else str(value)
    except _NOT_MADE as error:
        raise TaskError(f"{where}: {name} cannot be made from {quoted(layout[name])} ({one_line(error)}); correct the item "
                        "or the task's layout") from None


def _item(task: Task, layout: Mapping[str, str], row: Mapping[str, object], number: int, where: str) -> Item:
    def part(name: str) -> Any:
        return _made(task, layout, name, row, f"{where}, item {number}")

    prompt, choices, gold, answers = part("prompt"), [], None, []
    if task.kind in ("choices", "bias"):
        choices = part("choices")
        label = part("answer")
        try:
            gold = int(label)
        except (TypeError, ValueError, OverflowError):
            gold = -1
        if not 0 <= gold < len(choices):
            raise TaskError(f"{where}, item {number}: the label is {quoted(label)}, but there are {len(choices)} choices, "
                            "numbered from 0; correct the item")
    elif task.kind in ("answers", "summary"):
        answers = [answer for answer in part("answers") if answer.strip()]
        if not answers:
            raise TaskError(f"{where}, item {number}: it has no answer; correct the item")
    group = part("group") if "group" in layout else ""
    kept = dict(row) if task.kind == "bias" else {"form": part("form")} if task.kind == "instructions" else {}
    digest = hashlib.sha256(json.dumps([prompt, choices, gold, answers, group, kept], default=str).encode()).hexdigest()[:16]
    return Item(digest, prompt, tuple(choices), gold, tuple(answers), group, kept)


def _rows(task: Task, data: str | Path | None) -> Iterator[Mapping[str, object]]:
    if task.world:
        yield from _world_rows(task.world)
    elif data is not None:
        for path in data_files(task, Path(data)):
            yield from _file_rows(path, task.columns)
    elif task.packaged is not None:
        yield from _packaged_rows(task.packaged)
    else:
        yield from _hub_rows(task)


def data_files(task: Task, data: Path) -> list[Path]:
    """The files of a task: `data` itself, or the files in the folder `data` that the task names (all if it names none).

    Raises TaskError where there are none.
    """
    if not data.exists():
        raise TaskError(f"{data} does not exist; give a file or folder with --data")
    if data.is_file():
        return [data]
    suffixes = (".txt", ".raw") if task.kind == "perplexity" else (".jsonl", ".json", ".csv")
    patterns = task.files or tuple(f"*{suffix}" for suffix in suffixes)
    for pattern in patterns:
        own = pattern.removeprefix(f"{data.name}/")         # the task's own folder is as good as the folder above it
        if files := sorted(path for path in data.glob(own) if path.is_file() and path.name != "SOURCE.txt"):
            return files
    raise TaskError(f"{data} holds nothing for task {task.name}: no {' or '.join(patterns)}; give its file with --data FILE")


def _file_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, object]]:
    text = read_utf8(path, TaskError, DATA_BYTES).replace("\r\n", "\n")
    if not text.strip():
        raise TaskError(f"{path} is empty; give a file with at least one item")
    rows = _csv_rows(path, text, columns) if path.suffix == ".csv" else _json_rows(path, text)
    for row in rows:
        if not isinstance(row, dict):
            raise TaskError(f"{path} holds {type(row).__name__} where an object with columns is expected; write one object "
                            "per item")
        yield {"file": path.stem, **row}


def _csv_rows(path: Path, text: str, columns: Sequence[str]) -> Iterator[object]:
    names = list(columns)
    for number, row in csv_rows(io.StringIO(text, newline=""), str(path), TaskError):
        if not row:
            continue
        if not names:
            names = row
        elif len(row) != len(names):
            raise TaskError(f"{path}, line {number} has another number of fields ({len(row)}) than of columns "
                            f"({len(names)}: {one_line(', '.join(names), 80)}); correct the line")
        else:
            yield dict(zip(names, row, strict=True))


def _json_rows(path: Path, text: str) -> Iterator[object]:
    """The objects of a JSON list, of a JSON object's one list, or of a file with one object a line."""
    try:
        content = parse_json(text, str(path), TaskError)
    except TaskError:
        if text.lstrip()[:1] == "[":
            raise                       # a list: the fault is where the message says, and no line is an object
        yield from (value for _, value in json_lines(text, str(path), TaskError))
        return
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        content = lists[0] if len(lists) == 1 else [content]
    yield from content if isinstance(content, list) else [content]


def _packaged_rows(name: str) -> Iterator[JsonObject]:
    """The items in a file that the package brings beside its tasks."""
    file = resources.files("tsotsallm").joinpath("tasks", name)
    if name not in {one.name for one in resources.files("tsotsallm").joinpath("tasks").iterdir()}:
        raise TaskError(f"packaged is {quoted(name)}, but the package has no such file; leave it out, and give a file with "
                        "--data")
    yield from (value for _, value in json_lines(file.read_text("utf-8"), name, TaskError))


def _world_rows(part: str, count: int = 500) -> Iterator[dict[str, str]]:
    from tsotsallm.lab.texts import TEST_SEED, examination
    from tsotsallm.lab.world import build_world

    for question in examination(build_world(), TEST_SEED, count, passages=part == "open_book"):
        yield {"prompt": question.prompt, "answer": question.answer, "language": question.language}


def _hub_rows(task: Task) -> Iterator[JsonObject]:
    """The rows of a hub data set."""
    if not task.hub:
        raise TaskError(f"task {task.name} has no data of its own; give some with --data FILE")
    configuration = task.hub.configuration
    for row in hub.rows(task.hub.repository, configuration, split=task.hub.split, kind=TaskError,
                        instead=f"give the data of task {task.name} as a local file with --data FILE"):
        yield {"file": configuration or task.name, **row}


# -- BIG-bench ------------------------------------------------------------------------------------------------------


def big_bench_task(path: Path) -> Task:
    """A BIG-bench JSON task (Srivastava et al. 2022): multiple choice where it scores targets, else free-text answers.

    Raises TaskError where the file is missing or holds no examples.
    """
    try:
        content = read_json(path, TaskError, DATA_BYTES)
    except FileNotFoundError:
        raise TaskError(f"{path} does not exist; give a BIG-bench task's JSON file") from None
    examples = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(examples, list) or not examples or not isinstance(examples[0], dict):
        raise TaskError(f"{path} is not a BIG-bench task: it has no list of examples")
    first = examples[0]
    before, after = content.get("example_input_prefix", "\nQ: "), content.get("example_output_prefix", "\nA: ")
    prompt = (f"{content.get('task_prefix', '')}{before}" "{{input}}" f"{after}").strip("\n ")
    if "target_scores" in first:
        if content.get("append_choices_to_input", True):
            listed = content.get("choice_prefix", "\n  choice: ")
            prompt = prompt.replace("{{input}}", "{{input}}{% for one in target_scores %}" f"{listed}" "{{one}}{% endfor %}")
        return Task(name=path.stem, kind="choices", about=str(content.get("description", "")), files=(str(path),), layouts=({
            "prompt": prompt, "choices": "target_scores | list",
            "answer": "(target_scores.values() | list).index(target_scores.values() | max)"},))
    return Task(name=path.stem, kind="answers", about=str(content.get("description", "")), files=(str(path),),
                layouts=({"prompt": prompt, "answers": "target"},))
