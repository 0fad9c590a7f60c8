"""Greedy continuation of batches, in memory and by sweeps, against transformers' own one by one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.engine.generation import batches_by_length, generate_resident
from tsotsallm.engine.resident import resident
from tsotsallm.streaming import generate
from tsotsallm.streaming.generate import generate_by_sweeps

CPU = torch.device("cpu")
NEW = 12
END = 7


def prompts(vocabulary: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(1, 50))] for _ in range(9)]


def ends_with_seven(tokens: Sequence[int]) -> bool:
    return tokens[-1] % 16 == END


def one_by_one(checkpoint: Path, asked: list[list[int]]) -> list[list[int]]:
    model = resident(Checkpoint.open(checkpoint))
    found = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
                             eos_token_id=None)[0, len(prompt):].tolist()
        ends = [place for place, _ in enumerate(new) if ends_with_seven(new[:place + 1])]
        found.append(new[:ends[0] + 1] if ends else new)
    return found


def test_batches_continue_as_each_prompt_alone(unlike_family_checkpoint: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(unlike_family_checkpoint)
    asked = prompts(checkpoint.spec.vocabulary)
    expected = one_by_one(unlike_family_checkpoint, asked)
    assert dict(generate_resident(resident(checkpoint), asked, NEW, ends_with_seven)) == dict(enumerate(expected))
    monkeypatch.setattr(generate, "CACHE_BYTES", 200 * checkpoint.spec.kv_bytes_per_token(4))     # several turns
    found = dict(generate_by_sweeps(View.of(checkpoint), asked, NEW, ends_with_seven, tmp_path, CPU))
    assert found == dict(enumerate(expected))
    assert not list(tmp_path.iterdir())


def test_batches_hold_like_lengths_and_every_prompt() -> None:
    asked = [[0] * length for length in (5, 900, 30, 31, 4096, 1, 5000, 29)]
    batches = batches_by_length(asked)
    assert sorted(index for batch in batches for index in batch) == list(range(len(asked)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(asked[index]) for index in batch) <= 4096
