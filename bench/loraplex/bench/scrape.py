"""Reads a server's own figures from its Prometheus endpoint. Needs the package prometheus-client."""

from __future__ import annotations

from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 5.0


def scrape(url: str) -> dict[str, float]:
    """Return the samples that bear no label, by name.

    Raises:
        OSError: if the endpoint does not answer.
    """
    with urlopen(url, timeout=TIMEOUT_S) as response:
        return unlabelled(response.read().decode())


def unlabelled(exposition: str) -> dict[str, float]:
    """Return the samples in a text exposition that bear no label, by name."""
    families = text_string_to_metric_families(exposition)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}
