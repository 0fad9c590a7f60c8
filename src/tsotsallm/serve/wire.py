"""What goes over the wire: OpenAI's requests and answers, and those of the first work's service; refused when wrong."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from tsotsallm.errors import TsotsallmError
from tsotsallm.files import one_line, quoted
from tsotsallm.serve.fields import TOOLS, refusal_of
from tsotsallm.serve.schema import checked, grammar_of

MOST_SAMPLES = 8
MOST_STOPS = 16
MOST_LIKELIEST = 20
MOST_MESSAGES = 1024
MOST_GRAMMAR = 1 << 16
LARGEST_SEED = 2 ** 63 - 1


def wrong(param: str, message: str) -> PydanticCustomError:
    """An error of a field, as OpenAI names it in `param`."""
    plain = param if re.fullmatch(r"\w{1,100}", param) else ""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": plain})


def _well_formed(text: str) -> str:
    """Refuse halves of surrogate pairs, which are no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair, which is no character") from None
    return text


def _whole(value: Any) -> Any:
    """1.0 is a whole number in JSON."""
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
    """What comes with a request."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Known(RequestBody):
    """A request that has no other fields than its own; another one is passed over only where it cannot change the answer."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, given: Any) -> Any:
        if isinstance(given, dict):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for name, value in given.items():
                if name not in known and (why := refusal_of(name, value, known)) is not None:
                    raise wrong(name, why)
        return given


class Part(Known):
    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _refuse_media(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("type", "text") != "text":
            raise wrong("type", f"a part of type {quoted(given['type'])} is not supported: models read text alone here")
        return given


class Message(Known):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=MOST_MESSAGES)]
    name: Text | None = Field(None, max_length=256, description="for chat templates that show it")

    @model_validator(mode="before")
    @classmethod
    def _refuse_tools(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name, found in (("role", given.get("role") in ("tool", "function")), ("tool_calls", given.get("tool_calls")),
                                ("function_call", given.get("function_call"))):
                if found:
                    raise wrong(name, TOOLS)
            if given.get("content") is None:
                raise wrong("content", "a message has no text; give it as content, or leave the message out")
        return given

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content} | ({} if self.name is None else {"name": self.name})


class StreamOptions(Known):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class JsonSchema(Known):
    """OpenAI's frame around a schema; `strict` or not, answers keep to it."""

    name: Text | None = None
    description: Text | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class ResponseFormat(Known):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="llama.cpp's, beside json_object")

    @model_validator(mode="after")
    def _require_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise wrong("json_schema", "json_schema belongs to the type json_schema, and to no other")
        if self.schema_ is not None and self.type != "json_object":
            raise wrong("schema", "schema belongs to the type json_object; give it in json_schema")
        return self

    @property
    def wanted(self) -> Any:
        """The schema that is asked for; None for plain text."""
        given = self.schema_ if self.json_schema is None else self.json_schema.schema_
        return None if self.type == "text" else {"type": "object"} if given is None else given


class Generation(Known):
    """What requests for text have in common."""

    model: Text | None = Field(None, max_length=256, description="name of a model that is served; the first without one")
    max_tokens: Count | None = Field(None, description="new tokens at most; the service's own limit holds too")
    max_completion_tokens: Count | None = Field(None, description="the same, and goes before max_tokens")
    temperature: Temperature | None = Field(None, description="0 takes the likeliest token; 1 without one")
    top_p: Share | None = None
    top_k: Annotated[Whole, Field(ge=0, le=1_000_000)] | None = Field(None, description="0: among all tokens")
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="least probability, as a share of that of the likeliest token")
    seed: Seed | None = Field(None, description="of chance; another one every time without one")
    logit_bias: dict[TokenId, Bias] | None = Field(None, description="added to the logits of tokens, by id")
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Divisor | None = Field(None, description="1 changes nothing")
    repeat_penalty: Divisor | None = Field(None, description="llama.cpp's name of repetition_penalty")
    repeat_last_n: Annotated[Whole, Field(ge=-1, le=1_000_000)] | None = Field(
        None, description="tokens of prompt and answer that penalties look back on; 64 without one, -1: all of them")
    stop: Stop | Stops | None = Field(None, description="texts that end the answer")
    n: Annotated[Whole, Field(ge=1, le=MOST_SAMPLES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(None, description="JSON, of a schema or not; GGUF files alone")
    json_schema: dict[str, Any] | None = Field(None, description="llama.cpp's name of a schema; GGUF files alone")
    guided_json: dict[str, Any] | Text | None = Field(None, description="vLLM's name of a schema; GGUF files alone")
    grammar: Annotated[Text, Field(max_length=MOST_GRAMMAR)] | None = Field(
        None, description="GBNF that the answer follows; GGUF files alone")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.repetition_penalty is not None and self.repeat_penalty not in (None, self.repetition_penalty):
            raise wrong("repeat_penalty", "repeat_penalty and repetition_penalty are the same, but have different values")
        names = list(self.forms)
        if len(names) > 1:
            raise wrong(names[1], f"{names[0]} and {names[1]} are given together; an answer has one form")
        self.gbnf       # noqa: B018  what is wrong with it belongs to the request
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def forms(self) -> dict[str, Any]:
        """What sets the answer's form, by field."""
        given = {"response_format": self.response_format and self.response_format.wanted, "json_schema": self.json_schema,
                 "guided_json": self.guided_json, "grammar": self.grammar or None}
        return {name: value for name, value in given.items() if value is not None}

    @cached_property
    def gbnf(self) -> str | None:
        """The grammar that the answer follows."""
        for name, value in self.forms.items():
            try:
                return str(value) if name == "grammar" else grammar_of(checked(value, name))
            except TsotsallmError as error:
                raise wrong(name, one_line(error, 500)) from None
        return None


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    add_special_tokens: Literal[False] | None = Field(None, description="the template has them")
    add_generation_prompt: bool | None = Field(None, description="true, or false where the last message is continued")
    continue_final_message: bool | None = Field(None, description="an assistant's last message is continued, no other")

    @model_validator(mode="after")
    def _keep_to_the_end(self) -> Self:
        continued = self.messages[-1].role == "assistant"
        for name, only in (("continue_final_message", continued), ("add_generation_prompt", not continued)):
            if getattr(self, name) not in (None, only):
                raise wrong(name, f"{name} can only be {str(only).lower()} here: a last message is continued where it is "
                            "the assistant's, and answered otherwise")
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "top_logprobs needs logprobs: true")
        return self

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_SAMPLES)] | Annotated[
        list[Annotated[Whole, Field(ge=0, le=10_000_000)]], Field(min_length=1, max_length=1_000_000)]
    logprobs: Annotated[Whole, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    add_special_tokens: Literal[True] | None = Field(None, description="a text begins as the model's texts do")


class Likely(BaseModel):
    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(Likely):
    top_logprobs: list[Likely] = []


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timings(BaseModel):
    """What an answer took: seconds, the model's memory in this process, energy where a country was named."""

    prompt_seconds: float
    seconds: float
    tokens_per_s: float | None
    ram_bytes: int | None
    energy_wh: float | None
    energy_label: str | None


class Finished(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage
    timings: Timings


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Finished):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class Completion(Finished):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tsotsallm"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Fault(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Refusal(BaseModel):
    """Every error, in OpenAI's form."""

    error: Fault


class ProcessRequest(Known):
    """The first work's request; `num_return_sequences`, `top_k_per_token` and `stop_sequences` are HELM's words."""

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
    """A token, log P given those before it (0 for the first of a prompt), and the likeliest in its place."""

    text: str
    logprob: float
    top_logprob: dict[str, float]


class Sample(BaseModel):
    text: str
    tokens: list[ProcessToken]
    logprob: float


class ProcessResponse(Sample):
    """The first sample, and all of them under `samples`."""

    request_time: float
    samples: list[Sample]


class TokenizeRequest(Known):
    text: Text
    truncation: bool = True
    max_length: Count = 2048


class TokenizeResponse(BaseModel):
    tokens: list[int]
    request_time: float


class Health(BaseModel):
    status: Literal["ok", "closing"]
    models: list[str]
