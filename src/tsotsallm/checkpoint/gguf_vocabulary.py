"""A tokenizer in the terms of GGUF: tokens, scores or merges, and the rule that splits text before merging."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tsotsallm.checkpoint.codec import ENDS_BY_NAME, TextCodec
from tsotsallm.checkpoint.textrules import SPACE
from tsotsallm.errors import CheckpointError, ConversationError, ExportError
from tsotsallm.files import quoted

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
    _LLAMA3.replace("{1,3}", "{1}").replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"): "seed-coder",
    _GPT4O_WORDS % ("", "", ""): "tekken",
    _GPT4O_WORDS % (_CONTRACTIONS + "?", _CONTRACTIONS + "?", "{1,3}"): "gpt-4o"}
"""The regular expression with which a tokenizer splits text -> llama.cpp's name of the same rule."""

SEQUENCES: dict[tuple[str, ...], str] = {
    (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
     "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
     "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"): "deepseek-v3"}
"""Regular expressions that split text one after another -> llama.cpp's name of the same rule."""

LIKE_GPT2, BY_DIGITS = "gpt-2", "smollm"
"""Rules that the tokenizers library has steps of its own for: GPT-2's, and the same after digits were split."""
ALIKE = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "smaug-bpe": ("dbrx",),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open"), "deepseek-v3": ("hunyuan-dense",),
    "gpt-4o": ("llama4",), LIKE_GPT2: ("phi-2", "gigachat", "mellum", "olmo", "exaone4"),
    BY_DIGITS: ("starcoder", "refact", "command-r", "codeshell", "exaone")}
"""llama.cpp's name of a rule -> other names under which it has the same."""
WHOLE_WORDS = ("llama-bpe", "tekken")
"""Rules with which llama.cpp takes a word that is a token as it is, before it merges."""


@dataclass(frozen=True)
class Vocabulary:
    """Everything that GGUF can hold of a tokenizer, and what it cannot.

    ends           tokens that end an answer, EOS first
    prefix         tokens that belong before a plain text where `add_bos` cannot say so, else None
    composed       whether the tokenizer joins accents with their letters first (NFC)
    leading_space  `first` or `always` where `add_space_prefix` does not say everything, else empty
    notes          what else the user should know
    differences    texts that engines will split differently from the checkpoint's tokenizer, each a clause
    """

    model: str                      # llama (merging like SentencePiece) or gpt2 (byte-level BPE)
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    bos: int | None
    ends: tuple[int, ...]
    unknown: int | None
    padding: int | None
    add_bos: bool
    add_space_prefix: bool
    chat_template: str | None
    prefix: tuple[int, ...] | None = None
    leading_space: str = ""
    composed: bool = False
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_vocabulary(codec: TextCodec) -> Vocabulary:
    """A tokenizer in the terms of GGUF, padded to the rows of the embeddings; raises ExportError where GGUF has none."""
    content, where, size = codec.content, codec.where, codec.size
    model = content["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"{where} has a tokenizer of type {model.get('type')}, for which llama.cpp has no vocabulary that "
                          "splits text alike; BPE can be exported: that of SentencePiece, Llama 3, GPT-2 and similar ones")
    vocabulary = {str(token): int(place) for token, place in model["vocab"].items()}
    merges = [tuple(entry.split(" ", 1)) if isinstance(entry, str) else tuple(entry) for entry in model["merges"]]
    added = {int(entry["id"]): entry for entry in content.get("added_tokens", [])}
    beyond = sorted(place for place in added if place >= size)
    added = {place: entry for place, entry in added.items() if place < size}
    tokens = {place: token for token, place in vocabulary.items()}
    tokens |= {place: entry["content"] for place, entry in added.items()}
    if tokens and max(tokens) >= size:
        raise ExportError(f"{where}: the tokenizer numbers a token {max(tokens)}, but the model has {size}; tokenizer and "
                          "weights do not belong together")
    if not merges:
        raise ExportError(f"{where} has a tokenizer without merges, without which llama.cpp loads no vocabulary; it "
                          "cannot be exported")
    if any("" in pair for pair in merges) or "" in tokens.values():
        raise ExportError(f"{where} has a tokenizer with an empty token, for which llama.cpp has no place; it is damaged")
    pieces = is_sentencepiece(content)
    pre = "default" if pieces else _split_rule(content, where)
    unknown = None if model.get("unk_token") is None else vocabulary.get(str(model["unk_token"]))
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
    differences = [*_loose_tokens(added.values()), *_names_that_end(tokens, added)]
    scheme = _leading_space(content, where) if pieces else "never"
    space_prefix, leading_space = scheme in ("legacy", "always") or (scheme == "first" and codec.chat is None), ""
    if scheme in ("first", "always"):
        leading_space = scheme
        differences.append(
            "plain text that begins without a space (conversations are split alike)" if not space_prefix else
            "text that begins with a space, and text after a special token" if scheme == "first" else
            "text that begins with a space, at the beginning and after special tokens")
    composed = not pieces and content.get("normalizer") is not None
    if composed:
        differences.append("text whose accents are characters of their own (the tokenizer joins them with their letters "
                           "first, NFC)")
    add_bos, prefix, unlike = _begin(codec)
    differences += unlike
    notes: list[str] = []
    if beyond:
        notes.append(f"the tokenizer's tokens {quoted(beyond)} have no row in the embeddings; they are left out of the file")
    if not pieces and (lacking := missing_bytes(vocabulary)):
        notes.append(f"the vocabulary lacks {len(lacking)} bytes, such as 0x{lacking[-1]:02X}: the tokenizer drops them, "
                     "and what stands around them may be joined otherwise in other engines")
    ends = codec.ends or tuple(place for place in (codec.padding, codec.bos, max(tokens)) if place is not None)[:1]
    return Vocabulary(
        "llama" if pieces else "gpt2", pre, [tokens.get(place, f"[unused {place}]") for place in range(size)], types,
        _scores(tokens, vocabulary, merges, size) if pieces else None,
        None if pieces else [f"{left} {right}" for left, right in merges],
        codec.bos, ends, codec.unknown if unknown is None else unknown, codec.padding, add_bos, space_prefix,
        None if codec.chat is None else codec.chat.source,
        prefix, leading_space, composed, tuple(differences), tuple(notes))


def is_sentencepiece(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json works like SentencePiece: spaces are symbols of their own, and unknown text becomes bytes."""
    return bool(content["model"].get("byte_fallback")) and SPACE in json.dumps(
        [content.get("normalizer"), content.get("pre_tokenizer")], ensure_ascii=False)


def _leading_space(content: dict[str, Any], where: str) -> str:
    """Where a SentencePiece tokenizer adds a space to a text.

    `legacy`: before every stretch of text; `always`: the same, unless it begins with a space; `first`: at the beginning
    only; `never`. Raises ExportError where it changes text in a way that llama.cpp does not.
    """
    before = [*_flat(content.get("normalizer"), "normalizers"), *_flat(content.get("pre_tokenizer"), "pretokenizers")]
    known = {"Prepend", "Replace", "Metaspace"}
    # Gemma's tokenizers split at spaces once there are none
    if any(step.get("type") == "Replace" for step in before):
        before = [step for step in before if step.get("type") != "Split" or step.get("pattern") != {"String": " "}]
    strange = [step.get("type") for step in before if step.get("type") not in known]
    replaced = [step for step in before if step.get("type") == "Replace" and step.get("pattern") != {"String": " "}]
    if strange or replaced:
        named = strange[0] if strange else f"Replace of {quoted(replaced[0].get('pattern'))}"
        raise ExportError(f"{where} changes text by {named} before it is split, which llama.cpp does not do with a "
                          "SentencePiece vocabulary; nothing is exported")
    for step in before:
        if step["type"] == "Prepend":
            return "legacy"
        if step["type"] == "Metaspace":
            return str(step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never"))
    return "never"


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [one for part in step[inner] for one in _flat(part, inner)] if step.get("type") == "Sequence" else [step]


def _begin(codec: TextCodec) -> tuple[bool, tuple[int, ...] | None, list[str]]:
    """Whether the file asks for BOS, the prefix of plain text where BOS does not say it, and the resulting differences.

    llama.cpp puts BOS before both plain text and conversations, or before neither; conversations decide.
    """
    plain = codec.prefix
    by_bos = codec.bos is not None and plain == (codec.bos,)
    if codec.chat is not None:
        try:
            ids = codec.conversation([{"role": "user", "content": "a"}])
        except ConversationError:
            ids = []
        wanted = bool(ids) and ids[0] == codec.bos
        if by_bos and not wanted:
            return False, plain, [f"plain text, before which {quoted(codec.tokenizer.bos_token)} belongs (the chat "
                                  "template writes none, and llama.cpp puts it before both or neither)"]
        if not plain and wanted:
            return False, None, []          # the template writes it itself
    if plain and not by_bos:
        named = " ".join(map(str, codec.tokenizer.convert_ids_to_tokens(list(plain))))
        return False, plain, [f"plain text, before which {quoted(named)} belongs"]
    return by_bos, None, []


def _loose_tokens(added: Iterable[dict[str, Any]]) -> list[str]:
    """A clause for each added token that absorbs spaces or requires word boundaries, for which GGUF has no key."""
    kinds = {"lstrip": "spaces before", "rstrip": "spaces after", "single_word": "letters beside"}
    return [f"{what} {quoted(one['content'])} (its `{flag}` has no place in GGUF)" for one in added
            for flag, what in kinds.items() if one.get(flag)]


def _names_that_end(tokens: dict[int, str], added: Mapping[int, object]) -> list[str]:
    """A clause for each ordinary token that llama.cpp takes for the end of an answer because of its name."""
    return [f"{quoted(token)}, an ordinary token that llama.cpp takes for the end of an answer because of its name"
            for place, token in tokens.items() if place not in added and token in ENDS_BY_NAME]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: dict[int, str], vocabulary: dict[str, int], merges: list[Any], size: int) -> list[float]:
    """Scores that fall with the rank of a token's merge, so that SentencePiece merges in the order of the list."""
    first: dict[int, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(vocabulary[left + right], rank)
    return [-float(first.get(place, len(merges))) if place in tokens else 0.0 for place in range(size)]


def missing_bytes(vocabulary: Iterable[str]) -> list[int]:
    """Bytes for which a byte-level vocabulary has no token, except those that never occur in UTF-8."""
    known = set(vocabulary)
    symbols, spare = {}, 256
    for byte in range(256):             # GPT-2's alphabet: bytes that do not print are moved up
        prints = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        symbols[byte], spare = (chr(byte), spare) if prints else (chr(spare), spare + 1)
    return [byte for byte, symbol in symbols.items() if symbol not in known and byte not in (0xC0, 0xC1) and byte < 0xF5]


def letter_with(byte: int) -> str:
    """A character whose UTF-8 form holds a byte."""
    if byte < 0xC0:
        return chr(byte)
    if byte < 0xE0:
        return chr((byte & 0x1F) << 6)
    if byte < 0xF0:
        return chr(max(0x800, (byte & 0xF) << 12))
    return chr(max(0x10000, (byte & 7) << 18))


def unlisted_pairs(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of pieces that SentencePiece in GGUF merges and a tokenizer does not, or not at the same time.

    SentencePiece merges any two pieces that make a token, the earliest token of the list first. A tokenizer converted from
    its files lists all such pairs in that order; one that the tokenizers library trained lists only those that it met.
    """
    vocabulary = content["model"]["vocab"]
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in content["model"]["merges"]]
    added = {merge["content"] for merge in content.get("added_tokens", [])}
    listed = set(merges)
    pairs = [(token[:cut], token[cut:]) for token in vocabulary if token not in added for cut in range(1, len(token))
             if token[:cut] in vocabulary and token[cut:] in vocabulary and (token[:cut], token[cut:]) not in listed]
    first: dict[str, int] = {}
    latest = -1
    for rank, pair in enumerate(merges):
        if first.setdefault("".join(pair), rank) < latest:
            pairs.append((pair[0], pair[1]))
        latest = max(latest, first["".join(pair)])
    return pairs


def _split_rule(content: dict[str, Any], where: str) -> str:
    """llama.cpp's name of the rule with which a byte-level tokenizer splits text, recognised by its regular expressions.

    Raises ExportError for a rule without a name.
    """
    before = content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    rule: str | None = None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        rule = LIKE_GPT2
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        rule = BY_DIGITS
    elif len(kinds) > 1 and kinds == ["Split"] * (len(kinds) - 1) + ["ByteLevel"] and not steps[-1].get("use_regex", True):
        patterns = tuple(str(step.get("pattern", {}).get("Regex")) for step in steps[:-1])
        rule = SPLITS.get(patterns[0]) if len(patterns) == 1 else SEQUENCES.get(patterns)
    if rule is None or content.get("normalizer") not in (None, {"type": "NFC"}) or any(
            step.get("add_prefix_space") for step in steps):
        known = ", ".join([LIKE_GPT2, BY_DIGITS, *SPLITS.values(), *SEQUENCES.values()])
        raise ExportError(f"{where} splits text by a rule that llama.cpp has no name for ({quoted(json.dumps(before))}); "
                          f"its rules are those of {known}; llama.cpp would split text differently from the model's "
                          "training, so nothing is exported")
    whole_words = bool(content["model"].get("ignore_merges"))
    if rule == "llama3":
        return "llama-bpe" if whole_words else "smaug-bpe"
    if whole_words and rule != "tekken":
        raise ExportError(f"{where} takes whole words before it merges (ignore_merges), which llama.cpp does only with "
                          "Llama 3's and Mistral's rules; nothing is exported")
    return rule


def split_steps(pre: str | None, where: str) -> tuple[list[dict[str, Any]], bool]:
    """The steps of the tokenizers library before its byte level, by llama.cpp's name of a rule; whether whole words count.

    The inverse of the rule's recognition; without steps, and after digits, the byte level splits by GPT-2's own expression.
    Raises CheckpointError for a rule that is not known.
    """
    own: dict[str, tuple[str, ...]] = {"llama-bpe" if name == "llama3" else name: (rule,) for rule, name in SPLITS.items()}
    own |= {"smaug-bpe": (_LLAMA3,), **{name: rules for rules, name in SEQUENCES.items()}}
    others = {other: name for name, alike in ALIKE.items() for other in alike}
    name = others.get(str(pre), str(pre))
    if name == LIKE_GPT2:
        return [], False
    if name == BY_DIGITS:
        return [{"type": "Digits", "individual_digits": True}], False
    if name not in own:
        told = "names no rule" if pre is None else f"names the rule {quoted(pre)}"
        raise CheckpointError(f"{where} {told} by which text is split before merging (tokenizer.ggml.pre), which is "
                              f"not known here; known are {', '.join(sorted({LIKE_GPT2, BY_DIGITS, *own, *others}))}")
    splits: list[dict[str, Any]] = [{"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}
                                    for rule in own[name]]
    return splits, name in WHOLE_WORDS
