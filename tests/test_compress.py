"""The main job end to end on tiny checkpoints, read back by transformers and by ourselves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tsotsallm
from tests.conftest import build
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import RecipeError, ResumeError
from tsotsallm.planning import make_plan
from tsotsallm.recipe import Recipe

SMALL: dict[str, Any] = {"windows": 6, "window": 64}
THREE_STAGES = "[{depth: {remove: 1, protect: {first: 1, last: 1}}}, {sparsity: {prune: 2, group: 4}}, " \
               "{quantize: {bits: 4, group: 32}}]"


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def unpacked_by_transformers(directory: Path) -> dict[str, torch.Tensor]:
    """The weights as transformers and compressed-tensors compute with them, in the stored type."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model(torch.tensor([[3, 70, 80, 90]]))          # compressed-tensors unpacks at the first forward
    return dict(model.state_dict())


def same_bytes(first: Path, second: Path) -> bool:
    return all((second / path.name).read_bytes() == path.read_bytes() for path in first.glob("*.safetensors"))


def test_an_empty_recipe_copies_every_tensor(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "", tmp_path / "copy")
    before, after = tensors_of(tiny), tensors_of(tmp_path / "copy")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_three_stages_load_in_transformers_as_we_read_them(family_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    tsotsallm.compress(family_checkpoint, THREE_STAGES, out, calibration=text, **SMALL)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours, tokenizer = tsotsallm.load(out)
    ids = tokenizer("tell me a story about rain", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)
    checkpoint = Checkpoint.open(out)
    assert checkpoint.spec.layers == 3
    for layer in range(3):
        for name, weight in checkpoint.layer(layer).items():
            if weight.ndim == 2:
                assert bool((weight.view(len(weight), -1, 4) == 0).sum(-1).ge(2).all()), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_every_width_of_codes_loads_exactly(tiny: Path, tmp_path: Path, bits: int, symmetric: bool) -> None:
    out = tmp_path / "small"
    recipe = [{"quantize": {"method": "rtn", "bits": bits, "group": 32, "symmetric": symmetric}}]
    tsotsallm.compress(tiny, recipe, out)
    state = unpacked_by_transformers(out)
    for name, weight in Checkpoint.open(out).layer(0).items():
        assert torch.equal(state[f"model.layers.0.{name}"].float(), weight), name


def test_forecast_bounds_what_is_written(tiny: Path, text: Path, tmp_path: Path) -> None:
    for number, recipe in enumerate(["", "depth:0", "gptq:4:32", "rtn:3:channel", "wanda:2:4", THREE_STAGES]):
        out = tmp_path / str(number)
        forecast = make_plan(Checkpoint.open(tiny), Recipe.parse(recipe), out, windows=6, window=64)
        result = tsotsallm.compress(tiny, recipe, out, calibration=text, **SMALL)
        assert result.result_bytes <= forecast.result_bytes
        assert forecast.result_bytes <= 1.5 * result.result_bytes + 100_000
        assert result.result_parameters == tsotsallm.inspect(out).parameters


def test_the_same_run_gives_the_same_bytes(tiny: Path, text: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tsotsallm.compress(tiny, THREE_STAGES, tmp_path / name, calibration=text, **SMALL)
    assert same_bytes(tmp_path / "a", tmp_path / "b")


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 7, 20, 33, 47])
def test_a_stopped_run_goes_on_to_the_same_bytes(tiny: Path, text: Path, tmp_path: Path, after: int) -> None:
    recipe = f"{THREE_STAGES[:-1]}, {{layers: {{order: [0, 1, 1, 2]}}}}, {{quantize: {{bits: 3, group: 32}}}}]"
    tsotsallm.compress(tiny, recipe, tmp_path / "whole", calibration=text, **SMALL)
    seen = 0

    def stop(_progress: object) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            raise Stop

    with pytest.raises(Stop):
        tsotsallm.compress(tiny, recipe, tmp_path / "cut", calibration=text, progress=stop, **SMALL)
    assert not (tmp_path / "cut").exists()
    tsotsallm.compress(tiny, recipe, tmp_path / "cut", calibration=text, **SMALL)
    assert same_bytes(tmp_path / "whole", tmp_path / "cut")
    assert not (tmp_path / "cut.partial").exists()


def test_unfinished_work_of_another_recipe_is_not_taken_over(tiny: Path, text: Path, tmp_path: Path) -> None:
    def stop(_progress: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, progress=stop, **SMALL)
    for recipe, more, message in (
            ("gptq:3:32", {}, r"recipe: gptq:4:32 then, gptq:3:32 now\); finish it with those, or .* --restart"),
            ("gptq:4:32", {"windows": 4}, r"corpus: 6 windows of 64 tokens from .*words.txt, seed 0 then, 4 windows"),
            ("gptq:4:32", {"seed": 3}, r"\(corpus: .*, seed 0 then, .*, seed 3 now\)"),
            ("gptq:4:32", {"keep_stages": True}, "keep_stages: no then, yes now"),
            ("rtn:4:32", {}, r"recipe: .* now; corpus: .* then, none now")):
        with pytest.raises(ResumeError, match=message):
            tsotsallm.compress(tiny, recipe, tmp_path / "out", calibration=text, **SMALL | more)
    other = tmp_path / text.name
    other.write_text(text.read_text("utf-8")[::-1], "utf-8")
    with pytest.raises(ResumeError, match=r"corpus: .*words.txt, seed 0 then, .*words.txt, seed 0 now"):
        tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=other, **SMALL)
    state = json.loads((tmp_path / "out.partial" / "run.json").read_text("utf-8"))
    machine = state["machine"] | {"torch": "0.9"}
    del state["words"]                                      # as versions before this wrote it
    (tmp_path / "out.partial" / "run.json").write_text(json.dumps(state | {"machine": machine, "corpus": "0" * 64}), "utf-8")
    with pytest.raises(ResumeError, match=r"corpus: 00000000… then, 6 windows.*; machine.torch: 0.9 then, \d+"):
        tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, **SMALL)


@pytest.mark.parametrize("after", [1, 9, 30, 45])
@pytest.mark.parametrize("recipe", [
    f"{THREE_STAGES[:-1]}, {{layers: {{order: [0, 1, 1, 2]}}}}, {{quantize: {{bits: 3, group: 32}}}}]",
    "[{quantize: {grid: q4_0}}]", "['wanda:1:4', {adapt: {steps: 3, batch: 2, window: 32, engine: streamed}}, 'gptq:4:32']"])
def test_restart_deletes_unfinished_work_and_begins_again(tiny: Path, text: Path, tmp_path: Path, recipe: str,
                                                          after: int) -> None:
    seen = 0

    def stop(_progress: object) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            raise Stop

    scratch = tmp_path / "elsewhere"
    with pytest.raises(Stop):
        tsotsallm.compress(tiny, recipe, tmp_path / "out", calibration=text, scratch=scratch, progress=stop, **SMALL)
    scratch.mkdir(exist_ok=True)
    (scratch / "mine.txt").write_text("kept")
    tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out", scratch=scratch, restart=True)
    tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "plain")
    assert same_bytes(tmp_path / "plain", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "out", "plain"}
    assert [path.name for path in scratch.iterdir()] == ["mine.txt"]
    with pytest.raises(ResumeError, match="exists already"):        # a result is never deleted
        tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out", restart=True)


def test_restart_deletes_nothing_else(tiny: Path, text: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"

    def refused(message: str) -> None:
        before = {path: path.read_bytes() for path in partial.rglob("*") if path.is_file() and path.name != "lock"}
        with pytest.raises(ResumeError, match=message):
            tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out", restart=True)
        assert {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()} == before
        assert not (tmp_path / "out").exists()

    partial.mkdir()
    (partial / "thesis.txt").write_text("years")
    refused(r"is not unfinished work \(it holds thesis.txt, but no run.json\)")
    with pytest.raises(ResumeError, match="is not unfinished work"):     # nor is it worked in and then deleted
        tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out")
    (partial / "run.json").write_text('{"runs": "mine"}')
    refused("not recognised as unfinished work of compress")
    (partial / "run.json").write_text("[[" * 1000)
    refused("not recognised as unfinished work of compress")
    (partial / "run.json").write_text('{"source": {}, "recipe": [], "corpus": null}')
    refused("holds thesis.txt beside the unfinished work of compress")
    (partial / "thesis.txt").rename(tmp_path / "thesis.txt")
    (partial / "result").symlink_to(tmp_path / "precious", target_is_directory=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").write_text("kept")
    real = tmp_path / "real"
    partial.rename(real)
    partial.symlink_to(real, target_is_directory=True)
    refused("not recognised")
    partial.unlink()
    real.rename(partial)
    tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out", restart=True)
    assert (tmp_path / "precious" / "data").read_text() == "kept"
    assert not partial.exists()


def test_restart_waits_for_a_living_process(tiny: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "run.json").write_text('{"source": {}, "recipe": [], "corpus": null}')
    (partial / "lock").write_text(json.dumps([os.getppid(), psutil.Process(os.getppid()).create_time()]))
    with pytest.raises(ResumeError, match="is working on"):
        tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out", restart=True)
    assert (partial / "run.json").exists()


def test_an_existing_result_is_not_overwritten(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "", tmp_path / "out")
    with pytest.raises(ResumeError, match="exists already"):
        tsotsallm.compress(tiny, "", tmp_path / "out")


def test_keep_stages_keeps_each_model(tiny: Path, text: Path, tmp_path: Path) -> None:
    result = tsotsallm.compress(tiny, THREE_STAGES, tmp_path / "out", calibration=text, keep_stages=True, **SMALL)
    assert [Path(stage).name for stage in result.stages] == ["1-depth", "2-sparsity"]
    sparse = Checkpoint.open(result.stages[1])
    final = Checkpoint.open(tmp_path / "out")
    for name, weight in sparse.layer(1).items():
        if weight.ndim == 2:
            assert bool((final.layer(1)[name][weight == 0] == 0).all())


def test_shared_repeats_are_stored_once_and_generate_like_written_out_ones(tiny: Path, text: Path,
                                                                          tmp_path: Path) -> None:
    order = [0, 1, 1, 2, 1, 3]
    tsotsallm.compress(tiny, [{"layers": {"order": order}}], tmp_path / "long")
    tsotsallm.compress(tiny, [{"layers": {"order": order, "shared": True}}], tmp_path / "shared")
    assert tsotsallm.inspect(tmp_path / "shared").bytes == tsotsallm.inspect(tiny).bytes
    long = AutoModelForCausalLM.from_pretrained(tmp_path / "long", dtype=torch.float32).eval()
    shared, tokenizer = tsotsallm.load(tmp_path / "shared")
    layers = shared.model.layers
    assert layers[1].mlp.up_proj.weight is layers[4].mlp.up_proj.weight
    assert layers[1].self_attn.layer_idx != layers[4].self_attn.layer_idx
    ids = tokenizer("once upon", return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = long.generate(ids, **options)
    assert torch.equal(shared.generate(ids, use_cache=True, **options), expected)
    assert torch.equal(shared.generate(ids, use_cache=False, **options), expected)


def test_plain_transformers_refuses_the_own_container(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, [{"layers": {"order": [0, 1, 1], "shared": True}}], tmp_path / "out")
    with pytest.raises((ValueError, KeyError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_edited_shared_layer_is_edited_once_and_compressed_again(tiny: Path, text: Path, tmp_path: Path) -> None:
    recipe = "[{layers: {order: [0, 1, 1, 2], shared: true}}, {quantize: {bits: 4, group: 32}}]"
    tsotsallm.compress(tiny, recipe, tmp_path / "shared", calibration=text, **SMALL)
    checkpoint = Checkpoint.open(tmp_path / "shared")
    assert checkpoint.spec.layer_order == (0, 1, 1, 2)
    written_out = tmp_path / "out"
    tsotsallm.compress(tmp_path / "shared", "", written_out)
    ours, _ = tsotsallm.load(tmp_path / "shared")
    theirs = unpacked_by_transformers(written_out)
    for name, weight in ours.state_dict().items():
        assert torch.equal(theirs[name].float(), weight), name


def test_our_own_result_is_compressed_again(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "wanda:2:4", tmp_path / "sparse", calibration=text, **SMALL)
    tsotsallm.compress(tmp_path / "sparse", "gptq:4:32", tmp_path / "packed", calibration=text, **SMALL)
    sparse, packed = Checkpoint.open(tmp_path / "sparse").layer(2), Checkpoint.open(tmp_path / "packed").layer(2)
    for name, weight in sparse.items():
        if weight.ndim == 2:
            assert bool((packed[name][weight == 0] == 0).all()), name
    tsotsallm.compress(tmp_path / "packed", "skip:1", tmp_path / "shorter")
    assert tsotsallm.inspect(tmp_path / "shorter").bits_per_linear_weight < 6


def test_a_shared_layer_stays_one_layer_through_several_sweeps(tiny: Path, text: Path, tmp_path: Path) -> None:
    recipe = "[{layers: {order: [0, 1, 1, 2], shared: true}}, {sparsity: {prune: 2, group: 4}}, {quantize: {group: 32}}]"
    tsotsallm.compress(tiny, recipe, tmp_path / "out", calibration=text, keep_stages=True, **SMALL)
    sparse = Checkpoint.open(tmp_path / "out-stages" / "2-sparsity")
    for name, weight in sparse.layer(1).items():
        assert torch.equal(weight, sparse.layer(2)[name])
    assert Checkpoint.open(tmp_path / "out").spec.layer_order == (0, 1, 1, 2)


def test_a_chosen_scratch_directory_is_left_as_it_was(tiny: Path, text: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "mine.txt").write_text("precious")
    tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, scratch=scratch, **SMALL)
    assert [path.name for path in scratch.iterdir()] == ["mine.txt"]


def test_a_result_of_that_name_beside_unfinished_work_is_not_taken_for_it(tiny: Path, text: Path, tmp_path: Path) -> None:
    def stop(_progress: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, progress=stop, **SMALL)
    (tmp_path / "out").mkdir()
    with pytest.raises(ResumeError, match="exists already"):
        tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, **SMALL)
    assert (tmp_path / "out.partial" / "run.json").exists()


@pytest.mark.parametrize("spoil", [
    lambda partial: (partial / "run.json").write_text("[3]"),
    lambda partial: (partial / "journal.jsonl").write_bytes(b'3\n{}\n\xff'),
    lambda partial: (partial / "journal.jsonl").write_bytes((partial / "journal.jsonl").read_bytes()[:-5]),
])
def test_damaged_notes_of_unfinished_work_lose_no_correctness(tiny: Path, text: Path, tmp_path: Path, spoil: Any) -> None:
    tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "whole", calibration=text, **SMALL)

    def stop(progress: Any) -> None:
        if progress.layer == 2:
            raise Stop

    with pytest.raises(Stop):
        tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, progress=stop, **SMALL)
    spoil(tmp_path / "out.partial")
    if (tmp_path / "out.partial" / "run.json").read_text() == "[3]":
        with pytest.raises(ResumeError, match="delete"):
            tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, **SMALL)
        return
    tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, **SMALL)
    assert same_bytes(tmp_path / "whole", tmp_path / "out")


def test_old_checkpoints_with_rotary_frequencies_are_read(tiny: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    old = tmp_path / "old"
    shutil.copytree(tiny, old)
    (old / "model.safetensors.index.json").unlink()
    for path in old.glob("*.safetensors"):
        path.unlink()
    save_file(tensors_of(tiny) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, old / "model.safetensors")
    tsotsallm.compress(old, "rtn:4:32", tmp_path / "out")
    assert tsotsallm.inspect(tmp_path / "out").layers == 4


def test_sequential_calibration_runs_and_differs(tiny: Path, text: Path, tmp_path: Path) -> None:
    for name, sequential in (("one", False), ("two", True)):
        recipe = [{"quantize": {"bits": 3, "group": 32, "sequential": sequential}}]
        tsotsallm.compress(tiny, recipe, tmp_path / name, calibration=text, **SMALL)
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    first = "model.layers.0.self_attn.q_proj.weight_packed"
    assert torch.equal(one[first], two[first])
    assert not torch.equal(one[first.replace("q_proj", "o_proj")], two[first.replace("q_proj", "o_proj")])


def test_gptq_leaves_less_error_than_rounding_on_every_linear_of_a_real_model(stories: Path, prose: Path,
                                                                              tmp_path: Path) -> None:
    from tsotsallm.checkpoint.view import View
    from tsotsallm.compression import Calibration, calibration_corpus
    from tsotsallm.stages.quantize import IntegerQuantize
    from tsotsallm.streaming.sweep import TwoStates, embed_corpus, sweep

    checkpoint = Checkpoint.open(stories)
    view = View.of(checkpoint)
    corpus = calibration_corpus(checkpoint, Calibration(str(prose), windows=16, window=256))
    states = TwoStates(tmp_path, [256] * 16, view.spec.hidden)
    embed_corpus(view, corpus, states.inputs_of(0))
    stages = {method: IntegerQuantize(method=method, bits=4, group="channel") for method in ("gptq", "rtn")}  # type: ignore[arg-type]
    for visit in sweep(view, states, observe=True, device=torch.device("cpu")):
        for name in visit.names:
            gram = visit.gram_of(name)
            matrix = gram.matrix.double()
            errors = {}
            for method, stage in stages.items():
                linear = visit.linear(name)
                stage.edit(linear, gram, visit.index, last=False)
                difference = (linear.effective() - linear.reference).double()
                errors[method] = float((difference @ matrix * difference).sum())
            assert errors["gptq"] <= errors["rtn"], (visit.index, name, errors)


def test_wanda_masks_equal_a_naive_loop_on_a_real_model(stories: Path, prose: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tsotsallm.compression import Calibration, calibration_corpus

    checkpoint = Checkpoint.open(stories)
    corpus = calibration_corpus(checkpoint, Calibration(str(prose), windows=4, window=128))
    out = tmp_path / "sparse"
    tsotsallm.compress(stories, "wanda:2:4", out, calibration=prose, windows=4, window=128)
    AutoTokenizer.from_pretrained(stories)
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    squares: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(_module: Any, args: Any) -> None:
            squares[name] = squares.get(name, 0) + args[0].flatten(0, 1).double().square().sum(0)
        return add

    layer = model.model.layers[0]
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for window in corpus.windows:
            model(window[None])
    pruned = Checkpoint.open(out).layer(0)
    agreeing = total = 0
    for name, square in squares.items():
        weight = layer.get_submodule(name).weight.detach()
        score = weight.double().abs() * square.sqrt()
        for row in range(len(weight)):
            for start in range(0, weight.shape[1], 4):
                ranked = sorted(range(start, start + 4), key=lambda column: (score[row, column].item(), column))
                kept = {column for column in range(start, start + 4) if pruned[f"{name}.weight"][row, column] != 0}
                agreeing += kept == set(ranked[2:])
                total += 1
    assert agreeing == total


def test_the_real_tiny_model_tells_its_story(stories: Path, tmp_path: Path) -> None:
    tsotsallm.compress(stories, "", tmp_path / "copy")
    model, tokenizer = tsotsallm.load(tmp_path / "copy")
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    told = tokenizer.decode(model.generate(ids, max_new_tokens=70, do_sample=False)[0], skip_special_tokens=True)
    assert told.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside in the "
                           "park. One day, she saw a big, red ball.")


def test_an_awkward_width_is_a_clear_error_for_a_group_and_none_by_default(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"group 128 must divide.*mlp.down_proj has 172; usable groups: 2, 4, or channel"):
        tsotsallm.compress(stories, "rtn:4:128", tmp_path / "out")
    tsotsallm.compress(stories, "rtn:4", tmp_path / "out")
    assert {grid.plain()["group"] for grid in map(Checkpoint.open(tmp_path / "out").grid_of, (
        "model.layers.0.mlp.down_proj", "model.layers.4.self_attn.q_proj"))} == {None}


def test_provenance_names_everything_that_went_in(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, THREE_STAGES, tmp_path / "out", calibration=text, **SMALL)
    found = json.loads((tmp_path / "out" / "tsotsallm.json").read_text())
    assert Recipe.parse(found["recipe"]) == Recipe.parse(THREE_STAGES)
    assert found["choices"][0]["order"] != [0, 1, 2, 3]
    assert found["inputs"]["machine"]["torch"] == torch.__version__
    assert "base_model" not in (tmp_path / "out" / "README.md").read_text()


def test_sharded_results_load(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsotsallm.checkpoint.writer.SHARD_BYTES", 100_000)
    tsotsallm.compress(tiny, "rtn:8:channel", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    Checkpoint.open(tmp_path / "out")


def test_all_importances_choose_layers(tmp_path: Path, text: Path) -> None:
    source = build(tmp_path / "source", "llama3", num_hidden_layers=6)
    for importance in ("perplexity", "taylor", "magnitude", "cosine"):
        for iterative in (False, True):
            out = tmp_path / f"{importance}-{iterative}"
            recipe = [{"depth": {"remove": 2, "importance": importance, "protect": {"first": 1, "last": 1},
                                 "iterative": iterative}}]
            tsotsallm.compress(source, recipe, out, calibration=text, **SMALL)
            choice = json.loads((out / "tsotsallm.json").read_text())["choices"][0]
            assert len(choice["order"]) == 4
            assert {0, 5} <= set(choice["order"])
            assert len(choice["rounds"]) == (2 if iterative else 1)
