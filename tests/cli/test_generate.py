"""What generate prints: the prompt and what follows; many prompts go to a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tsotsallm
from tests.cli.running import within


def test_a_prompt_is_printed_with_its_continuation(tiny: Path) -> None:
    shown = within("generate", tiny, "one two", "--tokens", 6).stdout
    assert shown == "one two" + "".join(tsotsallm.generate(tiny, "one two", tokens=6)) + "\n"
    options = ["--tokens", 6, "--temperature", 1.5, "--seed", 3, "--top-k", 50]
    drawn = "".join(tsotsallm.generate(tiny, "one two", tokens=6, temperature=1.5, seed=3, top_k=50))
    assert within("generate", tiny, "one two", *options).stdout == f"one two{drawn}\n"


def test_many_prompts_go_to_a_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo three\n")
    out = tmp_path / "answers.jsonl"
    shown = within("generate", tiny, "--prompts", tmp_path / "prompts.txt", "-o", out, "--tokens", 4).stdout
    assert shown.splitlines()[-1] == f"2 answers in {out}"
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"prompt": prompt, "text": "".join(tsotsallm.generate(tiny, prompt, tokens=4))} for prompt in ("one", "two three")]


@pytest.mark.parametrize(("options", "words"), [
    ([], "give a text to continue"), (["a", "-o", "x.jsonl"], "-o and --workers are for several"),
    (["a", "--prompts", "p.txt", "-o", "x"], "excludes a prompt"), (["--prompts", "p.txt"], "needs -o OUT"),
    (["--prompts", "p.txt", "-o", "x", "--kv", "q8_0"], "excludes a prompt, --kv"),
    (["--prompts", "p.txt", "-o", "x"], "p.txt does not exist"), (["a", "--tokens", "0"], "ask for 1 or more"),
    (["a", "--adapter", "x.gguf"], "adapter")])
def test_misuse_is_one_line(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str],
                            words: str) -> None:
    monkeypatch.chdir(tmp_path)
    found = within("generate", tiny, *options, check=False)
    assert found.exit_code != 0
    assert words in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
