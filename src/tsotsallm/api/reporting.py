"""Pages about results."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tsotsallm.api.talking import read_prompts
from tsotsallm.checkpoint.reader import EMBEDDED, Checkpoint
from tsotsallm.engine.factory import continuations
from tsotsallm.engine.interface import Sampling
from tsotsallm.errors import ReportError, ResourceError
from tsotsallm.evaluation.cost import check_fits
from tsotsallm.evaluation.examination import examine, text_task
from tsotsallm.files import one_line, read_json
from tsotsallm.lab.texts import world_text
from tsotsallm.report.document import Samples
from tsotsallm.report.fitted import fit_document
from tsotsallm.report.page import write as write_page
from tsotsallm.report.result import result_document
from tsotsallm.report.studied import study_document
from tsotsallm.streaming import corpus as texts
from tsotsallm.streaming.sweep import Tick, silent

SAMPLES, WORDS = 4, 8
"""Prompts of a report, and words of each where they are taken from a text."""


def samples_of(models: Mapping[str, str], prompts: Sequence[str], tokens: int = 40) -> Samples | None:
    """What models make of prompts; None where one is larger than memory."""
    try:
        for model in models.values():
            check_fits(model)
    except ResourceError:
        return None
    return Samples(prompts, {name: continuations(model, prompts, tokens, Sampling()) for name, model in models.items()})


def write_report(paths: Sequence[str | Path], out: str | Path, *, reference: str | Path | None = None,
                 text: str | Path | None = None, tasks: Sequence[str | Path] = (), data: str | Path | None = None,
                 limit: int | None = None, seed: int = 0, prompts: str | Path | None = None, tokens: int = 40,
                 speed: bool = False, country: str | None = None, tick: Tick = silent) -> list[Path]:
    """Write an HTML page, and its pictures as files, about a study, a fit, a result, or several results side by side.

    Results and fits are evaluated for it, beside `reference` where that is given or known: on `text` (of the embedded world
    without one), on `tasks`, and with `prompts`, a file of one a line, or beginnings of the text.
    """
    folder = Path(paths[0])
    alone = len(paths) == 1
    if alone and any((folder / name).exists() for name in ("ledger.sqlite", "trials.jsonl")):
        if reference or text or tasks or prompts or speed or country:
            raise ReportError("the report on a study is made from its ledger alone; give the folder and -o, nothing else")
        with _understood(folder):
            return write_page(study_document(folder), Path(out))
    fitted = alone and (folder / "fit.json").exists()
    models = [str(path) for path in paths]
    if fitted:
        with _understood(folder):
            reference = reference or str(read_json(folder / "fit.json", ReportError)["model"])
        models = [str(folder / "model")]
    elif reference is None and (Checkpoint.open(models[0]).provenance or {}).get("source") == EMBEDDED:
        reference = EMBEDDED
    asked = [*([str(reference)] if reference is not None else []), *models]
    same = {"limit": limit, "seed": seed, "reference": reference, "tick": tick}
    costly: dict[str, Any] = {"speed": speed, "country": country}
    found = []
    own_text = EMBEDDED in asked and text is None
    if text is not None or own_text:
        found.append(examine(asked, [text_task(512, world=own_text)], data=text, **same, **costly))     # type: ignore[arg-type]
        costly = {}
    if tasks:
        found.append(examine(asked, tasks, data=data, **same, **costly))    # type: ignore[arg-type]
    names = {"fitted" if fitted and model == models[0] else _name(model): model for model in asked}
    if len(names) < len(asked):
        names = {model: model for model in asked}
    samples = None
    if prompts is not None or text is not None or own_text:
        begun = [one for one in read_prompts(prompts) if one][:SAMPLES] if prompts is not None else (
            beginnings(texts.read_text(text) if text is not None else world_text(test=True, characters=60_000)))
        samples = samples_of(names, begun, tokens)
    with _understood(folder if alone else folder.parent):
        document = fit_document(folder, found, samples) if fitted else result_document(names, found, samples)
        return write_page(document, Path(out))


@contextmanager
def _understood(folder: Path) -> Iterator[None]:
    """Say that what is told of a result in a folder is damaged where a report cannot be made of it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, AssertionError) as error:
        raise ReportError(f"no report can be made of {folder}: what its files tell of how it came about is damaged, or of "
                          f"another version ({type(error).__name__}: {one_line(error)}); restore them from a copy") from None


def _name(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model


def beginnings(text: str) -> list[str]:
    """The first words of some lines of a text, spread over it."""
    lines = [line for line in re.split(r"\n|<\|[^|]*\|>", text) if len(line.split()) > 2 * WORDS]
    return [" ".join(line.split()[:WORDS]) for line in lines[::max(1, len(lines) // SAMPLES)][:SAMPLES]]
