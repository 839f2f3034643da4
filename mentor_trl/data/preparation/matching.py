"""When two problems are the same problem: equal texts, once spelling and layout are set aside."""

import re
import unicodedata


_CHARACTERS = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-"})
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
# Commands that change the look of a formula and not what it says, math delimiters, and the line break `\\`.
_LAYOUT = re.compile(
    r"\\(?:left|right|quad|qquad|displaystyle|textstyle|text|textbf|textit|textrm|mathrm|mathbf|mbox)(?![A-Za-z])"
    r"|\\[,;:!> ()\[\]\\]|\\?\$|~"
)
_ONE_IN_BRACES = re.compile(r"\{(\w)\}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SPACE = re.compile(r"\s+")


def normalize_problem(text: str) -> str:
    r"""
    Return the text by which problems are compared.

    Set aside are letter case, white space, Unicode variants (quotes, dashes, width), math delimiters, spacing and font
    commands of LaTeX, `\dfrac` against `\frac`, braces around one character, commas that group thousands, and
    punctuation at the end. Everything else counts: a problem with other numbers is another problem.

    Example:
    ```python
    >>> from mentor_trl.data.preparation import normalize_problem

    >>> normalize_problem(r"Find $\dfrac{1}{2} \cdot x^{2}$ .") == normalize_problem(r"find \( \frac12\cdot x^2 \)")
    True
    >>> normalize_problem("What is 1,000 + 2?") == normalize_problem("What is 1000 + 3?")
    False
    ```
    """
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    text = _FRACTIONS.sub(r"\\frac", text)
    text = _LAYOUT.sub("", text)
    text = _SPACE.sub("", text).casefold()
    text = _ONE_IN_BRACES.sub(r"\1", _THOUSANDS.sub("", text))
    return text.rstrip(".,;:!?")
