import pytest
from right_answers import pairs, responses, statements

from dynamo_lightning.rewards import MathReward

REWARD = MathReward(unparsable="text")
PAIRS = pairs()


def test_there_are_more_than_a_thousand_right_answers():
    assert len(PAIRS) > 1500
    assert len({answer for _, _, answer in PAIRS}) > 1000


@pytest.mark.parametrize("forms", [responses, statements])
def test_right_answers_are_paid_in_every_spelling(forms):
    refused = [
        (kind, gold, response)
        for kind, gold, answer in PAIRS
        for response in forms(answer)
        if REWARD("", response, gold) != 1.0
    ]
    assert refused == []


@pytest.mark.parametrize("kind", ["integers", "large_integers", "fractions", "units", "words", "collections"])
def test_a_number_worked_out_is_paid_where_a_number_is_wanted(kind):
    reward = MathReward(unparsable="text", answer_kind="number")
    refused = [
        (gold, answer)
        for other, gold, answer in PAIRS
        if other == kind
        and reward("", rf"\boxed{{{answer}}}", gold) != 1.0
        and not (kind == "integers" and ("frac" in answer or "/" in answer))  # 84/2 is not worked out
    ]
    assert refused == []


def test_a_right_answer_of_another_pair_is_not_paid():
    """One answer in twenty at random from the others of its kind; those of equal value are known by the pairs."""
    values = {}
    for _, gold, answer in PAIRS:
        values.setdefault(gold, set()).add(answer)
    golds = [gold for gold in values if gold.lstrip("-").isdigit() and len(gold) < 4]
    paid = [
        (gold, answer)
        for gold in golds
        for other in golds
        if other != gold
        for answer in sorted(values[other])[::3]
        if REWARD("", rf"\boxed{{{answer}}}", gold)
    ]
    assert paid == []


def test_verdicts_on_plain_numbers_and_polynomials_agree_with_math_verify():
    """An independent reference, where both read alike: each answer against each."""
    from math_verify import parse, verify

    answers = [
        "7",
        "-3",
        "42",
        "1.5",
        "0.25",
        r"\frac{3}{2}",
        r"\frac{1}{4}",
        r"-\frac{6}{2}",
        r"2\sqrt{3}",
        r"\sqrt{12}",
    ]
    answers += ["x^2-1", "(x-1)(x+1)", "[1,2]", r"\{1,2\}", r"\{2,1\}", r"\frac{42}{6}"]
    read = [parse(rf"$\boxed{{{answer}}}$", parsing_timeout=None) for answer in answers]
    for gold, gold_reading in zip(answers, read, strict=True):
        for answer, reading in zip(answers, read, strict=True):
            expected = verify(gold_reading, reading, timeout_seconds=None)
            assert bool(REWARD("", rf"\boxed{{{answer}}}", gold)) == expected, (gold, answer)
