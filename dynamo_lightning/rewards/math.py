r"""Is the response's final answer mathematically equal to the reference?

An answer is found (`maths/finals.py`), read (`maths/parser.py`) and compared (`maths/comparison.py`) without a computer
algebra system. Numbers are exact fractions or 50 digits of mpmath, and expressions with variables are compared at
points: what it costs is bounded by the size of the text, so that a verdict needs no time limit, in any thread.

References beyond that reader (integrals, sums, products, limits) are math-verify's, in a process of its own that is
killed at a time limit (`maths/library.py`). It does not decide everything, since it is made to agree with many
benchmarks: letters lose their case, adjacent numbers are added, units and bases are dropped, lists lose their order,
and SymPy may take for ever. Each of these pays a policy that learns to use it: `tests/rewards/test_math_attacks.py`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

from dynamo_lightning.errors import UserError
from dynamo_lightning.rewards.maths import beyond, library
from dynamo_lightning.rewards.maths.boxes import last_boxed
from dynamo_lightning.rewards.maths.comparison import AnswerKind, Comparison
from dynamo_lightning.rewards.maths.finals import FinalAnswer, after_thinking, find_final_answer
from dynamo_lightning.rewards.maths.nodes import symbols_of
from dynamo_lightning.rewards.maths.reading import MAX_CHARACTERS, Readings, read
from dynamo_lightning.rewards.maths.spelling import spell
from dynamo_lightning.rewards.reward import Reward

__all__ = ["MathReward", "final_answer", "last_boxed", "spell"]

_PLAIN_INTEGER = re.compile(r"-?\d{1,18}")


class MathReward(Reward):
    r"""1 if the response's final answer equals the reference answer, else 0.

    The final answer is the content of the last complete `\boxed{…}`; without one, what the response states (`the answer
    is …`, `#### …`, `<answer>…</answer>`), or else its last formula or number. An answer that is denied, doubted or one
    of several candidates is wrong, and so is one that cannot be read or has no value: it is the policy's text.

    Args:
        require_boxed: Give 0 to every response without a complete `\boxed{…}`.
        max_characters: Look only at so many characters at the end of the response.
        unparsable: What to do with a reference answer that is no mathematical expression: `refuse` to start, or
            compare its `text`, spelled out, with the response's box. Benchmarks have a few of them.
        answer_kind: `expression` accepts every expression of the same value. `number` wants a number where the
            reference is one: `17+25` and `\gcd(84, 126)` are not 42.
        thinking: Grade only what follows `</think>`. `null` does so where the response has the tag, and gives 0 where a
            `<think>` is never closed; `true` gives 0 to every response without `</think>`, for templates that open the
            reasoning in the prompt; `false` grades the whole response.
        lenient_units: Accept another unit than the reference's, and 50 % for 0.5.
        verifier: `strict` compares with our own reader and asks math-verify about references beyond it. `math-verify`
            asks math-verify about every answer, with all its leniencies, to compare with published numbers.

    Raises:
        UserError: If max_characters is below 1, answer_kind, unparsable or verifier is none of its values, or
            answer_kind or lenient_units is set for math-verify, which has no such rules.
    """

    def __init__(
        self,
        require_boxed: bool = False,
        max_characters: int = 5000,
        unparsable: Literal["refuse", "text"] = "refuse",
        answer_kind: AnswerKind = "expression",
        thinking: bool | None = None,
        lenient_units: bool = False,
        verifier: Literal["strict", "math-verify"] = "strict",
    ) -> None:
        if max_characters < 1:
            raise UserError(f"max_characters must be at least 1, got {max_characters}")
        if answer_kind not in ("number", "expression"):
            raise UserError(f"MathReward's answer_kind must be number or expression, got {answer_kind!r}")
        if unparsable not in ("refuse", "text"):
            raise UserError(f"MathReward's unparsable must be refuse or text, got {unparsable!r}")
        if verifier not in ("strict", "math-verify"):
            raise UserError(f"MathReward's verifier must be strict or math-verify, got {verifier!r}")
        if verifier == "math-verify" and (answer_kind != "expression" or lenient_units):
            given = "lenient_units: true" if lenient_units else f"answer_kind: {answer_kind}"
            raise UserError(f"MathReward's {given} needs verifier: strict, math-verify has rules of its own")
        self.require_boxed = require_boxed
        self.max_characters = max_characters
        self.unparsable = unparsable
        self.answer_kind: AnswerKind = answer_kind
        self.thinking = thinking
        self.lenient_units = lenient_units
        self.verifier = verifier
        self._needs_library = verifier == "math-verify"

    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float:
        """Return 1.0 or 0.0; UserError if `answer` cannot be parsed and must be."""
        self.check_answer(answer)
        graded = after_thinking(response, self.thinking, prompt)[-self.max_characters :]
        final = find_final_answer(graded, self.require_boxed)
        return float(final is not None and self._is_right(answer, final))

    def check_answer(self, answer: str) -> None:
        """Raise a UserError that quotes `answer` if it cannot be read as a mathematical expression."""
        if self.verifier == "strict" and _read_reference(answer):
            return
        if beyond.can_parse(answer):
            self._needs_library = True  # in the workers, too, which get this object
            return
        if not _read_reference(answer) and (self.unparsable == "refuse" or not spell(answer)):
            raise UserError(
                f"the reference answer {answer!r} cannot be parsed as mathematics"
                + (": leave it out, or set MathReward's unparsable: text" if spell(answer) else "")
            )

    def warm_up(self) -> None:
        """Import mpmath and compile what the first comparisons would wait for; start math-verify where it is needed."""
        if self._needs_library:
            library.start()
        for answer in (r"\frac{1}{2}", r"2\sqrt{3} - \sin x", "[1, 2)", "5 km/h"):
            self("", rf"so the answer is \boxed{{{answer}}}", r"3\pi x")
        self("", "So the answer is $x$, since $x_i$ is 4", "4")

    def free_memory(self) -> None:
        """Forget what was read and compared."""
        for cached in (_equals, _read_reference, _read_answer):
            cached.cache_clear()
        library.free_memory()

    def _is_right(self, reference: str, final: FinalAnswer) -> bool:
        answer = final.contents[0] if len(final.contents) == 1 else ", ".join(final.contents)
        contents = (answer, *final.later)
        if self.verifier == "math-verify":
            return all(_equals_as_published(reference, content) for content in contents)
        return all(_equals(reference, content, self.answer_kind, self.lenient_units) for content in contents)


def final_answer(response: str, max_characters: int = 5000) -> str | None:
    """Return the response's boxed answer in one spelling, to count votes; None without a complete box."""
    boxed = last_boxed(after_thinking(response, None)[-max_characters:])
    return None if boxed is None else spell(boxed[:MAX_CHARACTERS])


# RL asks the same questions again and again: the bounds hold a few thousand problems in tens of megabytes.
@lru_cache(maxsize=16384)
def _equals(reference: str, answer: str, answer_kind: AnswerKind, lenient_units: bool) -> bool:
    """The answer of a response equals the reference."""
    if len(answer) > 2 * max(MAX_CHARACTERS, len(reference)):
        return False
    one, other = reference.strip(), answer.strip()
    if _PLAIN_INTEGER.fullmatch(one) and _PLAIN_INTEGER.fullmatch(other):
        return int(one) == int(other)
    boxed = last_boxed(reference)
    if spell(reference if boxed is None else boxed) == spell(answer) != "":
        return True
    if len(answer) > max(MAX_CHARACTERS, len(reference)):
        return False
    wanted = _read_reference(reference)
    if not wanted:
        return beyond.equals(reference, answer, answer_kind)
    given = _read_answer(answer)
    comparison = Comparison(answer_kind, lenient_units)
    for meant in (wanted.with_unit, wanted.written):
        if meant is None:
            continue
        if given.written is not None and comparison.equal(meant, given.written):
            return True
        # Plain words behind a number are a unit where a number is wanted, but factors beside other variables.
        if given.with_unit is not None and not symbols_of(meant) and comparison.equal(meant, given.with_unit):
            return True
    return False


def _equals_as_published(reference: str, answer: str) -> bool:
    """math-verify's verdict on the answer of a response; equal texts are equal."""
    if len(answer) > 2 * max(MAX_CHARACTERS, len(reference)):
        return False
    wanted, given = beyond.without_frame(reference), beyond.without_frame(answer)
    return wanted == given != "" or library.equals_as_published(wanted, given)


@lru_cache(maxsize=8192)
def _read_reference(answer: str) -> Readings:
    """The readings of a reference answer; empty if it is no mathematics."""
    boxed = last_boxed(answer)
    return read(answer if boxed is None else boxed, reference=True)


@lru_cache(maxsize=4096)
def _read_answer(text: str) -> Readings:
    """The readings of a response's answer."""
    return read(text)
