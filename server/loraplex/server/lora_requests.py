"""The gauge `lora_requests_info`, as routers that know vLLM's read it. Knows prometheus_client and names only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Set

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class LoraRequests(Collector):
    """Which adapters run and which are waited for now, as labels of one series: what vLLM's routers read."""

    def __init__(self, name: str, clock: Callable[[], float] = time.time) -> None:
        self.max_adapters = 0
        self._name = name
        self._clock = clock
        self._state: tuple[str, str, float] = ("", "", clock())

    def update(self, running: Set[str], waiting: Set[str]) -> None:
        """Take the names; the series' value is when that was."""
        self._state = (",".join(sorted(running)), ",".join(sorted(waiting)), self._clock())

    def collect(self) -> Iterator[Metric]:
        """Yield the one series there is now."""
        running, waiting, since = self._state
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        text = "Adapters with rows and (at most 100) adapters that requests wait for; the value is the time of change."
        family = GaugeMetricFamily(self._name, text, labels=labels)
        family.add_metric((str(self.max_adapters), running, waiting), since)
        yield family
