"""Where GGUF files are: a file, all parts of a split one, a model in Ollama's store."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from tsotsallm.checkpoint.gguf_file import GgufFile, begins_as_gguf
from tsotsallm.checkpoint.stored import StoredFile
from tsotsallm.errors import CheckpointError
from tsotsallm.files import quoted, read_json
from tsotsallm.remote.names import PREFIX, HubName, hub_name
from tsotsallm.remote.repository import asked, client, on_disk, say_whole

OLLAMA = "ollama:"
MODELS = "OLLAMA_MODELS"
REGISTRY, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
MODEL_LAYER, ADAPTER_LAYER = "application/vnd.ollama.image.model", "application/vnd.ollama.image.adapter"
MOST_PARTS = 10_000
_NAME = re.compile(r"(?:(?P<host>[\w.-]+(?::\d+)?)/)?(?:(?P<space>[\w.-]+)/)?(?P<model>[\w.-]+)(?::(?P<tag>[\w.-]+))?")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_PART = re.compile(r"(?P<name>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")


def gguf_path(source: str | Path) -> Path | None:
    """The GGUF file that a name stands for: a file, a model in Ollama's store or on the hub; None for anything else.

    A file on the hub is downloaded whole. Raises CheckpointError for a model that Ollama does not have, HubError for one
    that the hub does not give.
    """
    if str(source).startswith(OLLAMA):
        return _in_ollama(str(source).removeprefix(OLLAMA))
    if str(source).startswith(PREFIX):
        name = hub_name(source)
        return None if name is None or name.file is None else _from_hub(name)
    path = Path(source)
    return path if not path.is_dir() and (path.suffix == ".gguf" or begins_as_gguf(path)) else None


def is_gguf(source: str | Path) -> bool:
    """Whether a name stands for a GGUF file; nothing is downloaded."""
    if str(source).startswith(PREFIX):
        name = hub_name(source)
        return name is not None and name.file is not None
    return gguf_path(source) is not None


def parts_at(path: Path) -> list[Path]:
    """The files of all parts that the name of one speaks of, in order; the file itself where it is named otherwise."""
    named = _PART.fullmatch(path.name)
    if named is None or not 1 <= int(named["part"]) <= int(named["parts"]) <= MOST_PARTS:
        return [path]
    return [path.with_name(f"{named['name']}-{place:05d}-of-{named['parts']}.gguf")
            for place in range(1, int(named["parts"]) + 1)]


def first_part(path: Path) -> Path:
    """The part that engines load, where a part was given and the first is beside it; else the file itself."""
    first = parts_at(path)[0]
    return first if first.is_file() else path


def open_parts(path: Path, stored: Callable[[Path], StoredFile] | None = None) -> list[GgufFile]:
    """A file, or all parts of the model that it is a part of, in order.

    `stored` gives what a part that is not on disk is read from. Raises CheckpointError where a part is missing or belongs to
    another model.
    """
    def opened(part: Path) -> GgufFile:
        return GgufFile.open(part, stored=None if stored is None else stored(part))

    given = opened(path)
    number, count = given.split
    if count == 1:
        return [given]
    paths = parts_at(path)
    if len(paths) != count or paths[number - 1] != path:
        raise CheckpointError(f"{path} is part {number} of {count} of a model, but is not named like one; name the parts "
                              f"NAME-00001-of-{count:05d}.gguf and so on")
    files = []
    for place, part in enumerate(paths, 1):
        if stored is None and not part.exists():
            raise CheckpointError(f"{part} is missing: the model is in {count} parts, which must be in one folder; download "
                                  "or copy it")
        files.append(given if place == number else opened(part))
        if files[-1].split != (place, count):
            raise CheckpointError(f"{part} says that it is part {files[-1].split[0]} of {files[-1].split[1]}; it belongs to "
                                  "another model")
    names = [name for file in files for name in file.tensors]
    expected = files[0].number("split.tensors.count", least=0)
    if len(set(names)) < len(names) or (expected is not None and expected != len(names)):
        raise CheckpointError(f"{path}: the {count} parts hold {len(names)} tensors, {len(set(names))} of them different, "
                              f"where {'others' if expected is None else expected} are expected; they do not belong "
                              "together")
    return files


def _from_hub(name: HubName) -> Path:
    """A file on the hub, with all its parts, in the cache of the hub's client."""
    parts = [one.as_posix() for one in parts_at(Path(name.file or ""))]
    if any(on_disk(name, one) is None for one in parts):
        say_whole(name)
    found = [asked(name, lambda one=one: client().hf_hub_download(  # type: ignore[misc]
        name.repository, one, revision=name.revision)) for one in parts]
    return Path(found[parts.index(name.file or "")])


def _in_ollama(name: str) -> Path:
    """The file of a model in Ollama's store, which is only read."""
    found = _NAME.fullmatch(name)
    if found is None or {"..", "."} & set(found.groups()):
        raise CheckpointError(f"{quoted(name)} is not a name of a model in Ollama; names are such as llama3.2:1b")
    host, space = found["host"], found["space"]
    if host is not None and space is None:
        host, space = None, host                    # one part before the model is its owner
    store = _store()
    manifest = store / "manifests" / (host or REGISTRY) / (space or NAMESPACE) / found["model"] / (found["tag"] or TAG)
    try:
        content = read_json(manifest, CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(f"Ollama has no model {quoted(name)} (looked for {manifest}); fetch it with `ollama pull "
                              f"{name}`, or set {MODELS} to the folder of its models") from None
    layers = content.get("layers") if isinstance(content, dict) else None
    kinds: dict[str, list[str]] = {}
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict):
            kinds.setdefault(str(layer.get("mediaType")), []).append(str(layer.get("digest")))
    models = kinds.get(MODEL_LAYER, [])
    digest = _DIGEST.fullmatch(models[0]) if len(models) == 1 else None
    if digest is None:
        raise CheckpointError(f"{manifest} does not name one file of weights; fetch the model again with `ollama pull "
                              f"{name}`")
    if ADAPTER_LAYER in kinds:
        raise CheckpointError(f"Ollama's {quoted(name)} adds an adapter to its weights, which is not read; give the name of "
                              "its base")
    blob = store / "blobs" / f"sha256-{digest[1]}"
    if not blob.is_file():
        raise CheckpointError(f"{blob} does not exist, which {manifest} names; fetch the model again with `ollama pull "
                              f"{name}`")
    return blob


def _store() -> Path:
    """The folder of Ollama's models: that of the environment, else the user's."""
    given = os.environ.get(MODELS)
    return Path(given) if given else Path.home() / ".ollama" / "models"
