"""Every family from checkpoint to file: narrowed, pruned and rounded, evaluated, exported, and refused where it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tsotsallm
from tests.conftest import MORE_FAMILIES, build
from tests.export.test_gguf import IDS, compare
from tsotsallm.checkpoint.families import FAMILIES
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import CheckpointError, ExportError
from tsotsallm.export.gguf import export_gguf
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.score import final_states, token_losses

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"windows": 4, "window": 48}


def losses(model: Path, scratch: Path) -> torch.Tensor:
    """The streamed losses of IDS, (tokens − 1,)."""
    view, corpus = View.of(Checkpoint.open(model)), Corpus((torch.tensor(IDS),), "ids")
    return token_losses(view, [final_states(view, corpus, scratch / "states", CPU)], corpus, CPU)[0]


@pytest.mark.parametrize("family", sorted(MORE_FAMILIES))
def test_a_narrowed_and_pruned_model_runs_alike_everywhere(family: str, text: Path, tmp_path: Path) -> None:
    source, out = build(tmp_path / "source", family), tmp_path / "out"
    recipe = [{"neurons": {"feed_forward": 0.34, "kv_groups": 1}}, "wanda:2:4"]
    result = tsotsallm.compress(source, recipe, out, calibration=text, **SMALL)
    assert result.result_bytes < 0.8 * sum(path.stat().st_size for path in source.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(IDS[1:]), reduction="none")
    torch.testing.assert_close(losses(out, tmp_path), expected, rtol=1e-4, atol=1e-4)
    export_gguf(Checkpoint.open(out), tmp_path / "model.gguf")
    compare(out, tmp_path / "model.gguf", IDS, 1e-3)


def test_unknown_families_are_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "ministral4"}')
    with pytest.raises(CheckpointError, match=r"unknown architecture 'ministral4'; did you mean 'ministral3?'\? \(known: .*llama"):
        Checkpoint.open(tmp_path)


def test_ministral_3_needs_the_numbers_of_its_attention(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(CheckpointError, match=r"llama_4_scaling_beta is None; it must be a number"):
        Checkpoint.open(build(tmp_path / "model", "ministral3", rope_parameters=rope))


def test_documents_name_every_family() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
    assert not [name for name in FAMILIES if f"`{name}`" not in page]


@pytest.mark.parametrize(("family", "changes", "why"), [
    ("seed_oss", {"attention_out_bias": True}, "o_proj.bias, which llama.cpp's seed_oss does not load"),
    ("ernie4_5", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "by yarn, which is not"),
    ("ministral3", {"rope_parameters": MORE_FAMILIES["ministral3"]["rope_parameters"] | {"mscale": 0.5}}, "mscale of its own")])
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    model = build(tmp_path / "model", family, **changes)
    with pytest.raises(ExportError, match=why):
        export_gguf(Checkpoint.open(model), tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))
