"""Reads a server's own figures from its Prometheus endpoint. Needs the package prometheus-client."""

from __future__ import annotations

import math
from dataclasses import dataclass
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Scrape:
    """Everything that one scrape returned."""

    samples: tuple[Sample, ...]

    @classmethod
    def of(cls, url: str) -> Scrape:
        """Scrape the endpoint at `url`.

        Raises:
            OSError: if it does not answer.
        """
        with urlopen(url, timeout=TIMEOUT_S) as response:
            return cls.parse(response.read().decode())

    @classmethod
    def parse(cls, exposition: str) -> Scrape:
        """Read a text exposition."""
        return cls(tuple(s for family in text_string_to_metric_families(exposition) for s in family.samples))

    def value(self, name: str, **labels: str) -> float:
        """Return the sample with that name and exactly these labels; 0 if there is none."""
        return next((s.value for s in self.samples if s.name == name and s.labels == labels), 0.0)

    def quantile(self, name: str, share: float, **labels: str) -> float:
        """Return the value below which `share` of a histogram's observations lie; 0 if it has none.

        Linear within a bucket, as Prometheus does it; what lies beyond the last bound counts as that bound.
        """
        buckets = sorted(
            (float(sample.labels["le"]), sample.value)
            for sample in self.samples
            if sample.name == f"{name}_bucket" and {**sample.labels, "le": ""} == {**labels, "le": ""}
        )
        wanted = share * buckets[-1][1] if buckets else 0.0
        lower, below = 0.0, 0.0
        for bound, count in buckets:
            if count >= wanted > below:
                return lower if math.isinf(bound) else lower + (bound - lower) * (wanted - below) / (count - below)
            lower, below = bound, count
        return 0.0


def scrape(url: str) -> dict[str, float]:
    """Return the samples that bear no label, by name.

    Raises:
        OSError: if the endpoint does not answer.
    """
    return {sample.name: sample.value for sample in Scrape.of(url).samples if not sample.labels}
