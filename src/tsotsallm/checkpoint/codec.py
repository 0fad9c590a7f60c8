"""Text <-> tokens of one model: the tokens around a text, those that end an answer, and conversations.

Everything is taken from the tokenizer as transformers loads it, never from its files: tokens may be in `tokenizer.json`,
`tokenizer_config.json` or `added_tokens.json`, and a tokenizer class may rebuild the rules of its file.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tsotsallm.checkpoint.chat import ChatTemplate, Message, pick
from tsotsallm.errors import CheckpointError, ConversationError
from tsotsallm.files import one_line, quoted
from tsotsallm.machine import quiet_stderr

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers.normalizers import Normalizer
    from transformers import PreTrainedTokenizerBase

NAMED_ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["))
"""Tokens at which llama.cpp ends an answer because of their names (llama-vocab.cpp); all engines here do the same."""
INFILL_ENDS = {
    "pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "repository": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"), "separator": ("<|file_sep|>",)}
"""Names that count in the same way where a file has no token of that kind."""
ENDS_BY_NAME = NAMED_ENDS.union(*INFILL_ENDS.values())
PIECE_CHARACTERS = 50_000
"""Characters of a long text that a tokenizer is given at once, where it can be cut."""
BESIDE_CUT = 200
"""Characters before and after a cut on which it is tried."""
MOST_GROWTH = 1000.0
"""By what factor a normalizer may lengthen a text; a larger one is an attack, not a language."""


class TextCodec:
    """Text <-> tokens of one model.

    size       rows of the model's embeddings
    prefix     tokens that are put before a text, usually BOS
    suffix     tokens that the tokenizer puts after a text, usually none; left out, since no text could be continued after
               them
    ends       tokens that end an answer, the tokenizer's EOS first
    chat       the template of conversations; None where the model does not converse
    notes      what the user should know about the tokenizer, a sentence each
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, where: str, ends: Iterable[int] = ()) -> None:
        self.tokenizer, self.size, self.where = tokenizer, size, where
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            _require_tame(backend.normalizer, where)
        self.prefix, self.suffix = self._around()
        self.templates: dict[str, str] = _templates(tokenizer)
        self.chat: ChatTemplate | None = pick(self.templates, tokenizer.special_tokens_map)
        self.notes = self._notes()
        self.ends = self._ends(ends)

    # -- tokens -----------------------------------------------------------------------------------------------

    def encode(self, text: str, *, prefix: bool = True) -> list[int]:
        """Tokens of a text, with its prefix; raises CheckpointError for a token that the model lacks."""
        ids = self._run(text, add_special_tokens=False)["input_ids"]
        return self._known([*self.prefix, *ids] if prefix else list(ids))

    def encode_once(self, text: str) -> list[int]:
        """Like `encode`, but without the prefix where the text already begins with BOS, as in lm-eval."""
        first = self.tokenizer.bos_token
        return self.encode(text, prefix=not (first is not None and text.startswith(first)))

    def encode_with_ends(self, text: str) -> tuple[Sequence[int], Sequence[int] | None]:
        """Tokens without prefix, and where in the text each ends, in characters; None where the tokenizer does not report
        it."""
        ids, ends, start = array("q"), array("q"), 0
        for piece in self._pieces(text):
            found = self._run(piece, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast,
                              return_attention_mask=False, return_token_type_ids=False)
            ids.extend(self._known(found["input_ids"]))
            ends.extend(start + end for _, end in found.get("offset_mapping") or ())
            start += len(piece)
        return ids, ends if self.tokenizer.is_fast else None

    def _pieces(self, text: str) -> Iterator[str]:
        """Yield a long text piece by piece, cut between words where the tokenizer cuts as well: at once it would use more
        than 100 bytes of memory for each character."""
        start = 0
        while len(text) - start > 2 * PIECE_CHARACTERS:
            cuts = re.finditer(r"(?<=\w)(?= \w)", text[start + PIECE_CHARACTERS:start + 2 * PIECE_CHARACTERS])
            cut = next((cut for found in cuts if self._cuts(text, cut := start + PIECE_CHARACTERS + found.start())), None)
            if cut is None:
                break
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _cuts(self, text: str, place: int) -> bool:
        """Whether the rule that splits text into words cuts it here, and tokens stay the same when it is cut."""
        before, after = text[max(0, place - BESIDE_CUT):place], text[place:place + BESIDE_CUT]
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        split = backend.pre_tokenizer if backend is not None else None
        if backend is None or split is None:
            return False
        if backend.normalizer is not None and before != backend.normalizer.normalize_str(before):
            return False
        words, left, right = ([word for word, _ in split.pre_tokenize_str(part)] for part in (before + after, before, after))
        ids = [self._run(part, add_special_tokens=False)["input_ids"] for part in (before + after, before, after)]
        return words == left + right and ids[0] == ids[1] + ids[2]

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of tokens; special tokens are left out unless `special`."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    def continuation(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text that tokens add to a preceding text: unlike `decode`, it keeps the space before a first word."""
        before, text = self._before
        return self.decode([*before, *ids], special=special)[len(text):]

    @cached_property
    def _before(self) -> tuple[list[int], str]:
        ids = self.encode("a", prefix=False)
        return ids, self.decode(ids, special=False)

    def _run(self, text: str, **options: object) -> Any:
        """Call the tokenizer; raises CheckpointError for whatever its library raises, panics included."""
        try:
            return self.tokenizer(text, verbose=False, **options)
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except BaseException as error:
            raise CheckpointError(f"{self.where} has a tokenizer that cannot split a text ({type(error).__name__}: "
                                  f"{one_line(error)}); copy the tokenizer files of the original model") from None

    def _known(self, ids: list[int]) -> list[int]:
        if ids and max(ids) >= self.size:
            place = max(ids)
            token = quoted(self.tokenizer.convert_ids_to_tokens(place))
            raise CheckpointError(f"{self.where}: the tokenizer numbers {token} {place}, but the model has {self.size} "
                                  "tokens: tokenizer and weights do not belong together; copy the tokenizer files of the "
                                  "original model")
        return ids

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        with quiet_stderr():            # a damaged tokenizer panics here, at the first text
            plain = list(self._run("a", add_special_tokens=False)["input_ids"])
            full = list(self._run("a", add_special_tokens=True)["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start:start + len(plain)] == plain:
                return tuple(full[:start]), tuple(full[start + len(plain):])
        return (), ()

    # -- special tokens ---------------------------------------------------------------------------------------

    @property
    def bos(self) -> int | None:
        """The token that begins a text; None where the tokenizer has none."""
        return self._single("bos_token_id")

    @property
    def eos(self) -> int | None:
        """The token that ends a text; None where the tokenizer has none."""
        return self._single("eos_token_id")

    @property
    def padding(self) -> int | None:
        """The token that fills up batches; None where the tokenizer has none."""
        return self._single("pad_token_id")

    @property
    def unknown(self) -> int | None:
        """The token that stands for what the vocabulary lacks; None where the tokenizer has none."""
        return self._single("unk_token_id")

    def _single(self, name: str) -> int | None:
        found = getattr(self.tokenizer, name, None)
        return found if isinstance(found, int) and 0 <= found < self.size else None

    @cached_property
    def added(self) -> dict[int, AddedToken]:
        """Number -> AddedToken for all tokens that are matched in a text before it is split."""
        return dict(self.tokenizer.added_tokens_decoder)

    def _ends(self, more: Iterable[int]) -> tuple[int, ...]:
        """EOS, the ends that the model's configs name, the end of a conversation's turn, and those known by their names."""
        found = [self.eos, *more, *(self._turn_end() if self.chat is not None else ()),
                 *(place for place, token in self.added.items() if str(token) in ENDS_BY_NAME)]
        known = tuple(dict.fromkeys(token for token in found if token is not None and 0 <= token < self.size))
        return known or (() if self.bos is None else (self.bos,))       # without any, the beginning of a new text counts

    def _turn_end(self) -> list[int]:
        """The special token that the chat template puts after an answer."""
        def ids(answer: str) -> list[int]:
            assert self.chat is not None
            text = self.chat.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}],
                                    answer=False)
            return list(self._run(text, add_special_tokens=False)["input_ids"])

        try:
            first, second = ids("b"), ids("c")
        except ConversationError:
            return []
        same = next((place for place in range(1, min(len(first), len(second))) if first[-place] != second[-place]), 1) - 1
        special = set(self.tokenizer.all_special_ids)
        return [token for token in first[len(first) - same:] if token in special or token in self.added][:1]

    # -- conversations ----------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], *, answer: bool = True, continued: bool | None = None) -> str:
        """The text of a conversation; raises ConversationError where there is no chat template, or it refuses this one."""
        if self.chat is None:
            raise ConversationError(f"{self.where} {self.no_chat}: it completes text, but does not converse; use "
                                    "`tsotsallm generate`, or copy the chat template of the model it was made from")
        return self.chat.render(messages, answer=answer, continued=continued)

    def conversation(self, messages: Sequence[Message], *, answer: bool = True, continued: bool | None = None) -> list[int]:
        """Tokens of a conversation's rendered text, without a prefix: a template writes BOS itself where it wants one."""
        return self.encode(self.render(messages, answer=answer, continued=continued), prefix=False)

    @property
    def no_chat(self) -> str:
        """The reason why the model does not converse, as it follows the model's name in a message."""
        if len(self.templates) > 1:
            return f"has the chat templates {', '.join(sorted(self.templates))} and none of them is named `default`"
        return "has no chat template"

    def _notes(self) -> tuple[str, ...]:
        found = []
        if self.suffix:
            tokens = " ".join(map(str, self.tokenizer.convert_ids_to_tokens(list(self.suffix))))
            found.append(f"the tokenizer appends {tokens} to every text; it is left off prompts, which could not be "
                         "continued otherwise")
        if len(self.templates) > 1 and self.chat is None:
            found.append(f"the tokenizer {self.no_chat}, so the model does not converse")
        return tuple(found)

    # -- the tokenizer as data --------------------------------------------------------------------------------

    @cached_property
    def content(self) -> dict[str, Any]:
        """The loaded tokenizer in the form of a tokenizer.json; raises CheckpointError where it has no such form."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise CheckpointError(f"{self.where} has a tokenizer that has no tokenizer.json form; save it with "
                                  "transformers' save_pretrained first")
        found: dict[str, Any] = json.loads(backend.to_str())
        return found


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    found = tokenizer.chat_template
    if isinstance(found, str):
        return {"default": found}
    return {str(name): str(source) for name, source in found.items()} if isinstance(found, dict) else {}


def _require_tame(normalizer: Normalizer | None, where: str) -> None:
    """Raise CheckpointError for a normalizer that could expand a short text beyond any memory."""
    if normalizer is None:
        return
    growth = 1.0
    for step in _steps(json.loads(normalizer.__getstate__())):
        if step.get("type") == "Replace":
            pattern = step.get("pattern", {}).get("String")
            growth *= max(1.0, len(step.get("content", "")) / max(1, len(pattern) if pattern else 1))
            if pattern == "":
                growth *= 2
        elif step.get("type") == "Prepend":
            growth *= 1 + len(step.get("prepend", "")) / 100
    if growth > MOST_GROWTH or not math.isfinite(growth):
        raise CheckpointError(f"{where}: the tokenizer's normalizer lengthens text up to {growth:.3g} times, more than the "
                              f"{MOST_GROWTH:.0f} that is allowed; the tokenizer is damaged")


def _steps(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step.get("type") != "Sequence":
        return [step]
    return [inner for one in step.get("normalizers", []) for inner in _steps(one)]


def ends_of(*configs: dict[str, Any]) -> list[int]:
    """The tokens that configs name as ends of an answer: a number or a list under `eos_token_id`."""
    found: list[int] = []
    for config in configs:
        named = config.get("eos_token_id")
        found += [one for one in (named if isinstance(named, list) else [named]) if type(one) is int]
    return found
