"""Whose chat template is rendered next, and who waits in vain: the event loop's side of `template_renderer`.

Adapters' templates have a thread of their own, and whoever waits for it holds no thread at all, so that a slow template
delays only chats that have templates of adapters. Knows nothing about requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from loraplex.server.errors import ResourceExhaustedError
from loraplex.server.template_renderer import TemplateRenderer

WAIT_S = 5.0
"""How long a chat waits for those before it; the start of the process is not counted."""
RETRY_AFTER_S = 1.0
MAX_CHATS = 128
"""Chats with one template at a time, those that wait included."""


@dataclass
class _Line:
    """The chats with one template."""

    chats: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class TemplateQueue:
    """Renders one chat at a time, each template in its turn, however many chats one of them has. For the event loop."""

    def __init__(self, renderer: TemplateRenderer) -> None:
        """Take over `renderer`."""
        self._renderer = renderer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="templates")
        self._starting: asyncio.Future[None] | None = None
        self._lines: dict[str, _Line] = {}
        # First come, first served; a template stands here with one chat only.
        self._next = asyncio.Lock()

    async def render(self, template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str]) -> str:
        """Return what `TemplateRenderer.render` does.

        Raises:
            InvalidRequestError: the template fails, refuses these messages or takes too long.
            ResourceExhaustedError: too many chats wait, with this template or with others.
            UnavailableError: the process does not come up, or the server stops.
        """
        async with self._line(template) as line, AsyncExitStack() as turns:
            await self._started()
            try:
                async with asyncio.timeout(WAIT_S):
                    await turns.enter_async_context(line.turn)
                    await turns.enter_async_context(self._next)
            except TimeoutError:
                raise _busy() from None
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._renderer.render, template, messages, tokens)

    async def close(self) -> None:
        """End what is being rendered, for good."""
        await asyncio.to_thread(self._renderer.close)
        await asyncio.to_thread(self._thread.shutdown)

    @asynccontextmanager
    async def _line(self, template: str) -> AsyncIterator[_Line]:
        line = self._lines.setdefault(template, _Line())
        if line.chats >= MAX_CHATS:
            raise _busy()
        line.chats += 1
        try:
            yield line
        finally:
            line.chats -= 1
            if not line.chats:
                del self._lines[template]

    async def _started(self) -> None:
        """Wait until the process is up; all wait for the same start."""
        if self._renderer.is_running:
            return
        if self._starting is None or self._starting.done():
            loop = asyncio.get_running_loop()
            self._starting = loop.run_in_executor(self._thread, self._renderer.start)
        await asyncio.shield(self._starting)


def _busy() -> ResourceExhaustedError:
    return ResourceExhaustedError(
        "too many chats wait for their adapters' chat templates to be rendered; try again", RETRY_AFTER_S
    )
