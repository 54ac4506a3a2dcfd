r"""math-verify, for references beyond our own reader: integrals, sums, products, limits, rarer LaTeX.

It is asked in a process of its own (`library_server.py`), which starts with the first question and can be killed in the
middle of SymPy's big-integer operations, from any thread and in any process. A question has `SECONDS` of wall-clock
time; what takes longer, crashes or is too large to begin with is wrong.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

from dynamo_lightning.errors import RunError
from dynamo_lightning.rewards.maths.reading import MAX_CHARACTERS

SECONDS = 0.9
"""Wall-clock seconds of one question; with the pipe a verdict takes no more than one."""
_START_SECONDS, _PIPE_SECONDS = 120.0, 5.0
_TOO_LARGE = re.compile(
    r"\d{60}"  # digits
    r"|\^\s*\{?\s*[-+]?\s*\d{5}"  # exponents
    r"|\^\s*\{[^{}]*\^\s*\{?[^{}]*\^"  # towers
    r"|\d{5,}\s*!|!\s*!|!\s*\)\s*!|\}\s*!"  # factorials
    r"|\\d?t?binom\s*\{\s*\d{5}"
)
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_COMMAND_NAMES = re.compile(r"\\(?!text|mbox)[a-zA-Z]+")
_PROSE = re.compile(r"(?<![a-zA-Z\\])[A-Za-z]{5,}|\\(?:text|mbox)\w*\s*\{[^{}]*[A-Za-z]{2}")


def is_too_large(text: str) -> bool:
    """The text has numbers, powers or factorials that are no final answer, or more than `MAX_CHARACTERS`."""
    return len(text) > MAX_CHARACTERS or _TOO_LARGE.search(text) is not None


@lru_cache(maxsize=4096)
def can_parse(reference: str) -> bool:
    """Return whether math-verify reads a reference that our own reader does not: LaTeX, and no sentence."""
    if is_too_large(reference) or not _COMMAND.search(reference) or _PROSE.search(_COMMAND_NAMES.sub(" ", reference)):
        return False
    if any(reference.count(opening) != reference.count(closing) for opening, closing in ("{}", "()")):
        return False
    return _ask("parsed", reference)


@lru_cache(maxsize=16384)
def equals(reference: str, *answers: str) -> bool:
    """Return whether every answer equals a reference that `can_parse` accepts."""
    return not any(map(is_too_large, answers)) and _ask("equal", reference, *answers)


@lru_cache(maxsize=16384)
def equals_as_published(reference: str, answer: str) -> bool:
    """Return math-verify's own verdict, with its settings and all its leniencies."""
    return not is_too_large(answer) and not is_too_large(reference) and _ask("published", reference, answer)


def start() -> None:
    """Start the process, without waiting until it has imported SymPy."""
    with _lock:
        _started()


def free_memory() -> None:
    """Forget the verdicts."""
    for cached in (can_parse, equals, equals_as_published):
        cached.cache_clear()


_lock = threading.Lock()
_server: subprocess.Popen[bytes] | None = None
_is_ready = False


def _ask(kind: str, *texts: str) -> bool:
    """The process's verdict; False if the time ran out.

    Raises:
        RunError: If the process cannot be started, which is no answer's fault.
    """
    question = {"kind": kind, "texts": texts, "seconds": SECONDS}
    line = json.dumps(question).encode() + b"\n"
    with _lock:
        for attempt in range(2):  # a process that was killed from outside is started once more
            server = _started()
            try:
                server.stdin.write(line)  # type: ignore[union-attr]
                verdict = _read_line(server, SECONDS + _PIPE_SECONDS)
            except BrokenPipeError:
                verdict = b""
            if verdict is None:
                _end()
                return False
            if verdict:
                return verdict == b"yes\n"
            code = server.wait()
            _end()
            if attempt:
                raise RunError(f"MathReward: the process that runs math-verify ended with status {code}")
    raise AssertionError


def _started() -> subprocess.Popen[bytes]:
    """The running process."""
    global _server
    if _server is None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("library_server.py"))]
        _server = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(_end)
    return _server


def _read_line(server: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """Its next line, empty if it has ended, None after so many seconds; waits for its start first."""
    global _is_ready
    if not _is_ready:
        ready = _read_within(server, _START_SECONDS)
        if ready != b"ready\n":
            return ready
        _is_ready = True
    return _read_within(server, seconds)


def _read_within(server: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    assert server.stdout is not None
    readable, _, _ = select.select([server.stdout], [], [], seconds)
    return server.stdout.readline() if readable else None


def _end() -> None:
    """Kill the process."""
    global _server, _is_ready
    server, _server, _is_ready = _server, None, False
    atexit.unregister(_end)
    if server is not None:
        server.kill()
        server.wait()
        for pipe in (server.stdin, server.stdout):
            try:
                pipe.close()  # type: ignore[union-attr]
            except BrokenPipeError:  # what could not be written to a process that has ended
                pass


def _forget() -> None:
    """In a fork: the process belongs to the parent."""
    global _server, _is_ready, _lock
    _server, _is_ready, _lock = None, False, threading.Lock()


os.register_at_fork(after_in_child=_forget)
