"""Groups that suit any model's widths; what is said, and when, where there is no text to calibrate on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tests.compressing import SMALL, THREE_STAGES, same_bytes
from tsotsallm import compression, hub
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.errors import CorpusError, RecipeError, install_command
from tsotsallm.planning import make_plan
from tsotsallm.recipe import Recipe, packaged_recipes


def spec_of(hidden: int, feed_forward: int, *, head_dim: int = 0, layers: int = 2) -> ModelSpec:
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": feed_forward, "vocab_size": 64,
              "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": head_dim or hidden // 4}
    return ModelSpec(config, None, tuple(range(layers)))


def group_in(recipe: str, spec: ModelSpec) -> Any:
    found = Recipe.parse(recipe).resolved(spec)
    assert found.resolved(spec) == found
    [fields] = [stage["quantize"] for stage in found.plain() if "quantize" in stage]
    return fields.get("group")


@pytest.mark.parametrize(("hidden", "feed_forward", "head_dim", "group", "on_nf4"), [
    (2048, 8192, 0, 128, 64),           # Llama-3.2-1B
    (4096, 11008, 0, 128, 64),          # Llama-2-7B
    (896, 4864, 0, 128, 64),            # Qwen2.5-0.5B
    (576, 1536, 0, 96, 64),             # SmolLM2-135M
    (960, 2560, 0, 64, 64),             # SmolLM2-360M
    (288, 768, 0, 96, 48),              # stories15M
    (240, 720, 0, 48, 48),
    (64, 96, 0, 32, 32),
    (64, 172, 0, "channel", "channel"),  # stories260K
    (256, 768, 24, 32, 32),        # heads narrower than the hidden width: o_proj reads 96 columns
])
def test_auto_is_the_largest_group_that_divides_every_input(hidden: int, feed_forward: int, head_dim: int, group: Any,
                                                            on_nf4: Any) -> None:
    spec = spec_of(hidden, feed_forward, head_dim=head_dim)
    for recipe in ("gptq:4", "rtn:4", "gptq:3:auto", "[{quantize: {bits: 4}}]", "gptq4"):
        assert group_in(recipe, spec) == group
    assert group_in("rtn:nf4", spec) == on_nf4
    assert group_in("gptq:4:channel", spec) == "channel"
    assert group_in("gptq:q4_0", spec) is None
    if group != "channel":
        assert all(d_in % group == 0 for _, d_in in linear_shapes(spec, 0).values())
        Recipe.parse(f"gptq:4:{group}").check(spec)


@pytest.mark.parametrize(("neurons", "group"), [
    ("", 128), ("{neurons: {feed_forward: 0.25, multiple: 64}}", 128),      # 768 are left
    ("{neurons: {feed_forward: 0.5625, multiple: 64}}", 64),                # 448
    ("{neurons: {feed_forward: 0.625, multiple: 32}}", 128),                # 384
    ("{neurons: {feed_forward: 0.6, multiple: 1}}", "channel"),             # 410
    ("{neurons: {kv_groups: 1}}", 128), ("{depth: {remove: 1, protect: {}}}", 128)])
def test_auto_sees_the_widths_that_earlier_stages_leave(neurons: str, group: Any) -> None:
    recipe = f"[{neurons + ', ' if neurons else ''}{{quantize: {{bits: 4}}}}]"
    spec = spec_of(256, 1024, layers=4)
    Recipe.parse(recipe).check(spec)
    assert group_in(recipe, spec) == group


def test_a_group_that_was_asked_for_is_refused_where_it_does_not_divide() -> None:
    with pytest.raises(RecipeError, match=r"group 128 must divide.*q_proj has 576.*usable groups: .*64, 96, 192, or "
                                          r"channel for one scale a row, or auto"):
        Recipe.parse("gptq:4:128").check(spec_of(576, 1536))
    with pytest.raises(RecipeError, match="leave bits, group"):
        Recipe.parse("[{quantize: {grid: q4_0, group: auto}}]")
    with pytest.raises(RecipeError, match="channel or auto"):
        Recipe.parse("[{quantize: {group: 0}}]")


@pytest.mark.parametrize("widths", [(576, 1536), (960, 2560), (2048, 8192)])
def test_packaged_recipes_fit_real_widths(widths: tuple[int, int]) -> None:
    for name in packaged_recipes():
        Recipe.parse(name).check(spec_of(*widths, layers=32))


def test_auto_gives_the_bytes_of_its_group_and_is_written_out(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Of a model whose inputs have 64 and 96 columns: 32."""
    for name, recipe in (("auto", "wanda:2:4, gptq:4"), ("asked", "wanda:2:4, gptq:4:32")):
        tsotsallm.compress(tiny, recipe, tmp_path / name, calibration=text, **SMALL)
        assert make_plan(Checkpoint.open(tiny), Recipe.parse(recipe), tmp_path, **SMALL).recipe == "wanda:2:4, gptq:4:32"
    assert same_bytes(tmp_path / "auto", tmp_path / "asked")
    contents = [json.loads((tmp_path / name / "tsotsallm.json").read_text("utf-8")) for name in ("auto", "asked")]
    assert contents[0] == contents[1]
    assert contents[0]["recipe"][1]["quantize"]["group"] == 32
    assert "group: 32" in (tmp_path / "auto" / "README.md").read_text("utf-8")


def test_work_begun_with_auto_is_finished_by_its_group(tiny: Path, text: Path, tmp_path: Path) -> None:
    steps = 0

    def stop(_progress: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tsotsallm.compress(tiny, "gptq:4", tmp_path / "out", calibration=text, progress=stop, **SMALL)
    tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, **SMALL)
    assert json.loads((tmp_path / "out" / "tsotsallm.run.json").read_text("utf-8"))["resumed"]


@pytest.mark.parametrize("recipe", [
    "gptq:4", "rtn:3:64", "wanda:2:4, gptq:4:channel", "wanda:0.5", "depth:2:taylor", "gptq:q4_0", "rtn:nf4", "eora:4",
    "eora:auto:2MB", "gptq:mixed:4.2", "[{quantize: {file_bytes: 7MB}}]", "skip:1", "lora:4", "[]",
    "[{sparsity: {prune: 1, group: 4, protect: {first: 1}}}]", *packaged_recipes()])
def test_a_recipe_on_one_line_means_the_same(recipe: str) -> None:
    found = Recipe.parse(recipe)
    assert Recipe.parse(found.line()) == found
    assert "\n" not in found.line()


def test_short_forms_are_written_where_they_can_be() -> None:
    assert Recipe.parse([{"quantize": {"bits": 4}}]).line() == "gptq:4"
    assert Recipe.parse([{"quantize": {"bits": 4, "group": 64}}]).line() == "gptq:4:64"
    assert Recipe.parse("[{sparsity: {prune: 2, group: 4}}, {quantize: {bits: 3, damp: 0.05}}]").line() == (
        "['wanda:2:4', {quantize: {damp: 0.05, bits: 3}}]")


# -- no text ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(hub, "version", missing)


@pytest.mark.parametrize(("recipe", "instead"), [
    ("gptq:4", "rtn:4:32"), ("gptq:3:channel", "rtn:3:channel"), ("gptq:q4_0", "rtn:q4_0"), ("rtn:4", None),
    ("[{quantize: {grid: q8_0, ends: q8_0}}]", "[{quantize: {method: rtn, ends: q8_0, grid: q8_0}}]"),
    ("wanda:2:4, gptq:4", "magnitude:2:4, rtn:4:32"), ("sparsegpt:0.5", "magnitude:0.5"),
    ("[{depth: {remove: 2, protect: {}}}]", "[{depth: {remove: 2, importance: magnitude, protect: {first: 0, last: 0}}}]"),
    ("gptq:4, eora:2", "['rtn:4:32', {compensate: {rank: 2, method: svd}}]"), ("skip:1", None), ("[]", None),
    ("gptq:mixed:6", ""), ("[{neurons: {feed_forward: 0.34}}]", ""), ("[{adapt: {steps: 2}}]", "")])
def test_a_recipe_without_text_is_refused_with_what_can_be_done(tiny: Path, tmp_path: Path, recipe: str, instead: str | None,
                                                                no_extra: None, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings = tsotsallm.plan(tiny, recipe, tmp_path / "out").warnings
    said = [one for one in warnings if one.startswith("calibration text is needed, and none is given; ")]
    if instead is None:
        assert not said
        tsotsallm.compress(tiny, recipe, tmp_path / "out")
        return
    with monkeypatch.context() as patch:
        patch.setattr(compression, "make_plan", lambda *_args, **_options: pytest.fail("something was begun"))
        with pytest.raises(CorpusError) as refused:
            tsotsallm.compress(tiny, recipe, tmp_path / "out")
    assert [str(refused.value)] == [str(CorpusError(one)) for one in said]
    assert "\n" not in said[0]
    remedies = said[0].split("; ")[1:]
    assert remedies == [f"without text, at a higher loss: {instead}" if instead else "without text: another recipe, such as "
                        "rtn:4", "with a text of your own: --calibration FILE or DIR, about 40 kB of ordinary prose in the "
                        "languages that matter to you", "with text that the model writes itself, some minutes: "
                        "--calibration self", f"with allenai/c4 from the hub: {install_command('hub')}"]
    assert not list(tmp_path.iterdir())
    tsotsallm.compress(tiny, instead or "rtn:4", tmp_path / "out")


def test_nothing_is_missing_where_text_is_given_or_the_model_has_its_own(tiny: Path, text: Path, no_extra: None) -> None:
    assert not tsotsallm.plan(tiny, "gptq:4", calibration=text).warnings
    assert not tsotsallm.plan("embedded", "gptq:4").warnings
    with pytest.raises(CorpusError, match=r"no-such\.txt does not exist"):
        tsotsallm.plan(tiny, "gptq:4", calibration="no-such.txt")
    [said] = tsotsallm.plan(tiny, "gptq:4", calibration="someone/texts").warnings
    assert said.startswith("calibration text is needed, and someone/texts is out of reach; without text, at a higher loss: "
                           "rtn:4:32;")


class _Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Something that answers in the hub's place."""
    with HTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.fixture
def extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*hub.OFFLINE, "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "version", lambda _name: "4.0")


def test_a_hub_that_answers_is_taken_at_its_word(answering: None, extra: None, tiny: Path) -> None:
    assert hub.obstacle() is None
    assert not any("calibration text" in one for one in tsotsallm.plan(tiny, "gptq:4").warnings)


def test_a_hub_out_of_reach_is_found_out_in_a_moment(extra: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(hub, "SECONDS", 0.3)
        assert "connect to the internet (" in str(hub.obstacle())
    assert "refused" in str(hub.obstacle())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.obstacle() == "unset HF_HUB_OFFLINE"


def test_on_the_command_line_it_is_one_line(tiny: Path, tmp_path: Path) -> None:
    def said(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "tsotsallm", *map(str, arguments)], capture_output=True, text=True,
                              env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)

    refused = said("compress", tiny, "gptq:4", "-o", tmp_path / "out")
    assert refused.returncode == 1
    [line] = refused.stderr.splitlines()
    assert "rtn:4:32; with a text of your own: --calibration FILE" in line
    planned = said("plan", tiny, "gptq:4")
    assert planned.returncode == 0
    assert "recipe      gptq:4:32\n" in planned.stdout
    assert "note        calibration text is needed" in planned.stdout


def test_forecast_bounds_what_is_written(tiny: Path, text: Path, tmp_path: Path) -> None:
    for number, recipe in enumerate(["", "depth:0", "gptq:4:32", "rtn:3:channel", "wanda:2:4", THREE_STAGES]):
        out = tmp_path / str(number)
        forecast = make_plan(Checkpoint.open(tiny), Recipe.parse(recipe), out, windows=6, window=64)
        result = tsotsallm.compress(tiny, recipe, out, calibration=text, **SMALL)
        assert result.result_bytes <= forecast.result_bytes
        assert forecast.result_bytes <= 1.5 * result.result_bytes + 100_000
        assert result.result_parameters == tsotsallm.inspect(out).parameters
