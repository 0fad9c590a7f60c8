"""Text that a model writes itself, to be calibrated on where there is no other (arXiv:2410.17170).

Half of it continues the token that begins a text, and half answers short requests in several languages, in the chat
template; a model without such a template writes text alone. The model is in memory meanwhile, all of it. What it wrote is
kept, batch by batch, in the folder of `machine.cache_root`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from tsotsallm.checkpoint.chat import Message
from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.reader import PACKED_NAME, Checkpoint
from tsotsallm.checkpoint.shapes import layer_shapes
from tsotsallm.engine.generation import Drawn, generate_resident
from tsotsallm.engine.resident import resident
from tsotsallm.errors import ConversationError, CorpusError, TsotsallmError
from tsotsallm.files import DATA_BYTES, read_json
from tsotsallm.machine import cache_root, free_ram_bytes, release_memory
from tsotsallm.units import human_bytes
from tsotsallm.version import __version__

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

MORE = 1.25
"""Times the tokens of the windows: `fit` cuts some off to compare on."""
BATCH = 32
"""Most documents that are written at a time."""
LONGEST, SHORTEST = 1024, 32
"""Tokens of a document at most: as many as a window has, within these bounds and the model's context."""
CACHE_BYTES = 1 << 30
"""Keys and values of a batch take at most so much; fewer documents are written at a time otherwise."""
TEXT, ANSWERS = 1.0, 0.7
"""Temperatures. Text is drawn as the model has it: at 0.7 a small model repeats itself, and calibrates worse than no text
(docs/LOG.md)."""
TOP_P = 0.95
TRIES = 8
"""A model may write so many times the documents that would be enough at full length."""
MOST_TOKENS, MOST_RATIO = 0.9, 1.25
"""Tokens a character at most in a request, or in relation to the leanest one, where a tokenizer cuts all into bytes: a model
whose tokenizer makes more tokens of a script was hardly trained on it, and writes nonsense in it."""
TEXT_STARTS = ("<|endoftext|>", "<|end_of_text|>")
"""Names of the token between texts, of models whose tokenizer puts nothing before a text."""

Tick = Callable[[str, float], None]


Use = Literal["calibrate", "compare"]
"""What requests are for: a model is compared on others than it writes its calibration text to."""


@functools.cache
def prompts(use: Use = "calibrate") -> tuple[str, ...]:
    """The packaged requests of a use, in several languages."""
    found = yaml.safe_load((resources.files("tsotsallm.engine") / "prompts.yaml").read_text("utf-8"))
    return tuple(prompt for of_language in found[use].values() for prompt in of_language)


def requests(codec: TextCodec, room: int, seed: int, use: Use = "calibrate") -> list[str]:
    """The packaged requests of a use in the order that a seed gives them; none where the model does not converse.

    Those longer than `room` tokens in the chat template, and those in a script that the model hardly knows, are left out.
    """
    if codec.chat is None:
        return []
    try:
        codec.render(as_messages("a", "b"), answer=False)
        cost = {prompt: len(codec.encode(prompt, prefix=False)) / len(prompt) for prompt in prompts(use)}
        most = max(MOST_TOKENS, MOST_RATIO * min(cost.values()))
        found = [prompt for prompt in prompts(use) if cost[prompt] <= most
                 and len(codec.conversation(as_messages(prompt))) <= room]
    except ConversationError:
        return []
    random.Random(seed).shuffle(found)
    return found


def as_messages(prompt: str, answer: str | None = None) -> list[Message]:
    """A request, and its answer where there is one, as a conversation."""
    asked: list[Message] = [{"role": "user", "content": prompt}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


def text_start(codec: TextCodec) -> tuple[int, ...]:
    """The tokens that a text of its own begins after; none where the tokenizer has no such token.

    That is what the tokenizer puts before a text; else the end of the text before, by its name; else BOS, else EOS. BOS
    comes late because in the models of conversations that have it without using it, it often begins a turn.
    """
    named = (place for name in TEXT_STARTS for place, token in sorted(codec.added.items())
             if str(token) == name and place < codec.size)
    first = next(named, codec.bos if codec.bos is not None else codec.eos)
    return codec.prefix or (() if first is None else (first,))


@dataclass(frozen=True)
class _Part:
    """One kind of text: tokens wanted, at most how many a document has, and how it is asked for and read."""

    name: str
    wanted: int
    usual: int
    prompts: Callable[[int, int], list[list[int]]]
    document: Callable[[int, Sequence[int], Sequence[int]], str]
    temperature: float


class SelfText:
    """What a model writes for `windows` windows of `window` tokens, and a quarter more; the same for the same seed.

    Another number of threads, or another computer, rounds otherwise, after which a text takes another turn; one that is
    kept is read, whatever wrote it. `text` writes it where it is not there yet.
    """

    def __init__(self, checkpoint: Checkpoint, windows: int, window: int, seed: int) -> None:
        self.checkpoint, self.seed = checkpoint, seed
        self.tokens = math.ceil(MORE * windows * window)
        self.length = max(1, min(LONGEST, checkpoint.spec.context - 1, max(window, SHORTEST)))
        self.batch = max(1, min(BATCH, CACHE_BYTES // (self.length * checkpoint.spec.kv_bytes_per_token(4))))

    # -- what is kept -------------------------------------------------------------------------------------------------

    @cached_property
    def path(self) -> Path:
        """Where the text is kept, by all that it depends on."""
        codec = self.checkpoint.codec
        tokens = [codec.encode(prompt) for prompt in prompts()]         # and so the tokenizer
        key = [self.checkpoint.fingerprint(), tokens, codec.templates, codec.ends, self.seed, self.tokens, self.length,
               TEXT, ANSWERS, TOP_P, __version__]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        return cache_root() / "selftext" / f"{digest}.json"

    @property
    def kept(self) -> bool:
        """Whether the text was written before, and is whole."""
        return kept_documents(self.path) is not None

    def text(self, tick: Tick = lambda _step, _share: None) -> str:
        """The text: read where it was written before, else written by the model, which takes minutes.

        Raises CorpusError where the model does not fit in memory, or writes next to nothing.
        """
        found = kept_documents(self.path)
        if found is None:
            if (obstacle := self.obstacle()) is not None:
                raise CorpusError(obstacle)
            found = self._documents(tick)
            keep_documents(self.path, found)
            shutil.rmtree(self.path.with_suffix(""), ignore_errors=True)
        return "".join(found)

    def text_file(self, tick: Tick = lambda _step, _share: None) -> Path:
        """The text as a file of text, beside what is kept; raises like `text`."""
        path = self.path.with_suffix(".txt")
        _through_draft(path, self.text(tick))
        return path

    # -- memory -------------------------------------------------------------------------------------------------------

    def obstacle(self) -> str | None:
        """Why the model cannot write its text now, with figures, and what can be done; None where it can, or has done."""
        if self._fits(packed=True) or self.kept:
            return None
        return (f"the model writes its own calibration text with all of it in memory, which takes "
                f"{human_bytes(self.ram_bytes(packed=True))}, and {human_bytes(free_ram_bytes())} are free; close other "
                "programs, or give a text of your own with --calibration FILE or DIR")

    def ram_bytes(self, *, packed: bool) -> int:
        """Bytes that writing takes: weights in float32, or packed as they are on disk, and a batch's cache and logits."""
        spec = self.checkpoint.spec
        found, largest = 4 * spec.vocabulary * spec.hidden * (1 if spec.tied else 2), 0
        for index in sorted({spec.layer_order.index(stored) for stored in spec.layer_order}):
            stored = spec.layer_order[index]
            for name, shape in layer_shapes(spec, index).items():
                size = 4 * math.prod(shape)
                if packed and self.checkpoint.is_packed(f"model.layers.{stored}.{name}".removesuffix(".weight")):
                    largest = max(largest, size)
                else:
                    found += size
            if packed:
                found += sum(record.size for name, record in self.checkpoint.layer_records(stored).items()
                             if PACKED_NAME.search(name))
        cache = self.batch * self.length * spec.kv_bytes_per_token(4)
        return int(1.05 * (found + 2 * largest + cache)) + 32 * self.batch * spec.vocabulary

    def _fits(self, *, packed: bool) -> bool:
        return self.ram_bytes(packed=packed) <= free_ram_bytes()

    @cached_property
    def _model(self) -> PreTrainedModel:
        return resident(self.checkpoint, keep_packed=not self._fits(packed=False))      # the same products, if slower

    # -- writing ------------------------------------------------------------------------------------------------------

    def _documents(self, tick: Tick) -> list[str]:
        """All documents, those of both kinds mixed evenly; every batch is kept as soon as it is written."""
        parts = self._parts()
        found = []
        for place, part in enumerate(parts):
            documents = self._part(part, lambda share, place=place: tick(       # type: ignore[misc]
                "the model writes its text", (place + share) / len(parts)))
            found += [((number + 0.5) / len(documents), one) for number, one in enumerate(documents)]
        self.__dict__.pop("_model", None)
        release_memory()
        return [one for _, one in sorted(found, key=lambda item: item[0])]

    def _parts(self) -> list[_Part]:
        codec, start = self.checkpoint.codec, text_start(self.checkpoint.codec)
        asked = requests(codec, self.checkpoint.spec.context - self.length // 2, self.seed)
        wanted = self.tokens if not asked else math.ceil(self.tokens / 2)

        def beginnings(number: int, count: int) -> list[list[int]]:
            chance = random.Random(f"{self.seed} {number}")
            known = min(codec.size, len(codec.tokenizer))
            return [list(start) or [chance.randrange(known)] for _ in range(count)]

        def text(_number: int, prompt: Sequence[int], new: Sequence[int]) -> str:
            return f"{whole}\n\n" if (whole := cleaned(codec.decode([*prompt, *new], special=False))) else ""

        def questions(number: int, count: int) -> list[list[int]]:
            return [codec.conversation(as_messages(asked[(number + place) % len(asked)])) for place in range(count)]

        def answer(number: int, _prompt: Sequence[int], new: Sequence[int]) -> str:
            said = cleaned(codec.continuation(list(new)))
            return codec.render(as_messages(asked[number % len(asked)], said), answer=False) if said else ""

        found = [_Part("text", wanted, self.length, beginnings, text, TEXT)]
        if asked:
            found.append(_Part("answers", wanted, min(self.length, 200), questions, answer, ANSWERS))
        return found

    def _part(self, part: _Part, share: Callable[[float], None]) -> list[str]:
        """Documents of one kind, in batches, until there are tokens enough."""
        codec = self.checkpoint.codec
        documents: list[str] = []
        tokens, tried, batch = 0, 0, 0
        while tokens < part.wanted:
            if tried > TRIES * (BATCH + math.ceil(part.wanted / part.usual)):
                raise CorpusError(f"the model wrote {tokens} tokens in {tried} documents, fewer than the {part.wanted} that "
                                  "are needed; give a text of your own with --calibration FILE or DIR")
            usual = tokens / tried if tokens else part.usual
            count = max(min(4, self.batch), min(self.batch, math.ceil((part.wanted - tokens) / usual)))
            path = self.path.with_suffix("") / f"{part.name}-{batch}.json"
            if (found := kept_documents(path)) is None:
                done = tokens
                found = self._batch(part, batch, tried, count, lambda now, done=done, count=count: share(    # type: ignore
                    min(1.0, (done + now * count * part.usual) / part.wanted)))
                keep_documents(path, found)
            documents += [one for one in found if one]
            tokens += sum(len(codec.encode(one, prefix=False)) for one in found)
            tried, batch = tried + count, batch + 1
            share(min(1.0, tokens / part.wanted))
        return documents

    def _batch(self, part: _Part, batch: int, first: int, count: int, share: Callable[[float], None]) -> list[str]:
        """Documents `first` to `first + count` of one kind; an empty one where the model wrote nothing that is text."""
        codec, ends = self.checkpoint.codec, set(self.checkpoint.codec.ends)
        asked = part.prompts(first, count)
        most = max(1, min(self.length, self.checkpoint.spec.context - max(map(len, asked))))
        seed = hashlib.sha256(f"{self.seed} {part.name} {batch}".encode()).digest()
        draw = Drawn(int.from_bytes(seed[:8], "little"), part.temperature, TOP_P, codec.ends)

        def choose(logits: Tensor, place: int) -> Tensor:
            share(place / most)
            return draw(logits, place)

        given = dict(generate_resident(self._model, asked, most, lambda new: new[-1] in ends, choose=choose))
        return [part.document(first + place, asked[place], [token for token in given[place] if token not in ends])
                for place in range(count)]


def cleaned(text: str) -> str:
    """A text as a file of it would be read again, without half a character at its end."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip().rstrip("\N{REPLACEMENT CHARACTER}").rstrip()


def keep_documents(path: Path, documents: Sequence[str]) -> None:
    """Write documents with their hash, so that they are never seen half written."""
    _through_draft(path, json.dumps({"sha256": _digest(documents), "documents": list(documents)}, ensure_ascii=False,
                                    indent=1))


def _through_draft(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{uuid.uuid4().hex}.new")
    draft.write_text(content, "utf-8", newline="\n")
    draft.replace(path)


def kept_documents(path: Path) -> list[str] | None:
    """Documents that were kept; None where there are none, or they are damaged or empty."""
    try:
        content = read_json(path, TsotsallmError, DATA_BYTES)
        found = content["documents"]
        return found if content["sha256"] == _digest(found) and any(found) else None
    except (OSError, TsotsallmError, LookupError, TypeError, ValueError):
        return None


def _digest(documents: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(documents)).encode()).hexdigest()
