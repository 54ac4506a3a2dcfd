import subprocess
import sys

import pytest

from dynamo_lightning.rewards import MathReward
from dynamo_lightning.rewards.math import last_boxed


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("5", r"2 + 3 = \boxed{5}"),
        ("5", "The answer is 5."),
        ("5", "So $x = 5$"),
        ("-3", r"\boxed{-3}"),
        ("1234", r"\boxed{1,234}"),
        (r"\frac{1}{2}", r"\boxed{0.5}"),
        (r"\frac{1}{2}", r"\boxed{\dfrac{2}{4}}"),
        ("0.5", "The final answer is $\\frac12$. I hope it is correct."),
        (r"\boxed{\frac{1}{2}}", r"\boxed{1/2}"),
        (r"$\frac{1}{2}$", r"\boxed{\frac{1}{2}}"),
        (r"\(\frac{1}{2}\)", r"\boxed{\frac{1}{2}}"),
        (r"(3, \frac{\pi}{2})", r"\boxed{\left( 3, \frac{\pi}{2} \right)}"),
        (r"\{1, 2, 3\}", r"\boxed{\{3, 2, 1\}}"),
        ("2, -1", r"x = \boxed{-1, 2}"),
        (r"[1, 2) \cup (3, \infty)", r"\boxed{(3, \infty) \cup [1, 2)}"),
        (r"(1+x)^2", r"\boxed{x^2 + 2x + 1}"),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 4/2 \end{pmatrix}}"),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
        (r"\$18", r"\boxed{18}"),
    ],
)
def test_equal_answers_get_one(answer, response):
    assert MathReward()("", response, answer) == 1.0


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("5", r"\boxed{6}"),
        ("5", r"5 is wrong, it is \boxed{6}"),
        ("5", ""),
        ("5", r"\boxed{}"),
        ("5", "I do not know"),
        (r"\frac{1}{2}", r"\boxed{\frac{2}{1}}"),
        (r"(3, \frac{\pi}{2})", r"\boxed{(\frac{\pi}{2}, 3)}"),
        (r"\{1, 2, 3\}", r"\boxed{\{1, 2\}}"),
        ("[1, 2)", r"\boxed{(1, 2)}"),
        ("[1, 2)", r"\boxed{[1, 2]}"),
        (r"\text{Evelyn}", r"\boxed{\text{Angela}}"),
        ("7", r"\boxed{\frac{}{} \sqrt}"),
        ("7", r"\boxed{5} or \boxed{7} or \boxed{9}"),
    ],
)
def test_different_or_missing_answers_get_zero(answer, response):
    assert MathReward()("", response, answer) == 0.0


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"} { \boxed {4}", "4"),
        (r"no box {5}", None),
        (r"\boxed{", None),
    ],
)
def test_last_complete_box_is_found(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("4.5e33", r"\boxed{4.5 \times 10^{33}}"),
        ("1e-5", r"\boxed{0.00001}"),
        ("-1./3", r"\boxed{-\frac{1}{3}}"),
        (r"$69$,$84$", r"\boxed{84, 69}"),
        (r"$(-\infty, 0) \cup\{1\}$.", r"\boxed{\{1\} \cup (-\infty, 0)}"),
        (r"$m_{\max }=n^{2}-n-1$", r"\boxed{n^2 - n - 1}"),
        (r"\text{(C)}", r"\boxed{C}"),
        (r"x \in [-2,7]", r"\boxed{[-2, 7]}"),
        ("x=5", r"\boxed{5}"),
        (r"10,\!080", r"\boxed{10080}"),
        (r"5.4 \text{ cents}", r"\boxed{5.4}"),
        (r"90^\circ", r"\boxed{90}"),
        (r"1\frac{4}{5}", r"\boxed{\frac{9}{5}}"),
        ("x^8+x^7+x^6+x^5+x^4", r"\boxed{x^4 (x^4+x^3+x^2+x+1)}"),
        (r"\frac{100!}{2^{50}}", r"\boxed{100! \cdot 2^{-50}}"),
        (
            r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
            r"\boxed{\begin{bmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{bmatrix}}",
        ),
        ("62.5%", r"\boxed{62.5\%}"),
    ],
)
def test_answers_as_benchmarks_spell_them(answer, response):
    assert MathReward()("", response, answer) == 1.0


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("2.26e-10", r"\boxed{3.3e-10}"),
        ("0.006", r"\boxed{0.0060049}"),
        ("4.5e33", r"\boxed{4.5 \times 10^{32}}"),
        (r"$69$,$84$", r"\boxed{84}"),
        (r"(-\infty, 0) \cup\{1\}", r"\boxed{(-\infty, 0)}"),
        ("x^2+x", r"\boxed{x^2-x}"),
        ("12", r"\boxed{1,2}"),
        (r"\frac{1}{3}", r"\boxed{0.33}"),
    ],
)
def test_near_misses_get_zero(answer, response):
    assert MathReward()("", response, answer) == 0.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"The answer is $4.5e33$.", 1.0),  # as in a box: math-verify would read 4.5 · e · 33
        (r"Final answer is: \(4.5 \times 10^{33}\)", 1.0),
        (r"The answer is $4.5e33$ and not $3$.", 0.0),
        (r"The answer is $9^{9^{9^{9}}}$", 0.0),
    ],
)
def test_a_last_sentence_is_read_like_a_box(response, reward):
    assert MathReward()("", response, "4.5e33") == reward
    assert MathReward(require_boxed=True)("", response, "4.5e33") == 0.0


def test_the_search_does_not_begin_within_a_formula():
    text = " so we go on" * 30
    assert MathReward()("", f"${'x + ' * 60}x$ is 5 {text} for $n$ and", "n") == 1.0
    assert MathReward()("", f"${'x + ' * 60}x$ is 5 {text} for \n$n$ and", "n") == 1.0
    assert MathReward()("", f"It costs $3 {2 * text} which is $15", "15") == 1.0
    assert MathReward()("", f"It costs \\$3 {2 * text} for $n$ and", "n") == 1.0


@pytest.mark.parametrize("answer", ["[1, 2)", "(1, 2)", "x^2 + 1", r"3\sqrt{2}", "7", "n^2 + 1"])
def test_intervals_and_expressions_equal_themselves_alone(answer):
    others = ["[1, 2)", "(1, 2)", "x^2 + 1", r"3\sqrt{2}", "7", "n^2 + 1"]
    assert [other for other in others if MathReward()("", rf"\boxed{{{other}}}", answer)] == [answer]


def test_a_pair_equals_the_open_interval_that_it_may_be():
    assert MathReward()("", r"\boxed{1, 2}", "(1, 2)") == 1.0


def test_an_answer_that_is_no_mathematics_is_refused_or_compared_as_text():
    answer = r"\int_0^v \hbar \omega(v+1 / 2) dv-\frac{E_{0}^{2}}{2 m}"
    with pytest.raises(ValueError, match="set MathReward's unparsable: text"):
        MathReward().check_answer(answer)
    reward = MathReward(unparsable="text")
    reward.check_answer(answer)
    assert reward("", rf"\boxed{{{answer.replace(' ', '').replace('frac', 'dfrac')}}}", answer) == 1.0
    assert reward("", r"\boxed{2}", answer) == 0.0
    with pytest.raises(ValueError, match="cannot be parsed"):
        reward.check_answer(" ")


def test_unclosed_boxes_cost_linear_time():
    assert last_boxed(r"\boxed{" * 100_000 + "5" + "}") == "5"


def test_required_box_refuses_an_answer_without_it():
    assert MathReward()("", "The answer is 5", "5") == 1.0
    assert MathReward(require_boxed=True)("", "The answer is 5", "5") == 0.0
    assert MathReward(require_boxed=True)("", r"\boxed{5}", "5") == 1.0


def test_only_the_end_of_a_long_response_counts():
    early, late = r"\boxed{5}" + " so" * 100, " so" * 100 + r"\boxed{5}"
    assert MathReward()("", early, "5") == 1.0
    assert MathReward(max_characters=50)("", early, "5") == 0.0
    assert MathReward(max_characters=50)("", late, "5") == 1.0
    with pytest.raises(ValueError, match="max_characters must be at least 1, got 0"):
        MathReward(max_characters=0)


@pytest.mark.parametrize("answer", ["5", r"\frac{1}{2}", r"(3, \frac{\pi}{2})", r"\boxed{5}", "$5$", r"\text{odd}"])
def test_good_reference_answers_pass_the_check(answer):
    MathReward().check_answer(answer)


@pytest.mark.parametrize("answer", ["", " ", "???", r"\frac{1}{", r"\boxed{}"])
def test_unparsable_reference_answer_is_an_error_that_quotes_it(answer):
    with pytest.raises(ValueError, match="cannot be parsed") as error:
        MathReward().check_answer(answer)
    assert repr(answer) in str(error.value)
    with pytest.raises(ValueError, match="cannot be parsed"):
        MathReward()("", r"\boxed{5}", answer)


def test_importing_the_rewards_imports_neither_torch_nor_math_verify():
    code = (
        "import sys, dynamo_lightning.rewards as r; r.MathReward(); print({'torch', 'math_verify'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"
