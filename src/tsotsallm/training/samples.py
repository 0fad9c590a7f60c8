"""Training data -> token windows that mark what is learned: packed text, instructions, conversations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tsotsallm import hub
from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.errors import ConversationError, CorpusError
from tsotsallm.files import DATA_BYTES, json_lines, one_line, parse_json, quoted, read_utf8
from tsotsallm.streaming import corpus as texts
from tsotsallm.streaming.corpus import Corpus

PROMPTS = ("prompt", "instruction", "question", "query")
RESPONSES = ("response", "output", "answer", "completion")
CONTEXTS = ("context", "input", "passage")
CONVERSATIONS = ("messages", "conversations")
MOST_HELD_OUT = 32
HUB_ROWS = 20_000

Conversation = tuple[int, list[dict[str, str]]]
"""The line that a conversation is in, and its messages."""


@dataclass(frozen=True)
class Samples:
    """The samples to train on, and those held out for validation."""

    training: Corpus
    held_out: Corpus

    def fingerprint(self) -> str:
        """64 hexadecimal digits that identify both."""
        return self.training.fingerprint()[:32] + self.held_out.fingerprint()[:32]

    def at_most(self, most: int) -> Samples:
        """The first `most` windows of both together; where fewer are wanted than are held out, a quarter stays held out."""
        count = len(self.held_out.windows)
        held_out = self.held_out if most > count else self.held_out.first(max(1, most // 4))
        return Samples(self.training.first(most - len(held_out.windows)), held_out)


def split(windows: Corpus, held_out: float, seed: int) -> Samples:
    """Hold out a share of the windows, at least one and at most 32, drawn by the seed.

    Raises CorpusError for fewer than two windows.
    """
    count = len(windows.windows)
    if count < 2:
        raise CorpusError(f"{windows.source} gives {count} sample{'s' * (count != 1)}; training needs at least two, one of "
                          "them held out")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    kept = min(MOST_HELD_OUT, max(1, round(held_out * count)), count - 1)
    return Samples(windows.take(sorted(order[kept:])), windows.take(sorted(order[:kept])))


def text_windows(text: str, codec: TextCodec, length: int, source: str) -> Corpus:
    """The whole text in windows of `length` tokens without overlap, the last one shorter."""
    found = texts.evaluation_windows(text, codec, length, source)
    return Corpus(found.windows, source)


def is_instructions(source: str) -> bool:
    """Whether a file's suffix says that it holds instructions or conversations."""
    return Path(source).suffix.lower() in (".jsonl", ".json")


def read_conversations(source: str) -> list[Conversation]:
    """(line, messages) of every row of a .jsonl file or .json list; raises CorpusError with the line of a fault.

    A row has prompt and response (also instruction, question or query; output, answer or completion; with context, input
    or passage put before the prompt), or messages (a list of {role, content}), or conversations (texts of user and
    assistant in turn, as in LIMA).
    """
    path = Path(source)
    try:
        text = read_utf8(path, CorpusError, DATA_BYTES)
    except FileNotFoundError:
        raise CorpusError(f"{source} does not exist; give a .jsonl file of prompts and responses, or a text") from None
    conversations = [(number, _conversation(row, f"{path.name}, line {number}")) for number, row in _rows(text, path)]
    if not conversations:
        raise CorpusError(f"{source} is empty; give one sample per line, such as {{\"prompt\": ..., \"response\": ...}}")
    return conversations


def _rows(text: str, path: Path) -> Iterator[tuple[int, object]]:
    if path.suffix.lower() != ".json":
        yield from json_lines(text, path.name, CorpusError)
        return
    rows = parse_json(text, str(path), CorpusError) if text.strip() else []
    if not isinstance(rows, list):
        raise CorpusError(f"{path} holds {type(rows).__name__}; it takes a list of samples, or one sample per line in a "
                          ".jsonl file")
    yield from enumerate(rows, 1)


def _conversation(row: object, where: str) -> list[dict[str, str]]:
    if not isinstance(row, Mapping):
        raise CorpusError(f"{where} holds {type(row).__name__}; it takes an object such as "
                          "{\"prompt\": ..., \"response\": ...}")
    for name in CONVERSATIONS:
        if name in row:
            return _messages(row[name], f"{where}, {name}")
    prompt, response = (next((name for name in names if name in row), None) for names in (PROMPTS, RESPONSES))
    if prompt is None or response is None:
        raise CorpusError(f"{where} has the fields {one_line(', '.join(map(str, row))) or 'none'}; it takes one of "
                          f"{', '.join(PROMPTS)} with one of {', '.join(RESPONSES)}, or {' or '.join(CONVERSATIONS)}")
    context = next((row[name] for name in CONTEXTS if row.get(name)), "")
    for name, value in ((prompt, row[prompt]), (response, row[response]), ("context", context)):
        if not isinstance(value, str):
            raise CorpusError(f"{where}: {name} is {quoted(value)}; it takes text")
    if not row[response].strip():
        raise CorpusError(f"{where}: {response} is empty, so there is nothing to learn")
    asked = f"{context}\n\n{row[prompt]}" if context else row[prompt]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row[response]}]


def _messages(value: object, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise CorpusError(f"{where} is {quoted(value)}; it takes a list of messages")
    if all(isinstance(item, str) for item in value):
        value = [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(value)]
    for item in value:
        if not isinstance(item, Mapping) or not all(isinstance(item.get(key), str) for key in ("role", "content")):
            raise CorpusError(f"{where} holds {quoted(item)}; a message is {{\"role\": \"user\", \"content\": ...}}")
    if not any(item["role"] == "assistant" for item in value):
        raise CorpusError(f"{where} has no message of the assistant, so there is nothing to learn")
    return [{"role": item["role"], "content": item["content"]} for item in value]


def instruction_windows(conversations: Iterable[Conversation], codec: TextCodec, context: int,
                        source: str) -> Corpus:
    """One window for each conversation, in the tokenizer's chat template; only the assistant's words are learned.

    Without a template the plain form is used: prompt, line break, response, end of text. Raises CorpusError, with the
    line, for a conversation that is too long or that the template refuses.
    """
    windows, learned = [], []
    for number, messages in conversations:
        try:
            ids, marks = (_plain if codec.chat is None else _templated)(messages, codec)
        except (CorpusError, ConversationError) as error:
            raise CorpusError(f"{source}, line {number}: {error}") from None
        if len(ids) > context:
            raise CorpusError(f"{source}, line {number} has {len(ids)} tokens, more than the {context} that the model "
                              "reads at once; shorten it or leave it out")
        windows.append(torch.tensor(ids))
        learned.append(torch.tensor(marks))
    return Corpus(tuple(windows), source, learned=tuple(learned))


def _templated(messages: Sequence[dict[str, str]], codec: TextCodec) -> tuple[list[int], list[bool]]:
    ids = codec.conversation(messages, answer=False)
    marks = [False] * len(ids)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = _before(messages[:place], codec), codec.conversation(messages[:place + 1], answer=False)
            shared = _shared(before, ids)
            if shared < len(before) - 1 or _shared(after, ids) < len(after) - 1:
                raise CorpusError("the tokenizer's chat template writes the beginning of a conversation differently when "
                                  "more follows, so responses cannot be located; split it into single turns")
            marks[shared:len(after)] = [True] * (len(after) - shared)
    return ids, marks


def _before(messages: Sequence[dict[str, str]], codec: TextCodec) -> list[int]:
    """The tokens before a response: the conversation so far, or the prefix of a text before a first message."""
    return codec.conversation(messages, continued=False) if messages else list(codec.prefix)


def _shared(some: Sequence[int], others: Sequence[int]) -> int:
    """The number of tokens that both have in common at the beginning."""
    return next((place for place, (one, other) in enumerate(zip(some, others, strict=False)) if one != other),
                min(len(some), len(others)))


def _plain(messages: Sequence[dict[str, str]], codec: TextCodec) -> tuple[list[int], list[bool]]:
    ids = list(codec.prefix)
    marks = [False] * len(ids)
    for message in messages:
        mine = message["role"] == "assistant"
        text = message["content"] + ("" if mine else "\n")
        said = codec.encode(text, prefix=False)
        if mine and codec.eos is not None:
            said.append(codec.eos)
        ids += said
        marks += [mine] * len(said)
    return ids, marks


def hub_conversations(repository: str) -> list[Conversation] | None:
    """The rows of an instruction data set on the hub, at most 20,000; None where it is plain text."""
    conversations = []
    rows = hub.rows(repository, split="train", kind=CorpusError, instead="give a local file as `data`")
    for number, row in enumerate(rows, 1):
        if number == 1 and not any(name in row for name in (*PROMPTS, *CONVERSATIONS)):
            return None
        conversations.append((number, _conversation(row, f"{repository}, row {number}")))
        if number >= HUB_ROWS:
            break
    return conversations


def read_samples(source: str, codec: TextCodec, spec: ModelSpec, window: int, held_out: float, seed: int) -> Samples:
    """The samples of a file, a folder of texts, or a hub data set; raises CorpusError where they cannot be used."""
    window = min(window, spec.context)
    if hub.is_name(source):
        conversations = hub_conversations(source)
        if conversations is None:
            return split(text_windows(texts.hub_text(source), codec, window, source), held_out, seed)
        return split(instruction_windows(conversations, codec, spec.context, source), held_out, seed)
    if is_instructions(source) and Path(source).exists():
        name = Path(source).name
        return split(instruction_windows(read_conversations(source), codec, spec.context, name), held_out, seed)
    return split(text_windows(texts.read_text(source), codec, window, source), held_out, seed)
