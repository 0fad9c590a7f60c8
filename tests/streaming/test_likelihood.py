"""Log-likelihoods of branching continuations against the resident model, one continuation at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.streaming import likelihood
from tsotsallm.streaming.likelihood import Tree, log_likelihoods

CPU = torch.device("cpu")


def random_trees(vocabulary: int, count: int = 12) -> list[Tree]:
    rng = random.Random(3)

    def draw(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocabulary) for _ in range(rng.randint(least, most)))

    return [Tree(draw(1, 60), tuple(draw(1, 20) for _ in range(rng.randint(1, 5)))) for _ in range(count)]


def test_branches_score_as_if_each_stood_alone(unlike_family_checkpoint: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(unlike_family_checkpoint)
    trees = random_trees(checkpoint.spec.vocabulary)
    monkeypatch.setattr(likelihood, "CHUNK_BYTES", 4 * checkpoint.spec.hidden * 400)     # several passes
    found = dict(log_likelihoods(View.of(checkpoint), trees, tmp_path, CPU))
    model = AutoModelForCausalLM.from_pretrained(unlike_family_checkpoint, dtype=torch.float32).eval()
    assert sorted(found) == list(range(len(trees)))
    for index, tree in enumerate(trees):
        for branch, got in zip(tree.branches, found[index], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([tree.prompt + branch])).logits[0, len(tree.prompt) - 1:-1].double()
            expected = logits.log_softmax(-1)[torch.arange(len(branch)), torch.tensor(branch)]
            torch.testing.assert_close(torch.tensor(got.tokens, dtype=torch.float64), expected, rtol=1e-4, atol=1e-4)
            assert got.greedy == bool((logits.argmax(-1) == torch.tensor(branch)).all())


def test_a_greedy_continuation_is_told_from_another(tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    prompt = (5, 9, 7)
    best = tuple(model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=0,
                                eos_token_id=None)[0, 3:].tolist())
    other = (*best[:2], (best[2] + 1) % 100, best[3])
    [(_, found)] = log_likelihoods(View.of(Checkpoint.open(tiny)), [Tree(prompt, (best, other))], tmp_path, CPU)
    assert [one.greedy for one in found] == [True, False]
