"""Tuning after rounding: gradients against autograd on dense weights, losses that fall, bytes that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import tsotsallm
from tests.compressing import Stop, same_bytes, stop_after
from tests.stages.test_adapt import curves
from tests.stages.test_distill import in_pieces
from tests.training.test_gradients import instructions
from tsotsallm.checkpoint.reader import Checkpoint, layer_prefix
from tsotsallm.checkpoint.view import View
from tsotsallm.engine.resident import resident
from tsotsallm.errors import RecipeError
from tsotsallm.numerics.grids import Quantised
from tsotsallm.stages.tune import Tune
from tsotsallm.streaming.targets import Targets
from tsotsallm.training.engines import ResidentEngine, StreamedEngine
from tsotsallm.training.objectives import TeacherTokens
from tsotsallm.training.samples import Samples

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"windows": 8, "window": 64}
Q3 = {"quantize": {"bits": 3, "group": 32}}
Q2 = {"quantize": {"bits": 2, "group": 16}}
MIXED = {"quantize": {"grid": "q4_1", "passes": 1}}


def tune(**fields: Any) -> dict[str, Any]:
    return {"tune": {"steps": 12, "batch": 4, "window": 48, "learning_rate": 0.005} | fields}


@pytest.mark.parametrize("grid", [Q3, MIXED])
def test_gradients_resident_and_streamed_are_those_of_dense_weights(tiny: Path, text: Path, tmp_path: Path,
                                                                    grid: dict[str, Any]) -> None:
    tsotsallm.compress(tiny, [grid], tmp_path / "q", calibration=text, **SMALL)
    view, corpus = View.of(Checkpoint.open(tmp_path / "q")), instructions((20, 33, 9), seed=1)
    targets = Targets.next_tokens(corpus)
    model = resident(view)
    layers = model.model.layers
    model.requires_grad_(True)
    losses = []
    for window, learned in zip(corpus.windows, corpus.learned or (), strict=True):
        logits = model(window[None]).logits[0, :-1]
        losses.append(functional.cross_entropy(logits[learned[1:]], window[1:][learned[1:]], reduction="none"))
    torch.cat(losses).mean().backward()
    for streamed in (False, True):
        trainee = Tune().prepare(view, sparse=False)
        tensors = trainee.adapted.tensors()
        engine = (StreamedEngine(view, trainee.adapted, CPU, tmp_path / "s") if streamed else
                  ResidentEngine(view, trainee.adapted, CPU))
        engine.gradients(corpus, targets, 0)
        for index in range(view.spec.layers):
            for module, trained in trainee.adapted.modules(index).items():
                weight = layers[index].get_submodule(module).weight
                packed = view.checkpoint.packed(layer_prefix(index) + module)
                if packed is None:
                    wanted = {"weight": weight.grad * weight.detach()}
                else:
                    stored, offsets = packed.unpack(), None
                    values = weight.detach()
                    if isinstance(stored, Quantised):       # read back, its values are rounded to 16 bits
                        values = stored.codes * stored.scales.float().repeat_interleave(32, 1)
                    products = weight.grad * values
                    if "low" in trained:
                        offsets = stored.offsets().repeat_interleave(32, 1)  # type: ignore[union-attr]
                        products = weight.grad * (weight.detach() - offsets)
                    name = "scales" if "scales" in trained else "step"
                    wanted = {name: products.view(*trained[name].shape, -1).sum(-1)}
                    if offsets is not None:
                        wanted["low"] = (weight.grad * offsets).view(*trained["low"].shape, -1).sum(-1)
                assert trained.keys() == wanted.keys()
                for name, gradient in wanted.items():
                    own = tensors[f"{index}.{module}.{name}"].grad
                    torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_the_loss_with_all_other_tokens_as_one_and_its_gradient_are_autograds(tiny: Path, tmp_path: Path) -> None:
    samples = Samples(instructions((20, 9), seed=2), instructions((12,), seed=3))
    teacher = TeacherTokens(View.of(Checkpoint(tiny)), samples, 5, 1.0, tmp_path / "t.safetensors", CPU, whole=True)
    batch = samples.training.take([1, 0])
    targets = teacher.targets(batch, [1, 0], held_out=False)
    states, head = torch.randn(29, 64, requires_grad=True), torch.randn(256, 64)
    losses, gradient = in_pieces(states, head, targets)
    own = (states[targets.rows] @ head.mT).softmax(-1)
    here = own.gather(1, targets.tokens)
    shares = torch.cat([targets.shares, 1 - targets.shares.sum(-1, keepdim=True)], 1)
    assert float(shares.min()) > 0
    expected = (shares * (shares / torch.cat([here, 1 - here.sum(-1, keepdim=True)], 1)).log()).sum(-1)
    torch.testing.assert_close(losses, expected.detach().double(), rtol=1e-3, atol=1e-4)
    expected.mean().backward()
    torch.testing.assert_close(gradient, states.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("before", "fields"), [
    (Q2, {}), (Q2, {"engine": "streamed"}), (MIXED, {"learning_rate": 0.0003}),
    (Q2, {"what": ["codes", "scales"], "steps": 40, "learning_rate": 0.002})])
def test_the_model_comes_nearer_and_grows_by_no_byte_of_a_matrix(tiny: Path, text: Path, tmp_path: Path,
                                                                 before: dict[str, Any], fields: dict[str, Any]) -> None:
    tsotsallm.compress(tiny, [before], tmp_path / "plain", calibration=text, **SMALL)
    tsotsallm.compress(tiny, [before, tune(**fields)], tmp_path / "tuned", calibration=text, **SMALL)
    found = [[loss for _, loss in one["curve"]["held_out"]] for one in curves(tmp_path / "tuned")[0]]
    assert all(min(losses) <= losses[0] for losses in found)
    assert any(min(losses) < losses[0] for losses in found)
    plain, tuned = (tsotsallm.evaluate(tmp_path / name, text, reference=tiny, context=64).kl for name in ("plain", "tuned"))
    assert plain is not None
    assert tuned is not None
    assert tuned < plain
    records = [Checkpoint(tmp_path / name).records for name in ("plain", "tuned")]
    assert records[0].keys() == records[1].keys()
    assert all(records[1][name].shape == one.shape for name, one in records[0].items())
    assert all(records[1][name].dtype == one.dtype for name, one in records[0].items() if "norm" not in name)


def test_a_tuning_that_was_stopped_ends_as_if_it_had_not_been(tiny: Path, text: Path, tmp_path: Path) -> None:
    stages = [Q3, tune(what=["codes", "norms"], steps=4)]
    tsotsallm.compress(tiny, stages, tmp_path / "whole", calibration=text, **SMALL)
    with pytest.raises(Stop):
        tsotsallm.compress(tiny, stages, tmp_path / "cut", calibration=text, progress=stop_after(40), **SMALL)
    tsotsallm.compress(tiny, stages, tmp_path / "cut", calibration=text, **SMALL)
    assert same_bytes(tmp_path / "whole", tmp_path / "cut")


def test_pruned_zeros_and_corrections_stay(tiny: Path, text: Path, tmp_path: Path) -> None:
    stages = [{"sparsity": {"prune": 2, "group": 4}}, Q3, tune(what=["codes", "scales"], steps=4)]
    tsotsallm.compress(tiny, stages, tmp_path / "pruned", calibration=text, **SMALL)
    for layer in range(4):
        weight = Checkpoint(tmp_path / "pruned").layer(layer)["mlp.up_proj.weight"]
        assert bool((weight.reshape(len(weight), -1, 4) == 0).sum(-1).ge(2).all())
    corrected = [Q3, {"compensate": {"rank": 4}}]
    tsotsallm.compress(tiny, corrected, tmp_path / "before", calibration=text, **SMALL)
    tsotsallm.compress(tiny, [*corrected, tune(steps=4)], tmp_path / "after", calibration=text, **SMALL)
    one, other = Checkpoint(tmp_path / "before"), Checkpoint(tmp_path / "after")
    adapters = [name for name in one.records if "lora" in name.lower()]
    assert adapters
    assert all(torch.equal(one.records[name].read(), other.records[name].read()) for name in adapters)


@pytest.mark.parametrize(("stages", "message"), [
    ([tune()], "put it after quantize"), ([{"sparsity": {"prune": 2, "group": 4}}, tune()], "put it after quantize"),
    ([{"quantize": {"grid": "nf4", "group": 32}}, tune(what=["codes"], steps=2)], "not evenly spaced"),
    ([{"layers": {"order": [0, 2, 1, 3]}}, Q3, tune(what=["codes"])], "leave codes out"),
    ([Q3, {"tune": {"what": ["biases"]}}], "tune.what")])
def test_what_makes_no_sense_is_refused(tiny: Path, text: Path, tmp_path: Path, stages: list[Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tsotsallm.compress(tiny, stages, tmp_path / "out", calibration=text, **SMALL)
    assert not (tmp_path / "out").exists()
