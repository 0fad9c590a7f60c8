"""What a busy neighbour costs: seconds of `compress`, alone and beside other programs, medians; judged.

    python benchmarks/busy.py [--rounds 3] [--neighbours 0,1,2] [--later] [--threads N] [--recipe gptq:q4_0]
                             [--model FILE --calibration TEXT]

Neighbours are plain busy loops, pinned to nothing. Rounds take turns (alone, beside one, beside two, alone, ...), so that
what else the machine does meets all alike; where it is not quiet, that is said. With `--later` neighbours begin two seconds
after the command, which has chosen its threads by then. Exit code 1: beside one busy program it took more than 2.2 times as
long as alone. OMP_WAIT_POLICY=ACTIVE before the command shows what threads that spin would cost.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

BOUND = 2.2
"""Times as long beside one busy program on two cores as alone."""
ALONE = 0.2
"""Cores that a quiet machine uses."""
LATER_S = 2.0
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TSOTSALLM_THREADS")


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many busy loops, which end with this process however it ends."""
    loop = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(100_000))"
    started = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()


def measured(model: str, recipe: str, neighbours: int, options: list[str], *, later: bool) -> tuple[float, float]:
    """Seconds of a run beside so many busy loops, and how many cores were used by programs other than these."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "tsotsallm", "compress", model, recipe, "--windows", "4", "--window", "256", "-o",
               str(folder / "out"), *options]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        if not later:
            stack.enter_context(busy(neighbours))
        psutil.cpu_times_percent()
        before, began = children_s(), time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={
            name: value for name, value in os.environ.items() if name not in COUNTS})
        stack.callback(process.kill)
        if later:
            time.sleep(LATER_S)
            stack.enter_context(busy(neighbours))
        if process.wait():
            raise SystemExit(f"the run failed ({process.returncode})")
        seconds = time.perf_counter() - began
        used = (1 - psutil.cpu_times_percent().idle / 100) * (psutil.cpu_count() or 1)
        return seconds, used - (children_s() - before) / seconds


def children_s() -> float:
    """Processor seconds of this process's children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--neighbours", default="0,1,2")
    parser.add_argument("--later", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--recipe", default="gptq:q4_0")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--calibration")
    asked = parser.parse_args()
    counts = [int(one) for one in asked.neighbours.split(",")]
    options = [] if asked.threads is None else ["--threads", str(asked.threads)]
    options += [] if asked.calibration is None else ["--calibration", asked.calibration]
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for number in range(asked.rounds):
        for count in counts:
            found[count].append(measured(asked.model, asked.recipe, count, options, later=asked.later))
            print(f"round {number + 1}, {count} neighbours: {found[count][-1][0]:.1f} s", file=sys.stderr)
    medians = {count: statistics.median(seconds for seconds, _ in runs) for count, runs in found.items()}
    print(f"{psutil.cpu_count()} processors, {asked.rounds} rounds, neighbours {'later' if asked.later else 'before'}")
    print("neighbours   seconds (median)   times alone")
    for count, seconds in medians.items():
        print(f"{count:10d}   {seconds:16.1f}   {seconds / medians[counts[0]]:11.2f}")
    others = statistics.median(used for _, used in found[counts[0]])
    if others > ALONE:
        print(f"other programs used {others:.2f} cores meanwhile: measure again when the machine is quiet")
    if not {0, 1} <= set(counts):
        return 0
    ratio = medians[1] / medians[0]
    print(f"{'holds' if ratio <= BOUND else 'FAILS'}: {ratio:.2f} times as long beside one busy program, at most {BOUND}")
    return int(ratio > BOUND)


if __name__ == "__main__":
    sys.exit(main())
