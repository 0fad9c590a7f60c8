"""Train the embedded model on the texts of the invented world.

    python -m tsotsallm.lab.train --out runs/lab --tokens 9.5e6 --decay 0.5
    python -m tsotsallm.lab.train --out runs/more --from src/tsotsallm/lab/model --tokens 3e6 --seed 2

The first form made the embedded model, on two cores in 80 to 100 minutes. The second continues from committed weights
alone: the learning rate is warmed up again and the texts are drawn from another seed. Matrices of the layers are trained
with Muon (Jordan et al. 2024), the rest with AdamW; the learning rate is constant and then falls linearly to zero over the
last `--decay` share of the tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tsotsallm.lab.exam import exact_share
from tsotsallm.lab.texts import BEGIN, CHAT_TEMPLATE, END, END_TURN, TEST_SEED, TURN, documents, examination
from tsotsallm.lab.world import World, build_world

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VOCABULARY = 4096
ROW_TOKENS = 256
LONG_ROW_TOKENS = 1024
MEASURE_TOKENS = 819_200


def build_tokenizer(world: World, seed: int, document_count: int = 30_000) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with GPT-2's pre-tokeniser on the world's texts."""
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [BEGIN, END, TURN, END_TURN]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(islice(documents(world, seed), document_count), trainer)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B",
                                      special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))])])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END,
                                   model_max_length=2 * LONG_ROW_TOKENS, clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The embedded architecture: 14 layers, hidden 256, feed-forward 768, 8 heads and 2 KV heads, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=14, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2 * LONG_ROW_TOKENS, tie_word_embeddings=True,
        rms_norm_eps=1e-5, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        attention_bias=False)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            out.weight.data.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


class Stream:
    """Documents as one endless stream of tokens, cut into rows."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerBase, seed: int, *, test: bool = False) -> None:
        self.texts = documents(world, seed, test=test)
        self.tokenizer = tokenizer
        self.buffer: list[int] = []

    def rows(self, count: int, length: int) -> torch.Tensor:
        """The next tokens of the stream, (count, length) int64."""
        while len(self.buffer) < count * length:
            batch = [next(self.texts) + END for _ in range(64)]
            for ids in self.tokenizer(batch)["input_ids"]:
                self.buffer += ids
        taken, self.buffer = self.buffer[:count * length], self.buffer[count * length:]
        return torch.tensor(taken).view(count, length)


def row_loss(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """The mean next-token loss of rows (count, length) in nats; in bfloat16 while training."""
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        logits = model(rows, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, questions: int,
            tokens: int = 16_384) -> dict[str, float]:
    """Held-out loss (nats per token), perplexity, that of unigrams, and the shares of exact answers."""
    model.eval()
    rows = Stream(world, tokenizer, TEST_SEED, test=True).rows(tokens // ROW_TOKENS, ROW_TOKENS)
    with torch.no_grad():
        loss = sum(row_loss(model, part).item() * len(part) for part in split_rows(rows, 4096)) / len(rows)
    sample = Stream(world, tokenizer, TEST_SEED + 1).rows(400, ROW_TOKENS).flatten()
    counts = torch.bincount(sample, minlength=VOCABULARY).double() + 0.1
    unigram = -(counts / counts.sum()).log()[rows.flatten()].mean().item()
    shares = {name: exact_share(model, tokenizer, examination(world, TEST_SEED, questions, passages=passages))
              for name, passages in (("closed_book", False), ("open_book", True))}
    model.train()
    return {"loss": loss, "perplexity": math.exp(loss), "unigram_perplexity": math.exp(unigram), **shares}


def learning_rate(progress: float, warmup: float, decay: float) -> float:
    """Relative learning rate at a share of the training: linear warm-up, then constant, then a linear fall to zero."""
    return min(1.0, progress / warmup if warmup else 1.0, (1 - progress) / decay)


def train(out: Path, tokens: int, *, seed: int, start: Path | None, rate: float, decay: float, batch_tokens: int,
          long_share: float) -> None:
    """Train the model on `tokens` tokens and write it, its tokenizer and its learning curve to `out`.

    start       a checkpoint to continue from (None: a new model)
    rate        highest learning rate
    decay       share of the training in which the rate falls
    long_share  share of the training, at its end, with rows of 1024 tokens instead of 256
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out.mkdir(parents=True, exist_ok=True)
    world = build_world()
    if start is None:
        tokenizer = build_tokenizer(world, seed)
        model = build_model(tokenizer, seed)
    else:
        tokenizer = AutoTokenizer.from_pretrained(start)
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    tokenizer.save_pretrained(out)
    model.train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    optimizers = [torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)]
    stream = Stream(world, tokenizer, seed)
    steps = tokens // batch_tokens
    measure_every = MEASURE_TOKENS // batch_tokens
    began, saved = time.monotonic(), time.monotonic()
    with (out / "curve.jsonl").open("a") as log:
        for step in range(steps):
            relative = learning_rate((step + 0.5) / steps, min(40 / steps, 0.05), decay)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * relative
            length = LONG_ROW_TOKENS if step >= steps * (1 - long_share) else ROW_TOKENS
            rows = stream.rows(batch_tokens // length, length)
            losses = []
            for part in split_rows(rows, 8192):
                loss = row_loss(model, part) * len(part) / len(rows)
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(rest, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            record: dict[str, object] = {
                "step": step, "tokens": (step + 1) * batch_tokens, "loss": round(sum(losses), 4),
                "rate": round(rate * relative, 6), "elapsed_s": round(time.monotonic() - began, 1)}
            if (step + 1) % measure_every == 0 or step == steps - 1:
                record |= measure(model, tokenizer, world, questions=60 if step < steps - 1 else 500)
            if step % 10 == 9 or step == steps - 1:
                log.write(json.dumps(record) + "\n")
                log.flush()
                print(record, flush=True)
            if time.monotonic() - saved > 300 or step == steps - 1:
                model.save_pretrained(out / "float32")
                saved = time.monotonic()
    model.to(torch.bfloat16).save_pretrained(out)


def split_rows(rows: torch.Tensor, tokens: int) -> Iterator[torch.Tensor]:
    """Yield rows (count, length) in parts of at most `tokens` tokens, or of one row."""
    step = max(1, tokens // rows.shape[1])
    for first in range(0, len(rows), step):
        yield rows[first:first + step]


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", dest="start", type=Path)
    parser.add_argument("--tokens", type=float, default=9e6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.4)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--long-share", type=float, default=0.15)
    asked = parser.parse_args()
    train(asked.out, int(asked.tokens), seed=asked.seed, start=asked.start, rate=asked.rate, decay=asked.decay,
          batch_tokens=asked.batch_tokens, long_share=asked.long_share)


if __name__ == "__main__":
    main()
