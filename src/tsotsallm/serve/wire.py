"""Requests and answers of OpenAI's API and of TSOTSALLM's service; a wrong request is refused with the reason."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from tsotsallm.errors import TsotsallmError
from tsotsallm.files import JsonObject, one_line, quoted
from tsotsallm.serve.fields import TOOLS, refusal_of
from tsotsallm.serve.schema import checked, grammar_of

MOST_SAMPLES = 8
MOST_STOPS = 16
MOST_LIKELIEST = 20
MOST_MESSAGES = 1024
MOST_GRAMMAR = 1 << 16
LARGEST_SEED = 2 ** 63 - 1


def wrong(param: str, message: str) -> PydanticCustomError:
    """An error in a request's field, which OpenAI's form of an error names in `param`."""
    plain = param if re.fullmatch(r"\w{1,100}", param) else ""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": plain})


def _well_formed(text: str) -> str:
    """Refuse halves of surrogate pairs, which are not text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair, which is not a character; leave it out") from None
    return text


def _whole(value: object) -> object:
    """Accept 1.0 as a whole number, as JSON does."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, AfterValidator(_well_formed)]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Divisor = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Count = Annotated[Whole, Field(ge=1)]
Seed = Annotated[Whole, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=MOST_STOPS)]


class RequestBody(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Known(RequestBody):
    """A request with no other fields than its own; other fields are ignored only where they cannot change the answer."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, given: object) -> object:
        if isinstance(given, dict):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for name, value in given.items():
                if name not in known and (why := refusal_of(name, value, known)) is not None:
                    raise wrong(name, why)
        return given


class Part(Known):
    """A part of a message's content; only text is supported."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _refuse_media(cls, given: object) -> object:
        if isinstance(given, dict) and given.get("type", "text") != "text":
            raise wrong("type", f"a part of type {quoted(given['type'])} is not supported; send text, which is all that the "
                        "models here read")
        return given


class Message(Known):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=MOST_MESSAGES)]
    name: Text | None = Field(None, max_length=256, description="for chat templates that show it")

    @model_validator(mode="before")
    @classmethod
    def _refuse_tools(cls, given: object) -> object:
        if isinstance(given, dict):
            for name, used in (("role", given.get("role") in ("tool", "function")), ("tool_calls", given.get("tool_calls")),
                               ("function_call", given.get("function_call"))):
                if used:
                    raise wrong(name, TOOLS)
            if given.get("content") is None:
                raise wrong("content", "a message has no text; give it as content, or leave the message out")
        return given

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it; `developer` becomes `system`."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content} | ({} if self.name is None else {"name": self.name})


class StreamOptions(Known):
    """Options of a stream; `include_usage` adds a last chunk with token counts and timings."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class JsonSchema(Known):
    """OpenAI's frame around a schema, which answers follow whether or not it is `strict`."""

    name: Text | None = None
    description: Text | None = None
    strict: bool | None = None
    schema_: JsonObject | bool | None = Field(None, alias="schema")


class ResponseFormat(Known):
    """The form of an answer: text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: JsonObject | None = Field(None, alias="schema", description="llama.cpp's, beside json_object")

    @model_validator(mode="after")
    def _require_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise wrong("json_schema", "json_schema goes with the type json_schema and no other; give both, or neither")
        if self.schema_ is not None and self.type != "json_object":
            raise wrong("schema", "schema goes with the type json_object only; give it in json_schema instead")
        return self

    @property
    def wanted(self) -> object:
        """The schema that the answer must follow; None for plain text."""
        given = self.schema_ if self.json_schema is None else self.json_schema.schema_
        return None if self.type == "text" else {"type": "object"} if given is None else given


class Generation(Known):
    """The fields that all requests for text share."""

    model: Text | None = Field(None, max_length=256, description="name of a served model; by default the first one")
    max_tokens: Count | None = Field(None, description="at most this many new tokens; the service's own limit holds too")
    max_completion_tokens: Count | None = Field(None, description="the same; takes precedence over max_tokens")
    temperature: Temperature | None = Field(None, description="0 takes the likeliest token; by default 1")
    top_p: Share | None = None
    top_k: Annotated[Whole, Field(ge=0, le=1_000_000)] | None = Field(None, description="0: among all tokens")
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="least probability, as a share of that of the likeliest token")
    seed: Seed | None = Field(None, description="of the random choices; by default a new one for every request")
    logit_bias: dict[TokenId, Bias] | None = Field(None, description="added to the logits of tokens, by id")
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Divisor | None = Field(None, description="1 changes nothing")
    repeat_penalty: Divisor | None = Field(None, description="llama.cpp's name for repetition_penalty")
    repeat_last_n: Annotated[Whole, Field(ge=-1, le=1_000_000)] | None = Field(
        None, description="number of latest tokens of prompt and answer that penalties cover; by default 64, -1: all")
    stop: Stop | Stops | None = Field(None, description="texts that end the answer")
    n: Annotated[Whole, Field(ge=1, le=MOST_SAMPLES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(None, description="JSON, with or without a schema; GGUF files only")
    json_schema: JsonObject | None = Field(None, description="llama.cpp's name for a schema; GGUF files only")
    guided_json: JsonObject | Text | None = Field(None, description="vLLM's name for a schema; GGUF files only")
    grammar: Annotated[Text, Field(max_length=MOST_GRAMMAR)] | None = Field(
        None, description="GBNF that the answer follows; GGUF files only")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.repetition_penalty is not None and self.repeat_penalty not in (None, self.repetition_penalty):
            raise wrong("repeat_penalty", "repeat_penalty and repetition_penalty are two names of one field, but have "
                        "different values; give one of them")
        names = list(self.forms)
        if len(names) > 1:
            raise wrong(names[1], f"{names[0]} and {names[1]} are given together; an answer has one form, so give one")
        self.gbnf       # noqa: B018  its faults are faults of the request
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def forms(self) -> dict[str, object]:
        """The fields that set the answer's form, with their values."""
        given = {"response_format": self.response_format and self.response_format.wanted, "json_schema": self.json_schema,
                 "guided_json": self.guided_json, "grammar": self.grammar or None}
        return {name: value for name, value in given.items() if value is not None}

    @cached_property
    def gbnf(self) -> str | None:
        """The grammar that the answer follows, in GBNF; None where its form is free."""
        for name, value in self.forms.items():
            try:
                return str(value) if name == "grammar" else grammar_of(checked(value, name))
            except TsotsallmError as error:
                raise wrong(name, one_line(error, 500)) from None
        return None


class ChatRequest(Generation):
    """A request to answer a conversation."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    add_special_tokens: Literal[False] | None = Field(None, description="the chat template adds them itself")
    add_generation_prompt: bool | None = Field(None, description="true, or false where the last message is continued")
    continue_final_message: bool | None = Field(None, description="true where the last message is the assistant's")

    @model_validator(mode="after")
    def _keep_to_the_end(self) -> Self:
        continued = self.messages[-1].role == "assistant"
        for name, only in (("continue_final_message", continued), ("add_generation_prompt", not continued)):
            if getattr(self, name) not in (None, only):
                raise wrong(name, f"{name} can only be {str(only).lower()} here: the last message is continued where it is "
                            "the assistant's, and answered otherwise")
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "top_logprobs needs logprobs: true")
        return self

    @property
    def likeliest(self) -> int | None:
        """Alternatives to return with every token; None where no log-probabilities are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """A request to continue a text, several texts, or a list of token ids."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_SAMPLES)] | Annotated[
        list[Annotated[Whole, Field(ge=0, le=10_000_000)]], Field(min_length=1, max_length=1_000_000)]
    logprobs: Annotated[Whole, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    add_special_tokens: Literal[True] | None = Field(None, description="a text always begins with the model's start tokens")


class Likely(BaseModel):
    """A token with its UTF-8 bytes and its log-probability in nats."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(Likely):
    """A token of an answer, and the likeliest tokens in its place."""

    top_logprobs: list[Likely] = []


class ChatLogprobs(BaseModel):
    """Log-probabilities of the tokens of a message."""

    content: list[TokenLogprob]


class TextLogprobs(BaseModel):
    """Log-probabilities of the tokens of a continuation; `text_offset` is where each begins, in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Usage(BaseModel):
    """Token counts of a request and its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timings(BaseModel):
    """The cost of an answer: seconds, the model's memory in this process, and energy where a country was named."""

    prompt_seconds: float
    seconds: float
    tokens_per_s: float | None
    ram_bytes: int | None
    energy_wh: float | None
    energy_label: str | None


class Finished(BaseModel):
    """The fields that all complete responses share."""

    id: str
    created: int
    model: str
    usage: Usage
    timings: Timings


class ChatMessage(BaseModel):
    """The message of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer to a conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Finished):
    """The answers to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextChoice(BaseModel):
    """One continuation of a text."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class Completion(Finished):
    """The continuations of one or several texts."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class ModelCard(BaseModel):
    """A model that is served; `created` is when the service started, in seconds since 1970."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tsotsallm"


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Fault(BaseModel):
    """What is wrong, and with which field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Refusal(BaseModel):
    """Every error, in OpenAI's form."""

    error: Fault


class ProcessRequest(Known):
    """A request of TSOTSALLM's service; `num_return_sequences`, `top_k_per_token` and `stop_sequences` are HELM's names."""

    prompt: Text
    num_samples: Annotated[Whole, Field(ge=1, le=MOST_SAMPLES)] = 1
    max_new_tokens: Count = 50
    top_k: Annotated[Whole, Field(ge=0, le=1_000_000)] = 200
    temperature: Temperature = 0.8
    seed: Seed | None = None
    echo_prompt: bool | None = False
    top_p: Share = 1.0
    num_return_sequences: Annotated[Whole, Field(ge=1, le=MOST_SAMPLES)] | None = None
    top_k_per_token: Annotated[Whole, Field(ge=0, le=1_000_000)] | None = None
    stop_sequences: Stops = []


class ProcessToken(BaseModel):
    """A token, log P given the tokens before it (0 for the first of a prompt), and the likeliest token in its place."""

    text: str
    logprob: float
    top_logprob: dict[str, float]


class Sample(BaseModel):
    """One continuation, its tokens and the sum of their log-probabilities in nats."""

    text: str
    tokens: list[ProcessToken]
    logprob: float


class ProcessResponse(Sample):
    """The first sample, and all of them under `samples`."""

    request_time: float
    samples: list[Sample]


class TokenizeRequest(Known):
    """A text to tokenize; with `truncation` at most `max_length` tokens are returned."""

    text: Text
    truncation: bool = True
    max_length: Count = 2048


class TokenizeResponse(BaseModel):
    """Token ids, and the seconds that the request took."""

    tokens: list[int]
    request_time: float


class Health(BaseModel):
    """Whether the service is running, and which models it serves."""

    status: Literal["ok", "closing"]
    models: list[str]
