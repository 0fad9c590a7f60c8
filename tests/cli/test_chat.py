"""What chat prints: an answer to every line, until an empty one."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

import pytest
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


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tsotsallm.to_gguf("embedded", path, verify=False)
    return path


class Terminal:
    """A chat in a terminal of its own, in which keys are pressed."""

    def __init__(self, *arguments: object) -> None:
        import pty

        self.process, self.keys = pty.fork()
        if self.process == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)    # in the background, shells have it ignored, which is inherited
            os.execv(sys.executable, [sys.executable, "-m", "tsotsallm", "chat", *map(str, arguments)])

    def press(self, keys: str) -> None:
        os.write(self.keys, keys.encode())

    def until(self, ends: str, within_s: float = 60) -> str:
        """What is printed until it holds a text."""
        shown, end = "", time.monotonic() + within_s
        while ends not in shown:
            assert time.monotonic() < end, f"{ends!r} did not come: {shown!r}"
            if select.select([self.keys], [], [], 1)[0]:
                shown += os.read(self.keys, 1000).decode(errors="replace")
        return shown

    def ended(self) -> int:
        """The exit code; what is still printed is read."""
        with contextlib.suppress(OSError):       # Linux's way to say that nobody is at the other end
            while os.read(self.keys, 1000):
                pass
        os.close(self.keys)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such terminals")
@pytest.mark.parametrize("leave", ["\x03", "\x04", "/quit\n", "\n"])
def test_ctrl_c_stops_an_answer_and_keeps_the_chat(file: Path, leave: str) -> None:
    """With llama.cpp in this process, whose callbacks came while the interpreter ended: it aborted."""
    chat = Terminal(file, "--tokens", 100_000, "--temperature", 5)
    assert "/quit" in chat.until("> ")
    for _ in range(2):
        chat.press("Where was Ada born?\n")
        chat.until("born?\r\n")
        os.read(chat.keys, 1)                    # the answer has begun
        chat.press("\x03")
        assert "Ctrl-C again" in chat.until("\n> ")
    chat.press(leave)
    assert chat.ended() == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such terminals")
def test_one_ctrl_c_at_the_prompt_ends_nothing(file: Path) -> None:
    chat = Terminal(file, "--tokens", 8)
    chat.until("> ")
    chat.press("\x03")
    chat.until("\n> ")
    chat.press("Where was Ada born?\n")
    chat.until("born?\r\n")
    chat.until("\n> ")
    chat.press("\x03")
    chat.until("\n> ")
    chat.press("\x03")
    assert chat.ended() == 0


def test_a_stopped_answer_is_part_of_the_conversation() -> None:
    talk = tsotsallm.Conversation("embedded", tokens=8)
    answer = talk.answer("Where was Ada born?")
    begun = next(answer)
    answer.close()                               # type: ignore[attr-defined]
    assert [message["content"] for message in talk.messages] == ["Where was Ada born?", begun]
