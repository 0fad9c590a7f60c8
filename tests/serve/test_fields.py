"""Every documented field of OpenAI's, vLLM's and llama.cpp's requests: supported, without effect, or refused by name."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.running import Scripted, serving, with_scripted
from tests.serve.test_hostile import answer
from tsotsallm.serve.fields import IGNORED, NEUTRAL, REMEDIES, TOOLS
from tsotsallm.serve.guard import Rules
from tsotsallm.serve.wire import (
    ChatRequest,
    CompletionRequest,
    JsonSchema,
    Message,
    ProcessRequest,
    ResponseFormat,
    StreamOptions,
)

DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SENT: dict[str, dict[str, Any]] = {CHAT: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1},
                                   TEXT: {"prompt": "Hello", "max_tokens": 1}}
VLLM = """
    messages prompt model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n
    presence_penalty response_format seed stop stream stream_options temperature top_p tools tool_choice
    reasoning_effort thinking_token_budget include_reasoning parallel_tool_calls user use_beam_search top_k min_p
    repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
    skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs
    logprob_token_ids allowed_token_ids bad_words echo add_generation_prompt continue_final_message add_special_tokens
    documents chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs structured_outputs priority
    request_id session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets
    return_prompt_text return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs
    repetition_detection stream_interval prompt_embeds suffix best_of guided_json guided_regex guided_choice
    guided_grammar guided_decoding_backend guided_whitespace_pattern structural_tag early_stopping""".split()
LLAMA = """
    prompt temperature dynatemp_range dynatemp_exponent top_k top_p min_p n_predict n_indent n_keep n_discard n_cmpl
    n_cache_reuse stream stop typical_p repeat_penalty repeat_last_n presence_penalty frequency_penalty dry_multiplier
    dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_probability xtc_threshold mirostat
    mirostat_tau mirostat_eta adaptive_target adaptive_decay grammar json_schema seed ignore_eos logit_bias n_probs
    min_keep t_max_predict_ms id_slot cache_prompt return_tokens samplers timings_per_token return_progress
    sse_ping_interval post_sampling_probs response_fields lora verbose top_n_sigma backend_sampling grammar_lazy
    grammar_triggers preserved_tokens reasoning_format reasoning_control reasoning_budget_tokens parse_tool_calls
    chat_parser chat_format generation_prompt image_data echo""".split()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(with_scripted(Scripted()), Rules(key="a-key-of-tests")) as found:
        yield found


def known(*models: type[Any]) -> set[str]:
    return {field.alias or name for model in models for name, field in model.model_fields.items()} | IGNORED | set(NEUTRAL)


def test_a_place_for_every_field_of_other_servers() -> None:
    ours = known(ChatRequest, CompletionRequest)
    assert not {*VLLM, *LLAMA} - ours
    assert not IGNORED & set(NEUTRAL)
    assert not set(REMEDIES) - set(NEUTRAL)
    for model in (ChatRequest, CompletionRequest, Message):
        assert not {field.alias or name for name, field in model.model_fields.items()} & (IGNORED | set(NEUTRAL))


def test_a_place_for_every_field_of_openai() -> None:
    """As its own client declares them."""
    pytest.importorskip("openai", reason="OpenAI's client is in the extra [dev]")
    from openai.types import chat, completion_create_params
    from openai.types.shared_params import ResponseFormatJSONSchema

    def declared(one: Any) -> set[str]:
        return set(one.__annotations__) | {name for base in getattr(one, "__orig_bases__", ()) if base is not one
                                           for name in getattr(base, "__annotations__", ())}

    for theirs, ours in (
            (chat.completion_create_params.CompletionCreateParamsBase, ChatRequest),
            (completion_create_params.CompletionCreateParamsBase, CompletionRequest),
            (chat.ChatCompletionStreamOptionsParam, StreamOptions), (chat.ChatCompletionUserMessageParam, Message),
            (chat.ChatCompletionAssistantMessageParam, Message), (chat.ChatCompletionSystemMessageParam, Message),
            (chat.ChatCompletionDeveloperMessageParam, Message), (ResponseFormatJSONSchema, ResponseFormat),
            (typing.get_type_hints(ResponseFormatJSONSchema)["json_schema"], JsonSchema)):
        fields = declared(theirs)
        assert fields
        assert not fields - known(ours) - {"json_schema", "type"}, theirs


def test_every_field_is_in_the_documentation() -> None:
    told = set(re.findall(r"`([a-z_]+)", DOCS))
    assert not known(ChatRequest, CompletionRequest, ProcessRequest) - told


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_changes_nothing_is_accepted(address: str, path: str) -> None:
    for name in sorted(IGNORED):
        for value in (None, 0, "x", {"a": [1]}, True):
            assert answer(address, path, SENT[path] | {name: value})[0] == 200, name
    for name, values in NEUTRAL.items():
        for one in (None, *values):
            assert answer(address, path, SENT[path] | {name: one})[0] == 200, name
    whole = SENT[path] | {name: values[0] for name, values in NEUTRAL.items() if values} | {name: {} for name in IGNORED}
    assert answer(address, path, whole)[0] == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_would_change_an_answer_is_refused_by_name(address: str, path: str) -> None:
    for name, values in NEUTRAL.items():
        for value in (2.5, "other", [{"a": 1}], not values[0] if values and isinstance(values[0], bool) else {"a": 1}):
            status, told, _ = answer(address, path, SENT[path] | {name: value})
            assert status == 400, name
            error = told["error"]
            assert error["param"] == name
            assert error["code"] == "not_supported"
            assert error["type"] == "invalid_request_error"
            assert name in error["message"]
            assert "\n" not in error["message"]
    for name, value in (("best_of", True), ("best_of", 2), ("mirostat", False), ("n_keep", False), ("echo", 0), ("tools",
        {})):
        assert answer(address, path, SENT[path] | {name: value})[0] == 400, name       # true is not 1


@pytest.mark.parametrize("path", [CHAT, TEXT, "/process", "/tokenize"])
def test_a_field_that_nobody_knows_is_refused(address: str, path: str) -> None:
    sent = SENT.get(path, {"prompt": "x"} if path == "/process" else {"text": "x"})
    for name, near in (("temprature", None if path == "/tokenize" else "temperature"), ("xyz", None), ("tempe\nrature",
        None),
                       ("\ud800", None), ("x" * 5000, None), ("model_config", None), ("__class__", None), ("", None)):
        status, told, _ = answer(address, path, sent | {name: 1})
        assert status == 400
        message = told["error"]["message"]
        assert "not known here" in message
        assert len(message) < 400
        assert "\n" not in message
        assert near is None or f"did you mean {near}?" in message
        assert answer(address, path, sent | {name: None})[0] == 200         # null is as good as nothing


def test_tools_are_not_supported_wherever_they_come(address: str) -> None:
    user, call = SENT[CHAT]["messages"][0], {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for change in ({"tools": [{"type": "function"}]}, {"functions": [{"name": "f"}]}, {"function_call": {"name": "f"}},
                   {"tool_choice": "required"}, {"tool_choice": {"type": "function"}},
                   {"messages": [user, {"role": "assistant", "content": None, "tool_calls": [call]}]},
                   {"messages": [user, {"role": "assistant", "tool_calls": [call]}]},
                   {"messages": [user, {"role": "assistant", "content": "x", "tool_calls": [call]}]},
                   {"messages": [user, {"role": "assistant", "content": None, "function_call": {"name": "f"}}]},
                   {"messages": [user, {"role": "tool", "tool_call_id": "1", "content": "x"}]},
                   {"messages": [user, {"role": "tool", "content": None}]},
                   {"messages": [user, {"role": "function", "name": "f", "content": "x"}]},
                   {"messages": [user | {"tool_call_id": "1"}]}):
        for stream in (False, True):
            status, told, _ = answer(address, CHAT, SENT[CHAT] | change | {"stream": stream})
            assert status == 400, change
            assert TOOLS in told["error"]["message"]
            assert told["error"]["param"]


@pytest.mark.parametrize("message", [
    {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None, "tool_calls": [],
    "function_call": None},
    {"role": "user", "content": "x", "name": "Ada"}, {"role": "developer", "content": ""},
    {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}])
def test_messages_as_clients_send_them(address: str, message: dict[str, Any]) -> None:
    assert answer(address, CHAT, SENT[CHAT] | {"messages": [message]})[0] == 200


@pytest.mark.parametrize(("message", "word"), [
    ({"role": "assistant", "content": None}, "no text"), ({"role": "user"}, "no text"), ({"role": "cook", "content": "x"},
    "role"),
    ({"role": "user", "content": 5}, "content"), ({"role": "user", "content": []}, "content"), ({"content": "x"}, "role"),
    ({"role": ["tool"], "content": "x"}, "role"), ({"role": "assistant", "content": "x", "audio": {"id": "1"}}, "audio"),
    ({"role": "assistant", "content": "x", "reasoning_content": "y"}, "reasoning_content"),
    ({"role": "user", "content": "x", "nam": 1}, "name"),
    ({"role": "assistant", "content": "x", "prefix": True}, "prefix"), ("x", "messages.0"), (None, "messages.0"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "send text"),
    ({"role": "user", "content": [{"type": "input_audio"}]}, "send text"),
    ({"role": "user", "content": [{"type": "file"}]}, "send text"),
    ({"role": "user", "content": [{"type": ["x"]}]}, "send text"),
    ({"role": "user", "content": [{"type": "text", "text": None}]}, "content")])
def test_messages_that_are_refused(address: str, message: Any, word: str) -> None:
    status, told, _ = answer(address, CHAT, SENT[CHAT] | {"messages": [message]})
    assert status == 400
    assert word in told["error"]["message"]
    assert told["error"]["param"].startswith("messages.0")


@pytest.mark.parametrize(("path", "change", "param"), [
    (CHAT, {"top_logprobs": 3}, "top_logprobs"), (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"), (TEXT,
    {"logprobs": 21}, "logprobs"),
    (TEXT, {"logprobs": True}, "logprobs"), (TEXT, {"top_logprobs": 1}, "top_logprobs"), (TEXT, {"messages": []},
    "messages"), (CHAT, {"prompt": "x"}, "prompt"),
    (CHAT, {"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty"), (TEXT, {"repeat_penalty": 0},
    "repeat_penalty"),
    (TEXT, {"presence_penalty": 2.1}, "presence_penalty"), (TEXT, {"frequency_penalty": -2.1}, "frequency_penalty"), (TEXT,
    {"min_p": 1.1}, "min_p"),
    (TEXT, {"repeat_last_n": -2}, "repeat_last_n"), (TEXT, {"logit_bias": {"5": 100.5}}, "logit_bias.5"), (TEXT,
    {"logit_bias": {"x": 1}}, "logit_bias.x"),
    (TEXT, {"logit_bias": {"-1": 1}}, "logit_bias"), (TEXT, {"logit_bias": [[5, 1]]}, "logit_bias"), (TEXT,
    {"logit_bias": {"5": False}}, "logit_bias.5"),
    (TEXT, {"logit_bias": {"٣": 1}}, None), (TEXT, {"stream_options": {"include_obfuscation": True}},
    "stream_options.include_obfuscation"),
    (TEXT, {"stream_options": {"other": 1}}, "stream_options.other"), (CHAT, {"add_special_tokens": True},
    "add_special_tokens"),
    (TEXT, {"add_special_tokens": False}, "add_special_tokens"), (CHAT, {"continue_final_message": True},
    "continue_final_message"),
    (CHAT, {"add_generation_prompt": False}, "add_generation_prompt"), (TEXT, {"max_tokens": 0}, "max_tokens"), (TEXT,
    {"max_tokens": -1}, "max_tokens"),
    (TEXT, {"response_format": {"type": "xml"}}, "response_format.type"), (TEXT,
    {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (TEXT, {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
    (TEXT, {"response_format": {"type": "text", "schema": {}}}, "response_format.schema"), (TEXT,
    {"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
    (TEXT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"), (TEXT,
    {"guided_json": {"not": {}}}, "guided_json"),
    (TEXT, {"guided_json": "{"}, "guided_json"), (TEXT, {"json_schema": {"$ref": "x"}}, "json_schema"), (TEXT,
    {"json_schema": True}, "json_schema"),
    (TEXT, {"grammar": 'root ::= "a"', "guided_json": {}}, "grammar"), (TEXT, {"grammar": "x" * 70_000}, "grammar"),
    (TEXT, {"response_format": {"type": "json_object"}, "json_schema": {"type": "integer"}}, "json_schema")])
def test_values_out_of_bounds(address: str, path: str, change: dict[str, Any], param: str | None) -> None:
    status, told, _ = answer(address, path, SENT[path] | change)
    assert status == 400
    assert param is None or told["error"]["param"] == param


@pytest.mark.parametrize("change", [
    {"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_schema", "json_schema": {"name": "x",
    "schema": {"type": "integer"}, "strict": True}}},
    {"json_schema": {"type": "integer"}}, {"guided_json": {"type": "integer"}}, {"guided_json": '{"type": "integer"}'},
    {"grammar": 'root ::= "a"'}])
def test_forms_on_a_checkpoint_are_refused_with_the_remedy(address: str, change: dict[str, Any]) -> None:
    for path, stream in ((CHAT, False), (TEXT, True)):
        status, told, _ = answer(address, path, SENT[path] | change | {"stream": stream})
        assert (status, told["error"]["param"], told["error"]["code"]) == (400, next(iter(change)), "not_supported")
        assert "export MODEL --gguf" in told["error"]["message"]


@pytest.mark.parametrize("change", [{"response_format": {"type": "text"}}, {"grammar": ""},
    {"response_format": None, "guided_json": None},
                                    {"logit_bias": {}}, {"top_logprobs": 0}, {"repeat_penalty": 1.0,
                                    "repetition_penalty": 1}])
def test_neutral_forms(address: str, change: dict[str, Any]) -> None:
    assert answer(address, CHAT, SENT[CHAT] | change)[0] == 200


def test_last_messages_are_continued_or_answered(address: str) -> None:
    ending = {"messages": [*SENT[CHAT]["messages"], {"role": "assistant", "content": "I am"}]}
    for change, right in (({"continue_final_message": True}, True), ({"add_generation_prompt": False}, True),
                          ({"continue_final_message": False}, False), ({"add_generation_prompt": True}, False)):
        assert (answer(address, CHAT, SENT[CHAT] | ending | change)[0] == 200) is right
        assert (answer(address, CHAT, SENT[CHAT] | change)[0] == 200) is not right


@pytest.mark.parametrize("asked", [65, 10_000, 10 ** 30, 1e30])
def test_more_tokens_than_allowed_are_cut(address: str, asked: float) -> None:
    """As other servers do: the answer ends with `length`."""
    for path in (CHAT, TEXT):
        for name in ("max_tokens", "max_completion_tokens"):
            sent = {key: value for key, value in SENT[path].items() if key != "max_tokens"} | {name: asked}
            status, told, _ = answer(address, path, sent)
            assert (status, told["choices"][0]["finish_reason"], told["usage"]["completion_tokens"]) == (200, "length", 64)
            text = answer(address, path, sent | {"stream": True})[1]
            chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    status, told, _ = answer(address, "/process", {"prompt": "x", "max_new_tokens": asked})
    assert status == 200
    assert len(told["tokens"]) == 64
    status, told, _ = answer(address, CHAT, SENT[CHAT] | {"max_tokens": 60, "max_completion_tokens": 2})
    assert told["usage"]["completion_tokens"] == 2
