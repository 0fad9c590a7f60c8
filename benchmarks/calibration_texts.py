"""Which text is best to calibrate on: sources and amounts, compared on texts of other kinds, and on conversations.

    python benchmarks/calibration_texts.py --work DIR [--model MODEL] [--recipe gptq:4:64] [--windows 16,64] [--only SOURCE]
    python benchmarks/calibration_texts.py --work DIR --languages             what calibration in a language is worth
    python benchmarks/calibration_texts.py --table [--languages]              what there is, as Markdown

The model is SmolLM2-135M-Instruct unless given. Sources: novels, web text, both by halves, conversations (problems of GSM8K
with their solutions, in the chat template), novels and conversations by halves, and what the model writes itself. They are
compared by the KL divergence from the original on WikiText-2, on web text that no source holds, in French and in Swahili,
and on the original's own answers to the packaged requests. Finished rows are kept among the results and not repeated.

With --languages the sources are novels in English, the second halves of the Universal Declaration of Human Rights in twelve
languages, both by halves, and what the model writes itself; models are compared on the first halves, language by language.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tsotsallm.api.export import to_huggingface
from tsotsallm.checkpoint.gguf_place import gguf_path
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.evaluation.examination import examine
from tsotsallm.evaluation.perplexity import evaluate_perplexity

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import measured
from benchmarks.peers import read_json, write_json
from tests.real_model import real_model

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("TSOTSALLM_SHARED", HERE.parents[1] / "shared"))
NOVELS = ("dracula.txt", "moby_dick.txt", "pride_and_prejudice.txt", "sherlock_holmes.txt")
WINDOW, CONTEXT, LIMIT = 512, 512, 20
CONVERSATIONS = "conversations"
Record = dict[str, Any]


def sources(work: Path) -> dict[str, str]:
    """Name -> what `--calibration` takes; files that are made of others are written to `work`."""
    data = SHARED / "data"
    web = (data / "calibration" / "ewt_web_text.txt").read_text("utf-8")
    (work / "web.txt").write_text(web[:len(web) // 2], "utf-8")
    (work / "web-test.txt").write_text(web[len(web) // 2:], "utf-8")
    chats = work / "chats.jsonl"
    with (data / "gsm8k" / "test.jsonl").open(encoding="utf-8") as lines, chats.open("w", encoding="utf-8") as out:
        for line in map(json.loads, lines):
            turns = [{"role": "user", "content": line["question"]}, {"role": "assistant", "content": line["answer"]}]
            out.write(json.dumps({"messages": turns}) + "\n")
    novels = work / "novels"
    novels.mkdir(exist_ok=True)
    for name in NOVELS:
        shutil.copyfile(data / "calibration" / name, novels / name)
    return {"novels": str(novels), "web": f"{work}/web.txt", "novels and web": f"{novels}:0.5,{work}/web.txt:0.5",
            "conversations": str(chats), "novels and conversations": f"{novels}:0.5,{chats}:0.5", "self": "self"}


def languages(work: Path) -> tuple[dict[str, str], dict[str, Path]]:
    """Sources of calibration in one language and in many, and the texts that models are compared on by language."""
    for part in ("spoken", "spoken-test"):
        (work / part).mkdir(exist_ok=True)
    tests: dict[str, Path] = {}
    for path in sorted((SHARED / "data" / "multilingual").glob("udhr_*.txt")):
        text, name = path.read_text("utf-8"), path.stem.removeprefix("udhr_").capitalize()
        (work / "spoken" / path.name).write_text(text[len(text) // 2:], "utf-8")
        tests[name] = work / "spoken-test" / path.name
        tests[name].write_text(text[:len(text) // 2], "utf-8")
    novels, spoken = sources(work)["novels"], f"{work}/spoken"
    return {"English novels": novels, "twelve languages": spoken, "novels and languages": f"{novels}:0.5,{spoken}:0.5",
            "self": "self"}, tests


def texts(work: Path) -> dict[str, Path]:
    """The texts that models are compared on."""
    data = SHARED / "data"
    return {"WikiText-2": data / "wikitext-2-raw" / "wiki.test.raw", "web text": work / "web-test.txt",
            "French": data / "multilingual" / "udhr_french.txt", "Swahili": data / "multilingual" / "udhr_swahili.txt"}


def row(source: Path, recipe: str, calibration: list[str], tests: dict[str, Path], work: Path) -> Record:
    """Compress and compare; what it took, KL divergence with its error on every text, and the divergence on answers."""
    out = work / "model"
    shutil.rmtree(out, ignore_errors=True)
    taken = measured.run([sys.executable, "-m", "tsotsallm", "compress", source, recipe, "-o", out, *calibration],
                         log=work / "log.txt")
    original, model = Checkpoint.open(source), Checkpoint.open(out)
    found: Record = {}
    for name, path in tests.items():
        score = evaluate_perplexity(model, path.read_text("utf-8"), source=name, context=CONTEXT, limit=LIMIT,
                                    kept=work / "reference", reference=original)
        found[name] = {"kl": score.kl, "error": score.kl_standard_error, "perplexity": score.perplexity,
                       "windows": score.windows}
    [[answers]] = examine([out], [CONVERSATIONS], reference=source).results
    score = next(one for one in answers.scores if one.measure == "KL from reference" and not one.group)
    found["answers"] = {"kl": score.value, "error": score.standard_error}
    return {"seconds": taken.seconds, "peak_rss_bytes": taken.peak_rss_bytes, "texts": found}


def table(records: list[Record]) -> str:
    """One row for each source and amount."""
    names = list(records[0]["texts"])
    rows = [["recipe", "source", "windows", *names, "mean", "minutes"]]
    rows.append(["---"] * len(rows[0]))
    for one in records:
        cells = [f"{one['texts'][name]['kl']:.4f} ± {one['texts'][name]['error']:.4f}" for name in names]
        mean = sum(one["texts"][name]["kl"] for name in names) / len(names)
        rows.append([one["recipe"], one["source"], str(one["windows"]), *cells, f"{mean:.4f}", f"{one['seconds'] / 60:.1f}"])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def table_by_language(records: list[Record]) -> str:
    """One row for each recipe, that of the most bits first, and source; a column for each language."""
    names = [name for name in records[0]["texts"] if name != "answers"]
    rows = [["recipe", "calibrated on", *names]]
    rows.append(["---"] * len(rows[0]))
    for one in sorted(records, key=lambda one: (one["recipe"], one["windows"]), reverse=True):
        rows.append([one["recipe"], one["source"], *(f"{one['texts'][name]['kl']:.2f}" for name in names)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("calibration-texts"))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--recipe", default="gptq:4:64")
    parser.add_argument("--windows", default="16,64")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--languages", action="store_true", help="compare by language")
    asked = parser.parse_args()
    asked.results = asked.results or HERE / "results" / f"calibration-{'languages-' * asked.languages}smollm2"
    asked.results.mkdir(parents=True, exist_ok=True)
    if not asked.table:
        work = asked.work.absolute()
        (work / "reference").mkdir(parents=True, exist_ok=True)
        model = str(asked.model or real_model())
        source = work / "source" if gguf_path(model) is not None else Path(model)
        if not source.exists():
            to_huggingface(model, source)
        given_by_name, tests = languages(work) if asked.languages else (sources(work), texts(work))
        todo: list[tuple[str, str, int]] = [(name, given, int(count)) for count in asked.windows.split(",")
                                            for name, given in given_by_name.items() if not asked.only or name in asked.only]
        for name, given, count in todo:
            kept = asked.results / f"{asked.recipe.replace(':', '-')}-{name.replace(' ', '-')}-{count}.json"
            if not kept.exists():
                options = ["--calibration", given, "--windows", str(count), "--window", str(WINDOW)]
                write_json(kept, {"model": Path(model).name, "recipe": asked.recipe, "source": name, "windows": count,
                                  **row(source, asked.recipe, options, tests, work)})
                print(kept.read_text("utf-8"), flush=True)
    records = [read_json(path) for path in sorted(asked.results.glob("*.json"))]
    chosen = [one for one in records if asked.languages or one["recipe"] == asked.recipe]
    chosen.sort(key=lambda one: (one["windows"], one["source"]))
    print("no results yet" if not chosen else table_by_language(chosen) if asked.languages else table(chosen))


if __name__ == "__main__":
    main()
