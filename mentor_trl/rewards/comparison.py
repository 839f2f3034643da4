"""
Whether an answer equals a gold answer: the rules of docs/grading.md around math-verify.

Only grading workers import it. It imports neither `mentor_trl` nor torch, so that they are ready in about a second.
"""

import math
import re
from fractions import Fraction
from functools import lru_cache

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, verify
from math_verify import parse as parse_answer
from sympy import Basic, Equality, Expr, FiniteSet, I, Interval, Product, Rational, Sum, Symbol, Tuple
from sympy.logic.boolalg import BooleanAtom

from .answers import is_gradable
from .rules import is_name, ratio, same_unit, split_base, split_percent, split_top, split_unit, statements
from .spelling import clean, flat, same_text, strip_delimiters


# math-verify rounds to six decimals, to which all numbers well below this one are the same.
TINY = 1e-3
DIGITS = 60

_BARE_POINT = re.compile(r"(?<=\d)\.(?=\s*(?:$|[/)\],;+*-]))")
_EXPONENT = re.compile(r"(?<![\w.])(\d+\.?\d*)[eE]([+-]?\d+)(?![\w.])")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,},?\s+[A-Za-z]{2,},?\s+[A-Za-z]{2,}")
_QUANTITY = re.compile(r"\$[^$]+\$|\\\(.*?\\\)|(?<![\w.])-?\d[\d.,]*")
_ANSWER_IS = re.compile(r"answer(?: is|:)", re.IGNORECASE)
_COMPARISON = re.compile(r"\b(?:or|and|than|least|most|greater|less|if|when|where|any|all)\b", re.IGNORECASE)
_WORDS = re.compile(r"(?=.*[A-Za-z]{4})[A-Za-z ,.;'!?-]+")
_LETTERS = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{3,}|([A-Za-z]{1,2}))(?![A-Za-z])")
_CONSTANT = re.compile(r"[+-]\s*[Cc]$")
_MEMBER = re.compile(r"[A-Za-z]\s*\\in(?![a-z])\s*")
_NAME_IN_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_LIST = re.compile(r"[,;]| or | and ")
_PLAIN = re.compile(r"[-+]?\d+(?:\.\d+)?")
_ARITHMETIC = re.compile(
    r"(?:[\d\s.+\-*/^!(){}|]|\[\d\]|\\(?:frac|sqrt|cdot|times|div|pi|binom|ln|log|sin|cos|tan|%)(?![a-z])|_|(?<![A-Za-z])e)+"
)
_EXTRACTION = LatexExtractionConfig(
    boxed_match_priority=0,
    try_extract_without_anchor=False,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    ),
)


def is_prose(gold: str) -> bool:
    r"""
    Tells a sentence, in which math-verify has to look for the answer, from a bare answer.

    >>> is_prose("So the answer is 72"), is_prose("concave up or down"), is_prose("72 dollars")
    (True, False, False)
    """
    if not _PROSE.search(gold) or _COMPARISON.search(gold) or split_unit(clean(gold)).unit is not None:
        return False
    return len(_QUANTITY.findall(gold)) == 1 or _ANSWER_IS.search(gold) is not None


@lru_cache(maxsize=4096)
def parse(text: str) -> tuple:
    """Returns what math-verify makes of a clean answer without unit: expressions, or the text where it reads none."""
    text = _EXPONENT.sub(r"\1 \\times 10^{\2}", text)  # `4.5e33`: to math-verify, Euler's number
    text = _BARE_POINT.sub("", text)  # `5.` and `1./3` are numbers, but not to math-verify
    # The answer goes back into a box because math-verify reads a bare `1,2` as the number 1.2 and no bare `\frac43`.
    found = parse_answer(rf"\boxed{{{text}}}", extraction_config=[_EXTRACTION], parsing_timeout=None)
    return tuple(item for item in map(_with_imaginary_unit, found) if not _is_truth_value(item))


def _is_truth_value(item) -> bool:
    """sympy reads a chain of equations as whether it holds, so that any two that do not would be equal."""
    return any(isinstance(one, BooleanAtom) for one in (item.args if isinstance(item, (FiniteSet, Tuple)) else [item]))


def _with_imaginary_unit(item):
    if not isinstance(item, Basic) or not item.has(Symbol) or item.has(Sum, Product):
        return item
    # math-verify's symbols are real in an answer without `i` and not real in one with it.
    unit = {one: I if one.name in ("i", "imath") else Symbol(one.name, real=True) for one in item.atoms(Symbol)}
    try:
        return item.xreplace(unit)
    except Exception:  # sympy raises what it likes
        return item


@lru_cache(maxsize=1024)
def parse_gold(gold: str) -> tuple:
    """What math-verify makes of a gold answer, bare or in a sentence; its text, where that is nothing."""
    if not is_gradable(gold):
        return ()
    if is_prose(gold):
        return tuple(parse_answer(gold, parsing_timeout=None)) or (gold,)
    for statement in statements(clean(gold)):
        parse(_mathematics(statement))
    return (gold,)


def _mathematics(text: str) -> str:
    return split_percent(split_unit(text).core)[0]


def is_correct(gold: str, answer: str) -> bool:
    """Whether an answer is the text of a gold answer that [`parse_gold`] can parse, or equal by the rules."""
    clean_gold, clean_answer = clean(gold), clean(answer)
    if not clean_answer:
        return False
    if same_text(clean_gold, clean_answer):
        return True
    if is_prose(gold):
        return _equal_items(parse_gold(gold), parse(_mathematics(clean_answer)), clean_answer, clean_answer)
    return any(
        _matches(stated, given) for stated in statements(clean_gold) for given in _consistent_statements(clean_answer)
    )


def is_correct_to_math_verify(gold: str, answer: str) -> bool:
    """What math-verify says without our rules, when both stand in a box."""
    both = (parse_answer(rf"\boxed{{{strip_delimiters(text)}}}", parsing_timeout=None) for text in (gold, answer))
    return verify(*both, timeout_seconds=None)


def _consistent_statements(answer: str) -> list[str]:
    """An answer may state its value exactly and rounded; two different values are a guess at both."""
    parts = statements(answer)
    if len(parts) == 1:
        return parts
    exact, rounded = map(_mathematics, parts)
    value, other = number(exact), number(rounded)
    if value is None:
        return parts[1:]
    decimals = len(rounded.partition(".")[2]) if _PLAIN.fullmatch(rounded) else 6
    return parts if other is not None and _rounds_to(value, other, decimals) else []


def _rounds_to(value: float, rounded: float, decimals: int) -> bool:
    return abs(value - rounded) <= 0.5000001 * 10.0**-decimals


def _matches(gold: str, answer: str) -> bool:
    gold, answer = _CONSTANT.sub("+c", gold), _CONSTANT.sub("+c", answer)
    if same_text(gold, answer):
        return True
    if _WORDS.fullmatch(gold) and not _LIST.search(gold):
        return False
    bases = split_base(gold), split_base(answer)
    if any(bases):
        return _same_numeral(gold, answer, *bases)
    one, other = split_unit(gold), split_unit(answer)
    terms = ratio(one.core), ratio(other.core)
    # A ratio may be written as a fraction, but not as one of its terms; a time of day as neither.
    if any(terms) and (all(terms) or _is_time(terms[0] or terms[1]) or one.core.isdigit() or other.core.isdigit()):
        return _same_ratio(*terms) and (one.unit is None or other.unit is None or same_unit(one.unit, other.unit))
    sides = _sides_that_count(gold, answer)
    return sides is not None and _same_quantity(*sides)


def _same_numeral(gold: str, answer: str, one: tuple[str, int] | None, other: tuple[str, int] | None) -> bool:
    if one and other and one[1] != other[1]:
        return False
    digits = [base[0] if base else text for base, text in ((one, gold), (other, answer))]
    return digits[0].lstrip("0").upper() == digits[1].replace(" ", "").lstrip("0").upper()


def _is_time(terms: list[str]) -> bool:
    return len(terms) > 2 or (len(terms[1]) == 2 and terms[1].isdigit() and int(terms[0].split(".")[0]) < 25)


def _same_ratio(one: list[str] | None, other: list[str] | None) -> bool:
    if one is None or other is None or len(one) != len(other):
        return False
    if one[0].lstrip("0") == other[0].lstrip("0") and one[1:] == other[1:]:
        return True
    if len(one) > 2 or _is_time(one) or _is_time(other):
        return False
    return Fraction(one[0]) * Fraction(other[1]) == Fraction(one[1]) * Fraction(other[0])


def _sides_that_count(gold: str, answer: str) -> tuple[str, str] | None:
    """The right sides of equations, or the texts where there are none; `None` where an equation counts for nothing."""
    lefts = [split_top(text, "=")[0] for text in (gold, answer)]
    if lefts[0] != gold and lefts[1] != answer and flat(lefts[0]) != flat(lefts[1]) and _LIST.search(gold) is None:
        if not any(_NAME_IN_WORDS.search(left) for left in lefts) and all(map(is_name, lefts)):
            return None  # definitions of two things
        if not all(map(is_name, lefts)):
            return gold, answer  # two equations, which math-verify compares
    right, given = _right_side(gold), _right_side(answer)
    if right is None and lefts[1] != answer:
        return gold, answer
    return None if right is None or given is None else (right, given)


def _right_side(text: str) -> str | None:
    member = _MEMBER.match(text)
    if member:
        return text[member.end() :]
    rounded = split_top(text, r"\approx")
    if len(rounded) == 2 and is_name(rounded[0]):
        return rounded[1]
    sides = split_top(text, "=")
    if len(sides) == 1 or not all(sides):
        return text
    if any(len(split_top(text, sign)) > 1 for sign in ",;") or " or " in text or " and " in text:
        return _list_of_values(text)
    known = [(value, side) for side in sides if (value := number(split_unit(side).core)) is not None]
    if any(not _agree(*pair) for pair in zip(known, known[1:])):
        return None
    if is_name(sides[0]) or len(known) == len(sides) or r"\begin" in sides[0]:
        return sides[-1]
    return sides[0] if is_name(sides[-1]) and len(known) == len(sides) - 1 else None


def _agree(one: tuple[float, str], other: tuple[float, str]) -> bool:
    value, (rounded, text) = one[0], other
    if "." in text and _PLAIN.fullmatch(text):
        return _rounds_to(value, rounded, len(text.partition(".")[2]))
    return math.isclose(value, rounded, rel_tol=1e-9)


def _list_of_values(text: str) -> str:
    """`x=1 or x=2` and `x=1, 2` as `1, 2`; definitions of several names stay as they are."""
    items = [item.strip() for item in _LIST.split(text)]
    names = {split_top(item, "=")[0] for item in items if "=" in item}
    if len(names) != 1 or not is_name(name := names.pop()) or any(item.count("=") > 1 for item in items):
        return text
    return text.replace(f"{name}=", "").replace(f"{name} =", "")


def _same_quantity(gold: str, answer: str) -> bool:
    items, others = ([split_unit(item.strip()) for item in _LIST.split(text)] for text in (gold, answer))
    if len(items) == len(others) > 1:
        return _same_list(items, others)
    one, other = split_unit(gold), split_unit(answer)
    if one.unit is not None and other.unit is not None:
        if not same_unit(one.unit, other.unit):
            return False
    elif other.counts or one.symbol or (one.counts and not one.bracketed):
        return _equal(gold, answer)
    return _same_percent(*split_percent(one.core), *split_percent(other.core))


def _same_list(items: list, others: list) -> bool:
    units, other_units = ([item.unit for item in side if item.unit] for side in (items, others))
    if units and other_units and not all(any(same_unit(u, v) for v in other_units) for u in units):
        return False
    return _equal(", ".join(item.core for item in items), ", ".join(item.core for item in others))


def _same_percent(left: str, left_percent: bool, right: str, right_percent: bool) -> bool:
    if left_percent == right_percent:
        return _equal(left, right)
    values = number(left), number(right)
    small = all(value is not None and abs(value) < 1 for value in values)
    if not small and _equal(left, right):
        return True
    if left_percent:
        return values[0] is not None and _equal(rf"\frac{{{left}}}{{100}}", right)
    return values[1] is not None and _equal(left, rf"\frac{{{right}}}{{100}}")


def number(text: str) -> float | None:
    r"""
    Returns the value of an expression in numbers alone, or `None` for any other.

    >>> number(r"\frac{1}{4}"), number("2x")
    (0.25, None)
    """
    if _PLAIN.fullmatch(text):
        return float(text)
    if not text or len(text) > 200 or not _ARITHMETIC.fullmatch(text):
        return None
    return _float(parse(text)[:1])


def _float(items: tuple) -> float | None:
    try:
        return float(items[0])
    except (IndexError, TypeError, ValueError, OverflowError, AttributeError):
        return None


def _equal(gold: str, answer: str) -> bool:
    if same_text(gold, answer):
        return True
    if _PLAIN.fullmatch(gold) and _PLAIN.fullmatch(answer):
        return _same_number(gold, answer)
    if flat(gold).casefold() == flat(answer).casefold():
        return False
    return _same_case(gold, answer) and _equal_items(parse(gold), parse(answer), gold, answer)


def _same_number(gold: str, answer: str) -> bool:
    """What [`_equal_items`] says of two plain numbers, without math-verify."""
    one, other = Fraction(gold), Fraction(answer)
    if one == other or "." not in gold + answer:
        return one == other
    if abs(one) < TINY:
        return abs(one - other) <= abs(one) / 10**6
    return round(one, 6) == round(other, 6)


def _same_case(gold: str, answer: str) -> bool:
    """math-verify reads `N` and `n` as one symbol. A letter that each side has in one case only must have the same."""
    one, other = (
        {letter for match in _LETTERS.finditer(text) for letter in match[1] or "" if letter not in "eE"}
        for text in (gold, answer)
    )
    return all(letter in other or letter.swapcase() not in other - one for letter in one)


def _equal_items(gold: tuple, answer: tuple, gold_text: str, answer_text: str) -> bool:
    if not verify(list(gold), list(answer), timeout_seconds=None):
        return False
    if "." not in gold_text + answer_text:
        return not _differ(gold[0], answer[0])
    value, other = _float(gold), _float(answer)
    if value is None or other is None or value == 0 or abs(value) >= TINY:
        return True
    return math.isclose(value, other, rel_tol=1e-6)


def _differ(one, other) -> bool:
    """
    Tells whether two expressions that math-verify takes for equal differ beyond its 15 digits, as `1/2004!` and
    `1/2006!` do. Expressions that cannot be evaluated are left to math-verify.
    """
    if isinstance(one, Equality) and isinstance(other, Expr):
        one = one.rhs
    if isinstance(other, Equality) and isinstance(one, Expr):
        other = other.rhs
    if isinstance(one, (Interval, Tuple)) and type(one) is type(other):
        return any(map(_differ, one.args, other.args))
    if isinstance(one, FiniteSet) and isinstance(other, FiniteSet):
        return any(all(_differ(item, another) for another in other.args) for item in one.args)
    if not isinstance(one, Expr) or not isinstance(other, Expr) or one == other:
        return False
    try:
        exact = (one - other).doit()
        if exact.is_Rational:
            return exact != 0
        symbols = sorted((one.free_symbols | other.free_symbols), key=str)
        point = {symbol: Rational(7919 + 104 * index, 6007) for index, symbol in enumerate(symbols)}
        values = [Basic.subs(side, point).evalf(DIGITS, maxn=10**4) for side in (one, other)]
        gap = abs(values[0] - values[1])
        scale = max(map(abs, values))
        return bool(gap.is_number and gap > scale * Rational(1, 10 ** (DIGITS // 2)))
    except Exception:  # sympy raises what it likes
        return False
