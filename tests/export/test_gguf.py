"""GGUF files: read by llama.cpp with our log-probabilities, tokens alike, blocks copied, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import tsotsallm
from tests.checkpoint.damage import rewritten
from tests.conftest import build
from tests.llama import Llama
from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.gguf_layout import vocabulary_entries
from tsotsallm.checkpoint.gguf_vocabulary import read_vocabulary
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.llama import Llama as Engine
from tsotsallm.errors import CheckpointError, ExportError, RecipeError
from tsotsallm.export.gguf import export_gguf
from tsotsallm.lab.texts import world_text

SMALL: dict[str, Any] = {"windows": 6, "window": 64}
IDS = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64, 33, 83, 27, 95]


def gelu_of_a_table(values: torch.Tensor) -> torch.Tensor:
    """GELU as ggml computes it on a CPU: looked up by the number in 16 bits, and given in 16 bits."""
    found = torch.nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
    return torch.where(values <= -10, 0, torch.where(values >= 10, values, found))


def ours(model: Path, ids: list[int]) -> torch.Tensor:
    whole = tsotsallm.load(model)[0]
    for layer in whole.model.layers:
        if "gelu" in str(getattr(whole.config, "hidden_activation", "")):
            layer.mlp.act_fn.forward = gelu_of_a_table
    with torch.no_grad():
        return torch.log_softmax(whole(torch.tensor([ids])).logits[0], -1)


def compare(model: Path, file: Path, ids: list[int], most: float, adapter: Path | None = None, *,
            next_only: bool = False) -> float:
    """No log-probability differs by more (those of the next tokens on average); returns the mean KL between the engines."""
    expected = ours(model, ids)
    found = Llama(file, expected.shape[1], adapter=adapter).log_probabilities(ids)
    assert bool(torch.isfinite(found).all())
    next_tokens = torch.tensor(ids[1:])[:, None]
    difference = (found - expected).abs()
    assert float(difference[:-1].gather(1, next_tokens).mean() if next_only else difference.max()) < most
    return float((expected.exp() * (expected - found)).nan_to_num().sum(-1).mean())


def test_llama_cpp_computes_what_we_compute(every_family_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    export_gguf(Checkpoint.open(every_family_checkpoint), out)
    compare(every_family_checkpoint, out, IDS, 1e-3)


@pytest.mark.parametrize("grid", ["q4_0", "q8_0", "iq4_nl"])
def test_blocks_are_copied(tiny: Path, text: Path, tmp_path: Path, grid: str) -> None:
    out, file = tmp_path / "out", tmp_path / "model.gguf"
    tsotsallm.compress(tiny, f"layers:0+2+2+3, gptq:{grid}", out, calibration=text, **SMALL)
    checkpoint = Checkpoint.open(out)
    export_gguf(checkpoint, file, dense="f32")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    kept = checkpoint.record("model.layers.1.mlp.up_proj.weight_blocks").read().numpy()
    assert (tensors["blk.1.ffn_up.weight"].data == kept).all()
    assert {tensor.tensor_type.name for name, tensor in tensors.items() if "attn_q.w" in name} == {grid.upper()}
    assert compare(out, file, IDS, 0.5) < 0.01       # random weights; on trained ones see below


def test_the_embedded_model_runs_alike(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open("embedded")
    export_gguf(checkpoint, tmp_path / "model.gguf", dense="f32")
    engine = Llama(tmp_path / "model.gguf", checkpoint.spec.vocabulary)
    prompt = "Question: Where was Ada born? Answer:"
    model, tokenizer = tsotsallm.load("embedded")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=12, do_sample=False)[0][ids.shape[1]:]
    assert engine.greedy(prompt, 12) == tokenizer.decode(written, skip_special_tokens=True)
    for words in ("L'été, 12345 ans;  deux   espaces\n\net 'plus'!", "ẞ 漢字 🙂 \t x", "don't we'll 3.14 "):
        assert engine.tokens_of(words) == len(tokenizer(words)["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["q4_k", "q2_k", "iq4_nl", "iq4_xs"])
def test_the_embedded_model_is_the_same_on_its_grid(tmp_path: Path, grid: str) -> None:
    plainly = {"grid": grid, "couple": False, "passes": 0}         # how it was rounded makes no difference to the file
    tsotsallm.compress("embedded", [{"quantize": plainly}], tmp_path / "out", **SMALL)
    export_gguf(Checkpoint.open(tmp_path / "out"), tmp_path / "model.gguf", dense="f32")
    ids = tsotsallm.load("embedded")[1](world_text(test=True, characters=400))["input_ids"][:48]
    assert compare(tmp_path / "out", tmp_path / "model.gguf", ids, 5e-2, next_only=True) <= 1e-3


def test_stories_are_told_alike(stories: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(stories)
    export_gguf(checkpoint, tmp_path / "model.gguf")
    engine = Llama(tmp_path / "model.gguf", checkpoint.spec.vocabulary)
    assert engine.greedy("Once upon a time", 50).startswith(", there was a little girl named Lily. She loved to play outs")
    tokenizer = checkpoint.tokenizer()
    for words in ("Once upon a time, there was", "  two  spaces", "Ünï©ödé 漢 🙂", "a\nb\tc"):
        assert engine.tokens_of(words) == len(tokenizer(words)["input_ids"])


@pytest.mark.parametrize("bits", [16, 8])
def test_corrections_become_an_adapter(tiny: Path, text: Path, tmp_path: Path, bits: int) -> None:
    out = tmp_path / "out"
    tsotsallm.compress(tiny, f"[{{quantize: {{grid: q4_0}}}}, {{compensate: {{rank: 32, bits: {bits}}}}}]", out,
                       calibration=text, **SMALL)
    found = export_gguf(Checkpoint.open(out), tmp_path / "model.gguf", dense="f32")
    assert found.adapter is not None
    assert any("adapter" in note for note in found.notes)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(found.adapter).tensors}
    assert kinds == ({"F32"} if bits == 16 else {"Q8_0"})
    with_it = compare(out, tmp_path / "model.gguf", IDS, 0.5, adapter=found.adapter)
    assert with_it < 0.01
    assert with_it < 0.2 * compare(out, tmp_path / "model.gguf", IDS, 5.0)
    require_refusals(found.adapter, tmp_path / "model.gguf", tmp_path / "changed.gguf")


def require_refusals(adapter: Path, model: Path, changed: Path) -> None:
    """llama.cpp aborts the process where a field of an adapter has another type."""
    for key, value, message in (
            ("general__architecture", "qwen2", "is an adapter for 'qwen2'"),
            ("adapter__type", "dora", "is not an adapter of low-rank factors"),
            ("adapter__lora__alpha", (16.0, gguf.GGUFValueType.FLOAT64), "a finite number in 32 bits is expected"),
            ("adapter__lora__alpha", "16", "a finite number in 32 bits is expected")):
        rewritten(adapter, changed, **{key: value})
        with pytest.raises(CheckpointError, match=message):
            Engine(model, adapter=changed)


def test_llama_3_tokenizers_are_told_by_their_rule(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.conftest import byte_tokenizer

    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
              r"\s+(?!\S)|\s+")
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    for rule, whole, expected in ((llama3, True, "llama-bpe"), (llama3, False, "smaug-bpe"),
                                  (llama3.replace("{1,3}", ""), False, "qwen2")):
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
        content["model"]["ignore_merges"] = whole
        path.write_text(json.dumps(content))
        assert read_vocabulary(TextCodec(AutoTokenizer.from_pretrained(tmp_path), 256, "here")).pre == expected
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\s+"
    path.write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"no name for.*nothing is exported"):
        read_vocabulary(TextCodec(AutoTokenizer.from_pretrained(tmp_path), 256, "here"))


def test_what_cannot_be_exported_is_said(tiny: Path, text: Path, stories: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    out.touch()
    with pytest.raises(ExportError, match="exists already"):
        export_gguf(Checkpoint.open(tiny), out)
    out.unlink()
    damaged = build(tmp_path / "damaged", "llama3")
    content = json.loads((damaged / "tokenizer.json").read_text())
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (damaged / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match="type WordLevel"):
        export_gguf(Checkpoint.open(damaged), out)
    yarn = build(tmp_path / "yarn", "llama3", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ExportError, match="yarn"):
        export_gguf(Checkpoint.open(yarn), out)
    large = build(tmp_path / "large", "llama3")
    checkpoint = Checkpoint.open(large)
    record = checkpoint.record("model.layers.0.mlp.up_proj.weight")
    with record.path.open("r+b") as file:
        file.seek(record.start)
        file.write(torch.tensor([1e6]).numpy().tobytes())
    with pytest.raises(ExportError, match=r"more than f16.*dense=.bf16"):
        export_gguf(checkpoint, out, dense="f16")
    assert not list(tmp_path.glob("model*"))
    with pytest.raises(RecipeError, match="divide no linear"):
        tsotsallm.plan(build(tmp_path / "odd", "llama3", hidden_size=60, intermediate_size=92, head_dim=20), "gptq:q4_0")
    with pytest.raises(RecipeError, match="lose_zeros"):
        tsotsallm.plan(tiny, "wanda:2:4, gptq:q4_k")


def test_awkward_widths_stay_as_they_are(stories: Path, prose: Path, tmp_path: Path) -> None:
    result = tsotsallm.compress(stories, "gptq:q4_k", tmp_path / "out", calibration=prose, **SMALL)
    assert "down_proj (172 columns), which will lie in 16 bits" in str(result.notes)
    assert "on q5_0" in str(Checkpoint.open(tmp_path / "out").provenance)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert not checkpoint.is_packed("model.layers.0.mlp.down_proj")
    assert checkpoint.is_packed("model.layers.0.mlp.up_proj")
    export_gguf(checkpoint, tmp_path / "model.gguf")
    ids = checkpoint.tokenizer()("Once upon a time there was a boy")["input_ids"]
    assert compare(tmp_path / "out", tmp_path / "model.gguf", ids, 5e-2, next_only=True) <= 1e-3


def test_a_tokenizer_without_an_unknown_token_has_none(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.conftest import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["None"] = content["model"]["vocab"].pop("À" + "Á")
    content["model"]["merges"] = [["N", "o"], ["No", "n"], ["Non", "e"]]
    content["model"]["vocab"] |= {"No": 256, "Non": 257}
    path.write_text(json.dumps(content))
    found = read_vocabulary(TextCodec(AutoTokenizer.from_pretrained(tmp_path), 258, "here"))
    assert found.unknown is None
    assert found.types[found.tokens.index("None")] == 1


def test_the_unknown_token_is_the_one_that_the_tokenizers_config_names(tmp_path: Path) -> None:
    """SmolLM2's tokenizer.json has none, its config has token 0."""
    from tests.conftest import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(2)
    found = read_vocabulary(TextCodec(tokenizer, 256, "here"))
    assert found.unknown == 2
    assert [entry.value for entry in vocabulary_entries(found) if entry.key == "tokenizer.ggml.unknown_token_id"] == [2]
