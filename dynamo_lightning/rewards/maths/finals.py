r"""The final answer of a response.

In this order: only what follows `</think>`; within it the last `<answer>…</answer>`; within that the last box; without
a box the last statement `the answer is …`, `Answer: …` or `#### …`; without one the last formula or number. What the
text denies, doubts or offers as one of several candidates is no answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from dynamo_lightning.rewards.maths.boxes import are_alternatives, candidates, find_boxes, is_part_of_formula, set_equal
from dynamo_lightning.rewards.maths.denial import is_called_wrong, is_denied_before, is_denied_behind
from dynamo_lightning.rewards.maths.nodes import Text
from dynamo_lightning.rewards.maths.reading import read

UNBOXED_CHARACTERS = 500  # of a response without a box, searched for an answer
_THINK_OPEN = ("<think>", "<thinking>", "<thought>", "<reasoning>", "[think]", "◁think▷")
_THINK_CLOSE = ("</think>", "</thinking>", "</thought>", "</reasoning>", "[/think]", "◁/think▷")
_ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_DOLLAR = re.compile(r"(?<!\\)\$")
_BOLD = re.compile(r"(?<![\w*)])(\*\*|__)(?=\S)([^*\n]{1,300}?)(?<=\S)\1(?![\w*(])")
_STATEMENT = re.compile(
    r"(?:\banswer\b[*_`]*(?:\s+(?:to|of|for)\s[^.:\n]{1,80}?)?[*_`]*\s*(?:(?:is|are|would be|will be|must be|"
    r"should be|equals|comes out (?:as|to)|=|:)[*_`\s]*)+|####[ \t]*)",
    re.IGNORECASE,
)
_CUTS = re.compile(
    r"\.(?=\s|$)|[;!?](?=\s|$)|\s+\(|,?\s+(?:because|since|as|which|where|when|so|thus|hence|therefore|while|after|for|given|"
    r"by|if|i hope)\b|,\s+(?=[a-z])|\s+[-–—]\s+(?=[a-z])|</?[a-z|]|\s*[✓✔☑✅]",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_CHUNK = re.compile(
    r"(?:(?:\\[a-zA-Z]+|\\[%$,!]|\b(?:sqrt|pi)\b|[\d.,^*/+\-−–=()\[\]{}√π½⅓⅔¼¾²³%°<>≤≥≠≈±!|×·÷∞€£])[ \t]*)+"
)
_JOINED = re.compile(
    r"(?:\d\S*|\$|\))\s*(?:,?\s*(?:or|and|versus|vs\.?|to)\b|[/;])\s*(?:maybe|perhaps|possibly|even|else|then)?\s*[$*(\[]*$",
    re.IGNORECASE,
)
_ALTERNATIVE_BEHIND = re.compile(
    r"^[\s$*)\].,]*(?:or\b|and (?:also |maybe |perhaps |possibly )?(?:not\b|\$|\d|\\\()|"
    r",\s*(?:\$|\d|maybe|perhaps|possibly|but)|/\s*\d|"
    r"(?:maybe|perhaps|possibly|probably|ish|i guess|i think|at (?:least|most))\b|\?)",
    re.IGNORECASE,
)
_TEXT_COMMAND = re.compile(r"\\(?:text\w*|mathrm|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_PROSE = re.compile(
    r"\b(?!(?:sqrt|sin|cos|tan|cot|sec|csc|log|exp|arcsin|arccos|arctan|gcd|lcm|max|min|inf|infinity|alpha|beta|gamma|"
    r"theta|lambda|omega|and|mod)\b)[A-Za-z]{3,}\b|\b[A-Za-z]{2,} [A-Za-z]{2,}\b"
)
_NUMBERED_LINE = re.compile(r"^\s*(?:\d{1,2}[.)]|[-*•])\s+(?=\S)")
_BARE_NUMBER_LINE = re.compile(r"[-+$*\s]*\d[\d.,/]*[*$.\s]*")


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """The final answer of a response.

    Attributes:
        contents: The answer; several if boxes stand side by side, which makes them a list.
        boxed: It is in a box.
        later: What the text states to be the answer behind the box, or sets equal to it; it must be right, too.
    """

    contents: tuple[str, ...]
    boxed: bool
    later: tuple[str, ...] = field(default=())


def after_thinking(response: str, thinking: bool | None, prompt: str = "") -> str:
    """Return the part of a response that is graded: what follows the reasoning.

    Args:
        response: The response.
        thinking: The response must have closed its reasoning (True), has none (False), or has some where tags say so.
        prompt: Its last word may be an opening tag.
    """
    if thinking is False:
        return response
    closed = _end_of_last(response, _THINK_CLOSE)
    text = response[closed:]
    lowered = text.lower()
    opened = min((place for tag in _THINK_OPEN if (place := lowered.find(tag)) >= 0), default=-1)
    if opened >= 0:  # cut off
        return text[:opened]
    if not closed and (thinking or _end_of_last(prompt[-40:], _THINK_OPEN) > _end_of_last(prompt[-40:], _THINK_CLOSE)):
        return ""
    return text


def _end_of_last(text: str, tags: tuple[str, ...]) -> int:
    """The place behind the last of some tags, 0 if there is none."""
    lowered = text.lower()
    if len(lowered) != len(text):  # a few capital letters have longer small ones
        lowered = text
    return max((place + len(tag) for tag in tags if (place := lowered.rfind(tag)) >= 0), default=0)


def find_final_answer(text: str, require_boxed: bool = False) -> FinalAnswer | None:
    """Return the final answer of the graded part of a response, None if it has none."""
    tags = list(_ANSWER_TAG.finditer(text)) if "<answer>" in text.lower() else []
    if tags:
        if is_denied_behind(text[tags[-1].end() :]):
            return None
        if len(tags) > 1 and tags[-1][1].strip() != tags[-2][1].strip():
            if are_alternatives(text[tags[-2].end() : tags[-1].start()]):
                return None
        text = tags[-1][1]
    boxes = find_boxes(text)
    if boxes:
        before, behind = text[: boxes[-1].start], text[boxes[-1].end :]
        contents = candidates(text, boxes)
        if contents is None or is_part_of_formula(before, behind):
            return None
        if is_denied_before(before) or is_denied_behind(behind):
            return None
        if is_called_wrong(before, contents[-1]):
            return None
        return FinalAnswer(tuple(contents), True, (*_stated_behind(behind), *set_equal(text, boxes)))
    if require_boxed:
        return None
    if tags and read(text):
        return FinalAnswer((text,), boxed=False)
    answer = _unboxed(last_characters(text, UNBOXED_CHARACTERS))
    return None if answer is None else FinalAnswer((answer,), boxed=False)


def last_characters(text: str, number: int) -> str:
    """Return the end of a text, which does not begin within a formula: its closing dollar sign would open another."""
    start = max(0, len(text) - number)
    before = text[text.rfind("\n", 0, start) + 1 : start]  # in one line, as formulas are
    closing = _DOLLAR.search(text, start) if len(_DOLLAR.findall(before)) % 2 else None
    return text[closing.end() if closing else start :]


def _stated_behind(behind: str) -> list[str]:
    """Answers that the text behind a box states."""
    statement = None
    for statement in _STATEMENT.finditer(behind[:UNBOXED_CHARACTERS]):  # noqa: B007
        pass
    if statement is None:
        return []
    stated = _readable_part(behind[statement.end() : statement.end() + UNBOXED_CHARACTERS])
    return [] if stated is None or not re.search(r"\d", stated[0]) else [stated[0]]


def _unboxed(text: str) -> str | None:
    """The answer at the end of a text without a box."""
    text = _BOLD.sub(r"\2", text.replace("***", "**").replace("**!", "**."))  # a full stop, no factorial
    statement = None
    for statement in _STATEMENT.finditer(text):  # noqa: B007
        pass
    if statement is None:
        return _last_formula_or_number(text)
    before = text[: statement.start()]
    if is_denied_before(before) or re.search(
        r"\b(?:or|maybe|perhaps|possibly|doubt)\s+(?:that\s+)?(?:the\s+)?(?:\w+\s+)?$", before, re.I
    ):
        return None
    stated = text[statement.end() :]
    part = _readable_part(stated)
    if part is not None:
        answer, behind = part
        if not re.search(r"\d", answer) and isinstance(read(answer).written, Text) and re.search(r"\d", behind):
            return _last_formula_or_number(text)  # "the answer is the total, which is 42"
        return None if _ALTERNATIVE_BEHIND.match(behind) or is_denied_behind(behind) else answer
    if re.match(r"[-+−(\[{\\$\d]", stated.lstrip()):  # mathematics, but not to be read
        return None
    return _last_formula_or_number(text)


def _readable_part(stated: str) -> tuple[str, str] | None:
    """The longest readable beginning of a statement, up to the end of its line, a sentence or a clause; the rest."""
    stated = stated.lstrip()
    line = stated.split("\n", 1)[0]
    ends = [len(line), *sorted((cut.start() for cut in _CUTS.finditer(line)), reverse=True)]
    formula = _FORMULA.match(stated)
    if formula:
        ends.append(formula.end())
    for end in ends[:1] + ends[1:][-12:]:
        part = stated[:end].strip().rstrip("*_` ")
        if part and is_stated(part):
            return part, stated[end:]
    return None


def is_stated(part: str) -> bool:
    """A part of a sentence that can be read, and not as a product of the letters of English words."""
    readings = read(part)
    if isinstance(readings.written, Text) or readings.with_unit is not None:
        return True
    return bool(readings) and not _PROSE.search(_TEXT_COMMAND.sub(" ", _FORMULA.sub(" ", part)))


def _last_formula_or_number(text: str) -> str | None:
    """The last formula or number of a text, whichever comes later."""
    formula = None
    for formula in _FORMULA.finditer(text):  # noqa: B007
        pass
    start = -1
    if formula is not None:
        content = next(group for group in formula.groups() if group is not None)
        if len(content) <= UNBOXED_CHARACTERS and read(content) and not re.search(r"[a-z]{2,} [a-z]{2,}", content):
            start = formula.start()
    chunk = None
    for match in _CHUNK.finditer(text):
        if re.search(r"\d", match[0]):
            chunk = match
    if formula is not None and start >= 0 and (chunk is None or chunk.start() < formula.end()):
        behind = text[formula.end() :]
        return None if _is_no_answer(text[:start], behind) else content
    return None if chunk is None else _number(text, chunk)


def _number(text: str, chunk: re.Match[str]) -> str | None:
    """The number that a run of mathematical characters is, None if it is part of something else."""
    start, end = chunk.start(), chunk.end()
    line_start = text.rfind("\n", 0, start) + 1
    number = text[start:end]
    if start == line_start or not text[line_start:start].strip():
        bullet = _NUMBERED_LINE.match(number)
        if bullet and bullet.end() < len(number):
            number = number[bullet.end() :]
        lines = text[:line_start].rstrip().rsplit("\n", 1)
        if lines[-1].strip() and _BARE_NUMBER_LINE.fullmatch(lines[-1]):
            return None  # one number on each line
    number = number.strip().rstrip(".,;: ").lstrip(",;:.) ")
    while number.endswith((")", "]", "}")) and _unbalanced(number):
        number = number[:-1].rstrip(".,;: ")
    while number.startswith(("(", "[", "{")) and _unbalanced(number):
        number = number[1:].lstrip()
    before, behind = text[:start], text[end:]
    if re.match(r"[A-Za-z_]", text[end : end + 1]) and not text[end - 1].isspace():
        word = re.match(r"[A-Za-z]+", text[end:])
        if word is None or not read(f"{number} {word[0]}").with_unit:  # 5x, 2nd
            return None
    if (re.match(r"[+*/^·×]|[-−](?=\s)", number) and before.strip()) or re.search(
        r"[A-Za-z]\s*[-+*/^]?\($", before + number[:1]
    ):
        return None
    if _is_no_answer(before, behind) or not read(number):
        return None
    return number


def _unbalanced(text: str) -> bool:
    return any(text.count(opening) != text.count(closing) for opening, closing in ("()", "[]", "{}"))


def _is_no_answer(before: str, behind: str) -> bool:
    """The text around an unboxed answer denies it, bounds it, or lists it among others."""
    return bool(
        is_denied_before(before, bounds=True)
        or _JOINED.search(before[-80:])
        or _ALTERNATIVE_BEHIND.match(behind)
        or is_denied_behind(behind)
    )
