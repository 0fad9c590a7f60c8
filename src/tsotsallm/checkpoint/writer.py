"""Writes a result in a stream: one part per layer, joined into shards, with the final name only when complete."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from tsotsallm.checkpoint.adapter import BASE, CONFIG, FOLDER, PEFT, PREFIX, RIGHT, WEIGHTS, adapter_config, is_adapter
from tsotsallm.checkpoint.packing import quantization_config
from tsotsallm.checkpoint.reader import VOCABULARY, Checkpoint, layer_prefix
from tsotsallm.checkpoint.shards import Piece, group_by_size, read_header, sync, write_shard
from tsotsallm.checkpoint.spec import CONTAINER
from tsotsallm.checkpoint.weights import INDEX, NAMED, SINGLE
from tsotsallm.errors import CheckpointError
from tsotsallm.numerics.grids import Grid

SHARD_BYTES = 2_000_000_000


def partial_path(final: Path) -> Path:
    """The directory of a result until it is complete: its final name with `.partial`."""
    return final.with_name(final.name + ".partial")


def write_json(path: Path, content: object) -> None:
    """Write JSON through a sibling file, flushed and renamed, so that it is never seen half written."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        # halves of surrogate pairs, which UTF-8 cannot hold, stand for bytes in file names that are not text
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8", "replace"))
        sync(file)
    temporary.replace(path)


class Writer:
    """Writes parts into `directory`; `finish` joins them and adds config, tokenizer and the rest."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.own_container = False
        directory.mkdir(parents=True, exist_ok=True)

    def part(self, index: int) -> Path:
        """The file of part `index`: a layer, or after the last layer the rest of the model."""
        return self.directory / f"part-{index:05d}.safetensors"

    def write_layer(self, index: int, pieces: dict[str, Piece]) -> str:
        """Write layer `index` from tensors by name inside the layer; returns the part's sha256."""
        prefix = layer_prefix(index)
        return write_shard(self.part(index), {prefix + name: pieces[name] for name in sorted(pieces)})

    def write_ends(self, pieces: dict[str, Piece], layers: int) -> str:
        """Write everything outside the layers as the last part, after `layers` others; returns its sha256."""
        return write_shard(self.part(layers), {name: pieces[name] for name in sorted(pieces)})

    def finish(self, source: Checkpoint, config: Mapping[str, object], grids: dict[str, Grid | None],
               layer_order: list[int] | None, kept: list[int], layers: int) -> None:
        """Join the parts into shards of at most 2 GB and write config, index and the source's other files.

        `grids` are those of the linears by full module name; `kept` are the written layers in the order of their final
        numbers; part `layers` holds everything outside the layers. The parts stay until `remove_parts`, so that a kill in
        between loses nothing. Raises CheckpointError where a part is missing.
        """
        paths = {self.part(index): (layer_prefix(index), layer_prefix(number)) for number, index in enumerate(kept)}
        paths[self.part(layers)] = ("", "")
        if missing := [path.name for path in paths if not path.exists()]:
            raise CheckpointError(f"{self.directory} lost {missing[0]}; delete the directory and start again")
        groups = group_by_size(paths, SHARD_BYTES)
        weight_map: dict[str, str] = {}
        beside: dict[str, Piece] = {}
        total = 0
        for number, group in enumerate(groups, 1):
            name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            records: dict[str, Piece] = {}
            for path in group:
                was, now = paths[path]
                renamed = {now + tensor.removeprefix(was): record for tensor, record in read_header(path).items()}
                beside |= {name: record for name, record in renamed.items() if name.endswith(PEFT)}
                records |= {name: record for name, record in renamed.items() if not name.endswith(PEFT)}
            write_shard(self.directory / name, records)
            weight_map |= dict.fromkeys(records, name)
            total += sum(record.size for record in read_header(self.directory / name).values())
        if len(groups) > 1:
            write_json(self.directory / INDEX,
                       {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        if beside:
            self._write_adapter(beside, source)
        written = {key: value for key, value in config.items() if key != NAMED}     # the files have other names now
        if any(grid is not None for grid in grids.values()):
            written["quantization_config"] = quantization_config(grids)
        own_grids = any(grid is not None and not grid.plain_hf for grid in grids.values())
        coded_adapter = any(is_adapter(name) for name in weight_map)
        self.own_container = layer_order is not None or own_grids or coded_adapter
        if self.own_container:
            layer_order = list(range(len(kept))) if layer_order is None else layer_order
            written = {"model_type": CONTAINER, "layer_order": layer_order, "model": written}
        write_json(self.directory / "config.json", written)
        source.copy_kept_files(self.directory)
        if source.kept_tokens is not None:
            write_json(self.directory / VOCABULARY, {"kept": source.kept_tokens})

    def _write_adapter(self, pieces: dict[str, Piece], source: Checkpoint) -> None:
        """Write the low-rank corrections as a PEFT adapter in a folder of the base."""
        folder = self.directory / FOLDER
        folder.mkdir(exist_ok=True)
        write_shard(folder / WEIGHTS, {PREFIX + name: pieces[name] for name in sorted(pieces)})
        ranks = {name.removesuffix(f".{RIGHT}"): piece.shape[0] for name, piece in pieces.items() if name.endswith(RIGHT)}
        write_json(folder / CONFIG, adapter_config(ranks, BASE))

    def remove_parts(self) -> None:
        """Delete the parts, after `finish` joined them."""
        for path in self.directory.glob("part-*.safetensors"):
            path.unlink()


def publish(partial: Path, final: Path) -> None:
    """Flush a complete directory to disk and give it its final name."""
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
    _sync_directory(partial)
    partial.rename(final)
    _sync_directory(final.parent)


def _sync_directory(path: Path) -> None:
    if os.name == "posix":              # Windows has no handles of directories to flush
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
