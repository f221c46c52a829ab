"""Chat templates in a process of their own: what they may do is what transformers lets them do, within limits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loraplex.server import template_renderer
from loraplex.server.errors import InvalidRequestError
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
    [("{{ 'a' * (2 ** 22 + 1) }}", "writes too much"), ("{{ '\\ud800' }}", "surrogates not allowed")],
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


def test_the_process_comes_back() -> None:
    renderer = TemplateRenderer()
    assert renderer.render("a", CHAT, TOKENS) == "a"
    process = renderer._process
    assert process is not None
    process.kill()
    process.wait()
    with pytest.raises(InvalidRequestError, match="has ended; try again"):
        renderer.render("b", CHAT, TOKENS)
    assert renderer.render("b", CHAT, TOKENS) == "b"
    renderer.close()
    assert renderer.render("c", CHAT, TOKENS) == "c"
    renderer.close()
