"""Streamed scoring of multiple choice against the resident float32 model: seconds and peak memory, each in its own process.

    python benchmarks/scoring.py --items ITEMS.jsonl --text FOLDER [--work DIR] [--shape llama-3.2-1b] [--model MODEL]

ITEMS is HellaSwag (query, endings, label); the checkpoint is random, of real shape, with a byte-level BPE of 32,000
tokens learned from the text files in FOLDER, so that items have as many tokens as usual; --model takes a real one
instead. The resident model scores as
lm-evaluation-harness does: every choice with its prompt, in padded batches of like lengths. Both give the same sums.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

BATCH_TOKENS = 2048


def asked(items: Path, count: int) -> list[tuple[str, list[str]]]:
    from tsotsallm.evaluation.tasks import read_items, read_task

    return [(item.prompt, [f" {choice}" for choice in item.choices])
            for item in read_items(read_task("hellaswag"), items, limit=count)]


def learn_tokenizer(texts: Path, model: Path, tokens: int = 32_000) -> None:
    """Give the checkpoint a byte-level BPE learned from text files, in place of the one it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train([str(path) for path in sorted(texts.glob("*.txt"))], trainers.BpeTrainer(
        vocab_size=tokens, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)


def streamed(model: Path, items: Path, count: int, scratch: Path) -> list[float]:
    from tsotsallm.evaluation.task_run import open_examinee

    found = dict(open_examinee(model, scratch).likelihoods(asked(items, count)))
    return [score.total for index in range(len(found)) for score in found[index]]


def resident(model: Path, items: Path, count: int, scratch: Path) -> list[float]:
    import torch

    import tsotsallm
    from tsotsallm.evaluation.task_run import open_examinee

    one = open_examinee(model, scratch)
    pairs = [one.pair(prompt, choice) for prompt, choices in asked(items, count) for choice in choices]
    network, _ = tsotsallm.load(model)
    totals = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
    while order:
        longest = sum(map(len, pairs[order[0]])) - 1
        batch, order = order[:max(1, BATCH_TOKENS // longest)], order[max(1, BATCH_TOKENS // longest):]
        rows = [(pairs[index][0] + pairs[index][1])[:-1] for index in batch]
        ids = torch.tensor([list(row) + [0] * (longest - len(row)) for row in rows])
        with torch.inference_mode():
            logits = network(ids).logits
            for index, row, line in zip(batch, rows, logits, strict=True):
                continuation = pairs[index][1]
                log_p = line[len(row) - len(continuation):len(row)].log_softmax(-1)
                totals[index] = float(log_p.gather(1, torch.tensor(continuation)[:, None]).double().sum())
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("scoring"))
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--run", choices=("streamed", "resident"), help="used by the script itself")
    options = parser.parse_args()
    model = options.model or options.work / options.shape
    if options.run:
        from tsotsallm.machine import peak_rss_bytes

        began = time.perf_counter()
        way = streamed if options.run == "streamed" else resident
        totals = way(model, options.items, options.count, options.work / "scratch")
        print(json.dumps({"seconds": time.perf_counter() - began, "peak_rss_bytes": peak_rss_bytes(), "totals": totals}))
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from scale import SHAPES, make_checkpoint

    if not model.exists():
        make_checkpoint(model, SHAPES[options.shape], None)
        learn_tokenizer(options.text, model)
    found = {}
    for way in ("streamed", "resident"):
        out = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--run", way], capture_output=True, text=True,
                             check=True)
        found[way] = json.loads(out.stdout.splitlines()[-1])
        print(f"{way:9} {found[way]['seconds']:7.1f} s  peak {found[way]['peak_rss_bytes'] / 1e9:.2f} GB", flush=True)
    worst = max(abs(a - b) for a, b in zip(found["streamed"]["totals"], found["resident"]["totals"], strict=True))
    print(f"streamed / resident: time {found['streamed']['seconds'] / found['resident']['seconds']:.2f}, memory "
          f"{found['streamed']['peak_rss_bytes'] / found['resident']['peak_rss_bytes']:.2f}; largest difference of a "
          f"log-likelihood {worst:.2g} of {len(found['streamed']['totals'])}")


if __name__ == "__main__":
    main()
