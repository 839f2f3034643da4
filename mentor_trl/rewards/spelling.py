"""One spelling for every answer: characters, symbols, styles, grouped digits; and what is the same text."""

import re
import unicodedata


_COMMANDS = """
×✕✖times ·⋅∙cdot ÷div ≤⩽leq ≥⩾geq ≠neq ≈≃≅approx ±pm ∓mp ∞infty ∪cup ∩cap ∈in ∅⌀Øemptyset ∠angle ⟨langle ⟩rangle
αalpha βbeta γgamma δdelta εepsilon ζzeta ηeta θtheta ιiota κkappa λlambda μµmu νnu ξxi πpi ρrho σsigma τtau
υupsilon φϕphi χchi ψpsi ωomega ΓGamma ΔDelta ΘTheta ΛLambda ΞXi ΠPi ΣSigma ΦPhi ΨPsi ΩOmega
"""
_CHARACTERS = {
    **{chars: rf"\{name} " for chars, name in re.findall(r"([^\x00-\x7f]+)([a-zA-Z]+)", _COMMANDS)},
    **dict(zip("ℝℤℚℕℂ", (rf"\mathbb{{{letter}}}" for letter in "RZQNC"))),
    **dict(zip("％，；：（）。", "%,;:().")),
    "−–—﹣－‐‑‒―⁻₋": "-",
    "°º˚": r"^{\circ}",
    "’‘′": "'",
    "“”": '"',
    "、": ", ",
    "⁄∕": "/",
    "\u2009\u202f\u00a0\u2007\u200a": r"\,",
    "\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u00ad\ufeff\u202a\u202c": None,
}
_TABLE = {ord(one): new for chars, new in _CHARACTERS.items() for one in chars}
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_ROOT = re.compile(r"([√∛∜])\s*(?:(\d+(?:\.\d+)?|[A-Za-z]|\\[a-z]+)|\(([^()]*)\))?")
_FRACTION = re.compile("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒]")
_SUPERSCRIPT, _SUBSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎]+")

_SPELLINGS = (
    (r"\\(?:displaystyle|textstyle|limits|!|left(?![a-z])\.?|right(?![a-z])\.?|[bB]igg?[lrm]?(?![a-z]))", ""),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\(leq|geq)slant(?![a-z])|\\([lg]e)(?![a-z])", lambda m: "\\" + (m[1] or m[2] + "q")),
    (r"\\(lt|gt)(?![a-z])", lambda m: {"lt": "<", "gt": ">"}[m[1]]),
    (r"\\ne(?![a-z])", r"\\neq"),
    (r"\\big(cup|cap)(?![a-z])", r"\\\1"),
    (r"\\(?:varnothing|oslash|O)(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset"),
    (r"\\(?:thickapprox|simeq|approxeq)(?![a-z])", r"\\approx"),
    (r"\\(?:imath|operatorname\{i\})(?![a-z])", " i "),
    (r"\\(?:degree|textdegree)(?![a-z])|\^\s*\{?\s*\\circ\s*\}?", r"^{\\circ}"),
    (r"\\textdollar(?![a-z])", r"\\$"),
    (r"\^\s*\{?\s*\\(?:text|mathrm)\s*\{\s*(st|nd|rd|th)\s*\}\s*\}?|\^\s*\{\s*(st|nd|rd|th)\s*\}", r"\1\2"),
    (r"(?<=\d)(?:\\[,;:>]|\{,\})(?=\d{3}(?!\d))", ""),
    (r"[\[(]\s*\\begin\{(?:array|matrix)\}(?:\s*\{[lcr| ]*\})?|\\begin\{bmatrix\}", r"\\begin{pmatrix}"),
    (r"\\end\{(?:array|matrix)\}\s*[\])]|\\end\{bmatrix\}", r"\\end{pmatrix}"),
    (r"^\s*(?:\\approx|=)|^\*\*(?=[^*]*\*\*$)|(?<=[^*])\*\*$|(?:\\\\\s*)+$", ""),
    (r"^(\s*[+-]?\d+) (\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    (r"(?<!\\)\\[,;:> ]|\\(?:q?quad|thinspace|enspace|nobreakspace)(?![a-z])|~|\s+", " "),
)
_COMPILED = tuple((re.compile(pattern), new) for pattern, new in _SPELLINGS)
_STYLES = r"text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|boldsymbol|underline|[mh]box|bm|emph|pmb"
_STYLE = re.compile(rf"\\(?:{_STYLES})\s*\{{([^{{}}]*)\}}")
_GROUPS = re.compile(r"(?P<open>\\\{|[(\[])|(?P<close>\\\}|[)\]])|(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SPACE_GROUPS = re.compile(r"^([^\d]*\d{1,3})((?: \d{3})+)(?![\d ]*\d)(\D*)$")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_DOLLAR = re.compile(r"(?<!\\)\$")


def strip_delimiters(text: str) -> str:
    r"""
    Removes the math delimiters that enclose a whole answer.

    >>> strip_delimiters(r"$\frac43$"), strip_delimiters("$a$ and $b$")
    ('\\frac43', '$a$ and $b$')
    """
    text = text.strip()
    for start, end in _DELIMITERS:
        inner = text[len(start) : len(text) - len(end)]
        closed = len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end)
        if closed and start not in inner.replace(rf"\{start}", ""):
            return inner.strip()
    return text


def _plain_characters(text: str) -> str:
    text = _SUBSCRIPT.sub(r"_{\g<0>}", _SUPERSCRIPT.sub(r"^{\g<0>}", text))
    text = _FRACTION.sub(lambda m: _fraction(*unicodedata.normalize("NFKC", m[0]).split("⁄")), text)
    text = _ROOT.sub(lambda m: f"{_ROOTS[m[1]]}{{{m[2] or m[3]}}}" if m[2] or m[3] else f"{_ROOTS[m[1]]} ", text)
    return unicodedata.normalize("NFKC", text.translate(_TABLE))


def _fraction(numerator: str, denominator: str) -> str:
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def clean(text: str) -> str:
    r"""
    Rewrites an answer in one spelling: delimiters, spaces, characters, symbols, styles and grouped digits.

    >>> clean(r"$\left(10\,000,\; −\dfrac{1}{2}\right]$."), clean(r"\text{Evelyn}"), clean("x² ≤ √2")
    ('(10000, -\\frac{1}{2}]', 'Evelyn', 'x^{2} \\leq \\sqrt{2}')
    """
    if not text.isascii():
        text = _plain_characters(text)
    text = strip_delimiters(text.strip().rstrip(".,;:`"))
    for pattern, new in _COMPILED:
        text = pattern.sub(new, text)
    for _ in range(3):  # styles inside styles
        if "\\" not in text:
            break
        text = _STYLE.sub(_unstyled, text)
    # An even number of dollars delimits mathematics; an odd one is money.
    text = _DOLLAR.sub(" " if len(_DOLLAR.findall(text)) % 2 == 0 else r"\\$", text)
    if "," in text:
        text = _ungroup(text)
    text = _SPACE_GROUPS.sub(lambda m: m[1] + m[2].replace(" ", "") + m[3], text)
    return " ".join(text.split()).rstrip(".,;: ")


def _unstyled(match: re.Match) -> str:
    inner, behind_digit = match[1], match.string[: match.start()][-1:].isdigit()
    return inner if len(inner) == 1 and (inner in "ei" or not behind_digit) else f" {inner} "


def _ungroup(text: str) -> str:
    depth = 0

    def replace(match: re.Match) -> str:
        nonlocal depth
        depth += bool(match["open"]) - bool(match["close"])
        return match[0] if depth > 0 else match[0].replace(",", "")  # `(1,234)` may be a pair

    return _GROUPS.sub(replace, text)


_WORD = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{3,}|(?:[Nn]o|[AaPp]\.?[Mm])(?![A-Za-z]))")
_CHOICE = re.compile(r"\(?\s*([A-Ea-e])\s*\)?\.?")
_ONE_BRACED = re.compile(r"(?<=[\^_])\s*\{\s*(\w)\s*\}")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:(\d)\s*(\d)|\{(\w+)\}\s*(\w)(?!\w)|(\d)\s*\{(\w+)\})")
_UPRIGHT = re.compile(r"\\(max|min|sup|inf)(?![a-z])")
_NOT_BETWEEN_DIGITS = re.compile(r"(?<!\d) | (?!\d)")


def flat(text: str) -> str:
    r"""
    Reduces a clean answer to what two spellings of the same text have in common.

    >>> flat("No  Solution"), flat(r"x^{2} + \frac12"), flat(r"( A )")
    ('nosolution', 'x^2+\\frac{1}{2}', '(A)')
    """
    text = _WORD.sub(lambda m: m[0].lower(), text)
    text = _SHORT_FRACTION.sub(lambda m: _fraction(*filter(None, m.groups())), text)
    text = _ONE_BRACED.sub(r"\1", text)
    text = _UPRIGHT.sub(r"\1", text).replace('"', "").replace("'s", "s").replace(r"\cdot", r"\times")
    return _NOT_BETWEEN_DIGITS.sub("", text)


def same_text(gold: str, answer: str) -> bool:
    r"""
    Tells whether two clean answers are the same text, or the same choice letter.

    >>> same_text("No solution", "no solution"), same_text("(B)", "b"), same_text("x", "X")
    (True, True, False)
    """
    one, other = _CHOICE.fullmatch(gold), _CHOICE.fullmatch(answer)
    if one and other:
        return one[1].upper() == other[1].upper()
    return flat(gold) == flat(answer)
