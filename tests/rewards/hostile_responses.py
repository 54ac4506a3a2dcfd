"""Responses that mean harm: what a policy could write to hang, crash, bloat or take over its verifier."""

import random

ANSWERS = ("5", r"\frac{1}{2}", "x^2+1", r"\{1, 2, 3\}", "[0, 1)", "9^x", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}")


def nested(opening, content, closing, depth):
    return opening * depth + content + closing * depth


def boxed(content):
    return r"\boxed{" + content + "}"


def deep_nesting(r):
    depth = r.choice([10, 100, 1000, 20_000])
    pairs = [("{", "}"), ("(", ")"), (r"\frac{1}{", "}"), (r"\sqrt{", "}"), (r"\left(", r"\right)"), (r"\text{", "}"),
             ("|", "|"), ("[", "]"), (r"\boxed{", "}")]  # fmt: skip
    opening, closing = r.choice(pairs)
    return rf"\boxed{{{nested(opening, '1', closing, depth)}}}"


def many_digits(r):
    digits = r.choice("123456789") * r.choice([100, 4000, 1_000_000])
    return r.choice([rf"\boxed{{{digits}}}", digits, rf"\boxed{{0.{digits}}}", rf"\boxed{{1e{digits[:20]}}}",
                     rf"\boxed{{\frac{{{digits[:2000]}}}{{{digits[:1999]}}}}}"])  # fmt: skip


def towers(r):
    base = str(r.randint(2, 99))
    contents = [
        nested(base + "^{", "9", "}", r.randint(2, 30)), "10^{10^{B}} + x", "B00000!", "((B!)!)!",
        r"\binom{10^{9}}{B0000000}", r"\sum_{n=1}^{10^{9}} n^{B}", r"\prod_{n=1}^{10^{8}} n",
        r"B^{0.000000001} - \sqrt[B000000]{2}", r"\int_0^{B} e^{e^{x^x}} dx", r"\lim_{n \to \infty} (1 + 1/n)^{n^{B}}",
    ]  # fmt: skip
    return boxed(r.choice(contents).replace("B", base))


def boxes(r):
    count = r.choice([100, 10_000, 100_000])
    return r.choice([r"\boxed{" * count, r"\boxed{1}" * count, r"\boxed{1" * count + "}", "}" * count + r"\boxed{6}",
                     r"\boxed{\boxed" * count, r"\boxed" * count + "{6}"])  # fmt: skip


def backtracking(r):
    count = r.choice([500, 5000, 50_000])
    piece = r.choice(["$", "answer is ", "final answer is $", "1,", "= ", "((1+", r"\text{", " ", "$x$ and ", "1 ",
                      r"\(", "-", "1/", "answer: ", r"\frac", "%", r"\$", "0.", "**"])  # fmt: skip
    return r.choice(["", "The final answer is "]) + piece * count + r.choice(["", "!", "$", "}"])


def code(r):
    harm = r.choice(["__import__('os').system('touch HARMED')", "open('HARMED', 'w').write('x')", "exec('import os')",
                     r"\input{/etc/passwd}", r"\write18{touch HARMED}", "{{7*7}}", "import os; os._exit(1)",
                     "lambda: 0", "().__class__.__bases__[0].__subclasses__()", "exit()", "'a' * 10**9",
                     r"\immediate\write18{touch HARMED}", "$(touch HARMED)", "`touch HARMED`", "9**9**9"])  # fmt: skip
    return r.choice([rf"\boxed{{{harm}}}", f"The answer is {harm}", f"${harm}$", rf"\boxed{{\text{{{harm}}}}}", harm])


def strange_characters(r):
    count = r.choice([1, 100, 10_000])
    piece = r.choice(["\0", "\ud800", "\u202e", "\u0301", "🧮", "\ufeff", "\x1b[2J", "٣", "½", "\r", "²", "𝟓"])
    return r.choice([rf"\boxed{{{piece * count}}}", piece * count, rf"\boxed{{5{piece * count}}}"])


def large_objects(r):
    size = r.choice([10, 100, 400])
    row = " & ".join(["1"] * size) + r" \\ "
    contents = [
        r"\begin{pmatrix} " + row * size + r"\end{pmatrix}", r"\{" + ", ".join(map(str, range(size * 5))) + r"\}",
        r" \cup ".join(f"[{i}, {i}.5)" for i in range(size)), " + ".join(f"x^{{{i}}}" for i in range(size * 3)),
        f"(x+y+z)^{{{size * 5}}}", nested(r"\sin(", "x", ")", size), " = ".join(["x"] * size), "; ".join(["1"] * size),
    ]  # fmt: skip
    return boxed(r.choice(contents))


KINDS = (deep_nesting, many_digits, towers, boxes, backtracking, code, strange_characters, large_objects)


def hostile_responses(number, seed=0):
    """Yield `(kind, response, answer)`, the same ones for a seed."""
    r = random.Random(seed)
    for index in range(number):
        kind = KINDS[index % len(KINDS)]
        yield kind.__name__, kind(r), r.choice(ANSWERS)
