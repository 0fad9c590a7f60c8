"""Little text: what is held out, and that compensation stays only where it helps there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tsotsallm
from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.numerics.grids import IntegerGrid
from tsotsallm.recipe import Recipe
from tsotsallm.streaming.corpus import calibration
from tsotsallm.streaming.statistics import HELD_OUT, Gram
from tsotsallm.streaming.sweep import SweepOptions, TwoStates, embed_corpus, sweep

CPU = torch.device("cpu")


@pytest.mark.parametrize(("windows", "length", "seen"), [(4, 30, 90), (1, 40, 30), (40, 48, None)])
def test_the_last_quarter_is_held_out_where_text_is_scarce(tiny: Path, text: Path, tmp_path: Path, windows: int,
                                                            length: int, seen: int | None) -> None:
    view = View.of(Checkpoint(tiny))
    corpus = calibration(text.read_text(), view.checkpoint.codec, windows=windows, length=length, seed=0, source="text")
    inputs: list[torch.Tensor] = []
    for judges in (False, True):
        states = TwoStates(tmp_path / str(judges), [len(window) for window in corpus.windows], view.spec.hidden)
        embed_corpus(view, corpus, states.inputs_of(0)).flush()
        visit = next(iter(sweep(view, states, observe=True, device=CPU, options=SweepOptions(judges=judges))))
        gram = visit.gram_of("self_attn.q_proj")
        if not judges:
            whole = gram.matrix.clone()
            assert gram.held_out is None
            assert gram.tokens == windows * length
        elif seen is None:
            assert gram.held_out is None
            assert torch.equal(gram.matrix, whole)
        else:
            assert gram.held_out is not None
            inputs.append(gram.held_out)
            assert (gram.tokens, len(gram.held_out)) == (seen, windows * length - seen)
            torch.testing.assert_close(gram.matrix + gram.held_out.mT @ gram.held_out, whole, rtol=1e-4, atol=1e-3)


def test_errors_held_out_are_those_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(3)
    gram, rows, weights = Gram(6, CPU), torch.randn(9, 6, generator=generator), torch.rand(9, generator=generator)
    gram.hold_out(rows[:4], weights[:4])
    gram.hold_out(rows[4:], weights[4:])
    errors = torch.randn(5, 6, generator=generator)
    expected = sum(float(weight * (errors @ row).square().sum()) for row, weight in zip(rows, weights, strict=True))
    assert gram.error_held_out(errors) == pytest.approx(expected, rel=1e-5)
    gram.hold_out(torch.randn(2 * HELD_OUT, 6, generator=generator))
    assert gram.held_out is not None
    assert len(gram.held_out) == HELD_OUT


@pytest.mark.parametrize("line", ["gptq:3:32", "gptq:q4_0"])
@pytest.mark.parametrize("helps", [True, False])
def test_compensation_stays_only_where_it_helps_on_what_is_held_out(line: str, helps: bool) -> None:
    """Inputs like those of the Gram keep it; inputs that point where no token of the Gram did leave it out."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(3, 64, generator=generator)
    seen = torch.randn(40, 3, generator=generator) @ base + 0.05 * torch.randn(40, 64, generator=generator)
    orthogonal = torch.linalg.svd(base)[2][3:]
    held = seen if helps else torch.randn(40, 61, generator=generator) @ orthogonal
    gram = Gram(64, CPU)
    gram.add(seen)
    gram.squares["x"], gram.outputs["x"] = 1.0, torch.eye(24)
    gram.hold_out(held)
    fields = dict(Recipe.parse_text(line).plain()[0]["quantize"])
    if "q4_0" in line:
        fields |= {"weigh": False, "follow": 0.0, "couple": False}
    [stage] = Recipe.parse([{"quantize": fields}]).stages
    weight = torch.randn(24, 64, generator=generator) * 0.1
    linear = Linear("x", weight, torch.float32)
    stage.edit(linear, gram, 0, last=True)              # type: ignore[attr-defined]
    plain = Linear("x", weight, torch.float32)
    [nearest] = Recipe.parse_text(line.replace("gptq", "rtn")).stages
    nearest.edit(plain, None, 0, last=True)             # type: ignore[attr-defined]
    if "q4_0" not in line:                              # scales for what the columns count
        plain.quantise(IntegerGrid(3, 32).round(weight, torch.float32, importance=gram.diagonal))
    assert torch.equal(linear.effective(), plain.effective()) is not helps
    errors = [gram.error_held_out(weight - one.effective()) for one in (linear, plain)]
    assert errors[0] <= errors[1]


def test_little_text_is_no_worse_than_none(tiny: Path, text: Path, tmp_path: Path) -> None:
    assert IntegerGrid(3, 32).bits == 3
    found = {}
    for line in ("rtn:3:32", "gptq:3:32"):
        tsotsallm.compress(tiny, line, tmp_path / line[:3], calibration=text, windows=1, window=24)
        found[line] = tsotsallm.evaluate(tmp_path / line[:3], text, reference=tiny, context=64).kl
    assert found["gptq:3:32"] is not None
    assert found["rtn:3:32"] is not None
    assert found["gptq:3:32"] <= 1.05 * found["rtn:3:32"]
