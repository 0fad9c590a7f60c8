"""What goes over the wire: OpenAI's requests and answers, and those of the first work's service; refused when wrong."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MOST_SAMPLES = 8
MOST_STOPS = 16
MOST_LIKELIEST = 20
MOST_MESSAGES = 1024
LARGEST_SEED = 2 ** 63 - 1


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
Count = Annotated[Whole, Field(ge=1, le=1_000_000)]
Seed = Annotated[Whole, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=MOST_STOPS)]


class Asked(BaseModel):
    """A request; fields that are not known are no fault, as clients send many that change nothing."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Part(Asked):
    type: Literal["text"]
    text: Text


class Message(Asked):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=MOST_MESSAGES)]

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(Asked):
    include_usage: bool | None = None


class ResponseFormat(Asked):
    type: Literal["text"] = Field(description="only text is made here")


class Generation(Asked):
    """What requests for text have in common."""

    model: Text | None = Field(None, max_length=256, description="name of a model that is served; the first without one")
    max_tokens: Count | None = Field(None, description="new tokens at most; as many as the server allows without one")
    temperature: Temperature | None = Field(None, description="0 takes the likeliest token; 1 without one")
    top_p: Share | None = None
    top_k: Annotated[Whole, Field(ge=0, le=1_000_000)] | None = Field(None, description="0: among all tokens")
    seed: Seed | None = Field(None, description="of chance; another one every time without one")
    stop: Stop | Stops | None = Field(None, description="texts that end the answer")
    n: Annotated[Whole, Field(ge=1, le=MOST_SAMPLES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="not supported: 0 alone")
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="not supported: 0 alone")
    response_format: ResponseFormat | None = None
    user: Text | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="not supported: none alone")

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_SAMPLES)] | Annotated[
        list[Annotated[Whole, Field(ge=0, le=10_000_000)]], Field(min_length=1, max_length=1_000_000)]
    logprobs: Annotated[Whole, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    echo: Literal[False] | None = Field(None, description="not supported here; POST /process has echo_prompt")


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


class ProcessRequest(Asked):
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


class TokenizeRequest(Asked):
    text: Text
    truncation: bool = True
    max_length: Count = 2048


class TokenizeResponse(BaseModel):
    tokens: list[int]
    request_time: float


class Health(BaseModel):
    status: Literal["ok", "closing"]
    models: list[str]
