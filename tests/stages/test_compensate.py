"""EoRA: against plain SVD and direct errors, kept as an adapter that PEFT loads, read back by everything."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import tsotsallm
from tests.compressing import Stop, same_bytes, stop_after
from tsotsallm.checkpoint.adapter import is_adapter
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.engine.resident import resident
from tsotsallm.errors import CheckpointError, RecipeError
from tsotsallm.stages.compensate import Compensate

SMALL: dict[str, Any] = {"windows": 6, "window": 64}
QUANTISED = "{quantize: {bits: 3, group: 32}}"


def test_the_adapter_loads_in_peft_with_our_logits(family_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    out = tmp_path / "out"
    stages = f"[{{sparsity: {{prune: 1, group: 4}}}}, {QUANTISED}, {{compensate: {{rank: 6}}}}]"
    tsotsallm.compress(family_checkpoint, stages, out, calibration=text, **SMALL)
    unpacked = CompressedTensorsConfig(dequantize=True)        # PEFT adds its linears to plain ones
    base = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=unpacked)
    model = PeftModel.from_pretrained(base, out / "adapter").eval()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        theirs, ours = model(ids).logits, tsotsallm.load(out)[0](ids).logits
    assert float((theirs - ours).abs().max()) <= 1e-4 * float(theirs.abs().max())


def test_a_correction_brings_the_model_nearer_and_more_rank_nearer_still(tiny: Path, text: Path, tmp_path: Path) -> None:
    found = []
    for rank in (0, 4, 16):
        out = tmp_path / f"rank-{rank}"
        stages = f"[{QUANTISED}" + (f", {{compensate: {{rank: {rank}}}}}]" if rank else "]")
        tsotsallm.compress(tiny, stages, out, calibration=text, **SMALL)
        kl = tsotsallm.evaluate(out, text, reference=tiny, context=64).kl
        assert kl is not None
        found.append(kl)
    assert found[0] > found[1] > found[2]


def test_it_is_written_counted_and_forecast(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = f"[{QUANTISED}, {{compensate: {{rank: 5}}}}]"
    result = tsotsallm.compress(tiny, recipe, out, calibration=text, **SMALL)
    checkpoint = Checkpoint.open(out)
    halves = [record for name, record in checkpoint.records.items() if is_adapter(name)]
    assert len(halves) == 2 * 7 * checkpoint.spec.layers
    anatomy = tsotsallm.inspect(out)
    assert anatomy.bytes_by_part["adapter"] == sum(record.size for record in halves)
    assert anatomy.parameters_by_part["adapter"] == sum(record.shape[0] * record.shape[1] for record in halves)
    assert result.result_bytes <= tsotsallm.plan(tiny, recipe, tmp_path / "x", **SMALL).result_bytes
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)


def test_halves_of_8_bits_take_half_the_bytes_and_stay_near(tiny: Path, text: Path, tmp_path: Path) -> None:
    found = {}
    for bits in (16, 8):
        out, recipe = tmp_path / str(bits), f"[{QUANTISED}, {{compensate: {{rank: 8, bits: {bits}}}}}]"
        result = tsotsallm.compress(tiny, recipe, out, calibration=text, **SMALL)
        assert result.result_bytes <= tsotsallm.plan(tiny, recipe, tmp_path / "x", **SMALL).result_bytes
        kl = tsotsallm.evaluate(out, text, reference=tiny, context=64).kl
        assert kl is not None
        found[bits] = kl, tsotsallm.inspect(out).bytes_by_part["adapter"], Checkpoint.open(out)
    assert found[8][0] < 1.05 * found[16][0]
    assert found[8][1] < 0.55 * found[16][1]
    records, module = found[8][2].records, "model.layers.1.mlp.up_proj"
    halves = [records[f"{module}.{half}.codes"].read().double() * records[f"{module}.{half}.scales"].read().double()
              for half in ("lora_B", "lora_A")]
    base = found[8][2].packed(module)
    assert base is not None
    expected = base.unpack().dequantise().double() + halves[0].mT @ halves[1]
    assert torch.allclose(found[8][2].tensor(f"{module}.weight").double(), expected, atol=1e-3 * float(expected.abs().max()))
    with pytest.raises(ValueError, match="tsotsallm"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "8")
    tsotsallm.compress(tmp_path / "8", "", tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (tmp_path / "8" / "model.safetensors").read_bytes()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        whole, packed = (resident(found[8][2], keep_packed=keep)(ids).logits for keep in (False, True))
    assert torch.allclose(whole, packed, atol=1e-4)


def test_a_compensated_result_is_compressed_again(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, f"[{QUANTISED}, {{compensate: {{rank: 4}}}}]", tmp_path / "first", calibration=text, **SMALL)
    tsotsallm.compress(tmp_path / "first", "", tmp_path / "copy")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    tsotsallm.compress(tmp_path / "first", "skip:1", tmp_path / "shorter")
    first, shorter = Checkpoint.open(tmp_path / "first"), Checkpoint.open(tmp_path / "shorter")
    for name, tensor in shorter.layer(1).items():
        assert torch.equal(tensor, first.layer(2)[name])
    tsotsallm.compress(tmp_path / "first", "rtn:8:channel", tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter").exists()
    near = Checkpoint.open(tmp_path / "merged").layer(0)["mlp.up_proj.weight"] - first.layer(0)["mlp.up_proj.weight"]
    assert float(near.abs().max()) < 0.01 * float(first.layer(0)["mlp.up_proj.weight"].abs().max())


def test_shared_layers_keep_their_one_correction(tiny: Path, text: Path, tmp_path: Path) -> None:
    recipe = f"[{{layers: {{order: [0, 1, 1, 2], shared: true}}}}, {QUANTISED}, {{compensate: {{rank: 4}}}}]"
    tsotsallm.compress(tiny, recipe, tmp_path / "out", calibration=text, **SMALL)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.spec.stored_layers == 3
    model, _ = tsotsallm.load(tmp_path / "out")
    weight = checkpoint.layer(1)["mlp.up_proj.weight"]
    for index in (1, 2):
        assert torch.equal(model.model.layers[index].mlp.up_proj.weight, weight)


def test_kept_stages_keep_the_codes_under_the_adapter(tiny: Path, text: Path, tmp_path: Path) -> None:
    recipe = f"[{{sparsity: {{prune: 2, group: 4}}}}, {QUANTISED}, {{compensate: {{rank: 4}}}}]"
    result = tsotsallm.compress(tiny, recipe, tmp_path / "out", calibration=text, keep_stages=True, **SMALL)
    assert [Path(stage).name for stage in result.stages] == ["1-sparsity", "2-quantize"]
    before = Checkpoint.open(result.stages[1]).layer_records(0)
    assert "mlp.up_proj.weight_packed" in before
    assert not any(is_adapter(name) for name in before)
    names = Checkpoint.open(tmp_path / "out").layer_records(0)
    assert {"mlp.up_proj.weight_packed", "mlp.up_proj.lora_A.weight"} <= set(names)
    assert "mlp.up_proj.weight" not in names


@pytest.mark.parametrize("stages", [
    f"[{QUANTISED}, {{compensate: {{rank: 4}}}}]", f"[{QUANTISED}, {{compensate: {{rank: auto, budget: 20kB}}}}]",
    "[{quantize: {bits_per_weight: 6, passes: 1}}]",
    "[{neurons: {feed_forward: 0.34}}, {quantize: {grid: q4_0, ends: q8_0}}]"])
@pytest.mark.parametrize("after", [12, 40, 75])
def test_a_stopped_run_goes_on_to_the_same_bytes(tiny: Path, text: Path, tmp_path: Path, stages: str, after: int) -> None:
    options: dict[str, Any] = {"calibration": text, **SMALL}
    steps: list[tuple[Any, ...]] = []
    tsotsallm.compress(tiny, stages, tmp_path / "whole", progress=lambda one: steps.append((one.layer, one.step)), **options)
    again: list[tuple[Any, ...]] = []
    with pytest.raises(Stop):
        tsotsallm.compress(tiny, stages, tmp_path / "cut", progress=stop_after(min(after, len(steps) - 2)), **options)
    tsotsallm.compress(tiny, stages, tmp_path / "cut", progress=lambda one: again.append((one.layer, one.step)), **options)
    assert len(again) < len(steps)          # what was finished is not done again
    assert same_bytes(tmp_path / "whole", tmp_path / "cut")


def test_merged_it_leaves_dense_weights_and_their_zeros(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stages = "[{sparsity: {prune: 2, group: 4}}, {compensate: {rank: 8, merge: true}}]"
    tsotsallm.compress(tiny, stages, out, calibration=text, **SMALL)
    assert not (out / "adapter").exists()
    weight = Checkpoint.open(out).layer(0)["mlp.up_proj.weight"]
    assert bool((weight.view(len(weight), -1, 4) == 0).sum(-1).ge(2).all())


@pytest.mark.parametrize(("recipe", "message"), [
    ("eora:4", "right after"), ("gptq:4:32, eora:4, wanda:2:4", "comes after quantize|beside the linears"),
    ("[{sparsity: {prune: 2, group: 4}}, {compensate: {rank: 4}}, {quantize: {bits: 4, group: 32}}]", "beside the linears"),
    ("[{quantize: {bits: 4, group: 32}}, {compensate: {rank: 0}}]", "1 or more"),
    ("[{quantize: {bits: 4, group: 32}}, {compensate: {rank: 4, methd: svd}}]", "did you mean 'method'"),
])
def test_recipes_that_make_no_sense_are_refused(recipe: str, message: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        tsotsallm.compress(tiny, recipe, tmp_path / "out", calibration=text, **SMALL)


def test_an_adapter_that_is_scaled_is_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, f"[{QUANTISED}, {{compensate: {{rank: 4}}}}]", tmp_path / "out", calibration=text, **SMALL)
    config = tmp_path / "out" / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    with pytest.raises(CheckpointError, match="alpha is not the rank"):
        Checkpoint.open(tmp_path / "out")
    config.write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        Checkpoint.open(tmp_path / "out")


@pytest.mark.parametrize(("before", "method"), [(QUANTISED, "eora"),
                                                ("{quantize: {bits: 4, group: 32, method: rtn}}", "svd")])
def test_an_automatic_rank_spends_its_budget_where_it_takes_off_most(tiny: Path, text: Path, tmp_path: Path, before: str,
                                                                     method: str) -> None:
    budget = 20_000
    recipe = f"[{before}, {{compensate: {{rank: auto, budget: {budget}, method: {method}}}}}]"
    out = tmp_path / "auto"
    result = tsotsallm.compress(tiny, recipe, out, calibration=text, **SMALL)
    assert result.result_bytes <= tsotsallm.plan(tiny, recipe, tmp_path / "x", **SMALL).result_bytes
    ranks = json.loads((out / "decision-1-compensate.json").read_text())["ranks"]
    checkpoint = Checkpoint.open(out)
    found = {name: record.shape[0] for name, record in checkpoint.records.items() if name.endswith("lora_A.weight")}
    assert found == {f"model.layers.{key.partition('.')[0]}.{key.partition('.')[2]}.lora_A.weight": rank
                     for key, rank in ranks.items() if rank}
    spent = sum(record.size for name, record in checkpoint.records.items() if is_adapter(name))
    assert 0.9 * budget < spent <= budget


def test_ranks_are_the_best_that_a_budget_buys(tiny: Path) -> None:
    """Against every way to spend it, for linears of like cost; and never over the budget."""
    view = View.of(Checkpoint.open(tiny))
    keys = ["0.self_attn.q_proj", "1.self_attn.q_proj", "2.self_attn.o_proj"]
    notes = {key: sorted(torch.rand(6, generator=torch.Generator().manual_seed(place)).tolist(), reverse=True)
             for place, key in enumerate(keys)}
    one = 2 * 2 * 64                                    # bytes of rank 1 of a linear of 64 inputs and outputs
    for ranks in (1, 4, 9, 18):
        stage = Compensate(rank="auto", budget=ranks * one + 3)
        decision = stage.decide(notes, view)
        assert decision["bytes"] == ranks * one
        best = max(sum(sum(notes[key][:count]) for key, count in zip(keys, counts, strict=True))
                   for counts in itertools.product(range(7), repeat=3) if sum(counts) == ranks)
        assert sum(sum(notes[key][:count]) for key, count in decision["ranks"].items()) == pytest.approx(best)


@pytest.mark.parametrize(("fields", "message"), [
    ("rank: auto", "spends a budget"), ("rank: 4, budget: 2MB", "only auto does"),
    ("rank: auto, budget: many", "it takes bytes"), ("rank: auto, budget: 10", "rank 1 of the smallest")])
def test_budgets_that_make_no_sense_are_refused(tiny: Path, tmp_path: Path, fields: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tsotsallm.plan(tiny, f"[{QUANTISED}, {{compensate: {{{fields}}}}}]", tmp_path / "x", **SMALL)
