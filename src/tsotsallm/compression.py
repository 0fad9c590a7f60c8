"""From a model's name and a recipe to a smaller model: what is read, checked and forecast before a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from tsotsallm.calibration import (
    Calibration,
    calibration_text,
    check_windows,
    read_sources,
    self_text_note,
    text_obstacle,
    window_of,
)
from tsotsallm.checkpoint.hub_source import Streamed
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import partial_path
from tsotsallm.downloads import WHOLE
from tsotsallm.errors import CorpusError, TsotsallmError
from tsotsallm.planning import Forecast, make_plan, whole_spec
from tsotsallm.recipe import Recipe
from tsotsallm.records import amended
from tsotsallm.remote.names import hub_name
from tsotsallm.run.run import Result, refuse_existing, run
from tsotsallm.run.work import CompressKeywords, CompressOptions, Inputs, Pin, Progress
from tsotsallm.streaming import corpus as texts
from tsotsallm.streaming.sweep import Tick
from tsotsallm.training.samples import Samples
from tsotsallm.units import human_bytes


def _bytes_under(directory: Path) -> int:
    """Bytes of unfinished work, which a resumed run does not need again."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) if directory.exists() else 0


def plan(model: str | Path, recipe: str | Path | Sequence[object], out: str | Path = "result", *,
         calibration: str | Path | None = None, windows: int = 32, window: int | None = None, device: str = "cpu",
         keep_stages: bool = False, cache_bytes: int | None = None) -> Forecast:
    """Forecast a run without reading a tensor; a warning says where it would lack calibration text, or where the model is to
    write it first.

    Of a model on the hub it says what either way of fetching it takes, with at most `cache_bytes` on disk where it is
    streamed (None: what the recipe needs), and which way is chosen.
    """
    _check_cache(model, cache_bytes)
    checkpoint, parsed = _opened(model, recipe)
    forecast = make_plan(checkpoint, parsed, Path(out), windows=windows, window=window_of(checkpoint, window),
                         device=check_device(device), keep_stages=keep_stages, cache_bytes=cache_bytes)
    asked = Calibration(None if calibration is None else str(calibration), windows, forecast.window)
    found = text_obstacle(checkpoint, asked, parsed)
    if parsed.needs_text and asked.source is not None:
        read_sources(asked.source)
        found = found or self_text_note(checkpoint, asked)
    return forecast if found is None else replace(forecast, warnings=[*forecast.warnings, found])


def _opened(model: str | Path, recipe: str | Path | Sequence[object]) -> tuple[Checkpoint, Recipe]:
    """A checkpoint as a recipe reads it, and the recipe checked and resolved against it."""
    parsed = Recipe.parse(recipe)
    checkpoint = with_vocabulary(Checkpoint.streamed(model), parsed)
    return checkpoint, parsed.resolved(whole_spec(checkpoint))


def _check_cache(model: str | Path, cache_bytes: int | None) -> None:
    """Raise TsotsallmError where a bound is given for what nothing is fetched for."""
    if cache_bytes is not None and hub_name(model) is None:
        raise TsotsallmError(f"--cache-bytes bounds what is fetched of a model on the hub, and {model} is on this computer; "
                             "leave it out")


def with_vocabulary(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The source with the tokens that a recipe keeps."""
    recipe.check(whole_spec(checkpoint), sparse=checkpoint.is_sparse)
    for stage in recipe.source_edits:
        checkpoint = stage.applied(checkpoint, [texts.read_text(name) for name in stage.reads])
    return checkpoint


def compress(model: str | Path, recipe: str | Path | Sequence[object], out: str | Path, *,
             options: CompressOptions | None = None, **keywords: Unpack[CompressKeywords]) -> Result:
    """Apply a recipe to a checkpoint, one layer at a time, and write a smaller one to `out`.

    How is given as `options` or as keywords: calibration, windows, window, seed, device, scratch, keep_stages, force,
    restart, store, cache_bytes, progress, say (see CompressOptions). Raises a TsotsallmError where the model, the recipe,
    the text or the machine does not allow it, before anything is written, and HubError where the hub stops giving what is
    needed; then finished layers are kept.
    """
    options = amended(options or CompressOptions(), keywords, compress)
    out = Path(out).absolute()
    if not out.name:
        raise TsotsallmError(f"{out} cannot be a result; give the name of a new directory with -o")
    refuse_existing(out, options)
    _check_cache(model, options.cache_bytes)
    pin = None if options.restart else Pin.of(model, partial_path(out))
    checkpoint, parsed = _opened(model if pin is None else pin.pinned, recipe)
    settings = Calibration(None if options.calibration is None else str(options.calibration), options.windows,
                           window_of(checkpoint, options.window), options.seed)
    if (obstacle := text_obstacle(checkpoint, settings, parsed)) is not None:
        raise CorpusError(obstacle)
    forecast = make_plan(checkpoint, parsed, out, windows=options.windows, window=settings.window,
                         device=check_device(options.device), keep_stages=options.keep_stages,
                         cache_bytes=options.cache_bytes)
    if not options.force:
        forecast.refuse_if_too_large(out, already=_bytes_under(partial_path(out)))
    for warning in forecast.warnings:
        options.say(warning)

    def tick(step: str, share: float) -> None:
        options.progress(Progress(-1, len(forecast.sweeps), "calibration:", 0, 0, step, share))

    if (download := forecast.download) is not None:
        options.say(f"{download.model}: {human_bytes(download.bytes)} to download, {download.lines()[-1]}")
        pin = Pin(str(hub_name(model)), download.model)
        if download.way == WHOLE:
            checkpoint = with_vocabulary(Checkpoint.open(download.model), parsed)
    corpus, samples = _texts_of(checkpoint, parsed, settings, tick)
    inputs = Inputs(checkpoint, parsed, corpus, samples, result_source(model), pin)
    result = run(inputs, out, forecast, replace(options, window=settings.window))
    if isinstance(checkpoint.source, Streamed):
        for name in checkpoint.source.unverified():
            options.say(f"{name}: not all of it passed in order, so its checksum was not compared; its length and its ETag "
                        "were")
        if options.cache_bytes is None:
            checkpoint.source.forget()
    return result


def result_source(model: str | Path) -> str:
    """The name that results give the model they were made from."""
    name = hub_name(model)
    return name.source if name is not None else Path(model).resolve().name if Path(model).exists() else str(model)


def _texts_of(checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration,
              tick: Tick) -> tuple[texts.Corpus | None, list[list[Samples]]]:
    """What a recipe calibrates and trains on, read and checked before anything starts."""
    check_windows(checkpoint, calibration)
    if not recipe.needs_text and not recipe.trainings:
        return None, []
    to_train = recipe.needs.training_text
    text = calibration_text(checkpoint, calibration, recipe, to_train=to_train, tick=tick) if recipe.needs_text else None
    codec = checkpoint.codec
    for stage in recipe.trainings:
        stage.check_source(View.of(checkpoint))
    whole, source = (None, "") if text is None else (text.whole, text.source)
    samples = [stage.read(codec, checkpoint.spec, whole, source) for stage in recipe.trainings]
    if not recipe.needs.text:
        return None, samples
    assert text is not None
    return text.corpus(codec, calibration), samples


def check_device(device: str) -> str:
    """The device's name, if this machine has it."""
    import torch

    if device == "cpu" or (device in {"cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))} and (
            torch.cuda.is_available())):
        return device
    raise TsotsallmError(f"there is no device {device!r} here; use --device cpu" + (
        ", or install a CUDA build of torch on a machine with an NVIDIA card" if device.startswith("cuda") else ""))
