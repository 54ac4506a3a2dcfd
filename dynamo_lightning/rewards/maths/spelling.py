r"""One spelling for what is written in several: Unicode mathematics, spaces, delimiters, fonts.

`clean` prepares text for the parser and keeps its meaning; `spell` goes further, to compare texts and count votes.
"""

from __future__ import annotations

import re
import unicodedata

THOUSANDS = "\x01"  # between groups of three digits where the writer cannot have meant a list
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢₓ", "0123456789+-nix")
_VULGAR_FRACTIONS = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5),
    "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8), "⅐": (1, 7),
    "⅑": (1, 9), "⅒": (1, 10),
}  # fmt: skip
_GREEK = dict(
    zip(
        "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩϕϵ",
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
        "omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega phi epsilon".split(),
        strict=True,
    )
)
_SIGNS = {
    **{sign: "-" for sign in "−–‐‑﹣－"},
    **{sign: r" \cdot " for sign in "×⋅·∙•✕✖"},
    "÷": "/", "∕": "/", "⁄": "/", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] ", "∞": r"\infty ",
    "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≃": r"\approx ",
    "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "∅": r"\emptyset ", "ø": r"\emptyset ",
    "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "º": r"^\circ ", "′": "'", "’": "'", "ℝ": r"\mathbb{R} ",
    "ℤ": r"\mathbb{Z} ", "ℕ": r"\mathbb{N} ", "∨": r"\lor ", "∧": r"\land ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle ", "∣": "|", "ℯ": "e", "ℏ": r"\hbar ",
    "∘": r"\circ ", "，": ",", "、": ",", "（": "(", "）": ")", "：": ":", "∶": ":", "；": ";", "％": "%", "。": ".",
    "\u200b": "", "\ufeff": "", "\u2061": "", "\u2062": "", "\u2063": ",",
    **{letter: rf"\{name} " for letter, name in _GREEK.items()},
}  # fmt: skip
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")

_REMOVED = re.compile(
    r"\\(?:left|right|middle)\s*\.(?!\d)|\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits"
    r"|mathstrut|nolimits|bf|rm|it|boldmath)(?![a-zA-Z])|(?<!\\)\\!|\\[hv]space\*?\{[^{}]*\}"
)
_SPACE = re.compile(
    r"(?<!\\)\\[,;:> ]|\\(?:q?quad|enspace|thinspace|medspace|thickspace|space)(?![a-zA-Z])|(?<!\\)~|\s+"
)
_DELIMITER = re.compile(r"(?<!\\)\$|(?<!\\)\\[()\[\]]")
_GROUPED_BY_SPACE = re.compile(r"(?<![\d.,^_/\x01}])(?<![\d/^_] )\d{1,3}(?: \d{3})+(?!\s*[/\d])")
_GROUPED_BY_BRACES = re.compile(
    r"(?<=\d)\{,\}(?=\d{3}(?!\d))|(?<=\d),\s?\\!\s?(?=\d{3}(?!\d))|(?<=\d)\\,(?=\d{3}(?!\d))"
)
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([+-]?\d{1,9})(?![\w.])")
_FRACTION_COMMAND = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_ENDING = re.compile(r"(?:[\s.,;:]|\\\\|\\(?:blacksquare|square|qed|Box|checkmark)(?![a-zA-Z]))+$")
_ORDINAL = re.compile(r"(?<=\d)\s*(?:\^\s*)?\{?(?:\\(?:text|mathrm)\s*\{)?(?:st|nd|rd|th)\}{0,2}$")
_INFIX_COMMAND = re.compile(r"\{((?:[^{}]|\{[^{}]*\})*)\\(over|choose)(?![a-zA-Z])((?:[^{}]|\{[^{}]*\})*)\}")
_COLOR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}")
_BASED = re.compile(r"^\((\d+)\)(?=_)")
_OHMS = re.compile(r"(?<=\d)\s*\\Omega$")
_EMPHASIS = re.compile(r"^(\*\*|__|\*|`)(.+)\1$", re.DOTALL)

_TEXT = re.compile(r"\\(?:text(?:bf|rm|it|sf|tt|normal)?|mathrm|mathbf|mathsf|mbox|operatorname)\s*\{([^{}]*)\}")
_BRACED_TOKEN = re.compile(r"(?<=[\^_])\{(\w|\\[a-zA-Z]+)\}")
_SPACES_THAT_SEPARATE = re.compile(r"(?<=[0-9.])\s+(?=[0-9.])")  # 3 7 is not 37


def to_ascii(text: str) -> str:
    """Return text with Unicode mathematics written in LaTeX; other characters stay as they are."""
    if text.isascii():
        return text
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢₓ]+", lambda match: f"_{{{match[0].translate(_SUBSCRIPTS)}}}", text)
    text = re.sub(r"√\s*\(", r"\\sqrt(", text)
    text = re.sub(r"\d(?=[½-¾⅐-⅞⅒])", lambda match: match[0] + " ", text)
    return _NOT_ASCII.sub(_replace_character, text)


def _replace_character(match: re.Match[str]) -> str:
    """Return the ASCII for one character, or the character."""
    character = match[0]
    if character in _SIGNS:
        return _SIGNS[character]
    if character in _VULGAR_FRACTIONS:
        numerator, denominator = _VULGAR_FRACTIONS[character]
        return rf"\frac{{{numerator}}}{{{denominator}}}"
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    compatible = unicodedata.normalize("NFKC", character)
    return compatible if compatible.isascii() else _SIGNS.get(compatible, character)


def clean(answer: str) -> str:
    """Return an answer without what carries no meaning, its thousands marked, ready to be tokenized."""
    text = to_ascii(answer).strip()
    emphasized = _EMPHASIS.match(text)
    if emphasized:
        text = emphasized[2]
    text = _GROUPED_BY_BRACES.sub(THOUSANDS, text)
    text = re.sub(r"(?<!\\)\$\s*,\s*\$", ", ", text)  # $100$,$200$ is a list
    text = _DELIMITER.sub("", text)
    text = _COLOR.sub("", _REMOVED.sub("", text))
    if "\\over" in text or "\\choose" in text:
        text = _INFIX_COMMAND.sub(_prefix_command, text)
        text = _INFIX_COMMAND.sub(_prefix_command, f"{{{text}}}")
    text = _SPACE.sub(" ", text)
    text = _GROUPED_BY_SPACE.sub(lambda match: match[0].replace(" ", THOUSANDS), text)
    text = _BASED.sub(r"\1", _OHMS.sub(r"\\text{ ohm}", _ORDINAL.sub("", _ENDING.sub("", text.strip()))))
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    return _FRACTION_COMMAND.sub(r"\\frac", text)


def _prefix_command(match: re.Match[str]) -> str:
    r"""Return `{a \over b}` as `\frac{a}{b}`, and `{n \choose k}` as a binomial coefficient."""
    return rf"\{'frac' if match[2] == 'over' else 'binom'}{{{match[1]}}}{{{match[3]}}}"


def spell(answer: str) -> str:
    r"""Return an answer in one of its spellings: no idle spaces, no `\left`, no `\text{…}`, no thousands separators.

    Equal texts are equal answers, but different ones may be equal too.
    """
    text = _TEXT.sub(r"\1", clean(answer))
    text = _SPACES_THAT_SEPARATE.sub("\x02", text.strip())
    text = re.sub(r"\s+", "", text).replace("\x02", " ")
    text = _BRACED_TOKEN.sub(r"\1", text)
    if re.fullmatch(r"[-+]?(?:\\?\$)?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return text.replace(THOUSANDS, "").removeprefix(r"\$")
