"""The main job on the embedded model: make it smaller, then put before and after side by side."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import tsotsallm
from tsotsallm.cli.lines import progress_bar, step_bar
from tsotsallm.lab.exam import exact_share
from tsotsallm.lab.texts import examination
from tsotsallm.lab.world import build_world
from tsotsallm.units import human_bytes, human_seconds, plus_minus

RECIPE = "gptq:mixed:4.5"
EXAM_SEED = 1_000_003
QUESTIONS = 200


def main() -> None:
    began = time.monotonic()
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo") / "model"
    if out.exists():
        shutil.rmtree(out)
    print(f"Compressing the embedded model by the recipe {RECIPE!r}: a grid for every matrix, chosen by measured loss ...")
    bar, show = progress_bar(quiet=False)
    with bar:
        result = tsotsallm.compress("embedded", RECIPE, out, windows=8, window=256, progress=show)
    print(f"done in {human_seconds(result.elapsed_s)}; now measuring what was lost ...")
    before, after = tsotsallm.inspect("embedded"), tsotsallm.inspect(out)
    steps, tick = step_bar(quiet=False)
    with steps:
        scores = tsotsallm.evaluate(out, reference="embedded", limit=24, tick=tick)
    world = build_world()
    table = Table(title="Before and after", title_justify="left", title_style="bold")
    for number, name in enumerate(("", "original", "compressed")):
        table.add_column(name, justify="left" if number == 0 else "right")
    table.add_row("layers", str(before.layers), str(after.layers))
    table.add_row("parameters", f"{before.parameters:,}", f"{after.parameters:,}")
    table.add_row("weights on disk", human_bytes(result.bytes), human_bytes(result.result_bytes))
    table.add_row("bits per linear weight", f"{before.bits_per_linear_weight:.2f}", f"{after.bits_per_linear_weight:.2f}")
    table.add_row("KV cache per token", human_bytes(before.kv_cache_bytes_per_token),
                  human_bytes(after.kv_cache_bytes_per_token))
    table.add_row("perplexity, unseen text", f"{scores.reference_perplexity:.3f}", f"{scores.perplexity:.3f}")
    table.add_row("KL from original, nats per token", "0", plus_minus(scores.kl, scores.kl_standard_error))
    console = Console()
    models = [tsotsallm.load("embedded"), tsotsallm.load(out)]
    for label, passages in (("facts from memory", False), ("facts from a passage", True)):
        questions = examination(world, EXAM_SEED, QUESTIONS, passages=passages)
        print(f"asking both models {QUESTIONS} questions: {label} ...", flush=True)
        shares = [exact_share(model, tokenizer, questions) for model, tokenizer in models]
        errors = [(share * (1 - share) / QUESTIONS) ** 0.5 for share in shares]
        table.add_row(f"{label}, {QUESTIONS} questions",
                      *(f"{share:.1%} ± {error:.1%}" for share, error in zip(shares, errors, strict=True)))
    console.print(table)
    print("± is one standard error")
    print(f"took {human_seconds(time.monotonic() - began)} in all")
    print(f"model       {out}")
    print(f"model card  {out / 'README.md'}")
    print("what you can do next:")
    file = out.with_name("demo.gguf")
    print(f"  tsotsallm chat {out}     # ask it: Where was Sotis Selwick born?")
    print(f"  tsotsallm export {out} --gguf {file}       # {human_bytes(after.bytes)} for llama.cpp and Ollama")
    print(f"  tsotsallm report {out} -o {out.with_name('report.html')}     # a page with pictures (extra [report])")
    print("  tsotsallm fit YOUR-MODEL     # the best file for this computer; needs no other option")


if __name__ == "__main__":
    main()
