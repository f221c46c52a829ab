"""`loraplex generate`: one prompt, answered on the terminal as it is made."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from loraplex.cli.connection import DEFAULT_SERVER, JsonOption, ServerOption, TimeoutOption, connect

if TYPE_CHECKING:
    from loraplex.client import ChatMessage, Generation, GenerationStream

_SAMPLING = "Sampling"
MaxTokens = Annotated[int | None, typer.Option(help="Tokens to generate at most.", rich_help_panel=_SAMPLING)]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling; 1 is off.", rich_help_panel=_SAMPLING)]
TopK = Annotated[int | None, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)]
MinP = Annotated[float | None, typer.Option(help="Relative to the best token; 0 is off.", rich_help_panel=_SAMPLING)]
Repetition = Annotated[float | None, typer.Option(help="1 is off.", rich_help_panel=_SAMPLING)]
Presence = Annotated[float | None, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)]
Frequency = Annotated[float | None, typer.Option(help="0 is off.", rich_help_panel=_SAMPLING)]
Seed = Annotated[int | None, typer.Option(help="Same seed, same draws.", rich_help_panel=_SAMPLING)]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.", rich_help_panel=_SAMPLING)]
StopTokenId = Annotated[
    list[int] | None, typer.Option(help="End at this token; repeatable.", rich_help_panel=_SAMPLING)
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end.", rich_help_panel=_SAMPLING)]
Logprobs = Annotated[
    int | None, typer.Option(help="Log probabilities with this many alternatives.", rich_help_panel=_SAMPLING)
]
Choices = Annotated[int | None, typer.Option("-n", help="Independent answers.", rich_help_panel=_SAMPLING)]


def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from standard input.")],
    adapter: Annotated[
        str, typer.Option("--adapter", "-a", help="Adapter name or alias, or NAME@VERSION; none is the base model.")
    ] = "",
    scale: Annotated[float | None, typer.Option(help="Multiplies the adapter's own scaling.")] = None,
    routing_key: Annotated[
        str, typer.Option(help="Chooses between the targets of a weighted alias: equal keys get the same.")
    ] = "",
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Put the prompt into the chat template, or take it as it is.")
    ] = True,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Repetition = None,
    presence_penalty: Presence = None,
    frequency_penalty: Frequency = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_token_id: StopTokenId = None,
    ignore_eos: IgnoreEos = False,
    logprobs: Logprobs = None,
    n: Choices = None,
    as_json: JsonOption = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Write usage and the adapter's digest to stderr.")
    ] = False,
    timeout: TimeoutOption = 300.0,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Answer a prompt with the base model or an adapter, written as it is generated."""
    from loraplex.client import SamplingOptions

    if system is not None and not chat:
        raise typer.BadParameter("a system message needs the chat template: leave --raw out", param_hint="--system")
    if logprobs is not None and not as_json:
        raise typer.BadParameter("log probabilities are shown as JSON only: add --json", param_hint="--logprobs")
    sampling = SamplingOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop or (),
        stop_token_ids=stop_token_id or (),
        ignore_eos=ignore_eos or None,
        logprobs=logprobs,
        n=n,
    )
    text = _read_stdin() if prompt == "-" else prompt
    messages = _messages(text, system) if chat else text
    begin = time.monotonic()
    with connect(server, timeout) as client:
        if as_json or (n or 1) > 1:
            generation = client.generate(messages, adapter, scale, sampling=sampling, routing_key=routing_key)
            _write(generation, as_json=as_json)
        else:
            with client.stream(messages, adapter, scale, sampling=sampling, routing_key=routing_key) as stream:
                generation = _write_pieces(stream)
    if verbose:
        _write_usage(generation, time.monotonic() - begin)


def _read_stdin() -> str:
    # The newline with which a shell ends its text is no part of the prompt.
    return sys.stdin.read().removesuffix("\n")


def _messages(text: str, system: str | None) -> list[ChatMessage]:
    from loraplex.client import ChatMessage

    first = [ChatMessage("system", system)] if system is not None else []
    return [*first, ChatMessage("user", text)]


def _write_pieces(stream: GenerationStream) -> Generation:
    """Write the pieces as they come; leaving early (Ctrl-C) cancels the call."""
    for piece in stream:
        typer.echo(piece.text, nl=False)
    generation = stream.collect()
    if not generation.text.endswith("\n"):
        typer.echo()
    return generation


def _write(generation: Generation, *, as_json: bool) -> None:
    from loraplex.cli.output import print_json

    if as_json:
        print_json(generation)
        return
    for choice in generation.choices:
        typer.echo(f"[{choice.index}] {choice.text}")


def _write_usage(generation: Generation, seconds: float) -> None:
    usage = generation.usage
    ends = ", ".join(str(choice.finish_reason or "?") for choice in generation.choices)
    typer.echo(
        f"prompt {usage.prompt_tokens} tokens ({usage.cached_tokens} cached), output {usage.completion_tokens} tokens "
        f"in {seconds:.2f} s ({usage.completion_tokens / seconds:.1f} tok/s), finished: {ends}, "
        f"adapter: {generation.adapter_digest or 'none'}, request: {generation.request_id}",
        err=True,
    )
