"""Integer grids in GGUF: the codes and scales of the checkpoint, read back by ggml's own code and by another library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import tsotsallm
from tests.cli.running import tsotsallm as command
from tests.conftest import build
from tests.export.test_gguf import IDS, compare
from tests.llama import dequantise
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.errors import ExportError
from tsotsallm.export.blocks import TYPES, blocks_of, held, not_held, packing_of
from tsotsallm.export.gguf import export_gguf
from tsotsallm.numerics.ggml import GgmlGrid, encode
from tsotsallm.numerics.grids import IntegerGrid, NormalFloatGrid, Quantised

SMALLEST = {(2, True): "q4_0", (3, True): "q4_0", (4, True): "q4_0", (5, True): "q5_0", (6, True): "q8_0", (7, True): "q8_0",
            (8, True): "q8_0", (2, False): "q4_0", (3, False): "q4_0", (4, False): "q5_0", (5, False): "q8_0",
            (6, False): "q8_0", (7, False): "q8_0"}
"""Type by (bits, symmetric) where a group is no multiple of 256."""
OF_256 = {(2, True): "q2_k", (3, True): "q3_k", (4, True): "q4_0", (5, True): "q5_0", (6, True): "q6_k", (8, True): "q8_0",
          (2, False): "q2_k", (3, False): "q4_0", (4, False): "q4_k", (5, False): "q5_k", (6, False): "q8_0"}
"""The same where it is one."""


def every_code(grid: IntegerGrid, rows: int, columns: int, storage: torch.dtype, seed: int = 0) -> Quantised:
    """A matrix that holds all codes of its grid, under scales of all sizes that weights have."""
    torch.manual_seed(seed)
    groups = columns // (grid.group or columns)
    codes = torch.randint(grid.lowest, grid.highest + 1, (rows, columns), dtype=torch.int8)
    codes[0, :1 << grid.bits] = torch.arange(grid.lowest, grid.highest + 1)[:columns]
    scales = (2.0 ** (-9 * torch.rand(rows, groups) - 1)).to(torch.bfloat16 if storage == torch.bfloat16 else torch.float16)
    zeros = None if grid.symmetric else torch.randint(grid.lowest, grid.highest + 1, (rows, groups), dtype=torch.int8)
    if zeros is not None:
        zeros.clamp_(-64, 62)
        scales[0, 0], zeros[0, 0] = 255 * 2.0 ** -12, min(grid.highest, 62)      # their product has too many digits for q4_1
    return Quantised(codes, scales.to(storage), zeros, grid)


def exact(matrix: Quantised) -> torch.Tensor:
    """Scale times (code − zero point) without rounding, float32."""
    groups = matrix.scales.shape[1]
    parts = matrix.codes.double().view(len(matrix.codes), groups, -1)
    zeros = 0.0 if matrix.zero_points is None else matrix.zero_points.double()[:, :, None]
    return ((parts - zeros) * matrix.scales.double()[:, :, None]).view(matrix.codes.shape).float()


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("group", "columns", "expected"), [(32, 96, SMALLEST), (64, 192, SMALLEST), (96, 192, SMALLEST),
                                                            (None, 160, SMALLEST), (256, 512, OF_256), (None, 512, OF_256)])
def test_every_code_of_every_grid_is_read_back(group: int | None, columns: int, expected: dict[tuple[int, bool], str],
                                               storage: torch.dtype) -> None:
    for (bits, symmetric), name in expected.items():
        matrix = every_code(IntegerGrid(bits, group, symmetric), 8, columns, storage)
        found = packing_of(matrix.grid, columns, matrix.scales, matrix.zero_points)
        assert (found.grid, found.change) == (GgmlGrid(name), 0), (bits, symmetric)
        data = encode(blocks_of(matrix, GgmlGrid(name)))
        by_ggml = dequantise(name, data, columns)
        by_library = gguf.dequantize(data, gguf.GGMLQuantizationType[name.upper()]).reshape(8, columns)
        assert np.array_equal(by_ggml, exact(matrix).numpy())
        assert np.array_equal(by_library, by_ggml)
        off = np.abs(by_ggml - matrix.dequantise().numpy()) / np.maximum(np.abs(by_ggml), 1e-30)
        assert off.max() <= (0 if storage == torch.float32 else torch.finfo(storage).eps / 2)
        rounded = torch.from_numpy(by_ggml).to(storage).float()         # as readers of the checkpoint round
        assert torch.equal(rounded, matrix.dequantise())


def test_minima_that_half_precision_holds_become_q4_1() -> None:
    """Scales that are powers of two give such minima; with q5_0 the file would be larger."""
    grid = IntegerGrid(4, 32, symmetric=False)
    matrix = every_code(grid, 4, 64, torch.bfloat16)
    powers = 2.0 ** matrix.scales.float().log2().round()
    matrix = Quantised(matrix.codes, powers.to(torch.bfloat16), matrix.zero_points, grid)
    assert packing_of(grid, 64, matrix.scales, matrix.zero_points).grid == GgmlGrid("q4_1")
    data = encode(blocks_of(matrix, GgmlGrid("q4_1")))
    assert np.array_equal(dequantise("q4_1", data, 64), exact(matrix).numpy())
    assert np.array_equal(gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_1), exact(matrix).numpy())
    assert GgmlGrid("q4_1").bits_per_weight < GgmlGrid("q5_0").bits_per_weight


def test_the_smallest_type_is_tried_first() -> None:
    bits = [GgmlGrid(name).bits_per_weight for name in TYPES]
    assert bits == sorted(bits)


def test_zeros_stay_zeros() -> None:
    """Pruned weights: code 0 of symmetric grids, the zero point of the others, everywhere exactly 0."""
    for symmetric in (True, False):
        for group in (32, 256):
            for bits in (2, 3, 4, 5, 6):
                matrix = every_code(IntegerGrid(bits, group, symmetric), 4, 256, torch.bfloat16)
                zero = torch.zeros(4, 256 // group) if matrix.zero_points is None else matrix.zero_points
                matrix.codes.copy_(torch.where(torch.rand(4, 256) < 0.5, zero.repeat_interleave(group, 1), matrix.codes))
                target = packing_of(matrix.grid, 256, matrix.scales, matrix.zero_points).grid
                assert target is not None
                values = dequantise(target.type, encode(blocks_of(matrix, target)), 256)
                assert np.array_equal(values == 0, (exact(matrix) == 0).numpy())
                assert (values == 0).sum() > 400


def test_what_does_not_fit_says_why() -> None:
    scales, zeros = torch.full((2, 2), 0.01, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.int8)

    def why(grid: IntegerGrid, columns: int, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> str:
        found = packing_of(grid, columns, scales, zeros)
        assert found.grid is None
        return not_held([found])

    assert "nf4" in why(NormalFloatGrid(), 128, scales)
    assert "one scale for 48 columns, which blocks of 32 do not divide" in why(IntegerGrid(4, 48), 96, scales)
    assert "one scale for 16 columns" in why(IntegerGrid(4, 16), 32, scales)
    assert "one scale for 172 columns" in why(IntegerGrid(4, None), 172, scales[:, :1])
    share = 1 - float(torch.tensor(0.01).half()) / float(torch.tensor(0.01))
    assert f"up to {abs(share):.2g} of themselves" in why(IntegerGrid(4, 64), 128, torch.full((2, 2), 0.01))
    assert "infinite" in why(IntegerGrid(4, 64), 128, torch.full((2, 2), 1e6, dtype=torch.bfloat16))
    assert "more than 8 bits" in why(IntegerGrid(8, 64, symmetric=False), 128, scales, zeros + 5)
    assert packing_of(IntegerGrid(8, 64, symmetric=False), 128, scales, zeros).grid == GgmlGrid("q8_0")
    assert not_held([packing_of(IntegerGrid(4, 64), 128, scales, None)]) == ""


def test_scales_of_dead_groups_lose_digits_that_dense_weights_lose_too() -> None:
    """A group of tiny weights does not cost the whole matrix its small form, and the note says what it changes."""
    grid = IntegerGrid(4, 32)
    scales = torch.tensor([[0.01, 1.3e-7], [0.02, 1e-30]], dtype=torch.bfloat16)
    matrix = Quantised(every_code(grid, 2, 64, torch.bfloat16).codes, scales, None, grid)
    found = packing_of(grid, 64, scales, None)
    assert found.grid == GgmlGrid("q4_0")
    values = dequantise("q4_0", encode(blocks_of(matrix, GgmlGrid("q4_0"))), 64)
    most = np.abs(values - exact(matrix).numpy()).max()
    assert 0 < most <= found.change <= 8 * 2.0 ** -25
    assert f"changes values by at most {found.change:.1g}" in held([found], torch.bfloat16)[0]


# -- files ------------------------------------------------------------------------------------------------------------


def requantised(directory: Path, grid: IntegerGrid, storage: torch.dtype, family: str = "llama3", **widths: Any) -> Path:
    """A small model whose linears lie on a grid, as `compress` with rtn writes it."""
    source = build(directory / "source", family, dtype=storage, **widths)
    recipe = {"quantize": {"method": "rtn", "grid": grid.plain()["type"], "bits": grid.bits,
                           "group": grid.group or "channel", "symmetric": grid.symmetric}}
    tsotsallm.compress(source, json.dumps([recipe]), directory / "out")
    return directory / "out"


def tensors_of(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize(("family", "bits", "symmetric", "group", "name"), [
    ("llama3", 4, True, 32, "Q4_0"), ("qwen2", 5, True, 32, "Q5_0"), ("qwen3", 8, True, None, "Q8_0"),
    ("smollm3", 4, False, 32, "Q4_1 Q5_0"), ("mistral", 3, True, None, "Q4_0"), ("llama2", 2, False, 32, "Q4_0")])
def test_a_result_keeps_its_codes_in_gguf(tmp_path: Path, family: str, bits: int, symmetric: bool, group: int | None,
                                          name: str) -> None:
    out = requantised(tmp_path, IntegerGrid(bits, group, symmetric), torch.bfloat16, family)
    checkpoint, file = Checkpoint.open(out), tmp_path / "model.gguf"
    found = export_gguf(checkpoint, file)
    for one in name.split():
        told = (f"linears of {bits} bits are packed as {one.lower()}, with the same codes and the same scales; values are "
                "code times scale, which readers of the checkpoint round to bfloat16, by at most 0.39%")
        assert any(told in note for note in found.notes)
    assert any("bits need: q2_k and q3_k" in note for note in found.notes) == (bits < 4)
    tensors = tensors_of(file)
    spec = checkpoint.spec
    for index in range(spec.layers):
        for module in linear_shapes(spec, index):
            tensor = tensors[f"blk.{index}.{spec.traits.gguf.name_of(module)}.weight"]
            assert tensor.tensor_type.name in name.split()
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            kept = checkpoint.tensor(f"model.layers.{index}.{module}.weight").reshape(values.shape)
            heads = {"self_attn.q_proj": spec.heads, "self_attn.k_proj": spec.kv_heads}.get(module)
            if heads is not None and spec.family in ("llama", "mistral", "smollm3"):        # neighbours turn together there
                kept = kept.view(heads, 2, spec.head_dim // 2, -1).transpose(1, 2).reshape(values.shape)
            assert torch.equal(values.to(torch.bfloat16).float(), kept)
    assert compare(out, file, IDS, 1.0) < 0.01


def test_a_file_is_smaller_than_its_checkpoint_or_refused(tmp_path: Path) -> None:
    grid, file = NormalFloatGrid(4, 32), tmp_path / "model.gguf"
    out = requantised(tmp_path, grid, torch.bfloat16, hidden_size=128, intermediate_size=256, head_dim=32)
    with pytest.raises(ExportError, match=r"nf4: written as f16 they make model\.gguf .* large, beside .*--dense f16"):
        export_gguf(Checkpoint.open(out), file)
    assert not list(tmp_path.glob("model*"))
    found = export_gguf(Checkpoint.open(out), file, dense="f16")
    assert {tensor.tensor_type.name for tensor in tensors_of(file).values()} == {"F16", "F32"}
    assert any("nf4: they are written as f16" in note for note in found.notes)


def test_float32_scales_are_not_rounded_silently(tmp_path: Path) -> None:
    checkpoint, file = Checkpoint.open(requantised(tmp_path, IntegerGrid(4, 32), torch.float32)), tmp_path / "model.gguf"
    with pytest.raises(ExportError, match=r"half precision does not hold \(it would change values by up to 0\.000"):
        export_gguf(checkpoint, file)
    export_gguf(checkpoint, file, dense="f16")
    assert {tensor.tensor_type.name for tensor in tensors_of(file).values()} == {"F16", "F32"}


def test_dense_models_are_written_as_ever(tmp_path: Path) -> None:
    """Norms in f32 make a file larger than a 16-bit checkpoint, which is nobody's mistake."""
    source = build(tmp_path / "source", "llama3", dtype=torch.bfloat16)
    found = export_gguf(Checkpoint.open(source), tmp_path / "model.gguf")
    assert set(found.bytes_by_type) == {"f16", "f32"}
    assert not any("linears" in note for note in found.notes)


def test_a_layer_that_runs_twice_and_a_correction_beside_it(tmp_path: Path, text: Path) -> None:
    source = build(tmp_path / "source", "llama3", dtype=torch.bfloat16)
    out = tmp_path / "out"
    recipe = ("[{layers: {order: [0, 1, 1, 3], shared: true}}, {quantize: {method: rtn, bits: 4, group: 32}}, "
              "{compensate: {rank: 8}}]")
    tsotsallm.compress(source, recipe, out, calibration=text, windows=4, window=64)
    found = export_gguf(Checkpoint.open(out), tmp_path / "model.gguf")
    assert found.adapter is not None
    tensors = tensors_of(tmp_path / "model.gguf")
    assert (tensors["blk.1.ffn_up.weight"].data == tensors["blk.2.ffn_up.weight"].data).all()
    assert compare(out, tmp_path / "model.gguf", IDS, 1.0, adapter=found.adapter) < 0.01


@pytest.mark.parametrize("model", ["small", pytest.param("embedded", marks=pytest.mark.slow)])
def test_compress_then_export_makes_a_small_file(tmp_path: Path, model: str) -> None:
    """What a newcomer types: 4 bits by groups, then one file."""
    group, source = (64, model) if model == "embedded" else (32, str(build(tmp_path / "s", "llama2", dtype=torch.bfloat16)))
    tsotsallm.compress(source, f"rtn:4:{group}", tmp_path / "out")
    found = command("export", tmp_path / "out", "--gguf", tmp_path / "model.gguf", "--json")
    answer, spec = json.loads(found.stdout), Checkpoint.open(source).spec
    assert answer["bytes_by_type"]["q4_0"] == sum(rows * columns // 32 * 18 for index in range(spec.layers)
                                                  for rows, columns in linear_shapes(spec, index).values())
    assert answer["verified"]["mean"] < 0.1
