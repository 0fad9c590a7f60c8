"""The layer-order study of FRANKEN-LLAMA on any model: 25 orders, rescaled, each completed, scored and timed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from tsotsallm.checkpoint.shapes import work_of
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import TsotsallmError, nearest
from tsotsallm.evaluation.cost import bytes_of, parameters_of
from tsotsallm.evaluation.examine import PreparedTask, TaskResult, examine
from tsotsallm.evaluation.scorer import Examinee
from tsotsallm.evaluation.speed import lengths, median_times, round_of
from tsotsallm.stages.layers import expand
from tsotsallm.streaming.sweep import Tick, silent

PROMPT, NEW_TOKENS = "Once upon a time", 40


@dataclass(frozen=True)
class Order:
    """A published order, and what was published of it."""

    name: str
    order: tuple[int, ...]
    hellaswag: float | None = None
    seconds: float | None = None


def published() -> tuple[int, list[Order]]:
    """(layers of the model that the orders are of, the 25 orders)."""
    content = yaml.safe_load(resources.files("tsotsallm.evaluation").joinpath("franken.yaml").read_text("utf-8"))
    return content["layers"], [Order(one["name"], tuple(expand(one["order"], one["name"])), one.get("hellaswag"),
                                     one.get("seconds")) for one in content["orders"]]


def rescale(order: Sequence[int], source: int, layers: int) -> list[int]:
    """An order of `source` layers for a model of `layers`: the same share of layers, taken from the same depths.

    The new order has n = round(len·layers/source) layers, but at least one, and fewer than `layers` where the original left
    any out. Its k-th layer stands at the depth that the original order has (k + ½)·len/n of the way through: with u that
    place in the order and f its fraction, floor((order[⌊u⌋] + f)·layers/source). For layers = source it is the order itself.
    """
    count = max(1, math.floor(len(order) * layers / source + 0.5))
    if len(order) < source and count >= layers > 1:
        count = layers - 1
    found = []
    for place in range(count):
        along = (place + 0.5) * len(order) / count
        if len(order) == count:
            along = float(place)
        found.append(min(math.floor((order[math.floor(along)] + along % 1) * layers / source), layers - 1))
    return found


@dataclass(frozen=True)
class OrderResult:
    """What one order does to the model; perplexity and KL (nats, against the whole model) are of one text."""

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
    bytes: int                              # of the stored weights, a layer that runs twice written twice
    published_hellaswag: float | None
    published_seconds: float | None

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def study(view: View, name: str, text: PreparedTask, choices: PreparedTask | None, scratch: Path, *, device: str = "cpu",
          only: Sequence[str] | None = None, tick: Tick = silent) -> Iterator[OrderResult]:
    """Examine every order of the study on one model, the whole model first."""
    source, orders = published()
    for wanted in only or ():
        if wanted not in {one.name for one in orders}:
            raise TsotsallmError(f"the study has no order {wanted!r}{nearest(wanted, [one.name for one in orders])}")
    whole = Examinee(view, name, scratch, device=device)
    chosen = [one for one in orders if only is None or one.name in only]
    for number, one in enumerate(chosen):
        order = rescale(one.order, source, view.spec.layers)
        examinee = Examinee(view.reordered(order), f"{name}, {one.name}", scratch, device=device)
        measured = {score.measure: score.value for score in examine(examinee, text, whole).scores if not score.group}
        scored: TaskResult | None = examine(examinee, choices) if choices is not None else None
        accuracy = next((score for score in scored.scores if not score.group), None) if scored else None
        told: list[str] = []
        examinee.generate([PROMPT], NEW_TOKENS, (), lambda _index, reply, told=told: told.append(reply))  # type: ignore[misc]
        speed = None
        if not examinee.generates_by_sweeps:
            _, decode_s = median_times(round_of(examinee.model, examinee.view.spec, device))
            speed = lengths(examinee.view.spec)[1] / decode_s
        yield OrderResult(one.name, order, told[0].strip(), measured["perplexity"], measured["KL from reference"],
                          accuracy.value if accuracy else None, accuracy.standard_error if accuracy else None,
                          speed, work_of(examinee.view.spec).decode(512),
                          parameters_of(examinee.view), bytes_of(examinee.view), one.hellaswag, one.seconds)
        examinee.forget_model()
        tick("layer orders", (number + 1) / len(chosen))
