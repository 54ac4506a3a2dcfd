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
