r"""Tokens of a cleaned answer.

A run of letters is one token only where it is the name of a function or a constant (`sqrt`, `pi`); otherwise each
letter is a variable. A comma between digits groups thousands at the top level (`12,500`), but separates items
within brackets (`(1,234)` is a point).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dynamo_lightning.rewards.maths.nodes import UnreadableError
from dynamo_lightning.rewards.maths.spelling import THOUSANDS

MAX_TOKENS, MAX_DIGITS = 2000, 2000

FUNCTIONS = {
    **{name: name for name in (
        "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sech csch arcsinh "
        "arccosh arctanh ln log lg exp gcd lcm max min det abs sqrt binom floor ceil sgn"
    ).split()},
    **{"asin": "arcsin", "acos": "arccos", "atan": "arctan", "tg": "tan", "ctg": "cot", "arctg": "arctan",
       "sign": "sgn", "ceiling": "ceil", "arsinh": "arcsinh", "arcosh": "arccosh", "artanh": "arctanh",
       "cosec": "csc", "cbrt": "cbrt"},
}  # fmt: skip
_PLAIN_CONSTANTS = {"pi": "pi", "inf": "infinity", "infty": "infinity", "infinity": "infinity", "oo": "infinity"}
_PLAIN_GREEK = frozenset("alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi omega".split())
_COMMANDS = {
    **{name: ("op", "*") for name in ("cdot", "times", "ast", "cdotp", "bullet")},
    "div": ("op", "/"), "pm": ("op", "+-"), "mp": ("op", "-+"), "bmod": ("op", "mod"), "mod": ("op", "mod"),
    "cup": ("op", "cup"), "bigcup": ("op", "cup"), "cap": ("op", "cap"), "setminus": ("op", "setminus"),
    "backslash": ("op", "setminus"), "smallsetminus": ("op", "setminus"),
    "le": ("rel", "<="), "leq": ("rel", "<="), "leqslant": ("rel", "<="), "ge": ("rel", ">="), "geq": ("rel", ">="),
    "geqslant": ("rel", ">="), "lt": ("rel", "<"), "gt": ("rel", ">"), "ne": ("rel", "!="), "neq": ("rel", "!="),
    "approx": ("rel", "~"), "simeq": ("rel", "~"), "doteq": ("rel", "~"), "sim": ("rel", "~"), "in": ("rel", "in"),
    "Rightarrow": ("rel", "=>"), "implies": ("rel", "=>"), "iff": ("rel", "=>"), "to": ("rel", "->"),
    "equiv": ("rel", "=="), "lor": ("sep", "or"), "vee": ("sep", "or"), "land": ("sep", "and"),
    "wedge": ("sep", "and"), "mid": ("bar", "mid"), "vert": ("bar", "|"), "lvert": ("open", "|"),
    "rvert": ("close", "|"), "lbrace": ("open", "\\{"), "rbrace": ("close", "\\}"), "langle": ("open", "<"),
    "rangle": ("close", ">"), "lfloor": ("open", "floor"), "rfloor": ("close", "floor"), "lceil": ("open", "ceil"),
    "rceil": ("close", "ceil"), "lbrack": ("open", "["), "rbrack": ("close", "]"), "infty": ("const", "infinity"),
    "pi": ("const", "pi"), "emptyset": ("const", "empty"), "varnothing": ("const", "empty"),
    "degree": ("postfix", "deg"),
    "prime": ("op", "'"), "lparen": ("open", "("), "rparen": ("close", ")"), "colon": ("op", ":"),
    "euro": ("text", "€"), "pounds": ("text", "£"),
}  # fmt: skip
_ESCAPES = {
    "\\{": ("open", "\\{"), "\\}": ("close", "\\}"), "\\%": ("postfix", "%"), "\\|": ("bar", "||"),
    "\\$": ("text", "$"), "\\#": ("other", "#"), "\\&": ("other", "&"),
}  # fmt: skip
_KINDS = {"open": "([{", "close": ")]}", "op": "+-*/^_!':&", "sep": ",", "bar": "|", "postfix": "%", "text": "€£¥₹$¢"}
_CHARACTERS = {";": ("sep", ","), **{sign: (kind, sign) for kind, signs in _KINDS.items() for sign in signs}}
_MASTER = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<repeating>\d*\.\d*\\(?:overline|bar|dot)\s*\{?\d+\}?)"
    r"|(?P<grouped>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?)"
    r"|(?P<number>(?:\d{1,3}(?:\x01\d{3})+(?!\d)|\d+)(?:\.(?!\.)\d*)?|\.\d+)"
    r"|(?P<text>\\(?:text(?:bf|rm|it|sf|tt|normal)?|mathrm|mathsf|mbox|operatorname\*?|hbox|textup|mathtt)\s*\{[^{}]*\})"
    r"|(?P<begin>\\begin\s*\{[a-zA-Z]+\*?\}(?:\{[lcr| ]*\})?)|(?P<end>\\end\s*\{[a-zA-Z]+\*?\})"
    r"|(?P<row>\\\\(?:\[[^\]]*\])?)"
    r"|(?P<command>\\[a-zA-Z]+)|(?P<escape>\\.)"
    r"|(?P<letters>[A-Za-z]+)|(?P<relation><=|>=|!=|=>|->|==|[=<>~])|(?P<power>\*\*)|(?P<other>.)",
    re.DOTALL,
)
Add = Callable[[str, str], None]
"""Appends a token of a kind with its text."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token: its kind, its text, whether a space came before it, and where it starts."""

    kind: str
    text: str
    spaced: bool
    start: int


def tokenize(text: str) -> list[Token]:
    """Return the tokens of a cleaned answer, the last of kind `end`.

    Raises:
        UnreadableError: If there are too many, a number has too many digits, or a character is not known.
    """
    tokens: list[Token] = []
    spaced, depth, position = False, 0, 0

    def add(kind: str, value: str) -> None:
        nonlocal spaced
        tokens.append(Token(kind, value, spaced, position))
        spaced = False

    while position < len(text):
        match = _MASTER.match(text, position)
        assert match is not None
        kind, value = match.lastgroup, match[0]
        end = match.end()
        if kind == "space":
            spaced = True
        elif kind == "grouped":
            if depth:
                end = position + value.index(",")
                value = text[position:end]
            add("number", value.replace(",", ""))
        elif kind in ("number", "repeating"):
            add(kind, value.replace(THOUSANDS, ""))
        elif kind == "text":
            _add_text(value[value.index("{") + 1 : -1], value, add)
        elif kind == "command":
            _add_command(value[1:], add)
        elif kind == "escape":
            _add_known(value, _ESCAPES, add)
            depth += (value == "\\{") - (value == "\\}")
        elif kind == "letters":
            _add_letters(value, add)
        elif kind == "relation":
            add("rel", {"~": "~", "==": "="}.get(value, value))
        elif kind == "power":
            add("op", "^")
        elif kind == "other":
            _add_known(value, _CHARACTERS, add)
            depth += (value in "([") - (value in ")]")
        elif kind is not None:
            add(kind, value)
        position = end
        if len(tokens) > MAX_TOKENS or len(value) > MAX_DIGITS:
            raise UnreadableError("too long")
    add("end", "")
    return tokens


def _add_text(content: str, source: str, add: Add) -> None:
    r"""Add `\text{…}` or `\mathrm{…}`: a connective, a function, a constant, or words."""
    word = content.strip()
    lower = word.lower()
    if not word:
        return
    if lower.strip(" ,.;") in ("or", "and", "and/or"):
        add("sep", "or" if lower.startswith("or") else "and")
    elif not source.startswith((r"\text", r"\mbox", r"\hbox")) and word in ("e", "i"):
        add("const", word)
    elif not source.startswith((r"\text", r"\mbox", r"\hbox")) and word in FUNCTIONS:
        add("function", FUNCTIONS[word])
    elif source.startswith(r"\operatorname") and len(word) == 1:
        add("symbol", word)
    elif re.fullmatch(r"[-+]?\d+(?:\.\d+)?", word):
        add("number", word) if word[0].isdigit() else add("text", content)
    else:
        add("text", content)


def _add_command(name: str, add: Add) -> None:
    """Add a LaTeX command."""
    if name in _COMMANDS:
        add(*_COMMANDS[name])
    elif name in FUNCTIONS and name not in ("sqrt", "binom"):
        add("function", FUNCTIONS[name])
    elif name in ("dbinom", "tbinom", "choose"):
        add("command", "binom")
    elif name.startswith("var") and name[3:] in _PLAIN_GREEK:
        add("symbol", name[3:])
    else:
        add("command", name)


def _add_known(sign: str, known: Mapping[str, tuple[str, str]], add: Add) -> None:
    """Add a sign; UnreadableError if it is not known."""
    if sign not in known:
        raise UnreadableError(sign)
    add(*known[sign])


def _add_letters(run: str, add: Add) -> None:
    """Add a run of letters: a name that is known, or variables one by one."""
    if run in FUNCTIONS:
        add("function", FUNCTIONS[run]) if run not in ("sqrt", "binom") else add("command", run)
    elif run.lower() in _PLAIN_CONSTANTS and len(run) > 1:
        add("const", _PLAIN_CONSTANTS[run.lower()])
    elif run in _PLAIN_GREEK:
        add("symbol", run)
    elif run in ("or", "and"):
        add("sep", run)
    elif run == "mod":
        add("op", "mod")
    else:
        for name in ("sqrt", "sin", "cos", "tan", "ln", "log", "exp", "pi"):
            before, found, after = run.partition(name)
            if found and len(before) <= 1 and len(after) <= 1:
                for part in (before, found, after):
                    if part:
                        _add_letters(part, add)
                return
        for letter in run:
            add("const", letter) if letter in "ei" else add("symbol", letter)
