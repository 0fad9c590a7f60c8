"""The main job end to end on tiny checkpoints, read back by transformers and by ourselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tsotsallm
from tests.compressing import SMALL, THREE_STAGES, same_bytes, tensors_of
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import ResumeError


def test_an_empty_recipe_copies_every_tensor(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "", tmp_path / "copy")
    before, after = tensors_of(tiny), tensors_of(tmp_path / "copy")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_three_stages_load_in_transformers_as_we_read_them(family_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    tsotsallm.compress(family_checkpoint, THREE_STAGES, out, calibration=text, **SMALL)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours, tokenizer = tsotsallm.load(out)
    ids = tokenizer("tell me a story about rain", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)
    checkpoint = Checkpoint.open(out)
    assert checkpoint.spec.layers == 3
    for layer in range(3):
        for name, weight in checkpoint.layer(layer).items():
            if weight.ndim == 2:
                assert bool((weight.view(len(weight), -1, 4) == 0).sum(-1).ge(2).all()), name


def test_the_same_run_gives_the_same_bytes(tiny: Path, text: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tsotsallm.compress(tiny, THREE_STAGES, tmp_path / name, calibration=text, **SMALL)
    assert same_bytes(tmp_path / "a", tmp_path / "b")


def test_our_own_result_is_compressed_again(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "wanda:2:4", tmp_path / "sparse", calibration=text, **SMALL)
    tsotsallm.compress(tmp_path / "sparse", "gptq:4:32", tmp_path / "packed", calibration=text, **SMALL)
    sparse, packed = Checkpoint.open(tmp_path / "sparse").layer(2), Checkpoint.open(tmp_path / "packed").layer(2)
    for name, weight in sparse.items():
        if weight.ndim == 2:
            assert bool((packed[name][weight == 0] == 0).all()), name
    tsotsallm.compress(tmp_path / "packed", "skip:1", tmp_path / "shorter")
    assert tsotsallm.inspect(tmp_path / "shorter").bits_per_linear_weight < 6


def test_the_real_tiny_model_tells_its_story(stories: Path, tmp_path: Path) -> None:
    tsotsallm.compress(stories, "", tmp_path / "copy")
    model, tokenizer = tsotsallm.load(tmp_path / "copy")
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    told = tokenizer.decode(model.generate(ids, max_new_tokens=70, do_sample=False)[0], skip_special_tokens=True)
    assert told.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside in the "
                           "park. One day, she saw a big, red ball.")


def test_an_output_that_exists_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ResumeError, match="exists already"):
        tsotsallm.compress(tmp_path / "no-such-model", "rtn:4", tmp_path / "out")
