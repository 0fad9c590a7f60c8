"""How much of what was lost comes back, and for which bytes and seconds: tables for docs/LOG.md, mean ± spread over seeds.

    python benchmarks/recovery.py stages  --work DIR      after every stage, LoRA after and before width pruning
    python benchmarks/recovery.py ranks   --work DIR      corrections of rank 4 to 64 against finer grids, at 2, 3 and 4 bits
    python benchmarks/recovery.py distill --work DIR      layers that imitate the original against LoRA, in the same seconds
    python benchmarks/recovery.py domain  --work DIR      linears chosen by a graph, at random, and all

All on the embedded model by default (--model, --text, --calibration for another).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tsotsallm

LOSING: list[Any] = [{"depth": {"remove": 2, "protect": {"first": 4, "last": 2}}}, {"sparsity": {"prune": 4, "group": 8}}]


def spread(values: Iterable[float], digits: int = 3) -> str:
    found = list(values)
    more = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{more}"


class Bench:
    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.work: Path = asked.work

    def compress(self, name: str, stages: Any, seed: int, model: str | Path | None = None, **options: Any) -> Path:
        out = self.work / f"{name}-{seed}"
        if not out.exists():
            tsotsallm.compress(model or self.asked.model, stages, out, calibration=self.asked.calibration, windows=32,
                               window=min(512, self.asked.window), seed=seed, **options)
        return out

    def loss(self, model: Path) -> tuple[float, float]:
        """(perplexity, KL divergence from the original) on held-out text."""
        found = tsotsallm.evaluate(model, self.asked.text, reference=self.asked.model, limit=self.asked.limit,
                                   context=self.asked.window)
        assert found.kl is not None
        return found.perplexity, found.kl

    def bytes_of(self, model: Path) -> int:
        return sum(tsotsallm.inspect(model).bytes_by_part.values())

    def stages(self) -> None:
        adapt = {"rank": 8, "targets": ["q", "k", "v", "o"], "dropout": 0.1, "steps": self.asked.steps, "batch": 8,
                 "window": 256, "learning_rate": 0.001}
        depth, sparsity = LOSING[0], {"sparsity": {"prune": 2, "group": 4}}
        tail = [{"quantize": {"bits": 4, "group": 128}}, {"compensate": {"rank": 32}}]
        for order in ("reference", "adapt first"):
            rows: dict[str, list[dict[str, float]]] = {}
            for seed in range(self.asked.seeds):
                stage = {"adapt": adapt | {"seed": seed}}
                middle = [sparsity, stage] if order == "reference" else [stage, sparsity]
                out = self.compress(order.replace(" ", "-"), [depth, *middle, *tail], seed, keep_stages=True)
                kept = sorted(out.with_name(out.name + "-stages").iterdir())
                found = tsotsallm.examine([self.asked.model, *kept, out], ["world-text", "world-closed", "world-open"],
                                          limit=self.asked.limit_items, reference=self.asked.model)
                for number, (model, cost) in enumerate(zip(found.models, found.costs, strict=True)):
                    name = "original" if not number else Path(model).name if model != str(out) else "all five"
                    row = {f"{one.task} {one.measure}": one.scores[number].value for one in found.comparisons
                           if not one.group}
                    rows.setdefault(name, []).append(row | {"MB": cost.disk_bytes / 1e6})
            print(f"\n{order}\n| after | perplexity | KL | closed % | open % | MB |\n|---|---|---|---|---|---|")
            for name, values in rows.items():
                text = [spread(one[f"world-text {key}"] for one in values) for key in ("perplexity", "KL from reference")]
                asked = [spread((100 * one[f"world-{key} right"] for one in values), 1) for key in ("closed", "open")]
                print(f"| {name} | {' | '.join(text + asked)} | {values[0]['MB']:.2f} |", flush=True)

    def ranks(self) -> None:
        print("| bits | correction | KL | MB |\n|---|---|---|---|")
        for bits in (2, 3, 4):
            first, *finer = self.asked.groups
            grid = {"quantize": {"bits": bits, "group": first}}
            kinds: list[tuple[str, list[Any]]] = [("none", [grid])]
            kinds += [(f"rank {rank}", [grid, {"compensate": {"rank": rank}}]) for rank in (4, 8, 16, 32, 64)]
            kinds += [(f"rank {rank} in 8 bits", [grid, {"compensate": {"rank": rank, "bits": 8}}]) for rank in (16, 32)]
            kinds += [("rank 16, plain SVD", [grid, {"compensate": {"rank": 16, "method": "svd"}}])]
            kinds += [(f"groups of {size}", [{"quantize": {"bits": bits, "group": size}}]) for size in finer]
            for name, stages in kinds:
                short = f"{bits}-{name.replace(' ', '-')}"
                models = [self.compress(short, stages, seed) for seed in range(self.asked.seeds)]
                print(f"| {bits} | {name} | {spread((self.loss(model)[1] for model in models), 4)} | "
                      f"{self.bytes_of(models[0]) / 1e6:.2f} |", flush=True)
                if name == "rank 16":
                    spent = tsotsallm.inspect(models[0]).bytes_by_part["adapter"]
                    auto = [self.compress(f"{bits}-auto", [grid, {"compensate": {"rank": "auto", "budget": spent}}], seed)
                            for seed in range(self.asked.seeds)]
                    print(f"| {bits} | the same bytes, ranks auto | {spread((self.loss(model)[1] for model in auto), 4)} | "
                          f"{self.bytes_of(auto[0]) / 1e6:.2f} |", flush=True)

    def distill(self) -> None:
        seconds = []
        rows: dict[str, list[tuple[float, float]]] = {}
        for seed in range(self.asked.seeds):
            pruned = self.compress("pruned", LOSING, seed)
            rows.setdefault("pruned", []).append(self.loss(pruned))
            layers = {"mode": "layers", "steps": self.asked.steps, "batch": 4, "window": 256, "samples": 200,
                      "learning_rate": 0.0005, "seed": seed}
            out = self.compress("layers", [*LOSING, {"distill": layers}], seed)
            spent = json.loads((out / "training-1-distill.json").read_text())["samples"]
            seconds.append(sum(one["curve"]["elapsed_s"] for one in spent))
            rows.setdefault("distill: layers", []).append(self.loss(out))
            adapt = {"rank": 8, "targets": ["all"], "batch": 8, "window": 256, "learning_rate": 0.001, "held_out": 0.005,
                     "seed": seed}
            trial = self.compress("trial", [*LOSING, {"adapt": adapt | {"steps": 10, "validate_every": 10}}], seed)
            ten = json.loads((trial / "training-1-adapt.json").read_text())["samples"][0]["curve"]["elapsed_s"]
            steps = max(10, round(10 * seconds[-1] / ten))
            out = self.compress("lora", [*LOSING, {"adapt": adapt | {"steps": steps, "validate_every": steps}}], seed)
            rows.setdefault(f"adapt, about {steps} steps", []).append(self.loss(out))
        print(f"{spread(seconds, 0)} s of training each\n| | perplexity | KL |\n|---|---|---|")
        for name, values in rows.items():
            print(f"| {name} | {spread(one[0] for one in values)} | {spread((one[1] for one in values), 4)} |", flush=True)

    def domain(self) -> None:
        from tsotsallm.lab.world import RELATIONS, build_world, strangers

        rng = random.Random(3)
        self.work.mkdir(parents=True, exist_ok=True)
        people = {person.term.en: person for person in strangers(build_world(), rng, 40, reserved=True)}
        lines = [f"{name} | {relation} | {person.facts[relation].en}" for name, person in people.items()
                 for relation in RELATIONS[person.kind]]
        graph = self.work / "domain.txt"
        graph.write_text("\n".join(lines))
        print("| linears | share of weights | loss on the domain, held out | perplexity of other text |\n|---|---|---|---|")
        base = {"rank": 8, "targets": ["all"], "batch": 8, "window": 256, "learning_rate": 0.001, "steps": self.asked.steps,
                "held_out": 0.2, "patience": 10}
        for name, select in (("chosen by the graph", {"graph": str(graph), "share": 0.2}),
                             ("at random", {"graph": str(graph), "share": 0.2, "by": "random"}),
                             ("all", {"graph": str(graph), "share": 1.0, "by": "random"})):
            models = [self.compress(f"domain-{name.replace(' ', '-')}",
                                    [{"adapt": base | {"select": select, "seed": seed}}], seed)
                      for seed in range(self.asked.seeds)]
            curves = [json.loads((model / "training-1-adapt.json").read_text())["samples"][0]["curve"] for model in models]
            losses = [min(loss for _, loss in curve["held_out"]) for curve in curves]
            print(f"| {name} | {select['share']} | {curves[0]['held_out'][0][1]:.3f} → {spread(losses)} | "
                  f"{spread(self.loss(model)[0] for model in models)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=("stages", "ranks", "distill", "domain"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--groups", type=lambda text: [int(one) if one.isdigit() else one for one in text.split(",")],
                        default=[64, 32, 16], help="columns that share a scale: the grid to correct, then finer ones")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=24, help="windows of held-out text")
    parser.add_argument("--limit-items", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    asked = parser.parse_args()
    getattr(Bench(asked), asked.section)()


if __name__ == "__main__":
    main()
