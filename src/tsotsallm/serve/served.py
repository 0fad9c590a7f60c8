"""The models of a service: each is loaded once, with the facts that the page shows; requests pass through a gate."""

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
from typing import Any, Generic, Never, TypeVar

import yaml

from tsotsallm.checkpoint.gguf_file import GgufFile
from tsotsallm.checkpoint.gguf_place import gguf_path, parts_at
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.engine.factory import speaker
from tsotsallm.engine.interface import Answer, Piece, Question, Sampling, Speaker, Token, texts
from tsotsallm.engine.llama import CacheType, Llama, in_process
from tsotsallm.engine.llama import installed as llama_installed
from tsotsallm.errors import ResourceError, ServeError
from tsotsallm.evaluation.cost import check_fits, parameters_of
from tsotsallm.evaluation.energy import Power, check_country, measure_power
from tsotsallm.machine import free_ram_bytes, rss_bytes
from tsotsallm.units import human_bytes

Result = TypeVar("Result")
Heard = TypeVar("Heard")
USUAL = {"model", "adapter"}
"""File names that say nothing; the folder's name is used instead."""


@dataclass(frozen=True)
class Loading:
    """How models are loaded: type of the key-value cache, conversations at a time, country whose electricity is counted,
    tokens of each conversation with a GGUF file."""

    kv: CacheType = "f16"
    slots: int = 4
    keep_prompt: bool = True
    country: str | None = None
    context: int | None = None


@dataclass
class Served:
    """A model in memory.

    original      the model that it was made from, as its own record says: a name or a path
    memory_bytes  memory of this process that loading it and a first token took, less the caches of all conversations but
                  one, so that models with different numbers of slots compare; None where it cannot be measured
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
        """Watt-hours of that many seconds of work, or None where power was not measured."""
        return None if self.power is None else self.power.watts * seconds / 3600

    @property
    def energy_label(self) -> str | None:
        """Whether energy is measured or estimated; None where power was not measured."""
        return None if self.power is None else "measured" if self.power.measured else "estimated"


def name_of(path: str) -> str:
    """A name for a model from its path: that of the file or folder, or of the folder around it where that says nothing."""
    where = Path(path)
    plain = where.stem if where.suffix == ".gguf" else where.name or path
    if plain in USUAL:
        plain = where.resolve().parent.name
    return re.sub(r"[^\w.-]+", "-", plain).strip("-.") or "model"


def load(path: str, name: str, how: Loading) -> Served:
    """Load a model, and read from its own records what it was made from and by which recipe.

    Raises ResourceError where the model is larger than free memory.
    """
    if how.country is not None:
        check_country(how.country)
    _check_fits(path)
    in_llama = gguf_path(path) is not None       # other models are served beside them
    if in_llama and in_process():
        import xllamacpp  # noqa: F401    # else the first model's memory would include the library
    before = rss_bytes()
    loaded = speaker(path, kv=how.kv if in_llama else "f16", slots=how.slots, keep_prompt=how.keep_prompt,
                     context=how.context if in_llama else None)

    def speak(tokens: int) -> None:
        for _ in texts(loaded, Question([0, 1], tokens)):       # in a thread, so that Ctrl-C is heard meanwhile
            continue

    speak(2)
    grown = rss_bytes() - before
    if isinstance(loaded, Llama):
        grown -= int((loaded.slots - 1) * loaded.context * loaded.cache_bytes_per_token)
    power = None if how.country is None else measure_power(how.country, lambda: speak(32), 4.0)
    facts = _facts_of_file(loaded.file) if isinstance(loaded, Llama) else _facts_of_checkpoint(path)
    return Served(name, path, facts.kind, loaded, facts.bytes, facts.parameters, facts.recipe, facts.original, facts.report,
                  grown if grown > 0 else None, power)


def _check_fits(path: str) -> None:
    """Raise where a model is larger than free memory."""
    file = gguf_path(path)
    if file is None or not llama_installed():
        check_fits(path)
    elif (size := sum(part.stat().st_size for part in parts_at(file) if part.is_file())) > free_ram_bytes():
        raise ResourceError(f"{path} has {human_bytes(size)}, but only {human_bytes(free_ram_bytes())} of memory are free; "
                            "close other programs, or serve a smaller model")


@dataclass(frozen=True)
class _Facts:
    """What a model's own files say about it."""

    kind: str
    bytes: int
    parameters: int
    recipe: str | None
    original: str | None
    report: Path | None


def _facts_of_file(file: GgufFile) -> _Facts:
    return _Facts("gguf", file.size, file.parameters, None if file.recipe is None else _as_yaml(file.recipe),
                  file.text("tsotsallm.source"), _report_of(file.path.parent))


def _facts_of_checkpoint(path: str) -> _Facts:
    checkpoint = Checkpoint.open(path)
    made = checkpoint.provenance
    return _Facts("checkpoint", checkpoint.weight_bytes, parameters_of(View.of(checkpoint)),
                  None if made is None else _as_yaml(list(made.recipe)), None if made is None else made.source,
                  _report_of(checkpoint.directory) or _report_of(checkpoint.directory.parent))


def _as_yaml(recipe: object) -> str:
    return str(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110))


def _report_of(folder: Path) -> Path | None:
    """The report in a folder of `fit`, or beside a result; None where there is none."""
    path = folder / "report.html"
    return path if path.is_file() and ((folder / "fit.json").exists() or (folder / "tsotsallm.json").exists()) else None


class Models:
    """Models by name; the first one answers requests that name none.

    `queue` is how many questions may wait for a model, `timeout_s` the seconds after which a question is given up.
    """

    def __init__(self, queue: int = 16, timeout_s: float = 300.0) -> None:
        self.queue, self.timeout_s = queue, timeout_s
        self.by_name: dict[str, Served] = {}
        self.created = int(time.time())

    def add(self, served: Served) -> Served:
        """Serve one more model under its name."""
        served.gate = Gate(served.speaker, self.queue)
        self.by_name[served.name] = served
        return served

    def free_name(self, wanted: str) -> str:
        """The wanted name, or the wanted name with the first number that makes it unique."""
        names = [wanted, *(f"{wanted}-{number}" for number in range(2, len(self.by_name) + 3))]
        return next(name for name in names if name not in self.by_name)

    def get(self, name: str | None) -> Served | None:
        """The model with a name, or the first one for None; None where there is no such model."""
        return next(iter(self.by_name.values()), None) if name is None else self.by_name.get(name)

    def original_of(self, served: Served) -> str | None:
        """The name of the served model that another one was made from, or None where it is not served."""
        original = served.original
        if original is None:
            return None
        same = (other.name for other in self.by_name.values() if other is not served and (
            other.path == original or other.name == original or name_of(other.path) == name_of(original)))
        return next(same, None)

    def stop(self) -> None:
        """End all answers with their next token."""
        for served in self.by_name.values():
            served.gate.stop()


def load_all(paths: Sequence[str], how: Loading, models: Models, say: Callable[[str], None]) -> None:
    """Load models given as PATH or NAME=PATH; raises ServeError where a name is not allowed or is given twice."""
    for given in paths:
        name, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            name, path = "", given
        if name and re.fullmatch(r"[\w.-]+", name) is None:
            raise ServeError(f"{name!r} cannot be a model's name; it takes letters, digits, '.', '_' and '-'")
        if name in models.by_name:
            raise ServeError(f"two models are named {name}; give each a name of its own, as NAME=PATH")
        served = models.add(load(path, models.free_name(name or name_of(path)), how))
        say(f"{served.name}: {path}")
        for note in served.speaker.notes:
            say(f"note: {note}")


class Busy(Exception):
    """All slots and the queue before them are taken."""


class TooLate(Exception):
    """A question was not answered within its time."""


class Gate:
    """Lets as many questions through at a time as the engine has slots, each in a thread, with a queue of bounded length.

    A slot is free again when its thread has ended, even if the client disconnected before.
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
        """Yield the pieces of an answer, then how it ended; `deadline` by time.monotonic().

        Raises Busy where the queue is full, TooLate where the deadline passes.
        """
        def speak(put: Callable[[Piece], None], cancel: threading.Event) -> Answer:
            def heard(piece: Piece) -> bool:
                put(piece)
                return cancel.is_set()

            return self.speaker.speak(question, heard)

        return self._through(speak, deadline)

    async def prompt(self, ids: Sequence[int], likeliest: int, deadline: float) -> list[Token]:
        """The tokens of a prompt with their log-probabilities and `likeliest` alternatives; raises Busy or TooLate."""
        def score(_put: Callable[[Never], None], cancel: threading.Event) -> list[Token]:
            return list(self.speaker.prompt_tokens(ids, likeliest, cancel.is_set))

        results = self._through(score, deadline)
        async with contextlib.aclosing(results):
            return list(await anext(results))

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, in a thread of its own."""
        return await asyncio.to_thread(_contained, lambda: self.speaker.tokenize(text))

    async def _through(self, work: Callable[[Callable[[Heard], None], threading.Event], Result],
                       deadline: float) -> AsyncGenerator[Heard | Result, None]:
        """Run `work(put, cancel)` in a thread once there is a slot; yield what it puts, then its result."""
        await self._enter(deadline)
        loop, cancel = asyncio.get_running_loop(), threading.Event()
        heard = asyncio.Queue[Heard | _End[Result]]()
        self._cancels.add(cancel)
        self.running += 1

        def put(piece: Heard) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, piece)

        def ended(end: _End[Result]) -> None:
            self.running -= 1
            self._cancels.discard(cancel)
            self._places.release()
            heard.put_nowait(end)

        def run() -> None:
            end: _End[Result]
            try:
                end = _End(_contained(lambda: work(put, cancel)))
            except Exception as error:
                end = _End(error)
            try:
                loop.call_soon_threadsafe(ended, end)
            except RuntimeError:        # the service has ended meanwhile
                return

        self._pool.submit(run)
        try:
            while True:
                piece = await _before(deadline, heard.get())
                if isinstance(piece, _End):
                    if isinstance(piece.result, Exception):
                        raise piece.result
                    yield piece.result
                    return
                yield piece
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


async def _before(deadline: float, work: Awaitable[Result]) -> Result:
    """Wait for something until a time (asyncio.wait_for would lose a cancellation that coincides with a result)."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await work
    except TimeoutError:
        raise TooLate from None


@dataclass(frozen=True)
class _End(Generic[Result]):
    result: Result | Exception


def sampling(temperature: float, top_p: float, top_k: int, seed: int, **more: Any) -> Sampling:
    """A sampling whose seed has 32 bits, but not the largest value, which asks llama.cpp for a random seed."""
    return Sampling(temperature, top_p, top_k, seed % 0xFFFFFFFF, **more)


def _contained(work: Callable[[], Result]) -> Result:
    """The result of `work`; a library's panic, which is not an Exception and would end the service, becomes RuntimeError."""
    try:
        return work()
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
