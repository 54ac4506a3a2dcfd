r"""Units of measurement and counted things, in canonical form.

A unit is written in `\text{…}` or, after a number, as plain words. A single letter without `\text` is a variable,
except for the few that a number and a space make unmistakable (`5 m`), and only where a number is expected.
"""

from __future__ import annotations

import re

from dynamo_lightning.rewards.maths.unit_names import KNOWN

_CANONICAL = {word: name for name, words in KNOWN.items() for word in words.split()}
_LOWER = {word.lower(): name for word, name in _CANONICAL.items() if len(word) > 2}
_SINGLE_LETTERS = frozenset("msghLNJWVAK")
_AMBIGUOUS = frozenset("mg ms us in pt pc um ug mi ly t rad min A rs au cal erg".split())
"""Units that a reference without a command for text more likely means as products or functions."""
_IDLE = frozenset(
    "total altogether all each left over remaining more away long old tall wide high deep apart exactly whole full "
    "different possible distinct such only just the a an in".split()
)
_STOP = frozenset(
    "or and not maybe perhaps possibly probably is are was be been if so but because since when where which that this "
    "approximately about around roughly nearly almost guess sure unsure think hundred hundreds thousand thousands "
    "million millions billion billions trillion k plus minus times divided over less than least most greater fewer "
    "between either neither nor no none any some something else other wrong false incorrect incorrectly right correct "
    "true answer answers result final unknown undefined confident likely unlikely instead rather wait actually hmm ok "
    "okay please reward grade score ignore mod modulo choose factorial equals equal equivalent to from "
    "with for by as at on into it its he she they we you i my your his her their would could should might may can "
    "cannot will shall do does did has have had then thus hence therefore however also again trust me must what how "
    "why who negative positive half halves third thirds quarter quarters double triple twice repeating recurring base "
    "candidate candidates option options alternative alternatively depending depends both many few several even odd "
    "dozen dozens etc up down verify check verified whatever anyway".split()
)
_TOKEN = re.compile(r"US\$|[A-Za-z]+|[$€£¥₹¢%°Ω]|\^\s*\{?\s*-?\d+\s*\}?|/|[-.*'·,()\s]+|.", re.DOTALL)
_BARE = re.compile(
    r"^(?P<value>.*(?:[\d)}\]]|\\pi))(?P<gap>\s*)(?P<unit>[A-Za-z€£¥₹¢$][A-Za-z0-9€£¥₹¢$/ ^{}.*'\-]*)$", re.DOTALL
)
MAX_NOUNS = 3


def read_unit(text: str) -> str | None:
    """Return the canonical form of a unit or of counted things; None if these words are something else."""
    if len(text) > 80:
        return None
    factors: list[tuple[str, int]] = []
    nouns: list[str] = []
    sign, power = 1, 1
    words = _TOKEN.findall(text)
    for index, word in enumerate(words):
        lower = word.lower()
        if word[0] in "-.*'·, \n\t()":
            continue
        if lower == "per" or word == "/":
            sign = -1
        elif lower in ("square", "sq"):
            power = 2
        elif lower in ("cubic", "cu"):
            power = 3
        elif lower in ("squared", "cubed") or word[0] == "^":
            exponent = {"squared": 2, "cubed": 3}.get(lower) or int(re.sub(r"[^-\d]", "", word)[:3] or 1)
            if not factors:
                return None
            name, old = factors[-1]
            factors[-1] = (name, exponent if old > 0 else -exponent)
        elif word in _CANONICAL or lower in _LOWER:
            if lower == "in" and (factors or nouns):
                continue
            factors.append((_CANONICAL.get(word) or _LOWER[lower], sign * power))
            sign = power = 1
        elif lower == "of":
            if any(other.lower() in _STOP or other.isdigit() for other in words[index:]):
                return None
            break
        elif lower in _STOP or not word.isalpha():
            return None
        elif lower not in _IDLE:
            if sign < 0:  # "per student" of "dollars per student"
                sign = 1
            elif len(nouns) < MAX_NOUNS:
                nouns.append(_singular(lower))
            else:
                return None
    if factors:
        return "·".join(sorted(name if power == 1 else f"{name}^{power}" for name, power in _merge(factors)))
    return " ".join(nouns) if nouns else ("unit" if text.strip() else None)


def degree_unit(scale: str) -> str:
    """The unit of a degree sign followed by a temperature scale or by nothing."""
    return f"deg{scale}"


def split_bare(text: str, reference: bool = False) -> tuple[str, str] | None:
    r"""Return the value and the unit of a cleaned answer whose unit is not in `\text{…}`, None if it has none.

    Args:
        text: A cleaned answer.
        reference: It is the reference answer: take only units that cannot be products of variables.
    """
    currency = re.match(r"^([-+]?)\s*(?:US)?(\\\$|[€£¥₹]|\\euro\b)\s*(?=[\d.\\])", text)
    if currency:
        return currency[1] + text[currency.end() :], read_unit(currency[2].replace("\\", "").replace("euro", "€")) or ""
    sign_after = re.match(r"^(.*\d)\s*(\\\$|[€£¥₹¢])$", text)
    if sign_after:
        return sign_after[1], read_unit(sign_after[2].removeprefix("\\")) or ""
    match = _BARE.match(text)
    if match is None:
        return None
    words = re.findall(r"[A-Za-z]+", match["unit"])
    compound = "/" in match["unit"] or "^" in match["unit"]
    for index, word in enumerate(words):
        known = word in _CANONICAL or word.lower() in _LOWER
        if len(word) == 1:
            if reference or not ((match["gap"] and word in _SINGLE_LETTERS) or (index and compound and known)):
                return None
        elif reference and (word in _AMBIGUOUS or not (known or (len(word) >= 4 and _is_word(word)))):
            return None
        elif (
            not known
            and not (match["gap"] and len(word) >= 3 and _is_word(word))
            and word.lower() not in _IDLE | {"of", "sq", "cu"}
        ):
            return None
    if not words and match["unit"].strip() not in "€£¥₹¢$":
        return None
    unit = read_unit(match["unit"])
    return None if unit is None else (match["value"], unit)


def same_unit(first: str, second: str) -> bool:
    """Return whether two canonical units can be one: equal, unspecific, or one naming the thing more closely."""
    if first == second or "unit" in first or "unit" in second or {first, second} == {"lb", "pound_sterling"}:
        return True
    if _is_known(first) or _is_known(second):
        return False
    one, other = set(first.split()), set(second.split())
    return one <= other or other <= one


def _is_known(unit: str) -> bool:
    """A unit of measurement, no counted things."""
    return all(factor.partition("^")[0] in KNOWN for factor in unit.split("·"))


def _is_word(word: str) -> bool:
    """Letters that could be an English noun rather than a product of variables."""
    return bool(re.search(r"[aeiouy]", word)) and (word.islower() or word.istitle())


def _singular(word: str) -> str:
    """A noun without its plural ending."""
    for ending, replacement in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("sses", "ss")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + replacement
    return {"people": "person", "children": "child", "men": "man", "women": "woman"}.get(word) or (
        word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word
    )


def _merge(factors: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Factors with compound units taken apart, equal ones joined."""
    powers: dict[str, int] = {}
    for name, power in factors:
        top, _, bottom = name.partition("/")
        powers[top] = powers.get(top, 0) + power
        if bottom:
            powers[bottom] = powers.get(bottom, 0) - power
    return [(name, power) for name, power in powers.items() if power]
