"""The API of TSOTSALLM's service, which is that of the LLM efficiency challenge: POST /process and POST /tokenize.

HELM's HTTP client uses it, with its own names for some fields; both names are accepted.
"""

from __future__ import annotations

import time

from fastapi import APIRouter, Request

from tsotsallm.engine.interface import Question, Token
from tsotsallm.serve.answering import Heard, Refused, Service, asked, finite, random_seed, refusing, unless_gone, whole
from tsotsallm.serve.served import Served, sampling
from tsotsallm.serve.wire import (
    ProcessRequest,
    ProcessResponse,
    ProcessToken,
    Sample,
    TokenizeRequest,
    TokenizeResponse,
)


def routes(service: Service) -> APIRouter:
    """The routes /process and /tokenize, answered by the first model that is served."""
    router = APIRouter()

    @router.post("/process")
    async def process(body: ProcessRequest, request: Request) -> ProcessResponse:
        """Continue a prompt with the first model that is served; with echo_prompt the prompt and its tokens come first."""
        began, served = time.perf_counter(), service.model(None)
        samples = await unless_gone(request, _samples(service, served, body))
        return ProcessResponse(**samples[0].model_dump(), samples=samples, request_time=time.perf_counter() - began)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        """Token ids of a text, by the first model's tokenizer."""
        began = time.perf_counter()
        with refusing(service):
            ids = await service.model(None).gate.tokenize(body.text)
        return TokenizeResponse(tokens=ids[:body.max_length] if body.truncation else ids,
                                request_time=time.perf_counter() - began)

    return router


async def _samples(service: Service, served: Served, body: ProcessRequest) -> list[Sample]:
    deadline = service.deadline
    first = body.seed if body.seed is not None else random_seed()
    top_k = body.top_k if body.top_k_per_token is None else body.top_k_per_token
    count = body.num_samples if body.num_return_sequences is None else body.num_return_sequences
    most = service.tokens(body.max_new_tokens, served)
    before: list[Token] = []
    if body.echo_prompt:
        before = await _prompt_tokens(service, served, body.prompt, deadline)
    samples = []
    for number in range(count):
        question = Question(body.prompt, most, sampling(body.temperature, body.top_p, top_k, first + number),
                            tuple(body.stop_sequences), 1)
        heard = await whole(asked(service, served, question, deadline))
        samples.append(_sample(heard, before, body.prompt if body.echo_prompt else ""))
    return samples


async def _prompt_tokens(service: Service, served: Served, prompt: str, deadline: float) -> list[Token]:
    with refusing(service):
        ids = await served.gate.tokenize(prompt)
        if len(ids) >= served.speaker.context:
            raise Refused(400, f"the prompt has {len(ids)} tokens, but the model knows only {served.speaker.context} "
                          "positions; shorten it", "too_many_tokens", param="prompt")
        return await served.gate.prompt(ids, 1, deadline)


def _sample(heard: Heard, before: list[Token], prompt: str) -> Sample:
    tokens = [_token(token) for token in (*before, *heard.tokens)]
    return Sample(text=prompt + heard.text, tokens=tokens, logprob=sum(token.logprob for token in tokens))


def _token(token: Token) -> ProcessToken:
    likeliest = {best.text: finite(best.logprob) for best in token.likeliest[:1]}
    return ProcessToken(text=token.text, logprob=finite(token.logprob), top_logprob=likeliest)
