"""Execute a recipe: journaled after every layer, resumed after a kill, named only when complete."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import Writer, partial_path, publish, write_json
from tsotsallm.errors import CheckpointError, CorpusError, NumericsError, RecipeError, ResumeError
from tsotsallm.journal import PUBLISHED, Kind, begun_threads, held_work, remove_work, scratch_path
from tsotsallm.machine import fingerprint, peak_rss_bytes
from tsotsallm.planning import Forecast
from tsotsallm.recipe import Recipe
from tsotsallm.run.choosing import choose
from tsotsallm.run.editing import edit_layers
from tsotsallm.run.retraining import imitate, retrain
from tsotsallm.run.rewriting import rewrite
from tsotsallm.run.work import Progress, Work, summary
from tsotsallm.store import Store, link_tree
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.training.samples import Samples
from tsotsallm.version import __version__

UNFINISHED = Kind("compress", frozenset({"source", "recipe", "corpus"}),
                  ("journal.jsonl", "result", "scratch", "[0-9]*-*", "weights-*", "training-*"))


@dataclass(frozen=True)
class Result:
    """Where a finished run wrote what, and what it took."""

    path: Path
    parameters: int
    result_parameters: int
    bytes: int
    result_bytes: int
    elapsed_s: float
    peak_rss_bytes: int
    floor_s: float
    stages: list[str]
    training: list[dict[str, Any]]
    notes: list[str]

    def plain(self) -> dict[str, Any]:
        """The result as plain data for JSON."""
        return asdict(self) | {"path": str(self.path)}


def run(checkpoint: Checkpoint, recipe: Recipe, out: Path, corpus: Corpus | None, forecast: Forecast, *,
        samples: Sequence[Sequence[Samples]] = (), device: str = "cpu", keep_stages: bool = False,
        scratch: Path | None = None, model_name: str = "", store: Store | None = None,
        asked: Mapping[str, Any] | None = None, restart: bool = False,
        progress: Callable[[Progress], None] = lambda _progress: None) -> Result:
    """Run a checked, resolved recipe and write its result to `out`, continuing unfinished work of the same inputs.

    With `restart`, unfinished work is deleted first, whatever it belongs to.
    `samples` are those of every stage that trains, in order; `asked`, how calibration text was asked for, is noted. What a
    recipe has in common with others that used the same `store` is taken from there; the result is the same, byte for
    byte.
    """
    partial = partial_path(out)
    stages_directory = out.with_name(out.name + "-stages")
    if out.exists() and (restart or not (partial / PUBLISHED).exists()):
        raise ResumeError(f"{out} exists already; choose another name with -o, or delete it first")
    if keep_stages and stages_directory.exists() and not partial.exists():
        raise ResumeError(f"{stages_directory} exists already; delete or rename it first: the stages go there")
    identity = {"source": checkpoint.fingerprint(), "recipe": recipe.plain(), "keep_stages": keep_stages,
                "corpus": corpus.fingerprint() if corpus else None,
                "samples": [[some.fingerprint() for some in stage] for stage in samples], "device": device,
                "machine": fingerprint(None if restart else begun_threads(partial)), "tsotsallm": __version__}
    words = {"source": model_name or checkpoint.directory.name, "recipe": recipe.line(), "corpus": _in_words(corpus, asked),
             "samples": ", ".join(some.training.source for stage in samples for some in stage) or "none"}
    began = time.monotonic()
    with (_kept_if_of_use(partial, scratch_path(out, scratch)),
          held_work(partial, identity, UNFINISHED, words, restart=restart)):
        if restart:
            shutil.rmtree(scratch_path(out, scratch), ignore_errors=True)
        work = Work(checkpoint, recipe, partial, corpus, samples, forecast, torch.device(device), scratch_path(out, scratch),
                    progress, model_name, identity, keep_stages, store, asked or {})
        if not out.exists():
            _execute(work)
            write_json(work.result / "tsotsallm.run.json", {
                "elapsed_s": round(time.monotonic() - began, 1), "peak_rss_bytes": peak_rss_bytes(),
                "floor_s": round(forecast.floor_s, 1), "resumed": work.resumed})
            if work.scratch.exists():
                shutil.rmtree(work.scratch)
            (partial / PUBLISHED).touch()
            publish(work.result, out)
        stages = _publish_stages(work, stages_directory)
    remove_work(partial)
    written = Checkpoint(out)
    return Result(out, forecast.parameters, forecast.result_parameters, checkpoint.weight_bytes, written.weight_bytes,
                  round(time.monotonic() - began, 1), peak_rss_bytes(), forecast.floor_s, stages,
                  _trained(out, len((written.provenance or {})["training"])), forecast.warnings)


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


def _in_words(corpus: Corpus | None, asked: Mapping[str, Any] | None) -> str:
    """The calibration text and what is taken of it."""
    if corpus is None:
        return "none"
    seed = f", seed {asked['seed']}" if asked else ""
    return f"{len(corpus.windows)} windows of {max(map(len, corpus.windows))} tokens from {corpus.source}{seed}"


def _execute(work: Work) -> None:
    """Run all passes that are not finished; the result is then a whole checkpoint at `result`.

    `origin` is the model that corrections aim at: the source, or what the last retraining made of it.
    """
    order = list(range(work.checkpoint.spec.layers))
    kept = list(order)                  # the layers of the source that are left
    retrained: int | None = None
    samples = iter(work.samples)
    if not work.journal.entries:
        _take_from_store(work)
    for number, one in enumerate(work.sweeps):
        finished = bool(work.journal.find("finished", number))
        if not one.does_over:
            before = number - 1
        view = View.of(work.checkpoint if before < 0 or finished else Checkpoint(work.directory(before)))
        for place, choice in enumerate(one.choices):
            chosen = choose(work, number, place, choice, view)
            order, kept = ([which[index] for index in chosen] for which in (order, kept))
            view = view if finished else view.reordered(chosen)
        if one.training is not None:
            train = imitate if one.training.layerwise else retrain
            train(work, number, one.training, next(samples), view, kept)
            retrained, order = number, list(range(len(order)))
        elif one.rewriting is not None:
            chosen = choose(work, number, len(one.choices), one.rewriting, view)
            kept = [kept[index] for index in chosen]
            if not finished:
                rewrite(work, number, one.rewriting, view, chosen)
            retrained, order = number, list(range(len(kept)))
        elif not finished:
            source = work.checkpoint if retrained is None else Checkpoint(work.directory(retrained))
            edit_layers(work, number, one, view, View.of(source).reordered(order))
        Writer(work.directory(number)).remove_parts()
        if not finished:
            _keep_in_store(work, number, retrained)
        work.sparse = work.sparse or any(edit.leaves_zeros for edit in one.edits)
        for old in range(number):
            if old != retrained and not work.keep_stages and work.directory(old).exists():
                shutil.rmtree(work.directory(old))
    Checkpoint(work.result)


def _take_from_store(work: Work) -> None:
    """Begin after the last pass that another recipe has in common with this one."""
    for number in reversed(range(len(work.sweeps) - 1) if work.store is not None else ()):
        assert work.store is not None
        piece = work.store.find("pass", work.key(sweeps=number + 1))
        if piece is not None:
            facts = work.store.facts(piece)
            for place in facts["passes"]:
                link_tree(piece / str(place), work.directory(place))
            for entry in facts["entries"]:
                work.journal.add(**entry)
            return


def _keep_in_store(work: Work, number: int, retrained: int | None) -> None:
    """Keep what a pass wrote, and what later passes need of those before it."""
    if work.store is None:
        return
    places = {number} | ({retrained} if retrained is not None else set())
    entries = [entry for entry in work.journal.entries if entry["sweep"] <= number and entry["kind"] != "layer"]
    entries += [entry for entry in work.journal.entries if entry["sweep"] <= number and entry["kind"] == "layer"
                and "curve" in entry]
    work.store.keep("pass", work.key(sweeps=number + 1), {str(place): work.directory(place) for place in places},
                    {"passes": sorted(places), "entries": entries})


def _publish_stages(work: Work, kept: Path) -> list[str]:
    """Move kept intermediate models beside the result."""
    if not work.keep_stages:
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


def _trained(out: Path, count: int) -> list[dict[str, Any]]:
    """What the trainings of a result did and how long they took, from the files with their curves."""
    files = (next(out.glob(f"training-{number}-*.json")) for number in range(1, count + 1))
    return [summary(json.loads(path.read_text("utf-8")), timed=True) for path in files]
