"""generate, one prompt and many, against transformers' own greedy continuation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tsotsallm
from tsotsallm.api.generate import generate_many
from tsotsallm.checkpoint.reader import embedded_directory
from tsotsallm.errors import TsotsallmError


def test_a_text_is_continued_as_transformers_continues_it() -> None:
    """The embedded model, which says words."""
    folder = embedded_directory()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = "Question: Where was Ada born? Answer:"
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1]:]
    found = "".join(tsotsallm.generate("embedded", prompt, tokens=12))
    assert found
    assert prompt + found == tokenizer.decode([*ids["input_ids"][0].tolist(), *made.tolist()], skip_special_tokens=True)


def test_many_prompts_are_answered_as_each_alone_and_not_twice(tiny: Path, tmp_path: Path) -> None:
    prompts, out = ["one two", "three", "", "four five six"], tmp_path / "answers.jsonl"
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    said: list[str] = []
    assert generate_many(tiny, tmp_path / "prompts.txt", out, tokens=5, say=said.append) == 4
    answers = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [one["prompt"] for one in answers] == prompts
    assert [one["text"] for one in answers] == ["".join(tsotsallm.generate(tiny, one, tokens=5)) for one in prompts]
    whole = out.read_bytes()
    out.write_bytes(whole[:-7])                 # stopped in the middle of the last line
    assert generate_many(tiny, tmp_path / "prompts.txt", out, tokens=5, say=said.append) == 4
    assert out.read_bytes() == whole
    (tmp_path / "prompts.txt").write_text("others\n")
    with pytest.raises(TsotsallmError, match="holds something else"):
        generate_many(tiny, tmp_path / "prompts.txt", out, tokens=5)
    assert out.read_bytes() == whole


def test_the_same_seed_says_the_same(tiny: Path) -> None:
    said = ["".join(tsotsallm.generate(tiny, "a", tokens=20, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    with pytest.raises(TsotsallmError, match="0 new tokens cannot be written"):
        tsotsallm.generate(tiny, "a", tokens=0)
