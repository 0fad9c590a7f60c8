"""What fewer bits do to the embedded model: perplexity, KL divergence, questions from memory and from a passage.

    python benchmarks/embedded_bits.py --work /tmp/bits

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
    asked = parser.parse_args()
    world = build_world()
    exams = {name: examination(world, EXAM_SEED, asked.questions, passages=name == "open book")
             for name in ("closed book", "open book")}
    rows = []
    for name, recipe in RECIPES.items():
        path: str | Path = "embedded"
        if recipe is not None:
            path = asked.work / name.replace(" ", "-")
            tsotsallm.compress("embedded", recipe, path, windows=32, window=512)
        found = tsotsallm.evaluate(path, reference="embedded", limit=40)
        model, tokenizer = tsotsallm.load(path)
        shares = {exam: exact_share(model, tokenizer, questions) for exam, questions in exams.items()}
        rows.append({"model": name, "bytes": tsotsallm.inspect(path).bytes, "perplexity": round(found.perplexity, 4),
                     "kl": round(found.kl or 0.0, 5), "same_top_token": found.same_top_token, **shares})
        print(f"{name:8} {rows[-1]['bytes'] / 1e6:6.2f} MB  perplexity {found.perplexity:7.3f}  KL {found.kl:.4f}  "
              + "  ".join(f"{exam} {share:.1%} ± {(share * (1 - share) / asked.questions) ** 0.5:.1%}"
                          for exam, share in shares.items()), flush=True)
    (asked.work / "bits.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
