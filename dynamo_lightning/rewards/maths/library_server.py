"""Process that asks math-verify, run by its path: `library.py` writes questions to it, one JSON object a line.

Each question is answered by a fork, because SymPy may spend hours in one big-integer operation in C, where neither a
Python signal handler nor another thread is heard: the kernel's own timer ends the fork. Its exit status is the verdict.
The fork starts with everything imported, and nothing that a question leaves in a cache reaches the next one.

This file imports nothing of dynamo_lightning: the process stays small and starts fast.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 2**30  # that one question may take
_NO, _YES = 10, 11  # exit statuses; every other one is a crash or a kill
_DIGITS, _MORE_DIGITS = 15, 25


def read_latex(text: str) -> Any:
    """Return math-verify's reading of one formula, None if it has none."""
    from math_verify import LatexExtractionConfig, parse

    found = parse(rf"\boxed{{{text}}}", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found and not isinstance(found[0], str) else None


def is_parsed(reference: str) -> bool:
    """math-verify reads the reference."""
    return read_latex(reference) is not None


def is_equal(reference: str, *answers: str) -> bool:
    """Every answer equals the reference: by their numbers where those come fast, else by math-verify's comparison."""
    from math_verify import verify

    wanted = read_latex(reference)
    for answer in answers:
        given = read_latex(answer)
        if wanted is None or given is None:
            return False
        same = _same_number(wanted, given)
        if not (verify(wanted, given, timeout_seconds=None) if same is None else same):
            return False
    return True


def is_published_equal(reference: str, answer: str) -> bool:
    """The verdict of math-verify with its own settings, as other frameworks ask for it."""
    from math_verify import parse, verify

    wanted = parse(rf"\boxed{{{reference}}}", parsing_timeout=None)
    given = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)
    return bool(verify(wanted, given, timeout_seconds=None))


def _same_number(wanted: Any, given: Any) -> bool | None:
    """Equality of two numbers, None if one is none or its value is not certain or slow to come by.

    A definite integral is a quadrature of milliseconds, while its closed form may take SymPy for ever; so is an endless
    sum. Long sums with an end are faster in closed form.
    """
    from sympy import Integral, S, Sum

    if getattr(wanted, "free_symbols", True) or getattr(given, "free_symbols", True):
        return None
    if not wanted.has(Integral) and not any(S.Infinity in limit for part in wanted.atoms(Sum) for limit in part.limits):
        return None
    try:
        values = [complex(side.evalf(digits)) for digits in (_DIGITS, _MORE_DIGITS) for side in (wanted, given)]
    except Exception:  # no number: a set, a limit that does not exist, a pole
        return None
    rough_wanted, rough_given, value, given_value = values
    size = max(abs(value), abs(given_value), 1e-300)
    if max(abs(rough_wanted - value), abs(rough_given - given_value)) > 1e-10 * size:
        return None
    difference = abs(value - given_value)
    return True if difference < 1e-10 * size else False if difference > 1e-4 * size else None


_WARM_UP = (
    (r"\int_0^1 x^2 dx", r"\frac{1}{3}"),
    (r"\frac{1}{2}\int_{0}^{2\pi}\left(1+\cos\theta\right)^2\,d\theta", r"\frac{3\pi}{2}"),
    (r"\sum_{k=1}^{\infty} \frac{1}{k^2}", r"-\frac{2\sqrt{3}}{5} + 7.5"),
    (r"\lim_{x\to 0}\frac{\sin x}{x}", "1"),
    (r"\prod_{k=2}^{10} (1-\frac{1}{k^2})", r"\ln 2"),
    ("x^2", "(x+1)^2"),
)
"""Imports and fills the parser's tables with what every fork would have to."""
_QUESTIONS: dict[str, Callable[..., bool]] = {"parsed": is_parsed, "equal": is_equal, "published": is_published_equal}


def _answer(question: dict[str, Any]) -> None:
    """End this fork with the verdict as its exit status."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, question["seconds"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    status = _NO
    try:
        status = _YES if _QUESTIONS[question["kind"]](*question["texts"]) else _NO
    except BaseException:  # untrusted text: any failure of the library is a wrong answer
        pass
    finally:
        os._exit(status)


def main() -> None:
    """Answer questions until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    verdicts = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints is no verdict
    logging.disable(logging.CRITICAL)
    for reference, answer in _WARM_UP:
        is_equal(reference, answer)
    verdicts.write(b"ready\n")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _answer(json.loads(line))
        _, status = os.waitpid(pid, 0)
        verdicts.write(b"yes\n" if os.waitstatus_to_exitcode(status) == _YES else b"no\n")


if __name__ == "__main__":
    main()
