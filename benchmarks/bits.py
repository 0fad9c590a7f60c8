"""What fewer bits do to a model: perplexity, KL divergence; of the embedded one, questions from memory and from a passage.

    python benchmarks/bits.py --work DIR [--model MODEL --text TEXT --calibration TEXT] [--windows 32] [--window 512]

Every model is written by `tsotsallm compress`, read back, and asked the same questions; ± is one standard error of a share.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import tsotsallm
from tsotsallm.lab.exam import exact_share
from tsotsallm.lab.texts import examination
from tsotsallm.lab.world import build_world

RECIPES: dict[str, str | None] = {
    "16 bit": None, "rtn 4": "rtn:4:64", "rtn 3": "rtn:3:64", "rtn 2": "rtn:2:64",
    "gptq 4": "gptq:4:64", "gptq 3": "gptq:3:64", "gptq 2": "gptq:2:64"}
EXAM_SEED = 1_000_003


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bits"))
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text")
    parser.add_argument("--calibration")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    asked = parser.parse_args()
    world = build_world()
    exams = {name: examination(world, EXAM_SEED, asked.questions, passages=name == "open book")
             for name in ("closed book", "open book")} if asked.model == "embedded" else {}
    rows = []
    for name, recipe in RECIPES.items():
        path: str | Path = asked.model
        if recipe is not None:
            path = asked.work / name.replace(" ", "-")
            tsotsallm.compress(asked.model, recipe, path, calibration=asked.calibration, windows=asked.windows,
                               window=asked.window)
        found = tsotsallm.evaluate(path, asked.text, reference=asked.model, limit=40)
        shares = {exam: exact_share(*tsotsallm.load(path), questions) for exam, questions in exams.items()}
        rows.append({"model": name, "bytes": tsotsallm.inspect(path).bytes, "perplexity": round(found.perplexity, 4),
                     "kl": round(found.kl or 0.0, 5), "same_top_token": found.same_top_token, **shares})
        print(f"{name:8} {rows[-1]['bytes'] / 1e6:6.2f} MB  perplexity {found.perplexity:7.3f}  KL {found.kl:.4f}  "
              + "  ".join(f"{exam} {share:.1%} ± {(share * (1 - share) / asked.questions) ** 0.5:.1%}"
                          for exam, share in shares.items()), flush=True)
    (asked.work / "bits.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
