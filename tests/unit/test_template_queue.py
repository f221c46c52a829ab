"""Who waits for whom, and how long, where adapters' chat templates are rendered."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from loraplex.server import template_queue
from loraplex.server.errors import ResourceExhaustedError
from loraplex.server.template_queue import TemplateQueue
from loraplex.server.template_renderer import TemplateRenderer

CHAT = [{"role": "user", "content": "a"}]


@dataclass
class SlowRenderer(TemplateRenderer):
    """Renders when it is told to, and notes what."""

    up: threading.Event = field(default_factory=threading.Event)
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    rendered: list[str] = field(default_factory=list)
    starts: int = 0

    def start(self) -> None:
        self.starts += 1
        assert self.up.wait(60)
        self.is_running = True

    def render(self, template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str]) -> str:
        assert self.go.acquire(timeout=60)
        self.rendered.append(template)
        return template

    def close(self) -> None:
        self.up.set()
        self.go.release(1000)


@pytest_asyncio.fixture
async def renderer() -> SlowRenderer:
    renderer = SlowRenderer()
    renderer.is_running = True
    return renderer


@pytest_asyncio.fixture
async def queue(renderer: SlowRenderer) -> AsyncIterator[TemplateQueue]:
    queue = TemplateQueue(renderer)
    yield queue
    await queue.close()


def begin(queue: TemplateQueue, template: str, count: int = 1) -> list[asyncio.Task[str]]:
    return [asyncio.create_task(queue.render(template, CHAT, {})) for _ in range(count)]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_template_with_many_chats_lets_the_others_have_their_turns(
    queue: TemplateQueue, renderer: SlowRenderer
) -> None:
    tasks = begin(queue, "slow", 16)
    await settle()
    tasks += begin(queue, "plain", 2)
    await settle()
    renderer.go.release(100)
    assert await asyncio.gather(*tasks) == ["slow"] * 16 + ["plain"] * 2
    assert renderer.rendered[:4] == ["slow", "plain", "slow", "plain"]


async def test_a_template_has_so_many_chats_and_no_more(queue: TemplateQueue, renderer: SlowRenderer) -> None:
    tasks = begin(queue, "slow", template_queue.MAX_CHATS)
    await settle()
    with pytest.raises(ResourceExhaustedError, match="try again") as caught:
        await queue.render("slow", CHAT, {})
    assert caught.value.retry_after_s == template_queue.RETRY_AFTER_S
    tasks += begin(queue, "plain")
    renderer.go.release(1000)
    await asyncio.gather(*tasks)
    assert await queue.render("slow", CHAT, {}) == "slow"


async def test_a_chat_waits_for_others_so_long_and_no_longer(
    queue: TemplateQueue, renderer: SlowRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin(queue, "slow")
    await settle()
    monkeypatch.setattr(template_queue, "WAIT_S", 0.01)
    answers = await asyncio.gather(*begin(queue, "slow"), *begin(queue, "plain"), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ResourceExhaustedError] * 2
    renderer.go.release(2)
    assert await first[0] == "slow"
    monkeypatch.setattr(template_queue, "WAIT_S", 60)
    assert await queue.render("plain", CHAT, {}) == "plain"


async def test_the_start_is_nobodys_waiting(
    queue: TemplateQueue, renderer: SlowRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer.is_running = False
    with monkeypatch.context() as patch:
        patch.setattr(template_queue, "WAIT_S", 0.01)
        tasks = begin(queue, "a", 3) + begin(queue, "b")
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in tasks)
    renderer.up.set()
    renderer.go.release(4)
    assert await asyncio.gather(*tasks) == ["a", "a", "a", "b"]
    assert renderer.starts == 1


async def test_who_goes_away_leaves_the_place_to_the_next(queue: TemplateQueue, renderer: SlowRenderer) -> None:
    tasks = begin(queue, "slow", 3)
    await settle()
    for task in tasks[:2]:
        task.cancel()
    await asyncio.wait(tasks[:2])
    renderer.go.release(2)
    assert await tasks[2] == "slow"
    assert not queue._lines
