"""A smaller vocabulary: the tokens that one's texts need, and bytes for everything else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tsotsallm.checkpoint.merging import Merges
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.spec import EMBEDDING
from tsotsallm.errors import CheckpointError, RecipeError
from tsotsallm.stages.base import Stage

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
REPLACED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Vocabulary(Stage):
    """Drop the tokens that the given texts do not need; the same text is cut into the same tokens, numbered anew.

    keep  files or directories of text in the languages that matter: their tokens stay, with every merge on the way to them;
          bytes, special and added tokens always stay, so that any text can still be encoded
    size  so many tokens: those needed most, or the earliest merges besides; by default all that are needed
    """

    name: ClassVar[str] = "vocabulary"
    keep: list[Any] = field(default_factory=list)
    size: int | None = None

    def __post_init__(self) -> None:
        if not self.keep or not all(isinstance(one, str) for one in self.keep):
            raise RecipeError(f"vocabulary.keep is {self.keep!r}; it takes a list of text files in the languages to keep")
        if self.size is not None and self.size < 1:
            raise RecipeError(f"vocabulary.size is {self.size}; it takes a number of tokens")

    def applied(self, checkpoint: Checkpoint, texts: Sequence[str]) -> Checkpoint:
        """The same model with fewer tokens: nothing is written, rows are read by their old numbers."""
        path = checkpoint.directory / "tokenizer.json"
        try:
            content: dict[str, Any] = json.loads(path.read_text("utf-8"))
            backend = checkpoint.tokenizer().backend_tokenizer
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); cutting a vocabulary needs the tokenizer as "
                                  "tokenizer.json") from None
        merges = Merges(content, backend, str(path))
        needed = merges.needed(texts)
        kept = merges.kept(needed, self.size)
        most = checkpoint.shape_of(EMBEDDING)[0]
        if kept[-1] >= most:
            raise CheckpointError(f"{path} numbers a token {kept[-1]}, but the model has {most}; tokenizer and weights do "
                                  "not belong together")
        files = {"tokenizer.json": json.dumps(merges.cut(kept), ensure_ascii=False).encode()}
        new = {old: place for place, old in enumerate(kept)}
        for name in REPLACED[1:]:
            other = checkpoint.directory / name
            if other.exists():
                found = json.loads(other.read_text("utf-8"))
                if "added_tokens_decoder" in found:
                    found["added_tokens_decoder"] = {str(new[int(old)]): token for old, token in
                                                     found["added_tokens_decoder"].items() if int(old) in new}
                files[name] = json.dumps(renumbered(found, new), ensure_ascii=False, indent=2).encode()
        config = renumbered(checkpoint.spec.config, new) | {"vocab_size": len(kept)}
        return checkpoint.restricted(kept, config, files)


def renumbered(config: dict[str, Any], new: dict[int, int]) -> dict[str, Any]:
    """A config whose token ids are the new ones; an id that was dropped is None."""
    found = dict(config)
    for key in TOKEN_IDS:
        value = found.get(key)
        if isinstance(value, list):
            found[key] = [new[one] for one in value if one in new]
        elif isinstance(value, int) and not isinstance(value, bool):
            found[key] = new.get(value)
    return found
