"""Keeps transformers, datasets and bitsandbytes from drawing bars and printing beside what a run tells itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block they only report errors."""
    import datasets
    from transformers.utils import logging as untyped_logging

    transformers_logging: Any = untyped_logging
    bnb = logging.getLogger("bitsandbytes")
    verbosity, level = transformers_logging.get_verbosity(), bnb.level
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    bnb.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
        datasets.enable_progress_bars()
        bnb.setLevel(level)
