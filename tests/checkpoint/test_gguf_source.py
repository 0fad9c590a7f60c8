"""A GGUF file as the source of a checkpoint: the same weights, config and tokens as what it was exported from."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken

import tsotsallm
from tests.compressing import SMALL
from tests.conftest import FAMILIES, build
from tests.fidelity import kinds
from tsotsallm.checkpoint.gguf_file import GgufFile
from tsotsallm.checkpoint.gguf_layout import Entry, Kind, Labels, Layout, TensorInfo, model_entries, vocabulary_entries
from tsotsallm.checkpoint.gguf_records import BLOCKS, FLOATS
from tsotsallm.checkpoint.gguf_rope import llama3_scaling
from tsotsallm.checkpoint.gguf_terms import rope_factors
from tsotsallm.checkpoint.gguf_vocabulary import ALIKE, read_vocabulary
from tsotsallm.checkpoint.reader import Checkpoint, layer_prefix
from tsotsallm.checkpoint.spec import EMBEDDING, HEAD, ModelSpec
from tsotsallm.engine.factory import speaker
from tsotsallm.engine.llama import Llama
from tsotsallm.engine.resident import resident
from tsotsallm.errors import CheckpointError, MissingExtraError
from tsotsallm.export.gguf import export_gguf
from tsotsallm.export.verify import PLAIN
from tsotsallm.numerics.ggml import LAYOUTS

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4,
                        "head_dim": 32}


def raw(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor of a file."""
    file = GgufFile.open(path)
    content = path.read_bytes()
    return {name: (one.type, one.shape, content[one.start:one.start + one.size]) for name, one in file.tensors.items()}


def effective(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All weights as they are computed with."""
    spec = checkpoint.spec
    found = {name: checkpoint.tensor(name) for name in (EMBEDDING, "model.norm.weight", *(() if spec.tied else (HEAD,)))}
    for index in range(spec.layers):
        found |= {f"{index}.{name}": tensor for name, tensor in checkpoint.layer(spec.layer_order[index]).items()}
    return found


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.arange(20)[None] * 7 % checkpoint.spec.vocabulary
        found: torch.Tensor = resident(checkpoint)(ids).logits
        return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dense", ["f32", "f16", "bf16"])
def test_every_family_comes_back(tmp_path: Path, family: str, dense: str) -> None:
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dense]
    original = Checkpoint.open(build(tmp_path / "model", family, dtype=dtype, sliding_window=None, use_sliding_window=False)
                               if family in ("mistral", "qwen2") else build(tmp_path / "model", family, dtype=dtype))
    export_gguf(original, tmp_path / "model.gguf", dense=dense)  # type: ignore[arg-type]
    found = Checkpoint.open(tmp_path / "model.gguf")
    same(effective(original), effective(found))
    assert torch.equal(logits(original), logits(found))
    assert found.storage == dtype
    config, expected = found.spec.hf_config.to_dict(), original.spec.hf_config.to_dict()
    differ = {key for key in config.keys() | expected.keys() if config.get(key) != expected.get(key)}
    assert differ <= {"model_type", "architectures", "sliding_window", "transformers_version", "dtype", "max_window_layers",
                      "layer_types", "bos_token_id", "eos_token_id", "use_sliding_window", *(
                          ("head_dim",) if family[:5] == "llama" else ())} | (
                          {"pretraining_tp", "mlp_bias", "attention_bias"} if family == "mistral" else set()), {
                          key: (config.get(key), expected.get(key)) for key in differ}
    text = "Été 12 don't \n\n  x"
    assert found.codec.encode(text) == original.codec.encode(text)
    assert found.codec.decode(found.codec.encode(text)) == original.codec.decode(original.codec.encode(text))
    assert found.codec.ends == original.codec.ends
    export_gguf(found, tmp_path / "again.gguf")
    assert raw(tmp_path / "again.gguf") == raw(tmp_path / "model.gguf")


@pytest.mark.parametrize("grid", sorted(LAYOUTS))
def test_blocks_stay_as_they_are(tmp_path: Path, grid: str) -> None:
    family = "llama3" if grid < "q5" else "qwen3"
    directory = build(tmp_path / "model", family, **WIDE)
    tsotsallm.compress(directory, f"rtn:{grid}", tmp_path / "small", **SMALL)
    small = Checkpoint.open(tmp_path / "small")
    export_gguf(small, tmp_path / "model.gguf")
    found = Checkpoint.open(tmp_path / "model.gguf")
    same(effective(small), effective(found))
    assert str(found.grid_of(f"{layer_prefix(0)}mlp.up_proj")) == str(small.grid_of(f"{layer_prefix(0)}mlp.up_proj"))
    export_gguf(found, tmp_path / "again.gguf")
    assert raw(tmp_path / "again.gguf") == raw(tmp_path / "model.gguf")
    tsotsallm.compress(tmp_path / "model.gguf", "skip:1-2", tmp_path / "cut", **SMALL)
    export_gguf(Checkpoint.open(tmp_path / "cut"), tmp_path / "cut.gguf", dense="f32")
    cut, whole = raw(tmp_path / "cut.gguf"), raw(tmp_path / "model.gguf")
    assert len({name.split(".")[1] for name in cut if name.startswith("blk.")}) == 2
    for name, tensor in cut.items():
        assert tensor == whole[name.replace("blk.1.", "blk.3.")], name


# -- files that others wrote ------------------------------------------------------------------------------------------

@dataclass
class Parts:
    """What a file is made of, to be changed and written."""

    entries: dict[str, Entry]
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, folder: Path, dense: str = "f32") -> Parts:
        export_gguf(checkpoint, folder / "parts.gguf", dense=dense, name="tiny")  # type: ignore[arg-type]
        tensors = raw(folder / "parts.gguf")
        (folder / "parts.gguf").unlink()
        entries = (*model_entries(checkpoint.spec, Labels("tiny")), *vocabulary_entries(read_vocabulary(checkpoint.codec)))
        return cls({entry.key: entry for entry in entries}, tensors)

    def set(self, key: str, kind: Kind, value: Any) -> None:
        self.entries[key] = Entry(key, kind, value)

    def write(self, path: Path, names: Sequence[str] | None = None, entries: Sequence[Entry] | None = None) -> Path:
        kept = {name: self.tensors[name] for name in (self.tensors if names is None else names)}
        layout = Layout(tuple(self.entries.values()) if entries is None else tuple(entries),
                        tuple(TensorInfo(name, shape, kind) for name, (kind, shape, _) in kept.items()))
        path.write_bytes(layout.head + b"".join(data.ljust(-(-len(data) // 32) * 32, b"\0") for _, _, data in kept.values()))
        return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(build(tmp_path_factory.mktemp("small") / "small", "llama3", **WIDE))


@pytest.fixture
def parts(small: Checkpoint, tmp_path: Path) -> Parts:
    return Parts.of(small, tmp_path)


def written(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> bytes:
    """Blocks of a type: rounded by the gguf library where it can, else random ones with moderate scales."""
    (rows, columns), (weights, size) = shape, BLOCKS[kind]
    try:
        values = rng.standard_normal((rows, columns)).astype(np.float32) * 0.1
        return bytes(gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.upper()]).tobytes())
    except NotImplementedError:         # the library reads the type, but cannot write it
        blocks = rng.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
        half = np.float16(0.01).tobytes()
        if kind == "iq1_m":             # its 16 bits of scale are spread over four words
            blocks[:, 49::2] &= 0x0F
            blocks[:, 55] |= 0x20
        else:
            places = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,), "q4_k": (0, 2), "q5_k": (0, 2)}
            for at in places.get(kind, (0,)):
                blocks[:, at:at + 2] = np.frombuffer(half, np.uint8)
        return blocks.tobytes()


READABLE = [kind for kind in BLOCKS if (kind not in FLOATS and not kind.startswith("i")) or kind.startswith("iq")]


@pytest.mark.parametrize("kind", [kind for kind in READABLE if kind not in ("q8_1", "q8_k", "q1_0")])
def test_every_type_is_read_like_ggufs_own(parts: Parts, tmp_path: Path, kind: str) -> None:
    rng, number = np.random.default_rng(0), gguf.GGMLQuantizationType[kind.upper()]
    expected: dict[str, Any] = {}
    for name in ("blk.1.attn_q.weight", "blk.1.attn_v.weight", "blk.2.ffn_down.weight", "token_embd.weight"):
        _, shape, _ = parts.tensors[name]
        data = written(kind, shape, rng)
        parts.tensors[name] = kind, shape, data
        rows = np.frombuffer(data, np.uint8).reshape(shape[0], -1)
        expected[name] = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(rows, number)))
    checkpoint = Checkpoint.open(parts.write(tmp_path / "model.gguf"))
    if kind not in LAYOUTS:
        near = torch.bfloat16 if kind in ("mxfp4", "nvfp4") else torch.float16
        for name, tensor in expected.items():
            rounded = tensor.to(near).float()
            assert (rounded - tensor).abs().max() <= 1e-3 * tensor.abs().max()
            expected[name] = rounded
        assert f"type {kind} have no grid" in str(checkpoint.notes)
    order = torch.arange(8 * 32).view(8, 16, 2).transpose(1, 2).flatten()
    assert torch.equal(checkpoint.tensor("model.layers.1.self_attn.q_proj.weight"), expected["blk.1.attn_q.weight"][order])
    assert torch.equal(checkpoint.tensor("model.layers.1.self_attn.v_proj.weight"), expected["blk.1.attn_v.weight"])
    assert torch.equal(checkpoint.tensor("model.layers.2.mlp.down_proj.weight"), expected["blk.2.ffn_down.weight"])
    assert torch.equal(checkpoint.rows(EMBEDDING, 7, 19), expected["token_embd.weight"][7:19])
    tsotsallm.compress(tmp_path / "model.gguf", "skip:0", tmp_path / "cut", **SMALL)
    cut = Checkpoint.open(tmp_path / "cut")
    assert torch.equal(cut.tensor("model.layers.0.self_attn.q_proj.weight"), expected["blk.1.attn_q.weight"][order])
    assert torch.equal(cut.tensor(EMBEDDING), expected["token_embd.weight"])


@pytest.mark.parametrize("kind", ["q8_1", "q8_k", "q1_0"])
def test_types_that_nothing_reads_are_refused(parts: Parts, tmp_path: Path, kind: str) -> None:
    weights, size = BLOCKS[kind]
    name = "blk.2.ffn_down.weight"
    parts.tensors[name] = kind, (256, 256), bytes(256 * 256 // weights * size)
    with pytest.raises(CheckpointError, match=rf"ffn_down.*stored as {kind}.*not read"):
        Checkpoint.open(parts.write(tmp_path / "model.gguf"))


def test_other_types_need_the_gguf_library(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.tensors["blk.2.ffn_down.weight"] = "iq3_s", (256, 256), bytes(256 * 256 // 256 * 110)
    path = parts.write(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match="iq3_s needs the package gguf"):
        Checkpoint.open(path)


class Short(Entry):
    """A whole number of 16 bits, as llama.cpp expects those of split files."""

    @property
    def encoded(self) -> bytes:
        key = self.key.encode()
        return struct.pack("<Q", len(key)) + key + struct.pack("<IH", 2, self.value)


def split(parts: Parts, folder: Path, count: int = 3) -> list[Path]:
    """The parts of a model, as llama.cpp's gguf-split writes them."""
    names, paths = list(parts.tensors), []
    for place in range(count):
        marks = (Short("split.no", "u32", place), Short("split.count", "u32", count),
                 Entry("split.tensors.count", "i32", len(names)))
        entries = (*(parts.entries.values() if place == 0 else ()), *marks)
        paths.append(parts.write(folder / f"model-{place + 1:05d}-of-{count:05d}.gguf", names[place::count], entries))
    return paths


def test_a_split_file_is_read_from_any_part(small: Checkpoint, parts: Parts, tmp_path: Path) -> None:
    paths = split(parts, tmp_path)
    for path in paths:
        found = Checkpoint.open(path)
        same(effective(small), effective(found))
        assert found.codec.encode("abc") == small.codec.encode("abc")
        assert len(found.fingerprint()["shards"]) == 3  # type: ignore[arg-type]
    whole = Checkpoint.open(parts.write(tmp_path / "whole.gguf"))
    shown, expected = (tsotsallm.inspect(path) for path in (paths[1], tmp_path / "whole.gguf"))
    assert (shown.parameters, shown.bytes_by_part, shown.layers) == (
        expected.parameters, expected.bytes_by_part, expected.layers)
    assert "alone" not in str(shown.notes)
    engine = speaker(paths[2])
    assert engine.tokenize("abc") == found.codec.encode("abc")
    assert whole.fingerprint() != found.fingerprint()
    renamed = tmp_path / "other.gguf"
    shutil.copy(paths[1], renamed)
    with pytest.raises(CheckpointError, match="part 2 of 3 of a model, but is not named like one"):
        Checkpoint.open(renamed)
    shutil.copy(paths[1], paths[2])
    with pytest.raises(CheckpointError, match="says that it is part 2 of 3; it belongs to another"):
        Checkpoint.open(paths[0])
    paths[2].unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.gguf is missing"):
        Checkpoint.open(paths[0])


def test_ollamas_store_is_read_by_name(small: Checkpoint, parts: Parts, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "ollama"
    (store / "blobs").mkdir(parents=True)
    blob = store / "blobs" / f"sha256-{'0f' * 32}"
    parts.write(blob)
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'0f' * 32}", "size": 1},
              {"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{'1f' * 32}", "size": 1}]
    for place in ("registry.ollama.ai/library/tiny/1b", "registry.ollama.ai/library/tiny/latest",
                  "registry.ollama.ai/someone/tiny/latest", "hf.co/someone/tiny/Q4_0"):
        manifest = store / "manifests" / place
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    for name in ("tiny:1b", "tiny", "someone/tiny", "hf.co/someone/tiny:Q4_0"):
        found = Checkpoint.open(f"ollama:{name}")
        assert found.directory == blob
    same(effective(small), effective(found))
    anatomy = tsotsallm.inspect("ollama:tiny")
    assert anatomy.layers == 4
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    tsotsallm.compress("ollama:tiny", "skip:1", tmp_path / "cut", **SMALL)
    assert Checkpoint.open(tmp_path / "cut").provenance.source == "ollama:tiny"  # type: ignore[union-attr]
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ollama").mkdir()
    store.rename(tmp_path / ".ollama" / "models")
    assert Checkpoint.open("ollama:tiny").spec.layers == 4
    with pytest.raises(CheckpointError, match=r"Ollama has no model 'tiny:7b'.*ollama pull tiny:7b"):
        Checkpoint.open("ollama:tiny:7b")
    for name in ("", "../../x", "a/b/c/d", "..", "x:..", "x\0y"):
        with pytest.raises(CheckpointError, match="not a name of a model in Ollama"):
            Checkpoint.open(f"ollama:{name}")
    manifest = tmp_path / ".ollama" / "models" / "manifests" / "registry.ollama.ai/library/tiny/latest"
    adapter = {"mediaType": "application/vnd.ollama.image.adapter"}
    for content, message in (
            ('{"layers": []}', "does not name one file"), ("[]", "does not name one file"), ("x", "tiny/latest"),
            (json.dumps({"layers": [layers[0] | {"digest": "sha256:../../etc"}]}), "does not name one file"),
            (json.dumps({"layers": [layers[0] | {"digest": f"sha256:{'2f' * 32}"}]}), "does not exist, which"),
            (json.dumps({"layers": [layers[0], adapter]}), "adds an adapter")):
        manifest.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open("ollama:tiny")


def test_a_cut_vocabulary_leaves_the_blocks_alone(tmp_path: Path, text: Path) -> None:
    directory = build(tmp_path / "model", "llama3", **WIDE, vocab_size=kinds.SIZE)
    kinds.save(directory, "legacy")
    tsotsallm.compress(directory, "rtn:q4_k", tmp_path / "small", **SMALL)
    export_gguf(Checkpoint.open(tmp_path / "small"), tmp_path / "model.gguf")
    (tmp_path / "kept.txt").write_text("the river runs through the old town")
    recipe = f"[{{vocabulary: {{keep: [{tmp_path / 'kept.txt'}]}}}}]"
    tsotsallm.compress(tmp_path / "model.gguf", recipe, tmp_path / "cut", **SMALL)
    cut, source = Checkpoint.open(tmp_path / "cut"), Checkpoint.open(tmp_path / "model.gguf")
    kept = cut.tokens_of_original
    assert kept is not None
    assert len(kept) < source.spec.vocabulary
    sample = "the river runs through the old town"
    assert [kept[token] for token in cut.codec.encode(sample)] == source.codec.encode(sample)
    assert cut.codec.chat is not None
    export_gguf(cut, tmp_path / "cut.gguf")
    whole, less = raw(tmp_path / "model.gguf"), raw(tmp_path / "cut.gguf")
    assert {name for name in whole if whole[name] != less[name]} == {"token_embd.weight"}
    rows = np.frombuffer(whole["token_embd.weight"][2], np.uint8).reshape(source.spec.vocabulary, -1)[kept]
    assert rows.tobytes() == less["token_embd.weight"][2]


# -- against llama.cpp ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("dense", ["f32", "f16"])
def test_probabilities_are_those_of_llama_cpp(tmp_path: Path, family: str, dense: str) -> None:
    original = Checkpoint.open(build(tmp_path / "model", family))
    export_gguf(original, tmp_path / "model.gguf", dense=dense)  # type: ignore[arg-type]
    found = Checkpoint.open(tmp_path / "model.gguf")
    ids = [3, 70, 80, 90, 4, 200, 17, 33, 33, 7]
    with torch.no_grad():
        ours = torch.log_softmax(resident(found)(torch.tensor([ids])).logits[0].float(), -1)
    ours = ours[torch.arange(len(ids) - 1), ids[1:]]
    theirs = Llama(tmp_path / "model.gguf", kv="f32", threads=1).log_likelihoods(ids)
    gaps = (ours - torch.tensor(list(theirs))).abs()
    # llama.cpp's kernels for f16 round their inputs to half precision
    assert gaps.max() < (1e-4 if dense == "f32" else 5e-3)
    assert gaps.mean() < (1e-5 if dense == "f32" else 2e-3)


@pytest.mark.parametrize("kind", ["bytes", "llama3", "legacy", "first", "always", "never"])
def test_texts_become_the_tokens_of_llama_cpp(tmp_path: Path, kind: str) -> None:
    directory = build(tmp_path / "model", "llama2", vocab_size=kinds.SIZE)
    kinds.save(directory, kind)
    original = Checkpoint.open(directory)
    export_gguf(original, tmp_path / "model.gguf")
    found, engine = Checkpoint.open(tmp_path / "model.gguf"), Llama(tmp_path / "model.gguf", threads=1)
    specials = [str(token) for token in original.codec.added.values()]
    texts = kinds.strings(1000, 8, specials)
    for text in texts:
        assert found.codec.encode(text) == original.codec.encode(text), repr(text)
        assert found.codec.decode(found.codec.encode(text)) == original.codec.decode(original.codec.encode(text))
        if kind not in ("always", "first"):
            assert found.codec.encode(text) == engine.tokenize(text), repr(text)
    assert found.codec.ends == original.codec.ends
    assert found.codec.prefix == original.codec.prefix
    assert {place: (str(token), token.special) for place, token in found.codec.added.items()} == {
        place: (str(token), token.special) for place, token in original.codec.added.items()}
    for talk in kinds.conversations(50, 6, specials):
        assert found.codec.conversation(talk) == original.codec.conversation(talk)
    for token in {*found.codec.added, *found.codec.ends}:
        assert engine.ends_at(token) == (token in found.codec.ends), token


RULES = ["llama-bpe", "smaug-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "gpt-2", "smollm", "seed-coder",
         "deepseek-v3"]


@pytest.mark.parametrize("rule", [*RULES, *(other for alike in ALIKE.values() for other in alike)])
@pytest.mark.parametrize("begin", [True, False])
def test_every_rule_splits_like_llama_cpp(tmp_path: Path, rule: str, begin: bool) -> None:
    directory = build(tmp_path / "model", "llama2", vocab_size=kinds.SIZE, num_hidden_layers=1)
    kinds.save(directory, "llama3", added=(AddedToken("<|eot|>", special=True, normalized=False),
                                           AddedToken("  two", normalized=False)))
    parts = Parts.of(Checkpoint.open(directory), tmp_path)
    parts.set("tokenizer.ggml.pre", "string", rule)
    if begin:
        del parts.entries["tokenizer.ggml.add_bos_token"]       # the engine's own default
    else:
        parts.set("tokenizer.ggml.add_eos_token", "bool", True)
    parts.set("tokenizer.ggml.eom_token_id", "u32", 9)
    path = parts.write(tmp_path / "rule.gguf")
    codec, engine = Checkpoint.open(path).codec, Llama(path, threads=1)
    texts = (*kinds.strings(1000 if begin else 50, 11, [str(token) for token in codec.added.values()]), *PLAIN)
    # llama.cpp's form of these two rules takes marks for punctuation; the models' own expression takes them for letters
    marks = rule in ("tekken", "gpt-4o", *ALIKE["gpt-4o"])
    for text in (text for text in texts if not marks or not any(unicodedata.category(one)[0] == "M" for one in text)):
        assert codec.encode(text) == engine.tokenize(text), repr(text)
    assert 9 in codec.ends
    assert len(codec.suffix) == (not begin)


def test_bos_before_conversations_is_that_of_llama_cpp(tmp_path: Path) -> None:
    directory = build(tmp_path / "model", "llama2", vocab_size=kinds.SIZE, num_hidden_layers=1)
    kinds.save(directory, "legacy", template="{% for m in messages %}{{ '[' + m['content'] + ']' }}{% endfor %}")
    parts = Parts.of(Checkpoint.open(directory), tmp_path)
    parts.set("tokenizer.ggml.add_bos_token", "bool", True)
    del parts.entries["tsotsallm.text_prefix"]
    path = parts.write(tmp_path / "model.gguf")
    codec, engine = Checkpoint.open(path).codec, Llama(path, threads=1)
    talk = [{"role": "user", "content": "the river"}]
    assert codec.conversation(talk) == engine.raw_conversation(talk)
    assert codec.conversation(talk)[0] == codec.bos


# -- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("key", "kind", "value", "message"), [
    ("general.architecture", "string", "gemma4", "unknown architecture 'gemma4'; supported are llama, mistral3, qwen2"),
    ("general.architecture", "string", "x" * 999, "unknown architecture"),
    ("general.type", "string", "adapter", "is an adapter"),
    ("llama.expert_count", "u32", 8, "8 experts"),
    ("llama.rope.scaling.type", "string", "yarn", "scales its positions by 'yarn'"),
    ("llama.rope.dimension_count", "u32", 16, "rotates 16 numbers"),
    ("llama.attention.value_length", "u32", 16, "values of 16"),
    ("llama.attention.head_count", "u32", 7, r"7|shape"),
    ("llama.attention.head_count_kv", "u32", 8, r"attn_k\.weight has shape"),
    ("llama.feed_forward_length", "u32", 512, r"ffn_\w+\.weight has shape \[256, 256\], the header says"),
    ("llama.block_count", "u32", 5, r"no tensor blk\.4\.\w+\.weight, which a model of 5 layers"),
    ("llama.block_count", "u32", 3, r"holds 'blk\.3\.\w+\.weight', which a llama of 3 layers does not have"),
    ("llama.block_count", "u32", 0, "block_count"),
    ("llama.attention.layer_norm_rms_epsilon", "string", "x", "a number is expected"),
    ("llama.rope.freq_base", "f32", 0.0, "where a number above 0 is expected"),
    ("tokenizer.ggml.tokens", "string", ["a", "b"], "lists 2 tokens, but its embeddings have 256 rows"),
    ("llama.attention.key_length", "u32", 1 << 30, "keys of 1073741824|shape"),
    ("split.count", "u32", 2, "part 1 of 2 of a model, but is not named like one")])
def test_headers_that_cannot_be_are_refused(parts: Parts, tmp_path: Path, key: str, kind: Any, value: Any,
                                            message: str) -> None:
    parts.set(key, kind, value)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(parts.write(tmp_path / "model.gguf"))
    assert "config.json" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(("key", "kind", "value", "message"), [
    ("tokenizer.ggml.pre", "string", "mpt", "names the rule 'mpt'.*not known here; known are"),
    ("tokenizer.ggml.pre", None, None, "names no rule by which text is split"),
    ("tokenizer.ggml.model", "string", "t5", r"of the kind 't5' \(Unigram\)"),
    ("tokenizer.ggml.merges", None, None, "without merges"),
    ("tokenizer.ggml.merges", "i32", [1, 2], "where a list of texts is expected"),
    ("tokenizer.ggml.token_type", "i32", [1, 1], "256 tokens, but types of 2"),
    ("tokenizer.ggml.model", "string", "llama", "without a score for every token")])
def test_tokenizers_that_are_not_known_are_refused(parts: Parts, tmp_path: Path, key: str, kind: Any, value: Any,
                                                   message: str) -> None:
    if kind is None:
        del parts.entries[key]
    else:
        parts.set(key, kind, value)
    checkpoint = Checkpoint.open(parts.write(tmp_path / "model.gguf"))
    with pytest.raises(CheckpointError, match=message):
        _ = checkpoint.codec


def test_damaged_files_are_refused(parts: Parts, tmp_path: Path) -> None:
    path = parts.write(tmp_path / "model.gguf")
    content = path.read_bytes()
    for size in (0, 3, 12, 400, len(content) // 2, len(content) - 4096):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"not a GGUF file|cut short|more than it can hold"):
            Checkpoint.open(path)
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + content[8:])
    with pytest.raises(CheckpointError, match="big-endian"):
        Checkpoint.open(path)
    for gone in ("token_embd.weight", "output_norm.weight", "blk.2.attn_norm.weight", "blk.3.ffn_down.weight"):
        with pytest.raises(CheckpointError, match=rf"{gone}.*incomplete"):
            Checkpoint.open(parts.write(path, [name for name in parts.tensors if name != gone]))
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "none.gguf")
    kept = parts.tensors["blk.0.attn_norm.weight"]
    parts.tensors["blk.0.attn_norm.weight"] = "iq4_nl", (256,), bytes(8 * 18)
    with pytest.raises(CheckpointError, match=r"attn_norm.*stored as iq4_nl, where a row of numbers"):
        Checkpoint.open(parts.write(path))
    parts.tensors["blk.0.attn_norm.weight"] = kept
    parts.tensors["blk.0.ffn_gate_inp.weight"] = parts.tensors["blk.0.attn_norm.weight"]
    with pytest.raises(CheckpointError, match=r"ffn_gate_inp.*is not part of a llama model"):
        Checkpoint.open(parts.write(path))


def test_a_shrunken_file_is_reported_when_it_is_read(parts: Parts, tmp_path: Path) -> None:
    path = parts.write(tmp_path / "model.gguf")
    checkpoint = Checkpoint.open(path)
    path.write_bytes(path.read_bytes()[:-200_000])
    with pytest.raises(CheckpointError, match="bytes early"):
        effective(checkpoint)


# -- Llama 3's scaling ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("head_dim", "factor", "low", "high", "context"), [
    (128, 8.0, 1.0, 4.0, 8192), (64, 32.0, 1.0, 4.0, 8192), (16, 8.0, 1.0, 4.0, 64), (64, 4.0, 1.0, 8.0, 4096),
    (64, 2.5, 2.0, 6.0, 2048), (128, 16.0, 0.5, 3.0, 1000), (8, 8.0, 1.0, 4.0, 8192)])
def test_the_scaling_follows_from_its_factors(head_dim: int, factor: float, low: float, high: float, context: int) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": context}
    config = {"model_type": "llama", "head_dim": head_dim, "hidden_size": 2 * head_dim, "num_attention_heads": 2,
              "num_hidden_layers": 1, "rope_parameters": rope}
    factors = rope_factors(ModelSpec(config, None, (0,)))
    found = llama3_scaling(factors.tolist(), head_dim, 500000.0)
    assert found is not None
    again = rope_factors(ModelSpec(config | {"rope_parameters": rope | found}, None, (0,)))
    assert torch.allclose(again, factors, rtol=1e-5)
    if (low, high) == (1.0, 4.0) and head_dim > 8:
        assert {**rope, **found} == rope


def test_factors_of_another_scaling_are_refused(parts: Parts, tmp_path: Path) -> None:
    kind, shape, data = parts.tensors["rope_freqs.weight"]
    factors = np.frombuffer(data, "<f4").copy()
    for change in (factors[::-1].copy(), factors * 0.5, np.full_like(factors, np.nan), np.linspace(1, 9, len(factors))):
        parts.tensors["rope_freqs.weight"] = kind, shape, np.asarray(change, "<f4").tobytes()
        with pytest.raises(CheckpointError, match=r"rope_freqs.*not those of Llama 3's scaling"):
            Checkpoint.open(parts.write(tmp_path / "model.gguf"))
    parts.tensors["rope_freqs.weight"] = kind, shape, np.ones_like(factors).tobytes()
    rope = Checkpoint.open(parts.write(tmp_path / "model.gguf")).spec.hf_config.rope_parameters
    assert rope["rope_type"] == "default"
