"""GGUF files of several ages and makers, against the gguf library and llama.cpp; damaged ones end in one line."""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.checkpoint.damage import rewritten
from tests.conftest import build
from tsotsallm.checkpoint.gguf_file import FILE_TYPES, TYPES, GgufFile, begins_as_gguf
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import CheckpointError
from tsotsallm.export.gguf import export_gguf

OPTIONAL = ("attention.key_length", "attention.value_length", "attention.head_count_kv", "vocab_size",
            "rope.dimension_count", "rope.freq_base")
FACTS = ("layers", "hidden", "context", "vocabulary", "heads", "kv_heads", "key_length", "value_length", "feed_forward",
         "cache_elements_per_token", "tokenizer", "parameters", "quantisation", "recipe", "experts")


@pytest.fixture(scope="module")
def modern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with all keys that we write, of a model with as many key heads as heads."""
    folder = tmp_path_factory.mktemp("modern")
    export_gguf(Checkpoint.open(build(folder / "source", "llama2", max_position_embeddings=64)), folder / "model.gguf")
    return folder / "model.gguf"


def refused(path: Path) -> str:
    """The one line that opening a file ends in."""
    with pytest.raises(CheckpointError) as error:
        GgufFile.open(path).require_language_model()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))
    assert "Error" not in message
    return message


# -- what files say ---------------------------------------------------------------------------------------------------


def test_types_are_those_of_the_library() -> None:
    sizes = {kind.value: (kind.name.lower(), *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert sizes == {number: TYPES[number] for number in sizes}
    named = {kind.value: kind.name.removeprefix("ALL_").removeprefix("MOSTLY_") for kind in gguf.LlamaFileType}
    named.pop(1024)
    assert {number: FILE_TYPES.get(number) for number in named} == named


def test_all_is_read_as_the_library_reads_it(family_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint, path = Checkpoint.open(family_checkpoint), tmp_path / "model.gguf"
    export_gguf(checkpoint, path)
    file, reader, spec = GgufFile.open(path), gguf.GGUFReader(path), checkpoint.spec
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "tokenizer.ggml.merges":
            assert file.fields[key] == field.contents(), key
    assert file.fields["tokenizer.ggml.merges"] == len(reader.fields["tokenizer.ggml.merges"].contents())
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        mine = file.tensors[tensor.name]
        assert (mine.type, mine.start, mine.size) == (tensor.tensor_type.name.lower(), tensor.data_offset, tensor.n_bytes)
        assert mine.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert b"".join(part.tobytes() for part in file.rows(mine)) == np.asarray(tensor.data).tobytes()
    file.require_language_model()
    assert (file.layers, file.hidden, file.vocabulary) == (spec.layers, spec.hidden, spec.vocabulary)
    assert file.heads == (spec.heads,) * spec.layers
    assert file.kv_heads == (spec.kv_heads,) * spec.layers
    assert (file.key_length, file.value_length) == (spec.head_dim, spec.head_dim)
    assert file.feed_forward == (spec.feed_forward,) * spec.layers
    assert file.cache_elements_per_token == spec.kv_bytes_per_token(1)


@pytest.mark.parametrize("missing", [*((key,) for key in OPTIONAL), OPTIONAL], ids=lambda keys: "+".join(keys))
def test_what_is_optional_has_llama_cpps_default(modern: Path, tmp_path: Path, missing: tuple[str, ...]) -> None:
    """Files of older converters: everything that may be left out is, and all facts stay the same."""
    file, whole = GgufFile.open(rewritten(modern, tmp_path / "old.gguf", missing)), GgufFile.open(modern)
    assert not any(f"llama.{key}" in file.fields for key in missing)
    file.require_language_model()
    for name in FACTS:
        assert getattr(file, name) == getattr(whole, name), name


def test_an_old_file_runs_and_says_the_same(modern: Path, tmp_path: Path) -> None:
    from tsotsallm.engine.llama import Llama

    old = rewritten(modern, tmp_path / "old.gguf", (*OPTIONAL, "general.name", "tokenizer.ggml.add_bos_token"))
    ids = [3, 141, 59, 26, 53, 58]
    engines = [Llama(path, kv="f32", context=32, threads=1) for path in (modern, old)]
    assert engines[0].cache_bytes_per_token == engines[1].cache_bytes_per_token == 4 * 2 * 4 * 64
    new, same = (list(engine.log_likelihoods(ids)) for engine in engines)
    assert new == pytest.approx(same, abs=1e-6)


def test_heads_may_differ_from_layer_to_layer(modern: Path, tmp_path: Path) -> None:
    file = GgufFile.open(rewritten(modern, tmp_path / "a.gguf", attention__head_count=[4, 2, 4, 0],
                                   attention__head_count_kv=[2, 1, 4, 0], feed_forward_length=[96, 64, 96, 32]))
    assert (file.heads, file.kv_heads, file.feed_forward) == ((4, 2, 4, 0), (2, 1, 4, 0), (96, 64, 96, 32))
    assert file.cache_elements_per_token == 7 * 2 * 16
    without = GgufFile.open(rewritten(modern, tmp_path / "b.gguf", ("attention.head_count_kv", "attention.key_length"),
                                      attention__head_count=[4, 2, 4, 0]))
    assert (without.kv_heads, without.key_length) == ((4, 2, 4, 0), 64 // 4)
    short = GgufFile.open(rewritten(modern, tmp_path / "c.gguf", attention__head_count=[4, 2]))
    with pytest.raises(CheckpointError, match=r"gives llama\.attention\.head_count as \[4, 2\], .* each of 4 layers"):
        _ = short.heads


def test_values_of_another_length_count(modern: Path, tmp_path: Path) -> None:
    file = GgufFile.open(rewritten(modern, tmp_path / "a.gguf", attention__key_length=24, attention__value_length=8))
    assert file.cache_elements_per_token == 4 * 4 * (24 + 8)


@pytest.mark.parametrize("key", ["context_length", "embedding_length", "block_count", "tokenizer.ggml.model",
                                 "tokenizer.ggml.tokens"])
def test_what_llama_cpp_needs_is_named(modern: Path, tmp_path: Path, key: str) -> None:
    """No default exists for these: llama.cpp refuses the file too."""
    import xllamacpp

    path = rewritten(modern, tmp_path / "cut.gguf", (key,))
    named = key if key.startswith("tokenizer") else f"llama.{key}"
    assert f"has no {named} in its header" in refused(path)
    asked = xllamacpp.CommonParams()
    asked.model.path, asked.verbosity, asked.n_ctx = str(path), -1, 32
    with pytest.raises(RuntimeError):
        xllamacpp.Server(asked)


def test_no_language_models_are_told_apart(modern: Path, tmp_path: Path) -> None:
    assert "is an adapter" in refused(rewritten(modern, tmp_path / "a.gguf", general__type="adapter"))
    assert "sees pictures" in refused(rewritten(modern, tmp_path / "b.gguf", general__architecture="clip"))
    assert "'imatrix', not a language model" in refused(rewritten(modern, tmp_path / "c.gguf", general__type="imatrix"))
    assert "part 2 of 3" in refused(rewritten(modern, tmp_path / "d.gguf", split__no=1, split__count=3))
    first = GgufFile.open(rewritten(modern, tmp_path / "e.gguf", split__no=0, split__count=3))
    first.require_language_model()
    assert first.split == (1, 3)
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    for key in ("block_count", "context_length", "embedding_length"):
        writer.add_uint32(f"llama.{key}", 8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "a vocabulary but no weights" in refused(tmp_path / "v.gguf")


def test_strange_values_are_quoted(modern: Path, tmp_path: Path) -> None:
    for number, (key, value) in enumerate({"block_count": "many", "context_length": 0, "embedding_length": 1.5,
                                           "general__architecture": "x" * 300}.items()):
        message = refused(rewritten(modern, tmp_path / f"{number}.gguf", **{key: value}))
        assert "is expected" in message or "has no" in message
    for number, (key, value) in enumerate({"attention__layer_norm_rms_epsilon": -1.0, "rope__freq_base": float("nan"),
                                           "rope__scale_linear": float("inf")}.items()):
        assert "a finite number" in refused(rewritten(modern, tmp_path / f"float-{number}.gguf", **{key: value}))
    assert "from 1 to 10000" in refused(rewritten(modern, tmp_path / "deep.gguf", block_count=4_000_000_000))
    assert "a list of texts" in refused(rewritten(modern, tmp_path / "words.gguf", tokenizer__ggml__tokens=[1, 2]))


def test_special_tokens_have_llama_cpps_defaults(modern: Path, tmp_path: Path) -> None:
    def tokenizer(name: str, **changes: Any) -> Any:
        keys = ("bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token")
        left_out = tuple(f"tokenizer.ggml.{key}" for key in keys)
        return GgufFile.open(rewritten(modern, tmp_path / f"{name}.gguf", left_out, **changes)).tokenizer

    plain = tokenizer("plain", tokenizer__ggml__pre="default")
    assert (plain.kind, plain.bos, plain.eos, plain.adds_bos, plain.adds_eos) == ("byte-level BPE", 11, 11, False, False)
    assert tokenizer("llama3", tokenizer__ggml__pre="llama-bpe").adds_bos
    pieces = tokenizer("pieces", tokenizer__ggml__model="llama")
    assert (pieces.kind, pieces.bos, pieces.eos, pieces.adds_bos) == ("SentencePiece", 1, 2, True)
    assert not tokenizer("asked", tokenizer__ggml__model="llama", tokenizer__ggml__add_bos_token=False).adds_bos
    assert tokenizer("far", tokenizer__ggml__model="llama", tokenizer__ggml__bos_token_id=70_000).bos == 1
    few = tokenizer("few", tokenizer__ggml__model="bert", tokenizer__ggml__tokens=["a", "b"])
    assert (few.bos, few.adds_bos) == (None, False)


# -- files of other kinds, and damaged ones ---------------------------------------------------------------------------


def test_versions_and_byte_orders(modern: Path, tmp_path: Path) -> None:
    content = modern.read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(content[:4] + struct.pack("<I", 2) + content[8:])
    assert GgufFile.open(path).version == 2
    for version, words in ((1, "version 1; versions 2 and 3 are read: convert"), (4, "a newer tsotsallm"), (77, "a newer")):
        path.write_bytes(content[:4] + struct.pack("<I", version) + content[8:])
        assert words in refused(path)
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "big-endian" in refused(path)


def test_other_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert "does not exist" in refused(path)
    for content, words in ((b"", "it is empty"), (b"PK\x03\x04abc", "does not begin with GGUF"), (b"GGU", "does not begin")):
        path.write_bytes(content)
        assert f"is not a GGUF file ({words}" in refused(path) or words in refused(path)
        assert not begins_as_gguf(path)
    path.unlink()
    path.mkdir()
    assert "a directory" in refused(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_devices_and_pipes_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    os.mkfifo(path)
    assert "a FIFO" in refused(path)
    assert not begins_as_gguf(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "a device" in refused(path)


def header(*, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words.encode())) + words.encode()


def tensor(name: str, *sizes: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", len(sizes)) + b"".join(struct.pack("<Q", one) for one in sizes) + struct.pack(
        "<IQ", kind, offset)


def key(words: str, *parts: int, form: str = "<I") -> bytes:
    """A header with one key whose type and value are numbers, and some bytes after it."""
    return header(keys=1, rest=text(words) + struct.pack(form, *parts) + bytes(64))


def weights(*entries: bytes) -> bytes:
    return header(tensors=len(entries), rest=b"".join(entries) + bytes(256))


NAME, ALIGNMENT = "general.name", "general.alignment"
CASES = {
    "tensors without end": (header(tensors=1 << 60), "claims to have 1152921504606846976 tensors"),
    "keys without end": (header(keys=1 << 60), "claims to have 1152921504606846976 keys"),
    "negative": (header(tensors=(1 << 64) - 1), "claims to have"),
    "a key of gigabytes": (header(keys=1, rest=struct.pack("<Q", 3 << 30) + bytes(64)), "a text of 3221225472 bytes"),
    "a text of gigabytes": (key(NAME, 8, 3 << 30, form="<IQ"), "a text of 3221225472 bytes"),
    "a text past the end": (key(NAME, 8, 1 << 20, form="<IQ"), "ends within 'general.name'"),
    "an array without end": (key(NAME, 9, 4, 1 << 60, form="<IIQ"), "elements, more than"),
    "texts without end": (key(NAME, 9, 8, 1 << 40, form="<IIQ"), "elements, more than"),
    "an array of arrays": (key(NAME, 9, 9, 2, form="<IIQ"), "elements of type 9"),
    "no such type": (key(NAME, 13), "type of number 13"),
    "a key without a name": (key("", 4), "a key without a name"),
    "a key twice": (header(keys=2, rest=2 * (text(NAME) + struct.pack("<II", 4, 1))), "names 'general.name' twice"),
    "alignment 3": (key(ALIGNMENT, 4, 3, form="<II"), "not a power of two"),
    "alignment 8": (key(ALIGNMENT, 4, 8, form="<II"), "llama.cpp needs 32"),
    "alignment 0": (key(ALIGNMENT, 4, 0, form="<II"), "a number from 1"),
    "five dimensions": (weights(tensor("a", 1, 1, 1, 1, 1)), "5 dimensions"),
    "weights without end": (weights(tensor("a", 1 << 62, 1 << 62, 1 << 62)), "'a' alone has"),
    "half a block": (weights(tensor("a", 40, 2, kind=2)), "in blocks of 32, with rows of 40"),
    "an unknown type": (weights(tensor("a", 4, kind=999)), "as type 999, which is not known"),
    "an old type": (weights(tensor("a", 32, kind=4)), "as type 4, which is not known"),
    "beyond the end": (weights(tensor("a", 4, offset=1 << 40)), "cut short"),
    "not aligned": (weights(tensor("a", 4, offset=8)), "at byte 8"),
    "a number in blocks": (weights(tensor("a", kind=2)), "with rows of 1"),
    "a tensor twice": (weights(tensor("a", 4), tensor("a", 4, offset=32)), "the tensor 'a' twice"),
    "overlap": (weights(tensor("a", 16), tensor("b", 16, offset=32)), "overlap"),
    "nothing at all": (header(), "has no general.architecture"),
    "cut in its counts": (header()[:12], "ends within its header"),
}


@pytest.mark.parametrize("case", CASES)
def test_damaged_headers(case: str, tmp_path: Path) -> None:
    content, words = CASES[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert words in refused(path)


def test_a_file_that_is_cut_anywhere(modern: Path, tmp_path: Path) -> None:
    content, path = modern.read_bytes(), tmp_path / "model.gguf"
    places = [*range(4, 200), *random.Random(0).sample(range(200, len(content)), 150), len(content) - 1]
    for place in places:
        path.write_bytes(content[:place])
        message = refused(path)
        assert "cut short" in message or "ends within" in message or "more than it can hold" in message, place


def test_bytes_changed_anywhere_end_in_one_line_or_nothing(modern: Path, tmp_path: Path) -> None:
    content, path, rng = modern.read_bytes(), tmp_path / "model.gguf", random.Random(1)
    end = GgufFile.open(modern).tensors["token_embd.weight"].start
    messages = []
    for _ in range(600):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(end)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(changed)
        try:
            file = GgufFile.open(path)
            file.require_language_model()
            for name in FACTS:
                getattr(file, name)
        except CheckpointError as error:
            messages.append(str(error))
    assert 0 < len(messages) < 600
    assert not any("\n" in message or len(message) > 500 + len(str(path)) for message in messages)


def test_a_big_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    def words(name: str, count: int) -> bytes:
        return text(name) + struct.pack("<IIQ", 9, 8, count) + b"".join(text(f"word{place}") for place in range(count))

    path = tmp_path / "model.gguf"
    path.write_bytes(header(keys=2, rest=words("tokenizer.ggml.tokens", 256_000) + words("tokenizer.ggml.merges", 400_000)))
    began = time.process_time()
    file = GgufFile.open(path)
    assert time.process_time() - began < 5
    assert file.tokens[255_999] == "word255999"
    assert file.fields["tokenizer.ggml.merges"] == 400_000
