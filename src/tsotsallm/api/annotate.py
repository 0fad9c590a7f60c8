"""Tables annotated with a knowledge graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from tsotsallm.api.computers import Computers
from tsotsallm.compression import check_device
from tsotsallm.records import amended
from tsotsallm.tables.annotate import TASKS
from tsotsallm.tables.jobs import Annotations, AnnotationSettings
from tsotsallm.tables.jobs import annotate as annotate_all


@dataclass(frozen=True)
class AnnotationOptions:
    """How tables are annotated.

    smaller_model  for workers without the memory for the model: a smaller one, or 'none'
    tasks          of cea (cells), cta (columns) and cpa (pairs of columns)
    device         "cpu", or "cuda" where there is a GPU
    strict         refuse a graph with a statement that does not parse; else up to 1% of a file is skipped and noted
    """

    smaller_model: str | Path | None = None
    tasks: Sequence[str] = TASKS
    device: str = "cpu"
    strict: bool = False


class AnnotationKeywords(TypedDict, total=False):
    """The fields of AnnotationOptions, as keywords."""

    smaller_model: str | Path | None
    tasks: Sequence[str]
    device: str
    strict: bool


def annotate(tables: Sequence[str | Path] | str | Path, graph: Sequence[str | Path] | str | Path, out: str | Path, *,
             model: str | Path | None = None, workers: Computers | None = None,
             say: Callable[[str], None] = lambda _line: None, options: AnnotationOptions | None = None,
             **keywords: Unpack[AnnotationKeywords]) -> Annotations:
    """Annotate tables with a knowledge graph: cells with entities, columns with types, pairs of columns with properties.

    `tables` are CSV files or folders, `graph` RDF or label files; `embedded` is the invented world for either. With `model`
    a model decides where the graph is silent. `out` gets cea.csv, cta.csv and cpa.csv in SemTab's form, and
    annotations.jsonl with confidences and candidates. More options are fields of AnnotationOptions, or keywords.
    Raises TablesError where tables or graph cannot be used; a single table that cannot be read is reported in the result.
    """
    options = amended(options or AnnotationOptions(), keywords, annotate)
    smaller = options.smaller_model
    work = AnnotationSettings(tuple(map(str, _several(graph))), None if model is None else str(model),
                None if smaller is None else str(smaller), tuple(options.tasks), check_device(options.device),
                options.strict)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(workers.cluster(say)) if workers is not None else None
        return annotate_all(_several(tables), work, Path(out), cluster=cluster, say=say)


def _several(sources: Sequence[str | Path] | str | Path) -> list[str | Path]:
    return [sources] if isinstance(sources, (str, Path)) else list(sources)
