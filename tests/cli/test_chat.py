"""What chat prints: an answer to every line, until an empty one."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

import tsotsallm
from tests.cli.running import within
from tsotsallm.cli import app


def test_every_line_is_answered_until_an_empty_one() -> None:
    asked = ["Where was Ada born?", "And who is a baker?"]
    found = CliRunner().invoke(app, ["chat", "embedded", "--tokens", "8"], input="\n".join([*asked, "", "Not asked."]))
    assert found.exit_code == 0, found.stderr
    talk = tsotsallm.Conversation("embedded", tokens=8)
    assert found.stdout == "".join("".join(talk.answer(question)) + "\n" for question in asked)


def test_a_model_that_completes_text_only_says_so(tiny: Path) -> None:
    found = within("chat", tiny, check=False)
    assert found.exit_code == 1
    assert "has no chat template" in found.stderr
    assert "tsotsallm generate" in found.stderr
    assert not found.stdout
