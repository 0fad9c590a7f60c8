"""load: a transformers model with the weights as they are stored, in the type that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tsotsallm
from tsotsallm.errors import TsotsallmError


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_the_one_that_transformers_loads(tiny: Path, dtype: str) -> None:
    ours, tokenizer = tsotsallm.load(tiny, dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tiny, dtype=getattr(torch, dtype))
    assert not ours.training
    expected, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items())
    ids = tokenizer("a b", return_tensors="pt")["input_ids"]
    assert torch.equal(ours.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0),
                       theirs.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_a_gpu_that_is_not_there_is_an_error_in_words(tiny: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TsotsallmError, match='device="cpu"'):
        tsotsallm.load(tiny, device="cuda")
