"""Measure one model's speed and memory in a process of its own:

    python -m tsotsallm.evaluation.speed MODEL DEVICE [COUNTRY]
    python -m tsotsallm.evaluation.speed FILE.gguf THREADS

Checkpoints run in transformers, GGUF files in llama.cpp. With a country code, power is measured or estimated as well.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.engine.resident import resident
from tsotsallm.machine import peak_rss_bytes, rss_bytes

PROMPT_TOKENS, NEW_TOKENS = 128, 32
ROUNDS = 3


def lengths(spec: ModelSpec) -> tuple[int, int]:
    """(prompt tokens, new tokens) of a round; fewer where the model knows fewer positions."""
    new = min(NEW_TOKENS, max(spec.context // 4, 1))
    return min(PROMPT_TOKENS, spec.context - new), new


def round_of(model: Any, spec: ModelSpec, device: str) -> Callable[[], tuple[float, float]]:
    """A function that runs one prompt and decodes; it returns (seconds to the first token, seconds for the rest)."""
    prompt_tokens, new_tokens = lengths(spec)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(spec.vocabulary, (1, prompt_tokens), generator=generator).to(device)

    def synchronise() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    @torch.inference_mode()
    def one_round() -> tuple[float, float]:
        synchronise()
        began = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        synchronise()
        between = time.perf_counter()
        for _ in range(new_tokens):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        synchronise()
        return between - began, time.perf_counter() - between

    return one_round


def median_times(one_round: Callable[[], tuple[float, float]], rounds: int = ROUNDS) -> tuple[float, float]:
    """Medians of both times over `rounds` rounds, after one round that warms up."""
    one_round()
    first, rest = zip(*(one_round() for _ in range(rounds)), strict=True)
    return statistics.median(first), statistics.median(rest)


def gguf_speed(path: Path, threads: int, country: str | None = None) -> dict[str, object]:
    """Speed of llama.cpp on a prompt of random tokens and the tokens after it, by its own clock; medians of three rounds.

    With a country, also the power that it takes.
    """
    from tsotsallm.engine.llama import Llama

    before = rss_bytes()
    engine = Llama(path, threads=threads)
    new = min(NEW_TOKENS, max(engine.context // 4, 1))
    size = min(PROMPT_TOKENS, engine.context - new)
    prompt = torch.randint(len(engine.tokens), (size,), generator=torch.Generator().manual_seed(0)).tolist()
    began = time.perf_counter()
    engine.timed(prompt[:1], 1)
    load_s = time.perf_counter() - began
    first_s, rest_s = median_times(lambda: engine.timed(prompt, new))
    peak = peak_rss_bytes()
    power = None if country is None else power_of(country, lambda: engine.timed(prompt, new))
    return {"prompt_tokens": size, "new_tokens": new, "load_s": round(load_s, 3), "first_token_s": first_s,
            "prefill_tokens_per_s": size / first_s, "decode_tokens_per_s": new / rest_s, "peak_rss_bytes": peak,
            "grown_bytes": peak - before, "device": "llama.cpp", "threads": threads, "power": power}


def power_of(country: str, one_round: Callable[[], object]) -> dict[str, object]:
    """The power that a round takes, as the fields of `energy.Power`."""
    from tsotsallm.evaluation.energy import measure_power

    return asdict(measure_power(country, one_round))


def main() -> None:
    """Measure the model that the command line names and print the fields of `cost.Speed` as JSON."""
    name, device, country = sys.argv[1], sys.argv[2], next(iter(sys.argv[3:]), None)
    if device.isdigit():           # threads of llama.cpp
        print(json.dumps(gguf_speed(Path(name), int(device), country)))
        return
    before = rss_bytes()
    checkpoint = Checkpoint.open(name)
    began = time.perf_counter()
    model = resident(checkpoint, torch.float32, device)
    load_s = time.perf_counter() - began
    one_round = round_of(model, checkpoint.spec, device)
    first_s, rest_s = median_times(one_round)
    peak = peak_rss_bytes()
    power = None if country is None else power_of(country, one_round)
    prompt_tokens, new_tokens = lengths(checkpoint.spec)
    print(json.dumps({
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "load_s": round(load_s, 3), "first_token_s": first_s,
        "prefill_tokens_per_s": prompt_tokens / first_s, "decode_tokens_per_s": new_tokens / rest_s,
        "grown_bytes": peak - before, "peak_rss_bytes": peak, "device": device,
        "threads": torch.get_num_threads(), "power": power}))


if __name__ == "__main__":
    main()
