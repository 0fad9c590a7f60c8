"""Execute a recipe: journaled after every layer, resumed after a kill, named only when complete."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tsotsallm.checkpoint.provenance import Identity, Source, TrainingSummary
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.writer import partial_path, publish, write_json
from tsotsallm.errors import CheckpointError, CorpusError, NumericsError, RecipeError, ResumeError
from tsotsallm.files import require_new
from tsotsallm.journal import (
    PUBLISHED,
    Kind,
    LayerWritten,
    begun_threads,
    held_work,
    read_entry,
    remove_work,
    scratch_path,
)
from tsotsallm.machine import fingerprint, peak_rss_bytes
from tsotsallm.pace import Measured, remember
from tsotsallm.planning import Forecast, SweepForecast
from tsotsallm.recipe import Sweep
from tsotsallm.records import Record
from tsotsallm.run.editing import Copying, Editing
from tsotsallm.run.passes import Lineage, Pass
from tsotsallm.run.retraining import Imitating, Retrained
from tsotsallm.run.rewriting import Rewriting
from tsotsallm.run.work import PIN, CompressOptions, Inputs, Work
from tsotsallm.store import link_tree
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.timing import Stopwatch
from tsotsallm.training.loop import Training
from tsotsallm.version import __version__

UNFINISHED = Kind("compress", frozenset({"source", "recipe", "corpus"}),
                  ("journal.jsonl", "result", "scratch", "[0-9]*-*", "weights-*", "training-*", PIN))


@dataclass(frozen=True)
class Result(Record):
    """Where a finished run wrote what, and what it took; `timings` are the seconds of each part of the work."""

    path: Path
    parameters: int
    result_parameters: int
    bytes: int
    result_bytes: int
    elapsed_s: float
    peak_rss_bytes: int
    floor_s: float
    expected_s: float
    stages: list[str]
    training: list[TrainingSummary]
    notes: list[str]
    timings: dict[str, float]


@dataclass(frozen=True)
class SharedPass(Record):
    """What a store has of a pass: the passes whose checkpoints are kept, and the journal's entries up to it."""

    passes: tuple[int, ...]
    entries: tuple[dict[str, object], ...]


def run(inputs: Inputs, out: Path, forecast: Forecast, options: CompressOptions) -> Result:
    """Run a recipe and write its result to `out`, continuing unfinished work of the same inputs.

    With `options.restart`, unfinished work is deleted first, whatever it belongs to. Raises ResumeError where `out` exists,
    or unfinished work that was started with other inputs.
    """
    partial, scratch = partial_path(out), scratch_path(out, options.scratch)
    refuse_existing(out, options)
    identity = _identity(inputs, options, None if options.restart else begun_threads(partial))
    words = {"source": inputs.name or inputs.checkpoint.directory.name, "recipe": inputs.recipe.line(),
             "corpus": _in_words(inputs.corpus, options.seed),
             "samples": ", ".join(some.training.source for stage in inputs.samples for some in stage) or "none"}
    began, watch = time.monotonic(), Stopwatch()
    with (_kept_if_of_use(partial, scratch),
          held_work(partial, identity.plain(), UNFINISHED, words, restart=options.restart)):
        if options.restart:
            shutil.rmtree(scratch, ignore_errors=True)
        if inputs.pin is not None:
            write_json(partial / PIN, inputs.pin.plain())
        work = Work(inputs, out, forecast, options, identity)
        if not out.exists():
            _execute(work)
            write_json(work.result / "tsotsallm.run.json", {
                "elapsed_s": round(time.monotonic() - began, 1), "peak_rss_bytes": peak_rss_bytes(),
                "floor_s": round(forecast.floor_s, 1), "resumed": work.resumed})
            shutil.rmtree(scratch, ignore_errors=True)
            (partial / PUBLISHED).touch()
            publish(work.result, out)
        stages = _publish_stages(work, _stages_path(out))
    remove_work(partial)
    written = Checkpoint(out)
    assert written.provenance is not None
    return Result(out, forecast.parameters, forecast.result_parameters, inputs.checkpoint.weight_bytes, written.weight_bytes,
                  round(time.monotonic() - began, 1), peak_rss_bytes(), forecast.floor_s, forecast.expected_s, stages,
                  _trained(out, len(written.provenance.training)), list(written.provenance.notes), watch.seconds())


def refuse_existing(out: Path, options: CompressOptions) -> None:
    """Raise ResumeError where a result, or the models of its stages, would replace what is there."""
    partial, stages = partial_path(out), _stages_path(out)
    if options.restart or not (partial / PUBLISHED).exists():
        require_new(out, ResumeError, "choose another name with -o, or delete it first")
    if options.keep_stages and not partial.exists():
        require_new(stages, ResumeError, "delete or rename it first: the stages go there")


def _stages_path(out: Path) -> Path:
    """Where the models after every stage are kept."""
    return out.with_name(out.name + "-stages")


def _identity(inputs: Inputs, options: CompressOptions, threads: int | None) -> Identity:
    """What decides the bytes of the result; `threads` where unfinished work was started with so many."""
    return Identity(Source.parsed(inputs.checkpoint.fingerprint()), tuple(inputs.recipe.plain()), options.keep_stages,
                    inputs.corpus.fingerprint() if inputs.corpus else None,
                    tuple(tuple(some.fingerprint() for some in stage) for stage in inputs.samples), options.device,
                    fingerprint(threads), __version__)


@contextmanager
def _kept_if_of_use(partial: Path, scratch: Path) -> Iterator[None]:
    """Delete unfinished work when its inputs are at fault: they would be again, and others would be refused because of it.

    What stopped a run from outside (a kill, a full disk, too little memory) leaves finished layers to go on from.
    """
    try:
        yield
    except (CheckpointError, CorpusError, NumericsError, RecipeError):
        shutil.rmtree(scratch, ignore_errors=True)
        remove_work(partial)
        raise


def _in_words(corpus: Corpus | None, seed: int) -> str:
    """The calibration text and what is taken of it."""
    if corpus is None:
        return "none"
    return f"{len(corpus.windows)} windows of {max(map(len, corpus.windows))} tokens from {corpus.source}, seed {seed}"


def _pass_of(sweep: Sweep) -> type[Pass]:
    """The kind of pass that a sweep takes."""
    if sweep.training is not None:
        return Imitating if sweep.training.layerwise else Retrained
    if sweep.rewriting is not None:
        return Rewriting
    return Editing if sweep.edits else Copying


def _execute(work: Work) -> None:
    """Run all passes that are not finished; the result is then a whole checkpoint at `result`."""
    if not work.journal.entries:
        _take_from_store(work)
    lineage = Lineage.of(work.checkpoint)
    for number, sweep in enumerate(work.sweeps):
        one, watch = _pass_of(sweep)(work, number, lineage), Stopwatch()
        lineage = one.run()
        if not one.finished:
            _keep_in_store(work, number, lineage)
            if not work.resumed and not (work.store and work.store.found):      # the whole pass was done now
                _remember_pace(work.forecast.sweeps[number], watch)
        for old in range(number):
            if old != lineage.retrained and not work.options.keep_stages and work.directory(old).exists():
                shutil.rmtree(work.directory(old))
    Checkpoint(work.result)


def _remember_pace(forecast: SweepForecast, watch: Stopwatch) -> None:
    """Let later forecasts know what a pass took."""
    if measured := Measured.of(forecast.kind, forecast.floor_s, forecast.weights, watch.seconds()):
        remember(measured)


def _take_from_store(work: Work) -> None:
    """Begin after the last pass that another recipe has in common with this one."""
    store = work.store
    for number in reversed(range(len(work.sweeps) - 1) if store is not None else ()):
        assert store is not None
        piece = store.find("pass", work.key(sweeps=number + 1))
        if piece is not None:
            kept = SharedPass.read(store.facts(piece), str(piece), ResumeError, "delete it")
            for place in kept.passes:
                link_tree(piece / str(place), work.directory(place))
            for entry in kept.entries:
                work.journal.add(read_entry(entry))
            return


def _keep_in_store(work: Work, number: int, lineage: Lineage) -> None:
    """Keep what a pass wrote, and what later passes need of those before it."""
    if work.store is None:
        return
    places = sorted({number} | ({lineage.retrained} if lineage.retrained is not None else set()))
    entries = [entry for entry in work.journal.entries if entry.sweep <= number
               and not (isinstance(entry, LayerWritten) and entry.curve is None)]
    kept = SharedPass(tuple(places), tuple(entry.plain() for entry in entries))
    work.store.keep("pass", work.key(sweeps=number + 1), {
        str(place): work.directory(place) for place in places}, kept.plain())


def _publish_stages(work: Work, kept: Path) -> list[str]:
    """Move kept intermediate models beside the result."""
    if not work.options.keep_stages:
        return []
    kept.mkdir(exist_ok=True)
    for number in range(len(work.sweeps) - 1):
        directory = work.directory(number)
        if directory.exists():
            target = kept / directory.name
            if target.exists():
                shutil.rmtree(target)
            publish(directory, target)
    return [str(kept / work.directory(number).name) for number in range(len(work.sweeps) - 1)]


def _trained(out: Path, count: int) -> list[TrainingSummary]:
    """What the trainings of a result did and how long they took, from the files with their curves."""
    files = (next(out.glob(f"training-{number}-*.json")) for number in range(1, count + 1))
    return [Training.parsed(json.loads(path.read_text("utf-8"))).summary(timed=True) for path in files]
