"""The language of code and documentation: words that were replaced stay out, docstrings are noun phrases."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dynamo_lightning", "callbacks")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md", "configs/**/*")

WORDS = {
    r"learnt": "learned, or trained on",
    r"teach(es|ing)?|taught": "has a learning signal",
    r"spare": "filler, remainder",
    r"hand(s|ed|ing)? out|share(s|d)? out|sharing out": "allocate",
    r"settles? ties": "break ties",
    r"hostile": "untrusted",
    r"scoring pass": "log-probability pass: a score is a reward's",
    r"take_away|bring_back": "offload, restore",
    r"separate_engine\b(?!`)": "uses_external_engine",
}
"""Regular expression → words to use instead."""

ALLOWED = {
    ("dynamo_lightning/engines/engine.py", "separate_engine"),  # the name of 0.1, which still works
    ("docs/renamed.md", "separate_engine"),
}


def sources():
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    if not files or not (ROOT / "docs").exists():
        pytest.skip("sources and documentation do not come with an installed package")
    return files


def pages():
    return [path for pattern in PAGES for path in sorted(ROOT.glob(pattern)) if path.suffix in (".md", ".yaml")]


def replaced_words(text, name):
    """Lines with a word that has a better one."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, better in WORDS.items():
            match = re.search(rf"(?<![\w-])(?:{pattern})(?![\w-])", line, re.IGNORECASE)
            if match and (name, match.group()) not in ALLOWED:
                found.append(f"{name}:{number}: {match.group()!r} (rather: {better})")
    return found


def test_words_that_were_replaced_stay_out():
    paths = [*sources(), *pages()]
    assert [hit for path in paths for hit in replaced_words(path.read_text(), path.relative_to(ROOT).as_posix())] == []


def docstrings(path):
    """Line and first line of each docstring, those of attributes included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip().partition("\n")[0]


def test_docstrings_are_noun_phrases():
    openings = re.compile(r"(Whether|What|Of)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for path in sources()
        for number, line in docstrings(path)
        if openings.match(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("rollouts are handed out", True), ("what was learnt", True), ("It is recommended", False),
        ("a Teaching group", True), ("num_teaching", False), ("the spare rollout", True), ("transparent", False),
    ],
)  # fmt: skip
def test_the_search_finds_words_and_not_parts_of_words(text, caught):
    assert bool(replaced_words(text, "page")) == caught
