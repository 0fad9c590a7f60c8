"""The size of a GGUF file from shapes, grids, tokenizer and labels, before it is written: the file's, to the byte."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

import tsotsallm
from tests.conftest import FAMILIES, build
from tsotsallm.checkpoint.gguf_layout import (
    UNKNOWN_LABELS,
    Dense,
    Entry,
    Kind,
    Labels,
    Layout,
    TensorInfo,
    layout_of,
    vocabulary_entries,
)
from tsotsallm.checkpoint.gguf_vocabulary import read_vocabulary
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.compression import with_vocabulary
from tsotsallm.export.gguf import export_gguf
from tsotsallm.numerics.ggml import LAYOUTS, GgmlGrid
from tsotsallm.planning import whole_spec
from tsotsallm.recipe import Recipe
from tsotsallm.stages.neurons import Neurons

GRIDS = sorted(LAYOUTS)


def entries(checkpoint: Checkpoint) -> list[Entry]:
    return list(vocabulary_entries(read_vocabulary(checkpoint.codec)))


def all_on(spec: ModelSpec, grid: str, *, ends: bool) -> dict[str, str]:
    """The grid of every matrix where `grid` is asked for all."""
    fits = {f"{layer}.{name}": GgmlGrid(grid).fitting(shape[1]) for layer in range(spec.layers)
            for name, shape in linear_shapes(spec, layer).items()}
    if ends:
        fits |= dict.fromkeys(["model.embed_tokens", "lm_head"], GgmlGrid(grid).fitting(spec.hidden))
    return {key: one.type for key, one in fits.items() if one is not None}


def written(path: Path, folder: Path, dense: Dense = "f16", name: str = "it") -> int:
    """Bytes of the file of a checkpoint; the file goes again."""
    file = folder / "written.gguf"
    found = export_gguf(Checkpoint.open(path), file, dense=dense, name=name)
    assert found.bytes == file.stat().st_size
    file.unlink()
    return found.bytes


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_file_of_every_family(family: str, tied: bool, tmp_path: Path) -> None:
    model = build(tmp_path / "model", family, tie_word_embeddings=tied)
    checkpoint = Checkpoint.open(model)
    for dense in ("f32", "f16", "bf16"):
        for name in ("it", "a name with Ünïcödé"):
            layout = layout_of(checkpoint.spec, entries(checkpoint), Labels.of(checkpoint, name), dense=dense)
            assert layout.total_bytes == written(model, tmp_path, dense, name)


@pytest.mark.parametrize("family", ["llama3", *(pytest.param(family, marks=pytest.mark.slow) for family in sorted(
    FAMILIES) if family != "llama3")])
def test_grids_are_known_before_anything_is_made(family: str, tmp_path: Path) -> None:
    """All grids, embeddings on them or not, and a mixture, from the shape of the source alone."""
    model = build(tmp_path / "model", family, hidden_size=256, intermediate_size=288, num_hidden_layers=4)
    source = Checkpoint.open(model)
    spec = whole_spec(source)

    def check(recipe: list[dict[str, Any]], grids: dict[str, str]) -> None:
        tsotsallm.compress(model, recipe, tmp_path / "out")
        labels = Labels("it", Recipe.parse(recipe).resolved(spec).plain(), "model")
        assert layout_of(spec, entries(source), labels, grids).total_bytes == written(tmp_path / "out", tmp_path)
        shutil.rmtree(tmp_path / "out")

    for place, grid in enumerate(GRIDS):
        ends = {"ends": grid} if place % 2 else {}
        check([{"quantize": {"method": "rtn", "grid": grid} | ends}], all_on(spec, grid, ends=bool(ends)))
    names = [*all_on(spec, "q8_0", ends=True)][:None if not spec.tied else -1]
    mixture = {key: ("q8_0", "q4_0", "f16", "q5_1")[place % 4] for place, key in enumerate(names)}
    check([{"quantize": {"method": "rtn", "grids": mixture}}], mixture)


def test_what_is_cut_is_known_before_it_is_made(tmp_path: Path) -> None:
    """Fewer tokens, layers and neurons together: the vocabulary is cut in memory only."""
    keep = tmp_path / "keep.txt"
    keep.write_text("The river that runs through the old town is wide.", "utf-8")
    source = Checkpoint.open("embedded")
    stages: list[dict[str, Any]] = [{"vocabulary": {"keep": [str(keep)]}}, {"layers": {"order": [0, 13]}},
                                    {"neurons": {"feed_forward": 1 / 3}}]
    cut = with_vocabulary(source, Recipe.parse(stages))
    spec = Neurons(feed_forward=1 / 3).spec_after(whole_spec(cut).with_layers(2))
    recipe = [*stages, {"quantize": {"grid": "q4_k", "ends": "q6_k"}}]
    tsotsallm.compress("embedded", recipe, tmp_path / "out", windows=2, window=64)
    plain = Recipe.parse(recipe).resolved(whole_spec(cut)).plain()
    grids = all_on(spec, "q4_k", ends=False) | {"model.embed_tokens": "q6_k"}
    layout = layout_of(spec, entries(cut), Labels("it", plain, "embedded"), grids)
    assert layout.total_bytes == written(tmp_path / "out", tmp_path)
    unknown = layout_of(spec, entries(cut), UNKNOWN_LABELS, grids)
    assert layout.total_bytes < unknown.total_bytes < layout.total_bytes + (4 << 10)


def test_integer_grids_as_the_types_that_hold_them(tiny: Path, text: Path, tmp_path: Path) -> None:
    for recipe, grid in (("gptq:4:32", "q4_0"), ("rtn:8:32", "q8_0"), ("rtn:3:16", "f16")):
        tsotsallm.compress(tiny, recipe, tmp_path / "out", calibration=text, windows=2, window=32)
        checkpoint = Checkpoint.open(tmp_path / "out")
        types = dict.fromkeys(all_on(checkpoint.spec, "q8_0", ends=False), grid)
        layout = layout_of(checkpoint.spec, entries(checkpoint), Labels.of(checkpoint, "it"), types)
        assert layout.total_bytes == written(tmp_path / "out", tmp_path)
        shutil.rmtree(tmp_path / "out")


def test_sentencepiece(stories: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(stories)
    layout = layout_of(checkpoint.spec, entries(checkpoint), Labels("it"))
    assert layout.total_bytes == written(stories, tmp_path)


def test_the_header_is_what_ggufs_own_writer_writes(tmp_path: Path) -> None:
    found: list[tuple[str, Kind, Any]] = [
        ("general.architecture", "string", "llama"), ("a.text", "string", "漢字 and words"), ("a.number", "u32", 7),
        ("a.share", "f32", 0.1), ("a.truth", "bool", True), ("some.texts", "string", ["a", "", "ñ"]),
        ("some.numbers", "i32", (3, -4)), ("some.shares", "f32", [0.5, -1.0])]
    tensors = (TensorInfo("one", (3, 64), "q4_0"), TensorInfo("two", (5,), "f32"), TensorInfo("three", (2, 3), "bf16"))
    kinds = {"string": gguf.GGUFValueType.STRING, "u32": gguf.GGUFValueType.UINT32, "f32": gguf.GGUFValueType.FLOAT32,
             "bool": gguf.GGUFValueType.BOOL, "i32": gguf.GGUFValueType.INT32}
    writer = gguf.GGUFWriter(tmp_path / "theirs", "llama")
    for key, kind, value in found[1:]:
        if isinstance(value, (list, tuple)):
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, kinds[kind])
        else:
            writer.add_key_value(key, value, kinds[kind])
    for one in tensors:
        writer.add_tensor_info(one.name, one.shape, None, one.bytes, raw_dtype=getattr(gguf.GGMLQuantizationType,
                                                                                       one.type.upper()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    ours = Layout(tuple(Entry(*one) for one in found), tensors).head
    theirs = (tmp_path / "theirs").read_bytes()
    assert ours.startswith(theirs)
    assert len(ours) - len(theirs) < 32
