"""Damaged inputs through the command line: an answer or one line of error, in bounded time and memory, with nothing left."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.fuzz.bases import SOURCES
from tests.fuzz.harness import SECONDS, Listing, Outcome, case_of, judged, listing, run_cases, whole_cases
from tests.fuzz.mutate import FORMS, damage
from tests.fuzz.plain import SECRET
from tests.fuzz.process import Ended, forked

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs fork and pidfd_open, as Linux has them")
for library in ("gguf", "xllamacpp", "pyoxigraph", "rapidfuzz", "optuna", "matplotlib"):
    pytest.importorskip(library, reason=f"the verbs under test need {library}")

CASES = int(os.environ.get("TSOTSALLM_FUZZ_CASES", "10000"))
SOURCE_CASES = int(os.environ.get("TSOTSALLM_FUZZ_SOURCES", "500"))
SEED = int(os.environ.get("TSOTSALLM_FUZZ_SEED", "1"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def assert_clean(found: list[Outcome]) -> None:
    wrong = [f"{', '.join(one.problems)}\n    {one.what}\n    {one.message[-200:]!r}\n    {one.again}"
             for one in found if one.problems]
    assert not wrong, f"{len(wrong)} of {len(found)} cases:\n" + "\n".join(wrong[:30])


def test_damaged_inputs_end_in_an_answer_or_one_line(folder: Path) -> None:
    found = run_cases(0, 100, folder, workers=1)
    assert len(found) == 100
    assert_clean(found)
    assert {one.code for one in found} == {0, 1}


def test_damaged_gguf_files_as_models_end_in_an_answer_or_one_line(folder: Path) -> None:
    found = run_cases(0, 12, folder, workers=1, only=SOURCES)
    assert len(found) == 12
    assert_clean(found)
    assert {one.code for one in found} == {0, 1}


@pytest.mark.slow
def test_many_damaged_gguf_files_as_models(folder: Path) -> None:
    found = run_cases(SEED, SOURCE_CASES, folder, only=SOURCES)
    assert len(found) == SOURCE_CASES
    assert_clean(found)


@pytest.mark.slow
def test_ten_thousand_damaged_inputs(folder: Path) -> None:
    found = run_cases(SEED, CASES, folder)
    assert len(found) == CASES
    assert_clean(found)


@pytest.mark.slow
def test_whole_inputs_are_read_by_all_verbs(folder: Path) -> None:
    run_cases(0, 0, folder)                                 # builds the inputs
    found = run_cases(0, len(whole_cases(folder / "bases")), folder, whole=True)
    assert_clean(found)
    assert {one.code for one in found} == {0}, [one.what for one in found if one.code]


# -- the harness itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", sorted({*FORMS, "bytes"}))
def test_the_same_seed_does_the_same_damage(form: str, tmp_path: Path) -> None:
    source = {"json": '{"a": [1, {"b": "x"}], "c": null}', "tokenizer": '{"model": {"type": "BPE"}}',
              "yaml": "- a: {b: 1}\n- c", "csv": "a,b\n1,2\n", "rdf": "<a> <b> <c> .\n", "template": "{{ x }}",
              "jsonl": '{"a": 1}\n[2]', "text": "one\ntwo"}.get(form, "\x10\0\0\0\0\0\0\0{}").encode()
    outside = tmp_path / "outside"
    outside.write_text(SECRET)

    def damaged(seed: int, name: str) -> tuple[bytes, list[str]]:
        path = tmp_path / name
        path.write_bytes(source)
        done = damage(path, form, outside, random.Random(seed))
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b"none"
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        return content, done.steps

    assert [damaged(seed, "a") for seed in range(60)] == [damaged(seed, "a") for seed in range(60)]
    assert len({damaged(seed, "a")[0] for seed in range(60)}) > 20


@pytest.mark.slow
def test_cases_reach_every_base_and_verb(folder: Path) -> None:
    run_cases(0, 0, folder)
    cases = [case_of(7, number, folder / "bases")[0] for number in range(4000)]
    reached = {(one.base, one.verb) for one in cases}
    assert {(one.base, one.verb) for one in whole_cases(folder / "bases")} <= reached


def ended(code: int = 1, *, killed: bool = False) -> Ended:
    return Ended(code, 0.1, 0.1, 0, killed)


@pytest.mark.parametrize(("how", "errors", "after", "memory", "problem"), [
    (ended(-6), "", {}, 0, "signal 6"),
    (ended(-9, killed=True), "", {}, 0, "hang"),
    (ended(0, killed=True), "", {}, 0, "processes left behind"),
    (ended(70), "", {}, 0, "exit code 70"),
    (ended(), "tsotsallm: a\nb\n", {}, 0, "2 lines"),
    (ended(), "", {}, 0, "0 lines"),
    (ended(), "Traceback (most recent call last):\n", {}, 0, "traceback"),
    (ended(), "tsotsallm: internal error\n", {}, 0, "internal error"),
    (ended(), f"tsotsallm: {'x' * 2000}\n", {}, 0, "characters on standard error"),
    (ended(), "tsotsallm: \x1b[31mred\n", {}, 0, "control characters"),
    (ended(), "tsotsallm: no\n", {"box/out.gguf": (0, 1, 1)}, 0, "new files: box/out.gguf"),
    (ended(0), "", {"box/tmp/x": (0, 1, 1)}, 0, "temporary files: box/tmp/x"),
    (ended(0), "", {"x": (0, 1, 1)}, 0, "written outside: x"),
    (ended(0), "", {"box/in": (0, 2, 2)}, 0, "inputs changed: box/in"),
    (ended(0), "", {}, 1 << 30, "memory: 1024 MiB"),
])
def test_the_judge_sees(how: Ended, errors: str, after: Listing, memory: int, problem: str) -> None:
    before = {"box/in": (0, 1, 1)}
    assert any(problem in one for one in judged(how, errors, before, before | after, memory, refused=False))


def test_the_judge_lets_answers_and_clear_errors_pass() -> None:
    assert judged(ended(0), "", {}, {"box/out/config.json": (0, 1, 1)}, 0, refused=False) == []
    cached = {"box/cache/graphs/x": (0, 1, 1)}
    assert judged(ended(), "tsotsallm: in holds no config.json\n", {}, cached, 0, refused=True) == []
    assert judged(ended(0), "", {}, {}, 0, refused=True) == ["accepted although wrong"]


def test_processes_are_bounded_and_nothing_stays(tmp_path: Path) -> None:
    def sleeping() -> int:
        time.sleep(60)
        return 0

    def leaving() -> int:
        if os.fork() == 0:
            time.sleep(60)
        return 0

    assert forked(lambda: 3, SECONDS).code == 3
    assert forked(lambda: os.kill(os.getpid(), signal.SIGTERM) or 0, SECONDS).code == -signal.SIGTERM
    slow = forked(sleeping, 0.2)
    assert (slow.code, slow.killed) == (-signal.SIGKILL, True)
    assert slow.seconds < 5
    left = forked(leaving, SECONDS)
    assert (left.code, left.killed) == (0, True)
    assert listing(tmp_path) == {}
