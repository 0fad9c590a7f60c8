"""Runs the command line on damaged inputs, thousands of times: each case in a process forked from one that imported all.

`python -m tests.fuzz.harness --seed SEED --case NUMBER [--keep FOLDER]` runs one case alone and says what it did.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import io
import json
import os
import pkgutil
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.bases import (
    CALIBRATED,
    CHECKPOINTS,
    EVALUATE,
    EXPORT,
    GENERATE,
    INSPECT,
    PLAN,
    ROUND,
    Target,
    Verb,
    build_bases,
    copied,
    places,
    targets,
    walked,
)
from tests.fuzz.mutate import damage
from tests.fuzz.plain import SECRET, Damage
from tests.fuzz.process import Ended, forked, in_the_child

ROOT = Path(__file__).parents[2]
HARNESS = (sys.executable, "-m", "tests.fuzz.harness")
SECONDS, BUILDING_SECONDS = 20.0, 300.0
MEMORY_BYTES = 512 << 20
"""What a case may take beyond a process that imported everything; none of the inputs is larger than 20 MB."""
MESSAGE_CHARACTERS = 1020
FOLDERS = ("a b", "a%41?b=c&d#e", "é", "a\u2028b", "a\nb", "a'\"b", "a{b}c", "a\udcffb", "~a", "x" * 200, "a.yaml", "a.gguf")
"""Names of folders that people, other systems or attackers give."""
KEEP = "TSOTSALLM_FUZZ_KEEP"
"""Environment variable: folders of cases stay."""
SHARED_ONCE = ("words.txt", "tokens.yaml", "answers.yaml", "rows.jsonl")
"""What every case finds beside the folder `in`."""
INTERNAL = "internal error"
"""How the command line names a fault of its own."""
Listing = dict[str, tuple[int, int, int]]
OWN = ("tmp", "cache", "stdout", "stderr", "stdin")


@dataclass(frozen=True)
class Case:
    """What is damaged and who reads it: all that a seed and a number decide, but for the damage itself."""

    seed: int
    number: int
    base: str
    file: str
    verb: str
    arguments: tuple[str, ...]
    spoken: str
    form: str
    folder: str = "in"
    only: str = ""

    @property
    def again(self) -> str:
        limited = f" --only {self.only}" if self.only else ""
        return f"python -m tests.fuzz.harness --seed {self.seed} --case {self.number}{limited}"


@dataclass
class Outcome:
    """How a case ended; `problems` is empty where it ended as it should."""

    seed: int
    number: int
    what: str
    code: int
    seconds: float
    busy: float
    memory: int
    message: str
    again: str
    problems: list[str] = field(default_factory=list)


def case_of(seed: int, number: int, bases: Path, only: str = "") -> tuple[Case, random.Random]:
    """The case of a number, and the generator that damages its file; with `only`, of the files of one base."""
    rng = random.Random(f"{seed}/{number}")
    known = [one for one in targets(bases) if only in ("", one.base)]
    [target] = rng.choices(known, [one.share for one in known])
    [verb] = rng.choices(target.verbs, [1 / one.cost for one in target.verbs])
    folder = rng.choice(FOLDERS) if rng.random() < 0.03 else "in"
    arguments = tuple(re.sub(r"^in(?=/|$)", lambda _: folder, one) for one in arguments_of(target, verb))
    return Case(seed, number, target.base, target.file, verb.name, arguments, verb.spoken, target.form, folder, only), rng


def arguments_of(target: Target, verb: Verb) -> tuple[str, ...]:
    names = places(target)
    return tuple(argument.format(**names) for argument in verb.arguments)


def whole_cases(bases: Path) -> list[Case]:
    """Every verb on every base that it reads, undamaged: all of these must succeed, or else damage shows nothing."""
    found: dict[tuple[Any, ...], Case] = {}
    for target in targets(bases):
        for verb in target.verbs:
            arguments = arguments_of(target, verb)
            case = Case(0, len(found), target.base, target.file, verb.name, arguments, verb.spoken, target.form)
            found.setdefault((target.base, verb.name, arguments), case)
    return list(found.values())


# -- one case -----------------------------------------------------------------------------------------------------------


def run_case(case: Case, rng: random.Random | None, bases: Path, work: Path, *, baseline: int) -> Outcome:
    """Damage a copy of the base (not at all without a generator), run the verb on it in a process of its own, and judge."""
    shutil.rmtree(work, ignore_errors=True)
    box, outside = work / "box", work / "outside" / "secret.txt"
    outside.parent.mkdir(parents=True)
    outside.write_text(f"{SECRET}\n" * 3)
    (outside.parent / "config.json").write_text(json.dumps({"model_type": SECRET}))
    for name in ("tmp", "cache"):
        (box / name).mkdir(parents=True)
    copied(bases / case.base, box / case.folder)
    for name in SHARED_ONCE:
        shutil.copyfile(bases / name, box / name)
    (box / "model").symlink_to(bases / "tied")
    done = Damage(["nothing"]) if rng is None else damage(box / case.folder / case.file, case.form, outside, rng)
    (box / "stdin").write_text(case.spoken)
    before = listing(work)
    ended = forked(lambda: in_the_child(case.arguments, box), SECONDS)
    errors = (box / "stderr").read_text("utf-8", "replace")
    after = listing(work)
    what = f"{case.verb}: {case.base}/{case.file}: {'; '.join(done.steps)}" + f" ({case.folder!r})" * (case.folder != "in")
    memory = max(0, ended.memory - baseline)
    problems = judged(ended, errors, before, after, memory, refused=done.refused)
    if case.base in CHECKPOINTS and SECRET in errors:       # what the user names may be quoted, not what a link names
        problems.append("another file's content in the message")
    return Outcome(case.seed, case.number, what[:400], ended.code, round(ended.seconds, 2), round(ended.busy, 2), memory,
                   errors.strip()[-600:], case.again, problems)


def listing(folder: Path) -> Listing:
    """Type, size and time of change of everything under a folder, links not followed."""
    found = {}
    for path in walked(folder):
        facts = path.lstat()
        found[str(path.relative_to(folder))] = (stat.S_IFMT(facts.st_mode), 0 if path.is_dir() else facts.st_size,
                                                0 if path.is_dir() else facts.st_mtime_ns)
    return found


BESIDE = re.compile(r"note\b.*|(?!tsotsallm: ).+ \d+(%|/\d+)")
"""Lines on standard error beside an answer or an error: notes, and progress where it goes to a file."""


def judged(ended: Ended, errors: str, before: Listing, after: Listing, memory: int, *, refused: bool) -> list[str]:
    """What is wrong with how a case ended."""
    problems = []
    errors = "\n".join(line for line in errors.split("\n") if not BESIDE.fullmatch(line))
    lines = [line for line in errors.split("\n") if line.strip()]
    told = [line for line in lines if line.startswith("tsotsallm: ")]
    code = ended.code
    if code == -int(signal.SIGKILL) and ended.killed:
        return [f"hang: not finished after {SECONDS:.0f} s"]
    if code < 0:
        problems.append(f"signal {-code}")
    elif code not in (0, 1, 2):
        problems.append(f"exit code {code}")
    if "Traceback" in errors or "panicked" in errors:
        problems.append("traceback")
    if INTERNAL in errors:
        problems.append("internal error")
    if code == 1:
        if len(lines) != 1 or not told:
            problems.append(f"{len(lines)} lines on standard error")
        if len(errors) > MESSAGE_CHARACTERS:
            problems.append(f"{len(errors)} characters on standard error")
    elif code == 0 and told:
        problems.append("an error, and exit code 0")
    if any(not (letter.isprintable() or letter == "\n") for letter in errors) and code:
        problems.append("control characters on standard error")
    new = sorted(name for name in after.keys() - before.keys() if not _allowed(name))
    changed = sorted(name for name in before if name in after and before[name] != after[name] and not _allowed(name))
    gone = sorted(before.keys() - after.keys())
    outside = [name for name in (*new, *changed, *gone) if not name.startswith("box")]
    if outside:
        problems.append(f"written outside: {outside[0]}")
    if code != 0 and new:
        problems.append(f"new files: {', '.join(new[:3])}")
    if code == 0 and [name for name in new if name.startswith("box/tmp/") or ".partial" in name]:
        problems.append(f"temporary files: {', '.join(new[:3])}")
    if changed or gone:
        problems.append(f"inputs changed: {', '.join((*changed, *gone)[:3])}")
    if memory > MEMORY_BYTES:
        problems.append(f"memory: {memory >> 20} MiB")
    if ended.killed:
        problems.append("processes left behind")
    if code == 0 and refused:
        problems.append("accepted although wrong")
    if "!written" in after:
        problems.append("written elsewhere")
    return problems


def _allowed(name: str) -> bool:
    """What a failed run may leave: its own output, and whole pieces of the cache."""
    parts = name.split("/")
    if len(parts) == 2 and parts[0] == "box" and parts[1] in OWN:
        return True
    return parts[:2] == ["box", "cache"] and not any(part.startswith(".") or ".partial" in part for part in parts[2:])


# -- many cases -----------------------------------------------------------------------------------------------------------


COMPILED = [f"tsotsallm.numerics.{name}" for name in ("compiled", "compiled_rounding", "vectors")]
"""Modules that only the extra [fast] imports."""


def prepared() -> None:
    """Import all that any verb needs and use it once, without starting a thread: forked processes begin from here."""
    import tsotsallm
    from tsotsallm import machine

    for one in pkgutil.walk_packages(tsotsallm.__path__, "tsotsallm."):
        if not one.name.endswith("__main__") and (machine.compiler() is not None or one.name not in COMPILED):
            importlib.import_module(one.name)
    for name in ("gguf", "xllamacpp", "pyoxigraph", "rapidfuzz.process", "rich.table", "rich.progress", "optuna",
                 "matplotlib.pyplot", "jinja2.sandbox", *(f"transformers.models.{one}.modeling_{one}" for one in (
                     "llama", "gemma3", "phi3", "olmo3", "granite", "ministral3", "qwen3"))):
        importlib.import_module(name)
    import torch
    import typer

    typer.main.get_command = functools.cache(typer.main.get_command)        # a tenth of a second for each case otherwise
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    os.fsync = lambda _handle: None                         # no power fails between two cases


def warmed(bases: Path, folder: Path) -> int:
    """Run the commonest verbs once here, so that forked processes find everything loaded; returns an idle one's memory."""
    from tsotsallm.cli import app

    here, out, err = Path.cwd(), sys.stdout, sys.stderr
    shutil.rmtree(folder, ignore_errors=True)
    copied(bases / "tied", folder / "in")
    shutil.copyfile(bases / "words.txt", folder / "words.txt")
    os.chdir(folder)
    try:
        for verb in (INSPECT, PLAN, EVALUATE, ROUND, CALIBRATED, EXPORT, GENERATE):
            for name in ("out", "out.gguf"):
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
            try:
                app(list(verb.arguments))
            except SystemExit as ended:
                if ended.code:
                    raise RuntimeError(f"{verb.name} fails on a whole checkpoint: {sys.stderr.getvalue()}") from None
    finally:
        sys.stdout, sys.stderr = out, err
        os.chdir(here)
        shutil.rmtree(folder, ignore_errors=True)
    for _ in range(20):
        threads = [(Path("/proc/self/task") / one / "comm").read_text().strip() for one in os.listdir("/proc/self/task")]
        if len(threads) == 1:
            break
        time.sleep(0.1)                                     # one that is about to end
    else:
        raise RuntimeError(f"this process has {len(threads)} threads ({', '.join(threads)}): forked ones could hang")
    gc.collect()
    gc.freeze()
    return forked(lambda: 0, SECONDS).memory


def run_here(seed: int, numbers: Iterator[int] | range, bases: Path, work: Path, *, pristine: bool = False,
             only: str = "") -> Iterator[Outcome]:
    """Run cases one after another in this process; `pristine` leaves the inputs whole, `only` takes those of one base."""
    prepared()
    if not bases.exists() and (built := forked(lambda: build_bases(bases) or 0, BUILDING_SECONDS)).code:
        raise RuntimeError(f"the inputs cannot be built: exit code {built.code}")
    baseline = warmed(bases, work / "warm")
    whole = whole_cases(bases) if pristine else []
    for number in numbers:
        case, rng = (whole[number], None) if pristine else case_of(seed, number, bases, only)
        yield run_case(case, rng, bases, work / str(number), baseline=baseline)
        if KEEP not in os.environ:
            shutil.rmtree(work / str(number), ignore_errors=True)


def run_cases(seed: int, count: int, folder: Path, *, first: int = 0, workers: int = 2, whole: bool = False,
              only: str = "", tell: Callable[[Outcome], None] = lambda _outcome: None) -> list[Outcome]:
    """Run many cases in worker processes that take turns; all outcomes, in order."""
    bases = folder / "bases"
    if not bases.exists() and (workers > 1 or not count):
        _again(folder, "--build", bases)
    found: list[Outcome] = []
    running = []
    for place in range(min(workers, count)):
        command = ["--seed", seed, "--first", first + place, "--last", first + count, "--step", workers, "--bases", bases,
                   "--work", folder / f"worker-{place}", *(["--whole"] if whole else []),
                   *(["--only", only] if only else [])]
        with (folder / f"worker-{place}.log").open("w") as log:
            running.append(subprocess.Popen([*HARNESS, *map(str, command)], cwd=ROOT, env=_environment(folder),
                                            stdout=subprocess.PIPE, stderr=log, text=True))
    waiting = [threading.Thread(target=_listen, args=(one, found, tell)) for one in running]
    for one in waiting:
        one.start()
    for one in waiting:
        one.join()
    for place, process in enumerate(running):
        if code := process.wait():
            said = (folder / f"worker-{place}.log").read_text()[-3000:]
            raise RuntimeError(f"worker {place} of the harness failed with exit code {code}: {said}")
    return sorted(found, key=lambda outcome: outcome.number)


def _listen(process: subprocess.Popen[str], found: list[Outcome], tell: Callable[[Outcome], None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        outcome = Outcome(**json.loads(line))
        found.append(outcome)
        tell(outcome)


def _environment(folder: Path) -> dict[str, str]:
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    return os.environ | dict.fromkeys(("HOME", "HF_HOME", "MPLCONFIGDIR", "TSOTSALLM_CACHE"), str(home)) | {
        "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
        "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}


def main() -> None:
    """The command line of the harness: one case for people, or a worker's share of many."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.harness", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone, and say what it did")
    parser.add_argument("--keep", type=Path, help="leave the folder of the case here")
    parser.add_argument("--whole", action="store_true", help="leave the input undamaged")
    parser.add_argument("--count", type=int, help="run so many cases, and show those with problems")
    parser.add_argument("--only", default="", help="take the files of this base alone, such as sources")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--bases", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--build", type=Path)
    asked = parser.parse_args()
    if asked.build is not None:
        build_bases(asked.build)
    elif asked.last is not None:
        for outcome in run_here(asked.seed, range(asked.first, asked.last, asked.step), asked.bases, asked.work,
                                pristine=asked.whole, only=asked.only):
            print(json.dumps(asdict(outcome)), flush=True)
    elif asked.count is not None:
        with tempfile.TemporaryDirectory() as folder:
            _show_many(asked.seed, asked.first, asked.count, Path(folder), asked.only)
    else:
        _show_one(asked.seed, asked.case or 0, asked.keep, whole=asked.whole, only=asked.only)


def _show_many(seed: int, first: int, count: int, folder: Path, only: str) -> None:
    def tell(outcome: Outcome) -> None:
        if outcome.problems:
            print(json.dumps(asdict(outcome), ensure_ascii=False), flush=True)

    began = time.monotonic()
    found = run_cases(seed, count, folder, first=first, only=only, tell=tell)
    whole = sum(not one.problems for one in found)
    print(f"{len(found)} cases in {time.monotonic() - began:.0f} s, {whole} without a problem")


def _show_one(seed: int, number: int, keep: Path | None, *, whole: bool, only: str) -> None:
    """Run a case as a worker does, in a fresh process, and print everything about it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases, work = folder / "bases", folder / "worker-0"
        _again(folder, "--build", bases)
        [line] = _again(folder, "--seed", seed, "--first", number, "--last", number + 1, "--bases", bases, "--work", work,
                        *(["--whole"] if whole else []), *(["--only", only] if only else []))
        for key, value in json.loads(line).items():
            print(f"{key:9} {value}")
        box = work / str(number) / "box"
        print("\nstandard error:\n" + (box / "stderr").read_text("utf-8", "replace")[:6000])
        if keep is not None:
            shutil.copytree(work / str(number), keep, symlinks=True, ignore_dangling_symlinks=True, ignore=_specials)
            shutil.copytree(bases / "tied", keep / "model")
            case = whole_cases(bases)[number] if whole else case_of(seed, number, bases, only)[0]
            print(f"kept: cd {keep}/box; ln -sfn ../model model; tsotsallm {' '.join(case.arguments)}")


def _again(folder: Path, *arguments: object) -> list[str]:
    """The lines that the harness prints, run in a process of its own."""
    done = subprocess.run([*HARNESS, *map(str, arguments)], cwd=ROOT,
                          env=_environment(folder) | {KEEP: "1"}, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def _specials(folder: str, names: list[str]) -> list[str]:
    """FIFOs and sockets, which cannot be copied."""
    modes = {name: (Path(folder) / name).lstat().st_mode for name in names}
    return [name for name, mode in modes.items() if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)]


if __name__ == "__main__":
    main()
