"""llama-server from the PATH: asked over HTTP it answers as llama.cpp does in this process.

The program on the PATH is a stand-in that understands llama-server's options and starts llama.cpp's own HTTP server, which
xllamacpp holds.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tsotsallm
from tsotsallm.engine import llama
from tsotsallm.engine.interface import Piece, Question, said
from tsotsallm.engine.llama import Llama
from tsotsallm.errors import CheckpointError, MissingExtraError

pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")

PROGRAM = """#!{python}
import argparse, os, signal, sys
import xllamacpp
parser = argparse.ArgumentParser()
for name in ("model", "host", "cache-type-k", "cache-type-v", "flash-attn", "lora"):
    parser.add_argument("--" + name)
for name in ("ctx-size", "parallel", "port", "threads", "cache-ram"):
    parser.add_argument("--" + name, type=int)
parser.add_argument("--no-warmup", action="store_true")
told = parser.parse_args()
asked = xllamacpp.CommonParams()
asked.model.path, asked.n_ctx, asked.n_parallel = told.model, told.ctx_size, told.parallel
asked.hostnames, asked.port, asked.warmup, asked.verbosity, asked.fit_params = [told.host], told.port, False, -1, False
asked.cache_type_k = asked.cache_type_v = getattr(xllamacpp.ggml_type, "GGML_TYPE_" + told.cache_type_k.upper())
kinds = xllamacpp.llama_flash_attn_type
asked.flash_attn_type = (kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED if told.flash_attn == "on" else
                         kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED)
asked.api_keys = [os.environ["LLAMA_API_KEY"]]
server = xllamacpp.Server(asked)
signal.pause()
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tsotsallm.to_gguf("embedded", path, dense="f32", verify=False)
    return path


@pytest.fixture
def without_xllamacpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH that holds llama-server, and no xllamacpp to be found."""
    real = importlib.util.find_spec

    def find(name: str, *more: Any) -> Any:
        return None if name == "xllamacpp" else real(name, *more)

    monkeypatch.setattr(llama.importlib.util, "find_spec", find)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "llama-server"


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script that Windows does not start")
def test_a_server_process_answers_as_the_library_does(file: Path, without_xllamacpp: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    without_xllamacpp.write_text(PROGRAM.format(python=sys.executable))
    without_xllamacpp.chmod(0o755)
    ids = [0, 300, 301, 302, 303, 304]
    outside = Llama(file, kv="f32")
    assert outside._program == str(without_xllamacpp)
    heard: list[Piece] = []
    end = outside.speak(Question("The ", 12, likeliest=2), lambda piece: bool(heard.append(piece)))
    cut = outside.speak(Question("The ", 12), lambda piece: True)
    cut_text = outside.tokenize("The end")
    likelihoods = list(outside.log_likelihoods(ids))
    following = outside.next_log_probabilities(ids)
    answer = said(outside, Question([{"role": "user", "content": "Who is this?"}], 8))
    seconds = outside.timed(ids, 4)
    process = outside._server._process
    del outside
    assert process.poll() is not None               # it ended with the object
    monkeypatch.undo()
    inside = Llama(file, kv="f32")
    text = "".join(piece.text for piece in heard)
    assert text == said(inside, Question("The ", 12))
    assert end.finish in ("stop", "length")
    assert 0 <= end.tokens - sum(len(piece.tokens) for piece in heard) <= 1         # the token that ends a text has none
    assert all(len(token.likeliest) == 2 for piece in heard for token in piece.tokens)
    assert cut.finish == "cancelled"
    assert cut_text == inside.tokenize("The end")
    assert likelihoods == pytest.approx(list(inside.log_likelihoods(ids)), abs=1e-5)
    torch.testing.assert_close(following, inside.next_log_probabilities(ids), atol=1e-5, rtol=0)
    assert answer == said(inside, Question([{"role": "user", "content": "Who is this?"}], 8))
    assert all(one > 0 for one in seconds)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script that Windows does not start")
def test_what_goes_wrong_is_told(file: Path, without_xllamacpp: Path) -> None:
    with pytest.raises(MissingExtraError, match="llama-server on the PATH"):
        Llama(file)
    without_xllamacpp.write_text("#!/bin/sh\nexit 3\n")
    without_xllamacpp.chmod(0o755)
    with pytest.raises(CheckpointError, match="ended with code 3"):
        said(Llama(file), Question("The ", 2))
