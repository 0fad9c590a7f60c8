"""What a model loses first: original against depth, width and bits, alone and together, over all tasks that run offline.

    python benchmarks/what_goes_first.py embedded --work DIR [--data FOLDER] [--limit 200]

Writes every model with `compress`, asks all the same items, and prints one Markdown table with paired 95% intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import tsotsallm
from tsotsallm.errors import TaskError
from tsotsallm.evaluation.tasks import data_files, packaged_tasks, read_task

RECIPES = {
    "depth 2": "[{depth: {remove: 2, protect: {first: %(first)d, last: %(last)d}}}]",
    "wanda 2:4": "wanda:2:4",
    "gptq 4": "gptq:4:%(group)s",
    "all three": "[{depth: {remove: 2, protect: {first: %(first)d, last: %(last)d}}}, {sparsity: {prune: 2, group: 4}}, "
                 "{quantize: {bits: 4, group: %(group)s}}]",
}


def offline_tasks(data: Path | None, embedded: bool) -> list[str]:
    """Packaged tasks whose items are at hand; the embedded world's own only for its model."""
    found = []
    for name in packaged_tasks():
        task = read_task(name)
        if task.world:
            found += [name] if embedded else []
        elif data is not None:
            try:
                data_files(task, data)
                found.append(name)
            except TaskError:
                continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--protect", type=int, nargs=2, default=(4, 2))
    parser.add_argument("--group", default="64")
    parser.add_argument("--tasks", nargs="*")
    asked = parser.parse_args()
    models = {"original": asked.model}
    for name, recipe in RECIPES.items():
        path = asked.work / name.replace(" ", "-").replace(":", "-")
        models[name] = str(path)
        if not path.exists():
            settings = {"first": asked.protect[0], "last": asked.protect[1], "group": asked.group}
            tsotsallm.compress(asked.model, recipe % settings, path, calibration=asked.calibration, windows=32, window=512)
    tasks = asked.tasks or offline_tasks(asked.data, asked.model == "embedded")
    found = tsotsallm.examine(list(models.values()), tasks, data=asked.data, limit=asked.limit, reference=asked.model)
    print("| task | measure | items | original | " + " | ".join(f"{name}" for name in RECIPES) + " |")
    print("|" + "---|" * (4 + len(RECIPES)))
    for one in found.comparisons:
        if one.group or one.measure.startswith("of which"):
            continue
        scale, digits = (100, 1) if one.share else (1, 3)
        first, error = one.scores[0].value * scale, one.scores[0].standard_error
        cells = [f"{first:.{digits}f}" + ("" if error is None else f" ± {error * scale:.{digits}f}")]
        for score, difference in zip(one.scores[1:], one.differences[1:], strict=True):
            assert difference is not None
            mark = "≈ " if difference.within_noise else ""
            cells.append(f"{score.value * scale:.{digits}f} ({mark}{difference.low * scale:+.{digits}f} to "
                         f"{difference.high * scale:+.{digits}f})")
        print(f"| {one.task} | {one.measure} | {one.items} | " + " | ".join(cells) + " |", flush=True)
    (asked.work / "what_goes_first.json").write_text(json.dumps(found.plain(), indent=1))


if __name__ == "__main__":
    main()
