r"""Answers that are words or names of points: letters that stand in an order and are no factors.

`SAS` is not `SSA` and `no` is not `on`, where a reader of mathematics sees products. A name keeps its letters in their
order, save where geometry gives it none: angle ABC is angle CBA, and segment or line AB is BA. The mark may be left out
(`AB` for `\overline{AB}`). Capitals with digits are a name, too: `CO2` is not `OC2`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from foveate.rewards.plain_text import plain, unwrapped

_MARKS = {
    "angle": r"m?\s*\\(?:angle|measuredangle)|m?\s*(?i:angle)",
    "triangle": r"\\(?:triangle|bigtriangleup|Delta)(?=\s*\{?[A-Z]{3})|(?i:triangle)",
    "segment": r"\\overline|(?i:(?:line )?segment|side)"
    r"|(?i:chord|diagonal|diameter|edge|hypotenuse|leg|median|radius)(?=\s+[A-Z])",
    "line": r"\\overleftrightarrow|\\overline(?=\{[a-z]\})|(?i:line)",
    "arrow": r"\\overrightarrow",
    "ray": "(?i:ray)",
    "vector": r"\\vec|(?i:vector)",
    "arc": r"\\(?:overset\{\\frown\}|widehat|overarc|wideparen|arc)|(?i:arc)",
    "circle": r"\\(?:odot|bigodot)|(?i:circle)",
    "plane": "(?i:plane)",
    "point": "(?i:point)",
    "quadrilateral": r"\\(?:square|Box)(?=\s*\{?[A-Z]{4})|(?i:quadrilateral)",
    **{name: f"(?i:{name})" for name in (
        "rectangle", "parallelogram", "trapezoid", "trapezium", "rhombus", "square", "kite", "pentagon", "hexagon",
    )},
}  # fmt: skip
_SAID_TWICE = re.compile(
    r"(?:the\s+)?(?P<noun>angle|triangle|(?:line\s+)?segment|side|chord|diagonal|diameter|edge|hypotenuse|leg|median|radius"
    r"|line|ray|vector|arc|circle)\s+(?=\\)",
    re.IGNORECASE,
)
"""A noun before the sign that says it again: `the segment \\overline{AB}`."""
_NOUNS = {"line": ("line", "segment"), "ray": ("arrow",), "vector": ("arrow", "vector")} | {
    noun: (noun,) for noun in ("angle", "triangle", "arc", "circle")
}
_ALIKE = ({"arrow", "ray"}, {"arrow", "vector"})
"""An arrow over two points is that of a ray or of a vector."""
_VERTEX = r"[A-Z](?:_\{?\d+\}?|'+|\^\{\\prime\})?"
_NAME = re.compile(
    "(?:" + "|".join(f"(?P<{mark}>{pattern})" for mark, pattern in _MARKS.items()) + r")?\s*(?P<brace>\{)?\s*"
    rf"(?P<letters>(?:{_VERTEX}\s*)+|[a-z0-9](?=\s*\}}?$))(?(brace)\}})"
)
_COUNT = r"(?:_?\{?\d+\}?)?"
_FORMULA = re.compile(
    r"(?:(?=[\d\s]*[A-Za-z()]+_?\{?\d)(?=(?:[^A-Z]*[A-Z]){2})|(?=.*[+-]\}?$))(?:\d+\s*)?"
    rf"(?:[A-Z][a-z]?\s*{_COUNT}|\((?:[A-Z][a-z]?{_COUNT})+\){_COUNT})+(?:\s*\^?\{{?\d?[+-]\}}?)?"
)
"""Capitals with digits between or behind them, such as `H_2SO_4`."""
_SHELLS = re.compile(
    r"sp\^?\{?\d?\}?(?:d\^?\{?\d?\}?)?|(?:\[\s*[A-Z][a-z]\s*\]\s*)?(?:\d[spdf]\s*\^?\s*\{?\d{1,2}\}?\s*){1,20}"
)
"""Shells of electrons, `1s^2 2s^2 2p^6`, and `sp^3`."""
_PLURALS = {
    "child": "children", "foot": "feet", "goose": "geese", "half": "halves", "knife": "knives", "leaf": "leaves",
    "man": "men", "mouse": "mice", "person": "people", "radius": "radii", "tomato": "tomatoes", "tooth": "teeth",
    "vertex": "vertices", "axis": "axes", "wolf": "wolves", "woman": "women", "potato": "potatoes",
    "matrix": "matrices",
}  # fmt: skip
_SPELLINGS = {
    "centre": "center", "colour": "color", "grey": "gray", "metre": "meter", "litre": "liter", "theatre": "theater",
    "rightangled": "right", "aluminium": "aluminum", "sulphur": "sulfur", "neighbour": "neighbor", "harbour": "harbor",
}  # fmt: skip
_STATES = {
    "us": "unitedstates", "usa": "unitedstates", "unitedstatesofamerica": "unitedstates", "uk": "unitedkingdom",
    "uae": "unitedarabemirates",
}  # fmt: skip
_CRITERIA = frozenset(("sss", "sas", "asa", "aas", "saa", "ssa", "aaa", "aa", "hl", "ll", "la", "ha"))
"""Criteria of congruence and similarity, by the initials of side, angle, hypotenuse and leg."""
_PARTS = re.compile(r"^(?:side|angle|hypotenuse|leg){2,3}")
_INITIALS = re.compile(r"(?:[A-Z]\.\s?)+[A-Z]\.?")
_SPELLING = re.compile("|".join(_SPELLINGS))
"""British spellings, as `_squeezed` leaves them, and the American ones."""
_NO_PLURALS = frozenset(("news", "means", "goods", "glasses", "seconds", "always", "besides", "afterwards"))
"""Words that only look like the plural of another one."""
_RELATION = re.compile(r"\\(cong|sim|parallel|perp|simeq)(?![A-Za-z])")
_RUN = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+")
_APART = re.compile(r"(?<!\S)[A-Za-z]{2,}(?![^\s,.;!?])")
_WORDS = re.compile(r"[A-Za-z]+(?:(?:[\s'-]+|(?<=[A-Za-z]{2})/(?=[A-Za-z]{2}))[A-Za-z]+)*[.!]?")
_SAYABLE = re.compile(r"[aeiouy]", re.IGNORECASE)
_VOWEL = re.compile(r"[aeiou]", re.IGNORECASE)
_SEGMENTS = re.compile(
    r"_\{[^{}]*\}|\\(?P<mark>angle|measuredangle|triangle|overline|overrightarrow|vec)\s*\{?(?P<marked>[A-Z]{1,4})\}?"
    r"|(?<![\\A-Za-z_])(?P<letters>[A-Z]{2,})(?![A-Za-z])"
)
_FACTOR = re.compile(r"([A-Z])(?:\s*\^\s*\{?\s*(-?\d|T)\s*\}?)?")
_PRODUCT = re.compile(rf"(?<![\\A-Za-z_{{^])(?:{_FACTOR.pattern}\s*){{2,9}}(?![A-Za-z_^'(])")
_BEFORE, _BEHIND = frozenset("+-*/^=<>({_,|\\"), frozenset("+-*/^=<>(_,|!")
_OPENING = re.compile(r"\b(?:(?:it|this|that)(?:'s|\s+is)\s+)?(?:an?|the)\s+(?=\w[\w-])")
_CLASS = re.compile(
    r"(?:triangle|quadrilateral|polygon|prism|pyramid|angle|number|function|equation|solution|theorem|property|postulate|criterion"
    r"|congruence|similarity|(?:congruence|similarity)(?:theorem|postulate|criterion|rule))s?"
)
_TRIANGLE = re.compile(r"triangle|△|三角形", re.IGNORECASE)
_SENTENCES = re.compile(r"[.?!](?=\s|$)|[。？！\n]")
_REQUEST = re.compile(
    r"(?:(?<!\bin )(?<!\bof )(?<!\bat )(?<!\bto )(?<!\bfor )(?<!\bfrom )"
    r"\b(?:which|what|name|identify|find|give|state|write|list|order|arrange|rank|determine)\b.*|\A.*(?:哪|写出|找出|指出).*)",
    re.IGNORECASE | re.DOTALL,
)
_FIGURE = re.compile(
    r"(?P<segment>(?<![A-Za-z])(?:(?:mid)?segments?|sides?|chords?|diameters?|hypotenuses?|radi(?:us|i)|edges?|diagonals?|legs?"
    r"|medians?)(?![A-Za-z])|线段|边(?!形)|弦|直径|半径|棱(?![锥柱台]))"
    r"|(?<![A-Za-z])(?:angle|triangle|polygon|quadrilateral|ray|vector|arc|line(?!\s+segment)|plane|point|figure|shape"
    r"|rectangle|parallelogram|square|circle|vert(?:ex|ice))s?(?![A-Za-z])(?!['’]s|\s+(?:sides?|edges?|segments?)\b)"
    r"|[角弧点]|边形|射线|直线|向量",
    re.IGNORECASE,
)
"""The figures that a question may ask for: segments, and others."""
_DIRECTED = re.compile(
    r"\b(?:rays?|vectors?|arrows?|direct(?:ed|ions?)|displacements?|paths?|polygons?)\b|射线|向量|方向", re.IGNORECASE
)
_CORRESPONDENCE = re.compile(r"congru|similar|\\(?:cong|sim)|[≅≌∼∽]|全等|相似", re.IGNORECASE)
_ELEMENTS = frozenset(
    re.findall(
        "[A-Z][a-z]?",
        "HHeLiBeBCNOFNeNaMgAlSiPSClArKCaScTiVCrMnFeCoNiCuZnGaGeAsSeBrKrRbSrYZrNbMoTcRuRhPdAgCdInSnSbTeIXeCsBaLaCePrNdPm"
        "SmEuGdTbDyHoErTmYbLuHfTaWReOsIrPtAuHgTlPbBiPoAtRnFrRaAcThPaUNpPuAmCmBkCfEsFmMdLrRfDbSgBhHsMtDsRgCnNhFlMcLvTsOg",
    )
)
_ATOMS = re.compile(r"([A-Z][a-z]?)(\d*)")
FUNCTIONS = frozenset((
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log",
    "ln", "lg", "exp", "sqrt", "max", "min", "gcd", "lcm", "det", "mod", "lim", "pi", "theta", "alpha", "beta",
    "gamma", "delta", "epsilon", "lambda", "mu", "sigma", "phi", "omega", "rho", "tau", "infty", "cdot",
    "times", "frac",
))  # fmt: skip
"""Names of LaTeX that are no words where they stand without a backslash."""


@dataclass(frozen=True, slots=True)
class Name:
    """A mark, such as "angle" or none, and the vertices behind it in their order."""

    mark: str
    letters: tuple[str, ...]

    def same(self, other: Name, free_triangles: bool, as_line: bool = False) -> bool:
        """Whether two names mean the same. A mark may be missing on one side; on both, two points are a line if
        `as_line` says so."""
        mark = self.mark or other.mark or ("line" if as_line and len(self.letters) == 2 else "")
        if self.mark and other.mark and self.mark != other.mark and {self.mark, other.mark} not in _ALIKE:
            return False
        either = {self.letters, self.letters[::-1]} if mark in ("angle", "segment", "line", "arc") else {self.letters}
        if mark == "triangle" and free_triangles:
            return sorted(self.letters) == sorted(other.letters)
        return other.letters in either


@dataclass(frozen=True, slots=True)
class Wording:
    """An answer that is no mathematics: one name, a statement about two (`AB \\parallel CD`), or words."""

    names: tuple[Name, ...] = ()
    relation: str = ""
    words: str = ""

    @property
    def spoken(self) -> str:
        """The words, or the letters of a name without a mark."""
        letters = "".join("".join(name.letters) for name in self.names if not name.mark).casefold()
        return self.words or _STATES.get(letters, letters)

    def same(self, other: Wording, free_triangles: bool) -> bool:
        """Whether two of them say the same. Parallel and perpendicular lines have no order; congruent and similar
        figures name their vertices in pairs."""
        if self.relation == other.relation == "" and bool(self.words) != bool(other.words):
            states = {self.spoken, other.spoken}
            known = _CRITERIA.union(_STATES.values())
            return (len(states) == 1 and states <= known) or _same_class(self.spoken, other.spoken)
        if self.relation != other.relation or len(self.names) != len(other.names):
            return False
        if self.words != other.words and not _same_class(self.words, other.words):
            return False
        if self.relation in ("cong", "sim", "simeq") and all(len(one.letters) > 2 for one in self.names):
            pairs = [set(zip(*(name.letters for name in side.names), strict=False)) for side in (self, other)]
            marks = [{one.mark, another.mark} - {""} for one, another in zip(self.names, other.names, strict=True)]
            return pairs[0] == pairs[1] and all(len(both) < 2 for both in marks)
        orders = [other.names] if self.relation not in ("parallel", "perp") else [other.names, other.names[::-1]]
        return any(
            all(a.same(b, free_triangles, bool(self.relation)) for a, b in zip(self.names, order, strict=True))
            for order in orders
        )


def wording(text: str, question: str) -> Wording | None:
    """A tidy answer as names or words, or None for mathematics. Letters that the question uses as variables are
    factors."""
    parts = _RELATION.split(text)
    if len(parts) == 3:
        sides = [_name(part) for part in parts[::2]]
        if sides[0] and sides[1]:
            return Wording((sides[0], sides[1]), parts[1])
        return Wording(words=_squeezed(text))
    name = _name(text)
    if name is not None and (name.mark or len(name.letters) > 1):
        return Wording((name,))
    if _FORMULA.fullmatch(text.strip()) or _SHELLS.fullmatch(text.strip()):
        return Wording(words=re.sub(r"[\s_{}^]", "", text))
    if _INITIALS.fullmatch(text):
        return Wording(words=_squeezed(text))
    if not _WORDS.fullmatch(text.strip()):
        return None
    runs = _RUN.findall(text)
    if len(runs) == 1 and (len(runs[0]) == 1 or runs[0] in FUNCTIONS or _is_product(runs[0], question)):
        return None
    return Wording(words=_squeezed(text))


def _is_product(run: str, question: str) -> bool:
    """Whether letters in a row are variables: nobody can say them, or the question has each as a letter apart. Capitals
    alone are a name, and elements a formula."""
    if not run.islower():
        return not (run.isupper() or _SAYABLE.search(run) or set(re.findall("[A-Z][a-z]?|[a-z]", run)) <= _ELEMENTS)
    alone = set(re.findall(r"(?<![A-Za-z\\])[a-z](?![A-Za-z])", question))
    return not _VOWEL.search(run) or set(run) <= alone


def _same_class(one: str, other: str) -> bool:
    """Whether one of two words names the class that the other leaves out: `isosceles triangle` and `isosceles`."""
    short, long = sorted((one, other), key=len)
    return bool(short) and long.startswith(short) and _CLASS.fullmatch(long, len(short)) is not None


def _squeezed(text: str) -> str:
    squeezed = re.sub(r"[\s'.-]+", "", _OPENING.sub("", text.casefold()))
    squeezed = _PARTS.sub(_initials, squeezed)
    return _STATES.get(squeezed) or _SPELLING.sub(lambda found: _SPELLINGS[found.group()], squeezed)


def _initials(found: re.Match[str]) -> str:
    initials = "".join(word[0] for word in re.findall("side|angle|hypotenuse|leg", found.group()))
    return initials if initials in _CRITERIA else found.group()


def criterion(text: str) -> str:
    """The initials of a criterion of congruence or similarity, `sas` for `SAS` and for `Side-Angle-Side`; else ""."""
    said = _squeezed(text)
    return said if said in _CRITERIA else ""


def _name(text: str) -> Name | None:
    text = text.strip()
    if said := _SAID_TWICE.match(text):
        name, noun = _name(text[said.end() :]), said["noun"].lower()
        marks = _NOUNS.get(noun, ("segment",))
        return Name(noun if noun in _MARKS else marks[0], name.letters) if name and name.mark in marks else None
    found = _NAME.fullmatch(text.removeprefix("the "))
    if found is None:
        return None
    mark = next((mark for mark in _MARKS if found[mark]), "")
    letters = re.findall(_VERTEX, found["letters"]) or [found["letters"].strip()]
    if not mark and " " in found["letters"].strip():
        return None
    return Name(mark, tuple(letter.replace("{", "").replace("}", "") for letter in letters))


def same_plain(one: str, other: str) -> bool:
    """Whether two answers are one in plain form. Letter case matters only between two formulas of elements: `CO` is
    not `Co`, but `NACL` can only be `NaCl`."""
    if plain(one) != plain(other):
        return False
    atoms = [_atoms(text) for text in (one, other)] if one != other else []
    return not all(atoms) or atoms[:1] == atoms[1:]


def _atoms(text: str) -> list[tuple[str, str]]:
    """The elements of a formula with a count, or of two letters, and their counts; none for any other text."""
    bare = re.sub(r"[\s_{}$.]", "", unwrapped(text))
    found = _ATOMS.findall(bare)
    short = len(bare) == 2 or any(count for _, count in found)
    known = all(symbol in _ELEMENTS for symbol, _ in found) and "".join(map("".join, found)) == bare
    return found if short and known else []


def asks_for_segment(question: str) -> bool:
    """Whether a question asks for a segment, which is named by its ends in either order: the figure that its last
    request names first is a side, a chord, ..., and nothing in the request has a direction."""
    requests = [found.group() for sentence in _SENTENCES.split(question) if (found := _REQUEST.search(sentence))]
    figure = _FIGURE.search(requests[-1]) if requests else None
    return figure is not None and figure["segment"] is not None and not _DIRECTED.search(requests[-1])


def has_words(text: str) -> bool:
    """Whether words stand between the mathematics of an answer: `not 8`, `n is even`. A run of letters is one if it
    stands apart, a vowel is in it, and neither an operator nor a bracket beside it."""
    for found in _APART.finditer(text):
        run = found.group()
        before, after = text[: found.start()].rstrip()[-1:], text[found.end() :].lstrip()[:1]
        said = run != text.strip() and not run.isupper() and run not in FUNCTIONS and _SAYABLE.search(run)
        if said and before not in _BEFORE and after not in _BEHIND:
            return True
    return False


def with_names_as_symbols(text: str) -> str:
    """Mathematics in which every name of points is one symbol: the length AB is no A times B. A segment has no order,
    neither has an angle from its ends. A product of capitals with exponents keeps its order, too, as one of matrices
    does: `A^2B` is `AAB` and not `BA^2`."""
    return _SEGMENTS.sub(_symbol, _PRODUCT.sub(_ordered_product, text))


def _ordered_product(found: re.Match[str]) -> str:
    """Capitals of which one but the last has an exponent, as one symbol with a letter for each factor."""
    factors = _FACTOR.findall(found.group())
    if not any(exponent for _, exponent in factors[:-1]):
        return found.group()
    letters = "".join(
        letter + "t" if exponent == "T" else (letter + "i" * exponent.startswith("-")) * abs(int(exponent or 1))
        for letter, exponent in factors
    )
    return found.group() if len({letter for letter, _ in factors}) == 1 else rf" Q_{{{letters}}} "


def _symbol(found: re.Match[str]) -> str:
    letters = found["marked"] or found["letters"]
    if letters is None:
        return found.group()
    if found["mark"] in (None, "overline", "angle", "measuredangle") and letters[0] > letters[-1]:
        letters = letters[::-1] if found["mark"] or len(letters) == 2 else letters
    mark = found["mark"] if found["mark"] not in (None, "overline") else ""
    if mark in ("overrightarrow", "vec") and len(letters) == 2:
        turned = letters[0] > letters[1]  # the vector BA is minus AB
        return rf" (-Q_{{vec{letters[::-1]}}}) " if turned else rf" Q_{{vec{letters}}} "
    return rf" Q_{{{mark}{letters}}} "


def same_wording(given: str, wanted: str, question: str) -> bool | None:
    """Whether two answers say the same, if one of them at least is a name or words; None if both are mathematics."""
    one, other = wording(given, question), wording(wanted, question)
    if one is None and other is None:
        return None
    names = [_name(text) for text in (given, wanted)]
    free = bool(_TRIANGLE.search(question)) and not _CORRESPONDENCE.search(question)
    if names[0] and names[1]:
        return names[0].same(names[1], free, asks_for_segment(question))
    if one is None or other is None:
        return False
    if one.same(other, free):
        return True
    return (given[:1].islower() or wanted[:1].islower()) and _same_noun(one.words, other.words)


def _same_noun(one: str, other: str) -> bool:
    """Whether one of two nouns is the plural of the other."""
    short, long = sorted((one, other), key=len)
    if len(short) < 3 or long in _NO_PLURALS:
        return False
    ending = "es" if re.search("(?:s|x|z|ch|sh)$", short) else "s"
    return long in (short + ending, _PLURALS.get(short)) or (short.endswith("y") and long == short[:-1] + "ies")
