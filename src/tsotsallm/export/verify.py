"""Checks that an exported file agrees with its checkpoint: the same tokens, ends, conversations and probabilities."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.gguf_file import GgufFile
from tsotsallm.checkpoint.gguf_vocabulary import is_sentencepiece, letter_with, missing_bytes, unlisted_pairs
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.textrules import SPACE
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import ConversationError, ExportError
from tsotsallm.export.oracle import ask_llama_cpp
from tsotsallm.files import quoted
from tsotsallm.numerics.ggml import LAYOUTS, GgmlGrid, decode
from tsotsallm.records import Record
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.score import final_states, token_losses

WORDS = ("The river that runs through the old town is wide, and in spring the children of the village count 27 boats. "
         "Le fleuve est large ; les enfants comptent les bateaux.")
MOST_TOKENS = 48
CHECKED_ROWS = 64
"""Rows of a matrix in blocks that are decoded to check that they are finite."""
FLOATS = {"f32": "<f4", "f16": "<f2", "f64": "<f8"}
MOST_SPECIALS = 400
MOST_PAIRS = 400
"""Pairs of pieces that SentencePiece merges and a tokenizer does not, each probed as a word."""
MOST_FORCED = 24
SHOWN = 4
SMALL_BYTES = 200 << 20
"""Files below this gain nothing from a second thread."""
BOUNDS = {"f32": 1e-4, "f16": 5e-3, "bf16": 0.04, "q8_0": 0.1, "q6_k": 0.1}
"""Bound of the mean difference of log-probabilities, in nats, of an exact file, by its coarsest type (measured in
docs/LOG.md). Kernels of the types below 8 bits round their inputs to 8 bits."""
BOUND_OF_GRIDS = 0.2

PLAIN = ("a", " a", "  a", "a b", "a  b", "a   b", "a ", "a  ", "\n", "\n\n", "a\nb", "a\n\nb", "a \n b", "\ta", "a\tb",
         "\r\n", " \n", "don't we'll I'VE", "x = f(y)[0] // 2;", "def f(x):\n    return x\n", "3.14 12345 1,000",
         "(a) {b} <c>", "a-b_c/d\\e",
         "été naïve ç", "Привет, мир", "你好，世界", "こんにちは", "안녕", "مرحبا", "שלום", "नमस्ते", "ሰላም", "ไทย",
         "🙂", "👩‍👩‍👧 🇨🇲", "e\u0301",
         "\u00a0a", "a\u2028b", "\u200b", "▁", "a▁b", "<", "|", "[INST] a [/INST]", "<s", "</", "ﬁ Ａ", "\x00", "a\x7fb")


@dataclass(frozen=True)
class Verified(Record):
    """The comparison with llama.cpp: log-probabilities of one text's tokens in both engines, and texts split into tokens.

    tokens         tokens whose log-probabilities were compared
    mean, largest  differences in nats; `bound` is the limit of the mean
    ours, theirs   mean log-probabilities in nats
    texts          number of texts and conversations that were split
    different      number that llama.cpp splits differently, accepted by the user; `examples` are the first of them
    """

    tokens: int
    mean: float
    largest: float
    bound: float
    ours: float
    theirs: float
    texts: int = 0
    different: int = 0
    examples: tuple[str, ...] = ()


def read_back(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor -> (type, shape) of a file; raises ExportError where a tensor is not finite."""
    file = GgufFile.open(path)
    for tensor in file.tensors.values():
        for data in file.rows(tensor, CHECKED_ROWS if tensor.type in LAYOUTS else None):
            if not _finite(data, tensor.type):
                raise ExportError(f"{path}: {tensor.name} holds values that are not finite; export again")
    return {name: (tensor.type, tensor.shape) for name, tensor in file.tensors.items()}


def _finite(data: npt.NDArray[np.uint8], kind: str) -> bool:
    if kind in LAYOUTS:
        return decode(data, GgmlGrid(kind)).finite
    if kind == "bf16":
        return bool(((data.view("<u2") & 0x7F80) != 0x7F80).all())
    return kind not in FLOATS or bool(np.isfinite(data.view(FLOATS[kind])).all())


def probe_texts(codec: TextCodec) -> list[str]:
    """Texts on which tokenizers disagree.

    Spaces, line breaks, scripts, emoji, every special token before, after and inside text, pieces that only SentencePiece
    merges, and texts of random tokens.
    """
    specials = [str(token) for place, token in sorted(codec.added.items()) if place < codec.size]
    if len(specials) > MOST_SPECIALS:
        specials = specials[:MOST_SPECIALS // 2] + specials[-MOST_SPECIALS // 2:]
    rng = random.Random(0)
    known = min(codec.size, len(codec.tokenizer))
    spelled = [codec.decode([rng.randrange(known) for _ in range(8)], special=False) for _ in range(200)]
    around = [text for token in specials for text in (token, f"{token}a b", f"{token} a", f"a b{token}", f"a {token} b",
                                                      f"{token}\n\na", f"{token}{token}a")]
    pieces = is_sentencepiece(codec.content)
    pairs = unlisted_pairs(codec.content) if pieces else []
    lacking = [] if pieces else [f"a{letter_with(byte)}b" for byte in missing_bytes(codec.content["model"]["vocab"])]
    met = ["".join(pair).replace(SPACE, " ").removeprefix(" ") for pair in pairs[::-(-len(pairs) // MOST_PAIRS) or 1]]
    return [text for text in dict.fromkeys([*PLAIN, WORDS, *around, *met, *lacking, *spelled])
            if text and "\N{REPLACEMENT CHARACTER}" not in text]


def probe_conversations(codec: TextCodec) -> list[list[dict[str, str]]]:
    """Conversations with and without system text, of one and several turns, if the model's template accepts them."""
    if codec.chat is None:
        return []
    texts = ("Where was Ada born?", " two  spaces \n and\n\nlines ", "été 你好 🙂", "[INST] x")
    conversations = []
    for text in texts:
        for system in (None, "You are brief."):
            for turns in (1, 3):
                messages = [] if system is None else [{"role": "system", "content": system}]
                messages += [{"role": "assistant" if place % 2 else "user", "content": text} for place in range(turns)]
                try:
                    codec.render(messages)
                except ConversationError:
                    continue
                conversations.append(messages)
    return conversations


def verify_gguf(path: Path, checkpoint: Checkpoint, scratch: Path, *, context: int, types: Iterable[str],
                adapter: Path | None = None, expected: Sequence[str] = (), accept_differences: bool = False) -> Verified:
    """Read a file back and compare it with llama.cpp's answers; raises ExportError with the differences.

    `context` is that of the file, `types` are those of its matrices. `expected` names the differences that GGUF cannot
    avoid; with `accept_differences` texts may be split differently, and are counted. Log-probabilities and ends must agree
    in any case.
    """
    read_back(path)
    codec = checkpoint.codec
    ids = codec.encode(WORDS)[:min(MOST_TOKENS, context)]
    texts, conversations = probe_texts(codec), probe_conversations(codec)
    others = [token for token in sorted(codec.added) if token not in codec.ends and token < codec.size]
    forced = [*codec.ends, *others[:MOST_FORCED]]
    theirs = ask_llama_cpp(path, {"ids": ids, "texts": texts, "conversations": conversations, "forced": forced,
                                   "threads": 1 if path.stat().st_size < SMALL_BYTES else None}, adapter)
    different = [quoted(text) for text, cut in zip(texts, theirs["texts"], strict=True) if cut != codec.encode(text)]
    different += [f"a conversation ({', '.join(message['role'] for message in messages)})"
                  for messages, cut in zip(conversations, theirs["conversations"], strict=True)
                  if cut != codec.conversation(messages)]
    if different and not accept_differences:
        shown = ", ".join(different[:SHOWN]) + (", ..." if len(different) > SHOWN else "")
        why = f" GGUF cannot express: {'; '.join(expected)}." if expected else ""
        raise ExportError(f"llama.cpp splits {len(different)} of {len(texts) + len(conversations)} probed texts into other "
                          f"tokens than the checkpoint's tokenizer ({shown}).{why} The file is not kept; "
                          "--accept-differences writes it")
    wrong = [place for place, token in enumerate(forced) if theirs["ends"][place] != (token in codec.ends)]
    if wrong:
        token = forced[wrong[0]]
        raise ExportError(f"llama.cpp {'continues after' if token in codec.ends else 'ends an answer at'} token {token} "
                          f"({quoted(codec.decode([token]))}), the checkpoint does not; the file is not kept")
    return _compared(checkpoint, ids, theirs["log_likelihoods"], scratch,
                     bound_of({*types, *(("q8_0",) if adapter is not None else ()), *_table(checkpoint)}),
                     len(texts) + len(conversations), different)


def _table(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The type of the table from which llama.cpp takes an activation, where it has one."""
    return ("f16",) if checkpoint.spec.activation.startswith("gelu") else ()


def bound_of(types: Iterable[str]) -> float:
    """The limit of the mean difference of log-probabilities in nats, by the coarsest type of the matrices."""
    return max((BOUNDS.get(kind, BOUND_OF_GRIDS) for kind in types), default=BOUNDS["f32"])


def _compared(checkpoint: Checkpoint, ids: list[int], theirs: list[float], scratch: Path, bound: float, texts: int,
              different: list[str]) -> Verified:
    if len(ids) < 2:
        return Verified(0, 0.0, 0.0, bound, 0.0, 0.0, texts, len(different), tuple(different[:SHOWN]))
    corpus, view, cpu = Corpus((torch.tensor(ids),), "verification"), View.of(checkpoint), torch.device("cpu")
    states = final_states(view, corpus, scratch, cpu)
    ours = [-float(loss) for loss in token_losses(view, [states], corpus, cpu)[0]]
    states.remove()
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    verified = Verified(len(gaps), sum(gaps) / len(gaps), max(gaps), bound, sum(ours) / len(gaps), sum(theirs) / len(gaps),
                     texts, len(different), tuple(different[:SHOWN]))
    if not verified.mean <= bound:
        raise ExportError(f"llama.cpp computes different results from the file: log-probabilities of {verified.tokens} "
                          f"tokens differ by {verified.mean:.2g} nats on average (at most {verified.largest:.2g}), where "
                          f"{bound:g} is the limit for its types; the file is not kept")
    return verified
