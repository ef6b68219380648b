"""What an answer says as a sentence, with a remark, or as a phrase around its value; and what it does not say."""

from __future__ import annotations

import pytest

from foveate.records import Message, Task
from foveate.rewards.math import math_reward, same_answer

SAID = [
    ("The pH of the solution is 3.5.", "3.5", "3.6"),
    ("Therefore, the two cars meet after **four** hours.", "4", "5"),
    ("I count 9 birds.", "9", "10"),
    ("No, they are not parallel.", "no", "yes"),
    ("正确，因为两条直线平行。", "正确", "错误"),
    ("The lowest bar is for Peru, since it ends at 12.", "Peru", "Chile"),
    ("2020年的产量达到 35 万。", "35万", "2020"),
    ("Thus y is 5.", "y = 5", "x = 5"),
    (r"\sqrt{3} \approx 1.732", r"\sqrt{3}", r"\sqrt{2}"),
    ("calcium carbonate (CaCO3)", "CaCO3", "CaO"),
    ("0.2 (or 1/5)", "1/5", "1/2"),
    ("12 (cm)", "12 cm", "12 m"),
    ("The price fell by 12%.", "a decrease of 12%", "an increase of 12%"),
    ("30% less", "-30%", "30% more"),
    ("4 N, directed upwards", "4 N up", "4 N down"),
    ("to the left", "left", "right"),
    ("3 cm by 7 cm", r"3 cm \times 7 cm", "7 cm by 3 cm"),
    ("the origin", "(0, 0)", "(0, 1)"),
    (r"3\hat{i} - \hat{k}", "(3, 0, -1)", "(3, -1, 0)"),
    (
        "[[1, 0], [2, 5]]",
        r"\begin{pmatrix} 1 & 0 \\ 2 & 5 \end{pmatrix}",
        r"\begin{pmatrix} 1 & 2 \\ 0 & 5 \end{pmatrix}",
    ),
    (r"\begin{cases} x = 4 \\ y = 1 \end{cases}", "(4, 1)", "(1, 4)"),
    ("80p", "£0.80", "80%"),
    ("€7,25", "€7.25", "€725"),
    (r"\mathrm{Mg}^{2+}", "Mg2+", "Mg+"),
    (r"2\text{H}_2 + \text{O}_2 \rightarrow 2\text{H}_2\text{O}", "2H2 + O2 -> 2H2O", "H2 + O2 -> H2O"),
    ("ten minutes past nine", "9:10", "10:09"),
    ("a quarter to eight in the evening", "7:45 pm", "8:15 pm"),
    ("2021-12-24", "December 24, 2021", "December 12, 2021"),
    ("from 1990 to 1999", "1990-1999", "1990-1998"),
    ("1小时15分钟", "75 min", "115 min"),
    ("7 out of 8", "7/8", "8/7"),
    ("third", "3rd", "2nd"),
    (r"3\% \text{ per year}", r"3\%", r"0.3\%"),
    ("radius 3", "3", "4"),
    ("on Sunday", "Sunday", "Saturday"),
    ("all real numbers except 2", r"x \ne 2", r"x \ne -2"),
    ("10^-12", "10^{-12}", "10^{-1}"),
    ("ASA congruence", "ASA", "AAS"),
    ("CO", r"\text{CO}", "Co"),
    ("15 C", "15 °C", "15 K"),
    ("Completing the square gives the vertex $V\\left(3;7\\right)$.", "(3, 7)", "(7, 3)"),
    ("The midpoint is $M(1,5;2,5)$.", "(1.5, 2.5)", "(1, 5)"),
    ("Taking roots, $x = 7$ or $x = -7$.", r"\pm 7", "7"),
    ("By Pythagoras, c = 17.", "17", "13"),
    ("They meet at (3, 7).", "(3, 7)", "(7, 3)"),
    ("Solving yields $n = 12$.", "12", "-12"),
    ("It is opposite the right angle, so it is the side $\\overline{TS}$.", "ST", "SR"),
    ("Angles 1 and 5 are equal, thus $\\frac{4}{10} = \\frac{2}{5}$.", "2/5", "2/4"),
    ("The speed is 36 km/h (10 m/s).", "10 m/s", "36 m/s"),
    ("So the path is 5 km (5000 m).", "5000 m", "500 m"),
    ("The integral is $x^3 + C$, where C is a constant.", "x^3 + C", "x^2 + C"),
    ("All sides are equal, so it is rhombus $PQRS$ (a special kite).", "PQRS", "PRQS"),
    ("各角相等，所以这个说法是正确的。", "正确", "错误"),
    ("它们不相似，所以这个结论不正确。", "不正确", "正确"),
    ("The point lies in the third quadrant.", "Quadrant III", "Quadrant IV"),
    ("the second row", "row 2", "row 3"),
    (r"5\log_e 3", r"5\ln 3", r"5\log 3"),
    ("Cherries", "cherry", "berry"),
    ("the line segment $\\overline{BA}$", "AB", "BC"),
    (r"\vec{AB}", r"\overrightarrow{AB}", r"\overrightarrow{BA}"),
    (r"-\overrightarrow{BA}", r"\overrightarrow{AB}", r"\overrightarrow{BA}"),
    ("rectangle ABCD", "ABCD", "trapezoid ABCD"),
    ("the colour grey", "color gray", "color green"),
]


@pytest.mark.parametrize(("answer", "truth", "other"), SAID)
def test_an_answer_says_its_value_and_no_other(answer, truth, other):
    for wanted, value in ((truth, 1.0), (other, 0.0)):
        task = Task("t", "s", (Message("user", "What is it?"),), (), wanted, {}, "row 0")
        assert math_reward(answer, task, extraction="text").value == value, wanted
        assert math_reward(rf"\boxed{{{answer}}}", task).value == value, wanted


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("It is not 8.", "8"),
        ("It is more than 8.", "8"),
        ("I count at least 8 birds.", "8"),
        ("x + 8", "8"),
        ("There is no need for 8 of them, only for 5.", "8"),
        ("on the table", "in the table"),
        (r"8 \pmod{5}", "8"),
        ("8 (not 9)", "9"),
        ("angle 8", "8°"),
        (r"8\% \text{ per month}", r"8\% \text{ per year}"),
        ("2x = 8", "8"),
        ("The side is left of $8$", "8"),
        ("It is below $y = 8$.", "y = 8"),
        ("If this is so, then without $8$.", "8"),
        ("The speed is 8 m/s (20 km/h).", "20 km/h"),
        ("The angle is 8°, so the other one is 82°.", "8"),
        ("Lengths are positive, and we reject $x = 8$.", "8"),
        ("This contradicts $x = 8$.", "8"),
        ("Initially, x = 8.", "8"),
        ("It fails for 8.", "8"),
        ("8_1", "9_1"),
        ("A_1", "A"),
        ("Adams", "Adam"),
        ("the news", "new"),
        ("Either 9 or\n8", "8"),
        ("ray AB", "vector AB"),
    ],
)
def test_other_words_say_nothing(answer, truth):
    task = Task("t", "s", (Message("user", "What is it?"),), (), truth, {}, "row 0")
    assert math_reward(answer, task, extraction="text").value == 0
    assert not same_answer(answer, truth)
