"""Denials of an answer by the sentence around it: before it (`not 42`) and behind it (`42 is wrong`).

The phrases are English. They are looked for close to the answer only, so that a solution that discusses other values
does not deny its own.
"""

from __future__ import annotations

import re

from dynamo_lightning.rewards.maths.spelling import spell

_WINDOW_BEFORE, _WINDOW_BEHIND = 120, 400


def _any_of(phrases: str) -> str:
    """A pattern for any of these phrases; a space stands for any space."""
    return "(?:" + phrases.replace(" ", r"\s+") + ")"


_ADVERBS = _any_of(
    "clearly|obviously|definitely|certainly|actually|also|of course|simply|just|probably|likely|surely|"
    "however|all|a|an|the|too|to be|really|indeed|in fact"
)
_WRONG = _any_of(
    "wrong|incorrect|false|mistaken|a mistake|an error|invalid|erroneous|rejected|ruled out|refuted|"
    "impossible|off|nonsense|absurd|extraneous"
)

_CLAUSE_END = re.compile(
    r"[.!?;\n](?=\s|$)|,|:(?!\s*$)|\b"
    + _any_of(
        "so|therefore|thus|hence|but|then|instead|we get|we have|which gives|giving|it is|it's|answer is|"
        "equals|because|since|and"
    )
    + r"\b(?!\s+(?:not|never|wrong|incorrect|(?:definitely|certainly) not))",
    re.IGNORECASE,
)
_IDLE = _any_of(
    "be|been|equals?|equaled|to|the|an?|answer|value|result|number|solution|is|it|that|this|final|"
    "right|correct|just|simply|really|actually|at|all|as|true|case|say|give|given|write|claim|"
    "definitely|certainly|possibly|necessarily|believe|think"
)
_OPENING = r"(?:\s|\$|\\\(|\\\[|\\left|\(|\[|\*|:|\"|'|`|=|~)"
_NEGATION = _any_of(
    r"\bnot\b|n['’]t\b|\bnever\b|\bcannot\b|\bneither\b|\bnor\b|\brather than\b|\binstead of\b|"
    r"\bother than\b|\bexcept(?: for)?\b|\bexclud(?:e|es|ing)\b|\bfar from\b|\banything but\b|≠|"
    r"\\neq?\b|!=|\bdoubt\b|\bdeny\b|\breject\b|\brul(?:e|es|ed|ing) out\b|\bdiscard(?:s|ed|ing)?\b"
)
_NEGATED = re.compile(rf"{_NEGATION}{_OPENING}*(?:{_IDLE}\b{_OPENING}*){{0,8}}$", re.IGNORECASE)
_CALLED_WRONG = re.compile(
    r"\b(?:wrong|incorrect|false|mistaken|invalid|erroneous|bad|rejected|discarded|refuted|ruled out|impossible)\b"
    r"(?:\W+[\w']+){0,6}\W*$",
    re.IGNORECASE,
)
_BOUND = _any_of(
    r"\bat (?:least|most)|"
    r"\b(?:more|less|greater|larger|smaller|fewer|higher|lower|bigger) than(?: or equal to)?|"
    r"\bno (?:more|less) than|\babout|\baround|\bapproximately|\broughly|\bnearly|\balmost|\bover|"
    r"\bunder|\babove|\bbelow|\bbetween|\bclose to|\bup to|\bexceeds?|\bwithin|\bapprox\.?|\bcirca|"
    r"\bnear|[<>≤≥≈±~]|\\(?:leq?|geq?|lt|gt|approx|pm|sim|leqslant|geqslant)"
)
_BOUNDED = re.compile(rf"{_BOUND}{_OPENING}*(?:{_IDLE}\b{_OPENING}*){{0,3}}$", re.IGNORECASE)
_DOUBTED = re.compile(
    r"\b"
    + _any_of("maybe|perhaps|possibly|might be|may be|could be|i guess|guess(?:ing)?|either")
    + r"\b[^.!?\n]*$|\b(?:candidates?|not sure)\b[^.!?\n]*$",
    re.IGNORECASE,
)

_CLOSING = r"(?:\s|\$|\\\)|\\\]|\)|\]|\*|\"|'|`|,|\}|-|–|—|\.)*"
_COPULA = _any_of(
    "is|are|was|were|would be|seems?|looks?|must be|has to be|turns out(?: to be)?|cannot be|can't be|will be"
)
_DENIED = re.compile(
    rf"^{_CLOSING}(?:"
    rf"{_COPULA}\s+(?:{_ADVERBS}\s+)*(?:{_WRONG}|not|never|n't|high|low|large|small|big|bad|no longer|trap|decoy)\b"
    r"|(?:isn['’]t|wasn['’]t|aren['’]t|doesn['’]t|does not|did not|didn['’]t|"
    r"cannot|can['’]t|can not|won['’]t|fails?|failed|"
    r"contradicts?)\b"
    r"|\((?:wrong|incorrect|not|no\b|false|rejected)"
    r"|(?:wrong|incorrect|false|no|nope|rejected)\b)",
    re.IGNORECASE,
)
_IT = _any_of("that|this|it|which|above|answer|result|value|box|boxed (?:answer|value)|number|i|we|solution")
_TAKEN_BACK = re.compile(
    r"\b"
    + _any_of(
        r"wait|oops|whoops|scratch that|on second thoughts?|correction|hmm|never ?mind|disregard|retract\w*|"
        "strike that|my mistake|(?:just )?(?:kidding|joking)|"
        r"but (?:it|the answer|this) (?:is|was) (?:not\b|-?\d|\$|\\)|"
        r"i (?:have )?made an? (?:\w+ )?(?:mistake|error|slip)|"
        "let me (?:redo|recheck|reconsider|correct|try again|fix)|ignore (?:that|this|the|it|my)|"
        rf"{_IT}(?: {_COPULA}|['’]s) (?:{_ADVERBS} )*(?:{_WRONG}|not)\b|"
        rf"{_IT} (?:contradict\w*|(?:does not|doesn['’]t) (?:work|hold|fit|satisfy))|"
        r"(?:isn['’]t|is not|cannot be|can['’]t be|was not|wasn['’]t) (?:the |a |an )?"
        r"(?:right|correct|true|final|real|actual|answer|it\b)|"
        "not the (?:right |correct |final |real |actual )?(?:answer|result|value|solution)|"
        "(?:the|a) (?:wrong|incorrect|false) (?:answer|result|value|solution)|"
        "(?:i|we) (?:reject|withdraw|discard|rule out|take (?:it|that) back|doubt|am not sure|am unsure)|"
        "(?:i|we) (?:don['’]t|do not) think|(?:i|we) (?:was|am|were|are) (?:wrong|mistaken)|"
        "(?:should|must) (?:have been|actually|really|instead|rather|in fact)|"
        "(?:but|or) (?:maybe|perhaps|possibly|actually|rather|is it|i think|could|might|it (?:could|might|may))|"
        r"(?:could|might|may) (?:also )?be\b(?! \w+ed\b| seen| written| shown| found)|"
        r"or (?:else |even )?(?:\$|\\\(|-?\d)|(?:no|nope)\s*[,.!:;—-]|"
        "not (?:sure|certain|confident|correct|right)|unsure|(?:just|is|only) a guess|"
        "(?:rather|instead|in fact|actually),? (?:it|the)"
    ),
    re.IGNORECASE,
)
_HARMLESS = re.compile(
    r"i hope (?:it|this) is correct|not (?:equal to )?(?:0|zero)\b|no other|no more|without|"
    r"if (?:i['’]m|i am|it is|this is|that is) (?:wrong|incorrect)",
    re.IGNORECASE,
)


_VALUE_CALLED_WRONG = re.compile(
    rf"([^\s,;:]+?)\s+{_COPULA}\s+(?:{_ADVERBS}\s+)*"
    rf"(?:{_WRONG}|not (?:right|correct|true|it|(?:the|an?) (?:answer|solution))|discarded|excluded|invalid)"
    rf"[\s,;:.!—–-]*(?:(?:{_IDLE}|so|thus|hence|therefore)\b{_OPENING}*){{0,6}}{_OPENING}*$",
    re.IGNORECASE,
)
_UNTRUE = re.compile(
    r"\b(?:nobody|no one|"
    r"(?:one|you|some|many|people|someone) (?:might|may|could|would) (?:\w+ ){0,3}(?:think|say|guess|answer)|"
    r"(?:false|wrong|incorrect|untrue|not true|mistaken)\s+(?:that|to (?:say|claim|think|answer)))\b[^.!?\n]*$",
    re.IGNORECASE,
)


def is_denied_before(before: str, bounds: bool = False) -> bool:
    """Return whether the text before an answer denies it; with `bounds`, also whether it only bounds or guesses it."""
    window = before[-_WINDOW_BEFORE:]
    clause = window
    for end in _CLAUSE_END.finditer(window):
        clause = window[end.end() :]
    if _NEGATED.search(window) or _CALLED_WRONG.search(clause) or _UNTRUE.search(window):
        return True
    line = window.rstrip("\n").rsplit("\n", 1)[-1]  # "8 are left over\nA: 8" bounds nothing
    return bounds and bool(_BOUNDED.search(line) or _DOUBTED.search(line))


def is_called_wrong(before: str, answer: str) -> bool:
    """Return whether the words before an answer call the same value wrong: `42 is rejected, 42`.

    Another value there is one that a solution discards (`x = -1 is rejected, so 42`).
    """
    called = _VALUE_CALLED_WRONG.search(before[-_WINDOW_BEFORE:])
    return called is not None and spell(called[1].strip("$*()")) == spell(answer[:_WINDOW_BEFORE]) != ""


def is_denied_behind(behind: str) -> bool:
    """Return whether the text behind an answer says that it is wrong, doubts it, or takes it back."""
    window = _HARMLESS.sub(" ", behind[:_WINDOW_BEHIND])
    return bool(_DENIED.search(window) or _TAKEN_BACK.search(window))
