"""Measure one model's speed and memory in a process of its own:

    python -m tsotsallm.evaluation.speed MODEL DEVICE PROMPT_TOKENS NEW_TOKENS [COUNTRY]

With a country's code, power is measured or estimated as well.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict

ROUNDS = 3


def main() -> None:
    import torch

    from tsotsallm.checkpoint.reader import Checkpoint
    from tsotsallm.engine.resident import resident
    from tsotsallm.machine import peak_rss_bytes

    model_name, device, country = sys.argv[1], sys.argv[2], sys.argv[5:]
    prompt_tokens, new_tokens = int(sys.argv[3]), int(sys.argv[4])
    checkpoint = Checkpoint.open(model_name)
    began = time.perf_counter()
    model = resident(checkpoint, torch.float32, device)
    load_s = time.perf_counter() - began
    generator = torch.Generator().manual_seed(0)
    context = checkpoint.spec.context
    new_tokens = min(new_tokens, max(context // 4, 1))
    prompt_tokens = min(prompt_tokens, context - new_tokens)
    prompt = torch.randint(checkpoint.spec.vocabulary, (1, prompt_tokens), generator=generator).to(device)

    def synchronise() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    @torch.inference_mode()
    def one_round() -> tuple[float, float]:
        """Seconds to the first token, and for the tokens after it."""
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

    one_round()     # warms up
    first, rest = zip(*(one_round() for _ in range(ROUNDS)), strict=True)
    first_s, rest_s = statistics.median(first), statistics.median(rest)
    peak = peak_rss_bytes()
    power = None
    if country:
        from tsotsallm.evaluation.energy import measure_power

        power = asdict(measure_power(country[0], one_round))
    print(json.dumps({
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "load_s": round(load_s, 3), "first_token_s": first_s,
        "prefill_tokens_per_s": prompt_tokens / first_s, "decode_tokens_per_s": new_tokens / rest_s,
        "peak_rss_bytes": peak, "device": device, "threads": torch.get_num_threads(), "power": power}))


if __name__ == "__main__":
    main()
