"""What several parity tests share: the demo model's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.server.models.demo import demo_model_path


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The demo model as a Hugging Face folder; converted into the user's cache the first time."""
    return demo_model_path()
