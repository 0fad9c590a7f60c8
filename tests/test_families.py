"""Every family from checkpoint to file: narrowed, pruned and rounded, evaluated, exported, and refused where it must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tsotsallm
from tests.conftest import MORE_FAMILIES, build
from tests.export.test_gguf import IDS, compare
from tsotsallm.calibration import Calibration, calibration_corpus
from tsotsallm.checkpoint import gguf_vocabulary
from tsotsallm.checkpoint.families import FAMILIES
from tsotsallm.checkpoint.gguf_layout import Labels, layout_of, vocabulary_entries
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import CheckpointError, ExportError, RecipeError
from tsotsallm.export.gguf import export_gguf
from tsotsallm.stages.adapt import Adapt
from tsotsallm.stages.contract import Model
from tsotsallm.stages.neurons import Neurons, grams_behind, updated
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.score import final_states, token_losses
from tsotsallm.streaming.sweep import SweepOptions, TwoStates, embed_corpus, sweep

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"windows": 4, "window": 48}


def losses(model: Path, scratch: Path) -> torch.Tensor:
    """The streamed losses of IDS, (tokens − 1,)."""
    view, corpus = View.of(Checkpoint.open(model)), Corpus((torch.tensor(IDS),), "ids")
    return token_losses(view, [final_states(view, corpus, scratch / "states", CPU)], corpus, CPU)[0]


@pytest.mark.parametrize("family", sorted(MORE_FAMILIES))
def test_a_narrowed_and_pruned_model_runs_alike_everywhere(family: str, text: Path, tmp_path: Path) -> None:
    changes = {"phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}}
    source, out = build(tmp_path / "source", family, **changes.get(family, {})), tmp_path / "out"
    recipe = [{"neurons": {"feed_forward": 0.34, "kv_groups": 1}}, "wanda:2:4"]
    result = tsotsallm.compress(source, recipe, out, calibration=text, **SMALL)
    assert result.result_bytes < 0.8 * sum(path.stat().st_size for path in source.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(IDS[1:]), reduction="none")
    torch.testing.assert_close(losses(out, tmp_path), expected, rtol=1e-4, atol=1e-4)
    if FAMILIES[Checkpoint.open(out).spec.family].gguf.square:
        with pytest.raises(ExportError, match="leave kv_groups out of neurons"):
            export_gguf(Checkpoint.open(out), tmp_path / "model.gguf")
        out = tmp_path / "square"
        tsotsallm.compress(source, [{"neurons": {"feed_forward": 0.34}}], out, calibration=text, **SMALL)
    checkpoint = Checkpoint.open(out)
    found = export_gguf(checkpoint, tmp_path / "model.gguf")
    compare(out, tmp_path / "model.gguf", IDS, 1e-3)
    vocabulary = vocabulary_entries(gguf_vocabulary.read_vocabulary(checkpoint.codec))
    assert layout_of(checkpoint.spec, vocabulary, Labels.of(checkpoint, out.name), dense="f32").total_bytes == found.bytes


def test_unknown_families_are_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "ministral4"}')
    with pytest.raises(CheckpointError, match="unknown architecture 'ministral4'; did you mean 'ministral"):
        Checkpoint.open(tmp_path)


def test_ministral_3_needs_the_numbers_of_its_attention(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(CheckpointError, match=r"llama_4_scaling_beta is None; it must be a number"):
        Checkpoint.open(build(tmp_path / "model", "ministral3", rope_parameters=rope))


@pytest.mark.parametrize(("family", "key", "value"), [
    ("granite", "logits_scaling", 0.0), ("granite", "embedding_multiplier", -1.0),
    ("gemma2", "final_logit_softcapping", 0.0)])
def test_scalings_that_cannot_be_are_refused(family: str, key: str, value: float, tmp_path: Path) -> None:
    path = build(tmp_path / "model", family)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=r"it must be a number above 0"):
        Checkpoint.open(path)


def test_documents_name_every_family() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
    assert not [name for name in FAMILIES if f"`{name}`" not in page]


@pytest.mark.parametrize(("family", "changes", "why"), [
    ("seed_oss", {"attention_out_bias": True}, "o_proj.bias, which llama.cpp's seed_oss does not load"),
    ("ernie4_5", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "by yarn, which is not"),
    ("ministral3", {"rope_parameters": MORE_FAMILIES["ministral3"]["rope_parameters"] | {"mscale": 0.5}}, "mscale of its"),
    ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping is null"),
    ("gemma2", {"tie_word_embeddings": False}, "llama.cpp's gemma2 uses the embeddings"),
    ("gemma2", {"query_pre_attn_scalar": 16}, "16, but llama.cpp computes a gemma2 of 4 layers with 24"),
    ("gemma3", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 4}, "each 6th for one with a window"),
    ("gemma3", {"hidden_activation": "silu"}, "computes every gemma3_text with gelu_pytorch_tanh"),
    ("exaone4", {"sliding_window": 9, "layer_types": None}, "but each 4th for one with a window, in models of 64 layers"),
    ("olmo3", {"rope_parameters": MORE_FAMILIES["olmo3"]["rope_parameters"] | {
        "full_attention": MORE_FAMILIES["olmo3"]["rope_parameters"]["full_attention"] | {"beta_fast": 16.0}}},
     "beta_fast 16 and beta_slow 1, but llama.cpp computes olmo2 with 32 and 1"),
    ("olmo3", {"layer_types": ["full_attention", *["sliding_attention"] * 3]}, "but each 4th for one with a window")])
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, changes: dict[str, Any], why: str,
                                                      tmp_path: Path) -> None:
    model = build(tmp_path / "model", family, **changes)
    with pytest.raises(ExportError, match=why):
        export_gguf(Checkpoint.open(model), tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_run_of_layers_becomes_a_map_where_branches_are_scaled(text: Path, tmp_path: Path) -> None:
    """On the tokens that it was fitted on, the map has the least squared error relative to each token's state."""
    source, out = build(tmp_path / "source", "granite", seed=3), tmp_path / "out"
    stage = {"replace": {"remove": 1, "damp": 0.0, "protect": {"first": 2, "last": 1}}}
    tsotsallm.compress(source, [stage], out, calibration=text, **SMALL)
    windows = torch.stack(calibration_corpus(Checkpoint.open(source), Calibration(str(text), 4, 48)).windows)
    whole, shorter = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model for path in (source, out))
    seen: list[torch.Tensor] = []
    whole.layers[1].mlp.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        states = whole(windows, output_hidden_states=True).hidden_states
        found = shorter(windows, output_hidden_states=True).hidden_states[2]
    added = (seen[0] * whole.config.residual_multiplier).flatten(0, 1).double()
    before, after = (states[place].flatten(0, 1).double() for place in (2, 3))
    rows = after.square().mean(-1, keepdim=True).rsqrt()
    best = before - added + added @ torch.linalg.lstsq(rows * added, rows * (after - before + added)).solution
    error, least = ((rows * (one - after)).norm() for one in (found.flatten(0, 1), best))
    assert float(error) == pytest.approx(float(least), rel=1e-3)


@pytest.mark.parametrize("family", ["olmo2", "exaone4"])
def test_what_runs_on_after_narrowing_is_what_is_written(family: str, text: Path, tmp_path: Path) -> None:
    """Layers are narrowed with the outputs of the narrower ones before them, norms that span all heads included."""
    source, out = build(tmp_path / "source", family), tmp_path / "out"
    stage = Neurons(feed_forward=0.34, kv_groups=1)
    tsotsallm.compress(source, [{"neurons": {"feed_forward": 0.34, "kv_groups": 1}}], out, calibration=text, **SMALL)
    view = View.of(Checkpoint.open(source))
    corpus = calibration_corpus(view.checkpoint, Calibration(str(text), 4, 48))
    states = TwoStates(tmp_path / "states", [48] * 4, 64)
    embed_corpus(view, corpus, states.inputs_of(0))
    for visit in sweep(view, states, observe=True, device=CPU, options=SweepOptions(beyond=True)):
        stage.reshape(visit, view.spec)
    narrowed = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).model
    narrowed.norm = torch.nn.Identity()
    with torch.no_grad():
        expected = narrowed(torch.stack(corpus.windows)).last_hidden_state
    # the norms' ε counts otherwise over fewer numbers
    torch.testing.assert_close(states.inputs_of(4).read(range(4)), expected, rtol=1e-2, atol=1e-2)


def test_compensation_is_fitted_behind_the_norm(text: Path, tmp_path: Path) -> None:
    """What leaves the norm is nearer to the original's than with a fit before it."""
    source = build(tmp_path / "source", "olmo2")
    view = View.of(Checkpoint.open(source))
    corpus = calibration_corpus(view.checkpoint, Calibration(str(text), 4, 48))
    states = TwoStates(tmp_path / "states", [48] * 4, 64)
    embed_corpus(view, corpus, states.inputs_of(0))
    # tokens whose branch is large would otherwise decide the fit
    visit = next(sweep(view, states, observe=True, device=CPU))
    reader = visit.frame.linear("mlp.down_proj")
    inputs: list[torch.Tensor] = []
    with visit.frame.watching(["mlp.down_proj"], lambda _name, seen: inputs.append(seen), to_the_end=True), torch.no_grad():
        visit.frame(states.inputs_of(0).read(range(4)))
    read = inputs[0].flatten(0, 1)
    kept = torch.arange(0, 96, 2)
    grams = {"before": visit.gram_of("mlp.down_proj"),
             "behind": grams_behind(visit, ["mlp.down_proj"], 1e-5)["mlp.down_proj"]}
    gaps = {}
    for name, gram in grams.items():
        new = updated(reader.weight.data, gram.matrix, kept, 1e-4, name)
        wanted, found = (torch.nn.functional.rms_norm(one, (64,)) for one in (
            read @ reader.weight.data.mT, read[:, kept] @ new.mT))
        gaps[name] = float((wanted - found).square().sum())
    assert gaps["behind"] < gaps["before"]


def test_replace_is_refused_where_a_norm_follows(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"a norm follows it \(post_feedforward_layernorm\).*depth:1"):
        tsotsallm.plan(build(tmp_path / "model", "olmo2"), "replace:1")


def test_layers_in_an_order_that_llama_cpp_does_not_know_keep_their_meaning_within_a_window(tmp_path: Path) -> None:
    source, out = build(tmp_path / "source", "gemma2"), tmp_path / "out"
    tsotsallm.compress(source, [{"layers": {"skip": [0]}}], out)
    found = export_gguf(Checkpoint.open(out), tmp_path / "model.gguf")
    assert any("attend to 9 tokens only" in note for note in found.notes)
    compare(out, tmp_path / "model.gguf", IDS[:8], 1e-3)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_attention_in_both_directions_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="attention in both directions"):
        Checkpoint.open(build(tmp_path / "model", family, use_bidirectional_attention=True))


def test_hybrid_exaone_streams_as_it_runs(tmp_path: Path) -> None:
    """Layers without a window have no RoPE there."""
    model = build(tmp_path / "model", "exaone4", sliding_window=9, layer_types=["sliding_attention", "full_attention"] * 2)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = whole(torch.tensor([IDS])).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(IDS[1:]), reduction="none")
    torch.testing.assert_close(losses(model, tmp_path), expected, rtol=1e-4, atol=1e-4)


def test_tokenizers_like_gemmas_split_at_spaces_that_are_gone() -> None:
    steps = {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
             "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}}
    assert gguf_vocabulary._leading_space(steps, "it") == "never"
    with pytest.raises(ExportError, match="Split"):
        gguf_vocabulary._leading_space(steps | {"normalizer": None}, "it")


def test_fused_linears_are_trained_by_the_names_of_their_parts(tmp_path: Path) -> None:
    spec = Checkpoint.open(build(tmp_path / "model", "phi")).spec
    assert {name for _, name in Adapt(targets=["q", "v"]).places(spec)} == {"self_attn.qkv_proj"}
    assert {name for _, name in Adapt(targets=["up", "down"]).places(spec)} == {"mlp.gate_up_proj", "mlp.down_proj"}


def test_long_rope_keeps_to_the_original_context(tmp_path: Path) -> None:
    spec = Checkpoint.open(build(tmp_path / "model", "phi")).spec
    assert (spec.context, spec.rotated) == (256, 12)
    with pytest.raises(RecipeError, match="usable: none"):
        tsotsallm.plan(tmp_path / "model", [{"neurons": {"kv_groups": 1}}])


def test_fewer_heads_are_remarked_where_engines_or_norms_count_them(tmp_path: Path) -> None:
    spec = Checkpoint.open(build(tmp_path / "model", "olmo2")).spec
    assert len(Neurons(kv_groups=1).remarks(Model.of(spec))) == 2
    assert not Neurons(feed_forward=0.34).remarks(Model.of(spec))


def test_depth_names_its_sources_where_norms_stand_behind_branches(tmp_path: Path) -> None:
    recipe = [{"depth": {"remove": 1, "importance": "magnitude", "protect": {"first": 0, "last": 0}}}]
    [note] = tsotsallm.plan(build(tmp_path / "gemma", "gemma3"), recipe).warnings
    assert "2403.03853" in note
    assert not tsotsallm.plan(build(tmp_path / "llama", "llama2"), recipe).warnings


def test_a_file_of_gemma_passes_its_comparison(tmp_path: Path) -> None:
    found = tsotsallm.to_gguf(build(tmp_path / "model", "gemma3"), tmp_path / "model.gguf", dense="f32")
    assert 0 < found["verified"]["mean"] < found["verified"]["bound"] == 5e-3


# -- models that see pictures too -------------------------------------------------------------------------------------

def with_pictures(directory: Path, whole: str = "gemma3", family: str = "gemma3", *, new: bool = False, **text: Any) -> Path:
    """A checkpoint that holds a text model, an eye, and what joins them; `new`: by the names of transformers 5."""
    plain = build(directory.with_name("plain"), family, **text)
    config = json.loads((plain / "config.json").read_text())
    shared = {key: config.pop(key) for key in ("tie_word_embeddings", "eos_token_id", "dtype")}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({
        "model_type": whole, "architectures": ["Whole"], "text_config": config,
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 8}, "image_token_index": 250, **shared}))
    tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        tensors[name.replace("model.", "model.language_model.", 1) if new else f"language_model.{name}"] = tensor
    before = "model." if new else ""
    tensors[f"{before}vision_tower.vision_model.post_layernorm.weight"] = torch.ones(8)
    tensors[f"{before}multi_modal_projector.mm_input_projection_weight"] = torch.ones(8, 64)
    save_file(tensors, directory / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((plain / name).read_bytes())
    return directory


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "family", "inner"), [
    ("gemma3", "gemma3", "gemma3_text"), ("mistral3", "ministral3", "ministral3"), ("mistral3", "mistral", "mistral")])
def test_of_a_model_that_sees_pictures_the_text_model_is_read(kind: str, family: str, inner: str, new: bool, tied: bool,
                                                              tmp_path: Path) -> None:
    whole = with_pictures(tmp_path / "whole", kind, family, new=new, tie_word_embeddings=tied)
    checkpoint = Checkpoint.open(whole)
    assert (checkpoint.spec.family, checkpoint.spec.tied) == (inner, tied)
    assert checkpoint.records.keys() == Checkpoint.open(tmp_path / "plain").records.keys()
    assert any("sees pictures too: its text model is read, and the 2 tensors" in note for note in checkpoint.notes)
    torch.testing.assert_close(losses(whole, tmp_path), losses(tmp_path / "plain", tmp_path), rtol=0, atol=0)
    tsotsallm.compress(whole, "rtn:8:32", tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").spec.family == inner
    assert not Checkpoint.open(tmp_path / "out").notes


@pytest.mark.parametrize(("text", "message"), [
    (None, "whose text model .text_config. is not there; it must be one of gemma3_text"), ({}, "num_hidden_layers is None"),
    ({"model_type": "llama"}, "is 'llama'; it must be one of gemma3_text")])
def test_a_model_that_sees_pictures_without_its_text_model_is_refused(text: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)
