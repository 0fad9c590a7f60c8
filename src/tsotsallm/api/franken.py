"""The layer-order study of FRANKEN-LLAMA on any model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Unpack

from tsotsallm.checkpoint.reader import EMBEDDED, Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.compression import check_device
from tsotsallm.errors import CorpusError
from tsotsallm.evaluation.examination import text_task
from tsotsallm.evaluation.franken import OrderResult, study
from tsotsallm.evaluation.options import RunKeywords, RunOptions
from tsotsallm.evaluation.task_run import prepare
from tsotsallm.evaluation.tasks import read_task
from tsotsallm.records import amended


def franken(model: str | Path, text: str | Path | None = None, *, task: str | Path | None = None,
            data: str | Path | None = None, limit: int | None = None, seed: int = 0, only: Sequence[str] | None = None,
            options: RunOptions | None = None, **keywords: Unpack[RunKeywords]) -> Iterator[OrderResult]:
    """Run 25 layer orders on a model, rescaled to its number of layers, the unchanged one first.

    Perplexity and KL divergence (nats per token) are of the text (of the embedded world without one), accuracy is of a task,
    if one is named. `limit` takes the first windows and that many items; `only` names the orders to run. Where it runs is
    given as `options` or as keywords: device, scratch, tick.
    """
    run = amended(options or RunOptions(), keywords, franken)
    if text is None and str(model) != EMBEDDED:
        raise CorpusError("give a text to evaluate on with --text FILE; only the embedded model comes with its own")
    of_text = prepare(text_task(world=text is None), text, limit=limit)
    of_task = prepare(read_task(task), data, limit=limit, seed=seed) if task is not None else None
    view = View.of(Checkpoint.open(model))
    where = check_device(run.device)
    with tempfile.TemporaryDirectory(dir=run.scratch, ignore_cleanup_errors=True) as folder:
        yield from study(view, str(model), of_text, of_task, Path(folder), device=where, only=only, tick=run.tick)
