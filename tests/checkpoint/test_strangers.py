"""Configs, side files and adapters from strangers: one line of error, no hang, no memory; kernels are ours, not theirs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tsotsallm
from tests.checkpoint.damage import edit_json, refused
from tests.conftest import FAMILIES, build
from tsotsallm.checkpoint.weights import INDEX, SINGLE
from tsotsallm.errors import CheckpointError

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
NAN, INFINITY = float("nan"), float("inf")
ADAPTER = Path("adapter") / "adapter_model.safetensors"
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plain") / "plain", "llama2", shard="60KB")


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return tsotsallm.load(path)[0](IDS).logits


# -- what a config says about running ------------------------------------------------------------------------------


RUNTIME: list[dict[str, Any]] = [
    {"attn_implementation": "flash_attention_2"}, {"_attn_implementation": "flash_attention_3"},
    {"_attn_implementation_internal": "flash_attention_2"}, {"attn_implementation": {"": "x"}}, {"attn_implementation": 7},
    {"attn_implementation": "kernels-community/flash-attn"}, {"experts_implementation": "grouped_mm"},
    {"torch_dtype": "nonsense"}, {"dtype": "load"}, {"torch_dtype": ["float16"]}, {"dtype": 16}, {"torch_dtype": "int8"},
    {"use_cache": False}, {"use_cache": "never"}, {"return_dict": False}, {"use_return_dict": False},
    {"output_attentions": True}, {"output_hidden_states": True}, {"num_labels": 10**9}, {"id2label": {"a": "b"}},
    {"problem_type": "none"}, {"is_encoder_decoder": True}, {"chunk_size_feed_forward": 7}, {"torchscript": True},
    {"architectures": "LlamaForCausalLM"}, {"architectures": ["Other"]}, {"name_or_path": ["x"]}, {"to_dict": 5},
    {"attribute_map": {"hidden_size": "vocab_size"}}, {"base_model_tp_plan": {"layers.*": "colwise"}}, {"validate": 1},
    {"quantization_config": None}, {"transformers_version": 4}, {"fusion_config": {"a": 1}},
    {"pruned_heads": {"0": [1]}},
    {"distributed_config": {"tp_size": 2}}, {"tokenizer_class": "X"}, {"unknown": {"deeply": ["nested"]}},
    {"bos_token_id": -1}, {"pad_token_id": 10**9}, {"pad_token_id": -1}, {"per_layer_config": None},
    {"auto_class": "x"}, {"sliding_window": 3, "attention_chunk_size": 2},
]


@pytest.mark.parametrize("changes", RUNTIME, ids=lambda changes: str(changes)[:50])
def test_how_a_config_would_run_the_model_changes_nothing(plain: Path, model: Path, text: Path, tmp_path: Path,
                                                          changes: dict[str, Any]) -> None:
    edit_json(model / "config.json", **changes)
    assert torch.equal(logits(model), logits(plain))
    found = tsotsallm.evaluate(model, text, context=48, limit=2).loss
    assert found == tsotsallm.evaluate(plain, text, context=48, limit=2).loss


def test_a_result_does_not_ask_for_the_kernels_of_its_source(model: Path, plain: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", attn_implementation="flash_attention_2", torch_dtype="nonsense", dtype="nonsense")
    tsotsallm.compress(model, "skip:1", tmp_path / "out")
    tsotsallm.compress(plain, "skip:1", tmp_path / "plain")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(IDS).logits
    assert torch.allclose(theirs, logits(tmp_path / "plain"), atol=1e-5)


def test_a_window_of_another_family_is_no_window_here(plain: Path, model: Path) -> None:
    from tsotsallm.checkpoint.reader import Checkpoint

    edit_json(model / "config.json", sliding_window=3)
    assert Checkpoint.open(model).spec.attention_window(0) is None


# -- numbers that cannot be ----------------------------------------------------------------------------------------


NUMBERS: dict[str, list[Any]] = {
    "hidden_size": [2**31, 10**12, 0, -64, NAN, "64", True, 64.0, None, [64], 2**70],
    "head_dim": [2**31, 10**12, -16, 0, NAN, "16", True, 15, 2**63],
    "vocab_size": [10**12, 2**31, 0, -1, NAN, "256", True, None],
    "num_hidden_layers": [10**9, 10_000, 2**70, 0, -1, NAN, "4", True, None, 4.0, []],
    "intermediate_size": [10**12, 2**31, 0, -1, NAN, "96", True, None],
    "num_attention_heads": [10**12, 3, 0, -4, NAN, "4", True, None, 64],
    "num_key_value_heads": [10**12, 3, 0, -4, NAN, "4", True, 8],
    "max_position_embeddings": [0, -1, NAN, "256", True, None],
    "rms_norm_eps": [NAN, INFINITY, -1.0, "1e-5", None],
    "rope_parameters": [{"rope_type": "default", "rope_theta": value} for value in (0, -1.0, NAN, "x", None, [])] + [
        {"rope_type": "nobody"}, {"rope_type": ["default"]}, "default", 7, {"rope_type": "llama3", "factor": "x"},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0}, {"rope_type": "longrope", "long_factor": ["x"]},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}, {"rope_type": "linear", "partial_rotary_factor": 1e9}],
    "hidden_act": ["nothing", 7, None, ["silu"]],
    "tie_word_embeddings": ["yes", 1, None],
    "attention_bias": [True, "yes"],
    "layer_types": [["sliding_attention"] * 4, "full", ["x"] * 4, ["full_attention"], 7],
    "is_causal": [False, None, 0],
    "per_layer_config": [{"0": {"head_dim": 8}}],
    "model_type": ["llama4", None, 7, [], "x" * 10_000, "a\nb"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NUMBERS.items() for value in values],
                         ids=lambda one: str(one)[:30])
def test_a_config_that_cannot_be_is_one_line(model: Path, key: str, value: object) -> None:
    edit_json(model / "config.json", **{key: value})
    refused(model)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_refused_before_anything_is_made_in_the_size_that_its_config_says(tmp_path: Path,
                                                                                         family: str) -> None:
    path = build(tmp_path / family, family)
    for key in ("hidden_size", "head_dim", "vocab_size", "intermediate_size"):
        before = (path / "config.json").read_text()
        edit_json(path / "config.json", **{key: 1 << 34})
        refused(path, "says|not a valid")
        (path / "config.json").write_text(before)


MEASURE = """
import resource, sys
import tsotsallm
from tsotsallm.errors import CheckpointError
tsotsallm.inspect(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    try:
        tsotsallm.inspect(path)
        print("accepted", path)
    except CheckpointError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in kilobytes on Linux alone")
def test_memory_stays_where_it_was_whatever_a_config_says(plain: Path, tmp_path: Path) -> None:
    paths = []
    for number, changes in enumerate([
            {"head_dim": 2**31}, {"hidden_size": 2**33}, {"vocab_size": 10**12}, {"num_hidden_layers": 10_000},
            {"num_labels": 10**8, "vocab_size": 1}, {"max_position_embeddings": 2**62, "vocab_size": 1},
            {"rope_parameters": {"rope_type": "linear", "factor": 1.0, "rope_theta": 1e4, "partial_rotary_factor": 1e9}},
            {"x": ["y" * 1000] * 3000}, {"id2label": {str(place): "" for place in range(100_000)}, "vocab_size": 1}]):
        paths.append(shutil.copytree(plain, tmp_path / f"model-{number}"))
        edit_json(paths[-1] / "config.json", **changes)
    found = subprocess.run([sys.executable, "-c", MEASURE, str(plain), *map(str, paths)], capture_output=True, text=True,
                           check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "accepted" not in found.stdout.replace(f"accepted {paths[7]}", "")     # long strings alone do no harm
    assert int(found.stdout.split()[-1]) < 100


# -- files that are none -------------------------------------------------------------------------------------------


SIDE_FILES = ["config.json", INDEX, "tsotsallm.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
              "model-00002-of-00007.safetensors"]


def with_adapter(path: Path) -> None:
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2,
                                                                      "base_model_name_or_path": ".."}))
    save_file({LORA.format("A"): torch.zeros(2, 64), LORA.format("B"): torch.zeros(64, 2)}, path / ADAPTER)


def provenance(**changes: Any) -> dict[str, Any]:
    return {"recipe": [{"layers": {"skip": [1]}}], "choices": [], "measures": {}, "ancestry": None} | changes


@pytest.fixture
def whole(model: Path) -> Path:
    """A checkpoint with every side file."""
    with_adapter(model)
    (model / "tsotsallm.json").write_text(json.dumps(provenance()))
    tsotsallm.inspect(model)
    return model


@pytest.fixture
def half_a_minute() -> Iterator[None]:
    """Whoever opens a FIFO waits for ever; an alarm ends that."""
    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("kind", ["FIFO", "device", "directory", "link to itself", "link to /proc"])
@pytest.mark.parametrize("name", SIDE_FILES)
@pytest.mark.usefixtures("half_a_minute")
def test_only_regular_files_are_opened(whole: Path, name: str, kind: str) -> None:
    path = whole / name
    if not path.exists():
        path = sorted(whole.glob("model-*.safetensors"))[1]
    path.unlink()
    make: dict[str, Callable[[], object]] = {
        "FIFO": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "directory": path.mkdir,
        "link to itself": lambda: path.symlink_to(path.name), "link to /proc": lambda: path.symlink_to("/proc/kmsg")}
    make[kind]()
    with pytest.raises(CheckpointError) as caught:
        tsotsallm.checkpoint.reader.Checkpoint.open(whole).provenance  # noqa: B018
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["config.json", INDEX, "tsotsallm.json", "adapter/adapter_config.json"])
@pytest.mark.parametrize(("content", "match"), [
    ("[" * 100_000, "too deeply"), ('{"a":' * 100_000, "too deeply"), ('{"a":' * 200 + "1" + "}" * 200, "too deeply"),
    ("{", "not valid JSON"), ("", "not valid JSON"), ("null", ""), ("[]", ""), ("7", ""), ('"x"', ""), ("\ufeff{}", ""),
    ('{"a": "\\ud800"}', "surrogate"), ("[1" + "0" * 5000 + "]", "not valid JSON"), ("{}" + "x" * 100, "not valid JSON")])
def test_nonsense_in_a_side_file_is_one_line(whole: Path, name: str, content: str, match: str) -> None:
    (whole / name).write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=match) as caught:
        tsotsallm.checkpoint.reader.Checkpoint.open(whole).provenance  # noqa: B018
    message = str(caught.value)
    assert message.isprintable()
    assert len(message.replace(str(whole), "")) < 500
    assert name.rpartition("/")[2] in message or "adapter" in message


@pytest.mark.parametrize("name", ["config.json", INDEX, "tsotsallm.json", "adapter/adapter_config.json"])
def test_a_side_file_of_a_hundred_megabytes_is_not_read(whole: Path, name: str) -> None:
    with (whole / name).open("r+b") as file:
        file.truncate(100 << 20)
    with pytest.raises(CheckpointError, match=r"more than the .* that such a file may have"):
        tsotsallm.checkpoint.reader.Checkpoint.open(whole).provenance  # noqa: B018


def test_bytes_that_are_no_text_are_one_line(whole: Path) -> None:
    (whole / "config.json").write_bytes(b'{"model_type": "caf\xe9"}')
    refused(whole, "not UTF-8")


@pytest.mark.parametrize("changes", [
    {"recipe": {}}, {"recipe": ["x"]}, {"recipe": [{"a": 1}]}, {"recipe": [{}]}, {"choices": None}, {"choices": [1]},
    {"measures": []}, {"ancestry": 7}, {"ancestry": {"recipe": "x"}}, {"ancestry": provenance(recipe=None)}])
def test_provenance_of_another_shape_is_damaged(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    (model / "tsotsallm.json").write_text(json.dumps(provenance(**changes)))
    with pytest.raises(CheckpointError, match=r"tsotsallm\.json is damaged"):
        tsotsallm.compress(model, "rtn:4:32", tmp_path / "out")


@pytest.mark.parametrize("kept", [None, "all", [0, 1], list(range(255, -1, -1)), [0] * 256, ["0"] * 256,
                                  [*range(255), -1], [True] * 256, {"0": 1}])
def test_a_list_of_kept_tokens_that_cannot_be_is_damaged(model: Path, plain: Path, text: Path, kept: object) -> None:
    (model / "vocabulary.json").write_text(json.dumps({"kept": kept}))
    with pytest.raises(CheckpointError, match=r"vocabulary\.json is damaged"):
        tsotsallm.evaluate(model, text, reference=plain, context=48, limit=1)


# -- adapters ------------------------------------------------------------------------------------------------------


TENSORS: dict[str, dict[str, torch.Tensor]] = {
    "three dimensions": {LORA.format("A"): torch.zeros(2, 64, 1), LORA.format("B"): torch.zeros(64, 2, 1)},
    "one dimension": {LORA.format("A"): torch.zeros(64), LORA.format("B"): torch.zeros(64)},
    "another width": {LORA.format("A"): torch.zeros(2, 32), LORA.format("B"): torch.zeros(64, 2)},
    "another height": {LORA.format("A"): torch.zeros(2, 64), LORA.format("B"): torch.zeros(32, 2)},
    "two ranks": {LORA.format("A"): torch.zeros(2, 64), LORA.format("B"): torch.zeros(64, 3)},
    "no rank": {LORA.format("A"): torch.zeros(0, 64), LORA.format("B"): torch.zeros(64, 0)},
    "one half": {LORA.format("A"): torch.zeros(2, 64)},
    "the other half": {LORA.format("B"): torch.zeros(64, 2)},
    "whole numbers": {LORA.format("A"): torch.zeros(2, 64, dtype=torch.int8), LORA.format("B"): torch.zeros(64, 2)},
    "of no linear": {LORA.format(half).replace("q_proj", "r_proj"): torch.zeros(64, 64) for half in "AB"},
    "of a missing layer": {LORA.format(half).replace("layers.0", "layers.9"): torch.zeros(64, 64) for half in "AB"},
    "of the embeddings": {f"base_model.model.model.embed_tokens.lora_{half}.weight": torch.zeros(64, 64) for half in "AB"},
    "of the head": {f"base_model.model.lm_head.lora_{half}.weight": torch.zeros(64, 64) for half in "AB"},
    "no LoRA": {"base_model.model.model.layers.0.mlp.up_proj.ia3_l": torch.zeros(64)},
    "a name with lines": {"x\n" * 1000: torch.zeros(1)},
}


@pytest.mark.parametrize("case", TENSORS)
def test_an_adapter_that_does_not_fit_is_refused(model: Path, case: str) -> None:
    with_adapter(model)
    save_file(TENSORS[case], model / ADAPTER)
    refused(model, r"does not fit its linear|not a linear of a layer|not part of a LoRA adapter|does not have")


def test_an_adapter_that_fits_is_added(model: Path, plain: Path) -> None:
    with_adapter(model)
    assert torch.equal(logits(model), logits(plain))
    left, right = torch.randn(64, 2) * 0.1, torch.randn(2, 64) * 0.1
    save_file({LORA.format("A"): right, LORA.format("B"): left}, model / ADAPTER)
    merged = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with torch.no_grad():
        merged.model.layers[0].self_attn.q_proj.weight += left @ right
        assert torch.allclose(logits(model), merged(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("changes", [{"r": None}, {"r": [2]}, {"lora_alpha": "2"}, {"rank_pattern": {"a": 1}},
                                     {"use_dora": True}, {"use_rslora": 1}, {"lora_alpha": NAN}])
def test_an_adapter_that_scales_is_refused(model: Path, changes: dict[str, Any]) -> None:
    with_adapter(model)
    edit_json(model / "adapter" / "adapter_config.json", **changes)
    refused(model, "alpha is not the rank")


def test_a_tensor_of_the_base_is_not_taken_for_an_adapter(model: Path) -> None:
    shard = sorted(model.glob("model-*.safetensors"))[0]
    save_file(load_file(shard) | {"model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(2, 64),
                                  "model.layers.0.mlp.up_proj.lora_B.weight": torch.zeros(96, 2)}, shard)
    refused(model, "is stored among the weights of its base")


def test_a_single_file_that_cannot_be_opened_is_one_line(plain: Path, tmp_path: Path) -> None:
    path = build(tmp_path / "one", "llama2")
    (path / SINGLE).unlink()
    (path / SINGLE).mkdir()
    refused(path, "is a directory, where a regular file is expected")


@pytest.mark.parametrize("content", ["[]", "7", "{", '{"early_stopping": 7}', '{"to_dict": 5}', '{"watermarking_config": 7}',
                                     "[" * 100_000])
def test_a_generation_config_of_nonsense_is_one_line(model: Path, content: str) -> None:
    (model / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json") as caught:
        tsotsallm.load(model)
    assert str(caught.value).isprintable()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no devices here")
@pytest.mark.usefixtures("half_a_minute")
@pytest.mark.parametrize("name", ["generation_config.json", "LICENSE", "tokenizer.json"])
def test_a_device_is_not_copied_into_a_result(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is a device, where a regular file is expected"):
        tsotsallm.compress(model, "skip:1", tmp_path / "out")
    assert not (tmp_path / "out").exists()
