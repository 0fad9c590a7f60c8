"""Peak memory and seconds of LoRA steps on random checkpoints of real shape, each in a process of its own.

    python benchmarks/training.py llama-3.2-1b --work DIR [--layers N] [--batch 4] [--window 512] [--steps 1]
    python benchmarks/training.py --model MODEL --work DIR

Streamed LoRA on the 16-bit base, and, with --resident, LoRA and QLoRA (4 bit) with the model in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from scale import SHAPES, make_checkpoint, random_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--model", type=Path, help="a real model instead of a random one")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--resident", action="store_true")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    source = asked.model or asked.work / asked.shape
    if not source.exists():
        make_checkpoint(source, SHAPES[asked.shape], asked.layers)
    text = asked.work / "text.txt"
    random_text(text, words=8 * asked.window)
    ways = [("LoRA, streamed", source, "streamed")]
    if asked.resident:
        packed = asked.work / f"{source.stem}-packed"
        if not packed.exists():
            subprocess.run([sys.executable, "-m", "tsotsallm", "compress", str(source), "rtn:4", "-o", str(packed),
                            "--json"], check=True, capture_output=True)
        ways += [("LoRA, resident", source, "resident"), ("QLoRA, resident", packed, "resident")]
    for name, model, engine in ways:
        out = asked.work / "out"
        for leftover in (out, out.with_name("out.partial")):
            shutil.rmtree(leftover, ignore_errors=True)
        stage = {"adapt": {"engine": engine, "steps": asked.steps, "batch": asked.batch, "window": asked.window,
                           "held_out": 0.01, "validate_every": asked.steps, "merge": False}}
        code = ("import json, resource, sys, tsotsallm\n"
                "model, recipe, out, text = sys.argv[1:]\n"
                "tsotsallm.compress(model, json.loads(recipe), out, calibration=text, force=True)\n"
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)")
        found = subprocess.run([sys.executable, "-c", code, str(model), json.dumps([stage]), str(out), str(text)],
                               capture_output=True, text=True, check=False)
        if found.returncode:
            sys.exit(found.stderr)
        curve = json.loads((out / "training-1-adapt.json").read_text())["samples"][0]["curve"]
        peak = int(found.stdout.split()[-1]) / 1e9
        print(f"{name:16} peak {peak:.3f} GB, {curve['elapsed_s']:.1f} s for {asked.steps} steps of {asked.batch} x "
              f"{asked.window} tokens and 2 looks, loss {curve['held_out'][0][1]:.3f}", flush=True)
    shutil.rmtree(asked.work)


if __name__ == "__main__":
    main()
