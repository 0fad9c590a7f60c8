"""One trial, wherever it runs: apply a recipe, evaluate it cheaply, then fully if that may pay, and return the result."""

from __future__ import annotations

import hashlib
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.compression import compress
from tsotsallm.errors import ResourceError, TsotsallmError
from tsotsallm.evaluation.cost import count_nonzero, measure_gguf_speed
from tsotsallm.evaluation.examination import examine
from tsotsallm.evaluation.perplexity import evaluate_perplexity
from tsotsallm.evaluation.results import TaskResult, compare
from tsotsallm.export.gguf import export_gguf
from tsotsallm.files import Json, JsonObject
from tsotsallm.inspection import importance_in, inspect_checkpoint, layer_map, whole_in
from tsotsallm.lab.texts import world_text
from tsotsallm.machine import fingerprint, free_disk_bytes
from tsotsallm.store import Store, key_of, link_tree
from tsotsallm.streaming.corpus import read_text
from tsotsallm.version import __version__

ROOM_BYTES = 64 << 20
"""A disk with less free space than this counts as full."""
SURE = 2.0
"""Standard errors by which a result must be worse than the front before its full evaluation is skipped."""


@dataclass(frozen=True)
class Setup:
    """What all trials of a study have in common, as plain data that can be sent to other computers.

    text     of the evaluation; None: the embedded world's test text
    cheap    windows of the cheap evaluation; None: every trial is evaluated fully
    full     windows of the full evaluation
    tasks    evaluated in the full evaluation
    speed    whether a GGUF file is written and timed in llama.cpp
    country  ISO code; where given, energy is measured or estimated
    device   to compute on: "cpu", or "cuda" where there is a GPU; not part of what is studied
    """

    model: str
    calibration: str | None = None
    windows: int = 16
    window: int = 512
    seed: int = 0
    text: str | None = None
    context: int = 512
    cheap: int | None = 8
    full: int = 60
    tasks: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None
    speed: bool = False
    country: str | None = None
    store_bytes: int = 4 << 30
    device: str = "cpu"

    def plain(self) -> dict[str, object]:
        """The fields as plain data for JSON."""
        return asdict(self) | {"tasks": list(self.tasks)}


@dataclass(frozen=True)
class TrialJob:
    """A recipe to try.

    known   (loss, bytes) of the full evaluations so far
    levels  evaluations in order: (name, windows)
    keep    whether the model stays in the store for a later job with the same key
    """

    number: int
    key: str
    recipe: list[JsonObject]
    known: tuple[tuple[float, float], ...] = ()
    levels: tuple[tuple[str, int], ...] = ()
    keep: bool = False


@dataclass
class Outcome:
    """The result of a job: measures by level, facts about how they were obtained, or an error."""

    measures: JsonObject = field(default_factory=dict)
    facts: JsonObject = field(default_factory=dict)
    error: str = ""


def may_reach_the_front(loss: float, error: float, size: float, known: Sequence[tuple[float, float]]) -> bool:
    """Whether no known result of at most this size is better by more than SURE standard errors."""
    return not any(other_size <= size and other < loss - SURE * error for other, other_size in known)


def execute(setup: Setup, job: TrialJob, work: Path) -> Outcome:
    """Run a job in a folder of this machine; most exceptions become the trial's error, so that the study continues.

    Raises ResourceError where the disk is full.
    """
    outcome = Outcome(facts={"machine": platform.node(), "versions": fingerprint() | {"tsotsallm": __version__},
                             "setup": setup.plain()})
    began, cpu = time.time(), time.process_time()
    store = Store(work / "store", setup.store_bytes)
    key = key_of([job.key, setup.model, setup.calibration, setup.windows, setup.window, setup.seed])
    model = work / "models" / key
    try:
        with _energy(setup.country, outcome.facts):
            if (piece := store.find("model", key)) is not None and not model.exists():
                link_tree(piece / "model", model)
            _execute(setup, job, work, model, store, outcome)
            if job.keep:
                store.keep("model", key, {"model": model}, {})
    except TsotsallmError as error:
        if isinstance(error, ResourceError) and free_disk_bytes(work) < ROOM_BYTES:
            raise
        outcome.error = f"{type(error).__name__}: {error}"
    except (MemoryError, RuntimeError, ValueError, ArithmeticError, LookupError) as error:
        outcome.error = f"{type(error).__name__}: {error}"      # a fault in our code must not end the study
    finally:
        shutil.rmtree(model, ignore_errors=True)
    outcome.facts |= {"seconds": round(time.time() - began, 2), "cpu_seconds": round(time.process_time() - cpu, 2),
                      "began": round(began, 1), "reused": store.found,
                      "notes": store.problems}
    return outcome


def _execute(setup: Setup, job: TrialJob, work: Path, model: Path, store: Store, outcome: Outcome) -> None:
    if not (model / "config.json").exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        window = min(setup.window, Checkpoint.open(setup.model).spec.context)
        compress(setup.model, job.recipe, model, calibration=setup.calibration, windows=setup.windows, window=window,
                 seed=setup.seed, device=setup.device, store=store)
    written = Checkpoint.open(model)
    anatomy = inspect_checkpoint(written)
    outcome.measures["model"] = {"bytes": anatomy.bytes, "parameters": anatomy.parameters, "layers": anatomy.layers,
                                 "nonzero_parameters": count_nonzero(written)}
    outcome.facts["layers"] = layer_map(written).plain()
    outcome.facts["importance"] = importance_in(written.provenance)
    outcome.facts["importance_of_whole"] = whole_in(written.provenance)
    outcome.facts["hashes"] = {path.name: _sha256(path) for path in sorted(model.glob("*.safetensors"))}
    if setup.speed:
        outcome.measures["model"] |= _speed(written, work / f"{job.key}.gguf")
    measured: JsonObject = {}
    for level, windows in job.levels:
        if measured and not may_reach_the_front(measured["kl"], measured["kl_error"], anatomy.bytes, job.known):
            return
        measured = _loss(setup, written, windows, work / "reference")
        outcome.facts["protocol"] = measured.pop("protocol")
        outcome.measures[level] = measured
        if level == "full" and setup.tasks:
            measured |= _answers(setup, model)


def _loss(setup: Setup, model: Checkpoint, windows: int, kept: Path) -> JsonObject:
    kept.mkdir(parents=True, exist_ok=True)
    text = world_text(test=True, characters=60_000) if setup.text is None else read_text(setup.text)
    source = "the embedded world, test" if setup.text is None else Path(setup.text).name
    score = evaluate_perplexity(model, text, source=source, context=setup.context, limit=windows, kept=kept,
                                reference=Checkpoint.open(setup.model), name=str(model.directory.name),
                                reference_name=setup.model, device=setup.device)
    return {"kl": score.kl, "kl_error": score.kl_standard_error or 0.0, "perplexity": score.perplexity, "loss": score.loss,
            "loss_error": score.loss_standard_error or 0.0, "reference_perplexity": score.reference_perplexity,
            "same_top_token": score.same_top_token, "windows": score.windows, "protocol": asdict(score.protocol),
            **({} if score.tail is None else asdict(score.tail))}


def _answers(setup: Setup, model: Path) -> dict[str, float | None]:
    """Each task's first score, and its difference from the original's on the same items with the ends of its 95% interval.

    The original's answers are kept, so that only the first trial takes them. There is no difference where the two do not
    compare, as with texts that another tokenizer cuts into other windows.
    """
    def taken(model: str | Path) -> list[TaskResult]:
        examined = examine([model], list(setup.tasks), data=setup.data, limit=setup.limit, seed=setup.seed,
                           device=setup.device)
        return [row[0] for row in examined.results]

    scores: dict[str, float | None] = {}
    for task, original, result in zip(setup.tasks, taken(setup.model), taken(model), strict=True):
        first = result.scores[0]
        scores |= {task: first.value, f"{task}_error": first.standard_error}
        with suppress(TsotsallmError):
            between = next((one.differences[1] for one in compare([original, result])
                            if one.measure == first.measure and not one.group), None)
            if between is not None:
                scores |= {f"{task}_difference": between.value, f"{task}_low": between.low, f"{task}_high": between.high}
    return scores


def _speed(written: Checkpoint, file: Path) -> dict[str, float]:
    try:
        export_gguf(written, file, dense="f16")
        speed = measure_gguf_speed(file)
        return {"gguf_bytes": file.stat().st_size, "decode_tokens_per_s": speed.decode_tokens_per_s,
                "prefill_tokens_per_s": speed.prefill_tokens_per_s}
    finally:
        file.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def _energy(country: str | None, facts: dict[str, object]) -> Iterator[None]:
    """Write the watt-hours of the block to `facts` where a country is given."""
    if country is None:
        yield
        return
    from tsotsallm.evaluation.energy import tracked

    with tracked(country, facts):
        yield


def values_of(measures: Mapping[str, Json], names: Sequence[str]) -> list[float] | None:
    """A trial's objectives, all to be minimised, or None where one was not measured; speed counts as seconds per token."""
    level = next((level for level in ("full", "cheap") if level in measures), None)
    if level is None:
        return None
    every = {**measures.get("model", {}), **measures[level]}
    values = []
    for name in names:
        if name == "decode":
            rate = every.get("decode_tokens_per_s")
            value = None if not rate else 1 / rate
        else:
            value = every.get(name)
        if value is None:
            return None
        values.append(float(value))
    return values
