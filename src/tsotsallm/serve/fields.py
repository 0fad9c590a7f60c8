"""How every field is treated that other servers document: one that is not supported is refused by name, never ignored."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping

from tsotsallm.files import quoted

TOOLS = ("tools are not supported: describe them in the text of a message and read the call from the answer, whose form "
         "response_format can set")
IGNORED = frozenset({
    # OpenAI: who sends the request, how it is billed and stored there
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "parallel_tool_calls",
    "cache_control", "prompt_cache_breakpoint",
    # vLLM
    "request_id", "session_id", "guided_decoding_backend",
    # llama.cpp: settings of samplers that are off, because the fields that switch them on are refused
    "mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers",
    "xtc_threshold", "dynatemp_exponent", "adaptive_decay"})
"""Fields that cannot change an answer, whatever their value."""
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # OpenAI
    "functions": ([],), "function_call": ("none", "auto"), "tools": ([],), "tool_choice": ("none", "auto"),
    "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": ("none",), "verbosity": ("medium",),
    "web_search_options": (), "moderation": (), "best_of": (1,), "suffix": ("",), "echo": (False,),
    # OpenAI and others: messages, as earlier answers come back
    "tool_calls": ([],), "tool_call_id": (), "refusal": ("",), "annotations": ([],), "reasoning": ("",),
    "reasoning_content": ("",), "prefix": (False,), "partial": (False,),
    # vLLM: sampling
    "use_beam_search": (False,), "length_penalty": (1,), "early_stopping": (False,), "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,), "ignore_eos": (False,), "min_tokens": (0,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "truncate_prompt_tokens": (), "truncation_side": (), "prompt_logprobs": (),
    "logprob_token_ids": (), "allowed_token_ids": (), "bad_words": ([],), "thinking_token_budget": (-1,),
    "include_reasoning": (True,), "repetition_detection": (), "watermarking": (False,), "logits_processors": ([],),
    # vLLM: form of the answer
    "guided_regex": (), "guided_choice": (), "guided_grammar": (), "guided_whitespace_pattern": (), "structured_outputs": (),
    "structural_tag": (), "lora_adapter": (), "lora_request": (), "adapter_id": (),
    # vLLM: the prompt, and what comes with the answer
    "documents": ([],), "chat_template": (), "chat_template_kwargs": ({},), "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},), "prompt_embeds": (), "priority": (0,), "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,), "return_token_offsets": (False,), "return_prompt_text": (False,),
    "return_mm_kwargs": (True,), "routed_experts_prompt_start": (0,), "cache_salt": (), "kv_transfer_params": (),
    "ec_transfer_params": (), "vllm_xargs": ({},), "stream_interval": (1,),
    # llama.cpp: sampling
    "typical_p": (1,), "mirostat": (0,), "dry_multiplier": (0,), "xtc_probability": (0,), "top_n_sigma": (-1, 0),
    "dynatemp_range": (0,), "adaptive_target": (-1,), "min_keep": (0,), "samplers": (), "backend_sampling": (False,),
    "grammar_lazy": (False,), "grammar_triggers": ([],), "preserved_tokens": ([],), "n_probs": (0,),
    "post_sampling_probs": (False,),
    # llama.cpp: length, prompt, and what comes with the answer
    "n_predict": (-1,), "n_cmpl": (1,), "n_indent": (0,), "n_keep": (0,), "n_discard": (0,), "n_cache_reuse": (0,),
    "t_max_predict_ms": (-1, 0), "id_slot": (-1,), "cache_prompt": (True,), "lora": ([],), "image_data": ([],),
    "return_tokens": (False,), "return_progress": (False,), "timings_per_token": (False,), "verbose": (False,),
    "response_fields": ([],), "sse_ping_interval": (-1,), "reasoning_format": ("none",), "reasoning_in_content": (False,),
    "reasoning_control": (False,), "reasoning_budget_tokens": (-1,), "thinking_forced_open": (False,),
    "chat_format": (0,), "chat_parser": ("",), "generation_prompt": ("",), "parse_tool_calls": (False,)}
"""Fields that would change an answer, with the values at which they do not, which are accepted."""
REMEDIES = {
    "functions": TOOLS, "function_call": TOOLS, "tools": TOOLS, "tool_choice": TOOLS, "tool_calls": TOOLS,
    "tool_call_id": TOOLS,
    "modalities": "answers are text", "audio": "answers are text", "image_data": "prompts are text",
    "best_of": "request several answers with n, and choose among them by their logprobs",
    "echo": "put the prompt before the answer yourself; POST /process has echo_prompt",
    "stop_token_ids": "give their texts in stop",
    "guided_regex": "give a grammar", "guided_choice": "give a grammar such as root ::= \"yes\" | \"no\"",
    "guided_grammar": "give GBNF in grammar", "structured_outputs": "use response_format or grammar",
    "allowed_token_ids": "use logit_bias or a grammar", "bad_words": "use logit_bias",
    "n_predict": "use max_tokens", "n_cmpl": "use n", "n_probs": "use logprobs", "min_tokens": "leave it out",
    "lora": "serve a second model", "lora_adapter": "serve a second model", "lora_request": "serve a second model",
    "cache_prompt": "start the service with --no-prompt-cache"}


def is_neutral(name: str, value: object) -> bool:
    """Whether an unsupported field has a value that changes nothing."""
    return any(isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
               for neutral in NEUTRAL.get(name, ()))


def refusal_of(name: str, value: object, known: Collection[str]) -> str | None:
    """Why a field that is not among a request's `known` ones is refused; None where it changes nothing."""
    if value is None or name in IGNORED or is_neutral(name, value):
        return None
    if name not in NEUTRAL:
        near = difflib.get_close_matches(name[:64], [*known, *NEUTRAL], n=1, cutoff=0.6)
        shown = name if re.fullmatch(r"\w{1,60}", name) else quoted(name)
        return f"{shown} is not known here{f'; did you mean {near[0]}?' if near else ''}; leave it out"
    neutral = " or ".join(map(json.dumps, NEUTRAL[name]))
    remedy = REMEDIES.get(name, f"leave it out{f', or give {neutral}' if neutral else ''}")
    return f"{name} is not supported: {remedy}" if remedy is not TOOLS else f"{name}: {TOOLS}"
