"""Low-rank corrections against PEFT: what it writes is read, what we write it loads, and what scales is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.checkpoint.damage import edit_json
from tests.conftest import build
from tsotsallm.checkpoint.adapter import (
    CONFIG,
    FOLDER,
    WEIGHTS,
    LowRank,
    adapter_config,
    is_adapter,
    owner_of,
    read_adapter,
    require_fitting,
)
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shards import read_header, write_shard
from tsotsallm.errors import CheckpointError

MODULE = "model.layers.2.mlp.down_proj"
RANKS = {"q_proj": 3, "down_proj": 7}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("base") / "base", "llama2")


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The base with an adapter of two ranks that PEFT wrote, and the weights of PEFT's own merge."""
    from peft import LoraConfig, get_peft_model

    path = Path(shutil.copytree(base, tmp_path_factory.mktemp("adapted") / "model"))
    torch.manual_seed(1)
    settings = LoraConfig(r=7, lora_alpha=7, rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 3},
                          target_modules=list(RANKS), init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    model.save_pretrained(path / FOLDER)
    edit_json(path / FOLDER / CONFIG, base_model_name_or_path="..")
    return path, dict(model.merge_and_unload().state_dict())


def test_what_peft_wrote_is_added_as_peft_merges_it(adapted: tuple[Path, dict[str, torch.Tensor]], base: Path) -> None:
    path, merged = adapted
    checkpoint, before = Checkpoint.open(path), Checkpoint.open(base)
    for layer in range(4):
        for name, tensor in checkpoint.layer(layer).items():
            full = f"model.layers.{layer}.{name}"
            torch.testing.assert_close(tensor, merged[full], rtol=1e-5, atol=1e-6)
            changed = name.split(".")[-2] in RANKS
            assert torch.equal(tensor, before.tensor(full)) != changed, full


def test_the_factors_are_pefts(adapted: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = adapted
    records, notes = read_adapter(path, ours=False)
    assert notes == ()
    stored = load_file(path / FOLDER / WEIGHTS)
    assert {f"base_model.model.{name}" for name in records} == set(stored)
    found = LowRank.read(records, MODULE)
    assert found is not None
    assert torch.equal(found.left, stored[f"base_model.model.{MODULE}.lora_B.weight"])
    assert torch.equal(found.right, stored[f"base_model.model.{MODULE}.lora_A.weight"])
    assert LowRank.read(records, "model.layers.2.mlp.up_proj") is None


def test_without_beside_leaves_the_base_of_some_linears(adapted: tuple[Path, dict[str, torch.Tensor]], base: Path) -> None:
    checkpoint, before = Checkpoint.open(adapted[0]), Checkpoint.open(base)
    without = checkpoint.without_beside([MODULE])
    assert torch.equal(without.tensor(f"{MODULE}.weight"), before.tensor(f"{MODULE}.weight"))
    other = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(without.tensor(other), checkpoint.tensor(other))
    assert not torch.equal(checkpoint.tensor(f"{MODULE}.weight"), before.tensor(f"{MODULE}.weight"))


def test_our_config_loads_in_peft_with_every_rank(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    modules = {f"model.layers.{layer}.{name}": rank for layer in range(4)
               for name, rank in (("self_attn.q_proj", 2 + layer), ("mlp.down_proj", 4))}
    checkpoint, tensors = Checkpoint.open(base), {}
    for module, rank in modules.items():
        d_out, d_in = checkpoint.tensor(f"{module}.weight").shape
        correction = LowRank(torch.randn(d_out, rank) * 0.1, torch.randn(rank, d_in) * 0.1)
        tensors |= {f"base_model.model.{name}": tensor for name, tensor in correction.tensors(module).items()}
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / CONFIG).write_text(json.dumps(adapter_config(modules, str(base))))
    save_file(tensors, tmp_path / FOLDER / WEIGHTS, {"format": "pt"})
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, tmp_path / FOLDER).merge_and_unload().state_dict()
    for module in modules:
        left, right = (tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "BA")
        torch.testing.assert_close(merged[f"{module}.weight"], checkpoint.tensor(f"{module}.weight") + left @ right,
                                   rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [1, 5])
def test_eight_bits_read_back_exactly_and_are_near(tmp_path: Path, storage: torch.dtype, rank: int) -> None:
    left, right = torch.randn(9, rank), torch.randn(rank, 32)
    left[:, 0], right[0] = 0, 0                                  # a scale of nothing
    coded = LowRank.in_8_bits(left, right, storage)
    write_shard(tmp_path / "a.safetensors", dict(coded.tensors(MODULE)))
    again = LowRank.read(read_header(tmp_path / "a.safetensors"), MODULE)
    assert again is not None
    assert torch.equal(again.left, coded.left)
    assert torch.equal(again.right, coded.right)
    base = torch.randn(9, 32)
    found = again.added_to(base, 0.5)
    assert float((found - (base.double() + 0.5 * left.double() @ right.double())).abs().max()) < 0.05 * max(1, rank)
    assert sum(tensor.nbytes for tensor in coded.tensors(MODULE).values()) == rank * (9 + 32) + 2 * rank * storage.itemsize


@pytest.mark.parametrize(("name", "owner"), [
    (f"{MODULE}.lora_A.weight", MODULE), (f"{MODULE}.lora_B.codes", MODULE), (f"{MODULE}.lora_B.scales", MODULE),
    (f"{MODULE}.weight", None), (f"{MODULE}.lora_C.weight", None), ("lora_A.weight.other", None),
    (f"{MODULE}.lora_A", None)])
def test_names_of_factors(name: str, owner: str | None) -> None:
    assert is_adapter(name) == (owner is not None)
    assert owner_of(name) == (name if owner is None else owner)


def test_a_folder_without_an_adapter_has_none(tmp_path: Path) -> None:
    assert read_adapter(tmp_path, ours=True) == ({}, ())
    (tmp_path / FOLDER).mkdir()
    assert read_adapter(tmp_path, ours=True) == ({}, ())


@pytest.fixture
def copied(adapted: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapted[0], tmp_path / "model"))


@pytest.mark.parametrize("ours", [True, False])
def test_an_adapter_of_another_base_is_part_of_our_results_only(copied: Path, ours: bool) -> None:
    edit_json(copied / FOLDER / CONFIG, base_model_name_or_path="some\nmodel")
    records, notes = read_adapter(copied, ours=ours)
    assert bool(records) == ours
    assert len(notes) == (not ours)
    assert all(note.isprintable() for note in notes)


@pytest.mark.parametrize("changes", [
    {"lora_alpha": 14}, {"alpha_pattern": {"q_proj": 6}}, {"alpha_pattern": {}}, {"use_rslora": True}, {"use_dora": True}])
def test_what_scales_is_refused(copied: Path, changes: dict[str, Any]) -> None:
    edit_json(copied / FOLDER / CONFIG, **changes)
    with pytest.raises(CheckpointError, match=r"scales its corrections .* merge it into the base with PEFT first"):
        read_adapter(copied, ours=True)


def test_a_lost_config_and_a_strange_one_are_named(copied: Path) -> None:
    (copied / FOLDER / CONFIG).write_text('{"peft_type": "PROMPT_TUNING"}')
    with pytest.raises(CheckpointError, match="is not the config of a LoRA adapter"):
        read_adapter(copied, ours=True)
    (copied / FOLDER / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json does not exist; restore it, or delete"):
        read_adapter(copied, ours=True)
    (copied / FOLDER / WEIGHTS).unlink()
    assert read_adapter(copied, ours=True) == ({}, ())


@pytest.mark.parametrize("name", [f"{MODULE}.lora_A.weight", f"base_model.model.{MODULE}.weight",
                                  f"base_model.model.{MODULE}.lora_magnitude_vector"])
def test_tensors_that_are_no_factors_are_refused(copied: Path, name: str) -> None:
    save_file({name: torch.zeros(2, 2)}, copied / FOLDER / WEIGHTS)
    with pytest.raises(CheckpointError, match="which is not part of a LoRA adapter of linears"):
        read_adapter(copied, ours=True)


FITTING = {"lora_B.weight": torch.zeros(6, 2), "lora_A.weight": torch.zeros(2, 8)}
CODED = {"lora_B.codes": torch.zeros(2, 6, dtype=torch.int8), "lora_B.scales": torch.zeros(2, 1),
         "lora_A.codes": torch.zeros(2, 8, dtype=torch.int8), "lora_A.scales": torch.zeros(2, 1)}
AMISS: dict[str, dict[str, torch.Tensor]] = {
    "one half": {"lora_A.weight": torch.zeros(2, 8)}, "the other half": {"lora_B.weight": torch.zeros(6, 2)},
    "two ranks": FITTING | {"lora_B.weight": torch.zeros(6, 3)}, "no rank": {
        "lora_B.weight": torch.zeros(6, 0), "lora_A.weight": torch.zeros(0, 8)},
    "too wide": FITTING | {"lora_A.weight": torch.zeros(2, 9)}, "the wrong way": {
        "lora_B.weight": torch.zeros(2, 6), "lora_A.weight": torch.zeros(8, 2)},
    "whole numbers": FITTING | {"lora_A.weight": torch.zeros(2, 8, dtype=torch.int8)},
    "a scalar": FITTING | {"lora_A.weight": torch.tensor(1.0)},
    "codes in floats": CODED | {"lora_A.codes": torch.zeros(2, 8)},
    "no scales": {name: tensor for name, tensor in CODED.items() if "scales" not in name},
    "both forms": FITTING | CODED, "one scale": CODED | {"lora_A.scales": torch.zeros(1, 1)}}


@pytest.mark.parametrize("case", ["dense", "coded", *AMISS])
def test_both_factors_must_fit_their_linear(tmp_path: Path, case: str) -> None:
    tensors = {"dense": FITTING, "coded": CODED}.get(case) or AMISS[case]
    save_file({f"{MODULE}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    records = read_header(tmp_path / "a.safetensors")
    if case in AMISS:
        with pytest.raises(CheckpointError, match=r"does not fit its linear of \[6, 8\]") as caught:
            require_fitting(records, {MODULE: (6, 8)}, "here")
        assert str(caught.value).isprintable()
    else:
        require_fitting(records, {MODULE: (6, 8)}, "here")
        with pytest.raises(CheckpointError, match="is not a linear of a layer"):
            require_fitting(records, {"model.layers.2.mlp.up_proj": (6, 8)}, "here")
