"""Repeated layers that are stored once: in the own container, edited once, and alike in every pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tsotsallm
from tests.compressing import SMALL, unpacked_by_transformers
from tsotsallm.checkpoint.reader import Checkpoint


def test_shared_repeats_are_stored_once_and_generate_like_written_out_ones(tiny: Path, text: Path,
                                                                          tmp_path: Path) -> None:
    order = [0, 1, 1, 2, 1, 3]
    tsotsallm.compress(tiny, [{"layers": {"order": order}}], tmp_path / "long")
    tsotsallm.compress(tiny, [{"layers": {"order": order, "shared": True}}], tmp_path / "shared")
    assert tsotsallm.inspect(tmp_path / "shared").bytes == tsotsallm.inspect(tiny).bytes
    long = AutoModelForCausalLM.from_pretrained(tmp_path / "long", dtype=torch.float32).eval()
    shared, tokenizer = tsotsallm.load(tmp_path / "shared")
    layers = shared.model.layers
    assert layers[1].mlp.up_proj.weight is layers[4].mlp.up_proj.weight
    assert layers[1].self_attn.layer_idx != layers[4].self_attn.layer_idx
    ids = tokenizer("once upon", return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = long.generate(ids, **options)
    assert torch.equal(shared.generate(ids, use_cache=True, **options), expected)
    assert torch.equal(shared.generate(ids, use_cache=False, **options), expected)


def test_plain_transformers_refuses_the_own_container(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, [{"layers": {"order": [0, 1, 1], "shared": True}}], tmp_path / "out")
    with pytest.raises((ValueError, KeyError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_edited_shared_layer_is_edited_once_and_compressed_again(tiny: Path, text: Path, tmp_path: Path) -> None:
    recipe = "[{layers: {order: [0, 1, 1, 2], shared: true}}, {quantize: {bits: 4, group: 32}}]"
    tsotsallm.compress(tiny, recipe, tmp_path / "shared", calibration=text, **SMALL)
    checkpoint = Checkpoint.open(tmp_path / "shared")
    assert checkpoint.spec.layer_order == (0, 1, 1, 2)
    written_out = tmp_path / "out"
    tsotsallm.compress(tmp_path / "shared", "", written_out)
    ours, _ = tsotsallm.load(tmp_path / "shared")
    theirs = unpacked_by_transformers(written_out)
    for name, weight in ours.state_dict().items():
        assert torch.equal(theirs[name].float(), weight), name


def test_a_shared_layer_stays_one_layer_through_several_sweeps(tiny: Path, text: Path, tmp_path: Path) -> None:
    recipe = "[{layers: {order: [0, 1, 1, 2], shared: true}}, {sparsity: {prune: 2, group: 4}}, {quantize: {group: 32}}]"
    tsotsallm.compress(tiny, recipe, tmp_path / "out", calibration=text, keep_stages=True, **SMALL)
    sparse = Checkpoint.open(tmp_path / "out-stages" / "2-sparsity")
    for name, weight in sparse.layer(1).items():
        assert torch.equal(weight, sparse.layer(2)[name])
    assert Checkpoint.open(tmp_path / "out").spec.layer_order == (0, 1, 1, 2)
