"""The layer-order study of FRANKEN-LLAMA on any model: 25 orders, rescaled; each one is completed, scored and timed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from tsotsallm.checkpoint.shapes import work_of
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import TsotsallmError, nearest
from tsotsallm.evaluation.cost import bytes_of, parameters_of
from tsotsallm.evaluation.examinee import Examinee
from tsotsallm.evaluation.results import TaskResult
from tsotsallm.evaluation.speed import lengths, median_times, round_of
from tsotsallm.evaluation.task_run import PreparedTask, run_task
from tsotsallm.records import Record
from tsotsallm.stages.layers import expand
from tsotsallm.streaming.sweep import Tick, silent

PROMPT, NEW_TOKENS = "Once upon a time", 40


@dataclass(frozen=True)
class Order:
    """A published order with its published HellaSwag accuracy and seconds."""

    name: str
    order: tuple[int, ...]
    hellaswag: float | None = None
    seconds: float | None = None


def published() -> tuple[int, list[Order]]:
    """(layers of the model whose orders were published, the 25 orders)."""
    content = yaml.safe_load(resources.files("tsotsallm.evaluation").joinpath("franken.yaml").read_text("utf-8"))
    return content["layers"], [Order(one["name"], tuple(expand(one["order"], one["name"])), one.get("hellaswag"),
                                     one.get("seconds")) for one in content["orders"]]


def rescale(order: Sequence[int], source: int, layers: int) -> list[int]:
    """An order of `source` layers for a model of `layers`: the same share of layers, taken from the same depths.

    The new order has n = round(len·layers/source) layers, but at least one, and fewer than `layers` where the original left
    any out. Its k-th layer has the depth that the original order has at place u = (k + ½)·len/n: with f the fraction of u,
    floor((order[⌊u⌋] + f)·layers/source). Where layers = source, it is the order itself.
    """
    count = max(1, math.floor(len(order) * layers / source + 0.5))
    if len(order) < source and count >= layers > 1:
        count = layers - 1
    rescaled = []
    for place in range(count):
        along = (place + 0.5) * len(order) / count
        if len(order) == count:
            along = float(place)
        rescaled.append(min(math.floor((order[math.floor(along)] + along % 1) * layers / source), layers - 1))
    return rescaled


@dataclass(frozen=True)
class OrderResult(Record):
    """What one order does to the model; perplexity and KL (nats per token, from the whole model) on one text."""

    name: str
    order: list[int]
    completion: str
    perplexity: float
    kl: float
    accuracy: float | None
    accuracy_error: float | None
    decode_tokens_per_s: float | None       # None where the model is larger than memory
    macs_per_token: int
    parameters: int
    bytes: int                              # of the stored weights; a layer that runs twice counts twice
    published_hellaswag: float | None
    published_seconds: float | None


def study(view: View, name: str, text: PreparedTask, choices: PreparedTask | None, scratch: Path, *, device: str = "cpu",
          only: Sequence[str] | None = None, tick: Tick = silent) -> Iterator[OrderResult]:
    """Evaluate one model in every published order, or in those of `only`; KL is from the whole model.

    Raises TsotsallmError where `only` names an order that the study does not have.
    """
    source, orders = published()
    known = [order.name for order in orders]
    for wanted in only or ():
        if wanted not in known:
            raise TsotsallmError(f"the study has no order {wanted!r}{nearest(wanted, known)}")
    whole = Examinee(view, name, scratch, device=device)
    chosen = [order for order in orders if only is None or order.name in only]
    for number, original in enumerate(chosen):
        order = rescale(original.order, source, view.spec.layers)
        examinee = Examinee(view.reordered(order), f"{name}, {original.name}", scratch, device=device)
        measured = {score.measure: score.value for score in run_task(examinee, text, whole).scores if not score.group}
        scored: TaskResult | None = run_task(examinee, choices) if choices is not None else None
        accuracy = next((score for score in scored.scores if not score.group), None) if scored else None
        replies: list[str] = []
        examinee.generate([PROMPT], NEW_TOKENS, (), lambda _index, reply, to=replies: to.append(reply))  # type: ignore[misc]
        speed = None
        if not examinee.generates_by_sweeps:
            _, decode_s = median_times(round_of(examinee.model, examinee.view.spec, device))
            speed = lengths(examinee.view.spec)[1] / decode_s
        yield OrderResult(original.name, order, replies[0].strip(), measured["perplexity"], measured["KL from reference"],
                          accuracy.value if accuracy else None, accuracy.standard_error if accuracy else None,
                          speed, work_of(examinee.view.spec).decode(512),
                          parameters_of(examinee.view), bytes_of(examinee.view), original.hellaswag, original.seconds)
        examinee.forget_model()
        tick("layer orders", (number + 1) / len(chosen))
