"""
How the rules of grading (the table in docs/grading.md) take an answer apart: units, percent signs, bases, equations.

Nothing here imports math-verify: `comparison.py` does.
"""

import re
from typing import NamedTuple


# Changes whenever a verdict may
GRADER_VERSION = "2"

_SYNONYMS = """
m meter meters metre metres|cm centimeter centimeters centimetre centimetres|mm millimeter millimeters millimetre
millimetres|km kilometer kilometers kilometre kilometres kms|in inch inches|ft foot feet|yd yard yards yds
mi mile miles|g gram grams gm gms|kg kilogram kilograms kgs kilo kilos|mg milligram milligrams|lb pound pounds lbs
oz ounce ounces|l liter liters litre litres|ml milliliter milliliters millilitre millilitres|gal gallon gallons
qt quart quarts|s second seconds sec secs|min minute minutes mins|h hour hours hr hrs|day days|wk week weeks
yr year years yrs|dollar dollars usd $ bucks|cent cents ¢|euro euros € eur|£ gbp|¥ yen jpy yuan rmb
₹ rupee rupees rs inr|degree degrees deg|degc celsius c|degf fahrenheit f|n newton newtons|j joule joules|w watt watts
v volt volts|k kelvin kelvins|pa pascal pascals|hz hertz|kn|kj|kw|mw|mv|kpa|ev|rad radian radians|mol mole moles
amp amps ampere amperes|ohm ohms|t tesla|square sq|cubic cu|mph|kph kmph kmh|rpm|bps|am a.m|pm p.m|unit units
point pt pts points|th st nd rd|nm|um|acre acres|hectare hectares ha|ton tons tonne tonnes
"""
_CANONICAL = {name: names.split()[0] for names in re.split(r"[|\n]", _SYNONYMS) for name in names.split()}
_MEASURES = frozenset(_CANONICAL.values())
_SPEEDS = {"mph": ["mi", "per", "h"], **{name: ["km", "per", "h"] for name in ("kph", "kmph", "kmh")}}
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LEADING_COUNTS = frozenset("dozen dozens hundreds thousands lakh crore".split())
_NUMBER_WORDS = _LEADING_COUNTS | frozenset(
    """
    millions billions mil mill grand gross
    half halves third thirds fourth fourths quarter quarters fifth fifths sixth sixths seventh sevenths eighth eighths
    ninth ninths tenth tenths hundredth hundredths thousandth thousandths squared cubed factorial hundred thousand
    million billion trillion one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty
    sixty seventy eighty ninety score
    """.split()
)
_HEDGES = frozenset(
    """
    or and to than least most about approximately approx around between not no either neither but if when where for
    over under nearly almost roughly maybe possibly up plus minus negative greater below above mod modulo is are be at
    with without any all every some other except then otherwise respectively integer
    """.split()
)
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc log ln exp sqrt arcsin arccos arctan sinh cosh tanh max gcd lcm det".split()
)
_FILLERS = frozenset("of a an the".split())
_NOUN = re.compile(r"(?=.{3}).*(?:[aeiou]|y$)")
_TOKEN = r"(?:[A-Za-z]+(?:['-][A-Za-z]+)*\.?|[A-Za-z]\.[A-Za-z]\.)(?:\s*\^\s*\{?\s*-?[1-9]\s*\}?)?"
_PHRASE = rf"{_TOKEN}(?:\s*[/·]\s*{_TOKEN}|\s*\\(?:cdot|times)\s*{_TOKEN}|\s+{_TOKEN})*"
_TAIL = re.compile(rf"(?<![\\A-Za-z'])(?P<bracket>\(\s*)?(?P<phrase>{_PHRASE})(?(bracket)\s*\))$")
_DEGREE = re.compile(r"\^\{\\circ\}\s*([CF]?)$")
_MONEY = re.compile(
    r"^([+-]?)\s*(?:(?:US|A|C)?(\\\$|[€£¥₹])|(USD|EUR|GBP|Rs\.?|INR)(?![a-z]))\s*([+-]?\s*[\d.\\(].*)$"
)
_MONEY_AFTER = re.compile(r"(?<=[\d}])\s*(\\\$|[€£¥₹¢])$")
_BARE_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}")
_UNIT_FRACTION = re.compile(r"(?<=[\d}])\s*\\frac\s*\{\s*([a-z]{1,3})\s*\}\s*\{\s*([smh]|min|hr|sec)\s*(?:\^2)?\}$")
_TAIL_LENGTH = 80


class Quantity(NamedTuple):
    """An answer taken apart into mathematics and unit (`None` for none)."""

    core: str
    unit: frozenset[str] | None
    counts: bool = False  # it is a number word, such as `dozen`
    bracketed: bool = False
    symbol: bool = False  # it may be a symbol behind its coefficient: `3m`


def split_unit(text: str) -> Quantity:
    r"""
    Takes the unit off a clean answer.

    >>> split_unit("18 dollars").core, sorted(split_unit(r"3 cm ^2").unit), split_unit("3 or more").unit
    ('18', ['cm', 'square'], None)
    """
    if match := _MONEY.match(text):
        rest = split_unit(match[1] + match[4])
        unit = _CANONICAL[(match[2] or match[3]).lstrip("\\").rstrip(".").lower()]
        return rest._replace(unit=frozenset([unit]) | (rest.unit or frozenset()))
    if match := _MONEY_AFTER.search(text):
        return Quantity(text[: match.start()].strip(), frozenset([_CANONICAL[match[1].lstrip("\\")]]))
    if match := _DEGREE.search(text):
        return Quantity(text[: match.start()].strip(), frozenset(["deg" + match[1].lower() if match[1] else "degree"]))
    text = _UNIT_FRACTION.sub(r" \1/\2", text)
    tail = text[-_TAIL_LENGTH:]
    match = _TAIL.search(tail)
    if not match or match.start() == 0 and len(tail) < len(text):
        return Quantity(text, None)
    core = text[: len(text) - len(tail) + match.start()].rstrip()
    if not re.search(r"\d|\\", core) or core[-1] in "+-*/^_=<>,;:([{|\\" or _BARE_WORD.search(core):
        return Quantity(text, None)
    spaced = match.start() > 0 and tail[match.start() - 1].isspace()
    return _read_phrase(text, core, match["phrase"], bool(match["bracket"]), spaced)


def _read_phrase(text: str, core: str, phrase: str, bracket: bool, spaced: bool) -> Quantity:
    words = [word.rstrip(".") for word in re.findall(r"[A-Za-z][A-Za-z'.]*", phrase)]
    if any(len(word) == 1 and word not in "aCFJKLNTVWghlms" for word in words):
        return Quantity(text, None)
    if len(words) > 1 and re.search(r"(?<![A-Za-z'])[A-Za-z](?:\s*\^\S*)?\s+[A-Za-z](?![A-Za-z'])", phrase):
        return Quantity(text, None)  # a product of symbols
    words = [word.lower() for word in words]
    if not bracket and words[0] in _MAGNITUDES:
        core, words = rf"{core}\times 10^{{{_MAGNITUDES[words[0]]}}}", words[1:]
        if not words:
            return Quantity(core, None)
        phrase = phrase.split(maxsplit=1)[1]
    if _HEDGES & set(words) or _FUNCTIONS & set(words):
        return Quantity(text, None)
    if not bracket:
        known = [word in _CANONICAL for word in words]
        if not spaced and (not known[0] or len(words[0]) == 1 and words[0] not in "mgshl"):
            return Quantity(text, None)
        if not all(there or word in _FILLERS or _NOUN.match(word) for word, there in zip(words, known)):
            return Quantity(text, None)
    number_word = words[-1] in _NUMBER_WORDS or words[0] in _LEADING_COUNTS
    symbol = not spaced and not bracket and phrase in ("m", "g", "s", "h", "l")
    return Quantity(core, _canonical(phrase, words), number_word, bracket, symbol)


def _canonical(phrase: str, words: list[str]) -> frozenset[str]:
    unit = set()
    for part in (part for word in words for part in _SPEEDS.get(word, [word])):
        word = _CANONICAL.get(part, part)
        unit.add(word if word in _MEASURES else re.sub(r"(?<=[^aeious])(?:es|s)$|(?<=[aeiou])s$", "", word))
    for exponent, name in (("2", "square"), ("3", "cubic")):
        if re.search(rf"\^\s*\{{?\s*{exponent}", phrase) and "/" not in phrase:
            unit.add(name)
    if "/" in phrase:
        unit.add("per")
    return frozenset(unit - _FILLERS - {"unit"})


def same_unit(one: frozenset[str], other: frozenset[str]) -> bool:
    """Tells whether two units are the same, or one only describes the other more closely (`red apples`, `apples`)."""
    if one == other or not one or not other:
        return True
    if {"degree"} in (one, other):
        return (one | other) <= {"degree", "degc", "degf"}
    smaller, larger = sorted((one, other), key=len)
    return smaller < larger and not (larger - smaller) & (_MEASURES | {"per"})


_PERCENT = re.compile(r"\s*(?:\\?%|(?<![A-Za-z])(?:percent|per cent|pct))$")
_NUMERALS = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_BASE = re.compile(
    r"\(?([0-9][0-9A-Fa-f]*)\)?(?:_\{?|(?=\(?base))\(?(?:base)?(\d{1,2}|" + "|".join(_NUMERALS) + r")\)?\}?"
)
_RATIO = re.compile(r"\d+(?:\.\d+)?(?::\d+(?:\.\d+)?)+")


def split_percent(text: str) -> tuple[str, bool]:
    r"""
    Takes the percent sign off a clean answer.

    >>> split_percent(r"25 \%"), split_percent("5 percent"), split_percent("5")
    (('25', True), ('5', True), ('5', False))
    """
    match = _PERCENT.search(text[-12:])
    return (text[: len(text) - len(match[0])], True) if match else (text, False)


def split_base(text: str) -> tuple[str, int] | None:
    r"""
    Takes a clean numeral apart into digits and base, or returns `None` where it names no base.

    >>> split_base("11_{3}"), split_base("1A _{16}"), split_base("101 (base two)"), split_base("x_{3}")
    (('11', 3), ('1A', 16), ('101', 2), None)
    """
    match = _BASE.fullmatch(re.sub(r"\s", "", text)) if len(text) < 100 else None
    if match is None:
        return None
    return match[1], int(match[2]) if match[2].isdigit() else _NUMERALS.index(match[2]) + 2


def ratio(text: str) -> list[str] | None:
    r"""
    Returns the terms of a ratio or of a time of day, or `None`.

    >>> ratio("3 : 4"), ratio("12:30"), ratio("3/4")
    (['3', '4'], ['12', '30'], None)
    """
    match = _RATIO.fullmatch(text.replace(" ", ""))
    return match[0].split(":") if match else None


_BRACKETS = re.compile(r"\\[{}]|[(\[{]|[)\]}]|(?<![\\<>!:])=(?!=)|(?<=\d!)=|:|\\approx|,|;")
_SYMBOL = (
    r"(?:\\(?:vec|hat|bar|overline|widehat|tilde|overrightarrow|mathbf|mathbb|mathcal|operatorname\*?)\s*\{[^{}]*\}|"
    r"\\(?!frac|sqrt|int|sum|pm|times|cdot)[A-Za-z]+|[A-Za-z])"
)
_NAME = re.compile(
    rf"{_SYMBOL}(?:\s*_\s*(?:\{{[^{{}}]*\}}|\w))?(?:\s*(?:'|\^\s*\{{\s*(?:-1|\\prime|\\circ|T)\s*\}}|\^\s*T)){{0,3}}"
    r"(?:\s*\(.*\))?"
)
_NAMED = (
    re.compile(rf"(?![abckmntxyz]\s*\([^)]*[-+*/^]){_NAME.pattern}"),
    re.compile(
        r"(?:m\s*)?\\(?:angle|measuredangle|triangle|sin|cos|tan|cot|sec|csc|det|dim|deg)(?![a-z])"
        r"(?:\s*\^\{?\d\}?)?\s*\(?[A-Za-z0-9\\_{} ]{1,24}\)?(?:\^\{\\circ\})?"
    ),
    re.compile(r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)"),  # (x, y)
    re.compile(r"[A-Z](?:\s?[A-Z]){1,4}"),  # a length, an angle, an area
    re.compile(r"\\?\|[^=|]*\\?\||\[[A-Z]{3,5}\]"),
    re.compile(r"\\frac\s*\{\s*d\s*(?:\^\{?\d\}?\s*)?[A-Za-z]?\s*\}\s*\{\s*d\s*[A-Za-z]\s*(?:\^\{?\d\}?\s*)?\}.*"),
    re.compile(r"\\(?:lim|int|iint|iiint|oint|sum|prod|max|min)(?![a-z]).*"),
    re.compile(r"(?!\\?(?:sqrt|log|ln|exp|frac)(?![a-z]))\\?[A-Za-z]{2,}\s*\([^=]*\)"),  # Var(X), Area(ABC), gcd(4,6)
    re.compile(r"(?=.*[A-Za-z]{4}|.*(?:sum|Sum|max|min))[A-Za-z' -]+"),  # Total, Area of ABC
)
_REGION = re.compile(r"\s*(?:[(\[]|\\\{|\\mathbb|\\emptyset|\\infty)")
_RELATION = re.compile(r"[<>]|\\(?:leq|geq|neq|in)(?![a-z])|[A-Za-z]{3,}")


def split_top(text: str, sign: str) -> list[str]:
    r"""
    Splits a clean answer at a sign that stands outside of brackets.

    >>> split_top("P(X=2)=3", "="), split_top("5!=120", "="), split_top(r"x \leq 3", "=")
    (['P(X=2)', '3'], ['5!', '120'], ['x \\leq 3'])
    """
    parts, depth, start = [], 0, 0
    for match in _BRACKETS.finditer(text):
        token = match[0][-1]
        if match[0] == sign and depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
        elif token in "([{":
            depth += 1
        elif token in ")]}":
            depth = max(0, depth - 1)
    return [*parts, text[start:].strip()]


def is_name(text: str) -> bool:
    r"""
    Tells the left side of a definition from an expression: a symbol, f(x), P(A), an angle, a length, words.

    >>> [is_name(text) for text in ("x", "f(x)", r"\angle ABC", "AB", "Total", "a+b", "2x", "xy", "x^{2}")]
    [True, True, True, True, True, False, False, False, False]
    """
    return len(text) <= _TAIL_LENGTH and any(pattern.fullmatch(text.strip()) for pattern in _NAMED)


def statements(gold: str) -> list[str]:
    r"""
    Returns what a clean gold answer states: itself, or each of the two forms in which it states one thing.

    >>> statements(r"-2 \leq n \leq 4:[-2,4]"), statements("3:4"), statements(r"\frac{40}{3} \approx 13.33")
    (['-2 \\leq n \\leq 4', '[-2,4]'], ['3:4'], ['\\frac{40}{3}', '13.33'])
    """
    for sign in (":", r"\approx"):
        parts = split_top(gold, sign)
        if len(parts) == 2 and all(parts):
            if _RELATION.search(parts[0]) and _REGION.match(parts[1]) if sign == ":" else not is_name(parts[0]):
                return parts
    return [gold]
