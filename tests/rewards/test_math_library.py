"""References beyond our own reader, which math-verify decides, and the verifier that leaves everything to it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from test_math_limits import EXPENSIVE

from dynamo_lightning.errors import RunError, UserError
from dynamo_lightning.rewards import MathReward
from dynamo_lightning.rewards.maths import beyond, library
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.types import Prompt, Rollout

REWARD, NUMBER, PUBLISHED = MathReward(), MathReward(answer_kind="number"), MathReward(verifier="math-verify")
LIMIT = 1.0
BEYOND = [
    (r"\int_0^1 x^2 dx", [r"\frac{1}{3}", "1/3"], ["0.33", "3", r"\frac{1}{2}"]),
    (r"\int_{0}^{\pi} \sin x \, dx", ["2", "2.0"], ["0", "-2"]),
    (r"\int_0^\infty e^{-x^2} dx", [r"\frac{\sqrt{\pi}}{2}"], [r"\sqrt{\pi}", "0.886"]),
    (r"\int_1^2 \frac{1}{x} dx", [r"\ln 2", r"\frac{\ln 4}{2}"], ["2", r"\ln 3"]),
    (r"\frac{1}{2}\int_0^{2\pi} (1+\cos\theta)^2 d\theta", [r"\frac{3\pi}{2}"], [r"3\pi", "4.71"]),
    (r"\int_0^1\int_0^1 xy\,dx\,dy", [r"\frac14", "0.25"], ["0.5"]),
    (r"1+\int_0^1 x\,dx", ["1.5", r"1\frac{1}{2}"], ["1", r"\frac{1}{2}"]),
    (r"\int x^2 dx", [r"\frac{x^3}{3}"], ["x^3", r"\frac{X^3}{3}", "2x"]),
    (r"\sum_{k=1}^{10} k^2", ["385", r"5 \cdot 77"], ["384", "38 5", "55"]),
    (r"\sum_{n=1}^{\infty} \frac{1}{n^2}", [r"\frac{\pi^2}{6}"], [r"\frac{\pi}{6}", "1.64"]),
    (r"\sum_{k=0}^{n} k", [r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"], [r"\frac{n(n-1)}{2}", r"\frac{N(N+1)}{2}"]),
    (r"\sum_{n=1}^{2024} \frac{1}{n(n+1)}", [r"\frac{2024}{2025}"], [r"\frac{2023}{2024}", "1"]),
    (r"\prod_{k=1}^{5} k", ["120", "5!"], ["15", "720"]),
    (r"\prod_{k=2}^{10}\left(1-\frac{1}{k^2}\right)", [r"\frac{11}{20}", "0.55"], [r"\frac{1}{2}"]),
    (r"\lim_{x\to 0} \frac{\sin x}{x}", ["1"], ["0", r"\infty"]),
    (r"\lim_{n\to\infty}\left(1+\frac{1}{n}\right)^n", ["e"], ["1", "2.718"]),
    (r"\lim_{x\to\infty}\frac{3x^2+1}{x^2}", ["3"], ["4", "1/3"]),
]
SUM = r"\sum_{k=1}^{6} 2k"  # 42


@pytest.fixture(autouse=True, scope="module")
def started():
    """The process runs: its start is no part of a verdict's time."""
    library.can_parse(r"\sqrt{2}")


@pytest.mark.parametrize(("reference", "right", "wrong"), BEYOND)
def test_references_beyond_our_own_reader_are_decided_by_math_verify(reference, right, wrong):
    REWARD.check_answer(reference)
    for answer in right:
        assert REWARD("", rf"So it is \boxed{{{answer}}}.", reference) == 1.0, answer
        assert REWARD("", f"The answer is ${answer}$.", f"${reference}$") == 1.0, answer
        assert REWARD("", rf"It is not \boxed{{{answer}}}.", reference) == 0.0, answer
    for answer in wrong:
        assert REWARD("", rf"So it is \boxed{{{answer}}}.", reference) == 0.0, answer


@pytest.mark.parametrize(
    ("answer", "expression", "number"),
    [
        ("42", 1, 1),
        ("42.0", 1, 1),
        ("S = 42", 1, 1),
        (rf"{SUM} = 42", 1, 0),
        (rf"{SUM} = 43", 0, 0),
        (r"\sum_{n=1}^{6} 2n", 1, 0),
        ("17+25", 1, 0),
        (r"6 \cdot 7", 1, 0),
        (r"\sqrt{1764}", 1, 0),
        ("17 25", 0, 0),
        (r"\sum_{n=1}^{1} 17 25", 0, 0),
        ("42 apples", 0, 0),
        ("42, 43", 0, 0),
        (r"\{42\}", 0, 0),
        ("5 = 42", 0, 0),
        ("x < 43", 0, 0),
        ("", 0, 0),
        ("the sum", 0, 0),
    ],
)
def test_strict_rules_hold_where_math_verify_is_asked(answer, expression, number):
    response = rf"So it is \boxed{{{answer}}}"
    assert (REWARD("", response, SUM), NUMBER("", response, SUM)) == (expression, number)


@pytest.mark.parametrize(
    "answer",
    [
        "np.arcsin(10/13)",
        r"\frac{a}{b}, where the constants are arbitrary",
        r"\frac{1}{",
        r"\int_0^1 x dx \text{ over there}",
        "",
        "???",
    ],
)
def test_code_sentences_and_fragments_stay_refused(answer):
    assert not beyond.can_parse(answer)
    for reward in (REWARD, NUMBER):
        with pytest.raises(UserError, match="cannot be parsed as mathematics"):
            reward.check_answer(answer)


def test_what_our_own_reader_reads_never_starts_the_process():
    code = (
        "from dynamo_lightning.rewards import MathReward\n"
        "from dynamo_lightning.rewards.maths import library\n"
        "reward = MathReward()\n"
        "reward.warm_up()\n"
        r"print(reward('', r'\boxed{1/2}', '0.5'), reward('', r'\boxed{\int_0^1 x dx}', '0.5'), library._server)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "1.0 0.0 None\n"


def test_workers_start_the_process_while_they_warm_up_if_a_reference_needs_it():
    reward = MathReward()
    reward.check_answer("5")
    assert not reward._needs_library
    reward.check_answer(SUM)
    assert reward._needs_library


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        (r"\frac{1}{2}", "0.5", 1.0),
        ("43", "42", 0.0),
        ("x^2-1", "(x-1)(x+1)", 1.0),
        ("17 25", "42", 1.0),  # its leniencies, for which the other verifier is the default
        ("42 km", "42 kg", 1.0),
        (SUM, "42", 1.0),
    ],
)
def test_the_verifier_math_verify_decides_with_its_own_rules(answer, gold, verdict):
    assert PUBLISHED("", rf"\boxed{{{answer}}}", gold) == verdict
    assert PUBLISHED("", rf"It cannot be \boxed{{{answer}}}", gold) == 0.0


def test_the_verifier_math_verify_gives_the_librarys_verdicts():
    from math_verify import parse, verify

    answers = ["7", "0.25", r"\frac{1}{4}", r"\sqrt{12}", r"2\sqrt{3}", "[1,2]", "x=7"]
    read = {answer: parse(rf"\boxed{{{answer}}}", parsing_timeout=None) for answer in answers}
    for gold in answers:
        for answer in answers:
            expected = answer == gold or verify(read[gold], read[answer], timeout_seconds=None)
            assert PUBLISHED("", rf"\boxed{{{answer}}}", gold) == float(expected), (gold, answer)


@pytest.mark.parametrize("options", [{"answer_kind": "number"}, {"lenient_units": True}, {"verifier": "sympy"}])
def test_options_that_math_verify_would_ignore_are_refused(options):
    with pytest.raises(UserError, match="verifier"):
        MathReward(**{"verifier": "math-verify", **options})


def longest(cases):
    """The longest time of a verdict, with its answer."""
    worst = (0.0, "")
    for reward, answer, gold in cases:
        start = time.perf_counter()
        assert reward("", rf"\boxed{{{answer}}}", gold) in (0.0, 1.0)
        worst = max(worst, (time.perf_counter() - start, answer))
    return worst


def test_expensive_answers_get_a_verdict_in_a_second():
    for gold in (SUM, r"\int_0^1 x^2 dx"):
        REWARD.check_answer(gold)
    PUBLISHED.check_answer("5")
    cases = [(REWARD, answer, gold) for answer in EXPENSIVE[::4] for gold in (SUM, r"\int_0^1 x^2 dx")]
    seconds, answer = longest([*cases, *((PUBLISHED, answer, "5") for answer in EXPENSIVE[::4])])
    assert seconds < LIMIT, answer


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(30)
    return results[0]


@pytest.mark.parametrize("call", [lambda function: function(), in_thread], ids=["main thread", "other thread"])
def test_a_big_integer_operation_in_c_is_killed_in_any_thread(call):
    """Past the bounds on the text, so that the kill itself is tried."""
    start = time.perf_counter()
    assert call(lambda: library._ask("published", "5", "9^{9^9}")) is False
    assert time.perf_counter() - start < LIMIT
    assert call(lambda: library._ask("published", "5", "5")) is True


def test_verdicts_in_the_pool_are_those_of_the_reward_alone():
    cases = [(SUM, "42"), (SUM, "43"), (SUM, r"\lim_{x\to\infty} x^{x^x}"), (r"\int_0^1 x^2 dx", "1/3"), ("5", "5")]
    reward = MathReward()
    for gold, _ in cases:
        reward.check_answer(gold)
    rollouts = [
        Rollout(Prompt(0, "", "", (1,), gold), 0, (1,), (0.0,), rf"\boxed{{{answer}}}") for gold, answer in cases
    ]
    with RewardScorer(reward, ScoringConfig(num_workers=1, time_limit=20.0)) as scorer:
        scores = scorer.score(rollouts)
    assert [score.reward for score in scores] == [1.0, 0.0, 0.0, 1.0, 1.0]


def test_a_process_killed_from_outside_is_started_again():
    library.can_parse(r"\sqrt{3}")
    os.kill(library._server.pid, signal.SIGKILL)
    assert library._ask("equal", SUM, "42") is True


def test_a_process_that_cannot_start_is_an_error_and_no_verdict(monkeypatch):
    library._end()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunError, match="math-verify ended with status 1"):
        library._ask("equal", SUM, "42")
    library._end()


def test_the_process_ends_with_its_parent():
    code = (
        "from dynamo_lightning.rewards.maths import library\n"
        r"library.can_parse(r'\sqrt{2}')" + "\n"
        "print(library._server.pid, flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    deadline = time.monotonic() + 10
    while is_running(int(output)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(output))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        (r"The value 42 is rejected, \boxed{42}", 0.0),
        (r"The value $42$ is wrong. \boxed{42}", 0.0),
        (r"42 is not the answer, so the answer is \boxed{42}", 0.0),
        (r"$x = -1$ is rejected, \boxed{42}", 1.0),
        (r"The value 41 is rejected, so \boxed{42}", 1.0),
        (r"42 was not wrong, \boxed{42}", 1.0),
        (r"\boxed{42} = \boxed{42.0}", 1.0),
        (r"$\boxed{42} = \boxed{42.0} = \boxed{84/2}$", 1.0),
        (r"\boxed{42} = \boxed{43}", 0.0),
        (r"\boxed{41} = \boxed{42.0} = \boxed{42}", 0.0),
    ],
)
def test_values_called_wrong_and_boxes_set_equal(response, verdict):
    assert REWARD("", response, "42") == verdict
