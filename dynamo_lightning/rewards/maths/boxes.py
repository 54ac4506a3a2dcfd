r"""Boxes of a response: `\boxed{…}`, `\fbox{…}`, and which of them is the final answer.

The last box counts, with three exceptions. Boxes side by side, or joined by "or", are one list of candidates. A box
that the sentence denies (`it cannot be \boxed{42}`) is none. A box that the text behind it takes back is wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dynamo_lightning.rewards.maths.spelling import spell

_TOKENS = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_SHORT_BOX = re.compile(r"\\boxed\s*(?=([A-Za-z0-9]))(\d+(?:\.\d+)?|[A-Za-z])(?![A-Za-z{])")
MAX_DIFFERENT_BOXES = 6

_WORDS = re.compile(r"[a-z]+(?:'[a-z]+)?", re.IGNORECASE)
_HEDGES = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|might|may be|could|alternatively|either|another|otherwise|else|candidates?|guess|"
    r"unsure|also|not sure|possible|possibility|option|options|hedge|likely|if not)\b",
    re.IGNORECASE,
)
_CONCLUSIONS = re.compile(
    r"\b(?:therefore|thus|hence|so|final|finally|conclude|conclusion|correct|correction|corrected|instead|actually|wait|"
    r"fails?|failed|wrong|incorrect|mistake|error|however|but|answer|total|result|now|then|next|step|part|since|because|"
    r"simplif\w+|comput\w+|calculat\w+|subtract\w*|add\w*|multipl\w+|divid\w+|gives?|yields?|sum|substitut\w+)\b",
    re.IGNORECASE,
)
_CASES = re.compile(r"[\s$.,;)\]\\]*(?:(?:and|but|while)\s+)?(?:if|when|for)\b[^.]{0,40}$", re.IGNORECASE)
_EQUALS = re.compile(r"[\s$]*=[\s$]*")
_LIST_WORDS = frozenset("and or the is are it be x y also either".split())


@dataclass(frozen=True, slots=True)
class Box:
    """A box: its content, where it starts and ends in the text."""

    content: str
    start: int
    end: int


def find_boxes(text: str) -> list[Box]:
    r"""Return the complete boxes in the order of their starts, without those that contain another.

    One pass with a stack of open braces, so that text made of open boxes costs no more than any other.
    """
    open_braces: list[tuple[int, int]] = []  # where the content starts, and where its box does (-1: a plain brace)
    boxes: list[Box] = []
    for token in _TOKENS.finditer(text):
        if len(token[0]) > 2 and token[0].startswith("\\"):
            open_braces.append((token.end(), token.start()))
        elif token[0] == "{":
            open_braces.append((token.end(), -1))
        elif token[0] == "}" and open_braces:
            content_start, box_start = open_braces.pop()
            if box_start >= 0 and not (boxes and boxes[-1].start > box_start):
                boxes.append(Box(text[content_start : token.start()], box_start, token.end()))
    if not boxes and "\\boxed" in text:
        boxes = [Box(match[2], match.start(), match.end()) for match in _SHORT_BOX.finditer(text)]
    return boxes


def last_boxed(text: str) -> str | None:
    r"""Return the content of the `\boxed{…}` that starts last among the complete ones, None if there is none."""
    boxes = find_boxes(text)
    return boxes[-1].content if boxes else None


def candidates(text: str, boxes: list[Box]) -> list[str] | None:
    """Return the contents of the last box and of the alternatives beside it; None if there are too many.

    One content is an answer; several are a list, which equals a reference that lists the same.
    """
    contents = [boxes[-1].content]
    if not contents[0].strip():
        return None
    for index in range(len(boxes) - 1, 0, -1):
        between = text[boxes[index - 1].end : boxes[index].start]
        if _EQUALS.fullmatch(between) or not are_alternatives(between):
            break
        contents.insert(0, boxes[index - 1].content)
        if len(contents) > 40:
            return None
    different = {spell(box.content[:200]) for box in boxes[-200:]}
    if len(different) > MAX_DIFFERENT_BOXES and len(contents) < len(different):
        return None
    spellings: dict[str, str] = {}
    for content in contents:
        spellings.setdefault(spell(content[:200]), content)
    return list(spellings.values())


_GOES_ON = re.compile(
    r"^(?:[0-9(]|[A-Za-z](?![A-Za-z]))|^\s*(?:[+/^]\s*[\d\\({a-z]|\*(?!\*)\s*\d|\\(?:cdot|times|div|pm)\b|[-−]\s*\d)"
)
_WENT_BEFORE = re.compile(
    r"(?:\d|[-−+/^]|[\d)}]\s*(?:[+/^]|\*(?!\*))\s*|\\(?:cdot|times|div|pm)\s*|\\sqrt\s*\{\s*|\}\s*\{\s*)$"
)


def set_equal(text: str, boxes: list[Box]) -> list[str]:
    r"""Return the contents of the boxes that an equation sets equal to the last, as in `\boxed{42} = \boxed{42.0}`."""
    equal: list[str] = []
    for first, second in zip(reversed(boxes[:-1]), reversed(boxes), strict=False):
        if len(equal) >= MAX_DIFFERENT_BOXES or not _EQUALS.fullmatch(text[first.end : second.start]):
            break
        equal.append(first.content)
    return equal


def is_part_of_formula(before: str, behind: str) -> bool:
    r"""Return whether a box is a part of a larger formula, as in `2\boxed{42}` or `\boxed{42} + 1`."""
    return bool(_GOES_ON.match(behind[:20]) or _WENT_BEFORE.search(before[-20:]))


def are_alternatives(between: str) -> bool:
    """The text between two boxes or numbers only lists them, or says "or", without a step or a conclusion."""
    if len(between) > 300:
        return False
    words = _WORDS.findall(re.sub(r"\\[a-zA-Z]+", " ", between))
    if all(word.lower() in _LIST_WORDS for word in words):
        return True
    if _CASES.match(between):
        return True
    hedges = list(_HEDGES.finditer(between))
    conclusions = list(_CONCLUSIONS.finditer(between))
    if hedges:
        return not conclusions or conclusions[-1].start() < hedges[-1].start()
    return not conclusions and len(words) < 4
