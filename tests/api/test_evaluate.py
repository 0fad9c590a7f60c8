"""evaluate, against the same numbers from a transformers model in a plain loop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tsotsallm
from tsotsallm.errors import CorpusError, TsotsallmError


def windows(model: Path, text: str, context: int, limit: int) -> list[torch.Tensor]:
    """Without overlap, each with one BOS."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    step = context - 1
    return [torch.tensor([[tokenizer.bos_token_id, *ids[first:first + step]]]) for first in range(0, limit * step, step)]


def test_perplexity_and_divergence_are_those_of_a_plain_loop(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "rtn:3:32", tmp_path / "out")
    found = tsotsallm.evaluate(tmp_path / "out", text, reference=tiny, context=48, limit=5)
    whole = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    small = tsotsallm.load(tmp_path / "out")[0]
    losses, others, divergences, same = [], [], [], []
    for ids in windows(tiny, text.read_text(), 48, 5):
        with torch.no_grad():
            before, after = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in (whole, small))
        right = ids[0, 1:, None]
        losses.append(-after.gather(1, right))
        others.append(-before.gather(1, right))
        divergences.append((before.exp() * (before - after)).sum(-1))
        same.append(before.argmax(-1) == after.argmax(-1))
    assert found.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss), rel=1e-9)
    assert found.reference_perplexity == pytest.approx(math.exp(float(torch.cat(others).mean())), rel=1e-5)
    assert found.kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-3)
    assert found.same_top_token == pytest.approx(float(torch.cat(same).double().mean()), abs=1 / 235)
    assert (found.windows, found.protocol.predicted_tokens, found.protocol.bos) == (5, 235, True)


def test_a_line_by_itself_is_a_row(tiny: Path, tmp_path: Path) -> None:
    lines = ["first line", "", "a second one", "   ", "third"]
    (tmp_path / "rows.txt").write_text("\n".join(lines))
    found = tsotsallm.evaluate(tiny, tmp_path / "rows.txt", protocol="rows", context=64)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    total = count = 0.0
    for line in lines:
        if line.strip():
            ids = tokenizer(line, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert found.loss == pytest.approx(total / count, rel=1e-4)
    assert found.protocol.predicted_tokens == count


def test_what_cannot_be_compared_is_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="give a text to evaluate on"):
        tsotsallm.evaluate(tiny)
    with pytest.raises(TsotsallmError, match="the text into other tokens"):
        tsotsallm.evaluate(tiny, text, reference="embedded", context=48, limit=1)
    one = tsotsallm.evaluate(tiny, text, context=48, limit=2)
    with pytest.raises(TsotsallmError, match="different context"):
        one.protocol.compare(tsotsallm.evaluate(tiny, text, context=32, limit=2).protocol)
