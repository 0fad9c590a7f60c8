"""Headers of safetensors files from strangers: types by name, offsets and shapes checked, weights only in floating point."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tsotsallm
from tests.checkpoint.damage import Header, refused, with_header
from tests.conftest import build
from tsotsallm.checkpoint.shards import read_header
from tsotsallm.checkpoint.weights import SINGLE
from tsotsallm.errors import CheckpointError

Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plain") / "plain", "llama2", dtype=torch.float16)


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


# as safetensors 0.8 names them, and one that nobody knows
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2",
                                   "U16", "U32", "U64", "C64", "BF8", "f16", "", None, 7, ["F16"], {"F16": 1}, "x" * 5000])
def test_a_type_that_is_not_read_is_named(model: Path, dtype: object) -> None:
    def change(header: Header) -> None:
        header[Q]["dtype"] = dtype
    with_header(model / SINGLE, change)
    message = refused(model, "is stored in .*, which is not read; start from a checkpoint in 16 or 32 bits")
    assert Q in message
    assert repr(dtype)[:60] in message
    assert "download" not in message


def test_real_fp8_weights_are_named(model: Path) -> None:
    tensors = load_file(model / SINGLE)
    save_file(tensors | {Q: tensors[Q].to(torch.float8_e4m3fn)}, model / SINGLE)
    refused(model, "is stored in 'F8_E4M3', which is not read")


@pytest.mark.parametrize("name", [Q, NORM, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
                                  "model.layers.3.mlp.down_proj.weight"])
@pytest.mark.parametrize("dtype", ["I16", "I8", "U8", "BOOL", "I32"])
def test_integers_are_no_weights(model: Path, text: Path, tmp_path: Path, name: str, dtype: str) -> None:
    """Re-typed in the header, shape and bytes kept alike where the size of an element allows it."""
    width = {"I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "I32": 4}[dtype]
    tensors = load_file(model / SINGLE)
    kinds = {"I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "I32": torch.int32}
    if width == 2:
        def change(header: Header) -> None:
            header[name]["dtype"] = dtype
        with_header(model / SINGLE, change)
    else:
        save_file(tensors | {name: tensors[name].to(kinds[dtype])}, model / SINGLE)
    message = refused(model, f"is stored in {dtype}, which is not a type of weights")
    assert name in message
    if name == Q:
        verbs: list[Callable[[], object]] = [
            lambda: tsotsallm.plan(model, "rtn:4:32", tmp_path / "out"), lambda: tsotsallm.load(model),
            lambda: tsotsallm.compress(model, "rtn:4:32", tmp_path / "out"),
            lambda: tsotsallm.evaluate(model, text, context=48, limit=2),
            lambda: tsotsallm.to_gguf(model, tmp_path / "out.gguf")]
        for verb in verbs:
            with pytest.raises(CheckpointError, match="not a type of weights"):
                verb()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_integers_are_no_biases(tmp_path: Path) -> None:
    path, bias = build(tmp_path / "qwen", "qwen2"), "model.layers.0.self_attn.k_proj.bias"
    tensors = load_file(path / SINGLE)
    save_file(tensors | {bias: tensors[bias].to(torch.int64)}, path / SINGLE)
    refused(path, f"{bias} is stored in I64")


def test_packed_codes_stay_integers_and_their_scales_do_not(tmp_path: Path) -> None:
    path = build(tmp_path / "plain", "llama2")
    tsotsallm.compress(path, "rtn:4:32", tmp_path / "packed")
    packed = tmp_path / "packed"
    assert tsotsallm.inspect(packed).bits_per_linear_weight < 6
    module, tensors = Q.removesuffix(".weight"), load_file(packed / SINGLE)
    shape = tensors[f"{module}.weight_shape"]
    wrong = {"weight_packed": tensors[f"{module}.weight_packed"].to(torch.int64),
             "weight_scale": tensors[f"{module}.weight_scale"].to(torch.int16),
             "weight_shape": torch.ones(3, dtype=torch.int64)}
    for name, tensor in wrong.items():
        save_file(tensors | {f"{module}.{name}": tensor}, packed / SINGLE)
        refused(packed, "packed as|not two numbers")
    for numbers in ([-64, 64], [0, 0], [2**31, 2**31], [64, 65], [2**62, 64]):
        save_file(tensors | {f"{module}.weight_shape": torch.tensor(numbers, dtype=shape.dtype)}, packed / SINGLE)
        refused(packed, "packed as")
    save_file(tensors | {f"{module}.weight_shape": torch.zeros(2)}, packed / SINGLE)
    refused(packed, "F32, not two numbers")


@pytest.mark.parametrize(("suffix", "method"), [("qweight", "GPTQ or AWQ"), ("weight.absmax", "bitsandbytes"),
                                                ("SCB", "bitsandbytes"), ("weight_scale_inv", "FP8"), ("W_q", "HQQ")])
def test_parts_of_other_methods_are_named_whatever_the_config_says(model: Path, suffix: str, method: str) -> None:
    tensors = load_file(model / SINGLE)
    old = tensors.pop(Q)
    save_file(tensors | {Q.removesuffix("weight") + suffix: old.to(torch.uint8)}, model / SINGLE)
    refused(model, f"part of a weight that .*{method}.* packed, which is not read")


@pytest.mark.parametrize("section", [
    {"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}, {}, [], "rubbish", 4, True, {"quant_method": None},
    {"quant_method": "compressed-tensors"}, {"quant_method": "x" * 10_000, "format": {"a": ["b"] * 100}},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": "all"},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": None}},
    *({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": {
        "targets": targets, "weights": {"type": "int", "num_bits": bits, "strategy": "group", "group_size": 32} | more}}}
      for targets, bits, more in [(["re:("], 4, {}), ([7], 4, {}), (["re:(a+)+$"], 4, {}),
                                  (["re:" + ".*" * 30 + "x"], 4, {}),
                                  (["re:" + "a?" * 30], 4, {}), ("Linear", 4, {}), (["Linear"], -4, {}),
                                  (["Linear"], 10**9, {}), (["Linear"], True, {}), (["Linear"], 4, {"symmetric": "false"}),
                                  (["Linear"], 4, {"group_size": 0}), (["Linear"], 4, {"type": ["int"]})]),
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {},
     "transform_config": {"a": 1}}])
def test_rubbish_as_quantisation_is_one_line(model: Path, section: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    refused(model, "quantised.*; start from the 16-bit checkpoint|quantised.*16-bit")


def entry(dtype: str, shape: list[Any], first: Any, last: Any) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


BAD: dict[str, tuple[Callable[[Header], object], str]] = {
    "listed twice": (lambda header: json.dumps(header)[:-1] + f', "{Q}": {json.dumps(header[Q])}}}',
                     f"'{Q}' occurs twice"),
    "a field twice": (lambda header: json.dumps(header).replace('"dtype":', '"dtype": "I8", "dtype":', 1), "'dtype' occurs"),
    "overlapping": (lambda header: header[Q].update(data_offsets=header[Q.replace("1", "0")]["data_offsets"]), "overlap"),
    "negative offsets": (lambda header: header.update({"a": entry("F16", [4], -8, 0)}), "has offsets"),
    "huge offsets": (lambda header: header.update({"a": entry("F16", [4], 2**62, 2**62 + 8)}), "truncated"),
    "offsets beyond 64 bits": (lambda header: header.update({"a": entry("F16", [4], 10**4000, 10**4000 + 8)}),
                               "has offsets"),
    "offsets that fall": (lambda header: header.update({"a": entry("F16", [4], 8, 0)}), "claims -8 bytes"),
    "offsets of text": (lambda header: header.update({"a": entry("F16", [4], "0", "8")}), "has offsets"),
    "offsets of truth": (lambda header: header.update({"a": entry("U8", [1], False, True)}), "has offsets"),
    "three offsets": (lambda header: header[Q]["data_offsets"].append(9), "has offsets"),
    "no offsets": (lambda header: header[Q].pop("data_offsets"), "has offsets None"),
    "a shape of text": (lambda header: header.update({"a": entry("F16", "44", 0, 8)}), "shape '44'"),
    "a negative shape": (lambda header: header.update({"a": entry("F16", [-2, -2], 0, 8)}), "has offsets"),
    "a shape of fractions": (lambda header: header.update({"a": entry("F16", [4.0], 0, 8)}), "has offsets"),
    "a huge shape": (lambda header: header.update({"a": entry("F16", [2**62, 2**62], 0, 8)}), "claims 8 bytes"),
    "a shape without end": (lambda header: header.update({"a": entry("F16", [1] * 100_000, 0, 2)}), "has offsets"),
    "an entry of text": (lambda header: header.update({"a": "F16"}), "has offsets None"),
    "no object": (lambda _: "[]", "not a JSON object"),
    "a number": (lambda _: "7", "not a JSON object"),
    "nested without end": (lambda _: "[" * 100_000, "too deeply"),
    "metadata nested without end": (lambda header: json.dumps(header | {"__metadata__": 0})[:-2] + '{"a":' * 900 + "1" +
                                    "}" * 901, "too deeply"),
    "half a surrogate": (lambda header: json.dumps(header | {"\ud800": header[Q]}), "surrogate"),
    "a zero size for weights": (lambda header: header.update({Q: entry("F16", [0, 64], 0, 0)}), r"has shape \[0, 64\]"),
    "a scalar for weights": (lambda header: header.update({Q: entry("F16", [], 0, 2)}), "overlap"),
    "a name with lines": (lambda header: header.update({"model.layers.0.a\nb\x1b[31m": header.pop(Q)}), "needs tensor"),
    "a name without end": (lambda header: header.update({"model.layers.0." + "x" * 100_000: header.pop(Q)}),
                           r"needs tensor|is not part of a llama layer"),
    "a layer of 999 digits": (lambda header: header.update({f"model.layers.{'9' * 999}.a": header.pop(Q)}), "needs tensor"),
    "a layer of 8 digits": (lambda header: header.update({f"model.layers.{'9' * 8}.a": header.pop(NORM)}), "shards hold"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_header_is_one_line(model: Path, case: str) -> None:
    change, match = BAD[case]
    with_header(model / SINGLE, change)
    refused(model, match)


def test_an_unknown_tensor_of_a_layer_is_quoted_on_one_line(model: Path) -> None:
    def change(header: Header) -> None:
        header["model.layers.0.self_attn.\x1b[31m\u202e" + "x" * 1000] = entry("F16", [0], 0, 0)
    with_header(model / SINGLE, change)
    refused(model, "is not part of a llama layer")


def test_zero_sized_tensors_elsewhere_are_read(model: Path) -> None:
    expected = tsotsallm.inspect(model).parameters
    with_header(model / SINGLE, lambda header: header.update({"empty": entry("F16", [0, 7], 0, 0)}))
    assert tsotsallm.inspect(model).parameters == expected


@pytest.mark.parametrize(("content", "match"), [
    (b"", "not a safetensors file"), (b"1234567", "not a safetensors file"), (b"\0" * 8, "not valid JSON"),
    (b"\xff" * 8, "not a safetensors file"), (b"\xff" * 100, "not a safetensors file"),
    ((2).to_bytes(8, "little") + b"\xff\xfe", "not UTF-8"), ((1).to_bytes(8, "little") + b"{", "not valid JSON"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", "not a safetensors file")])
def test_a_file_that_is_none_is_one_line(model: Path, content: bytes, match: str) -> None:
    (model / SINGLE).write_bytes(content)
    refused(model, match)


def test_a_header_larger_than_any_is_refused_before_it_is_read(model: Path) -> None:
    size = 64 << 20
    with (model / SINGLE).open("wb") as file:
        file.write(size.to_bytes(8, "little"))
        file.truncate(8 + size)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(model / SINGLE)
