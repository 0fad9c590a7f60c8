"""What `fit` finds against the best single technique and the best of random recipes of the same size.

    python benchmarks/fit_quality.py --work DIR [--only single,random,fit] [--shares 60,40,25,15] [--devices siracusa]
    python benchmarks/fit_quality.py --work DIR --table          what DIR holds, as tables and a picture

Budgets are shares of the checkpoint's bytes, or a device's; sizes are those of GGUF files. All models are compared on the
same text, which neither calibration nor `fit` sees: of the embedded world's test text or of --text. Random recipes draw
layers, their importance, neurons, order of stages, grid, grid of the embeddings and method, and take 85 to 100%
of the budget; all are looked at on little text, and the best three are made anew with GPTQ's best settings and compared on
all of it (their lot is chosen on the very text that they are compared on, which favours them). Everything is kept in
DIR/results.jsonl, and not done again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tsotsallm
from tsotsallm.checkpoint.gguf_layout import Labels, layout_of, vocabulary_entries
from tsotsallm.checkpoint.gguf_vocabulary import read_vocabulary
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.errors import RecipeError
from tsotsallm.evaluation.perplexity import evaluate_perplexity
from tsotsallm.export.gguf import export_gguf
from tsotsallm.fit.target import target_of
from tsotsallm.lab.texts import world_text
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.planning import whole_spec
from tsotsallm.stages.allocation import MIXED
from tsotsallm.stages.neurons import Neurons
from tsotsallm.store import Store
from tsotsallm.streaming.corpus import read_text
from tsotsallm.units import human_bytes

Recipe = list[dict[str, Any]]
LITTLE, BEST = 8, 3
LEAST = 0.85
CHARACTERS = 2_600
"""Of the world's text for a window that is compared on, more than 512 tokens have."""
WIDTHS = (0.0, 0.125, 0.25, 1 / 3, 0.5, 0.625)
IMPORTANCES = ("perplexity", "cosine", "taylor", "magnitude")


class Bench:
    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.work = asked, asked.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.checkpoint = Checkpoint.open(asked.model)
        self.spec = whole_spec(self.checkpoint)
        self.vocabulary = tuple(vocabulary_entries(read_vocabulary(self.checkpoint.codec)))
        enough = CHARACTERS * asked.compared
        self.text = world_text(test=True, characters=enough) if asked.text is None else read_text(asked.text)
        self.store = Store(self.work / "store", 6 << 30)
        self.results = self.work / "results.jsonl"
        total = sum(path.stat().st_size for path in self.checkpoint.directory.glob("*.safetensors"))
        self.budgets = {f"{share}%": int(total * share / 100) for share in asked.shares}
        self.budgets |= {name: target_of(self.cache_bytes, device=name, size=None, faster_than=None).bytes
                         for name in asked.devices}

    @property
    def cache_bytes(self) -> int:
        return 2 * 2 * self.spec.layers * self.spec.kv_heads * self.spec.head_dim

    def known(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.results.read_text("utf-8").splitlines()] if self.results.exists() else []

    def note(self, **found: Any) -> dict[str, Any]:
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print({key: value for key, value in found.items() if key != "rounds"}, flush=True)
        return found

    def done(self, **which: Any) -> dict[str, Any] | None:
        return next((one for one in self.known() if all(one.get(key) == value for key, value in which.items())), None)

    def loss(self, model: Checkpoint, windows: int) -> dict[str, Any]:
        kept = self.work / "reference"
        kept.mkdir(exist_ok=True)
        found = evaluate_perplexity(model, self.text, source="test text", context=512, limit=windows, kept=kept,
                                    reference=self.checkpoint, name="it", reference_name=self.asked.model)
        return {"kl": found.kl, "kl_error": found.kl_standard_error, "perplexity": found.perplexity,
                "reference_perplexity": found.reference_perplexity, "tokens": found.protocol.predicted_tokens}

    def made(self, recipe: Recipe, windows: int, **keys: Any) -> dict[str, Any]:
        """Apply, export, compare; what is known is not done again."""
        if (before := self.done(**keys, windows=windows)) is not None:
            return before
        out, began = self.work / f"model-{keys['kind']}", time.monotonic()
        shutil.rmtree(out, ignore_errors=True)
        tsotsallm.compress(self.asked.model, recipe, out, windows=self.asked.windows, window=512, store=self.store,
                           calibration=self.asked.calibration)
        model = Checkpoint.open(out)
        file = self.work / f"{keys['kind']}.gguf"
        export_gguf(model, file)
        size = file.stat().st_size
        file.unlink()
        made = time.monotonic() - began
        found = self.loss(model, windows)
        return self.note(**keys, windows=windows, recipe=recipe, bytes=size, made_s=round(made, 1),
                         evaluated_s=round(time.monotonic() - began - made, 1), **found)

    # -- one technique alone ------------------------------------------------------------------------------------------

    def singles(self, budget: int) -> Iterator[tuple[str, Recipe]]:
        yield "a grid for every matrix", [{"quantize": {"file_bytes": budget - 2048}}]
        fitting = [grid for grid in MIXED if self.size(self.spec, grid, grid) <= budget]
        for name in fitting[-1:]:
            yield f"all on {name}", [{"quantize": {"grid": name, "ends": name}}]
        for removed in range(1, self.spec.layers - 1):
            if self.size(self.spec.with_layers(self.spec.layers - removed), None, None) <= budget:
                yield f"{removed} layers fewer", [{"depth": {"remove": removed, "protect": {"first": 1, "last": 1}}}]
                break
        for share in (number / 24 for number in range(1, 24)):
            stage = Neurons(feed_forward=share, multiple=32)
            if self.size(stage.spec_after(self.spec), None, None) <= budget:
                yield f"{share:.0%} fewer neurons", [{"neurons": {"feed_forward": share, "multiple": 32}}]
                break

    def size(self, spec: ModelSpec, grid: str | None, ends: str | None) -> int:
        """Bytes of the GGUF file with all linears on one grid, or in 16 bits."""
        def type_of(name: str | None, columns: int) -> str:
            fits = GgmlGrid(name).fitting(columns) if name is not None else None
            return "f16" if fits is None else fits.type

        grids = {f"{layer}.{name}": type_of(grid, columns) for layer in range(spec.layers)
                 for name, (_, columns) in linear_shapes(spec, layer).items()}
        grids |= dict.fromkeys(("model.embed_tokens", "lm_head"), type_of(ends, spec.hidden))
        return layout_of(spec, self.vocabulary, Labels("it"), grids).total_bytes

    def single(self, name: str, budget: int) -> None:
        for technique, recipe in self.singles(budget):
            try:
                self.made(recipe, self.asked.compared, kind="single", budget=name, technique=technique)
            except RecipeError as error:        # the technique alone does not make it that small
                print(f"{name}, {technique}: {error}", flush=True)

    # -- random recipes -----------------------------------------------------------------------------------------------

    def draw(self, rng: random.Random, budget: int) -> Recipe:
        """A recipe whose file takes from nine tenths of the budget to all of it."""
        for _ in range(100_000):
            removed, share = rng.randrange(self.spec.layers // 2 + 1), rng.choice(WIDTHS)
            grid, ends, method = rng.choice((*MIXED, None)), rng.choice((*MIXED, None)), rng.choice(("gptq", "rtn"))
            spec = self.spec.with_layers(self.spec.layers - removed)
            stages: Recipe = []
            if removed:
                stages.append({"depth": {"remove": removed, "importance": rng.choice(IMPORTANCES)}})
            if share:
                stages.append({"neurons": {"feed_forward": share, "multiple": 32}})
                spec = Neurons(feed_forward=share, multiple=32).spec_after(spec)
            rng.shuffle(stages)
            if grid is not None:
                stages.append({"quantize": {"grid": grid, "method": method} | ({"ends": ends} if ends is not None else {})})
            if stages and LEAST * budget <= self.size(spec, grid, ends if grid is not None else None) <= budget:
                return stages
        raise SystemExit(f"no recipe of {budget} bytes in 100000 draws")

    def at_random(self, name: str, budget: int) -> None:
        rng = random.Random(f"{self.asked.seed}/{name}")
        tried: list[dict[str, Any]] = []
        recipes: list[Recipe] = []
        for _ in range(40 * self.asked.recipes):        # few recipes have some sizes
            if len(recipes) < self.asked.recipes and (recipe := self.draw(rng, budget)) not in recipes:
                recipes.append(recipe)
        for number, recipe in enumerate(recipes):
            [(stage, fields)] = recipe[-1].items()
            quick = fields | ({"couple": False, "passes": 0} if fields.get("method") == "gptq" else {})
            tried.append(self.made([*recipe[:-1], {stage: quick}], LITTLE, kind="random", budget=name, number=number))
        for rank, one in enumerate(sorted(tried, key=lambda one: one["kl"])[:BEST]):
            self.made(recipes[one["number"]], self.asked.compared, kind="best", budget=name, rank=rank)

    # -- fit ----------------------------------------------------------------------------------------------------------

    def fit(self, name: str, budget: int) -> None:
        out = self.work / f"fit-{name.rstrip('%')}"
        same = {"kind": "fit", "budget": name, "windows": self.asked.compared}
        if self.done(**same) is not None:
            return
        if (before := self.done(kind="fit", budget=name)) is not None:      # compared on less text
            self.note(**before | same | self.loss(Checkpoint.open(out / "model"), self.asked.compared))
            return
        how = {"device": name} if name in self.asked.devices else {"size": budget}
        fitted, _ = tsotsallm.fit(self.asked.model, out, **how, windows=self.asked.windows, minutes=self.asked.minutes,
                                  calibration=self.asked.calibration, say=lambda line: print(line, flush=True))
        model = Checkpoint.open(fitted.path)
        self.note(**same, recipe=fitted.best.recipe, structure=fitted.best.structure,
                  bytes=fitted.gguf.stat().st_size, made_s=fitted.seconds, rounds=fitted.plain()["rounds"],
                  holds=fitted.holds, **self.loss(model, self.asked.compared))

    # -- what was found -----------------------------------------------------------------------------------------------

    def table(self) -> None:
        known = [one for one in self.known() if one.get("windows") in (LITTLE, self.asked.compared)]
        print("| budget | fit: bytes, KL, perplexity | best single technique | best random recipe | minutes: fit, random |")
        print("|---|---|---|---|---|")
        for name, budget in self.budgets.items():
            mine = [one for one in known if one["budget"] == name]
            found = [self.best([one for one in mine if one["kind"] == kind and one["bytes"] <= budget])
                     for kind in ("fit", "single", "best")]
            spent = sum(one["made_s"] + one["evaluated_s"] for one in mine if one["kind"] in ("random", "best")) / 60
            cells = ["" if one is None else f"{human_bytes(one['bytes'])}, {one['kl']:.5f} ± {one['kl_error']:.5f}, "
                     f"{one['perplexity']:.4f}" + (f" ({one['technique']})" if "technique" in one else "") for one in found]
            over = " OVER" if any(one["kind"] == "fit" and one["bytes"] > budget for one in mine) else ""
            minutes = f"{found[0]['made_s'] / 60:.0f}" if found[0] else ""
            print(f"| {name} = {human_bytes(budget)}{over} | {' | '.join(cells)} | {minutes}, {spent:.0f} |")
        for one in known:
            for row in one.get("rounds", ()):
                print(f"{one['budget']:>9} round {row['number']}: {row['structure']:32} predicted {row['predicted']:.5f} "
                      f"measured {row['measured']:.5f}")

    @staticmethod
    def best(some: list[dict[str, Any]]) -> dict[str, Any] | None:
        return min(some, key=lambda one: one["kl"]) if some else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text")
    parser.add_argument("--calibration")
    parser.add_argument("--only", default="single,fit,random")
    parser.add_argument("--shares", default="60,40,25,15", type=lambda text: [int(one) for one in text.split(",") if one])
    parser.add_argument("--devices", default="siracusa", type=lambda text: [one for one in text.split(",") if one])
    parser.add_argument("--recipes", type=int, default=50)
    parser.add_argument("--windows", type=int, default=16, help="of calibration text")
    parser.add_argument("--compared", type=int, default=240, help="windows of 512 tokens that models are compared on")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    bench = Bench(parser.parse_args())
    if bench.asked.table:
        bench.table()
        return
    steps = {"single": bench.single, "random": bench.at_random, "fit": bench.fit}
    for step in bench.asked.only.split(","):
        for name, budget in bench.budgets.items():
            steps[step](name, budget)


if __name__ == "__main__":
    main()
