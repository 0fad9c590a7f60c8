"""OpenAI's API: conversations, continuations and models; answers come whole or as a stream of server-sent events."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from tsotsallm.engine.interface import Alternative, Answer, Piece, Question, Token
from tsotsallm.files import JsonObject
from tsotsallm.serve.answering import (
    Heard,
    Refused,
    Service,
    asked,
    finite,
    random_seed,
    refusal,
    timings,
    unless_gone,
    usage,
    whole,
)
from tsotsallm.serve.served import Served, sampling
from tsotsallm.serve.wire import (
    MOST_SAMPLES,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Completion,
    CompletionRequest,
    Generation,
    Likely,
    ModelCard,
    ModelList,
    TextChoice,
    TextLogprobs,
    TokenLogprob,
)

EVENT = {"type": "object", "required": ["data"], "properties": {"data": {
    "type": "string", "description": "a chunk as JSON, an error, or [DONE]"}}}
STREAM: dict[int | str, JsonObject] = {200: {"description": "The answer, or a stream of its pieces with stream: true",
                                                 "content": {"text/event-stream": {"schema": EVENT}}}}


Reply = ChatCompletion | Completion | StreamingResponse


def routes(service: Service) -> APIRouter:
    """The routes below /v1 of OpenAI's API."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAM)
    async def chat_completions(body: ChatRequest, request: Request) -> Reply:
        """Answer a conversation."""
        served = service.model(body.model)
        if not served.speaker.converses:
            raise Refused(400, f"{served.name} {served.speaker.no_chat}: it completes text, but does not converse; use "
                          "/v1/completions", "no_chat_template", param="model")
        messages = tuple(message.plain() for message in body.messages)
        questions = _questions(service, served, body, messages, body.likeliest)
        return await _answered(service, served, body, request, questions, ChatReply(served, body.likeliest is not None))

    @router.post("/v1/completions", response_model=Completion, responses=STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Reply:
        """Continue one or several texts."""
        served = service.model(body.model)
        given = body.prompt
        several = list(given) if isinstance(given, list) and isinstance(given[0], str) else [given]
        if len(several) * (body.n or 1) > MOST_SAMPLES:
            raise Refused(400, f"{len(several)} prompts with {body.n or 1} answers each are more than {MOST_SAMPLES} "
                          "answers; send several requests", "too_many_answers", param="n")
        questions = [question for prompt in several
                     for question in _questions(service, served, body, prompt, body.logprobs)]
        return await _answered(service, served, body, request, questions, TextReply(served, body.logprobs is not None))

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The models that are served."""
        return ModelList(data=[ModelCard(id=name, created=service.models.created) for name in service.models.by_name])

    @router.get("/v1/models/{name}")
    async def model(name: str) -> ModelCard:
        """One model."""
        return ModelCard(id=service.model(name).name, created=service.models.created)

    return router


def _questions(service: Service, served: Served, body: Generation, prompt: str | Sequence[int] | Sequence[dict[str, str]],
               likeliest: int | None) -> list[Question]:
    """One question for each of the `n` answers, with consecutive seeds."""
    if body.gbnf is not None and served.kind == "checkpoint":
        name = next(iter(body.forms))
        raise Refused(400, f"{name} is for GGUF files, which llama.cpp runs, but {served.name} is a checkpoint; export it "
                      "with `tsotsallm export MODEL --gguf OUT.gguf`, and serve that file", "not_supported", param=name)
    first = body.seed if body.seed is not None else random_seed()
    count = service.tokens(body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens, served)
    look_back = 64 if body.repeat_last_n is None else body.repeat_last_n
    how = {"min_p": body.min_p or 0.0, "presence_penalty": body.presence_penalty or 0.0,
           "frequency_penalty": body.frequency_penalty or 0.0,
           "repetition_penalty": body.repetition_penalty or body.repeat_penalty or 1.0,
           "repeat_last_n": served.speaker.context if look_back < 0 else look_back,
           "logit_bias": tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()), "grammar": body.gbnf}
    temperature = 1.0 if body.temperature is None else body.temperature
    return [Question(prompt, count, sampling(temperature, body.top_p or 1.0, body.top_k or 0, first + number, **how),
                     body.stops, likeliest)
            for number in range(body.n or 1)]


class ChatReply:
    """The answer to a conversation, in chunks or whole; `index` numbers the `n` answers."""

    kind = "chat.completion.chunk"

    def __init__(self, served: Served, with_tokens: bool) -> None:
        self.served, self.with_tokens, self.id = served, with_tokens, f"chatcmpl-{uuid.uuid4().hex}"

    def opening(self, index: int) -> dict[str, object] | None:
        """The chunk that begins an answer."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def piece(self, index: int, piece: Piece) -> dict[str, object]:
        """The chunk of a piece of text."""
        logprobs = {"logprobs": _chat_logprobs(piece.tokens).model_dump()} if self.with_tokens else {}
        return {"index": index, "delta": {"content": piece.text}, **logprobs, "finish_reason": None}

    def closing(self, index: int, finish: str) -> dict[str, object]:
        """The chunk that ends an answer with its finish reason."""
        return {"index": index, "delta": {}, "finish_reason": finish}

    def whole(self, answers: list[Heard]) -> ChatCompletion:
        """All answers in one response."""
        ends = [heard.end for heard in answers]
        choices = [ChatChoice(index=index, message=ChatMessage(content=heard.text),
                              finish_reason=heard.end.finish,                           # type: ignore[arg-type]
                              logprobs=_chat_logprobs(heard.tokens) if self.with_tokens else None)
                   for index, heard in enumerate(answers)]
        return ChatCompletion(id=self.id, created=int(time.time()), model=self.served.name, choices=choices,
                              usage=usage(ends), timings=timings(self.served, ends))


class TextReply:
    """The continuation of a text, in chunks or whole; `index` numbers the answers."""

    kind = "text_completion"

    def __init__(self, served: Served, with_tokens: bool) -> None:
        self.served, self.with_tokens, self.id = served, with_tokens, f"cmpl-{uuid.uuid4().hex}"
        self.offsets: dict[int, int] = {}

    def opening(self, index: int) -> dict[str, object] | None:
        """None: a continuation has no chunk before its first piece."""
        return None

    def piece(self, index: int, piece: Piece) -> dict[str, object]:
        """The chunk of a piece of text."""
        logprobs = None
        if self.with_tokens:
            logprobs = _text_logprobs(piece.tokens, self.offsets.get(index, 0)).model_dump()
            self.offsets[index] = self.offsets.get(index, 0) + sum(len(token.text) for token in piece.tokens)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": None}

    def closing(self, index: int, finish: str) -> dict[str, object]:
        """The chunk that ends a continuation with its finish reason."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": finish}

    def whole(self, answers: list[Heard]) -> Completion:
        """All continuations in one response."""
        ends = [heard.end for heard in answers]
        choices = [TextChoice(index=index, text=heard.text, finish_reason=heard.end.finish,     # type: ignore[arg-type]
                              logprobs=_text_logprobs(heard.tokens, 0) if self.with_tokens else None)
                   for index, heard in enumerate(answers)]
        return Completion(id=self.id, created=int(time.time()), model=self.served.name, choices=choices, usage=usage(ends),
                          timings=timings(self.served, ends))


async def _answered(service: Service, served: Served, body: Generation, request: Request, questions: list[Question],
                    form: ChatReply | TextReply) -> Reply:
    deadline = service.deadline
    if not body.stream:
        async def all_of_them() -> list[Heard]:
            return [await whole(asked(service, served, question, deadline)) for question in questions]

        return form.whole(await unless_gone(request, all_of_them()))
    first = asked(service, served, questions[0], deadline)
    try:                                    # a fault of the request is reported before the stream begins
        opening = await unless_gone(request, _next(first))
    except BaseException:
        await first.aclose()
        raise
    with_usage = bool(body.stream_options and body.stream_options.include_usage)

    async def chunks() -> AsyncGenerator[bytes, None]:
        ends: list[Answer] = []
        try:
            for index, question in enumerate(questions):
                pieces = first if index == 0 else asked(service, served, question, deadline)
                if (start := form.opening(index)) is not None:
                    yield chunk([start])
                async with contextlib.aclosing(pieces):
                    piece: Piece | Answer | None = opening if index == 0 else await _next(pieces)
                    while piece is not None:
                        if isinstance(piece, Answer):
                            ends.append(piece)
                            yield chunk([form.closing(index, piece.finish)])
                        else:
                            yield chunk([form.piece(index, piece)])
                        piece = await _next(pieces)
            if with_usage:
                yield chunk([], usage=usage(ends).model_dump(), timings=timings(served, ends).model_dump())
        except Exception as error:
            yield _event(refusal(error, service).plain())
        yield b"data: [DONE]\n\n"

    def chunk(choices: list[dict[str, object]], **more: object) -> bytes:
        return _event({"id": form.id, "object": form.kind, "created": service.models.created, "model": served.name,
                       "choices": choices, **more})

    return StreamingResponse(chunks(), media_type="text/event-stream")


async def _next(pieces: AsyncGenerator[Piece | Answer, None]) -> Piece | Answer | None:
    return await anext(pieces, None)


def _event(content: dict[str, object]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def _likely(token: Token | Alternative) -> Likely:
    return Likely(token=token.text, bytes=list(token.data), logprob=finite(token.logprob))


def _chat_logprobs(tokens: Sequence[Token]) -> ChatLogprobs:
    return ChatLogprobs(content=[TokenLogprob(token=token.text, bytes=list(token.data), logprob=finite(token.logprob),
                                              top_logprobs=[_likely(other) for other in token.likeliest])
                                 for token in tokens])


def _text_logprobs(tokens: Sequence[Token], offset: int) -> TextLogprobs:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return TextLogprobs(tokens=[token.text for token in tokens], token_logprobs=[finite(token.logprob) for token in tokens],
                        top_logprobs=[{other.text: finite(other.logprob) for other in token.likeliest} for token in tokens],
                        text_offset=offsets)

