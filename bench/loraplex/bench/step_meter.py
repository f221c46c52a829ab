"""Takes a server's own step times while a run decodes, so that neither prompts nor the client are in them."""

from __future__ import annotations

import asyncio

from loraplex.bench.scrape import scrape

SERIES = "loraplex_step_duration_seconds"
FROM, UNTIL = 0.25, 0.9
"""Shares of the run's tokens between which all rows decode: prompts are done before, and no row has ended."""


class StepMeter:
    """Hears of a run's tokens and reads the server's step times twice in between; for one run, on one event loop."""

    def __init__(self, metrics_url: str, tokens: int) -> None:
        """Read from `metrics_url`; `tokens` are all that the run will make."""
        self._url = metrics_url
        self._marks = [FROM * tokens, UNTIL * tokens]
        self._seen = 0
        self._readings: list[asyncio.Future[dict[str, float]]] = []

    def on_tokens(self, count: int) -> None:
        """Count tokens that arrived; must be called on the event loop."""
        self._seen += count
        while self._marks and self._seen >= self._marks[0]:
            self._marks.pop(0)
            self._readings.append(asyncio.get_running_loop().run_in_executor(None, scrape, self._url))

    async def step_ms(self) -> float | None:
        """Return the mean step in milliseconds; None if the run was too short to tell.

        Raises:
            OSError: if the server's metrics could not be read.
        """
        readings = await asyncio.gather(*self._readings)
        if len(readings) < 2:
            return None
        first, last = readings
        steps = last[f"{SERIES}_count"] - first[f"{SERIES}_count"]
        seconds = last[f"{SERIES}_sum"] - first[f"{SERIES}_sum"]
        return 1000 * seconds / steps if steps else None
