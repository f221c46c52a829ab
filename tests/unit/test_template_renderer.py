"""Chat templates in a process of their own: what they may do is what transformers lets them do, within limits."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest

from loraplex.server import template_renderer
from loraplex.server.errors import InvalidRequestError, UnavailableError
from loraplex.server.template_renderer import TemplateRenderer
from tests.unit.tiny_tokenizers import CHAT_TEMPLATE, byte_level_fast, wrap

CHAT = [{"role": "user", "content": 'a "b"\né 你'}, {"role": "assistant", "content": ""}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ENDLESS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        "{{ bos_token }}{{ messages | tojson }}{{ eos_token }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% generation %}{{ messages[0].role }}{% endgeneration %}",
        "",
    ],
)
def test_the_text_is_that_of_transformers(renderer: TemplateRenderer, template: str) -> None:
    backend = wrap(byte_level_fast())
    expected = backend.apply_chat_template(CHAT, chat_template=template, add_generation_prompt=True, tokenize=False)
    assert renderer.render(template, CHAT, backend.special_tokens_map) == expected


@pytest.mark.parametrize(
    "template",
    [
        ENDLESS,
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'a' * 2 ** 31 }}",
        "{% set ns = namespace(s='a') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    ],
    ids=["loops", "number", "text", "doubling"],
)
def test_a_template_without_end_is_stopped(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"stopped: it may take 1 s, 1024 MiB") as caught:
        renderer.render(template, CHAT, TOKENS)
    assert [violation.field for violation in caught.value.violations] == ["chat"]
    assert renderer.render("{{ bos_token }}", CHAT, TOKENS) == "<s>"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 'a' * (2 ** 22 + 1) }}", "writes too much"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "does not take this chat"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ],
)
def test_what_is_no_prompt_is_refused(renderer: TemplateRenderer, template: str, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        renderer.render(template, CHAT, TOKENS)


def test_a_stopped_template_is_not_tried_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = TemplateRenderer()
    for seconds, second in ((60.0, "a moment ago"), (0.0, "stopped")):
        monkeypatch.setattr(template_renderer, "REFUSED_FOR_S", seconds)
        template = f"{ENDLESS}{seconds}"
        with pytest.raises(InvalidRequestError, match="stopped"):
            renderer.render(template, CHAT, TOKENS)
        with pytest.raises(InvalidRequestError, match=second):
            renderer.render(template, CHAT, TOKENS)
    renderer.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_ended_or_hangs_is_replaced(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = TemplateRenderer()
    renderer.start()
    process = send(renderer, number)
    monkeypatch.setattr(template_renderer, "ANSWER_S", 3.0)
    # More than a pipe holds: the writing waits too.
    assert (
        renderer.render("b{{ messages[0].content }}", [{"role": "user", "content": "a" * 200_000}], TOKENS)[:2] == "ba"
    )
    assert process.poll() == -signal.SIGKILL
    renderer.close()


def test_what_ends_the_process_twice_is_refused_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = TemplateRenderer()
    renderer.start()
    monkeypatch.setattr(template_renderer, "ANSWER_S", 0.01)
    for problem in ("ended, twice", "a moment ago"):
        with pytest.raises(InvalidRequestError, match=problem):
            renderer.render(ENDLESS, CHAT, TOKENS)
    renderer.close()


def test_a_process_that_does_not_start_is_no_fault_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = TemplateRenderer()
    monkeypatch.setattr(template_renderer, "START_S", 0.0)
    with pytest.raises(UnavailableError, match="does not start"):
        renderer.render("a", CHAT, TOKENS)
    monkeypatch.setattr(template_renderer, "START_S", 60.0)
    assert renderer.render("a", CHAT, TOKENS) == "a"
    renderer.close()


def test_a_hanging_process_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = TemplateRenderer()
    renderer.start()
    process = send(renderer, signal.SIGSTOP)
    monkeypatch.setattr(template_renderer, "ANSWER_S", 3600.0)
    refused = threading.Event()

    def render() -> None:
        with pytest.raises(UnavailableError, match="stopping"):
            renderer.render("a", CHAT, TOKENS)
        refused.set()

    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    renderer.close()
    assert refused.wait(60)
    assert process.poll() == -signal.SIGKILL


def send(renderer: TemplateRenderer, number: int) -> subprocess.Popen[bytes]:
    process = renderer._process
    assert process is not None
    os.kill(process.pid, number)
    return process
