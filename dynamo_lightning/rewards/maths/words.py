r"""Answers in words: names, options of a question, yes and no.

Letters are case-sensitive variables, but words are not case-sensitive: `\text{Odd}` is `odd`.
"""

from __future__ import annotations

import re

from dynamo_lightning.rewards.maths.nodes import Node, Product, Symbol, Text

_ARTICLES = re.compile(r"^(?:the|a|an)\s+", re.IGNORECASE)
_OPTION = re.compile(r"^\(?([A-H])\)\s*|^([A-H])[.:]\s+")
_SHORT_WORDS = frozenset("yes no odd even one two six ten red none all not day may mon tue wed thu fri sat sun".split())
_WORDS = re.compile(r"[A-Za-z][A-Za-z'’-]*(?: [A-Za-z][A-Za-z'’-]*){0,5}")


def read_words(text: str) -> Text | None:
    r"""Return a whole answer that is plain words without `\text`; None if it is rather a product of variables."""
    if not _WORDS.fullmatch(text) or len(text) > 60:
        return None
    words = text.split()
    if len(words) == 1:
        word = words[0]
        long = len(word) >= 4 and bool(re.search(r"[aeiouyAEIOUY]", word)) and (word.islower() or word.istitle())
        return Text(text) if long or word.lower() in _SHORT_WORDS else None
    return Text(text) if all(len(word) > 1 for word in words) and len(words[0]) > 1 else None


def words_equal(first: Node, second: Node) -> bool:
    """Two answers in words are the same, except for case, punctuation, brackets and articles."""
    one, other = _words_of(first), _words_of(second)
    if one is None or other is None:
        return False
    if len(one) == 1 or len(other) == 1:
        return one == other or (_option(other) == one != "") or (_option(one) == other != "")
    return _without_plurals(one) == _without_plurals(other) != ""


def _option(words: str) -> str | None:
    """The letter of `(C) 42` or `C. 42`; None if there is none or a second one."""
    match = _OPTION.match(words)
    return None if match is None or re.search(r"\([A-H]\)|\b[A-H]\b", words[match.end() :]) else match[1] or match[2]


def _without_plurals(words: str) -> str:
    return re.sub(r"(?<=[a-z]{3})s\b", "", words.lower())


def is_name(node: Node) -> bool:
    """Capital letters alone, such as ABC: points, options or an order rather than factors."""
    return isinstance(node, Product) and all(
        isinstance(factor, Symbol) and len(factor.name) == 1 and factor.name.isupper() for factor in node.factors
    )


def _words_of(node: Node) -> str | None:
    """The words of an answer; letters side by side are one word."""
    if isinstance(node, Text):
        text = _ARTICLES.sub("", re.sub(r"[\s~]+", " ", node.text).strip(" .,:;!()[]\"'"))
        return re.sub(r"\s*-\s*", "-", text)
    if isinstance(node, Symbol) and len(node.name) == 1:
        return node.name
    if isinstance(node, Product) and all(isinstance(f, Symbol) and len(f.name) == 1 for f in node.factors):
        return "".join(factor.name for factor in node.factors if isinstance(factor, Symbol))
    return None
