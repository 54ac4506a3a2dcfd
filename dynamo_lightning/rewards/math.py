r"""Is the response's final answer mathematically equal to the reference? Judged by math-verify.

Two departures from plain math-verify. The last complete `\boxed{…}` alone is the final answer where there is one, as
in the MATH benchmark's own grader: math-verify reads several boxes as one set, and its patterns are slow on long texts.
And its time limits are off: they use signals, which C code delays; the scorer's pool kills a worker that overruns.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from dynamo_lightning.rewards.reward import Reward

_BOX_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_DELIMITERS = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")


class MathReward(Reward):
    r"""1 if the response's final answer equals the reference answer, else 0.

    The final answer is the content of the last complete `\boxed{…}`; without one, it is what math-verify finds in the
    text: "the answer is …", LaTeX between dollar signs, a number, in this order. An answer that cannot be parsed, or
    fails to be compared, is wrong, not a failure: it is the policy's text.

    Args:
        require_boxed: Give 0 to every response without a complete `\boxed{…}`.
        max_characters: Look only at so many characters at the end of the response.

    Raises:
        ValueError: If max_characters is below 1.
    """

    def __init__(self, require_boxed: bool = False, max_characters: int = 5000) -> None:
        if max_characters < 1:
            raise ValueError(f"max_characters must be at least 1, got {max_characters}")
        self.require_boxed = require_boxed
        self.max_characters = max_characters

    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float:
        """Return 1.0 or 0.0; ValueError if `answer` cannot be parsed."""
        ending = response[-self.max_characters :]
        boxed = last_boxed(ending)
        if boxed is None and self.require_boxed:
            return 0.0
        return float(_are_equal(answer, ending if boxed is None else rf"\boxed{{{boxed}}}"))

    def check_answer(self, answer: str) -> None:
        """Raise a ValueError that quotes `answer` if math-verify makes no mathematical expression of it."""
        _parse_answer(answer)

    def warm_up(self) -> None:
        """Import math-verify and let it compile its patterns and load its grammar."""
        for ending in (r"\boxed{\frac{1}{2}}", "the answer is $3$", "4"):
            _are_equal("1", ending)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the `\boxed{…}` that starts last among the complete ones, None if there is none.

    One pass with a stack of open braces, so that text made of open boxes costs no more than any other.
    """
    open_braces: list[tuple[int, int]] = []  # where the content starts, and where its box does (-1: a plain brace)
    last_start, content = -1, None
    for token in _BOX_TOKENS.finditer(text):
        if token[0].startswith("\\boxed"):
            open_braces.append((token.end(), token.start()))
        elif token[0] == "{":
            open_braces.append((token.end(), -1))
        elif token[0] == "}" and open_braces:
            content_start, box_start = open_braces.pop()
            if box_start > last_start:
                last_start, content = box_start, text[content_start : token.start()]
    return content


# RL asks the same questions again and again: the bounds hold a few thousand problems in tens of megabytes.
@lru_cache(maxsize=16384)
def _are_equal(answer: str, ending: str) -> bool:
    """Return whether the final answer in `ending` equals `answer`."""
    from math_verify import verify

    return verify(_parse_answer(answer), _parse(ending), timeout_seconds=None)


@lru_cache(maxsize=8192)
def _parse_answer(answer: str) -> list[Any]:
    """Return the parsed reference answer, at least one of its readings a SymPy object."""
    parsed = _parse(answer if _DELIMITERS.search(answer) else rf"\boxed{{{answer}}}")
    # math-verify also returns the text itself, whatever it is: alone, it would make equality a matter of spelling.
    if all(isinstance(reading, str) for reading in parsed):
        raise ValueError(f"the reference answer {answer!r} cannot be parsed as mathematics by math-verify")
    return parsed


@lru_cache(maxsize=4096)
def _parse(text: str) -> list[Any]:
    """Return math-verify's readings of `text`, SymPy objects and strings, best first."""
    from math_verify import parse

    # It warns once per process that its time limit is off, which is what we want.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(text, parsing_timeout=None)
