r"""Right answers in many spellings: pairs of reference and answer, and responses that give them.

`right_answers.jsonl` has facts of algebra, one a line; numbers times spellings are made here.
"""

import json
from fractions import Fraction
from pathlib import Path

INTEGERS = (0, 1, 7, -3, 18, 42, -42, 100, 360, 999)
LARGE_INTEGERS = (1234, 12500, 48000, 1000000, 123456789, 3628800)
FRACTIONS = ((1, 2), (3, 4), (-1, 3), (7, 5), (22, 7), (-5, 8), (9, 10), (17, 6), (1, 25), (144, 55))
RADICALS = ((2, 3), (5, 7), (3, 2), (10, 11), (7, 13))
UNITS = (
    (r"\text{ cm}", "cm", r"\text{ cm}", r"\,\text{cm}", r"\ \mathrm{cm}", "centimeters", r"\text{ centimetres}", ""),
    (r"\text{ km/h}", "kilometers per hour", "km/h", "kph", r"\text{ km}/\text{h}", ""),
    (r"\text{ cm}^2", "cm^2", r"\text{ cm}^{2}", r"\text{ square centimeters}", r"\text{cm}²", ""),
    (r"\mbox{ inches}^2", r"\text{ square inches}", r"\text{ sq. in}", ""),
    (r"\text{ minutes}", "min", "minutes", r"\text{ mins}", ""),
    (r"\text{ mph}", r"\text{ miles per hour}", "mph", "miles/hour", ""),
    (r"\text{ cents}", "cents", "¢", ""),
    (r"\text{ degrees}", r"^\circ", "°", ""),
    (r"^\circ", r"\text{ degrees}", "degrees", r"^{\circ}", ""),
    ("", r"\text{ cm}", "cm", "km/h", r"\text{ km per hour}", "square units", r"\text{ sq. ft}", "dollars", "people"),
    ("", "hours", "kg", r"\text{ m/s}^2", "cups of flour", r"\text{ liters of water}", "m", "m/s", "years old", "days"),
    ("", r"\text{ dollars each}", "apples", r"\text{ more apples}", "miles per hour", "meters", r"\text{ in total}"),
)
"""Units of the reference, each with units that an answer may give."""


def integers():
    """Whole numbers with labels, units, brackets, and decimals of zeros."""
    for n in INTEGERS:
        spellings = [
            f"{n}", f" {n} ", f"{n}.0", f"{n}.", f"{n}.00", f"{{{n}}}", rf"\,{n}\,", f"${n}$", rf"\({n}\)",
            f"x = {n}",
            f"n={n}",
            rf"x_1 = {n}", rf"{n} \text{{ apples}}", f"{n} apples", rf"{n}\text{{ units}}", rf"\mathbf{{{n}}}",
            rf"\left({n}\right)", f"{n} students", rf"\displaystyle {n}", f"{n}/1", rf"\text{{Total}} = {n}",
            f"f(3) = {n}", f"**{n}**", rf"{n}\ \text{{people}}", f"a + b = {n}", rf"\boxed{{{n}}}", rf"{n}\!",
            rf"\frac{{{2 * n}}}{{2}}", f"{n} people", rf"\text{{{n}}}" if n >= 0 else f"{n}",
        ]  # fmt: skip
        if n < 0:
            spellings += [f"−{-n}", f"- {-n}", f"-({-n})", f"–{-n}", f"-{{{-n}}}"]
        else:
            spellings += [f"+{n}", rf"{n}\%", f"{n}.0%", rf"{n}^\circ", f"{n}°", f"{n} degrees", rf"\${n}", f"{n}€"]
            spellings += [f"${n}", f"£{n}", f"{n} dollars"]
            yield from ((rf"\${n}", spelled) for spelled in (f"{n} dollars", f"{n}", rf"\${n}.00", f"${n}"))
            yield from ((rf"{n}\%", spelled) for spelled in (f"{n}%", f"{n}", rf"{n}.0 \%", f"{n} percent"))
        yield from ((str(n), spelled) for spelled in spellings)


def large_integers():
    """Thousands separators and scientific notation, in the answer and in the reference."""
    for n in LARGE_INTEGERS:
        grouped = f"{n:,}"
        power = len(str(n)) - 1
        mantissa = str(n)[0] + "." + str(n)[1:]
        separators = ("{,}", r",\!", r"\,", " ", r",\! ", "\u202f")
        spellings = [grouped.replace(",", separator) for separator in separators]
        spellings += [
            str(n), grouped, f"{grouped}.00", rf"\${grouped}", rf"{mantissa} \times 10^{{{power}}}",
            f"{mantissa}e{power}",
            rf"{mantissa}\cdot10^{{{power}}}", f"{mantissa}E+{power}", f"{mantissa} × 10^{power}", f"N = {grouped}",
            rf"{grouped}\text{{ km}}", f"{{{grouped}}}", f"{grouped} dollars",
        ]  # fmt: skip
        yield from ((str(n), spelled) for spelled in (*spellings, f"${grouped}"))
        yield from ((reference, str(n)) for reference in spellings)


def fractions():
    """Fractions, mixed numbers, and terminating decimals."""
    for p, q in FRACTIONS:
        sign, a = ("-" if p < 0 else ""), abs(p)
        reference = rf"{sign}\frac{{{a}}}{{{q}}}"
        spellings = [
            reference, rf"{sign}\dfrac{{{a}}}{{{q}}}", rf"{sign}\tfrac{{{a}}}{{{q}}}", f"{p}/{q}", f"{p} / {q}",
            rf"\frac{{{p}}}{{{q}}}", rf"{sign}\frac{{{3 * a}}}{{{3 * q}}}", rf"{sign}{{{a}}}/{{{q}}}",
            f"x = {reference}",
            rf"{sign}\left(\frac{{{a}}}{{{q}}}\right)", rf"{sign}\frac {{{a}}} {{{q}}}", rf"{reference}\text{{ miles}}",
            rf"\text{{P}} = {reference}", rf"{sign}\cfrac{{{a}}}{{{q}}}", f"P(A) = {reference}",
        ]  # fmt: skip
        if a < 10 and q < 10:
            spellings += [rf"{sign}\frac{a}{q}", rf"{sign}\frac {a}{q}", rf"{sign}\frac{a}{{{q}}}"]
            spellings += [rf"{sign}\frac{{{a}}}{q}"]
        if a > q:
            whole, rest = divmod(a, q)
            spellings += [rf"{sign}{whole}\frac{{{rest}}}{{{q}}}", rf"{sign}{whole} \frac{{{rest}}}{{{q}}}"]
            spellings += [f"{sign}{whole} {rest}/{q}", rf"{sign}{whole}\,\tfrac{{{rest}}}{{{q}}}"]
        value = Fraction(p, q)
        if 10**6 % q == 0:
            decimal = f"{float(value):.6f}".rstrip("0")
            spellings += [decimal, decimal + "0", decimal.replace("0.", ".", 1) if abs(value) < 1 else decimal]
        yield from ((reference, spelled) for spelled in spellings)
        yield from ((spelled, reference) for spelled in spellings[:5])


def radicals():
    """Square roots with a factor."""
    for a, b in RADICALS:
        n = a * a * b
        reference = rf"{a}\sqrt{{{b}}}"
        spellings = [
            reference, rf"{a} \sqrt{{{b}}}", rf"{a}\cdot\sqrt{{{b}}}", rf"\sqrt{{{b}}}\cdot {a}", f"{a}√{b}",
            rf"{a}\sqrt {{{b}}}", rf"\sqrt{{{n}}}", f"{a}*sqrt({b})", f"{a} sqrt({b})", rf"{a}\times\sqrt{{{b}}}",
            rf"{a}{{\sqrt{{{b}}}}}", rf"{a}\left(\sqrt{{{b}}}\right)", rf"{reference}\text{{ cm}}", f"{a}√({b})",
            rf"\frac{{{a * b}}}{{\sqrt{{{b}}}}}", rf"{a} \cdot {b}^{{1/2}}", rf"{a}\cdot {b}^{{\frac{{1}}{{2}}}}",
            f"d = {reference}", rf"{a}\sqrt[2]{{{b}}}", rf"{reference} \approx {a * b**0.5:.3f}",
            rf"\sqrt{{{n}}} = {reference}", rf"{a}\sqrt{b}",
        ]  # fmt: skip
        yield from ((reference, spelled) for spelled in spellings)
        yield rf"1 + {reference}", rf"{reference} + 1"
        yield rf"1 - {reference}", rf"-{reference} + 1"
        yield rf"\frac{{1}}{{\sqrt{{{b}}}}}", rf"\frac{{\sqrt{{{b}}}}}{{{b}}}"
        yield rf"\frac{{{reference}}}{{3}}", rf"\frac{{{a}}}{{3}}\sqrt{{{b}}}"
        yield rf"\frac{{{reference}}}{{3}}", f"{reference}/3"


def units():
    """Values with the units of `UNITS`; a unit is optional."""
    for value in ("5", "12", "3.5", "60"):
        for reference, *given in UNITS:
            for unit in given:
                gap = " " if unit and unit[0].isalpha() else ""
                yield value + reference, value + gap + unit


def facts():
    """The pairs of the file, with their kind."""
    lines = Path(__file__).with_name("right_answers.jsonl").read_text("utf-8").splitlines()
    return [(fact["kind"], fact["gold"], fact["answer"]) for fact in map(json.loads, lines)]


def pairs():
    """All triples of kind, reference and answer, each once."""
    made = [
        (kind.__name__, *pair) for kind in (integers, large_integers, fractions, radicals, units) for pair in kind()
    ]
    return list(dict.fromkeys(made + facts()))


def responses(answer):
    """Responses that give an answer in a box."""
    yield rf"So the result is $\boxed{{{answer}}}$."
    start = r"We try \boxed{-77} first, which fails."
    yield f"{start}\nTherefore,\n\\[\n\\boxed{{{answer}}}\n\\]\nThis is the final answer."


def statements(answer):
    """Responses that state an answer without a box; none where its own signs would end the formula."""
    if any(sign in answer for sign in ("$", "**", "boxed", "\\(")):
        return
    yield f"The answer is ${answer}$."
    yield f"So we are done. **Final answer:** ${answer}$"
    yield f"<think>hm, 3</think><answer>{answer}</answer>"
