"""Pages about results, fits and studies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from tsotsallm.api.generate import read_prompts
from tsotsallm.checkpoint.reader import EMBEDDED, Checkpoint
from tsotsallm.engine.factory import continuations
from tsotsallm.engine.interface import Sampling
from tsotsallm.errors import ReportError, ResourceError
from tsotsallm.evaluation.cost import check_fits
from tsotsallm.evaluation.examination import Examination, ExaminationOptions, examine, text_task
from tsotsallm.files import one_line, read_json
from tsotsallm.lab.texts import world_text
from tsotsallm.records import amended
from tsotsallm.report.document import TextSamples
from tsotsallm.report.fitted import fit_document
from tsotsallm.report.page import check_page
from tsotsallm.report.page import write as write_page
from tsotsallm.report.result import result_document
from tsotsallm.report.studied import study_document
from tsotsallm.streaming import corpus as texts
from tsotsallm.streaming.sweep import Tick, silent

SAMPLES, WORDS = 4, 8
"""Prompts of a report, and words of each where they are taken from a text."""


@dataclass(frozen=True)
class ReportOptions:
    """What a report measures besides the losses on a text.

    tasks    tasks to evaluate on, with their `data`, at most `limit` items of each, drawn by `seed`
    prompts  file with one prompt per line, each continued by `tokens` tokens; None takes beginnings of the text
    speed    measure speed and memory as well
    country  ISO code (CMR, KEN, ...): report energy and CO₂ as well
    """

    tasks: Sequence[str | Path] = ()
    data: str | Path | None = None
    limit: int | None = None
    seed: int = 0
    prompts: str | Path | None = None
    tokens: int = 40
    speed: bool = False
    country: str | None = None


class ReportKeywords(TypedDict, total=False):
    """The fields of ReportOptions, as keywords."""

    tasks: Sequence[str | Path]
    data: str | Path | None
    limit: int | None
    seed: int
    prompts: str | Path | None
    tokens: int
    speed: bool
    country: str | None


def write_report(paths: Sequence[str | Path], out: str | Path, *, reference: str | Path | None = None,
                 text: str | Path | None = None, tick: Tick = silent, options: ReportOptions | None = None,
                 **keywords: Unpack[ReportKeywords]) -> list[Path]:
    """Write an HTML page, and its pictures as files, about a study, a fit, a result, or several results side by side.

    Results and fits are evaluated for it, beside `reference` where that is given or known, on `text` (of the embedded world
    without one). More options are fields of ReportOptions, or keywords. Returns the page and the pictures.
    Raises ReportError where files of a result are damaged.
    """
    options = amended(options or ReportOptions(), keywords, write_report)
    check_page(Path(out))       # before minutes of evaluation
    folder = Path(paths[0])
    alone = len(paths) == 1
    if alone and any((folder / name).exists() for name in ("ledger.sqlite", "trials.jsonl")):
        if reference or text or options.tasks or options.prompts or options.speed or options.country:
            raise ReportError("the report on a study is made from its ledger alone; give the folder and -o, nothing else")
        with _damage_reported(folder):
            return write_page(study_document(folder), Path(out))
    if text is not None:
        texts.read_text(text, "--text")
    fitted = alone and (folder / "fit.json").exists()
    models = [str(path) for path in paths]
    if fitted:
        with _damage_reported(folder):
            reference = reference or str(read_json(folder / "fit.json", ReportError)["model"])
        models = [str(folder / "model")]
    elif reference is None and (made := Checkpoint.open(models[0]).provenance) is not None and made.source == EMBEDDED:
        reference = EMBEDDED
    compared = [*([str(reference)] if reference is not None else []), *models]
    own_text = EMBEDDED in compared and text is None
    scored = _examinations(compared, reference, text, own_text, options, tick)
    names = {"fitted" if fitted and model == models[0] else _name(model): model for model in compared}
    if len(names) < len(compared):
        names = {model: model for model in compared}
    samples = None
    if options.prompts is not None or text is not None or own_text:
        begun = [one for one in read_prompts(options.prompts) if one][:SAMPLES] if options.prompts is not None else (
            beginnings(texts.read_text(text) if text is not None else world_text(test=True, characters=60_000)))
        samples = samples_of(names, begun, options.tokens)
    with _damage_reported(folder if alone else folder.parent):
        document = fit_document(folder, scored, samples) if fitted else result_document(names, scored, samples)
        return write_page(document, Path(out))


def _examinations(models: Sequence[str], reference: str | Path | None, text: str | Path | None, own_text: bool,
                  options: ReportOptions, tick: Tick) -> list[Examination]:
    """The models' scores on the text and on the tasks; speed and energy are measured with the first of them."""
    scored = []
    run = ExaminationOptions(tick=tick, speed=options.speed, country=options.country)
    if text is not None or own_text:
        scored.append(examine(models, [text_task(512, world=own_text)], data=text, limit=options.limit, seed=options.seed,
                              reference=reference, options=run))
        run = ExaminationOptions(tick=tick)
    if options.tasks:
        scored.append(examine(models, options.tasks, data=options.data, limit=options.limit, seed=options.seed,
                              reference=reference, options=run))
    return scored


def samples_of(models: Mapping[str, str], prompts: Sequence[str], tokens: int = 40) -> TextSamples | None:
    """How models continue prompts; None where one is larger than memory."""
    try:
        for model in models.values():
            check_fits(model)
    except ResourceError:
        return None
    return TextSamples(prompts, {name: continuations(model, prompts, tokens, Sampling()) for name, model in models.items()})


def beginnings(text: str) -> list[str]:
    """The first words of some lines of a text, spread over it."""
    lines = [line for line in re.split(r"\n|<\|[^|]*\|>", text) if len(line.split()) > 2 * WORDS]
    return [" ".join(line.split()[:WORDS]) for line in lines[::max(1, len(lines) // SAMPLES)][:SAMPLES]]


@contextmanager
def _damage_reported(folder: Path) -> Iterator[None]:
    """Raise ReportError where the files of a result are damaged, so that no report can be made of them."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, AssertionError) as error:
        raise ReportError(f"no report can be made of {folder}: its records of how it was made are damaged, or from another "
                          f"version ({type(error).__name__}: {one_line(error)}); restore them from a copy") from None


def _name(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model
