"""Tiny random checkpoints of every family, built on the spot, and the real data where it is at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.real_model import NotToBeHadError, real_model

torch.set_num_threads(min(2, torch.get_num_threads()))
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))      # of what tests start too, whatever else is busy

SHARED = Path(os.environ.get("TSOTSALLM_SHARED", Path(__file__).parents[2] / "shared"))

COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 16, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
    "smollm": {"model_type": "llama", "tie_word_embeddings": True, "num_attention_heads": 4, "rope_parameters": {
        "rope_type": "default", "rope_theta": 100000.0}},
    "smollm3": {"model_type": "smollm3", "tie_word_embeddings": True, "no_rope_layers": [1, 1, 1, 0]},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 24},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 24,
              "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 24},
}
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "ministral": {"model_type": "ministral", "head_dim": 24, "sliding_window": 24, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "ministral3": {"model_type": "ministral3", "head_dim": 24, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 8, "mscale": 1.0,
        "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1}},
    "ernie4_5": {"model_type": "ernie4_5", "tie_word_embeddings": True, "head_dim": 24},
    "hunyuan": {"model_type": "hunyuan_v1_dense", "tie_word_embeddings": True, "head_dim": 24, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 24},
    "granite": {"model_type": "granite", "tie_word_embeddings": True, "embedding_multiplier": 3.0, "logits_scaling": 2.5,
                "residual_multiplier": 0.4, "attention_multiplier": 0.15},
    "olmo2": {"model_type": "olmo2"},
    # not phi3: llama.cpp looks up tokens of Phi-3 by their names where a file's name says so
    "phi": {"model_type": "phi3", "max_position_embeddings": 512, "original_max_position_embeddings": 256,
            "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 256, "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0]}},
    "gemma2": {"model_type": "gemma2", "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 9,
               "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 9,
               "num_hidden_layers": 6, "rope_parameters": {
                   "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                   "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 4.0}}},
    "olmo3": {"model_type": "olmo3", "sliding_window": 9, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}}},
    "exaone4": {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 4, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
}
"""Families beside those that every test of families runs through: tests of logits, gradients, files and export do."""
EVERY_FAMILY = FAMILIES | MORE_FAMILIES
CHAT_TEMPLATE = ("{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '\n' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")
UNLIKE = ("gemma2", "ministral3", "phi")
"""Those that treat masks, caches or positions otherwise: eager attention, positions in the scores, fused linears."""


def byte_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte; 256 tokens, the first of which serves as BOS, and one merge that no text asks for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    never, nor = alphabet[alphabet.index("À")], alphabet[alphabet.index("Á")]     # bytes that no UTF-8 text has
    vocabulary = {symbol: place for place, symbol in enumerate(alphabet)}
    vocabulary[never + nor] = vocabulary.pop("ÿ")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(never, nor)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single=f"{alphabet[0]} $A", special_tokens=[(alphabet[0], 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=alphabet[0], eos_token=alphabet[1])


def build(directory: Path, family: str, *, dtype: torch.dtype = torch.float32, shard: str = "1GB", seed: int = 0,
          **changes: Any) -> Path:
    """A random checkpoint whose layers matter: weights large enough for every layer to move the logits."""
    torch.manual_seed(seed)
    fields = COMMON | EVERY_FAMILY[family] | changes
    config = AutoConfig.for_model(fields["model_type"], **{k: v for k, v in fields.items() if k != "model_type"})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
            else:
                parameter.copy_(parameter + torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    byte_tokenizer().save_pretrained(directory)
    return directory


def build_talking(directory: Path, **changes: Any) -> Path:
    """A random checkpoint with a chat template."""
    path = build(directory, "llama3", num_hidden_layers=2, **changes)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp(request.param) / request.param, request.param)


@pytest.fixture(scope="session", params=sorted(EVERY_FAMILY))
def every_family_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp(request.param) / request.param, request.param)


@pytest.fixture(scope="session", params=sorted([*FAMILIES, *UNLIKE]))
def unlike_family_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp(request.param) / request.param, request.param)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-3-like checkpoint in bfloat16, in several shards."""
    return build(tmp_path_factory.mktemp("tiny") / "tiny", "llama3", dtype=torch.bfloat16, shard="60KB")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 30 kB of varied words."""
    import random

    rng = random.Random(4)
    words = ["".join(rng.choices("aeiou rstlnm", k=rng.randint(2, 8))) for _ in range(400)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(450)))
    return path


def shared(*parts: str) -> Path:
    """A file of the shared data, or a skip that says what is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not at hand: set TSOTSALLM_SHARED to a directory that holds it")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations in tests neither read nor fill the user's cache."""
    monkeypatch.setenv("TSOTSALLM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def stories() -> Path:
    return shared("models", "stories260k")


@pytest.fixture(scope="session")
def wikitext() -> Path:
    return shared("data", "wikitext-2-raw", "wiki.test.raw")


@pytest.fixture(scope="session")
def prose() -> Path:
    return shared("data", "calibration")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real LLaMA as a GGUF file; tests that need it are skipped where the package index cannot be reached."""
    try:
        return real_model()
    except NotToBeHadError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window; tests that need it are skipped where it is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser; it is in the extra [dev]")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB, mounted for one test."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)
