"""GenerationService: turns messages into engine requests and engine outputs into messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace

import grpc.aio

from loraplex.adapters.records import AdapterRecord
from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.traits import AdapterTraits
from loraplex.server.engine.client import EngineClient
from loraplex.server.engine.request import (
    ChoiceDelta,
    FinishReason,
    GenerationRequest,
    Logprobs,
    RequestOutput,
    Usage,
)
from loraplex.server.errors import InvalidRequestError
from loraplex.server.rpc.adapter_use import adapter_use
from loraplex.server.rpc.interceptors import ADAPTER_DIGEST_KEY, REQUEST_ID_KEY, current_request_id
from loraplex.server.rpc.sampling import sampling_params
from loraplex.server.template_queue import TemplateQueue
from loraplex.server.tokenizer import Tokenizer, chat_turns
from loraplex.v1 import generation_pb2 as pb
from loraplex.v1 import generation_pb2_grpc

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


@dataclass(frozen=True)
class ModelLimits:
    """What requests are checked against."""

    vocab_size: int
    max_model_len: int


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Answers Generate and GenerateStream from one engine."""

    def __init__(
        self,
        engine: EngineClient,
        registry: AdapterRegistry,
        tokenizer: Tokenizer,
        templates: TemplateQueue,
        limits: ModelLimits,
        executor: Executor,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._tokenizer = tokenizer
        self._templates = templates
        self._limits = limits
        self._executor = executor

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """Collect the whole answer."""
        response = pb.GenerateResponse()
        choices: dict[int, _ChoiceText] = {}
        async with aclosing(self._outputs(request, context)) as outputs:
            async for output in outputs:
                for delta in output.choices:
                    choices.setdefault(delta.index, _ChoiceText()).add(delta)
                if output.usage is not None:
                    response.usage.CopyFrom(_usage(output.usage))
                    response.adapter_digest = output.adapter_digest or ""
        response.request_id = current_request_id.get()
        response.choices.extend(choices[index].message(index) for index in sorted(choices))
        return response

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Pass on each step's outputs as they come."""
        async with aclosing(self._outputs(request, context)) as outputs:
            async for output in outputs:
                yield pb.GenerateStreamResponse(
                    request_id=current_request_id.get(),
                    choices=[_choice(delta) for delta in output.choices],
                    usage=None if output.usage is None else _usage(output.usage),
                    adapter_digest=output.adapter_digest or "",
                )

    async def _outputs(self, message: pb.GenerateRequest, context: Context) -> AsyncGenerator[RequestOutput, None]:
        loop = asyncio.get_running_loop()
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        name = _adapter_name(message)
        # On threads: neither the catalog's file nor a long prompt may hold up the event loop.
        async with AsyncExitStack() as stack:
            record = await stack.enter_async_context(self._use(name, _routing_key(message))) if name else None
            if record is not None:
                stack.callback(self._forget_unnamed, record.digest)
            chat = await self._rendered(message, record) if record else None
            request = await loop.run_in_executor(
                self._executor, self._request, message, record, chat, deadline, current_request_id.get()
            )
            digest = (ADAPTER_DIGEST_KEY, request.acting_digest or "")
            context.set_trailing_metadata(((REQUEST_ID_KEY, request.request_id), digest))
            outputs = await stack.enter_async_context(aclosing(self._engine.generate(request)))
            generated, answered = 0, False
            try:
                async for output in outputs:
                    answered = True
                    generated += sum(len(delta.token_ids) for delta in output.choices)
                    yield output
            finally:
                # What was refused, or left the queue before its turn, has used nothing.
                if record and answered:
                    self._registry.usage.count(record.name, len(request.prompt_token_ids), generated)

    def _use(self, name: str, routing_key: str) -> AbstractAsyncContextManager[AdapterRecord]:
        return adapter_use(self._registry, name, self._executor, routing_key)

    def _forget_unnamed(self, digest: str) -> None:
        """Drop weights that this request brought back after their name had gone: nobody else would."""
        if digest not in self._registry.digests:
            self._engine.forget(digest)

    async def _rendered(self, message: pb.GenerateRequest, record: AdapterRecord) -> str | None:
        """Return the chat as the adapter's own template writes it, if it has one and there is a chat."""
        if not record.has_chat_template or message.WhichOneof("prompt") != "chat":
            return None
        turns = chat_turns(_messages(message))
        loop = asyncio.get_running_loop()
        template = await loop.run_in_executor(self._executor, self._registry.chat_template, record.digest)
        if template is None:
            return None
        return await self._templates.render(template, turns, self._tokenizer.special_tokens)

    def _request(
        self,
        message: pb.GenerateRequest,
        record: AdapterRecord | None,
        chat: str | None,
        deadline: float | None,
        request_id: str,
    ) -> GenerationRequest:
        tokens = self._prompt(message, chat)
        traits = record.traits if record else AdapterTraits()
        room = self._limits.max_model_len - len(tokens)
        request = GenerationRequest(
            request_id=request_id,
            prompt_token_ids=tuple(tokens),
            params=sampling_params(message.sampling, room, record.metadata.default_sampling if record else None),
            adapter_digest=record.digest if record else None,
            adapter_scale=_adapter_scale(message),
            adapter_name=record.name if record else "",
            cache_salt=message.cache_salt,
            tenant=message.tenant,
            deadline=deadline,
        )
        request.validate(self._limits.vocab_size, self._limits.max_model_len, fixed_scale=traits.fixed_scale)
        # Not before: a prompt that is too long is not searched.
        return replace(request, adapter_start=traits.start_in(request.prompt_token_ids))

    def _prompt(self, message: pb.GenerateRequest, chat: str | None) -> list[int]:
        match message.WhichOneof("prompt"):
            case "text":
                return self._tokenizer.encode(message.text) if message.text else []
            case "chat":
                if chat is not None:
                    return self._tokenizer.encode_rendered(chat)
                return self._tokenizer.apply_chat_template(_messages(message))
            case "tokens":
                return list(message.tokens.token_ids)
            case _:
                raise InvalidRequestError.of("prompt", "is missing: set text, chat or tokens")


@dataclass
class _ChoiceText:
    """One choice, collected."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: ChoiceDelta) -> None:
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason

    def message(self, index: int) -> pb.Choice:
        whole = ChoiceDelta(index, "".join(self.text), tuple(self.token_ids), tuple(self.logprobs), self.finish_reason)
        return _choice(whole)


def _adapter_name(message: pb.GenerateRequest) -> str:
    if len(message.adapters) > 1:
        raise InvalidRequestError.of("adapters", "blends are not supported yet: name one adapter")
    return message.adapters[0].name if message.adapters else ""


def _messages(message: pb.GenerateRequest) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in message.chat.messages]


def _routing_key(message: pb.GenerateRequest) -> str:
    return message.adapters[0].routing_key if message.adapters else ""


def _adapter_scale(message: pb.GenerateRequest) -> float:
    if message.adapters and message.adapters[0].HasField("scale"):
        return float(message.adapters[0].scale)
    return 1.0


def _choice(delta: ChoiceDelta) -> pb.Choice:
    reason = pb.FINISH_REASON_UNSPECIFIED if delta.finish_reason is None else _FINISH_REASONS[delta.finish_reason]
    return pb.Choice(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[_logprobs(entry) for entry in delta.logprobs],
        finish_reason=reason,
    )


def _logprobs(entry: Logprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        chosen=pb.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob),
        top=[pb.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top],
    )


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
