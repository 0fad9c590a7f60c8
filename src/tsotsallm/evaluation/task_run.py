"""Evaluate one model on one task: items that are known already come from the cache, the others run through the model."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import TsotsallmError
from tsotsallm.evaluation import answers, bias, choices, instructions, perplexity, summary
from tsotsallm.evaluation.cache import ItemCache
from tsotsallm.evaluation.conversations import conversations_file, own_answers
from tsotsallm.evaluation.examinee import Examinee
from tsotsallm.evaluation.results import Exchange, TaskResult
from tsotsallm.evaluation.significance import Array, Measure
from tsotsallm.evaluation.tasks import Item, Task, TaskText, read_items, read_texts
from tsotsallm.files import quoted
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.likelihood import CHUNK_BYTES
from tsotsallm.streaming.sweep import Tick, silent
from tsotsallm.training.samples import Conversation, instruction_windows, read_conversations


@dataclass(frozen=True)
class PreparedTask:
    """A task with its items or texts, read and checked before any model is opened."""

    task: Task
    items: tuple[Item, ...] = ()
    texts: tuple[TaskText, ...] = ()
    conversations: tuple[Conversation, ...] = ()
    limit: int | None = None
    seed: int = 0

    @property
    def data_sha256(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the items, texts and conversations."""
        content = [*(item.id for item in self.items), *([text.content, text.group] for text in self.texts),
                   *self.conversations]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


    def answered_by(self, author: Examinee) -> PreparedTask:
        """The task with the conversations that it lacks: packaged requests, answered by the model that others are compared
        with.
        """
        if self.task.kind != "conversations" or self.conversations:
            return self
        return replace(self, conversations=tuple(own_answers(author)[:self.limit]))


def prepare(task: Task, data: str | Path | None = None, *, limit: int | None = None, seed: int = 0) -> PreparedTask:
    """Read a task's data and check what can be checked without a model; raises TaskError where the data does not fit.

    `limit` draws that many items by `seed`; of a perplexity task it takes the first windows of every text, and the first
    conversations.
    """
    if task.kind in ("perplexity", "conversations") and limit is not None and limit < 1:
        raise TsotsallmError(f"--limit is {limit}; it takes 1 or more windows")
    if task.kind == "conversations":
        file = None if data is None else conversations_file(Path(data))
        found = [] if file is None else read_conversations(str(file))[:limit]
        return PreparedTask(task, conversations=tuple(found), limit=limit, seed=seed)
    if task.kind == "perplexity":
        return PreparedTask(task, texts=tuple(read_texts(task, data)), limit=limit, seed=seed)
    items = tuple(read_items(task, data, limit=limit, seed=seed))
    if task.kind == "answers":
        answers.measures(task)
    if task.kind == "summary":
        summary.scorer()
    for item in items:
        if task.kind == "bias":
            bias.biased_choices(item)
        if task.kind == "instructions":
            instructions.require_form(item.row["form"], f"task {task.name}, {quoted(item.prompt)}")
    return PreparedTask(task, items, limit=limit, seed=seed)


def protocol_of(examinee: Examinee, prepared: PreparedTask, reference: Examinee | None = None) -> dict[str, object]:
    """Everything that a task's numbers depend on besides the model's weights, as plain data."""
    prepared = prepared.answered_by(reference or examinee)
    task = prepared.task
    protocol = {**task.plain(), "data_sha256": prepared.data_sha256, "limit": prepared.limit, "arithmetic": "float32",
                "seed": prepared.seed if prepared.limit else None}
    if task.kind in ("perplexity", "conversations"):
        return protocol | {"context": min(task.context, examinee.context), "tokenizer": examinee.tokenizer_fingerprint,
                           "bos": examinee.encode("a")[:1] == [examinee.codec.bos],
                           "reference": reference.name if reference else None}
    new_tokens = 0 if task.kind in ("choices", "bias") else task.max_new_tokens
    truncated = sum(examinee.truncates(item.prompt, [task.delimiter + choice for choice in item.choices], new_tokens)
                    for item in prepared.items)
    return protocol | {"items": len(prepared.items), "truncated_prompts": truncated,
                       "context": examinee.context if truncated else "holds every prompt"}


def run_task(examinee: Examinee, prepared: PreparedTask, reference: Examinee | None = None,
             protocol: dict[str, object] | None = None) -> TaskResult:
    """Evaluate one model on one task; `protocol` is the result of `protocol_of` where it is known already."""
    prepared = prepared.answered_by(reference or examinee)
    task = prepared.task
    protocol = protocol or protocol_of(examinee, prepared, reference)
    if task.kind in ("perplexity", "conversations"):
        return _perplexity(examinee, prepared, protocol, reference)
    cache = ItemCache(examinee.fingerprint, {"name": task.name, "task": task.plain(), "device": str(examinee.device)})
    waiting = [item for item in prepared.items if item.id not in cache.entries]
    measures: tuple[Measure, ...]
    if task.kind in ("choices", "bias"):
        judge = choices.judge if task.kind == "choices" else bias.judge
        asked = [(item.prompt, [task.delimiter + choice for choice in item.choices]) for item in waiting]
        for index, scores in examinee.likelihoods(asked):
            item = waiting[index]
            cache.add(item.id, judge(item, scores), log_likelihoods=[score.total for score in scores])
        measures = choices.MEASURES if task.kind == "choices" else bias.MEASURES
    elif task.kind == "instructions":
        def answered(index: int, text: str, ended: bool) -> None:
            item = waiting[index]
            cache.add(item.id, instructions.judge(item, text, ended=ended), reply=text.strip())

        if waiting:
            examinee.answer([item.prompt for item in waiting], task.max_new_tokens, answered)
        measures = instructions.MEASURES
    else:
        def reply(index: int, text: str) -> None:
            item = waiting[index]
            judged = summary.judge(item, text) if task.kind == "summary" else answers.judge(task, item, text)
            cache.add(item.id, judged, reply=text.strip())

        if waiting:
            examinee.generate([item.prompt for item in waiting], task.max_new_tokens, task.stop, reply)
        measures = summary.MEASURES if task.kind == "summary" else answers.measures(task)
    per_item = [cache.entries[item.id]["features"] for item in prepared.items]
    features = {name: np.array([values[name] for values in per_item], dtype=np.float64) for name in per_item[0]}
    exchanges = tuple(Exchange(item.group, item.prompt, entry["reply"], entry["features"]) for item in prepared.items
                      if "reply" in (entry := cache.entries[item.id])) if task.kind == "instructions" else ()
    lost = protocol["truncated_prompts"]
    notes = (f"{lost} prompts lost their beginning: they are longer than the {examinee.context} positions that the model "
             "knows",) if lost else ()
    return TaskResult(task.name, task.kind, examinee.name, protocol, measures, tuple(item.id for item in prepared.items),
                      tuple(item.group for item in prepared.items), features,
                      (*examinee.checkpoint.notes, *examinee.codec.notes, *notes), exchanges)


def _perplexity(examinee: Examinee, prepared: PreparedTask, protocol: dict[str, object],
                reference: Examinee | None) -> TaskResult:
    task, context = prepared.task, min(prepared.task.context, examinee.context)
    parts: list[dict[str, Array]] = []
    ids: list[str] = []
    groups: list[str] = []
    notes = () if context == task.context else (f"windows of {context} tokens instead of {task.context}: the model knows no "
                                                "more positions",)
    if task.kind == "conversations":
        corpora, names, notes = [_conversations(examinee, prepared, reference)], [""], ()
    else:
        corpora = [_windows(examinee, prepared, text, reference) for text in prepared.texts]
        names = [text.group for text in prepared.texts]
    for number, (corpus, group) in enumerate(zip(corpora, names, strict=True)):
        parts += _window_features(examinee, task, corpus, reference)
        ids += [f"{number}-{place}" for place in range(len(corpus.windows))]
        groups += [group] * len(corpus.windows)
    known = set(parts[0]).intersection(*parts)
    features = {name: np.concatenate([part[name] for part in parts]) for name in known}
    measures = tuple(measure for measure in perplexity.MEASURES if known >= set(measure.features))
    return TaskResult(task.name, task.kind, examinee.name, protocol, measures, tuple(ids), tuple(groups), features,
                      examinee.checkpoint.notes + notes)


def _windows(examinee: Examinee, prepared: PreparedTask, text: TaskText, reference: Examinee | None) -> Corpus:
    """A text as the model under evaluation reads it, and its reference too."""
    task, context = prepared.task, min(prepared.task.context, examinee.context)
    kind: perplexity.Kind = "rows" if task.protocol == "rows" else "windows"
    corpus = perplexity.evaluation_corpus(text.content, examinee.codec, context, kind, text.source)
    if reference is not None:
        perplexity.same_segmentation(examinee.checkpoint, reference.checkpoint, text.content, corpus, context, kind)
    return corpus.first(prepared.limit)


def _conversations(examinee: Examinee, prepared: PreparedTask, reference: Examinee | None) -> Corpus:
    """Conversations as the model under evaluation reads them, and its reference too, with marks for their answers."""
    def corpus_of(one: Examinee) -> Corpus:
        return instruction_windows(prepared.conversations, one.codec, one.context, prepared.task.name)

    corpus = corpus_of(examinee)
    if reference is not None:
        perplexity.same_tokens(examinee.checkpoint, reference.checkpoint, corpus, corpus_of(reference))
    return corpus


def _window_features(examinee: Examinee, task: Task, corpus: Corpus, reference: Examinee | None) -> list[dict[str, Array]]:
    """Sums per window of one text, pass by pass, from the cache where they are known."""
    cache = ItemCache(examinee.fingerprint, {
        "name": task.name, "corpus": corpus.fingerprint(), "device": str(examinee.device),
        "reference": reference.fingerprint if reference else None})
    passes = []
    for number, part in enumerate(corpus.parts(CHUNK_BYTES // (4 * examinee.view.spec.hidden))):
        if f"pass {number}" not in cache.entries:
            with tempfile.TemporaryDirectory(dir=examinee.scratch, ignore_cleanup_errors=True) as folder:
                sums, _ = perplexity.window_features(
                    examinee.view, part, (reference.view, reference.final_states(part)) if reference else None,
                    examinee.device, Path(folder), examinee.tick)
            cache.add(f"pass {number}", {name: values.tolist() for name, values in sums.items()})
        passes.append({name: np.array(values) for name, values in cache.entries[f"pass {number}"]["features"].items()})
    return passes


def open_examinee(model: str | Path, scratch: Path, *, device: str = "cpu", by_sweeps: bool | None = None,
                  tick: Tick = silent) -> Examinee:
    """Open a checkpoint for evaluation, by directory, hub id or name; large files go to the folder `scratch`.

    `by_sweeps` decides whether generation streams the weights for every token; by default it does where they do not fit.
    """
    return Examinee(View.of(Checkpoint.streamed(model)), str(model), scratch, device=device, by_sweeps=by_sweeps, tick=tick)
