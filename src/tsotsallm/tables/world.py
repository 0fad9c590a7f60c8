"""The embedded world's graph, tables and gold as files, made once: `embedded` stands for them where tables are annotated."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from tsotsallm.lab.graph import gold_files, world_tables, world_turtle
from tsotsallm.machine import cache_root
from tsotsallm.version import __version__

TABLES, SEED = 60, 0


def world_graph(root: Path) -> Path:
    """The path of the embedded world's graph as Turtle in `root`, written where it is missing."""
    path = root / f"world-{__version__}.ttl"
    text = world_turtle()
    if not path.exists() or path.stat().st_size != len(text.encode()):
        root.mkdir(parents=True, exist_ok=True)
        draft = root / f"{uuid.uuid4().hex}.new"
        draft.write_text(text, "utf-8", newline="\n")
        draft.replace(path)
    return path


def world_tables_folder(count: int = TABLES, seed: int = SEED) -> Path:
    """A folder in the cache with the embedded world's `tables` and `gold`, written where they are missing."""
    tables = world_tables(count, seed)
    gold = gold_files(tables)
    folder = cache_root() / "tables" / f"world-{seed}-{count}"
    whole = {f"tables/{table.name}.csv": table.csv for table in tables}
    whole |= {f"gold/{name}": text for name, text in gold.items()}
    if not all((folder / name).exists() and (folder / name).read_text("utf-8") == text for name, text in whole.items()):
        write_world(folder.with_name(draft := f"{uuid.uuid4().hex}.new"), count=count, seed=seed)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.with_name(draft).replace(folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(folder.with_name(draft), ignore_errors=True)      # another process was faster
    return folder


def write_world(folder: Path, *, count: int = TABLES, seed: int = SEED) -> Path:
    """Write the graph (world.ttl), `tables` and `gold` of the embedded world to a folder; returns the folder."""
    tables = world_tables(count, seed)
    for name in ("tables", "gold"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "world.ttl").write_text(world_turtle(), "utf-8", newline="\n")
    for table in tables:
        (folder / "tables" / f"{table.name}.csv").write_text(table.csv, "utf-8", newline="\n")
    for name, text in gold_files(tables).items():
        (folder / "gold" / name).write_text(text, "utf-8", newline="\n")
    os.utime(folder)
    return folder
