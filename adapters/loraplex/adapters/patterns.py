"""Regular expressions out of an adapter's config, matched without letting them run for ever.

Whoever sends an adapter also sends its expressions, and Python's own engine could not be stopped once it backtracks.
Knows nothing about what they are for.
"""

from __future__ import annotations

import functools
import re
import time

import regex

from loraplex.adapters.errors import AdapterFormatError

# For one match; an honest one takes microseconds.
_MATCH_TIMEOUT_S = 0.2
# For all matches of one adapter together. EVA leaves a pattern for each module: some 100,000 matches, under a second.
_TOTAL_S = 10.0


class PatternMatcher:
    """Matches the expressions of one adapter and keeps count of the time that they take."""

    def __init__(self) -> None:
        self._spent_s = 0.0

    def fully(self, pattern: str, text: str) -> bool:
        """Say whether `pattern` matches all of `text`, as `re.fullmatch` does.

        Raises:
            AdapterFormatError: if that takes too long.
        """
        return self._match(pattern, text, whole=True) is not None

    def start(self, pattern: str, text: str) -> regex.Match[str] | None:
        """Return what `re.match` would return.

        Raises:
            AdapterFormatError: if that takes too long.
        """
        return self._match(pattern, text, whole=False)

    def _match(self, pattern: str, text: str, whole: bool) -> regex.Match[str] | None:
        compiled = _compiled(pattern)
        method = compiled.fullmatch if whole else compiled.match
        began = time.thread_time()
        try:
            # Other threads go on meanwhile.
            found = method(text, timeout=_MATCH_TIMEOUT_S, concurrent=True)
        except TimeoutError as error:
            reason = f"the regular expression {pattern!r:.80} takes too long to match; use a simpler one"
            raise AdapterFormatError.of("adapter_config.json", reason) from error
        self._spent_s += time.thread_time() - began
        if self._spent_s > _TOTAL_S:
            reason = "the regular expressions together take too long to match; use fewer or simpler ones"
            raise AdapterFormatError.of("adapter_config.json", reason)
        return found


def pattern_problem(pattern: str) -> str:
    """Return what is wrong with `pattern` as a regular expression, or nothing."""
    try:
        re.compile(pattern)  # what PEFT would do with it
        _compiled(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression: {error}"
    return ""


@functools.lru_cache(maxsize=8192)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)
