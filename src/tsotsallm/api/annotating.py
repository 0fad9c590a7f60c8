"""Tables annotated with a knowledge graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from tsotsallm.api.computers import Computers
from tsotsallm.checkpoint.reader import EMBEDDED
from tsotsallm.compression import check_device
from tsotsallm.errors import TsotsallmError
from tsotsallm.tables.annotate import TASKS as TABLE_TASKS
from tsotsallm.tables.jobs import Annotations
from tsotsallm.tables.jobs import annotate as annotate_all
from tsotsallm.tables.scoring import AnnotationScore, Gold, domain_of, read_gold
from tsotsallm.tables.scoring import score as score_submissions
from tsotsallm.tables.world import world_tables_folder, write_world


def annotate(tables: Sequence[str | Path] | str | Path, graph: Sequence[str | Path] | str | Path, out: str | Path, *,
             model: str | Path | None = None, smaller_model: str | Path | None = None, tasks: Sequence[str] = TABLE_TASKS,
             device: str = "cpu", strict: bool = False, workers: Computers | None = None,
             say: Callable[[str], None] = lambda _line: None) -> Annotations:
    """Annotate tables with a knowledge graph: cells with entities, columns with types, pairs of columns with properties.

    `tables` are CSV files or folders, `graph` RDF or label files; `embedded` is the invented world for either. With `model`
    a model decides where the graph is silent. `out` gets cea.csv, cta.csv and cpa.csv in SemTab's form, and
    annotations.jsonl with confidences and candidates. `smaller_model` (or 'none') is for workers
    without the memory for `model`. Statements of the graph that do not parse are skipped and noted, up to 1% of a file;
    `strict` refuses the first one.
    Raises TablesError where tables or graph cannot be used; a single table that cannot be read is reported in the result.
    """
    def several(one: Sequence[str | Path] | str | Path) -> list[str | Path]:
        return [one] if isinstance(one, (str, Path)) else list(one)

    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(workers.cluster(say)) if workers is not None else None
        return annotate_all(several(tables), several(graph), Path(out), model=None if model is None else str(model),
                            smaller=None if smaller_model is None else str(smaller_model), tasks=tasks,
                            device=check_device(device), strict=strict, cluster=cluster, say=say)


def score_tables(submissions: Sequence[str | Path], gold: str | Path, *, by_domain: bool = False,
                 tasks: Sequence[str] | None = None) -> list[AnnotationScore]:
    """Precision, recall and F1 of folders that `annotate` wrote, as SemTab takes them; differences are to the first.

    `gold` is a folder with cea_gt.csv and the like, or of tables with X__URI columns, or 'embedded'.
    """
    return score_submissions(submissions, _gold(gold), domains=domain_of if by_domain else None, tasks=tasks)


def _gold(gold: str | Path) -> Gold:
    return read_gold(world_tables_folder() / "gold" if str(gold) == EMBEDDED else Path(gold))


def gold_tasks(gold: str | Path) -> tuple[str, ...]:
    """The tasks that a gold has targets of; refused where it has none."""
    return _gold(gold).tasks


def write_world_tables(folder: str | Path, *, count: int = 60, seed: int = 0) -> Path:
    """Write the embedded world's graph, tables and gold to a folder."""
    path = Path(folder)
    if path.exists():
        raise TsotsallmError(f"{path} exists; choose another name, or delete it first")
    return write_world(path, count=count, seed=seed)
