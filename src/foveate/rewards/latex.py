r"""LaTeX of final answers in one form: signs as commands, no dress, and its parts between brackets."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from foveate.rewards.number_words import ORDINALS, in_digits, on_the_clock
from foveate.rewards.phrases import with_direction
from foveate.rewards.plain_text import unified, unwrapped
from foveate.rewards.spoken import in_signs
from foveate.rewards.statements import numbered, standard

_SIGNS = {
    "×": r"\times ", "·": r"\cdot ", "÷": r"/", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "∠": r"\angle ",
    "∡": r"\angle ", "△": r"\triangle ", "∆": r"\triangle ", "≅": r"\cong ", "≌": r"\cong ", "∼": r"\sim ",
    "∽": r"\sim ", "∥": r"\parallel ", "∦": r"\nparallel ", "⊥": r"\perp ", "⟂": r"\perp ", "⊙": r"\odot ",
    "≈": r"\approx ", "√": r"\surd ", "、": r",", "<=": r"\le ", ">=": r"\ge ", "≡": r"\equiv ", "→": r"\to ",
    "->": r"\to ", r"\rightarrow": r"\to ", r"\longrightarrow": r"\to ",
    "∛": r"\cbrt ", "ℝ": r"\mathbb{R}", "⟨": r"\langle ", "⟩": r"\rangle ", "〈": r"\langle ",
    "〉": r"\rangle ", "▱": r"\parallelogram ", "□": r"\square ",
}  # fmt: skip
_SIGN = re.compile("|".join(map(re.escape, _SIGNS)))
_GREEK = re.compile(r"[α-ωΑ-Ωϑϕϵ]")
_ROOT = re.compile(r"\\(surd|cbrt)\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))")
_DRESS = re.compile(
    r"\\(?:displaystyle|textstyle|limits|left|right|big|Big|bigg|Bigg)(?![A-Za-z])|~|\\q?quad(?![A-Za-z])"
    r"|(?<!\\)(?:\$|\\[,;:! ()])"
)
_PLAIN_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_DOLLARS = re.compile(r"^(?:US\s*)?\$(?=\s*[\d.][^$]*$)")
"""The sign of dollars: no other stands behind it, as one would to close mathematics."""
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*(?:\\circ|°|o)\s*\}?|\\degree(?![A-Za-z])|°)")
_DOTS = re.compile(r"\\(?:ldots|cdots|dots[a-z]?|ddots|vdots)(?![A-Za-z])|\.{3,}|…|⋯")
_ABOUT = re.compile(
    r"^(?:\\approx|\\simeq|\\sim(?=\s*[\d.])|exactly|about|approximately|approx\.?|roughly|around)\s*", re.IGNORECASE
)
_TIMES = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_POWER = re.compile(r"\^\s*(-?\d{2,}|-\d)(?![\d.])")
"""An exponent that LaTeX would cut: `10^-19`."""
_DECIMAL_COMMA = re.compile(
    r"(-?\s*\\?[€£]\s*-?\d+|-?\d+(?=,\d\d?\s*(?:\\?%|[€£°]|[A-Za-zµΩ]{1,3}(?![A-Za-z])))),(\d\d?)(?![\d,])"
)
"""Money and quantities with a comma for the point: `€12,50`, `3,5 cm`."""
_PER_CENT = re.compile(r"(?<=[\d}])\s*(?:(?:per cent|percent(?:age)? points?)(?![A-Za-z])|个百分点|(‰))")
_UNIT_VECTOR = re.compile(
    r"\\(?:vec|hat|overrightarrow)\s*(?:\{\s*\\?([ijk])(?:math)?\s*\}|\\?([ijk])(?:math)?(?![A-Za-z]))"
)
_SAID_SETS = {
    "\\emptyset": re.compile(
        r"(?:there (?:is|are) )?no (?:real )?solutions?(?: exists?)?|(?:the )?(?:empty|null) set|无解|空集", re.I
    ),
    r"(-\infty,\infty)": re.compile(r"all (?:the )?real(?:s| numbers)|全体实数", re.I),
    "does not exist": re.compile(r"DNE|doesn't exist|不存在", re.I),
    "undefined": re.compile(r"(?:is )?(?:undefined|not defined)|无定义|没有定义", re.I),
}
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d])")
_MIXED = re.compile(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])")
_SHORT_FRACTION = re.compile(r"\\[dt]?frac(?:\s*(\d)\s*([\dA-Za-z])|(?=\s*\{))")
_REPEATING = re.compile(
    r"(?<![\d.])(?P<whole>\d{0,30})\.(?P<once>\d{0,30})(?:\\(?:overline|bar|dot)\s*(?:\{\s*(?P<group>\d{1,30})\s*\}|(?P<digit>\d))"
    r"(?:(?P<between>\d{0,30})\\dot\s*\{?\s*(?P<last>\d)\s*\}?)?)(?!\d)"
)
_ORDINAL = re.compile(r"^(\d+)\s*(?:st|nd|rd|th)\b")
_SCALE = re.compile(r"(?<=[\d}])\s*(?:an?\s+)?(hundred|thousand|million|billion|trillion|dozen|万|亿)(?![A-Za-z])")
_SHORT_SCALE = re.compile(r"^(\\?[$€£]\s*[\d.,]+)\s*(k|m|mn|b|bn)$", re.IGNORECASE)
_SHORT = {"k": "thousand", "m": "million", "mn": "million", "b": "billion", "bn": "billion"}
_SCALES = {
    "hundred": "100",
    "dozen": "12",
    "thousand": "10^{3}",
    "million": "10^{6}",
    "billion": "10^{9}",
    "trillion": "10^{12}",
    "万": "10^{4}",
    "亿": "10^{8}",
}
_TRIG = re.compile(r"\\?(?<![A-Za-z])(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])(?!\s*\^\s*\{?\s*-)")
_TURN = re.compile(r"(\d+(?:\.\d+)?|(?<![A-Za-z\\])[A-Za-z]|\\[a-z]+)\s*°|(\))\s*°")
_INFINITY = re.compile(r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", re.IGNORECASE)


@lru_cache(maxsize=4096)
def tidy(answer: str) -> str:
    r"""An answer in the form that the comparisons read: signs of Unicode as LaTeX, `\text{}` and spacing gone, degrees
    as `°` (in trigonometric functions as a factor), ellipses as `\dots`, mixed numbers, roots and number words written
    out, no stop at the end."""
    if _PLAIN_NUMBER.fullmatch(answer):
        return answer
    answer = _DOLLARS.sub(r"\\$", answer.strip())
    text = _DRESS.sub(" ", unwrapped(unified(answer.strip("$").strip())))
    text = (
        _GREEK.sub(_greek, _SIGN.sub(lambda found: _SIGNS[found.group()], text)).replace("{,}", ",").replace("{}", "")
    )
    text = _DOTS.sub(r"\\dots ", _DEGREES.sub("°", text))
    text = in_signs(text.strip())
    text = _ROOT.sub(
        lambda found: f"\\sqrt{'' if found[1] == 'surd' else '[3]'}{{{found[2] or found[3] or found[4]}}}", text
    )
    text = _UNIT_VECTOR.sub(lambda found: f"{found[1] or found[2]} ", _TIMES.sub(r"\\times ", text))
    text = _PER_CENT.sub(lambda found: r" \cdot \frac{1}{10}\%" if found[1] else "%", _POWER.sub(r"^{\1}", text))
    text = _SHORT_FRACTION.sub(lambda found: rf"\frac{{{found[1]}}}{{{found[2]}}}" if found[1] else r"\frac", text)
    text = _REPEATING.sub(_repeating, text)
    text = _ABOUT.sub("", " ".join(text.split()).lstrip("= "))
    if found := _DECIMAL_COMMA.match(text):
        text = f"{found[1]}.{found[2]}{text[found.end() :]}"
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", _SPACED_THOUSANDS.sub(lambda found: found.group().replace(" ", ""), text))
    text = _ORDINAL.sub(r"\1", str(ORDINALS.get(text.lower(), numbered(text))))
    text = _INFINITY.sub(r"\\infty ", in_digits(on_the_clock(text)))
    text = next((sign for sign, said in _SAID_SETS.items() if said.fullmatch(text.rstrip(" ."))), text)
    text = _SHORT_SCALE.sub(lambda found: rf"{found[1]}\cdot {_SCALES[_SHORT[found[2].lower()]]}", text)
    text = _SCALE.sub(lambda found: rf"\cdot {_SCALES[found[1]]}", text)
    if "°" in text and _TRIG.search(text):
        text = _TURN.sub(
            lambda found: rf"({found[1]}\cdot\frac{{\pi}}{{180}})" if found[1] else r")\cdot\frac{\pi}{180}", text
        )
    return standard(with_direction(text.rstrip(".").strip().removesuffix("的") if text.rstrip(". ") else text))


def _repeating(found: re.Match[str]) -> str:
    """A repeating decimal as a fraction: `\\frac{1}{3}` for `0.\\overline{3}`."""
    before = found["whole"] + found["once"]
    again = (found["group"] or found["digit"]) + (found["between"] or "") + (found["last"] or "")
    above = int(before + again) - int(before or "0")
    return rf"\frac{{{above}}}{{{(10 ** len(again) - 1) * 10 ** len(found['once'])}}}"


def _greek(found: re.Match[str]) -> str:
    """`\\alpha ` for `α`, by the name that Unicode gives the letter."""
    name = unicodedata.name(found.group()).split()
    return f"\\{name[-1].lower().replace('lamda', 'lambda')} " if "SMALL" in name else found.group()
