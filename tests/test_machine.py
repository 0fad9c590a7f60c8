"""Threads: asleep when idle, as many as are of use, and as many as before where a run goes on; a silent standard error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.compressing import same_bytes
from tsotsallm import machine
from tsotsallm.compression import compress
from tsotsallm.errors import ResumeError
from tsotsallm.numerics import rounding
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.numerics.gptq import reversed_factor

LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", machine.THREADS)


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what it says about threads."""
    return {name: value for name, value in os.environ.items() if name not in LIMITS} | more


def openmp_of(*options: str, **more: str) -> dict[str, str]:
    """What OpenMP itself says that it was told when a command loaded it; this one soon ends for want of a text."""
    found = subprocess.run([sys.executable, "-m", "tsotsallm", "evaluate", "embedded", "--text", "no-such-text", *options],
                           capture_output=True, text=True, env=environment(OMP_DISPLAY_ENV="verbose", **more))
    assert "no-such-text does not exist" in found.stderr
    pairs = (line.replace("[host]", "").split("=", 1) for line in found.stderr.splitlines() if "=" in line)
    return {name.strip(): value.strip().strip("'") for name, value in pairs}


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many busy programs beside this one; they end by themselves where nobody ends them."""
    code = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()


# -- waiting ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP tells its settings in other words elsewhere")
def test_the_command_line_waits_passively_and_takes_the_threads_it_is_given() -> None:
    found = openmp_of("--threads", "1")
    assert found["OMP_WAIT_POLICY"] == "PASSIVE"
    assert found["GOMP_SPINCOUNT"] == machine.SPINS         # GNU's OpenMP, as torch and xllamacpp bring it
    assert found["OMP_NUM_THREADS"] == "1"
    found = openmp_of(OMP_WAIT_POLICY="active", TSOTSALLM_THREADS="2")
    assert found["OMP_WAIT_POLICY"] == "ACTIVE"
    assert found["OMP_NUM_THREADS"] == "2"


def test_importing_the_package_changes_no_environment() -> None:
    code = "import os; before = dict(os.environ); import tsotsallm, tsotsallm.cli; print(before == dict(os.environ))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert found.stdout.strip() == "True"


@pytest.mark.parametrize(("options", "more"), [(["--threads", "0"], {}), (["--threads", "1.5"], {}),
                                               (["--threads", "100000"], {}), ([], {machine.THREADS: "many"})])
def test_thread_counts_that_are_none_are_refused_in_a_line(options: list[str], more: dict[str, str]) -> None:
    found = subprocess.run([sys.executable, "-m", "tsotsallm", "plan", "embedded", "rtn:4:32", *options],
                           capture_output=True, text=True, env=environment(**more))
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert "--threads" in found.stderr


# -- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("physical", "shares", "idle"), [
    (2, [0, 0], 2), (2, [100, 0], 1), (2, [100, 100], 1), (2, [20, 10], 2), (2, [60, 0], 1), (4, [100, 0, 0, 0], 3),
    (16, [100, 100] + 14 * [0], 14), (4, [100, 100] + 6 * [0], 3), (1, [0], 1), (1, [100], 1)])
def test_as_many_threads_as_cores_are_idle(monkeypatch: pytest.MonkeyPatch, physical: int, shares: list[float],
                                           idle: int) -> None:
    monkeypatch.setattr(machine, "_allowed", lambda: list(range(len(shares))))
    monkeypatch.setattr(machine, "_quota", lambda: None)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: len(shares) if logical else physical)
    monkeypatch.setattr(psutil, "cpu_percent", lambda _interval, percpu: [float(one) for one in shares])
    assert machine.idle_cores() == idle


def test_busy_programs_are_seen() -> None:
    with neighbours(os.cpu_count() or 1):
        assert machine.idle_cores() == 1


def test_only_processors_that_this_process_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_allowed", lambda: [2, 3])
    monkeypatch.setattr(machine, "_quota", lambda: None)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 4)
    monkeypatch.setattr(psutil, "cpu_percent", lambda _interval, percpu: [100.0, 100.0, 0.0, 0.0])
    assert machine.idle_cores() == 2


@pytest.mark.parametrize(("said", "cores"), [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1),
                                             ("1600000 100000", 8), ("150000 100000", 2), ("nonsense", 8)])
def test_a_containers_share_of_the_processors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str,
                                              cores: int) -> None:
    (tmp_path / "cpu.max").write_text(f"{said}\n")
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(machine, "_allowed", lambda: list(range(8)))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)
    assert machine.cores() == cores


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(machine, "idle_cores", lambda: 7)
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patch:
        patch.setenv("MKL_NUM_THREADS", "3")
        machine.use_threads(None)
        assert "OMP_NUM_THREADS" not in os.environ
    machine.use_threads(None)
    assert machine.chosen_threads() == 7
    assert machine.THREADS not in os.environ        # what is chosen today is not asked for
    machine.use_threads(2)
    assert [os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", machine.THREADS)] == ["2", "2", "2"]
    for text in ("", "0", "two", "2,1", "-3"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert machine.chosen_threads() is None


# -- small and large operations ---------------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_small_operations_take_one_thread_and_large_ones_inside_all_of_them() -> None:
    with machine.threads_for(0):
        assert torch.get_num_threads() == 1
        with machine.threads_for(machine.LARGE_FLOPS):
            assert torch.get_num_threads() == 2
            with machine.threads_for(1):
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
        with pytest.raises(ZeroDivisionError), machine.threads_for(machine.LARGE_FLOPS):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    found = []
    with machine.threads_for(machine.LARGE_FLOPS):
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert found == [2]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("grid", ["q4_0", "q4_k"])
def test_rounding_gives_the_same_bytes_on_one_thread_and_on_two(grid: str) -> None:
    """Matrices as small as these are rounded on one thread whatever was chosen."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 256, generator=generator)
    weight, outputs = torch.randn(96, 256, generator=generator), torch.randn(128, 96, generator=generator)
    order = rounding.block_order((inputs.T @ inputs).diagonal(), GgmlGrid(grid))

    def rounded() -> Any:
        return rounding.round_to_blocks(weight, reversed_factor(inputs.T @ inputs, order, 0.01), order, GgmlGrid(grid),
                                        outputs=outputs.T @ outputs + torch.eye(96))

    several = rounded()
    with machine.on_threads(1):
        one = rounded()
    assert torch.equal(several.codes, one.codes)
    assert torch.equal(several.step, one.step)


@pytest.mark.usefixtures("two_threads")
def test_work_side_by_side_has_one_thread_each_and_keeps_its_order() -> None:
    meeting = threading.Barrier(2, timeout=20)

    def work(number: int) -> tuple[int, int]:
        meeting.wait()
        return number, torch.get_num_threads()

    assert machine.side_by_side(work, range(4), most=2) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert machine.side_by_side(lambda number: (number, torch.get_num_threads()), [5], most=2) == [(5, 2)]
    assert torch.get_num_threads() == 2


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_threads")
def test_a_run_goes_on_with_the_threads_it_was_begun_with(tiny: Path, text: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """What else is busy today is no reason to refuse, and none for other bytes."""
    monkeypatch.delenv(machine.THREADS, raising=False)

    def run(name: str, **more: Any) -> Any:
        return compress(tiny, "gptq:4:32", tmp_path / name, calibration=text, windows=4, window=64, **more)

    def stop(now: Any) -> None:
        seen.append(torch.get_num_threads())
        if now.layer == 2:
            raise KeyboardInterrupt

    seen: list[int] = []
    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", progress=stop)
    torch.set_num_threads(1)
    monkeypatch.setenv(machine.THREADS, "1")
    with pytest.raises(ResumeError, match=r"machine\.threads: 2 then, 1 now"):
        run("cut")
    monkeypatch.delenv(machine.THREADS)
    seen.clear()
    run("cut", progress=lambda _now: seen.append(torch.get_num_threads()))
    assert 2 in seen
    assert torch.get_num_threads() == 1         # what comes after it computes as before
    assert same_bytes(tmp_path / "whole", tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "tsotsallm.json").read_text())["inputs"]["machine"]["threads"] == 2


@pytest.mark.usefixtures("two_threads")
def test_restarted_work_takes_the_threads_of_today(tiny: Path, text: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(machine.THREADS, raising=False)

    def stop(now: Any) -> None:
        if now.layer == 1:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"calibration": text, "windows": 2, "window": 32}
    with pytest.raises(KeyboardInterrupt):
        compress(tiny, "gptq:4:32", tmp_path / "out", progress=stop, **options)
    torch.set_num_threads(1)
    compress(tiny, "gptq:4:32", tmp_path / "out", restart=True, **options)
    assert json.loads((tmp_path / "out" / "tsotsallm.json").read_text())["inputs"]["machine"]["threads"] == 1


@pytest.mark.usefixtures("two_threads")
def test_a_fit_goes_on_with_the_threads_it_was_begun_with(tiny: Path, text: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    from tsotsallm.fit import search as fit
    from tsotsallm.fit.reach import Settings

    monkeypatch.delenv(machine.THREADS, raising=False)
    seen = []

    def interrupted(_self: Any) -> None:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(fit._Fit, "run", interrupted)
    for threads, restart in ((2, False), (1, False), (1, True), (2, False)):
        torch.set_num_threads(threads)
        with pytest.raises(KeyboardInterrupt):
            fit.fit(str(tiny), fit.Target(100_000), tmp_path / "out", Settings(str(text), windows=2, window=32, compared=2),
                    restart=restart)
    assert seen == [2, 2, 1, 1]


@pytest.mark.parametrize("noted", ["{", "[]", "{}", '{"machine": 3}', '{"machine": {"threads": true}}',
                                   '{"machine": {"threads": 1000000}}', '{"machine": {"threads": -1}}',
                                   '{"machine": {"threads": "2"}}'])
def test_a_damaged_note_gives_no_thread_count(tmp_path: Path, noted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tsotsallm.journal import STATE, begun_threads

    monkeypatch.delenv(machine.THREADS, raising=False)
    assert begun_threads(tmp_path) is None
    (tmp_path / STATE).write_text(noted)
    assert begun_threads(tmp_path) is None


# -- standard error ---------------------------------------------------------------------------------------------------


def test_native_code_is_silent_for_a_while() -> None:
    code = ("import os, sys\nfrom tsotsallm.machine import quiet_stderr\n"
            "os.write(2, b'before\\n')\n"
            "try:\n    with quiet_stderr():\n        os.write(2, b'within\\n')\n        raise ValueError('passes')\n"
            "except ValueError as error:\n    print(error, file=sys.stderr)\n"
            "print(len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0)\n"
            "for _ in range(5):\n    with quiet_stderr():\n        os.write(2, b'within\\n')\n"
            "print(len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0)\n"
            "os.write(2, b'after\\n')\n")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.splitlines() == ["before", "passes", "after"]
    assert len(set(found.stdout.split())) == 1          # nothing stays open


def test_without_a_standard_error_nothing_fails() -> None:
    code = ("import os, sys\nos.close(2)\nfrom tsotsallm.machine import quiet_stderr\n"
            "with quiet_stderr():\n    print('done')\n")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "done\n"
