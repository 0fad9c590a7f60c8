"""How models of SmolLM2-135M-Instruct behave in llama.cpp: instructions, languages, energy; a table of what is lost.

    python benchmarks/real_behaviour.py run original=FILE.gguf NAME=FILE.gguf ... --reference MODEL
    python benchmarks/real_behaviour.py write

The first model is the original, named so. Instructions: the hundred packaged ones, greedily, 128 tokens at most. Languages:
bits per byte of the Universal Declaration of Human Rights and the divergence from --reference, the original as a checkpoint,
in float32, over the first --windows windows of 512 tokens of each language. Energy: watt-hours of 1,000 tokens, estimated
from the processor where it cannot be measured, and a year of 100 answers a day in the mixes of Cameroon, India and France.
Results are kept by name and not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import measured
from benchmarks.peers import SHARED

RESULTS = Path(__file__).resolve().parent / "results" / "behaviour-smollm2"
COUNTRIES = ("CMR", "IND", "FRA")
INSTRUCTIONS = ("stops by itself", "repeats itself", "follows the form")
Record = dict[str, Any]


def evaluated(model: Path, *options: str) -> Record:
    """What `tsotsallm evaluate --json` says of a model."""
    found = measured.run([sys.executable, "-m", "tsotsallm", "evaluate", model, "--json", *options],
                         environment={"HF_HUB_OFFLINE": "1"})
    answer: Record = json.loads(found.output)
    return answer


def scores(found: Record) -> dict[str, dict[str, list[float | None]]]:
    """Group -> measure -> [value, standard error] of the first task."""
    groups: dict[str, dict[str, list[float | None]]] = {}
    for score in found["results"][0][0]["scores"]:
        groups.setdefault(score["group"], {})[score["measure"]] = [score["value"], score["standard_error"]]
    return groups


def behaviour(model: Path, asked: argparse.Namespace) -> Record:
    """All that is measured of one model."""
    threads = ("--threads", str(asked.threads))
    told = evaluated(model, "--task", "instructions", *threads)
    spoken = evaluated(model, "--task", "udhr", "--data", str(SHARED / "data"), "--groups", "--limit", str(asked.windows),
                       "--reference", asked.reference, "--stream", *threads)
    [speed] = evaluated(model, "--speed", "--country", ",".join(COUNTRIES), *threads).values()
    return {"bytes": model.stat().st_size, "threads": asked.threads, "instructions": scores(told),
            "answers": told["results"][0][0]["answers"], "languages": scores(spoken),
            "speed": speed}


def run(asked: argparse.Namespace) -> None:
    """Measure the models that have no results yet."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for pair in asked.models:
        name, _, file = pair.partition("=")
        kept = RESULTS / f"{name}.json"
        if not kept.exists():
            print(name, "...", flush=True)
            kept.write_text(json.dumps(behaviour(Path(file), asked), indent=1, ensure_ascii=False) + "\n", "utf-8")


def table() -> str:
    """A line for every model, the largest first, and below it bits per byte by language."""
    every = {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(RESULTS.glob("*.json"))}
    models = sorted(every.items(), key=lambda item: (item[0] != "original", -item[1]["bytes"]))
    lines = [["model", "MB", *INSTRUCTIONS, "tokens/s", "Wh per 1,000 tokens answered", "kWh a year",
              *(f"kg CO₂ a year, {country}" for country in COUNTRIES)]]
    for name, one in models:
        energy = one["speed"]["energy"]
        lines.append([name, f"{one['bytes'] / 1e6:.1f}",
                      *(f"{one['instructions'][''][measure][0]:.0%} ± {one['instructions'][''][measure][1]:.0%}"
                        for measure in INSTRUCTIONS),
                      f"{one['speed']['decode_tokens_per_s']:.0f}", f"{energy['decode_wh_per_1000_tokens']:.3g}",
                      f"{energy['year_kwh']:.3g}", *(f"{energy['year_co2_kg'][country]:.3g}" for country in COUNTRIES)])
    languages = [group for group in models[0][1]["languages"] if group]
    lines_of_languages = [["model", *languages]]
    for name, one in models:
        for measure, what, form in (("bits per byte", "", ".3f"), ("KL from reference", ", divergence", ".2g")):
            if name != "original" or not what:
                values = [one["languages"][language][measure][0] for language in languages]
                lines_of_languages.append([f"{name}{what}", *(f"{value:{form}}" for value in values)])
    return "\n\n".join("\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
                       for head, *rows in (lines, lines_of_languages))


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "write"))
    parser.add_argument("models", nargs="*", metavar="NAME=FILE.gguf")
    parser.add_argument("--reference", help="the original as a checkpoint")
    parser.add_argument("--windows", type=int, default=2, help="of each language")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    if asked.what == "run":
        run(asked)
    (RESULTS / "behaviour.md").write_text(table() + "\n", "utf-8")


if __name__ == "__main__":
    main()
