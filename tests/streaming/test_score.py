"""Streaming against resident transformers models of every family."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.evaluation.perplexity import Tail, evaluate_perplexity
from tsotsallm.streaming import score
from tsotsallm.streaming.backward import backward_sweep
from tsotsallm.streaming.corpus import Corpus, evaluation_windows
from tsotsallm.streaming.head import head_pieces
from tsotsallm.streaming.score import divergence, final_states, leave_one_out_losses, token_losses

CPU = torch.device("cpu")


def resident_losses(path: Path, corpus: Corpus, keep: list[int] | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for window in corpus.windows:
            logits = model(window[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return torch.cat(losses)


@pytest.fixture(scope="session")
def windows(text: Path) -> Corpus:
    from tests.conftest import byte_tokenizer

    return evaluation_windows(text.read_text()[:900], TextCodec(byte_tokenizer(), 256, "words"), 96, "words")


def test_streaming_loss_equals_the_resident_model(every_family_checkpoint: Path, windows: Corpus, tmp_path: Path) -> None:
    view = View.of(Checkpoint.open(every_family_checkpoint))
    states = final_states(view, windows, tmp_path / "states.f32", CPU)
    found = token_losses(view, [states], windows, CPU)[0]
    expected = resident_losses(every_family_checkpoint, windows)
    assert math.exp(found.mean()) == pytest.approx(math.exp(expected.mean()), rel=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_leave_one_out_equals_removing_each_layer_for_real(family_checkpoint: Path, windows: Corpus,
                                                            tmp_path: Path) -> None:
    from tsotsallm.compression import compress

    view = View.of(Checkpoint.open(family_checkpoint))
    base, without = leave_one_out_losses(view, windows, [0, 1, 3], tmp_path / "scratch", CPU)
    assert math.exp(base) == pytest.approx(math.exp(resident_losses(family_checkpoint, windows).mean()), rel=1e-4)
    for layer, loss in without.items():
        out = tmp_path / f"without-{layer}"
        compress(family_checkpoint, [{"layers": {"skip": [layer]}}], out)
        assert math.exp(loss) == pytest.approx(math.exp(resident_losses(out, windows).mean()), rel=1e-4)


def test_backward_sweep_equals_autograd(family_checkpoint: Path, windows: Corpus, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(family_checkpoint, dtype=torch.float32)
    count = sum(len(window) - 1 for window in windows.windows)
    for window in windows.windows:
        logits = model(window[None]).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum") / count).backward()
    view = View.of(Checkpoint.open(family_checkpoint))
    seen = []
    for index, gradients in backward_sweep(view, windows, tmp_path / "scratch", CPU):
        seen.append(index)
        for name, (_, gradient) in gradients.items():
            expected = model.model.layers[index].get_parameter(name).grad
            assert (gradient - expected).norm() <= 1e-4 * expected.norm(), (index, name)
    assert seen == [3, 2, 1, 0]


@pytest.mark.parametrize("rows_of_head", [8192, 50])
def test_divergence_equals_the_sum_over_the_vocabulary(tiny: Path, windows: Corpus, tmp_path: Path, rows_of_head: int,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "head_pieces", partial(head_pieces, most=rows_of_head))
    view = View.of(Checkpoint.open(tiny))
    other = view.reordered([0, 2, 3])
    states = final_states(other, windows, tmp_path / "a.f32", CPU)
    reference = final_states(view, windows, tmp_path / "b.f32", CPU)
    found = divergence(other, states, view, reference, windows, CPU)
    head = view.checkpoint.tensor("model.embed_tokens.weight").double()
    rows = [place for start, window in zip([0, 96, 192], windows.windows, strict=False) for place in
            range(start, start + len(window) - 1)]

    def log_probabilities(states: object) -> torch.Tensor:
        flat = torch.cat([states.read([index])[0] for index in range(len(windows.windows))])  # type: ignore[attr-defined]
        return (flat.double() @ head.mT).log_softmax(-1)[torch.cat([
            torch.arange(start, start + len(window) - 1) for start, window in _starts(windows)])]

    q, p = log_probabilities(states), log_probabilities(reference)
    torch.testing.assert_close(found.kl, (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.same_top, p.argmax(-1) == q.argmax(-1))
    top = p.argmax(-1, keepdim=True)
    torch.testing.assert_close(found.top_difference, (p.exp() - q.exp()).gather(1, top)[:, 0], rtol=1e-4, atol=1e-6)
    tail = Tail.of(found.kl, found.top_difference)
    assert tail.top_probability_rms == pytest.approx(float(found.top_difference.std(correction=0) ** 2
                                                           + found.top_difference.mean() ** 2) ** 0.5)
    assert sorted([tail.kl_median, tail.kl_99, tail.kl_999]) == [tail.kl_median, tail.kl_99, tail.kl_999]
    assert int((found.kl > tail.kl_99).sum()) == math.ceil(0.01 * (len(found.kl) - 1))
    assert rows


def _starts(corpus: Corpus) -> list[tuple[int, torch.Tensor]]:
    found, start = [], 0
    for window in corpus.windows:
        found.append((start, window))
        start += len(window)
    return found


def test_bits_per_byte_is_nats_per_byte_of_the_text(tiny: Path, text: Path) -> None:
    content = text.read_text()[:1000]
    found = evaluate_perplexity(Checkpoint.open(tiny), content, source="words", context=64)
    assert found.bits_per_byte == pytest.approx(found.loss * found.protocol.predicted_tokens / math.log(2) / 1000)


def test_rows_protocol_scores_each_line_alone(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    lines = ["first line", "", "a second, longer line"]
    together = evaluate_perplexity(checkpoint, "\n".join(lines), source="t", context=64, kind="rows")
    apart = [evaluate_perplexity(checkpoint, line, source="t", context=64, kind="rows") for line in (lines[0], lines[2])]
    total = sum(one.loss * one.protocol.predicted_tokens for one in apart)
    assert together.loss * together.protocol.predicted_tokens == pytest.approx(total, rel=1e-6)


def test_protocols_that_differ_are_not_compared(tiny: Path, text: Path) -> None:
    from tsotsallm.errors import TsotsallmError

    checkpoint = Checkpoint.open(tiny)
    content = text.read_text()[:600]
    short = evaluate_perplexity(checkpoint, content, source="t", context=32)
    long = evaluate_perplexity(checkpoint, content, source="t", context=64)
    with pytest.raises(TsotsallmError, match="context"):
        short.protocol.compare(long.protocol)
    short.protocol.compare(short.protocol)
