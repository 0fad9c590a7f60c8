"""Which files hold the weights: what is read gives the logits of transformers on the same folder, or is refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import tsotsallm
from tests.checkpoint.damage import edit_json
from tests.conftest import build
from tsotsallm.checkpoint import reader
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.spec import EMBEDDING, HEAD
from tsotsallm.checkpoint.weights import INDEX, SINGLE, weight_files
from tsotsallm.cli import app
from tsotsallm.errors import CheckpointError

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SHARD = "60KB"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`single` and `other` of one file each, `sharded` of several with the weights of `other`; `untied`."""
    folder = tmp_path_factory.mktemp("models")
    return {"single": build(folder / "single", "llama3"), "other": build(folder / "other", "llama3", seed=1),
            "sharded": build(folder / "sharded", "llama3", seed=1, shard=SHARD),
            "untied": build(folder / "untied", "llama2"), "packed": build(folder / "packed", "qwen2", seed=2)}


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def logits_of_transformers(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def our_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return tsotsallm.load(folder)[0](IDS).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def rename(path: Path, new: Callable[[str], str]) -> None:
    save_file({new(name): tensor for name, tensor in load_file(path / SINGLE).items()}, path / SINGLE, {"format": "pt"})


# -- folders that transformers reads: the same logits, and a note of what is not used -----------------------------


def single_beside_an_index(models: dict[str, Path], path: Path) -> None:
    copied(models["sharded"], path)
    shutil.copy(models["single"] / SINGLE, path)


def index_without_its_shards(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    shutil.copy(models["sharded"] / INDEX, path)


def index_of_nonsense_beside_a_single_file(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    (path / INDEX).write_text("{")


def a_variant_beside(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    shutil.copy(models["other"] / SINGLE, path / "model.fp16.safetensors")


def a_shard_that_no_index_names(models: dict[str, Path], path: Path) -> None:
    copied(models["sharded"], path)
    shutil.copy(models["single"] / SINGLE, path / "model-00009-of-00009.safetensors")


def a_pickle_beside(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    torch.save(load_file(models["other"] / SINGLE), path / "pytorch_model.bin")


def a_file_named_by_the_config(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    shutil.copy(models["other"] / SINGLE, path / "newer.safetensors")
    edit_json(path / "config.json", transformers_weights="newer.safetensors")


def an_index_named_by_the_config(models: dict[str, Path], path: Path) -> None:
    copied(models["sharded"], path)
    (path / INDEX).rename(path / "mine.safetensors.index.json")
    shutil.copy(models["single"] / SINGLE, path)
    edit_json(path / "config.json", transformers_weights="mine.safetensors.index.json")


def tied_with_only_the_head(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    rename(path, lambda name: HEAD if name == EMBEDDING else name)


def a_base_model(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    rename(path, lambda name: name.removeprefix("model."))


def the_prefix_twice(models: dict[str, Path], path: Path) -> None:
    copied(models["untied"], path)
    rename(path, lambda name: f"model.{name}")


def an_untied_base_model_with_its_head(models: dict[str, Path], path: Path) -> None:
    copied(models["untied"], path)
    rename(path, lambda name: name.removeprefix("model."))


def tensors_that_the_index_leaves_out(models: dict[str, Path], path: Path) -> None:
    copied(models["sharded"], path)
    content = json.loads((path / INDEX).read_text())
    kept = dict.fromkeys(content["weight_map"].values())        # one tensor of every shard
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if kept.pop(file, 0) is None}
    (path / INDEX).write_text(json.dumps(content))


def a_tensor_in_two_shards(models: dict[str, Path], path: Path) -> None:
    copied(models["sharded"], path)
    content = json.loads((path / INDEX).read_text())["weight_map"]
    name, last = next((name, file) for name, file in content.items() if file == shards(path)[-1].name)
    first = load_file(shards(path)[0])
    save_file(first | {name: torch.zeros_like(load_file(path / last)[name])}, shards(path)[0], {"format": "pt"})


def an_adapter_beside(models: dict[str, Path], path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    copied(models["single"], path)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
                           LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(path)


def links_to_another_folder(models: dict[str, Path], path: Path) -> None:
    path.mkdir()
    for file in models["sharded"].iterdir():
        (path / file.name).symlink_to(file)


def a_hub_cache(models: dict[str, Path], path: Path) -> None:
    """snapshots/REVISION/NAME -> ../../blobs/HASH, as huggingface_hub lays out what it downloads."""
    store = path.with_name("models--some--model")
    (store / "blobs").mkdir(parents=True)
    (store / "snapshots" / "abc").mkdir(parents=True)
    for number, file in enumerate(models["sharded"].iterdir()):
        shutil.copy(file, store / "blobs" / f"{number:040x}")
        (store / "snapshots" / "abc" / file.name).symlink_to(Path("..", "..", "blobs", f"{number:040x}"))
    path.symlink_to(store / "snapshots" / "abc")


READ: dict[str, tuple[Callable[[dict[str, Path], Path], None], str, str]] = {
    "a single file beside an index with shards": (single_beside_an_index, "single",
                                                  "model.safetensors, as in transformers; not used: model-00001-of-"),
    "an index without its shards": (index_without_its_shards, "single", "not used: model.safetensors.index.json"),
    "an index of nonsense": (index_of_nonsense_beside_a_single_file, "single", "not used: model.safetensors.index.json"),
    "a variant beside": (a_variant_beside, "single", "not used: model.fp16.safetensors"),
    "a shard that no index names": (a_shard_that_no_index_names, "other", "not used: model-00009-of-00009.safetensors"),
    "a pickle beside": (a_pickle_beside, "single", "not used: pytorch_model.bin"),
    "a file named by the config": (a_file_named_by_the_config, "other", "newer.safetensors, .* not used: model.safetensors"),
    "an index named by the config": (an_index_named_by_the_config, "other", "not used: model.safetensors"),
    "tied, with only the head": (tied_with_only_the_head, "single", ""),
    "a base model": (a_base_model, "single", ""),
    "the prefix twice": (the_prefix_twice, "untied", ""),
    "an untied base model with its head": (an_untied_base_model_with_its_head, "untied", ""),
    "tensors that the index leaves out": (tensors_that_the_index_leaves_out, "other", ""),
    "a tensor in two shards": (a_tensor_in_two_shards, "other", ""),
    "an adapter beside": (an_adapter_beside, "single",
                          "not used: adapter_config.json, adapter_model.safetensors, which transformers adds where PEFT"),
    "links to another folder": (links_to_another_folder, "other", ""),
    "a hub cache": (a_hub_cache, "other", ""),
}


@pytest.mark.parametrize("case", READ)
def test_the_weights_are_those_that_transformers_runs(models: dict[str, Path], tmp_path: Path, case: str,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    make, same_as, note = READ[case]
    folder = tmp_path / "model"
    make(models, folder)
    if case == "an adapter beside":         # where PEFT is missing; where it is there, the note says what differs
        for module in ("models.auto.auto_factory", "integrations.peft"):
            monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: False)
    expected = logits_of_transformers(folder)
    assert_same(our_logits(folder), expected)
    assert_same(expected, logits_of_transformers(models[same_as]))
    notes = tsotsallm.inspect(folder).notes
    assert len(notes) == bool(note), notes
    assert not note or re.search(note, notes[0]), notes


@pytest.mark.parametrize("case", ["tied, with only the head", "a base model", "a single file beside an index with shards",
                                  "a file named by the config", "an adapter beside", "a tensor in two shards"])
def test_what_is_made_of_it_is_what_is_made_of_a_plain_checkpoint(models: dict[str, Path], tmp_path: Path, text: Path,
                                                                  case: str) -> None:
    make, same_as, note = READ[case]
    folder, plain = tmp_path / "model", models[same_as]
    make(models, folder)
    options: dict[str, Any] = {"calibration": text, "windows": 4, "window": 48}
    recipe = "skip:1, gptq:4:32"
    found = tsotsallm.compress(folder, recipe, tmp_path / "ours", **options)
    tsotsallm.compress(plain, recipe, tmp_path / "theirs", **options)
    ours, theirs = load_file(tmp_path / "ours" / SINGLE), load_file(tmp_path / "theirs" / SINGLE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(re.search(note, one) for one in found.notes) if note else not any("not used" in one for one in found.notes)
    assert_same(our_logits(tmp_path / "ours"), logits_of_transformers(tmp_path / "ours"))
    scored = tsotsallm.evaluate(folder, text, context=48, limit=3)
    assert scored.loss == pytest.approx(tsotsallm.evaluate(plain, text, context=48, limit=3).loss, abs=1e-9)
    assert len(scored.notes) == bool(note)
    same = tsotsallm.plan(plain, recipe, tmp_path / "out", windows=4, window=48)
    planned = tsotsallm.plan(folder, recipe, tmp_path / "out", windows=4, window=48)
    assert (planned.bytes, planned.result_bytes, planned.parameters) == (same.bytes, same.result_bytes, same.parameters)
    assert Checkpoint.open(folder).weight_bytes < 1.1 * Checkpoint.open(plain).weight_bytes


def test_transformers_adds_the_adapter_where_peft_is_installed_as_the_note_says(models: dict[str, Path],
                                                                                tmp_path: Path) -> None:
    an_adapter_beside(models, tmp_path / "model")
    with_peft, ours = logits_of_transformers(tmp_path / "model"), our_logits(tmp_path / "model")
    assert float((with_peft - ours).abs().max()) > 0.01 * float(ours.abs().max())
    assert "merge the adapter with PEFT first" in tsotsallm.inspect(tmp_path / "model").notes[0]


def test_the_fingerprint_and_an_upload_follow_the_same_files(models: dict[str, Path], tmp_path: Path) -> None:
    single_beside_an_index(models, tmp_path / "model")
    assert set(Checkpoint.open(tmp_path / "model").fingerprint()["shards"]) == {SINGLE}
    assert Checkpoint.open(tmp_path / "model").weight_bytes == (tmp_path / "model" / SINGLE).stat().st_size
    sent = tsotsallm.push(tmp_path / "model", "some/model")["files"]
    assert {name for name in sent if "safetensors" in name} == {SINGLE}
    assert {name for name in tsotsallm.push(models["sharded"], "some/model")["files"] if "safetensors" in name} == {
        INDEX, *(path.name for path in shards(models["sharded"]))}


def test_every_verb_prints_what_is_not_used(models: dict[str, Path], tmp_path: Path, text: Path) -> None:
    single_beside_an_index(models, tmp_path / "model")

    def run(*arguments: object) -> Result:
        found = CliRunner().invoke(app, [*map(str, arguments)])
        assert found.exit_code == 0, found.output
        return found

    note = "the weights are those of model.safetensors, as in transformers; not used: model-00001-of-"
    model = tmp_path / "model"
    verbs = {"inspect": [model], "evaluate": [model, "--text", text, "--context", 48, "--limit", 2],
             "compress": [model, "rtn:4:32", "-o", tmp_path / "out"]}
    for verb, arguments in verbs.items():
        shown = run(verb, *arguments)
        assert note in shown.stderr, verb
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert any(one.startswith(note) for one in json.loads(run(verb, *arguments, "--json").stdout)["notes"]), verb
    assert note in json.loads((tmp_path / "out" / "tsotsallm.json").read_text())["notes"][0]


# -- folders that are refused ------------------------------------------------------------------------------------


def index_and_transformers_disagree(models: dict[str, Path], path: Path) -> None:
    copied(models["sharded"], path)
    content = json.loads((path / INDEX).read_text())["weight_map"]
    name, first = next((name, file) for name, file in content.items() if file == shards(path)[0].name)
    last = load_file(shards(path)[-1])
    save_file(last | {name: torch.zeros_like(load_file(path / first)[name])}, shards(path)[-1], {"format": "pt"})


def only_a_variant(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    (path / SINGLE).rename(path / "model.fp16.safetensors")


def an_adapter_alone(models: dict[str, Path], path: Path) -> None:
    an_adapter_beside(models, path)
    (path / SINGLE).unlink()


def only_embeddings_although_untied(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    edit_json(path / "config.json", tie_word_embeddings=False)


def only_the_head_although_untied(models: dict[str, Path], path: Path) -> None:
    tied_with_only_the_head(models, path)
    edit_json(path / "config.json", tie_word_embeddings=False)


def neither_head_nor_embeddings(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    rename(path, lambda name: "other.weight" if name == EMBEDDING else name)


def with_and_without_the_prefix(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    tensors = load_file(path / SINGLE)
    save_file(tensors | {"norm.weight": torch.zeros(64)}, path / SINGLE, {"format": "pt"})


def of_several_processes(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    shutil.copy(models["other"] / SINGLE, path / "shard-00001-model-00001-of-00001.safetensors")


def named_but_missing(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    edit_json(path / "config.json", transformers_weights="newer.safetensors")


def named_outside(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    edit_json(path / "config.json", transformers_weights="../other/model.safetensors")


def named_nonsense(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    edit_json(path / "config.json", transformers_weights=["model.safetensors"])


def index_alone(models: dict[str, Path], path: Path) -> None:
    copied(models["sharded"], path)
    for file in shards(path):
        file.unlink()


def a_lora_inside_the_weights(models: dict[str, Path], path: Path) -> None:
    copied(models["single"], path)
    extra = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 64)}
    save_file(load_file(path / SINGLE) | extra, path / SINGLE, {"format": "pt"})


REFUSED: dict[str, tuple[Callable[[dict[str, Path], Path], None], str]] = {
    "index and transformers disagree": (index_and_transformers_disagree, "holds it too, and transformers would read that"),
    "only a variant": (only_a_variant, r"model\.fp16\.safetensors, but no model\.safetensors .* rename"),
    "an adapter alone": (an_adapter_alone, "holds an adapter .* merge it into its base"),
    "only embeddings, untied": (only_embeddings_although_untied, "needs tensor lm_head.weight, .* random numbers"),
    "only the head, untied": (only_the_head_although_untied, "needs tensor model.embed_tokens.weight, .* random numbers"),
    "neither head nor embeddings": (neither_head_nor_embeddings, "needs tensor model.embed_tokens.weight"),
    "with and without the prefix": (with_and_without_the_prefix, "'model.norm.weight' twice"),
    "of several processes": (of_several_processes, "shard-00001-model-00001-of-00001.safetensors"),
    "named but missing": (named_but_missing, "newer.safetensors does not exist"),
    "named outside": (named_outside, "not a safetensors file of this directory"),
    "named nonsense": (named_nonsense, "not a safetensors file of this directory"),
    "an index alone": (index_alone, r"model-00001-of-\d+\.safetensors does not exist; download or copy the missing shard"),
    "a LoRA inside the weights": (a_lora_inside_the_weights, "is stored among the weights of its base"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_would_not_run_alike_is_refused(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    make(models, tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        tsotsallm.inspect(tmp_path / "model")


def test_transformers_runs_the_other_file_where_index_and_order_disagree(models: dict[str, Path], tmp_path: Path) -> None:
    """Why that is refused: the index names the right tensor, and transformers runs the other."""
    index_and_transformers_disagree(models, tmp_path / "model")
    theirs, meant = logits_of_transformers(tmp_path / "model"), logits_of_transformers(models["sharded"])
    assert float((theirs - meant).abs().max()) > 0.01 * float(meant.abs().max())


def test_an_adapter_folder_is_used_where_it_names_this_base(models: dict[str, Path], tmp_path: Path) -> None:
    """Another's is left out, as transformers leaves it out, and a note says so."""
    path = tmp_path / "model"
    an_adapter_beside(models, path)
    (path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (path / name).rename(path / "adapter" / name)
    base = logits_of_transformers(path)
    edit_json(path / "adapter" / "adapter_config.json", base_model_name_or_path="some/model")
    assert_same(our_logits(path), base)
    assert "adapter/ is not used: its base is 'some/model'" in tsotsallm.inspect(path).notes[0]
    edit_json(path / "adapter" / "adapter_config.json", base_model_name_or_path="..")
    assert float((our_logits(path) - base).abs().max()) > 0.01 * float(base.abs().max())
    assert tsotsallm.inspect(path).notes == ()


# -- downloads ----------------------------------------------------------------------------------------------------


def fake_hub(monkeypatch: pytest.MonkeyPatch, remote: Path, local: Path) -> list[str]:
    """A hub that holds `remote`; returns the list of names that it is asked for, filled as it is asked."""
    asked: list[str] = []

    def snapshot_download(_repository: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for file in sorted(remote.rglob("*")):
            name = file.relative_to(remote).as_posix()
            if file.is_file() and any(fnmatch(name, one) for one in allow_patterns) and not any(
                    fnmatch(name, one) for one in ignore_patterns):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, local / name)
                asked.append(name)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("case", ["a single file beside an index with shards", "a shard that no index names",
                                  "a variant beside", "a file named by the config", "an index named by the config"])
def test_what_is_downloaded_is_what_is_read(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            case: str) -> None:
    make, same_as, _ = READ[case]
    make(models, tmp_path / "remote")
    asked = fake_hub(monkeypatch, tmp_path / "remote", tmp_path / "local")
    directory = reader.locate("some/model")
    used = {path.name for path in weight_files(tmp_path / "remote").files}
    fetched = {name for name in asked if name.endswith(".safetensors")}
    # model.safetensors is asked for together with the config that may name another
    assert used <= fetched <= used | {SINGLE}
    assert len(asked) == len(set(asked))
    assert_same(our_logits(directory), logits_of_transformers(models[same_as]))


def test_a_hostile_index_downloads_nothing_outside(models: dict[str, Path], tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    copied(models["sharded"], tmp_path / "remote")
    for file in ("../secret.safetensors", "*"):
        edit_json(tmp_path / "remote" / INDEX, weight_map={"a": file})
        asked = fake_hub(monkeypatch, tmp_path / "remote", tmp_path / "local")
        with pytest.raises(CheckpointError):
            Checkpoint.open("some/model")
        assert not [name for name in asked if name.endswith(".safetensors")]


# -- links --------------------------------------------------------------------------------------------------------


def test_a_link_that_an_index_sends_out_of_the_folder_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    path, secret = copied(models["sharded"], tmp_path / "model"), tmp_path / "secret"
    secret.write_text("the password is in here")
    first = shards(path)[0]
    first.unlink()
    first.symlink_to(secret)
    with pytest.raises(CheckpointError, match="a link that leads outside the checkpoint") as caught:
        tsotsallm.inspect(path)
    assert "password" not in str(caught.value)
    first.unlink()
    first.symlink_to(first.name)
    with pytest.raises(CheckpointError, match=r"leads outside|cannot be read|does not exist"):
        tsotsallm.inspect(path)
    first.unlink()
    (path / "kept").mkdir()
    shutil.copy(models["sharded"] / first.name, path / "kept" / "blob")
    first.symlink_to(Path("kept") / "blob")
    assert_same(our_logits(path), logits_of_transformers(models["other"]))


def test_a_single_file_may_be_a_link_and_its_content_is_not_quoted(models: dict[str, Path], tmp_path: Path) -> None:
    path = copied(models["single"], tmp_path / "model")
    (path / SINGLE).unlink()
    (path / SINGLE).symlink_to(models["other"] / SINGLE)
    assert_same(our_logits(path), logits_of_transformers(models["other"]))
    secret = tmp_path / "secret"
    secret.write_text('{"password": "swordfish"' + " " * 100)
    for name in (SINGLE, "config.json"):
        (path / name).unlink()
        (path / name).symlink_to(secret)
        with pytest.raises(CheckpointError) as caught:
            tsotsallm.inspect(path)
        assert "password" not in str(caught.value)
        assert "swordfish" not in str(caught.value)
        (path / name).unlink()
        (path / name).symlink_to(models["single"] / name)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", "..", ".", "", "sub/x.safetensors", "a\0b",
                                  "x" * 10_000, "with\nline.safetensors"])
def test_an_index_names_files_of_its_own_folder_only(models: dict[str, Path], tmp_path: Path, file: str) -> None:
    path = copied(models["sharded"], tmp_path / "model")
    content = json.loads((path / INDEX).read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = file
    (path / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        tsotsallm.inspect(path)
    message = str(caught.value).replace(str(path), "")
    assert "\n" not in message
    assert len(message) < 500


# -- versions -----------------------------------------------------------------------------------------------------


def test_the_lowest_transformers_that_is_admitted_is_the_one_that_is_tested() -> None:
    """Versions between had a tokenizer fault; none is admitted that these tests did not run with."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [wanted] = [one for one in map(Requirement, project["dependencies"]) if one.name == "transformers"]
    [tested] = re.findall(r"^transformers==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    lowest = [one.version for one in wanted.specifier if one.operator == ">="]
    assert [tuple(map(int, version.split("."))) for version in lowest] == [tuple(map(int, tested.split(".")))[:len(
        lowest[0].split("."))]]
    assert wanted.specifier.contains(tested)
    if not os.environ.get("TSOTSALLM_OTHER_VERSIONS"):
        import transformers

        assert wanted.specifier.contains(transformers.__version__)
