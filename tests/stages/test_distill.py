"""Distillation: layers against the original's hidden states, logits against torch's own KL divergence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import tsotsallm
from tests.compressing import Stop, same_bytes, stop_after
from tests.stages.test_adapt import curves
from tests.training.test_gradients import instructions
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import TsotsallmError
from tsotsallm.streaming.head import HeadPiece
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.targets import Targets, head_gradient, head_losses
from tsotsallm.training.imitation import Imitation, Original
from tsotsallm.training.loop import Schedule
from tsotsallm.training.objectives import TeacherTokens
from tsotsallm.training.samples import Samples

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"windows": 4, "window": 64}


def distill(**fields: Any) -> dict[str, Any]:
    return {"distill": {"steps": 8, "batch": 4, "window": 48, "learning_rate": 0.003, "samples": 40} | fields}


def test_the_original_walks_beside_as_transformers_runs_it(tiny: Path, tmp_path: Path) -> None:
    corpus = instructions((20, 20, 7), seed=1)
    original = Original(View.of(Checkpoint(tiny)), corpus, tmp_path, CPU)
    whole = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for layer in (0, 2, 3, 4):
        states = original.advance(layer, lambda _what, _share: None)
        assert [path.name for path in tmp_path.glob("*")] == [states.path.name]
        for number, window in enumerate(corpus.windows):
            with torch.no_grad():
                wanted = whole.model(window[None], output_hidden_states=True).hidden_states
            if layer < 4:               # transformers gives the last one after the final norm
                torch.testing.assert_close(states.read([number]), wanted[layer], rtol=1e-4, atol=1e-5)


def test_layers_learn_to_give_what_the_original_gives(tiny: Path, text: Path, tmp_path: Path) -> None:
    pruned = [{"depth": {"remove": 1, "protect": {}}}, {"sparsity": {"prune": 2, "group": 4}}]
    tsotsallm.compress(tiny, pruned, tmp_path / "pruned", calibration=text, **SMALL)
    for weights in ("all", "lora"):
        tsotsallm.compress(tiny, [*pruned, distill(weights=weights)], tmp_path / weights, calibration=text, **SMALL)
        [layers] = curves(tmp_path / weights)
        assert [one["layer"] for one in layers] == [0, 1, 2]
        assert all(min(loss for _, loss in one["curve"]["held_out"]) < one["curve"]["held_out"][0][1] for one in layers)
        before, after = (tsotsallm.evaluate(tmp_path / name, text, reference=tiny, context=64).kl
                         for name in ("pruned", weights))
        assert before is not None
        assert after is not None
        assert after < before
        for layer in range(3):
            for name, values in Checkpoint(tmp_path / weights).layer(layer).items():
                if values.ndim == 2:
                    assert int((values.view(-1, 4) == 0).sum(1).min()) >= 2, name


def test_a_packed_model_learns_by_factors_beside_it(tiny: Path, text: Path, tmp_path: Path) -> None:
    stages = ["rtn:2:32", distill(weights="lora", rank=8)]
    tsotsallm.compress(tiny, stages, tmp_path / "out", calibration=text, **SMALL)
    tsotsallm.compress(tiny, stages[:1], tmp_path / "rtn")
    better, worse = (tsotsallm.evaluate(tmp_path / name, text, reference=tiny, context=64).kl for name in ("out", "rtn"))
    assert better is not None
    assert worse is not None
    assert better < worse
    one, other = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "rtn")
    assert all(torch.equal(record.read(), one.records[name].read()) for name, record in other.records.items())


def in_pieces(states: torch.Tensor, head: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of final states, and the gradient of their sum by weight, with the head in pieces of 100 tokens."""
    def pieces() -> Any:
        return iter([HeadPiece(first, head[first:first + 100]) for first in range(0, len(head), 100)])

    read = states.detach().__getitem__
    losses, sums = head_losses(read, pieces, targets)
    gradient = torch.zeros(states.shape)
    head_gradient(read, lambda rows, values: gradient.index_add_(0, rows, values), pieces, targets, sums)
    return losses, gradient


def test_the_loss_to_a_teacher_and_its_gradient_are_those_of_torch(tiny: Path, tmp_path: Path) -> None:
    samples = Samples(instructions((20, 9), seed=2), instructions((12,), seed=3))
    teacher = TeacherTokens(View.of(Checkpoint(tiny)), samples, 256, 2.0, tmp_path / "t.safetensors", CPU)
    batch = samples.training.take([1, 0])
    targets = teacher.targets(batch, [1, 0], held_out=False)
    states = torch.randn(29, 64, requires_grad=True)
    head = torch.randn(256, 64)
    losses, gradient = in_pieces(states, head, targets)
    whole = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    logits, start, rows = [], 0, []
    for window, learned in zip(batch.windows, batch.learned or (), strict=True):
        with torch.no_grad():
            logits.append(whole(window[None]).logits[0, :-1][learned[1:]])
        rows.append(start + learned[1:].nonzero()[:, 0])
        start += len(window)
    wanted = (torch.cat(logits) / 2).softmax(-1)
    own = (states[torch.cat(rows)] @ head.mT / 2).log_softmax(-1)
    expected = 4 * functional.cross_entropy(own.exp().log(), wanted, reduction="none")
    torch.testing.assert_close(losses, expected.detach().double(), rtol=1e-4, atol=1e-4)
    expected.mean().backward()
    torch.testing.assert_close(gradient, states.grad, rtol=1e-3, atol=1e-6)
    few = TeacherTokens(View.of(Checkpoint(tiny)), samples, 5, 1.0, tmp_path / "few.safetensors", CPU)
    some = few.targets(batch, [1, 0], held_out=False)
    best = torch.cat(logits).topk(5, -1)
    torch.testing.assert_close(some.shares, best.values.softmax(-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(some.tokens, best.indices)


def test_learning_a_teachers_logits_brings_the_model_nearer_to_it(tiny: Path, text: Path, tmp_path: Path) -> None:
    found = []
    for name, more in (("plain", []), ("taught", [distill(mode="logits", steps=30, rank=4, temperature=2.0)])):
        tsotsallm.compress(tiny, ["wanda:2:4", *more], tmp_path / name, calibration=text, **SMALL)
        found.append(tsotsallm.evaluate(tmp_path / name, text, reference=tiny, context=64).kl)
    assert found[0] is not None
    assert found[1] is not None
    assert found[1] < found[0]


@pytest.mark.parametrize("fields", [{}, {"mode": "logits"}])
def test_stopped_distillation_goes_on_to_the_same_bytes(tiny: Path, text: Path, tmp_path: Path,
                                                        fields: dict[str, Any]) -> None:
    stages = ["wanda:2:4", distill(steps=3, **fields)]
    tsotsallm.compress(tiny, stages, tmp_path / "whole", calibration=text, **SMALL)
    for most in (30, 20, 5):
        with pytest.raises(Stop):
            tsotsallm.compress(tiny, stages, tmp_path / "cut", calibration=text, progress=stop_after(most), **SMALL)
    tsotsallm.compress(tiny, stages, tmp_path / "cut", calibration=text, **SMALL)
    assert same_bytes(tmp_path / "whole", tmp_path / "cut")
    one, other = (json.loads((tmp_path / name / "training-1-distill.json").read_text())["samples"]
                  for name in ("whole", "cut"))
    assert [entry["curve"]["loss"] for entry in one] == [entry["curve"]["loss"] for entry in other]


def test_what_cannot_be_distilled_is_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    for stages, message in (
            (["rtn:4:32", distill()], "made codes of them"),
            ([{"layers": {"order": [0, 2, 1, 3]}}, distill()], "do not stand in its order"),
            ([distill(samples=1)], "samples is 1"),
            ([distill(temperature=0.0)], "temperature is 0.0"),
            ([distill(mode="logits", top=0)], "top is 0"),
            ([distill(mode="words")], "did you mean|known"),
            ([distill(teacher=str(tmp_path / "none"))], "does not exist"),
            ([distill(mode="logits", teacher="embedded")], "they must be the same")):
        with pytest.raises(TsotsallmError, match=message):
            tsotsallm.compress(tiny, stages, tmp_path / "out", calibration=text, **SMALL)


def test_states_of_windows_of_several_lengths_are_read_one_by_one(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "s.f32", [3, 5], 2)
    states.write([0], torch.ones(1, 3, 2))
    states.write([1], torch.full((1, 5, 2), 2.0))
    assert states.read([1]).shape == (1, 5, 2)


def test_targets_of_some_windows_are_those_windows_alone(tiny: Path) -> None:
    corpus = instructions((9, 4, 12), seed=5)
    targets = Targets.next_tokens(corpus)
    some = targets.of_windows(corpus, [2, 0])
    alone = Targets.next_tokens(corpus.take([2, 0]))
    assert torch.equal(some.rows, alone.rows)
    assert torch.equal(some.tokens, alone.tokens)
    assert float(some.weights[0]) == pytest.approx(1 / len(targets))


def test_fewer_samples_than_are_held_out_are_few(tiny: Path, tmp_path: Path) -> None:
    """`samples` says how many windows are used, however many the data holds out."""
    samples = Samples(instructions((20,) * 30, seed=1), instructions((20,) * 32, seed=2))
    for most, trained in ((8, 6), (2, 1), (32, 24), (40, 8), (200, 30)):
        imitation = Imitation(View.of(Checkpoint(tiny)), [0, 1, 3], samples.at_most(most), Schedule(),
                              tmp_path / str(most), CPU, trainee=None, sparse=False)
        assert imitation.trained_windows == trained
        assert len(imitation.corpus.windows) == min(most, trained + 32)
