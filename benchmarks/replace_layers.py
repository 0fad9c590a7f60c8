"""What a linear map for a run of layers saves: KL and perplexity with and without it, at 10, 20 and 30% of the layers.

    python benchmarks/replace_layers.py MODEL [--text FILE --calibration FILE_OR_DIR] [--windows 16] [--window 512]
                                        [--evaluated 40] [--shares 0.1,0.2,0.3] [--importance cosine,perplexity]

MODEL may be `embedded`, which brings its own texts. Every run is removed once with a map and once without; both are compared
with the original on the same windows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import tsotsallm
from tsotsallm.checkpoint.reader import Checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--evaluated", type=int, default=40)
    parser.add_argument("--shares", default="0.1,0.2,0.3")
    parser.add_argument("--importance", default="cosine,perplexity")
    parser.add_argument("--damp", type=float)
    asked = parser.parse_args()
    layers = Checkpoint.open(asked.model).spec.layers
    damping = {} if asked.damp is None else {"damp": asked.damp}
    original = tsotsallm.evaluate(asked.model, asked.text, limit=asked.evaluated)
    print(f"{asked.model}: {layers} layers, perplexity {original.perplexity:.3f} on {original.windows} windows; calibrated "
          f"on {asked.windows} windows of {asked.window} tokens, damp {asked.damp or 'chosen'}")
    print("removed  chosen by    layers   KL removed  KL replaced   perplexity removed  replaced")
    with tempfile.TemporaryDirectory() as folder:
        for share in map(float, asked.shares.split(",")):
            for importance in asked.importance.split(","):
                count = max(1, round(share * layers))
                name = f"{count}-{importance}"
                with_map, without = Path(folder, f"{name}-replaced"), Path(folder, f"{name}-removed")
                stage = {"replace": {"remove": count, "importance": importance, **damping}}
                tsotsallm.compress(asked.model, [stage], with_map, calibration=asked.calibration, windows=asked.windows,
                                   window=asked.window)
                [choice] = json.loads((with_map / "tsotsallm.json").read_text("utf-8"))["choices"]
                tsotsallm.compress(asked.model, [{"layers": {"order": choice["order"]}}], without)
                removed, replaced = (tsotsallm.evaluate(path, asked.text, reference=asked.model, limit=asked.evaluated)
                                     for path in (without, with_map))
                run = f"{choice['removed'][0]}-{choice['removed'][-1]}"
                print(f"{share:>7.0%}  {importance:<11}  {run:<7}  {removed.kl:>10.4f}  {replaced.kl:>11.4f}   "
                      f"{removed.perplexity:>18.3f}  {replaced.perplexity:>8.3f}", flush=True)


if __name__ == "__main__":
    main()
