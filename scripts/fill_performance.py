"""Writes what the bench commands measured (bench/results/*.json) into docs/PERFORMANCE.md and README.md, with charts.

loraplex bench roofline; make bench-cpu; loraplex bench growth; loraplex bench quality; make bench-peers
python scripts/fill_performance.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraplex.bench.charts import draw_cpu, draw_gpu, draw_growth, draw_peers
from loraplex.bench.gpu.cards import CARDS
from loraplex.bench.gpu.step_model import SHAPES, model_document
from loraplex.bench.performance_page import PERFORMANCE_PARTS, README_PARTS, fill

ROOT = Path(__file__).parents[1]
PAGES = {ROOT / "docs" / "PERFORMANCE.md": PERFORMANCE_PARTS, ROOT / "README.md": README_PARTS}
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "bench" / "results"
NAMES = ("cpu", "peers", "peers-machine", "growth", "quality", "roofline", "gpu")
CHARTS: dict[str, Callable[[Any, Path], None]] = {
    "cpu": draw_cpu,
    "growth": draw_growth,
    "peers": draw_peers,
    "gpu": draw_gpu,
}


def main() -> None:
    """Fill the pages from whatever results there are."""
    documents = {
        name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in NAMES
        if (RESULTS / f"{name}.json").is_file()
    }
    documents["gpu-model"] = model_document(SHAPES["llama-3.1-8b"], CARDS["h100"])
    for page, parts in PAGES.items():
        page.write_text(fill(page.read_text(encoding="utf-8"), documents, parts), encoding="utf-8")
    for name, draw in CHARTS.items():
        if name in documents:
            draw(documents[name], IMAGES / f"{name}.png")
    print(f"filled from {', '.join(documents) or 'nothing'}", file=sys.stderr)


if __name__ == "__main__":
    main()
