"""Domains: graphs of several forms in words, saliency against autograd on the whole model, and the choice of linears."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import tsotsallm
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import CorpusError, RecipeError
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.training.domain import Saliency, chosen_places, contrast, graph_text, read_graph, saliency

TURTLE = """@prefix ex: <http://example.org/> .
@prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .
ex:Kribi a ex:SeaPort ; rdfs:label "Kribi"@fr, "Kribi port"@en ; ex:liesIn ex:Cameroon ; ex:depth "16 metres" .
ex:Cameroon rdfs:label "Cameroon" ; ex:hasCapital ex:Yaounde .
ex:Kribi ex:owner [ ex:name "nobody" ] .
"""


def test_rdf_and_lines_become_sentences(tmp_path: Path) -> None:
    (tmp_path / "g.ttl").write_text(TURTLE)
    (tmp_path / "g.txt").write_text("# a comment\nKribi port | lies_in | Cameroon\nCameroon\thasCapital\tyaounde\n")
    assert graph_text(tmp_path / "g.ttl") == (
        "Kribi port is a sea port. Kribi port lies in Cameroon. Kribi port depth 16 metres.\n\n"
        "Cameroon has capital yaounde.")
    assert graph_text(tmp_path / "g.txt") == "Kribi port lies in Cameroon.\n\nCameroon has capital yaounde."


@pytest.mark.parametrize(("name", "text", "message"), [
    ("g.ttl", TURTLE + "ex:Kribi ex:depth\n\n.", r"line [678] is not valid Turtle"),
    ("g.nt", "<http://a> <http://b> <http://c> .\n<http://a> <http://b>\n", "line 2 is not valid N-Triples"),
    ("g.txt", "a | b | c\na b c\n", "line 2 is not valid 'subject . predicate . object' .'a b c'; its three parts"),
    ("g.txt", b"a | b | c\na | b | \xff\n", "line 2 is not UTF-8 text"),
    ("g.txt", "\n# nothing\n", "holds no statement"),
])
def test_a_graph_that_does_not_parse_is_refused_with_its_line(tmp_path: Path, name: str, text: str | bytes,
                                                                     message: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CorpusError, match=message):
        read_graph(tmp_path / name)


def test_single_faults_are_skipped_and_noted(tmp_path: Path) -> None:
    triples = "".join(f"<http://x/e{number}> <http://x/p> <http://x/o> .\n" for number in range(200))
    (tmp_path / "g.nt").write_text("\ufeff<http://x/a b> <http://x/p> <http://x/o> .\n" + triples, "utf-8")
    (tmp_path / "g.txt").write_text("\ufeff" + "a b c\r\n" + "x\u2028y | knows | z\x0bz\r\n" * 200, "utf-8", newline="")
    (tmp_path / "g.nt.gz").write_bytes(gzip.compress(triples.encode()))
    found = read_graph(tmp_path / "g.nt")
    assert (len(found.triples), found.notes[1]) == (200, "g.nt, line 1: Invalid IRI code point ' '")
    found = read_graph(tmp_path / "g.txt")
    assert (set(found.triples), len(found.triples)) == ({("x\u2028y", "knows", "z\x0bz")}, 200)
    assert found.notes[1].startswith("g.txt, line 1: 'a b c'")
    assert len(read_graph(tmp_path / "g.nt.gz").triples) == 200


def test_saliency_is_that_of_autograd_on_the_whole_model(tiny: Path, tmp_path: Path) -> None:
    windows = tuple(torch.randint(2, 256, (20,), generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    found = saliency(View.of(Checkpoint(tiny)), Corpus(windows, "random"), tmp_path, torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    squares: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(
                lambda _module, args, name=name: squares.setdefault(name, []).append(args[0].detach().square().mean()))
    losses = [functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:]) for window in windows]
    torch.stack(losses).mean().backward()
    for (layer, name), value in found.gradient.items():
        module = model.model.layers[layer].get_submodule(name)
        assert value == pytest.approx(float((module.weight.detach() * module.weight.grad).abs().sum()), rel=1e-3)
        wanted = float(torch.stack(squares[f"model.layers.{layer}.{name}"]).mean())
        assert found.inputs[layer, name] == pytest.approx(wanted, rel=1e-4)
    assert len(found.gradient) == 7 * 4


def test_the_contrast_finds_what_a_domain_asks_more_of() -> None:
    places = [(layer, "q") for layer in range(4)]
    general = Saliency(dict.fromkeys(places, 2.0), dict.fromkeys(places, 3.0))
    domain = Saliency({place: 2.0 * (3 if place == (2, "q") else 1) for place in places},
                      {place: 3.0 * (2 if place in ((2, "q"), (1, "q")) else 1) for place in places})
    scores = contrast(domain, general)
    sizes = dict.fromkeys(places, 10)
    assert chosen_places(scores, sizes, 0.25) == [(2, "q")]
    assert chosen_places(scores, sizes, 0.5) == [(1, "q"), (2, "q")]
    assert chosen_places(scores, sizes, 0.01) == [(2, "q")]
    assert chosen_places(scores, sizes, 1.0) == places


def test_only_the_chosen_linears_are_trained_and_the_choice_is_saved(tiny: Path, text: Path, tmp_path: Path) -> None:
    graph = tmp_path / "domain.txt"
    words = text.read_text().split()
    graph.write_text("\n".join(" | ".join(words[3 * place:3 * place + 3]) for place in range(400)) + "\nno statement\n")
    for by in ("saliency", "random"):
        stage = {"adapt": {"steps": 4, "batch": 2, "window": 48, "learning_rate": 0.01, "rank": 2, "targets": ["all"],
                           "select": {"graph": str(graph), "share": 0.3, "by": by}}}
        out = tmp_path / by
        notes = tsotsallm.compress(tiny, [stage], out, calibration=text, windows=4, window=64).notes
        assert [note for note in notes if "line 401: 'no statement'" in note], notes
        decision = json.loads((out / "decision-1-adapt.json").read_text())
        chosen = {tuple(place) for place in decision["chosen"]}
        before, after = Checkpoint(tiny), Checkpoint(out)
        changed, sizes = set(), {}
        for layer in range(before.spec.layers):
            for name, values in before.layer(layer).items():
                if values.ndim == 2:
                    sizes[layer, name.removesuffix(".weight")] = values.numel()
                    if not torch.equal(values, after.layer(layer)[name]):
                        changed.add((layer, name.removesuffix(".weight")))
        assert changed == chosen
        assert 0.2 * sum(sizes.values()) < sum(sizes[place] for place in chosen) <= 0.3 * sum(sizes.values())
        assert len(decision["scores"]) == 28


def test_linears_that_a_domain_needs_keep_more_bits(tiny: Path, text: Path, tmp_path: Path) -> None:
    graph = tmp_path / "domain.txt"
    words = text.read_text().split()
    graph.write_text("\n".join(" | ".join(words[3 * place:3 * place + 3]) for place in range(400)))
    recipe = [{"quantize": {"bits": 3, "group": 32, "keep": {"graph": str(graph), "share": 0.3, "bits": 8}}}]
    out = tmp_path / "out"
    forecast = tsotsallm.plan(tiny, recipe, out, windows=4, window=64)
    result = tsotsallm.compress(tiny, recipe, out, calibration=text, windows=4, window=64)
    assert result.result_bytes <= forecast.result_bytes
    chosen = {tuple(place) for place in json.loads((out / "decision-1-quantize.json").read_text())["chosen"]}
    assert 0 < len(chosen) < 28
    checkpoint = Checkpoint(out)
    for layer in range(checkpoint.spec.layers):
        for name in checkpoint.layer_names(layer):
            if name.endswith("proj.weight"):
                module = name.removesuffix(".weight")
                bits = checkpoint.grid_of(f"model.layers.{layer}.{module}").bits
                assert bits == (8 if (layer, module) in chosen else 3)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        found, wanted = tsotsallm.load(out)[0](ids).logits, theirs(ids).logits
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
    with pytest.raises(RecipeError, match=r"keep\.bits is 2"):
        tsotsallm.plan(tiny, [{"quantize": {"bits": 3, "keep": {"graph": str(graph), "bits": 2}}}], out)


@pytest.mark.parametrize(("select", "message"), [
    ({"share": 0.2}, "lacks graph, which is text"), ({"graph": "g.ttl", "share": 2}, "share is 2"),
    ({"graf": "g.ttl"}, "did you mean 'graph'"), ({"graph": "g.ttl", "by": "luck"}, "by is 'luck'")])
def test_a_selection_that_makes_no_sense_is_refused(tiny: Path, tmp_path: Path, select: dict[str, object],
                                                    message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tsotsallm.plan(tiny, [{"adapt": {"select": select}}], tmp_path / "x")


def test_a_missing_graph_is_told_before_anything_starts(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        tsotsallm.compress(tiny, [{"adapt": {"select": {"graph": str(tmp_path / "none.ttl")}}}], tmp_path / "out",
                           calibration=text, windows=4, window=64)
    assert not list(tmp_path.glob("out*"))
