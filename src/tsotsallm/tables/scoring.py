"""SemTab's own measures: precision, recall and F1 of cells, columns and pairs; for types the approximate score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tsotsallm.errors import TablesError
from tsotsallm.evaluation.significance import Array, Difference, Measure, finite, paired_difference, standard_error
from tsotsallm.files import DATA_BYTES, csv_rows, quoted, read_json, utf8_lines
from tsotsallm.tables.reading import LONGEST_CELL, find_tables, read_table

UP, FARTHEST_UP, DOWN, FARTHEST_DOWN = 0.8, 5, 0.7, 3
"""A type n steps above the right one scores 0.8ⁿ up to five steps, n steps below it 0.7ⁿ up to three, any other 0
(sem-tab-challenge/aicrowd-evaluator, Evaluator_2021/CTA_WD_Evaluator.py)."""
WIDTH = {"cea": 2, "cta": 1, "cpa": 2}
Target = tuple[str, ...]                # table, then row and columns


def _f1(sums: Array) -> Array:
    """2·P·R/(P+R) with P = right/given and R = right/targets is 2·right/(given + targets)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(2 * sums[..., 0] / (sums[..., 1] + sums[..., 2]))


def _over(column: int) -> Callable[[Array], Array]:
    def share(sums: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(sums[..., column] > 0, sums[..., 0] / sums[..., column], 0.0))
    return share


FEATURES = ("right", "given", "targets")
MEASURES = (Measure("F1", FEATURES, _f1, share=True), Measure("precision", FEATURES, _over(1), share=True),
            Measure("recall", FEATURES, _over(2), share=True))


@dataclass(frozen=True)
class Gold:
    """The right answers of every target (any of several counts), and for types the steps from them to other types."""

    targets: Mapping[str, Mapping[Target, frozenset[str]]]          # task -> target -> right answers
    ancestors: Mapping[str, Mapping[str, int]]
    descendants: Mapping[str, Mapping[str, int]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that have targets."""
        return tuple(task for task in WIDTH if self.targets.get(task))


def type_score(given: str, right: Iterable[str], gold: Gold) -> float:
    """1 for a right type, 0.8ⁿ for a type n ≤ 5 steps above, 0.7ⁿ for one n ≤ 3 steps below; the best over right types."""
    best = 0.0
    for kind in right:
        if given == kind:
            return 1.0
        if (up := gold.ancestors.get(kind, {}).get(given)) is not None:
            best = max(best, UP ** up if up <= FARTHEST_UP else 0.0)
        elif (down := gold.descendants.get(kind, {}).get(given)) is not None:
            best = max(best, DOWN ** down if down <= FARTHEST_DOWN else 0.0)
    return best


def read_gold(folder: str | Path, tables: Sequence[str | Path] = ()) -> Gold:
    """Read the right answers in a folder.

    They are SemTab's files (CSV with cea, cta or cpa in the name, `gt` preferred, and JSON files of ancestors and
    descendants), or tables whose columns X__URI hold the entities of X (ToughTables). Lines with NIL have no right answer
    and are not targets. Raises TablesError where the folder holds none of these.
    """
    path = Path(folder)
    if not path.is_dir():
        raise TablesError(f"{path} is not a folder; gold takes a folder with one or more of cea_gt.csv, cta_gt.csv and "
                          "cpa_gt.csv")
    targets: dict[str, dict[Target, frozenset[str]]] = {task: {} for task in WIDTH}
    for task in WIDTH:
        files = sorted(file for file in path.iterdir()
                       if file.is_file() and file.suffix == ".csv" and task in file.stem.lower())
        if len(files) > 1:
            files = [file for file in files if "gt" in file.stem.lower()][:1] or files[:1]
        for file in files:
            targets[task] |= _read_targets(file, task)
    if not any(targets.values()) and any(file.suffix == ".csv" for file in path.iterdir()):
        for table in map(read_table, find_tables([path])):
            targets["cea"] |= {(table.name, str(row), str(column)): frozenset(right.lower().split())
                               for row, column, right in table.gold}
    if not any(targets.values()):
        raise TablesError(f"{path} holds no gold; it takes cea_gt.csv, cta_gt.csv or cpa_gt.csv, or tables with columns "
                          "that end in __URI")
    return Gold(targets, _steps(path, "ancestor"), _steps(path, "descend"))


def _steps(folder: Path, word: str) -> dict[str, dict[str, int]]:
    for path in sorted(folder.glob("*.json")):
        if word in path.stem.lower():
            content = read_json(path, TablesError, DATA_BYTES)
            try:
                return {kind.lower(): {other.lower(): int(steps) for other, steps in others.items()}
                        for kind, others in content.items()}
            except (AttributeError, TypeError, ValueError):
                raise TablesError(f"{path.name} does not map types to types and steps; it takes "
                                  '{"city": {"place": 1}}') from None
    return {}


def _lines(path: Path, width: int) -> Iterable[tuple[int, list[str]]]:
    with path.open("rb") as file:
        lines = (f"{line}\n" for _, line in utf8_lines(file, path.name, TablesError))
        for place, (number, row) in enumerate(csv_rows(lines, path.name, TablesError, longest=LONGEST_CELL), 1):
            if not row:
                continue
            if len(row) != width + 2:
                raise TablesError(f"{path.name}, line {number} has {len(row)} parts, {quoted(','.join(row))}; it takes "
                                  f"{width + 2}: table, {'row, column' if width > 1 else 'column'}, answer")
            yield place, row


def _read_targets(path: Path, task: str) -> dict[Target, frozenset[str]]:
    targets: dict[Target, frozenset[str]] = {}
    order: Sequence[int] = range(WIDTH[task])
    for number, line in _lines(path, WIDTH[task]):
        places = line[1:-1]
        if number == 1 and not places[0].isdigit():
            order = [1, 0] if task == "cea" and places[0].lower().startswith("col") else order
            continue
        right = frozenset(line[-1].lower().split())
        if right - {"nil"}:
            targets[line[0].removesuffix(".csv"), *(places[place] for place in order)] = right - {"nil"}
    return targets


def read_answers(folder: str | Path, task: str) -> dict[Target, str]:
    """A submission: target -> answer in lower case; raises TablesError where it is missing or answers a target twice."""
    path = Path(folder) / f"{task}.csv"
    if not path.exists():
        raise TablesError(f"{path} does not exist; score a folder that `tsotsallm annotate` wrote, with the task {task}")
    answers: dict[Target, str] = {}
    for number, line in _lines(path, WIDTH[task]):
        if (target := tuple(line[:-1])) in answers:
            raise TablesError(f"{path.name}, line {number} answers {', '.join(target)} a second time; a target takes "
                              "one answer")
        answers[target] = line[-1].lower()
    return answers


def items_of(gold: Gold, task: str, answers: Mapping[Target, str]) -> dict[Target, tuple[float, float, float]]:
    """Target -> (right, given, 1); answers to anything that is not a target are ignored."""
    items = {}
    for target, right in gold.targets[task].items():
        given = answers.get(target)
        score = 0.0 if given is None else type_score(given, right, gold) if task == "cta" else float(given in right)
        items[target] = (score, float(given is not None), 1.0)
    return items


@dataclass(frozen=True)
class AnnotationScore:
    """One measure of one task (in a domain): each submission's value and standard error, and differences from the first."""

    task: str
    measure: str
    domain: str
    targets: int
    values: tuple[float, ...]
    errors: tuple[float | None, ...]
    differences: tuple[Difference | None, ...]

    def plain(self) -> dict[str, object]:
        """The fields as plain data for JSON."""
        return finite({"task": self.task, "measure": self.measure, "domain": self.domain, "targets": self.targets}) | {
            "values": list(self.values), "errors": list(self.errors),
            "differences": [None if difference is None else difference.plain() for difference in self.differences]}


def score(folders: Sequence[str | Path], gold: Gold, *, domains: Callable[[str], str] | None = None,
          tasks: Sequence[str] | None = None) -> list[AnnotationScore]:
    """Score submissions side by side; `domains` maps a table's name to its domain, and each domain is scored as well.

    Intervals come from a paired bootstrap that draws whole tables, since cells of one table tend to be right or wrong
    together. Raises TablesError where the gold has no targets of a task, or a submission is missing.
    """
    scores: list[AnnotationScore] = []
    for task in tasks or gold.tasks:
        if not gold.targets.get(task):
            raise TablesError(f"the gold has no targets of the task {task}; it has {', '.join(gold.tasks)}")
        scored = [items_of(gold, task, read_answers(folder, task)) for folder in folders]
        groups = {"": list(scored[0])}
        if domains is not None:
            by_domain: dict[str, list[Target]] = defaultdict(list)
            for target in scored[0]:
                by_domain[domains(target[0])].append(target)
            groups |= dict(sorted(by_domain.items()))
        for domain, targets in groups.items():
            arrays = [_by_table(items, targets) for items in scored]
            for measure in MEASURES:
                scores.append(AnnotationScore(task, measure.name, domain, len(targets), tuple(
                    float(np.nan_to_num(measure.of(items))) for items in arrays),
                    tuple(standard_error(measure, items) for items in arrays),
                    (None, *(paired_difference(measure, arrays[0], items) for items in arrays[1:]))))
    return scores


def _by_table(items: Mapping[Target, tuple[float, float, float]], targets: Sequence[Target]) -> Array:
    """Sums over each table's targets, (tables, 3)."""
    sums: dict[str, list[float]] = {}
    for target in targets:
        of_table = sums.setdefault(target[0], [0.0, 0.0, 0.0])
        for place, value in enumerate(items[target]):
            of_table[place] += value
    return np.array(list(sums.values()))


def domain_of(name: str) -> str:
    """The domain in a table's name (ToughTables: CTRL_WIKI_GEO_..., TOUGH_T2D_SPO_...); empty for other names."""
    parts = name.split("_")
    if len(parts) > 3 and parts[0] in ("CTRL", "TOUGH"):
        return f"{parts[2]}{' with slips' if name.endswith('NOISE2') else ''}"
    return ""
