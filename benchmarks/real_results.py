"""Which approach is best at which size on a real LLaMA, SmolLM2-135M-Instruct: a packaged study, its table and its picture.

    python benchmarks/real_results.py run --work DIR [--study franken] [--hours 2]     run or resume the study
    python benchmarks/real_results.py write [--study franken]                          table and picture from the results

The study is `approaches` unless another is named. What is kept of it in benchmarks/results/real-smollm2 is its diary
(STUDY.jsonl), from which another computer resumes, and a line for every trial (STUDY.csv). Text: the first 20 windows of 512
tokens of WikiText-2 (raw, test), 40 for recipes that may be on the front. Calibration: the windows of the study, at most 16,
of 512 tokens of prose. Tasks: those of TASKS, as many items as --items says, with paired differences from the original. They
are taken of every recipe that may be on the front: that no recipe tried before, of at most its size, beats by more than two
standard errors of the divergence. In `approaches` mixtures come first, which beat most, and recipes that learn come last.
The energy of making each model is estimated. With --workers recipes are tried on a Dask cluster, with --device cuda on GPUs.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tsotsallm.api.export import to_huggingface
from tsotsallm.study.spec import read_content
from tsotsallm.units import plus_minus

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import measured
from benchmarks.peers import PROSE, SHARED
from tests.real_model import real_model

RESULTS = Path(__file__).resolve().parent / "results" / "real-smollm2"
WINDOWS, CALIBRATION = 20, 16
TASKS = {"approaches": ("arc-easy", "hellaswag", "piqa", "boolq", "triviaqa-closed"), "franken": ("hellaswag",),
         "reference-pruning": ("arc-easy", "hellaswag")}
"""Study -> the tasks that its models are compared on."""
WORDS = {"two layers": "2 of 30 layers removed, by perplexity",
         "layers-2+lora": "4 of 30 layers removed, then LoRA, 100 steps",
         "layers-2+imitation": "4 of 30 layers removed, then layers imitate the original",
         "integers-4": "4-bit integers in groups of 96, GPTQ", "integers-3": "3-bit integers in groups of 96, GPTQ",
         "integers-4+eora": "4-bit integers + EoRA, rank 32", "integers-3+eora": "3-bit integers + EoRA, rank 32",
         "integers-3+tune": "3-bit integers, GPTQ, then `tune`", "mixture-6": "mixture of 6 bits a weight",
         "mixture-4.5": "mixture of 4.5 bits a weight"}
"""Name of a recipe -> what it does to this model, where the name does not say it."""
COUNTRY = "CM"
"""Whose electricity counts; watt-hours do not depend on it."""
LEARN = {"adapt", "distill", "tune", "compensate"}
Row = dict[str, str]


def turn(recipe: list[dict[str, Any]]) -> int:
    """When a recipe is tried: mixtures first, recipes that learn last."""
    return 2 if any(LEARN & stage.keys() for stage in recipe) else "bits_per_weight" not in str(recipe[0])


def run(asked: argparse.Namespace) -> None:
    """Run the study where it stopped, and keep its ledger; the folder `work` holds all that can be made again."""
    work, data = asked.work.absolute(), SHARED / "data"
    study, kept = work / asked.study, RESULTS / f"{asked.study}.jsonl"
    study.mkdir(parents=True, exist_ok=True)
    if not (work / "source").exists():
        to_huggingface(str(real_model()), work / "source")       # dense, so that layers can learn
    if not (work / "texts").exists():
        (work / "texts").mkdir()
        for name in PROSE:
            shutil.copyfile(data / "calibration" / name, work / "texts" / name)
        shutil.copyfile(data / "wikitext-2-raw" / "wiki.test.raw", work / "wiki.test.raw")
        (work / "data").symlink_to(data)                         # the ledger names no folder of this computer
    if not (study / "trials.jsonl").exists() and kept.exists():
        shutil.copyfile(kept, study / "trials.jsonl")
    content = read_content(asked.study)
    content["evaluation"] = {"cheap": WINDOWS, "full": 2 * WINDOWS, "country": COUNTRY}
    content["calibration"]["windows"] = min(CALIBRATION, content["calibration"]["windows"])
    if asked.study == "approaches":
        content["recipes"] = dict(sorted(content["recipes"].items(), key=lambda item: turn(item[1])))
    (work / f"{asked.study}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    words = ["-m", "tsotsallm", "study", f"{asked.study}.yaml", "-o", asked.study, "--model", "source", "--text",
             "wiki.test.raw", "--calibration", "texts", "--task", ",".join(TASKS[asked.study]), "--data", "data", "--limit",
             str(asked.items), "--hours", str(asked.hours), "--threads", str(asked.threads), "--device", asked.device]
    if "texts" in content.get("optional", {}):
        words += ["--set", "texts=texts"]
    if asked.workers:
        words += ["--workers", asked.workers]
    try:
        subprocess.run([sys.executable, *words], cwd=work, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    finally:
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(study / "trials.jsonl", kept)
        measured.run([sys.executable, "-m", "tsotsallm", "study", "export", study, "--csv", kept.with_suffix(".csv")])


def rows(study: str) -> list[Row]:
    """The finished trials of a study, from the largest to the smallest model.

    Of `approaches` some recipes were made on a GPU before, by the same protocol, without tasks, minutes and energy: they
    stand for those that the study has not come to.
    """
    with (RESULTS / f"{study}.csv").open(encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["status"] == "done" and row["cheap.kl"]]
    if study == "approaches":
        tried = {row["name"] for row in found}
        with (RESULTS / "first-recipes.csv").open(encoding="utf-8", newline="") as file:
            found += [{"name": row["name"], "recipe": row["recipe"], "model.bytes": row["bytes"], "cheap.kl": row["kl"],
                       "cheap.kl_error": row["kl_error"], "cheap.kl_99": row["kl_99"], "cheap.perplexity": row["perplexity"]}
                      for row in csv.DictReader(file) if row["name"] not in tried]
    return sorted(found, key=lambda row: -float(row["model.bytes"]))


def on_the_front(row: Row, every: list[Row]) -> bool:
    """Whether no model of at most this size loses less."""
    size, loss = float(row["model.bytes"]), float(row["cheap.kl"])
    return not any(float(other["model.bytes"]) <= size and float(other["cheap.kl"]) < loss for other in every)


def table(every: list[Row]) -> str:
    """Every recipe, those on the front in bold; of tasks, in percent, intervals that leave out zero too."""
    tasks = [task for task in TASKS["approaches"] if any(row.get(f"full.{task}") for row in every)]
    lines = [["recipe", "MB", "KL", "99%", "perplexity", *tasks, "minutes", "Wh"]]
    lines.append(["---"] * len(lines[0]))
    for row in every:
        lines.append([_bold(described(row["name"]), on_the_front(row, every)), f"{float(row['model.bytes']) / 1e6:.1f}",
                      plus_minus(float(row["cheap.kl"]), float(row["cheap.kl_error"])),
                      f"{float(row['cheap.kl_99']):.2f}", f"{float(row['cheap.perplexity']):.2f}",
                      *(_score(row, task) for task in tasks),
                      f"{float(row['seconds']) / 60:.1f}" if row.get("seconds") else "",
                      f"{float(row['energy_wh']):.1f}" if row.get("energy_wh") else ""])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def described(name: str) -> str:
    """A recipe's name in words, where it has some."""
    if name in WORDS:
        return WORDS[name]
    how, _, grid = name.partition("-")
    grid, _, after = grid.partition("+")
    if how not in ("rounded", "gptq"):
        return name
    return f"{grid}, {'rounded' if how == 'rounded' else 'GPTQ'}" + (f", then `{after}`" if after else "")


def _score(row: Row, task: str) -> str:
    if not row.get(f"full.{task}"):
        return ""
    low, high = (round(100 * float(row[f"full.{task}_{side}"]), 1) + 0.0 for side in ("low", "high"))      # no -0.0
    return _bold(f"{100 * float(row[f'full.{task}']):.1f} ({low:+.1f} to {high:+.1f})", low > 0 or high < 0)


def _bold(text: str, stands_out: bool) -> str:
    return f"**{text}**" if stands_out else text


def draw(every: list[Row], out: Path) -> None:
    """KL divergence over bytes, both on logarithmic scales: a colour for every approach, and the front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axis = pyplot.subplots(figsize=(10, 6), layout="constrained")
    kinds: dict[str, list[Row]] = {}
    for row in every:
        kinds.setdefault(techniques_of(yaml.safe_load(row["recipe"])), []).append(row)
    for number, (kind, group) in enumerate(sorted(kinds.items())):
        points: Any = [(float(row["model.bytes"]) / 1e6, float(row["cheap.kl"])) for row in group]
        axis.plot(*zip(*points, strict=True), label=kind, color=f"C{number % 10}", marker="os^vDP*Xd<>"[number % 11],
                  linestyle="-" if len(points) > 1 else "none", linewidth=0.8)
    front: Any = [(float(row["model.bytes"]) / 1e6, float(row["cheap.kl"])) for row in every if on_the_front(row, every)]
    axis.step(*zip(*front, strict=True), where="pre", color="black", linestyle=":", label="best so far at each size")
    axis.set(xscale="log", yscale="log", xlabel="MB of the file with weights", ylabel="KL from the original, nats per token",
             title="SmolLM2-135M-Instruct, WikiText-2")
    axis.xaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
    axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.grid(True, which="both", alpha=0.3)
    figure.legend(fontsize="small", ncols=4, loc="outside lower center")
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def techniques_of(recipe: list[dict[str, Any]]) -> str:
    """The techniques of a recipe in order; quantisation by what its bits are."""
    names = []
    for stage in recipe:
        [(name, fields)] = stage.items()
        if name == "quantize":
            name = ("mixture" if "bits_per_weight" in fields else "integers" if "bits" in fields else
                    "rounded" if fields.get("method") == "rtn" else "one grid")
        names.append(name)
    return " + ".join(names)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "write"))
    parser.add_argument("--study", choices=TASKS, default="approaches")
    parser.add_argument("--work", type=Path, default=Path("real-results"))
    parser.add_argument("--hours", type=float, default=2.0, help="no recipe begins later")
    parser.add_argument("--items", type=int, default=300, help="of every task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", help="address of a Dask scheduler")
    asked = parser.parse_args()
    if asked.what == "run":
        run(asked)
    every = rows(asked.study)
    (RESULTS / f"{asked.study}.md").write_text(table(every) + "\n", "utf-8")
    draw(every, RESULTS / f"{asked.study}.png")


if __name__ == "__main__":
    main()
