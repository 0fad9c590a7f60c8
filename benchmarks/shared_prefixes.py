"""What the store of a study saves: every trial of a finished study once more, each from the start.

    python benchmarks/shared_prefixes.py --study FOLDER --work DIR

Runs each trial's recipe with an empty store, evaluates it as far as the study did, and compares the seconds that the
processor worked for it, and the hashes of the weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import fields
from pathlib import Path

from tsotsallm.study.ledger import Ledger
from tsotsallm.study.trial import Setup, TrialJob, execute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    asked = parser.parse_args()
    ledger = Ledger(asked.study)
    study, trials = ledger.study(), ledger.trials("done")
    assert study is not None
    names = {field.name for field in fields(Setup)}
    setup = Setup(**{name: tuple(value) if isinstance(value, list) else value for name, value in study["setup"].items()
                     if name in names})
    asked.work.mkdir(parents=True, exist_ok=True)
    kept = asked.work / "from-the-start.jsonl"
    done = {json.loads(line)["number"] for line in kept.read_text("utf-8").splitlines()} if kept.exists() else set()
    for trial in trials:
        if trial.number in done:
            continue
        folder = asked.work / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        levels = tuple((level, trial.measures[level]["windows"]) for level in ("cheap", "full") if level in trial.measures)
        found = execute(setup, TrialJob(trial.number, trial.key, trial.recipe, (), levels), folder)
        line = {"number": trial.number, "name": trial.name, "seconds": found.facts["cpu_seconds"],
                "shared_seconds": trial.facts["cpu_seconds"], "same": found.facts["hashes"] == trial.facts["hashes"],
                "same_kl": found.measures[trial.level]["kl"] == trial.measures[trial.level]["kl"]}
        print(line, flush=True)
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    rows = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    alone, shared = sum(row["seconds"] for row in rows), sum(row["shared_seconds"] for row in rows)
    print(f"{len(rows)} trials: {alone:.0f} s from the start, {shared:.0f} s with what they share: {1 - shared / alone:.0%} "
          f"saved; weights alike in {sum(row['same'] for row in rows)}, KL alike in {sum(row['same_kl'] for row in rows)}")


if __name__ == "__main__":
    main()
