"""A domain described by a knowledge graph: its sentences, and the linears of a model that matter most to them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import CorpusError
from tsotsallm.files import quoted, utf8_lines
from tsotsallm.rdf import SUFFIXES, Quad, Skipped, Statements, Term, library, opened, suffix_of
from tsotsallm.streaming.backward import all_weights, backward_sweep
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.frame import Frame
from tsotsallm.streaming.sweep import Tick, silent
from tsotsallm.training.trainee import Place

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

LABELS = ("http://www.w3.org/2000/01/rdf-schema#label", "http://www.w3.org/2004/02/skos/core#prefLabel",
          "http://schema.org/name", "http://xmlns.com/foaf/0.1/name")
TYPE = "http://www.w3.org/1999/02/22-rdf-syntax-ns#type"
LANGUAGES = ("en", "", "fr")

Triple = tuple[str, str, str]


@dataclass(frozen=True)
class DomainGraph:
    """Subject, predicate and object of every statement, in words; `notes` list what could not be read."""

    triples: tuple[Triple, ...]
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The graph as sentences, one paragraph for each subject."""
        paragraphs: dict[str, list[str]] = {}
        for subject, predicate, thing in self.triples:
            sentence = f"{subject} {predicate} {thing}".strip()
            paragraphs.setdefault(subject, []).append(sentence if sentence.endswith((".", "!", "?")) else sentence + ".")
        return "\n\n".join(" ".join(sentences) for sentences in paragraphs.values())


def read_graph(source: str | Path) -> DomainGraph:
    """The statements of a graph; up to 1% that do not parse are skipped.

    In RDF (Turtle, N-Triples, N-Quads, TriG, RDF/XML) things are named by their labels, or by the last part of their IRI;
    any other file has one statement per line, its three parts separated by tabs, | or commas. Raises CorpusError where the
    graph is missing or empty, or more than 1% of it cannot be read.
    """
    path = Path(source)
    if not path.exists():
        raise CorpusError(f"{source} does not exist; give a graph as RDF (Turtle and the like), or one subject, predicate "
                          "and object per line")
    if suffix_of(path) in SUFFIXES:
        statements = Statements(path, CorpusError, "graph")
        triples, skipped = tuple(_in_words(statements)), statements.skipped
    else:
        skipped = Skipped(path, "'subject | predicate | object'", CorpusError)
        triples = tuple(_lines(path, skipped))
    if not triples:
        raise CorpusError(f"{source} holds no statement; give a graph of a hundred or more")
    return DomainGraph(triples, tuple(skipped.notes))


def _lines(path: Path, skipped: Skipped) -> Iterator[Triple]:
    with opened(path, CorpusError) as file:
        for number, line in utf8_lines(file, path.name, CorpusError):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            parts = next((split for mark in ("\t", "|", ",") if len(split := line.split(mark)) == 3), None)
            if parts is None or not all(part.strip() for part in parts):
                skipped.add(number, f"{quoted(line.strip())}; its three parts are separated by tabs, | or commas")
                continue
            skipped.read += 1
            yield parts[0].strip(), _words(parts[1].strip()), parts[2].strip()
    skipped.judge()


def _in_words(quads: Statements) -> Iterator[Triple]:
    rdf = library("graph", "graphs in RDF")
    labels: dict[str, tuple[int, str]] = {}
    statements: list[Quad] = []
    for quad in quads:
        if quad.predicate.value in LABELS and isinstance(quad.object, rdf.Literal):
            language = (quad.object.language or "").partition("-")[0]
            rank = LANGUAGES.index(language) if language in LANGUAGES else len(LANGUAGES)
            labels[quad.subject.value] = min(labels.get(quad.subject.value, (99, "")), (rank, quad.object.value))
        else:
            statements.append(quad)

    def name(term: Term) -> str:
        if isinstance(term, rdf.Literal):
            return str(term.value)
        return labels[term.value][1] if term.value in labels else _words(re.split(r"[/#]", term.value.rstrip("/#"))[-1])

    for quad in statements:
        if any(isinstance(term, rdf.BlankNode) for term in (quad.subject, quad.object)):
            continue                        # a blank node has no name to put into words
        yield name(quad.subject), "is a" if quad.predicate.value == TYPE else name(quad.predicate), name(quad.object)


def _words(identifier: str) -> str:
    """hasCapital, has_capital -> has capital."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", identifier.replace("_", " ").replace("-", " ")).strip().lower()


def graph_text(source: str | Path) -> str:
    """A graph as sentences, one paragraph for each subject; raises CorpusError like `read_graph`."""
    return read_graph(source).text


@dataclass(frozen=True)
class Saliency:
    """The importance of every linear for a text: Σ|w·∂L/∂w| over its weights, and the mean square of its inputs."""

    gradient: dict[Place, float]
    inputs: dict[Place, float]


def saliency(view: View, corpus: Corpus, scratch: Path, device: torch.device, tick: Tick = silent) -> Saliency:
    """Measure both in one forward and one backward sweep, with one layer in memory."""
    squares: dict[Place, float] = {}
    counts: dict[Place, int] = {}
    whole = all_weights(view)

    def watch(place: Place) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not torch.is_grad_enabled():         # the forward sweep; the backward sweep computes the layer again
                squares[place] = squares.get(place, 0.0) + float(args[0].double().square().sum())
                counts[place] = counts.get(place, 0) + args[0].numel()
        return hook

    handles: list[RemovableHandle] = []

    def load(frame: Frame, index: int) -> dict[str, Tensor]:
        while handles:
            handles.pop().remove()
        wanted = whole(frame, index)
        handles.extend(frame.linear(name).register_forward_pre_hook(watch((index, name))) for name in frame.linear_names())
        return wanted

    gradient: dict[Place, float] = {}
    for path in scratch.glob("*"):
        path.unlink()
    for index, gradients in backward_sweep(view, corpus, scratch, device, tick, load=load):
        for name in linear_shapes(view.spec, index):
            weight, change = gradients[f"{name}.weight"]
            gradient[index, name] = float((weight * change).abs().sum(dtype=torch.float64))
    return Saliency(gradient, {place: squares[place] / counts[place] for place in squares})


def contrast(domain: Saliency, general: Saliency) -> dict[Place, float]:
    """How much more every linear matters to a domain than to general text: the mean of two standardised log ratios."""
    def standardised(ours: dict[Place, float], theirs: dict[Place, float]) -> dict[Place, float]:
        ratios = {place: math.log((ours[place] + 1e-30) / (theirs[place] + 1e-30)) for place in ours}
        mean = sum(ratios.values()) / len(ratios)
        spread = math.sqrt(sum((ratio - mean) ** 2 for ratio in ratios.values()) / len(ratios)) or 1.0
        return {place: (ratio - mean) / spread for place, ratio in ratios.items()}

    by_gradient, by_inputs = (standardised(ours, theirs) for ours, theirs in (
        (domain.gradient, general.gradient), (domain.inputs, general.inputs)))
    return {place: (by_gradient[place] + by_inputs[place]) / 2 for place in by_gradient}


def chosen_places(scores: dict[Place, float], sizes: dict[Place, int], share: float) -> list[Place]:
    """The highest-scoring linears that hold at most the share `share` of all weights, at least one, in model order."""
    budget = share * sum(sizes.values())
    taken: list[Place] = []
    for place in sorted(scores, key=lambda place: (-scores[place], place)):
        if not taken or sizes[place] <= budget:
            taken.append(place)
            budget -= sizes[place]
    return sorted(taken)
