"""A GGUF file's rules for text: prefix, leading spaces, chat template; our files add keys for what GGUF cannot express."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from tsotsallm.checkpoint.chat import ChatTemplate, pick
from tsotsallm.checkpoint.gguf_file import GgufFile

PREFIX, LEADING_SPACE, COMPOSED = "tsotsallm.text_prefix", "tsotsallm.leading_space", "tsotsallm.composed"
"""Our keys: tokens that belong before a plain text where `add_bos_token` cannot say so; `first` or `always` (the schemes of
the tokenizers library's Metaspace) where `add_space_prefix` cannot; and whether accents are composed (NFC)."""
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Types of tokens that are matched in a text before it is split."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclass(frozen=True)
class TextRules:
    """How a file's tokenizer treats the beginning of a text, and its conversations.

    bos            the token that begins a text; -1 where there is none
    adds_bos       whether the file asks engines to put it before every text, conversations included
    prefix         tokens that belong before a plain text
    leading_space  `first` or `always`; empty where `add_space_prefix` says everything
    composed       whether accents are joined with their letters first (Unicode's NFC), for which GGUF has no key
    space_prefix   whether the engine puts a space before a text, and after every special token
    special        texts of the tokens that are matched before a text is split
    """

    bos: int = -1
    adds_bos: bool = False
    prefix: tuple[int, ...] = ()
    leading_space: str = ""
    space_prefix: bool = False
    composed: bool = False
    special: tuple[str, ...] = ()
    chat: ChatTemplate | None = None

    @classmethod
    def read(cls, file: GgufFile) -> TextRules:
        """The rules of an open file, with llama.cpp's defaults for what it omits."""
        tokens, cut = file.tokens, file.tokenizer
        if cut is None:
            return cls()
        bos, kinds = -1 if cut.bos is None else cut.bos, file.numbers("tokenizer.ggml.token_type")
        named = {name: tokens[place] for name, key in _KEYS.items()
                 if (place := file.token_number(key)) is not None and place < len(tokens)}
        template = file.text("tokenizer.chat_template")
        prefix = file.numbers(PREFIX) if PREFIX in file.fields else [bos] if cut.adds_bos else []
        return cls(
            bos, cut.adds_bos, tuple(token for token in prefix if 0 <= token < len(tokens)), file.text(LEADING_SPACE) or "",
            bool(file.fields.get("tokenizer.ggml.add_space_prefix", cut.model == "llama")), bool(file.fields.get(COMPOSED)),
            tuple(token for token, kind in zip(tokens, kinds, strict=False) if
                  kind in (UNKNOWN, CONTROL, USER_DEFINED) and token),
            pick({} if template is None else {"default": template},
                 {f"{name}_token": token for name, token in named.items()}))

    def normal(self, text: str) -> str:
        """A text in the form that the tokenizer splits."""
        return unicodedata.normalize("NFC", text) if self.composed else text

    def as_cut(self, text: str) -> str:
        """The text to give to llama.cpp so that it splits `text` like the tokenizer that the file was made from."""
        text = self.normal(text)
        if not self.leading_space or not text or text.startswith(self.special):
            return text
        begins_with_space = text[0] in (" ", SPACE)
        if self.space_prefix:
            return text[1:] if begins_with_space and len(text) > 1 else text
        return text if begins_with_space else f" {text}"


_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
