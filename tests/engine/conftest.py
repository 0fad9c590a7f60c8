"""The embedded model in both engines."""

from __future__ import annotations

import pytest

import tsotsallm
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.interface import Speaker
from tsotsallm.engine.llama import Llama
from tsotsallm.engine.transformer import Transformer

PROMPT = "Question: Where was Ada born? Answer:"


@pytest.fixture(scope="package")
def ours() -> Transformer:
    return Transformer(Checkpoint.open("embedded"))


@pytest.fixture(scope="package")
def both(ours: Transformer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Speaker]:
    pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tsotsallm.to_gguf("embedded", path, dense="f32", verify=False)
    return {"checkpoint": ours, "gguf": Llama(path, kv="f32", threads=1, slots=2)}
