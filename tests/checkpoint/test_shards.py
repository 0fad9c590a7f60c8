"""Safetensors files written in a stream and read by position, against the safetensors library; damage is said in words."""

from __future__ import annotations

import hashlib
import itertools
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsotsallm.checkpoint.shards import DTYPES, TensorRecord, group_by_size, read_header, sha256, write_shard
from tsotsallm.errors import CheckpointError


def tensors_of_every_type() -> dict[str, torch.Tensor]:
    """Random bits in every type, among them values that compare equal to nothing, and shapes with no or one element."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, dtype in DTYPES.items():
        bits = torch.randint(0, 2 if dtype == torch.bool else 256, (3, 5, dtype.itemsize), generator=generator,
                             dtype=torch.uint8)
        found[f"of.{name}"] = bits.view(dtype).squeeze(-1)
    return found | {"scalar": torch.tensor(2.5), "none": torch.empty(0, 7), "a name with spaces and é": torch.ones(1, 1, 1)}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors, path = tensors_of_every_type(), tmp_path / "one.safetensors"
    digest = write_shard(path, dict(tensors))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(same_bits(read[name], tensor) for name, tensor in tensors.items())
    assert digest == sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}        # without it transformers refuses the file
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors, path = tensors_of_every_type(), tmp_path / "one.safetensors"
    save_file(tensors, path, {"format": "pt", "note": "metadata is no tensor"})
    records = read_header(path)
    assert records.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(records[name].read(), tensor), name
        assert b"".join(records[name].chunks()) == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def test_tensors_in_any_layout_of_memory_and_stored_ones_are_written_alike(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    save_file({"stored": whole}, tmp_path / "before.safetensors")
    stored = read_header(tmp_path / "before.safetensors")["stored"]
    write_shard(tmp_path / "after.safetensors", {"z": whole.mT, "a": whole[:, ::2], "copied": stored})
    read = load_file(tmp_path / "after.safetensors")
    assert torch.equal(read["z"], whole.mT)
    assert torch.equal(read["a"], whole[:, ::2])
    assert torch.equal(read["copied"], whole)
    assert list(read_header(tmp_path / "after.safetensors")) == ["z", "a", "copied"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8])
def test_rows_are_those_of_the_whole_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"before": torch.ones(3, dtype=torch.uint8), "rows": torch.arange(7 * 2 * 3).view(7, 2, 3).to(dtype)}
    save_file(tensors, tmp_path / "one.safetensors")
    record = read_header(tmp_path / "one.safetensors")["rows"]
    for first, last in itertools.combinations_with_replacement(range(8), 2):
        assert torch.equal(record.read(first, last), tensors["rows"][first:last]), (first, last)
    assert torch.equal(record.read(5), tensors["rows"][5:])
    assert torch.equal(record.read(3, 100), tensors["rows"][3:])        # as slices end at the end


def test_a_file_that_became_shorter_since_it_was_opened_is_an_error_in_words(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"rows": torch.ones(4, 8)}, path)
    record = read_header(path)["rows"]
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="ends 40 bytes early"):
        record.read()
    with pytest.raises(CheckpointError, match="ends 40 bytes early"):
        list(record.chunks())
    with pytest.raises(CheckpointError, match="ends 8 bytes early"):
        record.read(2, 3)
    assert torch.equal(record.read(0, 2), torch.ones(2, 8))
    with pytest.raises(CheckpointError, match=f"is {whole - 40} bytes long but its header describes {whole}: it is trunc"):
        read_header(path)


def test_a_record_of_a_damaged_copy_is_not_copied_into_a_result(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"rows": torch.ones(4, 8)}, path)
    records = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends 1 bytes early"):
        write_shard(tmp_path / "two.safetensors", dict(records))


def test_any_cut_is_noticed_before_a_tensor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_header(path)
    path.write_bytes(content)
    assert set(read_header(path)) == {"a", "b"}


def test_a_record_keeps_to_its_own_bytes(tmp_path: Path) -> None:
    """Neighbours on both sides differ from it."""
    path = tmp_path / "raw"
    path.write_bytes(bytes(range(64)))
    record = TensorRecord(path, torch.uint8, (2, 4), 10, 8)
    assert record.read().tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert record.read(1, 2).tolist() == [[14, 15, 16, 17]]
    assert b"".join(record.chunks()) == bytes(range(10, 18))


def test_groups_are_as_full_as_the_order_of_files_allows(tmp_path: Path) -> None:
    rng = random.Random(0)
    for attempt in range(20):
        paths = []
        for number in range(rng.randint(0, 12)):
            paths.append(tmp_path / f"{attempt}-{number}")
            paths[-1].write_bytes(bytes(rng.choice([0, 1, 40, 50, 60, 100, 101, 250])))
        groups = group_by_size(paths, 100)
        assert [path for group in groups for path in group] == paths
        sizes = [sum(path.stat().st_size for path in group) for group in groups]
        assert all(group for group in groups)
        assert all(size <= 100 or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
        for size, after in zip(sizes, groups[1:], strict=False):
            assert size + after[0].stat().st_size > 100
