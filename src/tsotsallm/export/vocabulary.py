"""A tokenizer.json in the words of GGUF: tokens, scores or merges, and the rule by which text is cut before merging."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsotsallm.checkpoint.tokens import is_sentencepiece
from tsotsallm.errors import ExportError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O_WORDS = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|\p{N}%s"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLITS = {
    _LLAMA3: "llama3",
    _LLAMA3.replace("{1,3}", ""): "qwen2",
    _LLAMA3.replace(r"\p{L}+|\p{N}{1,3}", r"[\p{L}\p{M}]+|\p{N}").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+"):
        "qwen35",
    _GPT4O_WORDS % ("", "", ""): "tekken",
    _GPT4O_WORDS % (_CONTRACTIONS + "?", _CONTRACTIONS + "?", "{1,3}"): "gpt-4o"}
"""The regular expression that a tokenizer splits text with -> what llama.cpp calls the same rule."""


@dataclass(frozen=True)
class Vocabulary:
    """All that GGUF holds of a tokenizer."""

    model: str                      # llama (SentencePiece's way of merging) or gpt2 (byte-level BPE)
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    bos: int | None
    eos: int | None
    unknown: int | None
    padding: int | None
    add_bos: bool
    add_space_prefix: bool
    chat_template: str | None


def read_vocabulary(directory: Path, tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a checkpoint's tokenizer.json, filled up to `size` tokens.

    `tokenizer` is the same as transformers loads it: it knows which tokens begin and end a text. ExportError where GGUF
    has no word for it.
    """
    path = directory / "tokenizer.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        model = content["model"]
        vocabulary = {str(token): int(place) for token, place in model["vocab"].items()}
        merges = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in model["merges"]]
    except FileNotFoundError:
        raise ExportError(f"{directory} has no tokenizer.json, which GGUF's vocabulary is made from; save the tokenizer "
                          "with transformers' save_pretrained first") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} holds a tokenizer that llama.cpp does not know ({type(error).__name__}: {error}); what "
                          "can be exported is BPE: SentencePiece's, Llama 3's, GPT-2's and their like") from None
    if model.get("type") != "BPE":
        raise ExportError(f"{path} holds a tokenizer of type {model.get('type')}, which llama.cpp has no vocabulary for; "
                          "what can be exported is BPE: SentencePiece's, Llama 3's, GPT-2's and their like")
    added = {int(one["id"]): one for one in content.get("added_tokens", [])}
    tokens = {place: token for token, place in vocabulary.items()} | {place: one["content"] for place, one in added.items()}
    if max(tokens) >= size:
        raise ExportError(f"{path} numbers a token {max(tokens)}, but the model has {size}; tokenizer and weights do not "
                          "belong together")
    if not merges:
        raise ExportError(f"{path} has no merges, without which llama.cpp loads no vocabulary; it cannot be exported")
    pieces = is_sentencepiece(content)
    pre = "default" if pieces else _split_rule(content, path)
    unknown = vocabulary.get(str(model.get("unk_token")))
    types = []
    for place in range(size):
        if place in added:
            types.append(UNKNOWN if place == unknown else CONTROL if added[place].get("special") else USER_DEFINED)
        elif place not in tokens:
            types.append(UNUSED)
        elif pieces and _is_byte(tokens[place]):
            types.append(BYTE)
        else:
            types.append(UNKNOWN if place == unknown else NORMAL)
    return Vocabulary(
        "llama" if pieces else "gpt2", pre, [tokens.get(place, f"[unused {place}]") for place in range(size)], types,
        _scores(tokens, vocabulary, merges, size) if pieces else None,
        None if pieces else [f"{left} {right}" for left, right in merges],
        tokenizer.bos_token_id, tokenizer.eos_token_id, unknown, tokenizer.pad_token_id,
        _adds_bos(tokenizer), pieces and _prepends_space(content), _template(tokenizer))


def _prepends_space(content: dict[str, Any]) -> bool:
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: dict[int, str], vocabulary: dict[str, int], merges: list[Any], size: int) -> list[float]:
    """The earlier a token is merged, the higher its score: SentencePiece then merges in the order of the list."""
    first: dict[int, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(vocabulary[left + right], rank)
    return [-float(first.get(place, len(merges))) if place in tokens else 0.0 for place in range(size)]


def _split_rule(content: dict[str, Any], path: Path) -> str:
    """What llama.cpp calls the rule by which a byte-level tokenizer cuts text, told from its regular expressions."""
    before = content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    found: str | None = None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        found = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        found = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        found = SPLITS.get(str(steps[0].get("pattern", {}).get("Regex")))
    if found is None or content.get("normalizer") not in (None, {"type": "NFC"}) or any(
            step.get("add_prefix_space") for step in steps):
        raise ExportError(f"{path} cuts text by a rule that llama.cpp has no name for ({json.dumps(before)[:300]}); its "
                          f"rules are those of {', '.join(['gpt-2', 'smollm', *SPLITS.values()])}; llama.cpp would cut text "
                          "otherwise than the model learned, so that nothing is exported")
    whole_words = bool(content["model"].get("ignore_merges"))
    if found == "llama3":
        return "llama-bpe" if whole_words else "smaug-bpe"
    if whole_words and found != "tekken":
        raise ExportError(f"{path} takes whole words before it merges (ignore_merges), which llama.cpp does with Llama 3's "
                          "and Mistral's rule only; nothing is exported")
    return found


def _adds_bos(tokenizer: Any) -> bool:
    found = tokenizer("a")["input_ids"]
    return bool(found) and found[0] == tokenizer.bos_token_id


def _template(tokenizer: Any) -> str | None:
    found = tokenizer.chat_template
    return found if isinstance(found, str) else (found or {}).get("default")
