"""The tokenizer in the header of a GGUF file, as the files that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tsotsallm.checkpoint.chat import ChatTemplate
from tsotsallm.checkpoint.codec import NAMED_ENDS
from tsotsallm.checkpoint.gguf_file import MERGES, GgufFile, GgufTokenizer
from tsotsallm.checkpoint.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, split_steps
from tsotsallm.checkpoint.textrules import SPACE, TextRules
from tsotsallm.errors import CheckpointError, ConversationError
from tsotsallm.files import quoted

MATCHED = (UNKNOWN, CONTROL, USER_DEFINED)
END_KEYS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
"""Keys of tokens besides EOS at which llama.cpp ends an answer."""
MOST_CUTS = 1 << 28
"""Characters that are compared at most to find all pairs of pieces; 256,000 tokens of a large vocabulary take 2 ** 25."""
BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def token_files(file: GgufFile) -> dict[str, bytes]:
    """Name -> content of the tokenizer files of a header that was read with its merges.

    Tokens that are marked as unused are left out. Raises CheckpointError for a kind of tokenizer, or a rule that splits
    text, that is not known.
    """
    found = file.tokenizer
    if found is None:
        raise CheckpointError(f"{file.path} has no tokenizer in its header; convert or download it again")
    if found.model not in ("gpt2", "llama"):
        raise CheckpointError(f"{file.path} has a tokenizer of the kind {quoted(found.model)} ({found.kind}); byte-level "
                              "BPE (gpt2) and SentencePiece (llama) are read")
    rules, types = TextRules.read(file), _types(file)
    unknown = file.token_number("unknown")
    if unknown is None and found.model == "llama":
        unknown = 0
    named = {"bos_token": found.bos, "eos_token": found.eos, "unk_token": unknown, "pad_token": file.token_number("padding")}
    texts = {name: file.tokens[place] for name, place in named.items() if place is not None and place < len(file.tokens)}
    content = _content(file, found, rules, types, texts.get("unk_token"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "model_max_length": file.context, **texts}
    ends = [found.eos, *(file.token_number(name) for name in END_KEYS)]
    generation = {"bos_token_id": found.bos, "pad_token_id": named["pad_token"] if "pad_token" in texts else None,
                  "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None and end < found.size))}
    files = {"tokenizer.json": json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"),
             "tokenizer_config.json": json.dumps(config, ensure_ascii=False).encode("utf-8", "replace"),
             "generation_config.json": json.dumps({key: value for key, value in generation.items() if value}).encode()}
    if rules.chat is not None:
        files["chat_template.jinja"] = _template(rules).encode("utf-8", "replace")
    return files


def _types(file: GgufFile) -> list[int]:
    """The type of every token; those that llama.cpp takes for ends by their names are special, whatever the file says."""
    types = file.numbers("tokenizer.ggml.token_type") or [NORMAL] * len(file.tokens)
    if len(types) != len(file.tokens):
        raise CheckpointError(f"{file.path} has {len(file.tokens)} tokens, but types of {len(types)}; convert or download "
                              "it again")
    return [CONTROL if token in NAMED_ENDS else kind for token, kind in zip(file.tokens, types, strict=True)]


def _content(file: GgufFile, found: GgufTokenizer, rules: TextRules, types: list[int],
             unknown: str | None) -> dict[str, Any]:
    """The content of tokenizer.json."""
    vocabulary: dict[str, int] = {}
    for place, (token, kind) in enumerate(zip(file.tokens, types, strict=True)):
        if token and kind != UNUSED:
            vocabulary.setdefault(token, place)         # llama.cpp takes the first of two alike
    added = [{"id": place, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": types[place] != USER_DEFINED} for token, place in vocabulary.items()
             if types[place] in MATCHED]
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary}
    content: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                               "normalizer": None, "pre_tokenizer": None,
                               "post_processor": _around(file, found, rules), "decoder": {**BYTE_LEVEL, "use_regex": True},
                               "model": model}
    if found.model == "gpt2":
        steps, model["ignore_merges"] = split_steps(found.pre, str(file.path))
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, BYTE_LEVEL]} if steps else {
            **BYTE_LEVEL, "use_regex": True}
        if steps and steps[-1]["type"] != "Split":
            content["pre_tokenizer"]["pretokenizers"][-1] = {**BYTE_LEVEL, "use_regex": True}
        content["normalizer"] = {"type": "NFC"} if rules.composed else None
        model["merges"] = _listed_merges(file, vocabulary)
        return content
    pieces = {token: place for token, place in vocabulary.items() if types[place] not in (*MATCHED, BYTE)}
    model |= {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True, "merges": _merges_by_score(file, pieces)}
    prefixed = rules.space_prefix
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if rules.leading_space:
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": rules.leading_space,
                                    "split": False}
        prefixed = True
    else:
        content["normalizer"] = {"type": "Sequence", "normalizers": [
            *([{"type": "Prepend", "prepend": SPACE}] if prefixed else []), replace]}
    content["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else [])]}
    return content


def _listed_merges(file: GgufFile, vocabulary: dict[str, int]) -> list[list[str]]:
    """The merges of a byte-level tokenizer, without those of tokens that it does not have."""
    listed = file.fields.get(MERGES)
    if not isinstance(listed, list) or not listed:
        raise CheckpointError(f"{file.path} has a byte-level tokenizer without merges; convert or download it again")
    if not all(isinstance(merge, str) for merge in listed):
        raise CheckpointError(f"{file.path} gives {MERGES} as {quoted(listed)}, where a list of texts is expected; convert "
                              "or download it again")
    pairs = []
    for merge in listed:
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1:]
        if cut > 0 and left in vocabulary and right in vocabulary and left + right in vocabulary:
            pairs.append([left, right])
    return pairs


def _merges_by_score(file: GgufFile, pieces: dict[str, int]) -> list[list[str]]:
    """All pairs of pieces that make a piece, the best score of the result first, as SentencePiece merges them."""
    scores = file.fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(file.tokens) or not all(type(one) is float for one in scores):
        raise CheckpointError(f"{file.path} has a SentencePiece tokenizer without a score for every token; convert or "
                              "download it again")
    if sum(len(piece) ** 2 for piece in pieces) > MOST_CUTS:
        raise CheckpointError(f"{file.path} has tokens of up to {max(map(len, pieces))} characters, too long to find their "
                              "parts; its tokenizer is damaged")
    merges: list[list[str]] = []
    for token, _ in sorted(pieces.items(), key=lambda item: (-scores[item[1]], item[1])):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in pieces and pair[1] in pieces]
        merges += (list(pair) for pair in sorted(known, key=lambda pair: (pieces[pair[0]], pieces[pair[1]])))
    return merges


def _around(file: GgufFile, found: GgufTokenizer, rules: TextRules) -> dict[str, Any] | None:
    """The tokens before and after a text."""
    before = list(rules.prefix)
    after = [found.eos] if found.adds_eos and found.eos is not None else []
    if not before and not after:
        return None

    def marks(places: Iterable[int]) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": file.tokens[place], "type_id": 0}} for place in places]

    one = [*marks(before), {"Sequence": {"id": "A", "type_id": 0}}, *marks(after)]
    return {"type": "TemplateProcessing", "single": one, "pair": [*one, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {file.tokens[place]: {"id": file.tokens[place], "ids": [place], "tokens": [file.tokens[place]]}
                               for place in dict.fromkeys([*before, *after])}}


def _template(rules: TextRules) -> str:
    """The chat template; with BOS before it where the engine adds one that the template does not write."""
    chat = rules.chat
    assert isinstance(chat, ChatTemplate)
    begin = str(chat.special_tokens.get("bos_token") or "")
    if not rules.adds_bos or not begin:
        return chat.source
    try:
        written = chat.render([{"role": "user", "content": "a"}]).startswith(begin)
    except ConversationError:
        written = True
    return chat.source if written else "{{ bos_token }}" + chat.source
