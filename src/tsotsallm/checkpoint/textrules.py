"""What a GGUF file says of text: prefix, leading spaces, chat template. Files of ours also say what GGUF has no key for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tsotsallm.checkpoint.chat import ChatTemplate, pick

PREFIX, LEADING_SPACE = "tsotsallm.text_prefix", "tsotsallm.leading_space"
"""Keys of ours: tokens that belong before a plain text where `add_bos_token` cannot say so, and `first` or `always` (the schemes
of the tokenizers library's Metaspace) where `add_space_prefix` cannot."""
CONTROL, USER_DEFINED = 3, 4
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclass(frozen=True)
class TextRules:
    """How a file's tokenizer treats the beginning of a text, and its conversations.

    bos            the token that begins a text; -1 where there is none
    adds_bos       whether the file asks engines to put it before every text, conversations included
    prefix         tokens that belong before a plain text
    leading_space  `first` or `always`; empty where `add_space_prefix` says all there is
    space_prefix   whether the engine puts a space before a text, and after every special token
    """

    bos: int = -1
    adds_bos: bool = False
    prefix: tuple[int, ...] = ()
    leading_space: str = ""
    space_prefix: bool = False
    special: tuple[str, ...] = ()
    chat: ChatTemplate | None = None

    @classmethod
    def read(cls, fields: Mapping[str, Any], tokens: Sequence[str]) -> TextRules:
        """The rules of an open file, with llama.cpp's defaults for what it leaves out."""
        def value(key: str, default: Any) -> Any:
            return fields[key].contents() if key in fields else default

        pieces = value("tokenizer.ggml.model", "") == "llama"
        bos = int(value("tokenizer.ggml.bos_token_id", 1 if pieces else -1))
        adds_bos = bool(value("tokenizer.ggml.add_bos_token", pieces or value("tokenizer.ggml.pre", "") == "tekken"))
        kinds = value("tokenizer.ggml.token_type", [])
        named = {name: tokens[place] for name in ("bos", "eos", "unk", "pad")
                 if 0 <= (place := int(value(f"tokenizer.ggml.{_KEYS[name]}_token_id", -1))) < len(tokens)}
        template = value("tokenizer.chat_template", None)
        return cls(
            bos, adds_bos and 0 <= bos < len(tokens),
            tuple(int(one) for one in value(PREFIX, [bos] if adds_bos and 0 <= bos < len(tokens) else [])),
            str(value(LEADING_SPACE, "")), bool(value("tokenizer.ggml.add_space_prefix", pieces)),
            tuple(token for token, kind in zip(tokens, kinds, strict=False) if kind in (CONTROL, USER_DEFINED) and token),
            pick({} if template is None else {"default": str(template)},
                 {f"{name}_token": token for name, token in named.items()}))

    def as_cut(self, text: str) -> str:
        """The text that llama.cpp must be given so that it cuts a text as the tokenizer does that the file was made from."""
        if not self.leading_space or not text or text.startswith(self.special):
            return text
        begins_with_space = text[0] in (" ", SPACE)
        if self.space_prefix:
            return text[1:] if begins_with_space and len(text) > 1 else text
        return text if begins_with_space else f" {text}"


_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
