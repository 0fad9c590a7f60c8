"""From a model's name and a recipe to a smaller model: what is read, checked and forecast before a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsotsallm.checkpoint.reader import Checkpoint, embedded_directory
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import partial_path
from tsotsallm.errors import CorpusError, TsotsallmError
from tsotsallm.lab.texts import world_text
from tsotsallm.planning import Forecast, make_plan, whole_spec
from tsotsallm.recipe import Recipe
from tsotsallm.run.run import Result, run
from tsotsallm.run.work import Progress
from tsotsallm.store import Store
from tsotsallm.streaming import corpus as texts
from tsotsallm.training.samples import Samples


@dataclass(frozen=True)
class Calibration:
    """Where calibration text comes from, and how much of it is used."""

    source: str | None = None
    windows: int = 32
    window: int = 1024
    seed: int = 0


def check_windows(checkpoint: Checkpoint, calibration: Calibration) -> None:
    """Raise where a model cannot be calibrated with so many windows of such a length."""
    if calibration.windows < 1 or calibration.window < 2:
        raise CorpusError(f"{calibration.windows} windows of {calibration.window} tokens cannot calibrate; "
                          "take at least one window of 2 tokens")
    if calibration.window > checkpoint.spec.context:
        raise CorpusError(f"a window of {calibration.window} tokens is longer than the {checkpoint.spec.context} positions "
                          f"that the model knows; choose --window {checkpoint.spec.context} or less")


def calibration_text(checkpoint: Checkpoint, calibration: Calibration, *, to_train: bool = False) -> tuple[str, str]:
    """(text, its source) that a recipe works on; without a source the embedded model's world, or the hub's C4."""
    source = calibration.source
    if source is None and checkpoint.directory.resolve() == _embedded_or_none():
        return world_text(test=False, characters=5_000_000 if to_train else 400_000), "the embedded world"
    if source is None:
        try:
            return texts.hub_text("allenai/c4"), "allenai/c4"
        except TsotsallmError as error:
            raise CorpusError(f"this recipe needs calibration text: give some with --calibration FILE or DIR, about "
                              f"{calibration.windows * calibration.window * 5 // 1000} kB of ordinary prose in the "
                              f"languages that matter to you (the default, allenai/c4, is out of reach: {error})") from None
    if not Path(source).exists() and source.count("/") == 1 and not Path(source).suffix and source[0] not in ".~":
        return texts.hub_text(source), source
    return texts.read_text(source), source


def calibration_corpus(checkpoint: Checkpoint, calibration: Calibration) -> texts.Corpus:
    """The token windows to calibrate on."""
    check_windows(checkpoint, calibration)
    text, source = calibration_text(checkpoint, calibration)
    return texts.calibration(text, checkpoint.tokenizer(), windows=calibration.windows, length=calibration.window,
                             seed=calibration.seed, source=source)


def _bytes_under(directory: Path) -> int:
    """Bytes of unfinished work, which a resumed run does not need again."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) if directory.exists() else 0


def _embedded_or_none() -> Path | None:
    try:
        return embedded_directory().resolve()
    except TsotsallmError:
        return None


def plan(model: str | Path, recipe: str | Path | Sequence[Any], out: str | Path = "result", *, windows: int = 32,
         window: int = 1024, device: str = "cpu", keep_stages: bool = False) -> Forecast:
    """Forecast a run without reading a tensor."""
    parsed = Recipe.parse(recipe)
    return make_plan(with_vocabulary(Checkpoint.open(model), parsed), parsed, Path(out), windows=windows, window=window,
                     device=check_device(device), keep_stages=keep_stages)


def with_vocabulary(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The source with the tokens that a recipe keeps."""
    recipe.check(whole_spec(checkpoint), sparse=checkpoint.is_sparse)
    stage = recipe.vocabulary
    if stage is None:
        return checkpoint
    return stage.applied(checkpoint, [texts.read_text(name) for name in stage.keep])


def compress(model: str | Path, recipe: str | Path | Sequence[Any], out: str | Path, *,
             calibration: str | Path | None = None, windows: int = 32, window: int = 1024, seed: int = 0,
             device: str = "cpu", scratch: str | Path | None = None, keep_stages: bool = False, force: bool = False,
             store: Store | None = None, progress: Callable[[Progress], None] = lambda _progress: None) -> Result:
    """Apply a recipe to a checkpoint, one layer at a time, and write a smaller one to `out`.

    With a `store`, what the recipe has in common with others that used it is not done again.
    """
    parsed = Recipe.parse(recipe)
    checkpoint = with_vocabulary(Checkpoint.open(model), parsed)
    out = Path(out).absolute()
    if not out.name:
        raise TsotsallmError(f"{out} cannot be a result; give the name of a new directory with -o")
    forecast = make_plan(checkpoint, parsed, out, windows=windows, window=window, device=check_device(device),
                         keep_stages=keep_stages)
    if not force:
        forecast.refuse_if_too_large(out, already=_bytes_under(partial_path(out)))
    settings = Calibration(None if calibration is None else str(calibration), windows, forecast.window, seed)
    corpus, samples = _texts_of(checkpoint, parsed, settings)
    name = Path(model).resolve().name if Path(model).is_dir() else str(model)
    return run(checkpoint, parsed, out, corpus, forecast, samples=samples, device=device, keep_stages=keep_stages,
               scratch=None if scratch is None else Path(scratch), model_name=name, store=store,
               asked={"given": settings.source, "window": settings.window, "seed": settings.seed}, progress=progress)


def _texts_of(checkpoint: Checkpoint, recipe: Recipe,
              calibration: Calibration) -> tuple[texts.Corpus | None, list[list[Samples]]]:
    """What a recipe calibrates and trains on, read and checked before anything starts."""
    check_windows(checkpoint, calibration)
    to_train = any(stage.needs_text for stage in recipe.trainings)
    text, source = calibration_text(checkpoint, calibration, to_train=to_train) if recipe.needs_text else (None, "")
    tokenizer = checkpoint.tokenizer() if recipe.needs_text or recipe.trainings else None
    for stage in recipe.trainings:
        stage.check_source(View.of(checkpoint))
    samples = [stage.read(tokenizer, checkpoint.spec, text, source) for stage in recipe.trainings]
    if not recipe.needs_corpus:
        return None, samples
    assert text is not None
    return texts.calibration(text, tokenizer, windows=calibration.windows, length=calibration.window, seed=calibration.seed,
                             source=source), samples


def check_device(device: str) -> str:
    """The device's name, if this machine has it."""
    import torch

    if device == "cpu" or (device in {"cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))} and (
            torch.cuda.is_available())):
        return device
    raise TsotsallmError(f"there is no device {device!r} here; use --device cpu" + (
        ", or install a CUDA build of torch on a machine with an NVIDIA card" if device.startswith("cuda") else ""))
