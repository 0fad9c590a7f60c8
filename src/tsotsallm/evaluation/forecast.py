"""How long an evaluation takes on this machine, before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tsotsallm.checkpoint.shapes import work_of
from tsotsallm.evaluation.examinee import Examinee
from tsotsallm.evaluation.task_run import PreparedTask
from tsotsallm.machine import gemm_flops_per_second
from tsotsallm.records import Record
from tsotsallm.streaming.generate import turns
from tsotsallm.streaming.likelihood import CHUNK_BYTES, Tree, chunks
from tsotsallm.training.samples import instruction_windows


@dataclass(frozen=True)
class TaskForecast(Record):
    """One task on one model: how it runs, and the least time that it takes (reading weights and multiplying)."""

    task: str
    model: str
    items: int
    how: str                # streamed, resident, sweeps, or llama.cpp, which computes a window at a time
    tokens: int             # that run through the model
    passes: int             # over the weights
    pass_s: float           # to read the weights once, measured on one layer
    floor_s: float


def forecast(examinee: Examinee, prepared: Sequence[PreparedTask]) -> list[TaskForecast]:
    """Forecast every task on one model; tokenises the texts and reads one layer to measure how fast weights arrive."""
    spec, work = examinee.view.spec, work_of(examinee.view.spec)
    rate = gemm_flops_per_second(device=examinee.device.type)
    began = time.perf_counter()
    examinee.view.layer(0)
    pass_s = (time.perf_counter() - began) * spec.layers
    forecasts = []
    for ready in prepared:
        task = ready.task
        if task.kind == "perplexity":
            most = ready.limit * task.context if ready.limit else None
            lengths = [len(examinee.codec.encode(text.content)[:most]) for text in ready.texts]
            room = CHUNK_BYTES // (4 * spec.hidden)
            tokens, passes = sum(lengths), sum(-(-length // room) for length in lengths)
            how, items = "streamed", len(lengths)
        elif task.kind == "conversations":
            windows = instruction_windows(ready.answered_by(examinee).conversations, examinee.codec, examinee.context,
                                          task.name)
            tokens, passes, how, items = windows.tokens, 1, "streamed", len(windows.windows)
        elif task.kind in ("choices", "bias"):
            trees = [_tree(examinee, item.prompt, [task.delimiter + choice for choice in item.choices])
                     for item in ready.items]
            tokens, passes = sum(tree.tokens for tree in trees), len(chunks(trees, spec.hidden))
            how, items = "streamed", len(trees)
        else:
            prompts = [examinee.request(item.prompt) if task.kind == "instructions" else examinee.encode(item.prompt)
                       for item in ready.items]
            tokens, items = sum(map(len, prompts)) + len(prompts) * task.max_new_tokens, len(prompts)
            by_sweeps = examinee.generates_by_sweeps
            how = "sweeps" if by_sweeps else "resident"
            passes = len(turns(examinee.view, prompts, task.max_new_tokens)) * task.max_new_tokens if by_sweeps else 1
        forecasts.append(TaskForecast(task.name, examinee.name, items, how, tokens, passes, pass_s,
                                      passes * pass_s + 2 * work.linear * tokens / rate))
    return forecasts


def _tree(examinee: Examinee, prompt: str, continuations: Sequence[str]) -> Tree:
    pairs = [examinee.pair(prompt, continuation) for continuation in continuations]
    return Tree(pairs[0][0], tuple(pair[1] for pair in pairs))
