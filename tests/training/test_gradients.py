"""Gradients of the factors against autograd on whole models: PEFT's for plain bases, the definition's for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import tsotsallm
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.stages.adapt import Adapt
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.targets import Targets
from tsotsallm.training.engines import ResidentEngine, StreamedEngine
from tsotsallm.training.loop import Schedule, train
from tsotsallm.training.lora import LowRankTrainee as Trainee
from tsotsallm.training.objectives import Predicting
from tsotsallm.training.samples import Samples

CPU = torch.device("cpu")
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def instructions(lengths: tuple[int, ...], seed: int, vocabulary: int = 256) -> Corpus:
    """Windows of several lengths, of which only some tokens are learned."""
    generator = torch.Generator().manual_seed(seed)
    windows = tuple(torch.randint(2, vocabulary, (length,), generator=generator) for length in lengths)
    return Corpus(windows, "random", learned=tuple(torch.rand(len(window), generator=generator) > 0.4 for window in windows))


def trainee_of(model: Path, **fields: Any) -> Trainee:
    """Factors that already do something: B is not zero."""
    stage = Adapt(rank=3, targets=["q", "v", "o", "down"], seed=5, **fields)
    found = stage.prepare(View.of(Checkpoint(model)), sparse=False)
    generator = torch.Generator().manual_seed(9)
    for factors in found.adapted.factors.values():
        factors.left.data.normal_(0, 0.05, generator=generator)
    return found


def peft_of(model: Path, trainee: Trainee, alpha: float) -> Any:
    """The same factors in PEFT, on the resident model of the transformers library."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    targets = sorted({name.rpartition(".")[2] for _, name in trainee.adapted.factors})
    peft = get_peft_model(base, LoraConfig(r=3, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0))
    for (layer, name), factors in trainee.adapted.factors.items():
        linear = peft.base_model.model.model.layers[layer].get_submodule(name)
        linear.lora_A["default"].weight.data.copy_(factors.right.detach())
        linear.lora_B["default"].weight.data.copy_(factors.left.detach())
    return peft


def peft_loss(peft: Any, corpus: Corpus) -> torch.Tensor:
    """The mean over learned tokens, window by window."""
    assert corpus.learned is not None
    losses = []
    for window, learned in zip(corpus.windows, corpus.learned, strict=True):
        logits = peft(window[None]).logits[0, :-1]
        losses.append(functional.cross_entropy(logits[learned[1:]], window[1:][learned[1:]], reduction="none"))
    return torch.cat(losses).mean()


def test_gradients_resident_and_streamed_equal_pefts(every_family_checkpoint: Path, tmp_path: Path) -> None:
    corpus = instructions((20, 33, 33, 9), seed=1)
    targets = Targets.next_tokens(corpus)
    alpha = 6.0
    for streamed in (False, True):
        trainee = trainee_of(every_family_checkpoint, alpha=alpha)
        engine = StreamedEngine(trainee.base, trainee.adapted, CPU, tmp_path) if streamed else ResidentEngine(
            trainee.base, trainee.adapted, CPU)
        peft = peft_of(every_family_checkpoint, trainee, alpha)
        loss = peft_loss(peft, corpus)
        loss.backward()
        expected = pytest.approx(float(loss.detach()), rel=1e-5)
        assert engine.gradients(corpus, targets, 0) == expected
        assert float((engine.losses(corpus, targets) * targets.weights).sum()) == expected
        for (layer, name), factors in trainee.adapted.factors.items():
            linear = peft.base_model.model.model.layers[layer].get_submodule(name)
            for ours, theirs in ((factors.left, linear.lora_B["default"]), (factors.right, linear.lora_A["default"])):
                assert ours.grad is not None
                difference = float((ours.grad - theirs.weight.grad).norm() / theirs.weight.grad.norm())
                assert difference < 1e-4, (layer, name, difference)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_first_ten_losses_equal_a_loop_over_peft(tiny: Path, tmp_path: Path, streamed: bool) -> None:
    samples = Samples(instructions((30, 24, 17, 40, 12, 28), seed=2), instructions((20, 20), seed=3))
    schedule = Schedule(steps=10, batch=2, learning_rate=0.01, warmup=0.2, weight_decay=0.1, validate_every=20, seed=4)
    trainee = trainee_of(tiny)
    peft = peft_of(tiny, trainee, 3.0)
    engine = StreamedEngine(trainee.base, trainee.adapted, CPU, tmp_path) if streamed else ResidentEngine(
        trainee.base, trainee.adapted, CPU)
    curve = train(trainee.adapted.tensors(), Predicting(engine, samples), schedule)

    optimizer = torch.optim.AdamW([tensor for tensor in peft.parameters() if tensor.requires_grad], weight_decay=0.1)
    theirs = []
    for step in range(10):
        loss = peft_loss(peft, samples.training.take(schedule.drawn(step, 6)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peft.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(float(loss.detach()))
    assert [loss for _, loss in curve.loss] == pytest.approx(theirs, rel=1e-3)
    assert theirs[-1] < theirs[0]


def test_on_a_pruned_base_the_change_is_masked_and_so_is_its_gradient(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "magnitude:2:4", tmp_path / "sparse")
    stage = Adapt(rank=3, targets=["up"], seed=5)
    trainee = stage.prepare(View.of(Checkpoint(tmp_path / "sparse")), sparse=True)
    for factors in trainee.adapted.factors.values():
        factors.left.data.normal_(0, 0.05)
    corpus = instructions((20, 20), seed=1)
    engine = ResidentEngine(trainee.base, trainee.adapted, CPU)
    loss = engine.gradients(corpus, Targets.next_tokens(corpus), 0)

    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    copies = {place: (factors.left.detach().clone().requires_grad_(), factors.right.detach().clone().requires_grad_())
              for place, factors in trainee.adapted.factors.items()}
    weights = {}
    for (layer, name), (left, right) in copies.items():
        base = whole.model.layers[layer].get_submodule(name).weight.detach()
        weights[f"model.layers.{layer}.{name}.weight"] = (base + left @ right) * (base != 0)
    assert corpus.learned is not None
    losses = []
    for window, learned in zip(corpus.windows, corpus.learned, strict=True):
        logits = torch.func.functional_call(whole, weights, (window[None],)).logits[0, :-1]
        losses.append(functional.cross_entropy(logits[learned[1:]], window[1:][learned[1:]], reduction="none"))
    expected = torch.cat(losses).mean()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for place, (left, right) in copies.items():
        factors = trainee.adapted.factors[place]
        torch.testing.assert_close(factors.left.grad, left.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(factors.right.grad, right.grad, rtol=1e-3, atol=1e-6)
        merged = trainee.layer(place[0]).merged[place[1]].dense
        torch.testing.assert_close(merged, weights[f"model.layers.{place[0]}.{place[1]}.weight"].detach())


def test_a_packed_base_gives_the_gradients_of_its_dense_values(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "gptq:4:32, eora:2", tmp_path / "packed", calibration=text, windows=4, window=64)
    corpus = instructions((30, 22), seed=6)
    targets = Targets.next_tokens(corpus)
    packed, dense = (trainee_of(tmp_path / "packed") for _ in range(2))
    resident = ResidentEngine(packed.base, packed.adapted, CPU)
    streamed = StreamedEngine(dense.base, dense.adapted, CPU, tmp_path / "scratch")
    assert resident.gradients(corpus, targets, 0) == pytest.approx(streamed.gradients(corpus, targets, 0), rel=1e-5)
    for ours, theirs in zip(packed.adapted.tensors().values(), dense.adapted.tensors().values(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_dropout_is_the_same_forward_and_again_and_differs_between_steps(tiny: Path) -> None:
    trainee = trainee_of(tiny, dropout=0.5)
    dropout = trainee.adapted.dropout
    inputs = torch.ones(4, 64)
    dropout.begin(3, active=True)
    first, second = dropout(inputs, (0, "a")), dropout(inputs, (0, "a"))
    dropout.forget_calls(0)
    again = dropout(inputs, (0, "a"))
    dropout.begin(4, active=True)
    later = dropout(inputs, (0, "a"))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, later)
    assert set(first.unique().tolist()) == {0.0, 2.0}
    dropout.begin(4, active=False)
    assert dropout(inputs, (0, "a")) is inputs
