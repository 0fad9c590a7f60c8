"""Really narrower layers: whole feed-forward neurons and groups of attention heads removed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.errors import NumericsError, RecipeError
from tsotsallm.stages.contract import LayerEdit, LayerFile, Model, Needs
from tsotsallm.stages.costs import Conditions, Cost, dense_bytes, forward_flops
from tsotsallm.streaming.frame import InputsSeen
from tsotsallm.streaming.statistics import Gram
from tsotsallm.streaming.sweep import Visit
from tsotsallm.validation import Count, Natural, NotNegative, Part

READ_BY = {"feed_forward": "mlp.down_proj", "kv_groups": "self_attn.o_proj"}


@dataclass(frozen=True)
class Neurons(LayerEdit):
    """Remove neurons and head groups, the same number in every layer, and let what reads the others make up for them.

    A neuron's saliency is ‖W[:, j]‖²·Σ x_j² of the linear that reads it (of a group the sum over its heads' numbers). The
    columns K that are left become W_K + W_S·H_SK·(H_KK + damping)⁻¹, the least-squares answer given the inputs' Gram H
    (as in arXiv:2501.17771 and arXiv:2306.11695, with the update of arXiv:1705.07565). Where a norm follows the linear, both
    are measured behind it (`grams_behind`). Norms that span all heads are cut with them.

    feed_forward  share of the feed-forward neurons to remove
    kv_groups     key-value heads to remove in each layer, each with the query heads that share it
    multiple      how many neurons are left is the nearest multiple of it: 256 suits all grids of GGUF, 32 the simpler
                  ones; by default 256, or 32, or 1: the largest that the width before is a multiple of
    damp          raises the Gram's diagonal by this share of its mean
    """

    name: ClassVar[str] = "neurons"
    feed_forward: Part = 0.0
    kv_groups: Natural = 0
    multiple: Count | None = None
    damp: NotNegative = 0.01

    def __post_init__(self) -> None:
        if not (self.feed_forward or self.kv_groups):
            raise RecipeError("neurons removes nothing; give a share under 1, or groups to remove, such as "
                              "{neurons: {feed_forward: 0.33}}")

    @property
    def needs(self) -> Needs:
        """Text and the Gram of what reads the neurons."""
        return Needs(text=True, gram=True)

    def kept_neurons(self, spec: ModelSpec) -> int:
        """Feed-forward neurons that every layer keeps."""
        width = spec.feed_forward
        if not self.feed_forward:
            return width
        multiple = self.multiple or next(size for size in (256, 32, 1) if width % size == 0)
        return min(width, max(1, round((1 - self.feed_forward) * width / multiple)) * multiple)

    def spec_after(self, spec: ModelSpec) -> ModelSpec:
        """The spec of the narrower model."""
        groups = spec.kv_heads - self.kv_groups
        config = spec.config | {"intermediate_size": self.kept_neurons(spec), "num_key_value_heads": groups,
                                "num_attention_heads": groups * (spec.heads // spec.kv_heads), "head_dim": spec.head_dim}
        return ModelSpec(config, None, spec.layer_order)

    def check(self, model: Model) -> None:
        """Raise RecipeError where the family has no such widths, or where rounding leaves every neuron."""
        super().check(model)
        spec = model.spec
        if self.kv_groups >= spec.kv_heads:
            raise RecipeError(f"neurons.kv_groups is {self.kv_groups}, but the model has {spec.kv_heads} key-value heads "
                              "and needs one; remove fewer")
        try:
            self.spec_after(spec).hf_config  # noqa: B018
        except Exception as error:  # transformers raises many types for widths that a family does not have
            usable = [str(groups) for groups in range(1, spec.kv_heads) if self._leaves_a_model(spec, groups)]
            raise RecipeError(f"neurons.kv_groups {self.kv_groups} leaves {spec.kv_heads - self.kv_groups} key-value heads "
                              f"with {spec.heads // spec.kv_heads} query heads each, which a {spec.family} of width "
                              f"{spec.hidden} cannot have ({error}); usable: {', '.join(usable) or 'none'}") from None
        if self.kept_neurons(spec) == spec.feed_forward and not self.kv_groups:
            raise RecipeError(f"neurons.feed_forward {self.feed_forward} of {spec.feed_forward} neurons leaves all of them "
                              "when rounded to the multiple that grids need; remove more, or set multiple: 32")

    def remarks(self, model: Model) -> list[str]:
        """What fewer heads mean in families whose norms or engines count them."""
        found, spec = [], model.spec
        if self.kv_groups and spec.traits.gguf.square:
            found.append(f"llama.cpp requires of {spec.family} that all heads together are as wide as the hidden states: "
                         "with fewer the result runs in transformers, but is not exported as GGUF")
        if self.kv_groups and spec.traits.spanning:
            found.append(f"the norms of queries and keys span all heads in {spec.family}: they are taken over those that "
                         "are left, which changes the scores of attention somewhat")
        return found

    def _leaves_a_model(self, spec: ModelSpec, groups: int) -> bool:
        try:
            replace(self, kv_groups=groups).spec_after(spec).hf_config  # noqa: B018
        except Exception:  # as above
            return False
        return True

    def shape(self, model: Model) -> Model:
        """The narrower model, stored dense."""
        spec = self.spec_after(model.spec)
        return replace(super().shape(model), spec=spec, packed=False, layers=tuple(
            LayerFile(layer.source, dense_bytes(spec, index, model.element)) for index, layer in enumerate(model.layers)))

    def forecast(self, model: Model, conditions: Conditions) -> Cost:
        """The updates of what is left."""
        spec = model.spec
        widths = self.kept_neurons(spec), (spec.kv_heads - self.kv_groups) * spec.head_dim
        again = sum(forward_flops(spec, layer, conditions.tokens, conditions.window) for layer in range(
            spec.layers)) if spec.traits.behind else 0.0
        return Cost(flops=again + spec.layers * sum(width ** 3 / 3 + 2.0 * spec.hidden * width ** 2 for width in widths))

    @torch.no_grad()
    def reshape(self, visit: Visit, spec: ModelSpec, prepared: Any = None) -> dict[str, Tensor]:
        """Narrow a layer: its tensors in storage type, by name. In memory what was removed becomes zero, so that the layer,
        as it runs on, gives what the narrower one will give."""
        traits = spec.traits
        layer = {name: tensor.detach() for name, tensor in visit.frame.layer.state_dict().items()}
        sizes = {"feed_forward": 1, "kv_groups": spec.head_dim * (spec.heads // spec.kv_heads)}
        keeps = {"feed_forward": self.kept_neurons(spec), "kv_groups": spec.kv_heads - self.kv_groups}
        changed = {kind: reader for kind, reader in READ_BY.items()
                   if keeps[kind] != layer[f"{reader}.weight"].shape[1] // sizes[kind]}
        behind = grams_behind(visit, [reader for reader in changed.values() if reader in traits.behind],
                              spec.hf_config.rms_norm_eps)
        for kind, reader in changed.items():
            weight, gram = layer[f"{reader}.weight"], behind.get(reader, visit.gram_of(reader)).matrix
            outputs = weight
            if reader in behind:
                outputs = weight * (layer[f"{traits.behind[reader]}.weight"] + traits.offset)[:, None]
            units = weight.shape[1] // sizes[kind]
            saliency = (outputs.square().sum(0) * gram.diagonal()).view(units, -1).sum(1)
            kept = saliency.sort(descending=True, stable=True).indices[:keeps[kind]].sort().values
            columns = _spread(kept, sizes[kind])
            layer[f"{reader}.weight"] = updated(weight, gram, columns, self.damp, f"layer {visit.index}, {reader}")
            before = visit.frame.linear(reader).weight.data
            before.zero_()[:, columns] = layer[f"{reader}.weight"].to(visit.storage).to(before)
            for writer, rows in _written(kind, kept, spec).items():
                norms = [norm for norm, projection in traits.spanning.items() if projection == writer]
                for name in (f"{writer}.weight", f"{writer}.bias", *(f"{norm}.weight" for norm in norms)):
                    if name in layer:
                        layer[name] = layer[name][rows]             # a copy: memory changes below
                for norm in norms:
                    _narrow_in_memory(visit, writer, norm, rows)
        return {name: tensor.to(visit.storage).contiguous() for name, tensor in layer.items()}


def grams_behind(visit: Visit, readers: list[str], eps: float) -> dict[str, Gram]:
    """The Grams of what linears read before a norm, each token weighted by 1 / (mean square of the linear's output + ε).

    The norm divides its input by the root of that: a least-squares answer with these weights is, to first order, the one
    for what leaves the norm, where every token counts alike.
    """
    found: dict[str, Gram] = {}
    if not readers:
        return found
    assert visit.inputs is not None

    def add(name: str, inputs: Tensor) -> None:
        linear = visit.frame.linear(name)
        outputs = torch.nn.functional.linear(inputs, linear.weight, linear.bias)
        gram = found.setdefault(name, Gram(inputs.shape[-1], visit.frame.device))
        gram.add(inputs, 1 / (outputs.square().mean(-1).flatten() + eps))

    for batch in visit.inputs.batches():
        with suppress(InputsSeen), visit.frame.watching(readers, add, to_the_end=False):
            visit.frame(visit.inputs.read(batch))
    return found


def _written(kind: str, kept: Tensor, spec: ModelSpec) -> dict[str, Tensor]:
    """Linear -> those of its rows that write what is kept; fused linears have the rows of their parts one after another."""
    group = spec.heads // spec.kv_heads
    parts = {"mlp.gate_proj": (1, spec.feed_forward), "mlp.up_proj": (1, spec.feed_forward)} if kind == "feed_forward" else {
        "self_attn.q_proj": (spec.head_dim * group, spec.heads * spec.head_dim),
        "self_attn.k_proj": (spec.head_dim, spec.kv_heads * spec.head_dim),
        "self_attn.v_proj": (spec.head_dim, spec.kv_heads * spec.head_dim)}
    rows = {name: _spread(kept, size) for name, (size, _) in parts.items()}
    for fused, names in spec.traits.fused.items():
        if names[0] in rows:
            start, moved = 0, []
            for name in names:
                moved.append(rows.pop(name) + start)
                start += parts[name][1]
            rows[fused] = torch.cat(moved)
    return rows


def _narrow_in_memory(visit: Visit, projection: str, norm: str, rows: Tensor) -> None:
    """Let a norm that spans a projection give in memory what it gives over `rows` alone.

    With the other rows zero its mean square is taken over all of them: its weight makes up for the number.
    """
    linear, weight = visit.frame.linear(projection), visit.frame.layer.get_submodule(norm).get_parameter("weight").data
    gone = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    gone[rows] = False
    linear.weight.data[gone] = 0
    if linear.bias is not None:
        linear.bias.data[gone] = 0
    weight.mul_((len(rows) / len(weight)) ** 0.5)


def _spread(units: Tensor, size: int) -> Tensor:
    """The numbers of units of so many each."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def updated(weight: Tensor, gram: Tensor, kept: Tensor, damp: float, where: str) -> Tensor:
    """The kept columns of a weight (d_out, d_in), changed so that the outputs without the others are nearest."""
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    metric = gram[kept][:, kept]
    metric.diagonal().add_((damp * gram.diagonal().mean()).clamp(min=1e-30))
    factor, info = torch.linalg.cholesky_ex(metric)
    if int(info):
        raise NumericsError(f"{where}: the Gram of {len(kept)} inputs is not positive definite with damp {damp:g}; raise "
                            "damp, or calibrate on more text")
    owed = weight[:, gone] @ gram[gone][:, kept]
    return weight[:, kept] + torch.cholesky_solve(owed.mT, factor).mT
