"""Grams that weigh tokens and follow the original, against naive loops; sensitivities against resident autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tsotsallm
from tsotsallm.calibration import Calibration, calibration_corpus
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.numerics.gptq import visiting_order
from tsotsallm.streaming import statistics
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.sensitivity import token_weights, weights_of
from tsotsallm.streaming.statistics import Gram
from tsotsallm.streaming.sweep import SweepOptions, TwoStates, embed_corpus, sweep

CPU = torch.device("cpu")


@pytest.fixture
def corpus(family_checkpoint: Path, text: Path) -> Corpus:
    return calibration_corpus(Checkpoint.open(family_checkpoint), Calibration(str(text), 4, 40))


def test_sensitivities_are_those_of_autograd(family_checkpoint: Path, corpus: Corpus, tmp_path: Path) -> None:
    view = View.of(Checkpoint.open(family_checkpoint))
    token_weights(view, corpus, tmp_path / "kept", tmp_path / "scratch", CPU)
    assert not (tmp_path / "scratch").exists()
    model, _ = tsotsallm.load(family_checkpoint)
    squares: dict[str, torch.Tensor] = {}
    names = [f"model.layers.{layer}.{name}" for layer in range(view.spec.layers)
             for name in ("self_attn.o_proj", "mlp.down_proj")]
    metrics: dict[str, torch.Tensor] = {}

    def note(name: str, gradient: torch.Tensor) -> None:
        squares[name] = gradient.square().mean(-1)
        metrics[name] = gradient.mT @ gradient

    for name in names:
        model.get_submodule(name).register_full_backward_hook(
            lambda _module, _inputs, outputs, name=name: note(name, outputs[0].flatten(0, 1)))
    ids = torch.stack(corpus.windows)
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name in names:
        metric = metrics[name] / metrics[name].diagonal().mean()
        layer, linear = name.removeprefix("model.layers.").split(".", 1)
        torch.testing.assert_close(weights_of(tmp_path / "kept", int(layer))[f"{linear}.outputs"].float(), metric, rtol=5e-3,
                                   atol=2e-3)
    for name in names:
        expected = (squares[name] / squares[name].mean()).clamp(max=50).sqrt()
        layer, linear = name.removeprefix("model.layers.").split(".", 1)
        torch.testing.assert_close(weights_of(tmp_path / "kept", int(layer))[linear], expected, rtol=1e-3, atol=1e-4)


def test_a_weighed_and_following_sweep_is_the_naive_one(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Layer 0 is damaged by the caller; layer 1 sees what that did beside what it was."""
    checkpoint = Checkpoint.open(tiny)
    view, found = View.of(checkpoint), calibration_corpus(checkpoint, Calibration(str(text), 3, 32))
    weights = torch.rand(96, generator=torch.Generator().manual_seed(0))
    pairs = [TwoStates(tmp_path / name, [32] * 3, view.spec.hidden) for name in ("a", "b")]
    for states in pairs:
        embed_corpus(view, found, states.inputs_of(0))
    model, _ = tsotsallm.load(tiny)
    damaged, _ = tsotsallm.load(tiny)
    with torch.no_grad():
        damaged.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    inputs: dict[str, torch.Tensor] = {}
    for name, one in (("original", model), ("damaged", damaged)):
        one.model.layers[1].mlp.down_proj.register_forward_pre_hook(
            lambda _module, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1).double()))
        with torch.no_grad():
            one(torch.stack(found.windows))
    options = SweepOptions(originals=pairs[1], weights=lambda _index: {"mlp.down_proj": weights})
    for visit in sweep(view, pairs[0], observe=True, device=CPU, options=options):
        if visit.index == 0:
            visit.frame.linear("mlp.up_proj").weight.data.mul_(0.5)
        if visit.index == 1:
            gram = visit.gram_of("mlp.down_proj")
            break
    now, weighed = inputs["damaged"], inputs["damaged"] * weights.double()[:, None]
    matrix, lag = weighed.mT @ now, (inputs["original"] - now).mT @ weighed
    weight = checkpoint.layer(1)["mlp.down_proj.weight"]
    assert gram.lag is None                     # one linear with fewer outputs than inputs: what it makes of the lag is kept
    assert gram.moved is not None
    torch.testing.assert_close(gram.matrix.double(), matrix, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gram.moved.double(), weight.double() @ lag, rtol=1e-2, atol=1e-3)
    gram.factor(0.01, "as stored", lambda diagonal: visiting_order(diagonal, False))
    damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    expected = weight.double() @ lag @ torch.linalg.inv(damped)
    torch.testing.assert_close(gram.followed(weight, 0.01, "as stored").double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("alone", [False, True])
def test_following_answers_the_least_squares_question(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "ROWS_SOLVED", 4)
    generator = torch.Generator().manual_seed(3)
    now = torch.randn(300, 24, generator=generator)
    before = now + 0.3 * torch.randn(300, 24, generator=generator)
    weight = torch.randn(10, 24, generator=generator)
    gram = Gram(24, CPU, follows=True, follower=weight if alone else None)
    gram.add(now, None, before)
    gram.factor(0.0, "falling", lambda diagonal: visiting_order(diagonal, True))
    best = torch.linalg.lstsq(now, before @ weight.mT).solution.mT
    answer = gram.followed(weight, 0.0, "falling")
    torch.testing.assert_close(weight + answer, best, rtol=1e-3, atol=1e-3)
    assert torch.equal(gram.followed(weight, 0.0, "falling", last=True), answer)
    assert gram.moved is None


@pytest.mark.parametrize("damp", [0.0, 0.01, 0.3])
def test_products_do_not_depend_on_who_asked_before(damp: float) -> None:
    """A factor of another damping may have taken the matrix's memory."""
    generator = torch.Generator().manual_seed(4)
    inputs, columns = torch.randn(200, 24, generator=generator), torch.randn(24, 5, generator=generator)
    matrix = inputs.double().mT @ inputs.double()
    expected = (matrix + damp * matrix.diagonal().mean() * torch.eye(24, dtype=torch.float64)) @ columns.double()
    for last in (False, True):
        gram = Gram(24, CPU)
        gram.add(inputs)
        assert gram.factor(0.05, "falling", lambda diagonal: visiting_order(diagonal, True), last=last).damping > 0
        torch.testing.assert_close(gram.times(columns, damp).double(), expected, rtol=1e-4, atol=1e-3)
