"""LoRA and QLoRA as stages: what is written, what stays, resume, and the orders that recipes may have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import tsotsallm
from tests.compressing import Stop, same_bytes
from tsotsallm.checkpoint.adapter import is_adapter
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import RecipeError, TsotsallmError
from tsotsallm.training import loop

SMALL: dict[str, Any] = {"windows": 4, "window": 64}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def adapt(name: str = "adapt", **fields: Any) -> dict[str, Any]:
    return {name: {"steps": 6, "batch": 2, "window": 48, "learning_rate": 0.01, "rank": 3} | fields}


def curves(out: Path) -> list[Any]:
    return [json.loads(path.read_text())["samples"] for path in sorted(out.glob("training-*.json"))]


def logits(model: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = tsotsallm.load(model)[0](IDS).logits
    return found


def test_training_lowers_the_held_out_loss_and_merges_into_dense_weights(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tsotsallm.compress(tiny, [adapt(steps=20)], out, calibration=text, **SMALL)
    [[one]] = curves(out)
    held_out = dict(one["curve"]["held_out"])
    assert held_out[one["curve"]["best_step"]] < held_out[0]
    assert not (out / "adapter").exists()
    before, after = (tsotsallm.evaluate(model, text, context=64).perplexity for model in (tiny, out))
    assert after < before
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, logits(out))


def test_an_adapter_beside_a_dense_base_loads_in_peft_with_our_logits(tiny: Path, text: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    out = tmp_path / "out"
    tsotsallm.compress(tiny, [adapt(merge=False, alpha=12.0, targets=["q", "down"])], out, calibration=text, **SMALL)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), out / "adapter").eval()
    with torch.no_grad():
        theirs = model(IDS).logits
    assert float((theirs - logits(out)).abs().max()) <= 1e-4 * float(theirs.abs().max())
    assert float((theirs - logits(tiny)).abs().max()) > 1e-2 * float(theirs.abs().max())


def test_qlora_leaves_the_base_byte_for_byte_and_peft_reads_the_adapter(tiny: Path, text: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "base", calibration=text, **SMALL)
    for engine in ("resident", "streamed"):
        out = tmp_path / engine
        tsotsallm.compress(tmp_path / "base", [adapt(engine=engine)], out, calibration=text, **SMALL)
        before, after = Checkpoint(tmp_path / "base"), Checkpoint(out)
        kept = {name for name in after.records if not is_adapter(name)}
        assert kept == set(before.records)
        assert all(torch.equal(before.records[name].read(), after.records[name].read()) for name in kept)
        base = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32,
                                                    quantization_config=CompressedTensorsConfig(dequantize=True))
        model = PeftModel.from_pretrained(base, out / "adapter").eval()
        with torch.no_grad():
            theirs = model(IDS).logits
        assert float((theirs - logits(out)).abs().max()) <= 1e-4 * float(theirs.abs().max())
    one, other = (curves(tmp_path / engine)[0][0]["curve"] for engine in ("resident", "streamed"))
    assert [loss for _, loss in one["loss"]] == pytest.approx([loss for _, loss in other["loss"]], rel=1e-3)


def test_zeros_of_a_pruned_model_stay_and_nothing_is_lost_by_the_merge(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, [{"sparsity": {"prune": 2, "group": 4}}, adapt(targets=["all"], steps=20)], tmp_path / "out",
                       calibration=text, **SMALL)
    checkpoint = Checkpoint(tmp_path / "out")
    for layer in range(checkpoint.spec.layers):
        for name, values in checkpoint.layer(layer).items():
            if values.ndim == 2:
                groups = (values.view(-1, 4) == 0).sum(1)
                assert int(groups.min()) >= 2, name
    [[one]] = curves(tmp_path / "out")
    held_out = dict(one["curve"]["held_out"])
    assert one["curve"]["best_step"] > 0
    assert held_out[one["curve"]["best_step"]] < held_out[0]


@pytest.mark.parametrize("stages", [
    [{"depth": {"remove": 1, "protect": {}}}, adapt(), {"sparsity": {"prune": 2, "group": 4}},
     {"quantize": {"bits": 4, "group": 32}}, {"compensate": {"rank": 2}}],
    [{"depth": {"remove": 1, "protect": {}}}, {"sparsity": {"prune": 2, "group": 4}}, adapt(),
     {"quantize": {"bits": 4, "group": 32}}, {"compensate": {"rank": 2}}],
    [{"quantize": {"bits": 3, "group": 32}}, {"compensate": {"rank": 3}}, adapt(init="eora", targets=["all"])],
    [adapt(), {"depth": {"remove": 1, "protect": {}}}, adapt(seed=1)],
    [{"quantize": {"bits": 4, "group": 32}}, adapt(), {"layers": {"skip": [1]}}],
], ids=["before pruning", "reference", "from the correction", "twice", "before a choice"])
def test_stages_run_in_any_order(tiny: Path, text: Path, tmp_path: Path, stages: list[Any]) -> None:
    out = tmp_path / "out"
    forecast = tsotsallm.plan(tiny, stages, out, **SMALL)
    result = tsotsallm.compress(tiny, stages, out, calibration=text, **SMALL)
    assert result.result_bytes <= forecast.result_bytes
    assert torch.isfinite(logits(out)).all()
    assert len(curves(out)) == sum("adapt" in stage for stage in stages)
    for [one] in curves(out):
        assert dict(one["curve"]["held_out"])[one["curve"]["best_step"]] <= one["curve"]["held_out"][0][1]
    kept = tmp_path / "kept"
    staged = tsotsallm.compress(tiny, stages, kept, calibration=text, keep_stages=True, **SMALL)
    assert [Checkpoint(Path(path)).spec.hidden for path in staged.stages] == [64] * (len(stages) - 1)


def test_qlora_on_nf4_lives_in_our_own_container(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    forecast = tsotsallm.plan(tiny, ["rtn:nf4:32", adapt()], out, **SMALL)
    result = tsotsallm.compress(tiny, ["rtn:nf4:32", adapt()], out, calibration=text, **SMALL)
    assert result.result_bytes <= forecast.result_bytes
    with pytest.raises(ValueError, match="tsotsallm"):
        AutoModelForCausalLM.from_pretrained(out)
    near, far = (tsotsallm.evaluate(model, text, reference=tiny, context=64).kl for model in (out, tiny))
    assert near is not None
    assert far == pytest.approx(0, abs=1e-9)
    assert 0 < near < 1
    tsotsallm.compress(tiny, ["gptq:nf4:32", "eora:2"], tmp_path / "gptq", calibration=text, **SMALL)
    better = tsotsallm.evaluate(tmp_path / "gptq", text, reference=tiny, context=64).kl
    tsotsallm.compress(tiny, ["rtn:nf4:32"], tmp_path / "rtn")
    worse = tsotsallm.evaluate(tmp_path / "rtn", text, reference=tiny, context=64).kl
    assert better is not None
    assert worse is not None
    assert better < worse


def test_a_correction_after_training_aims_at_what_was_learned(tiny: Path, text: Path, tmp_path: Path) -> None:
    stages = [adapt(steps=20), {"quantize": {"bits": 3, "group": 32}}, {"compensate": {"rank": 16}}]
    tsotsallm.compress(tiny, stages[:1], tmp_path / "learned", calibration=text, **SMALL)
    tsotsallm.compress(tiny, stages, tmp_path / "out", calibration=text, **SMALL)
    to_learned, to_source = (tsotsallm.evaluate(tmp_path / "out", text, reference=other, context=64).kl
                             for other in (tmp_path / "learned", tiny))
    assert to_learned is not None
    assert to_source is not None
    assert to_learned < to_source


@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_stopped_training_goes_on_with_the_same_losses(tiny: Path, text: Path, tmp_path: Path, engine: str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    stages = [adapt(engine=engine, dropout=0.2, validate_every=2)]
    tsotsallm.compress(tiny, stages, tmp_path / "whole", calibration=text, **SMALL)
    for _ in range(3):
        count = 0

        def stop(now: Any) -> None:
            nonlocal count
            count += now.step.startswith("loss")
            if count == 2:
                raise Stop

        with pytest.raises(Stop):
            tsotsallm.compress(tiny, stages, tmp_path / "cut", calibration=text, progress=stop, **SMALL)
    tsotsallm.compress(tiny, stages, tmp_path / "cut", calibration=text, **SMALL)
    one, other = (curves(tmp_path / name)[0][0]["curve"] for name in ("whole", "cut"))
    assert one["loss"] == other["loss"]
    assert one["held_out"] == other["held_out"]
    assert same_bytes(tmp_path / "whole", tmp_path / "cut")


def test_it_stops_early_and_keeps_the_best(tiny: Path, text: Path, tmp_path: Path) -> None:
    stage = adapt(steps=40, learning_rate=3.0, validate_every=1, patience=2, decay="constant")
    tsotsallm.compress(tiny, [stage], tmp_path / "out", calibration=text, **SMALL)
    [[one]] = curves(tmp_path / "out")
    assert "did not fall" in one["curve"]["stopped"]
    assert len(one["curve"]["loss"]) < 40
    best = min(loss for _, loss in one["curve"]["held_out"])
    assert dict(one["curve"]["held_out"])[one["curve"]["best_step"]] == best


@pytest.mark.parametrize(("fields", "message"), [
    ({"targets": ["q", "w"]}, "names 'w', which is no linear"),
    ({"targets": []}, "targets is .*at least one"),
    ({"rank": 0}, "rank is 0"),
    ({"alpha": -1.0}, "alpha is -1.0"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"steps": 0}, "steps is 0"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ({"warmup": 2.0}, "warmup is 2.0"),
    ({"held_out": 0.0}, "held_out is 0.0"),
    ({"data": "none.jsonl"}, "does not exist"),
    ({"data": []}, "takes text, or a list of texts"),
    ({"init": "eora"}, "has no correction beside"),
    ({"steppes": 3}, "did you mean 'steps'"),
])
def test_what_cannot_be_trained_is_refused(tiny: Path, text: Path, tmp_path: Path, fields: dict[str, Any],
                                           message: str) -> None:
    with pytest.raises(TsotsallmError, match=message):
        tsotsallm.compress(tiny, [adapt(**fields)], tmp_path / "out", calibration=text, **SMALL)
    assert not (tmp_path / "out").exists()


def test_merging_where_it_cannot_be_is_refused_first(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="base is quantised"):
        tsotsallm.plan(tiny, [{"quantize": {"bits": 4, "group": 32}}, adapt(merge=True)], tmp_path / "x")
    with pytest.raises(RecipeError, match="shared"):
        tsotsallm.plan(tiny, [{"layers": {"order": [0, 1, 1, 2], "shared": True}}, adapt()], tmp_path / "x")


def test_a_correction_beside_pruned_weights_is_not_merged_into_their_zeros(tiny: Path, tmp_path: Path) -> None:
    stages = [{"sparsity": {"prune": 2, "group": 4}}, {"compensate": {"rank": 2}}, adapt()]
    with pytest.raises(RecipeError, match="fill their zeros"):
        tsotsallm.plan(tiny, stages, tmp_path / "x")
    tsotsallm.plan(tiny, [*stages[:2], adapt(init="eora")], tmp_path / "x")
