"""OpenAI's API: conversations, continuations, models; whole or as a stream of server-sent events."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from tsotsallm.engine.interface import Alternative, Answer, Piece, Question, Token
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
STREAM: dict[int | str, dict[str, Any]] = {200: {"description": "The answer, or a stream of its pieces with stream: true",
                                                 "content": {"text/event-stream": {"schema": EVENT}}}}


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAM)
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation."""
        one = service.model(body.model)
        if not one.speaker.converses:
            raise Refused(400, f"{one.name} {one.speaker.no_chat}: it completes text, but does not converse; use "
                          "/v1/completions", "no_chat_template", param="model")
        messages = tuple(message.plain() for message in body.messages)
        questions = _questions(service, one, body, messages, body.likeliest)
        return await _answered(service, one, body, request, questions, Chat(one, body.likeliest is not None))

    @router.post("/v1/completions", response_model=Completion, responses=STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        """Continue a text, or several."""
        one = service.model(body.model)
        given = body.prompt
        several = list(given) if isinstance(given, list) and isinstance(given[0], str) else [given]
        if len(several) * (body.n or 1) > MOST_SAMPLES:
            raise Refused(400, f"{len(several)} prompts with {body.n or 1} answers each are more than {MOST_SAMPLES} "
                          "answers; ask in several requests", "too_many_answers", param="n")
        questions = [question for prompt in several
                     for question in _questions(service, one, body, prompt, body.logprobs)]
        return await _answered(service, one, body, request, questions, Text(one, body.logprobs is not None))

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The models that are served."""
        return ModelList(data=[ModelCard(id=name, created=service.models.created) for name in service.models.by_name])

    @router.get("/v1/models/{name}")
    async def model(name: str) -> ModelCard:
        """One model."""
        return ModelCard(id=service.model(name).name, created=service.models.created)

    return router


def _questions(service: Service, one: Served, body: Generation, prompt: Any, likeliest: int | None) -> list[Question]:
    """A question for each of the `n` answers, with seeds that follow one another."""
    if body.gbnf is not None and one.kind == "checkpoint":
        name = next(iter(body.forms))
        raise Refused(400, f"{name} is for GGUF files, which llama.cpp runs, and {one.name} is a checkpoint; serve what "
                      f"`tsotsallm export MODEL --gguf OUT.gguf` writes of it", "not_supported", param=name)
    first = body.seed if body.seed is not None else random_seed()
    count = service.tokens(body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens, one)
    look_back = 64 if body.repeat_last_n is None else body.repeat_last_n
    how = {"min_p": body.min_p or 0.0, "presence_penalty": body.presence_penalty or 0.0,
           "frequency_penalty": body.frequency_penalty or 0.0,
           "repetition_penalty": body.repetition_penalty or body.repeat_penalty or 1.0,
           "repeat_last_n": one.speaker.context if look_back < 0 else look_back,
           "logit_bias": tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()), "grammar": body.gbnf}
    temperature = 1.0 if body.temperature is None else body.temperature
    return [Question(prompt, count, sampling(temperature, body.top_p or 1.0, body.top_k or 0, first + number, **how),
                     body.stops, likeliest)
            for number in range(body.n or 1)]


class Chat:
    """The forms of a conversation's answer."""

    kind = "chat.completion.chunk"

    def __init__(self, one: Served, with_tokens: bool) -> None:
        self.one, self.with_tokens, self.id = one, with_tokens, f"chatcmpl-{uuid.uuid4().hex}"

    def opening(self, index: int) -> dict[str, Any] | None:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        told = {"logprobs": _chat_logprobs(piece.tokens).model_dump()} if self.with_tokens else {}
        return {"index": index, "delta": {"content": piece.text}, **told, "finish_reason": None}

    def closing(self, index: int, finish: str) -> dict[str, Any]:
        return {"index": index, "delta": {}, "finish_reason": finish}

    def whole(self, found: list[Heard]) -> ChatCompletion:
        ends = [heard.end for heard in found]
        choices = [ChatChoice(index=index, message=ChatMessage(content=heard.text),
                              finish_reason=heard.end.finish,                           # type: ignore[arg-type]
                              logprobs=_chat_logprobs(heard.tokens) if self.with_tokens else None)
                   for index, heard in enumerate(found)]
        return ChatCompletion(id=self.id, created=int(time.time()), model=self.one.name, choices=choices, usage=usage(ends),
                              timings=timings(self.one, ends))


class Text:
    """The forms of a continuation."""

    kind = "text_completion"

    def __init__(self, one: Served, with_tokens: bool) -> None:
        self.one, self.with_tokens, self.id = one, with_tokens, f"cmpl-{uuid.uuid4().hex}"
        self.offsets: dict[int, int] = {}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        told = None
        if self.with_tokens:
            told = _text_logprobs(piece.tokens, self.offsets.get(index, 0)).model_dump()
            self.offsets[index] = self.offsets.get(index, 0) + sum(len(token.text) for token in piece.tokens)
        return {"index": index, "text": piece.text, "logprobs": told, "finish_reason": None}

    def closing(self, index: int, finish: str) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": finish}

    def whole(self, found: list[Heard]) -> Completion:
        ends = [heard.end for heard in found]
        choices = [TextChoice(index=index, text=heard.text, finish_reason=heard.end.finish,     # type: ignore[arg-type]
                              logprobs=_text_logprobs(heard.tokens, 0) if self.with_tokens else None)
                   for index, heard in enumerate(found)]
        return Completion(id=self.id, created=int(time.time()), model=self.one.name, choices=choices, usage=usage(ends),
                          timings=timings(self.one, ends))


async def _answered(service: Service, one: Served, body: Generation, request: Request, questions: list[Question],
                    form: Chat | Text) -> Any:
    deadline = service.deadline
    if not body.stream:
        async def all_of_them() -> list[Heard]:
            return [await whole(asked(service, one, question, deadline)) for question in questions]

        return form.whole(await unless_gone(request, all_of_them()))
    first = asked(service, one, questions[0], deadline)
    try:                                    # what is wrong with a request is told before the stream begins
        opening = await unless_gone(request, _next(first))
    except BaseException:
        await first.aclose()
        raise
    told = bool(body.stream_options and body.stream_options.include_usage)

    async def chunks() -> AsyncGenerator[bytes, None]:
        ends: list[Answer] = []
        try:
            for index, question in enumerate(questions):
                pieces = first if index == 0 else asked(service, one, question, deadline)
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
            if told:
                yield chunk([], usage=usage(ends).model_dump(), timings=timings(one, ends).model_dump())
        except Exception as error:
            yield _event(refusal(error, service).plain())
        yield b"data: [DONE]\n\n"

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return _event({"id": form.id, "object": form.kind, "created": service.models.created, "model": one.name,
                       "choices": choices, **more})

    return StreamingResponse(chunks(), media_type="text/event-stream")


async def _next(pieces: AsyncGenerator[Piece | Answer, None]) -> Piece | Answer | None:
    return await anext(pieces, None)


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def _likely(one: Token | Alternative) -> dict[str, Any]:
    return {"token": one.text, "bytes": list(one.data), "logprob": finite(one.logprob)}


def _chat_logprobs(tokens: Any) -> ChatLogprobs:
    return ChatLogprobs(content=[TokenLogprob(**_likely(token), top_logprobs=[Likely(**_likely(one))
                                                                              for one in token.likeliest])
                                 for token in tokens])


def _text_logprobs(tokens: Any, offset: int) -> TextLogprobs:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return TextLogprobs(tokens=[token.text for token in tokens], token_logprobs=[finite(token.logprob) for token in tokens],
                        top_logprobs=[{one.text: finite(one.logprob) for one in token.likeliest} for token in tokens],
                        text_offset=offsets)

