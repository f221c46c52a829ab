"""What two models are compared on: given texts, or a built-in list; where there is no tokenizer, random tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.errors import InvalidRequestError

logger = logging.getLogger(__name__)

BUILT_IN = (
    "The capital of France is Paris, and the capital of Italy is",
    "Translate to SQL: list the names of all customers who ordered more than three times last year.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    'Answer in JSON with the keys "city" and "population": Berlin has about 3.7 million inhabitants.',
    "Once upon a time, in a small village at the edge of the forest, there lived an old clockmaker who",
    "Is this review positive or negative? The food was cold, but the staff could not have been kinder.",
    "Q: A train leaves at 9:40 and arrives at 13:05. How long does the journey take?\nA:",
    "Liebe Kollegin, vielen Dank für die schnelle Antwort; der Termin am Dienstag passt mir gut.",
)
MAX_PROMPTS = 256
MAX_TOKENS = 256
"""Of a prompt; what is beyond is cut off."""
_RANDOM_PROMPTS, _RANDOM_TOKENS = 8, 24


def tokenize(folder: Path, prompts: Sequence[str], vocab_size: int, longest: int) -> list[list[int]]:
    """Return the token ids of `prompts`, or of the built-in ones if there are none; at most `longest` of each.

    Without a tokenizer in `folder` the built-in prompts are random tokens, the same every time.

    Raises:
        InvalidRequestError: too many prompts, an empty one, or texts for a model without a tokenizer.
    """
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequestError.of("prompts", f"are {len(prompts)}; at most {MAX_PROMPTS} are compared")
    longest = min(longest, MAX_TOKENS)
    tokenizer = _tokenizer(folder)
    if tokenizer is None:
        if prompts:
            raise InvalidRequestError.of("prompts", f"cannot be read: there is no tokenizer in {folder.name}")
        generator = torch.Generator().manual_seed(0)
        size = (_RANDOM_PROMPTS, min(longest, _RANDOM_TOKENS))
        random: list[list[int]] = torch.randint(vocab_size, size, generator=generator).tolist()
        return random
    encoded = [tokenizer(text)["input_ids"][:longest] for text in prompts or BUILT_IN]
    if not all(encoded):
        raise InvalidRequestError.of("prompts", "has an empty one: give at least one token")
    return encoded


def _tokenizer(folder: Path) -> Any:
    """Return the tokenizer, None where there is none that transformers can load without code from elsewhere."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
    if not any((folder / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise anything here, bare Exception included
        logger.warning("the tokenizer cannot be loaded, so random tokens are compared: %s", error)
        return None
