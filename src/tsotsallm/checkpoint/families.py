"""What belongs to a model family and cannot be read from its layers: scalings, meanings of norms, its form in GGUF.

Names and shapes of layers, and their arithmetic, are the transformers library's. What happens outside a layer (where
embeddings are read, where logits are made) and what a stage must know of a norm stands here, one record for each family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Scale = Callable[[Any], float]
"""A factor that a config determines."""

LINEARS: Mapping[str, str] = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
FUSED: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
"""Linears whose rows are those of several, one after another -> these."""
BEFORE: Mapping[str, str] = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
"""Llama's norms, both before their branches. Other families give the second name to other norms: each maps its own."""
HEADS: Mapping[str, str] = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}

BEHIND: Mapping[str, str] = {
    "self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "post_feedforward_layernorm"}
"""Linears that end a branch -> the norm behind it, in the families that have one there."""
_BEHIND = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_FOUR = {"input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm", **_BEHIND}
_SPANNING = {"self_attn.q_norm": "self_attn.q_proj", "self_attn.k_norm": "self_attn.k_proj"}

_INPUTS = frozenset(f"self_attn.{one}_proj" for one in "qkv")
_LLAMA_BIASES = _INPUTS | {"self_attn.o_proj"} | {f"mlp.{one}_proj" for one in ("gate", "up", "down")}


def _one(_config: PreTrainedConfig) -> float:
    return 1.0


def _root_of_width(config: PreTrainedConfig) -> float:
    """√(width of the hidden states); the library rounds it to the type of the weights, which is float32 in a sweep."""
    return math.sqrt(config.hidden_size)


def _value(key: str) -> Scale:
    """The factor that a config states under a key."""
    def read(config: PreTrainedConfig) -> float:
        return float(getattr(config, key))
    return read


@dataclass(frozen=True)
class Gguf:
    """A family as llama.cpp has it.

    architecture  its name there
    norms         norm of a layer -> its name in the file
    biases        linears whose biases are loaded
    pairs         whether RoPE turns neighbouring numbers where transformers turns the two halves of a head: rows of queries
                  and keys are then written in another order
    ropes         the scalings of positions that it computes alike
    partial       whether RoPE may turn the first numbers of a head alone
    keys          key of the file -> where a config has the number, a dotted path; left out where the config has none
    required      those of `keys` for which llama.cpp would put a number of its own
    activation    what the feed-forward applies, by the names that configs give it
    square        whether queries must be as wide as the hidden states
    tied          whether the head is always the embeddings
    unrotated     every so-manieth layer has no RoPE; 0: all have one
    period        layers with an attention window: all but every `period`-th; 0: none has one
    assumed       whether layers get a window where the file states none
    windowed      number of layers by which llama.cpp recognises that a model has windows; 0: by the window itself
    per_head      number of layers for which scores are scaled by the width of a head that hidden width and heads give,
                  instead of the width that it has; where given, the config's own number must be the same
    otherwise     the family of files of this architecture with none of `ropes` and none of `keys`; empty: none is
    betas         whether it reads YaRN's beta_fast and beta_slow, instead of taking 32 and 1
    base          RoPE's base in layers with a window where the file states none; 0: that of the other layers
    """

    architecture: str
    norms: Mapping[str, str] = field(default_factory=lambda: BEFORE)
    biases: frozenset[str] = frozenset()
    pairs: bool = False
    ropes: tuple[str, ...] = ("default", "linear")
    partial: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    activation: tuple[str, ...] = ("silu", "swish")
    square: bool = False
    tied: bool = False
    unrotated: int = 0
    period: int = 0
    assumed: bool = False
    windowed: int = 0
    per_head: int = 0
    otherwise: str = ""
    betas: bool = True
    base: float = 0.0

    def name_of(self, module: str) -> str:
        """What a module of a layer is called in the file."""
        return LINEARS[module] if module in LINEARS else self.norms[module]


@dataclass(frozen=True)
class Family:
    """One family of models.

    models       what its models are called
    gguf         its form in GGUF
    attention    the library's implementation of attention that computes everything the family asks for
    neutral      what the config of a one-layer model says instead, because it is done once, outside the layers
    embedding    factor of the embeddings where they are read
    residual     factor of what a branch adds to the hidden states
    divisor      logits are divided by it
    cap          the key of c where logits z become c·tanh(z / c)
    offset       is added to the weights of norms where they are used
    fused        those of FUSED that it has
    spanning     norms that span a whole projection -> that projection
    needed       dotted paths of numbers without which the library's attention fails
    behind       linears that end a branch -> the norm that their outputs pass before they are added
    """

    models: str
    gguf: Gguf
    attention: str = "sdpa"
    neutral: Mapping[str, Any] = field(default_factory=dict)
    embedding: Scale = _one
    residual: Scale = _one
    divisor: Scale = _one
    cap: str = ""
    needed: tuple[str, ...] = ()
    offset: float = 0.0
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    spanning: Mapping[str, str] = field(default_factory=dict)
    behind: Mapping[str, str] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, str]:
        """What a module of a layer is called in GGUF -> the module: the inverse of `gguf.name_of`."""
        parts = {part for linear in self.fused for part in FUSED[linear]}
        known = [module for module in (*LINEARS, *self.gguf.norms)
                 if module not in parts and (module not in FUSED or module in self.fused)]
        return {self.gguf.name_of(module): module for module in known}


_CAP = "final_logit_softcapping"
_CAPS = {one: one for one in ("attn_logit_softcapping", _CAP)}
_GELU = ("gelu_pytorch_tanh",)
_LLAMA_ROPES = ("default", "linear", "llama3")
FAMILIES: Mapping[str, Family] = {
    "llama": Family("Llama 2 and 3, SmolLM", Gguf("llama", biases=_LLAMA_BIASES, pairs=True, ropes=_LLAMA_ROPES)),
    "mistral": Family("Mistral", Gguf("llama", biases=_LLAMA_BIASES, pairs=True, ropes=_LLAMA_ROPES)),
    "ministral": Family("Ministral", Gguf("llama", pairs=True)),
    "ministral3": Family("Ministral 3", Gguf("mistral3", pairs=True, ropes=("yarn",), otherwise="mistral", keys={
        "attention.temperature_scale": "rope_parameters.llama_4_scaling_beta"}), needed=(
            "rope_parameters.llama_4_scaling_beta", "rope_parameters.original_max_position_embeddings")),
    "qwen2": Family("Qwen2", Gguf("qwen2", biases=_INPUTS, ropes=_LLAMA_ROPES)),
    "qwen3": Family("Qwen3", Gguf("qwen3", {**BEFORE, **HEADS}, ropes=_LLAMA_ROPES)),
    "smollm3": Family("SmolLM3", Gguf("smollm3", pairs=True, ropes=_LLAMA_ROPES, unrotated=4)),
    "ernie4_5": Family("ERNIE 4.5 (dense)", Gguf("ernie4_5")),
    "hunyuan_v1_dense": Family("Hunyuan (dense)", Gguf("hunyuan-dense", {
        **BEFORE, "self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"},
        ropes=("default", "linear", "dynamic"))),
    "seed_oss": Family("Seed-OSS", Gguf("seed_oss", {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}, biases=_INPUTS)),
    "granite": Family(
        "Granite (dense)", Gguf("granite", pairs=True, ropes=_LLAMA_ROPES, keys={
            "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier", "logit_scale": "logits_scaling"}),
        neutral={"embedding_multiplier": 1.0}, embedding=_value("embedding_multiplier"),
        residual=_value("residual_multiplier"), divisor=_value("logits_scaling")),
    "olmo2": Family("OLMo 2", Gguf("olmo2", {**_BEHIND, **HEADS}, square=True), spanning=_SPANNING, behind=BEHIND),
    "olmo3": Family("OLMo 3", Gguf("olmo2", {**_BEHIND, **HEADS}, ropes=("default", "yarn"), square=True, period=4,
                                 betas=False),
                    spanning=_SPANNING, behind=BEHIND),
    "exaone4": Family("EXAONE 4", Gguf("exaone4", {**_BEHIND, **HEADS}, ropes=_LLAMA_ROPES, square=True, period=4,
                                windowed=64),
                      behind=BEHIND),
    "gemma2": Family(
        "Gemma 2", Gguf("gemma2", _FOUR, keys=_CAPS, required=tuple(_CAPS), activation=_GELU, tied=True, period=2,
                        assumed=True, per_head=46),
        attention="eager", embedding=_root_of_width, cap=_CAP, offset=1.0, behind=BEHIND),
    "gemma3_text": Family(
        "Gemma 3 (text)", Gguf("gemma3", {**_FOUR, **HEADS}, keys={_CAP: _CAP}, activation=_GELU, period=6, per_head=62,
                               base=10000.0),
        embedding=_root_of_width, cap=_CAP, offset=1.0, behind=BEHIND),
    "phi3": Family("Phi-3, Phi-4", Gguf("phi3", ropes=("default", "longrope"), partial=True, square=True), fused=FUSED),
}
"""`model_type` of a config -> its family."""

WITH_PICTURES: Mapping[str, tuple[str, ...]] = {"gemma3": ("gemma3_text",), "mistral3": ("ministral3", "mistral")}
"""`model_type` of models that see pictures too -> what their text models may be, the one that is meant by default first."""

ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    architecture: tuple(name for name, family in FAMILIES.items() if family.gguf.architecture == architecture)
    for architecture in dict.fromkeys(family.gguf.architecture for family in FAMILIES.values())}
"""Architecture of llama.cpp -> its families."""
