r"""Is the response's final answer mathematically equal to the reference? Judged by math-verify.

Departures from plain math-verify, each for answers that it gets wrong:

- The last complete `\boxed{…}` alone is the final answer where there is one, as in the MATH benchmark's own grader:
  math-verify reads several boxes as one set. What is in the box is read as LaTeX or not at all: math-verify would fall
  back on the last number in it, and take a reference that it cannot parse, such as `\hbar \omega - \frac{E}{2 m}`,
  for 2. Without a box, only the end of the response is searched: its patterns take 70 ms on 2,000 characters.
- `4.5e33` is a number, not 4.5 · e · 33, and `-1./3` is −1/3: benchmarks write both.
- It rounds decimals to six places, where 2e-10 equals 3e-10. Small numbers must also agree to four digits.
- Its time limits are off: they use signals, which C code delays; the scorer's pool kills a worker that overruns.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from dynamo_lightning.errors import UserError
from dynamo_lightning.rewards.reward import Reward

_BOX_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_UNBOXED_CHARACTERS = 500  # of a response without a box, searched for an answer
_DOLLAR = re.compile(r"(?<!\\)\$")
_SMALL = 0.01  # below it, six decimal places are fewer than four digits
_RELATIVE_TOLERANCE = 1e-4
_CLEARLY = 1e-3  # a relative difference that no rounding explains
_MAX_ANSWER_CHARACTERS, _MAX_ANSWER_DEPTH = 500, 8
_EXPENSIVE = re.compile(
    r"\\(?:int|sum|prod|lim)(?![a-z])"  # what has a value should be given as the value
    r"|\^[\s{(]*-?\d{5,}|\d{5,}\s*!|!\s*\)*\s*!|\\d?binom\s*\{[^{}]*(?:\d{5}|\^)|\d{300}"
    r"|\*\*.*\*\*|(?:\^\s*\{[^{}^]{0,20}){3}|\^\s*\{\s*\d+\s*\^\s*\{?\s*\d\d",  # towers of powers
    re.DOTALL,
)
"""What no one writes as a final answer and takes SymPy for ever."""
_FINAL_SENTENCE = re.compile(r"answer is:?\s*(?:\$([^$\n]+)\$|\\\(([^\n]+?)\\\))\s*\.?\s*\Z", re.IGNORECASE)
_COMMON_ANSWERS = (
    r"\frac{1}{2}", r"2\sqrt{3} - 1", r"x^2 + 3x - 7", "[1, 2)", r"(-\infty, 3] \cup (4, 5)", r"\{1, 2\}", "(1, -2, 3)",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\text{Monday}", r"90^\circ", r"12\%", r"\frac{3\pi}{4}", "y = 2x + 1",
    r"3.5 \times 10^{-2}", r"\sin(x)", r"e^{2}", r"x \le 4", r"5 \text{ cm}", "x_1",
)  # fmt: skip
_PLAIN_FRACTION = re.compile(r"^(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$")
_PLAIN_NUMBER = re.compile(r"[-+]?\d{1,30}(?: ?/ ?\d{1,30}|\.\d{1,30})?")

_REWRITES = (
    (re.compile(r"(?<!\\)\$|\\[()\[\]]"), ""),  # delimiters of mathematics: in a box everything is
    (re.compile(r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?![\w.])"), r"\1 \\times 10^{\2}"),
    (re.compile(r"(?<=\d)\.(?=\s*(?:[-+*/)}\]]|$))"), ""),  # 1./3, and the full stop of a sentence
    (re.compile(r"_\s*\{?\s*\\(max|min)\b\s*\}?"), r"_{\1}"),  # a subscript is no function
    (re.compile(r"^\s+|[\s.]+$"), ""),
)
_SPELLINGS = (
    (re.compile(r"\\(?:left|right|big|Big|displaystyle)\b|\\[,;:! ]|[\s~]"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}"), r"\1"),
)


class MathReward(Reward):
    r"""1 if the response's final answer equals the reference answer, else 0.

    The final answer is the content of the last complete `\boxed{…}`; without one, the formula in a last sentence "the
    answer is $…$", or else what math-verify finds at the end of the text: "the answer is …", LaTeX between dollar
    signs, a number, in this order. An answer that cannot be parsed, or fails to be compared, is wrong, not a failure:
    it is the policy's text.

    Args:
        require_boxed: Give 0 to every response without a complete `\boxed{…}`.
        max_characters: Look only at so many characters at the end of the response.
        unparsable: What to do with a reference answer that is no mathematical expression: `refuse` to start, or
            compare its `text`, spelled out, with the response's box. Benchmarks have a few of them.

    Raises:
        UserError: If max_characters is below 1.
    """

    def __init__(
        self,
        require_boxed: bool = False,
        max_characters: int = 5000,
        unparsable: Literal["refuse", "text"] = "refuse",
    ) -> None:
        if max_characters < 1:
            raise UserError(f"max_characters must be at least 1, got {max_characters}")
        self.require_boxed = require_boxed
        self.max_characters = max_characters
        self.unparsable = unparsable

    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float:
        """Return 1.0 or 0.0; ValueError if `answer` cannot be parsed and must be."""
        self.check_answer(answer)
        ending = response[-self.max_characters :]
        boxed = last_boxed(ending)
        if boxed is not None:
            return float(_equals_boxed(answer, boxed))
        if self.require_boxed:
            return 0.0
        ending = _last_characters(ending, _UNBOXED_CHARACTERS)
        final = _FINAL_SENTENCE.search(ending)
        return float(_equals_boxed(answer, final[1] or final[2]) if final else _equals_unboxed(answer, ending))

    def check_answer(self, answer: str) -> None:
        """Raise a ValueError that quotes `answer` if math-verify makes no mathematical expression of it."""
        if not _parse_answer(answer) and (self.unparsable == "refuse" or not spell(answer)):
            raise UserError(
                f"the reference answer {answer!r} cannot be parsed as mathematics by math-verify"
                + (": leave it out, or set MathReward's unparsable: text" if spell(answer) else "")
            )

    def warm_up(self) -> None:
        """Import math-verify and let it compile its patterns and load its grammar."""
        for answer in _COMMON_ANSWERS:  # the parser learns its grammar from what it reads
            self("", rf"\boxed{{{answer}}}", "1")
        for ending in ("So the answer is $x$ where $x_i$ is $3 + y$ and so", "4"):
            self("", ending, "1")

    def free_memory(self) -> None:
        """Forget what was parsed: a hostile answer can be millions of digits."""
        from sympy.core.cache import clear_cache

        for cached in (_equals_boxed, _equals_unboxed, _parse_answer, _parse_latex):
            cached.cache_clear()
        clear_cache()


def final_answer(response: str, max_characters: int = 5000) -> str | None:
    """Return the response's boxed answer in one spelling, to count votes; None without a complete box."""
    boxed = last_boxed(response[-max_characters:])
    return None if boxed is None else spell(boxed[:_MAX_ANSWER_CHARACTERS])


def spell(answer: str) -> str:
    r"""Return an answer in one of its spellings: no spaces, no `\left`, no `\text{…}`, numbers without separators.

    Equal texts are equal answers, but different ones may be equal too.
    """
    text = _rewrite(answer)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    if re.fullmatch(r"[-+]?\\?\$?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return text.removeprefix(r"\$")


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


def _last_characters(text: str, number: int) -> str:
    """Return the end of a text, which does not begin within a formula: its closing dollar sign would open another."""
    start = max(0, len(text) - number)
    before = text[text.rfind("\n", 0, start) + 1 : start]  # in one line, as math-verify reads formulas
    closing = _DOLLAR.search(text, start) if len(_DOLLAR.findall(before)) % 2 else None
    return text[closing.end() if closing else start :]


# RL asks the same questions again and again: the bounds hold a few thousand problems in tens of megabytes.
@lru_cache(maxsize=16384)
def _equals_boxed(answer: str, boxed: str) -> bool:
    """Return whether what is in the response's box equals `answer`."""
    if len(boxed) > 2 * max(_MAX_ANSWER_CHARACTERS, len(answer)):  # even the patterns of `spell` would take their time
        return False
    if spell(answer) == spell(boxed) != "":
        return True
    return not _is_expensive(boxed) and _verify(_parse_answer(answer), _parse_latex(_rewrite(boxed)))


def _is_expensive(answer: str) -> bool:
    """Return whether an answer is too long, too deep or too large to be one, and would rather keep a worker busy."""
    if len(answer) > _MAX_ANSWER_CHARACTERS or _EXPENSIVE.search(_rewrite(answer)):
        return True
    depth = deepest = 0
    for character in answer:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest > _MAX_ANSWER_DEPTH


@lru_cache(maxsize=16384)
def _equals_unboxed(answer: str, ending: str) -> bool:
    """Return whether the final answer in `ending` equals `answer`."""
    return not re.search(r"\*\*.*\*\*|\d{300}", ending, re.DOTALL) and _verify(_parse_answer(answer), _parse(ending))


@lru_cache(maxsize=8192)
def _parse_answer(answer: str) -> tuple[Any, ...]:
    """Return the readings of a reference answer, none if it is no mathematics."""
    boxed = last_boxed(answer)
    return _parse_latex(_rewrite(answer if boxed is None else boxed))


def _verify(answers: Sequence[Any], readings: Sequence[Any]) -> bool:
    """Return whether any reading equals any of the answer's."""
    return any(_are_equal(a, b) for a in answers for b in readings)


def _are_equal(answer: Any, reading: Any) -> bool:
    """Return whether math-verify finds two readings equal, unless numbers show that they are not."""
    from math_verify import verify
    from sympy import Expr, Interval, Rational

    if isinstance(answer, Rational) and isinstance(reading, Rational):
        return answer == reading
    for one, other in ((answer, reading), (reading, answer)):
        if isinstance(one, Interval) and isinstance(other, Expr):  # an interval of one point is a finite set
            return False
    if _differ_at_a_point(answer, reading) or _are_different_small_numbers(answer, reading):
        return False
    return verify([answer], [reading], timeout_seconds=None)


def _differ_at_a_point(first: Any, second: Any) -> bool:
    """Return whether two expressions have different values: `simplify` would take 20 ms to say so.

    It says nothing of what math-verify compares more leniently than by value: names, percentages, equations.
    """
    from sympy import Equality, Expr, UnevaluatedExpr

    if isinstance(first, Equality) != isinstance(second, Equality):  # `x = 5` is 5
        first, second = (side.rhs if isinstance(side, Equality) else side for side in (first, second))
    if not isinstance(first, Expr) or not isinstance(second, Expr) or first.is_Symbol or second.is_Symbol:
        return False
    if first.has(UnevaluatedExpr) or second.has(UnevaluatedExpr):  # 9 % may be 9
        return False
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    point = {symbol: 0.7 + 0.31 * number for number, symbol in enumerate(symbols)}
    try:
        a, b = (complex(expression.evalf(15, subs=point)) for expression in (first, second))
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        return False
    return abs(a - b) > _CLEARLY * max(abs(a), abs(b))  # False for NaN


def _are_different_small_numbers(first: Any, second: Any) -> bool:
    """Return whether both are numbers near 0, of which rounding to decimal places leaves too little."""
    try:
        a, b = float(first), float(second)
    except (TypeError, ValueError, AttributeError, OverflowError):
        return False
    return max(abs(a), abs(b)) < _SMALL and abs(a - b) > _RELATIVE_TOLERANCE * max(abs(a), abs(b))


def _rewrite(answer: str) -> str:
    """Return an answer without what math-verify misreads."""
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    return answer


@lru_cache(maxsize=4096)
def _parse_latex(text: str) -> tuple[Any, ...]:
    """Return math-verify's readings of LaTeX, SymPy objects only."""
    number = _PLAIN_FRACTION.sub(r"\1\2/\3", text)
    if _PLAIN_NUMBER.fullmatch(number):  # most answers; the parser takes milliseconds for them
        from sympy import Float, Rational

        return (Float(number) if "." in number else Rational(number.replace(" ", "")),)
    from math_verify import LatexExtractionConfig

    return _parse(rf"\boxed{{{text}}}", (LatexExtractionConfig(),))


def _parse(text: str, kinds: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
    """Return math-verify's readings of `text`, SymPy objects only."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # It warns once per process that its time limit is off, which is what we want.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    kinds = kinds or (LatexExtractionConfig(), ExprExtractionConfig())
    # It also returns the text itself: alone, it would make equality a matter of spelling, which `spell` does better.
    return tuple(reading for reading in parse(text, kinds, parsing_timeout=None) if not isinstance(reading, str))
