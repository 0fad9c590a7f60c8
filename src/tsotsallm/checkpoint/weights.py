"""Which files of a directory hold its weights: those that transformers would load, and the unused ones beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from tsotsallm.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from tsotsallm.checkpoint.adapter import WEIGHTS as ADAPTER_WEIGHTS
from tsotsallm.checkpoint.shards import TensorRecord, read_header
from tsotsallm.checkpoint.stored import StoredFile
from tsotsallm.errors import CheckpointError
from tsotsallm.files import quoted, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_NAME = 200
SUFFIXES = (".safetensors", ".safetensors.index.json")
NAMED = "transformers_weights"
"""The key of config.json that names the weights file outright."""
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt)")
_WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?|consolidated.*\.pth")
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_WITHOUT_PREFIX = re.compile(r"(layers\.|embed_tokens\.|norm\.)")
_PREFIX_TWICE = re.compile(r"model\.(model\.|lm_head\.)")
_WITHIN_WHOLE = re.compile(r"(model\.)?language_model\.")
_PICTURES = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\.")
_CACHES = "rotary_emb.inv_freq"
_SHOWN = 4


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a directory's weights.

    files    the files to read tensors from; where several hold a tensor, the last one counts
    index    the index that names them, if any
    beside   names of other files that hold weights, which are not used
    """

    files: tuple[Path, ...]
    index: Path | None
    beside: tuple[str, ...]

    @property
    def used(self) -> str:
        """The name of the index, or of the only file."""
        return self.files[0].name if self.index is None else self.index.name

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence about each kind of weights in the directory that is not used."""
        adapter = [name for name in self.beside if name.startswith("adapter_") and ADAPTER_CONFIG in self.beside]
        others = [name for name in self.beside if name not in adapter]
        notes = []
        if others:
            notes.append(f"the weights are those of {self.used}, as in transformers; not used: {_listed(others)}; delete "
                         "them if they are left over")
        if adapter:
            notes.append(f"the weights are those of {self.used} alone; not used: {_listed(adapter)}, which transformers "
                         "adds where PEFT is installed; merge the adapter with PEFT first if it belongs to the model")
        return tuple(notes)


def weight_files(directory: Path, listed: Collection[str] | None = None) -> WeightFiles:
    """The files from which transformers would read a directory's weights; raises CheckpointError where there are none.

    Its order is: the file that config.json names outright, model.safetensors, model.safetensors.index.json. `listed` are the
    names of all files where the directory holds only some of them; None: those that are there.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist")
    names = sorted(path.name for path in directory.iterdir()) if listed is None else sorted(listed)
    if distributed := [name for name in names if _DISTRIBUTED.fullmatch(name)]:
        raise CheckpointError(f"{directory} holds a checkpoint in the pieces of several processes ({distributed[0]}), which "
                              "transformers would load before any other and which is not read; load it and save it with "
                              "save_pretrained")
    named = _named_outright(directory)
    present = [directory / name for name in (SINGLE, INDEX) if (directory / name).exists() or (listed and name in listed)]
    if named is None and not present:
        raise _nothing(directory, names)
    used = present[0] if named is None else directory / named
    index = used if used.name.endswith(".json") else None
    files = tuple(_shards(index)) if index is not None else (used,)
    taken = {path.name for path in files} | {used.name}
    beside = [name for name in names if name not in taken and _WEIGHTS.fullmatch(name)]
    if ADAPTER_CONFIG in names:
        beside = [ADAPTER_CONFIG, *beside, *(name for name in names if name == "adapter_model.bin")]
    return WeightFiles(files, index, tuple(dict.fromkeys(beside)))


def files_to_fetch(directory: Path) -> list[str]:
    """Names of the weight files that a partly downloaded repository still lacks."""
    named = _named_outright(directory)
    if named is not None and not (directory / named).exists():
        return [named]
    if named is None and not any((directory / name).exists() for name in (SINGLE, INDEX)):
        return []
    return [path.name for path in weight_files(directory).files if not path.exists()]


def read_weights(files: WeightFiles, opened: Callable[[Path], StoredFile] | None = None) -> dict[str, TensorRecord]:
    """Every tensor, by the name under which transformers knows it; `opened` gives what files elsewhere are read from."""
    headers = {path.name: read_header(path, None if opened is None else opened(path)) for path in files.files}
    if files.index is not None:
        _require_index(files.index, headers)
    stored = {name: record for header in headers.values() for name, record in header.items()}
    by_name: dict[str, TensorRecord] = {}
    for name, record in stored.items():
        if name.endswith(_CACHES):      # rotary frequencies in old checkpoints, which follow from the config
            continue
        known = _as_known(name)
        if known in by_name:
            raise CheckpointError(f"{record.path.parent} holds {quoted(known)} twice, with and without the prefix 'model.'; "
                                  "delete one")
        by_name[known] = record
    return by_name


def of_text(records: dict[str, TensorRecord]) -> dict[str, TensorRecord]:
    """The tensors of the text model of one that sees pictures too, by the names that it has alone."""
    found: dict[str, TensorRecord] = {}
    for name, record in records.items():
        inner = _WITHIN_WHOLE.match(name)
        known = _as_known(name[inner.end():]) if inner else name
        if known in found:
            raise CheckpointError(f"{record.path.parent} holds {quoted(known)} twice, with and without the prefix "
                                  f"{quoted('language_model.')}; delete one")
        if inner or not _PICTURES.match(name):
            found[known] = record
    return found


def _require_index(index: Path, headers: dict[str, dict[str, TensorRecord]]) -> None:
    """Raise unless the shards hold what the index says, and transformers would read every tensor from the shard it names."""
    last = {name: file for file, header in headers.items() for name in header}
    for name, file in _weight_map(index).items():
        if name not in headers[file]:
            raise CheckpointError(f"{index} says that {quoted(name)} is in {file}, but it is not; index and shards do not "
                                  "belong together")
        if last[name] != file:
            raise CheckpointError(f"{index} says that {quoted(name)} is in {file}, but {last[name]} holds it too, and "
                                  "transformers would read that one; delete the one that is left over")


def _as_known(name: str) -> str:
    """A tensor's name with exactly one prefix `model.`: base models lack it and others repeat it, as transformers allows."""
    if _WITHOUT_PREFIX.match(name):
        return f"model.{name}"
    return name.removeprefix("model.") if _PREFIX_TWICE.match(name) else name


def _named_outright(directory: Path) -> str | None:
    """The weights file that config.json names, if it names one."""
    try:
        config = read_json(directory / "config.json", CheckpointError)
    except FileNotFoundError:
        return None
    named = config.get(NAMED) if isinstance(config, dict) else None
    if named is not None and (not isinstance(named, str) or Path(named).name != named or not named.endswith(SUFFIXES)):
        raise CheckpointError(f"{directory / 'config.json'} names {quoted(named)} as weights ({NAMED}), which is not a "
                              "safetensors file of this directory; remove the key, or name one")
    return named


def _shards(index: Path) -> Iterable[Path]:
    """Yield the files that an index names, sorted; raises CheckpointError for links that lead out of the checkpoint."""
    directory = index.parent
    home, beside = directory.resolve(), index.resolve().parent  # a hub cache links both index and shards to its blobs
    for file in sorted(set(_weight_map(index).values())):
        if Path(file).name != file or file == ".." or not file.isprintable() or len(file) > LONGEST_NAME:
            raise CheckpointError(f"{index} names {quoted(file)}, which is outside the checkpoint or is not a file name; "
                                  "name a file of this directory")
        path = directory / file
        try:
            real = path.resolve()
        except (OSError, RuntimeError):     # a loop of links
            real = path
        if path.is_symlink() and home not in real.parents and real.parent != beside:
            raise CheckpointError(f"{index} names {quoted(file)}, a link that leads outside the checkpoint; copy the file "
                                  "here, or give the directory that it is in")
        yield path


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index, CheckpointError)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index} cannot be read: its weight_map does not map names of tensors to files; download or "
                              "copy it again")
    return found


def _nothing(directory: Path, names: list[str]) -> CheckpointError:
    """The error that says what a directory holds instead of weights that can be read."""
    weights = [name for name in names if _WEIGHTS.fullmatch(name) and not name.startswith("adapter_")]
    if not weights and (ADAPTER_CONFIG in names or ADAPTER_WEIGHTS in names):
        return CheckpointError(f"{directory} holds an adapter ({ADAPTER_CONFIG}) and no whole model; merge it into its base "
                               "with PEFT (merge_and_unload) and save that with save_pretrained")
    if others := [name for name in weights if name.endswith(SUFFIXES)]:
        return CheckpointError(f"{directory} holds {_listed(others)}, but no {SINGLE} and no {INDEX}, which are the names "
                               f"that transformers looks for; rename the one that is meant to {SINGLE}")
    if pickled := [name for name in names if _PICKLED.fullmatch(name)]:
        return CheckpointError(f"{directory} holds pickled weights only ({quoted(pickled[0])}), and loading a pickle can "
                               "run any code; convert it to safetensors with transformers' save_pretrained, where that is "
                               "safe")
    return CheckpointError(f"{directory} holds no {SINGLE} and no {INDEX}")


def _listed(names: list[str]) -> str:
    shown = [name if name.isprintable() and len(name) <= 80 else quoted(name) for name in names[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
