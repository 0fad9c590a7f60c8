"""The models of a service: loaded once, with what a page tells of them; what is said passes through a gate."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tsotsallm.checkpoint.gguf_file import GgufFile
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.engine.factory import speaker
from tsotsallm.engine.interface import Answer, Piece, Question, Sampling, Speaker, Token, texts
from tsotsallm.engine.llama import CacheType, Llama
from tsotsallm.errors import ResourceError, ServeError
from tsotsallm.evaluation.cost import check_fits, parameters_of
from tsotsallm.evaluation.energy import Power, check_country, measure_power
from tsotsallm.machine import free_ram_bytes, rss_bytes
from tsotsallm.units import human_bytes

Found = TypeVar("Found")
USUAL = {"model", "adapter"}
"""File names that say nothing; the folder's name stands for them."""


@dataclass(frozen=True)
class Loading:
    """How models are loaded: type of the key-value cache, conversations at a time, country for energy."""

    kv: CacheType = "f16"
    slots: int = 4
    keep_prompt: bool = True
    country: str | None = None


@dataclass
class Served:
    """A model in memory.

    original      what it was made from, as its own record says: a name or a path
    memory_bytes  what loading it and a first token took of this process's memory; None where that cannot be told
    """

    name: str
    path: str
    kind: str
    speaker: Speaker
    bytes: int
    parameters: int
    recipe: str | None
    original: str | None
    report: Path | None
    memory_bytes: int | None
    power: Power | None
    gate: Gate = field(init=False)

    def energy_wh(self, seconds: float) -> float | None:
        return None if self.power is None else self.power.watts * seconds / 3600

    @property
    def energy_label(self) -> str | None:
        return None if self.power is None else "measured" if self.power.measured else "estimated"


def name_of(path: str) -> str:
    """A name for a model by its path: of the file or folder, or of the folder around it where that says nothing."""
    where = Path(path)
    plain = where.stem if where.suffix == ".gguf" else where.name or path
    if plain in USUAL:
        plain = where.resolve().parent.name
    return re.sub(r"[^\w.-]+", "-", plain).strip("-.") or "model"


def load(path: str, name: str, how: Loading) -> Served:
    """Load a model; what it is made of, and by which recipe, is read from its own records."""
    if how.country is not None:
        check_country(how.country)
    _check_fits(path)
    before = rss_bytes()
    loaded = speaker(path, kv=how.kv if path.endswith(".gguf") else "f16", slots=how.slots, keep_prompt=how.keep_prompt)

    def speak(tokens: int) -> None:
        for _ in texts(loaded, Question([0, 1], tokens)):       # in a thread, so that Ctrl-C is heard meanwhile
            continue

    speak(2)
    grown = rss_bytes() - before
    power = None if how.country is None else measure_power(how.country, lambda: speak(32), 4.0)
    facts = _facts_of_file(loaded.file) if isinstance(loaded, Llama) else _facts_of_checkpoint(path)
    return Served(name=name, path=path, speaker=loaded, memory_bytes=grown if grown > 0 else None, power=power, **facts)


def _check_fits(path: str) -> None:
    """Raise where a model is larger than free memory."""
    if not path.endswith(".gguf"):
        check_fits(path)
    elif Path(path).is_file() and (size := Path(path).stat().st_size) > free_ram_bytes():
        raise ResourceError(f"{path} has {human_bytes(size)} and {human_bytes(free_ram_bytes())} of memory are free; close "
                            "other programs, or serve a smaller model")


def _facts_of_file(file: GgufFile) -> dict[str, Any]:
    return {"kind": "gguf", "bytes": file.size, "parameters": file.parameters,
            "recipe": None if file.recipe is None else _as_yaml(file.recipe), "original": file.text("tsotsallm.source"),
            "report": _report_of(file.path.parent)}


def _facts_of_checkpoint(path: str) -> dict[str, Any]:
    checkpoint = Checkpoint.open(path)
    made = checkpoint.provenance
    return {"kind": "checkpoint", "bytes": checkpoint.weight_bytes, "parameters": parameters_of(View.of(checkpoint)),
            "recipe": None if made is None else _as_yaml(made["recipe"]),
            "original": None if made is None else str(made["source"]),
            "report": _report_of(checkpoint.directory) or _report_of(checkpoint.directory.parent)}


def _as_yaml(recipe: Any) -> str:
    return str(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110))


def _report_of(folder: Path) -> Path | None:
    """The report that stands in a folder of `fit`, or beside a result."""
    path = folder / "report.html"
    return path if path.is_file() and ((folder / "fit.json").exists() or (folder / "tsotsallm.json").exists()) else None


class Models:
    """Models by name; the first one answers where no name is given."""

    def __init__(self, queue: int = 16, timeout_s: float = 300.0) -> None:
        self.queue, self.timeout_s = queue, timeout_s
        self.by_name: dict[str, Served] = {}
        self.created = int(time.time())

    def add(self, one: Served) -> Served:
        one.gate = Gate(one.speaker, self.queue)
        self.by_name[one.name] = one
        return one

    def free_name(self, wanted: str) -> str:
        names = [wanted, *(f"{wanted}-{number}" for number in range(2, len(self.by_name) + 3))]
        return next(name for name in names if name not in self.by_name)

    def get(self, name: str | None) -> Served | None:
        return next(iter(self.by_name.values()), None) if name is None else self.by_name.get(name)

    def original_of(self, one: Served) -> str | None:
        """The name of the served model that another was made from."""
        if one.original is None:
            return None
        same = (other.name for other in self.by_name.values() if other is not one and (
            other.path == one.original or other.name == one.original or name_of(other.path) == name_of(one.original)))
        return next(same, None)

    def stop(self) -> None:
        for one in self.by_name.values():
            one.gate.stop()


def load_all(paths: Sequence[str], how: Loading, models: Models, say: Callable[[str], None]) -> None:
    """Load models given as PATH or NAME=PATH."""
    for given in paths:
        name, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            name, path = "", given
        if name and re.fullmatch(r"[\w.-]+", name) is None:
            raise ServeError(f"{name!r} cannot be a model's name; it takes letters, digits, '.', '_' and '-'")
        if name in models.by_name:
            raise ServeError(f"two models are named {name}; give each a name of its own, as NAME=PATH")
        one = models.add(load(path, models.free_name(name or name_of(path)), how))
        say(f"{one.name}: {path}")


class Busy(Exception):
    """All places and the queue before them are taken."""


class TooLate(Exception):
    """A question was not answered within its time."""


class Gate:
    """As many questions at a time as the engine has slots, a queue of some length before it; each in a thread.

    A place is free again when its thread has ended, however the one who asked has gone.
    """

    def __init__(self, loaded: Speaker, queue: int) -> None:
        self.speaker, self.queue = loaded, queue
        self.waiting = self.running = 0
        self._places = asyncio.Semaphore(loaded.slots)
        self._pool = ThreadPoolExecutor(loaded.slots, thread_name_prefix="answer")
        self._cancels: set[threading.Event] = set()

    def stop(self) -> None:
        """End every answer with its next token."""
        for cancel in list(self._cancels):
            cancel.set()

    def answer(self, question: Question, deadline: float) -> AsyncGenerator[Piece | Answer, None]:
        """Yield the pieces of an answer, then how it ended; `deadline` by time.monotonic()."""
        def speak(tell: Callable[[Any], None], cancel: threading.Event) -> Answer:
            def heard(piece: Piece) -> bool:
                tell(piece)
                return cancel.is_set()

            return self.speaker.speak(question, heard)

        return self._through(speak, deadline)

    async def prompt(self, ids: Sequence[int], likeliest: int, deadline: float) -> list[Token]:
        """The tokens of a prompt with their log-probabilities."""
        def score(_tell: Callable[[Any], None], cancel: threading.Event) -> list[Token]:
            return list(self.speaker.prompt_tokens(ids, likeliest, cancel.is_set))

        found = self._through(score, deadline)
        async with contextlib.aclosing(found):
            return list(await anext(found))

    async def tokenize(self, text: str) -> list[int]:
        return await asyncio.to_thread(_contained, lambda: self.speaker.tokenize(text))

    async def _through(self, work: Callable[[Callable[[Any], None], threading.Event], Any],
                       deadline: float) -> AsyncGenerator[Any, None]:
        await self._enter(deadline)
        loop, heard, cancel = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()
        self._cancels.add(cancel)
        self.running += 1

        def tell(one: Any) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, one)

        def ended(found: Any) -> None:
            self.running -= 1
            self._cancels.discard(cancel)
            self._places.release()
            heard.put_nowait(_End(found))

        def run() -> None:
            try:
                found = _contained(lambda: work(tell, cancel))
            except Exception as error:
                found = error
            try:
                loop.call_soon_threadsafe(ended, found)
            except RuntimeError:        # the service has ended meanwhile
                return

        self._pool.submit(run)
        try:
            while True:
                one = await _before(deadline, heard.get())
                if isinstance(one, _End):
                    if isinstance(one.found, Exception):
                        raise one.found
                    yield one.found
                    return
                yield one
        finally:
            cancel.set()

    async def _enter(self, deadline: float) -> None:
        if self.running + self.waiting >= self.speaker.slots + self.queue:
            raise Busy
        self.waiting += 1
        try:
            await _before(deadline, self._places.acquire())
        finally:
            self.waiting -= 1


async def _before(deadline: float, work: Awaitable[Found]) -> Found:
    """Wait for something until a time (asyncio.wait_for would lose a cancellation that comes with a result)."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await work
    except TimeoutError:
        raise TooLate from None


@dataclass(frozen=True)
class _End:
    found: Any


def sampling(temperature: float, top_p: float, top_k: int, seed: int, **more: Any) -> Sampling:
    """A sampling for engines whose seeds have 32 bits, the largest of which means chance in llama.cpp."""
    return Sampling(temperature, top_p, top_k, seed % 0xFFFFFFFF, **more)


def _contained(work: Callable[[], Found]) -> Found:
    """What some work gives; a library's panic, which is no Exception and would end the service's loop, becomes one."""
    try:
        return work()
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
