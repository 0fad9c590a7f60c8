"""Annotated tables scored, and the embedded world's tables written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tsotsallm.checkpoint.reader import EMBEDDED
from tsotsallm.errors import TsotsallmError
from tsotsallm.tables.scoring import AnnotationScore, Gold, domain_of, read_gold
from tsotsallm.tables.scoring import score as score_submissions
from tsotsallm.tables.world import world_tables_folder, write_world


def score_tables(submissions: Sequence[str | Path], gold: str | Path, *, by_domain: bool = False,
                 tasks: Sequence[str] | None = None) -> list[AnnotationScore]:
    """Precision, recall and F1 of folders that `annotate` wrote, by SemTab's definitions; differences are to the first.

    `gold` is a folder with cea_gt.csv and the like, or of tables with X__URI columns, or 'embedded'.
    """
    return score_submissions(submissions, _gold(gold), domains=domain_of if by_domain else None, tasks=tasks)


def gold_tasks(gold: str | Path) -> tuple[str, ...]:
    """The tasks that a gold standard has targets of. Raises TablesError where it has none."""
    return _gold(gold).tasks


def write_world_tables(folder: str | Path, *, count: int = 60, seed: int = 0) -> Path:
    """Write the embedded world's graph, `count` tables and their gold standard to a folder, which must not exist."""
    path = Path(folder)
    if path.exists():
        raise TsotsallmError(f"{path} exists; choose another name, or delete it first")
    return write_world(path, count=count, seed=seed)


def _gold(gold: str | Path) -> Gold:
    return read_gold(world_tables_folder() / "gold" if str(gold) == EMBEDDED else Path(gold))
