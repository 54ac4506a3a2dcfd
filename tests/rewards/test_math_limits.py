"""Bounds on what a verdict costs, in any thread and without a pool: no answer of any shape takes a second."""

import random
import threading
import time

import pytest
from right_answers import pairs

from dynamo_lightning.rewards import MathReward

REWARD = MathReward()
LIMIT = 1.0
EXPENSIVE = [
    r"9^{9^9}",
    r"9^{9^{9^9}}",
    "9^{" * 12 + "9" + "}" * 12,
    "100000!",
    "((9!)!)!",
    "(10^{30})!",
    r"\binom{10^9}{5 \cdot 10^8}",
    "2^{199999}",
    r"\frac{3^{9000}}{7^{7000}} + \frac{5^{8000}}{11^{5000}}",
    r"\sum_{n=1}^{10^9} n^3",
    r"\int_0^9 e^{e^{x^x}} dx",
    r"\lim_{n\to\infty} (1+1/n)^n",
    r"\sin(10^{10^{10}})",
    r"\sin(10^{14}) + \tan(10^{14})",
    r"\gcd(10^{50000}, 3^{50000})",
    r"\operatorname{lcm}(" + ", ".join(str(n) for n in range(1, 90)) + ")",
    r"\begin{pmatrix}" + r"\\".join(["&".join("1234567")] * 7) + r"\end{pmatrix}",
    r"\det\begin{pmatrix}" + r"\\".join(["&".join("xyzabc")] * 6) + r"\end{pmatrix}",
    "(x+y+z)^{2000}",
    "+".join(f"x^{{{n}}}" for n in range(60)),
    r"\sin(" * 20 + "x" + ")" * 20,
    r"\sqrt{2+" * 20 + "2" + "}" * 20,
    "!" * 200,
    "1+" * 240 + "1",
    ", ".join(str(n) for n in range(110)),
    r"\cup".join(f"[{n},{n}.5)" for n in range(40)),
    r"\frac{1}{" * 24 + "x" + "}" * 24,
    "x" * 480,
    r"\pm 1" * 80,
    r"\cos^2 x\sin^3 x\tan x" * 20,
    r"2^{3000}3^{3000}5^{3000}7^{3000}" * 10,
    r"\log_{2}" * 100 + "2",
    "1/3+" * 120 + "1",
    r"e^{i\pi x}" * 40,
    "0." + "7" * 480,
    "7" * 499,
    r"(\frac{1}{3^{4000}}+\frac{1}{7^{4000}})" * 12,
    r"\lfloor 10^{10^{9}} \rfloor",
    r"(1+\sqrt2)^{10^9}",
    r"\binom{10^{20}}{40}" * 12,
    "3000!" * 40,
    r"\arcsin(10^{12})^{10^{12}}",
]
GOLDS = (
    "5",
    r"9^{9^9}",
    r"2^{2400}",
    "x^2+1",
    r"\sin^3 t \cos t",
    "[0, 1)",
    r"\{1, 2, 3\}",
    r"y=e^{-2x}(c_1\cos 5x+c_2\sin 5x)",
)


def worst_case(cases):
    """The longest time of a verdict, with its response."""
    longest = (0.0, "")
    for response, gold in cases:
        REWARD.free_memory()
        start = time.perf_counter()
        REWARD("", response, gold)
        longest = max(longest, (time.perf_counter() - start, response[:100]))
    return longest


def test_expensive_answers_get_a_verdict_at_once():
    seconds, response = worst_case((rf"\boxed{{{answer}}}", gold) for answer in EXPENSIVE for gold in GOLDS)
    assert seconds < LIMIT, response


def test_expensive_answers_that_equal_themselves_are_right():
    for answer in (r"9^{9^9}", r"2^{2400}", "3000!", r"3^{900}-1"):
        assert REWARD("", rf"\boxed{{{answer} + 0}}", answer) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "x " * 500_000,
        r"\boxed{" * 100_000,
        r"\boxed{1}" * 100_000,
        "$" * 100_000,
        "the answer is " * 50_000,
        "#### " * 50_000,
        "1 " * 100_000,
        "(" * 100_000,
        "<think>" * 50_000,
        "</think>" * 50_000,
        "<answer>" * 50_000,
        "7" * 1_000_000,
        "**" * 100_000,
        "not " * 100_000 + r"\boxed{5}",
        r"\boxed{5}" + " or maybe" * 50_000,
        r"\boxed{" + "{" * 4000 + "5" + "}" * 4000 + "}",
        "answer: $" * 50_000,
        "\\" * 200_000,
        "1,000," * 50_000,
        "½" * 100_000,
        "is the answer to the " * 20_000,
    ],
)
def test_long_responses_get_a_verdict_at_once(response):
    seconds, _ = worst_case([(response, "5"), (response, r"x^2+\frac{1}{2}")])
    assert seconds < LIMIT


def test_verdicts_are_the_same_in_other_threads_and_at_the_same_time():
    cases = [(rf"\boxed{{{answer}}}", gold) for _, gold, answer in pairs()[::7]]
    cases += [(rf"\boxed{{{answer}}}", "5") for answer in EXPENSIVE]
    reward = MathReward(unparsable="text")
    alone = [reward("", *case) for case in cases]
    reward.free_memory()
    results = {}

    def work(number):
        results[number] = [reward("", *case) for case in cases]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [results[number] for number in range(3)] == [alone] * 3


def test_mutated_answers_never_crash_the_reward():
    generator = random.Random(0)
    known = [answer for _, _, answer in pairs()]
    commands = [r"\frac", r"\sqrt", r"\text{or}", r"\sin", r"\binom", r"\pm", r"\\", r"\{", r"\}", "999999999", r"\mod"]
    pieces = [*r"\{}()[]^_!|,.;:%$&/*+-=<>0123456789abxyei ", *commands]
    for _ in range(4000):
        letters = list(generator.choice(known))
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(letters) + 1)
            if generator.random() < 0.5 or not letters:
                letters.insert(place, generator.choice(pieces))
            else:
                del letters[min(place, len(letters) - 1)]
        answer = "".join(letters)
        form = generator.choice([r"\boxed{ANSWER}", "The answer is ANSWER", "ANSWER"])
        assert REWARD("", form.replace("ANSWER", answer), generator.choice(GOLDS)) in (0.0, 1.0)
