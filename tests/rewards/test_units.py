from __future__ import annotations

from fractions import Fraction

import pytest

from foveate.rewards.math import same_answer
from foveate.rewards.units import read_unit, split_unit


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("72 km/h", "20 m/s", True),
        ("72 km/h", "72 m/s", False),
        ("72", "72 km/h", True),
        ("3 kN", "3000 N", True),
        ("2 kg m/s^2", "2 N", True),
        ("2 kg m/s", "2 N", False),
        ("1 kWh", "3.6 MJ", True),
        ("2.7 g/cm^3", "2700 kg/m^3", True),
        (r"8.314\ \mathrm{J/(mol\cdot K)}", r"8.314\ \mathrm{J\,mol^{-1}\,K^{-1}}", True),
        (r"5\ \mu\text{m}", "0.005 mm", True),
        (r"2\text{ k}\Omega", "2000 ohms", True),
        ("25 °C", "77 °F", True),
        ("25 °C", "25 °F", False),
        ("25 °C", "298.15 K", True),
        ("3 m²", "30000 cm^2", True),
        ("2 hours", "120 minutes", True),
        ("15 meters per second", "15 m/s", True),
        ("4平方厘米", "4 cm²", True),
        ("3千克", "3000克", True),
        ("1.5 million dollars", r"\$1500000", True),
        ("1.5 million", "1.5", False),
        ("40°30'", "40.5°", True),
        (r"40^\circ 30^{\prime}", "40.5°", True),
        ("40°30'", "40.3°", False),
        ("40°30'36\"", "40.51°", True),
        ("4'6\"", "54 in", True),
        ("5‰", "0.5%", True),
        (r"\$3", "3 cents", False),
    ],
)
def test_units_are_converted_by_their_dimensions(answer, truth, same):
    assert same_answer(answer, truth) is same


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("7 chairs", "7", True),
        ("7 chairs", "7 chair", True),
        ("7 chairs", "7 tables", False),
        ("7 chairs", "7 cm", False),
        ("7 meters long", "700 cm", True),
        ("7 or more", "7", False),
        ("7 to 9", "7", False),
        ("7个", "7", True),
        ("7x", "7", False),
    ],
)
def test_words_behind_a_number_are_left_aside(answer, truth, same):
    assert same_answer(answer, truth) is same


def test_one_grammar_reads_products_of_powers():
    read = read_unit("kg·m^2/s^2")
    assert read is not None
    assert read[0].measure == (("g", 1), ("m", 2), ("s", -2))
    assert read[0].factor == 1000
    assert read_unit("apples") is None
    assert split_unit("5 m").unit == split_unit("5m").unit != split_unit("5 km").unit
    assert split_unit("5g").unit is None
    minute = split_unit("3 square feet per minute").unit
    assert minute is not None
    assert minute.measure == (("m", 2), ("s", -1))
    assert minute.factor == Fraction(381, 1250) ** 2 / 60


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("$8", "8 cents", False),
        ("€8", "$8", False),
        ("£8", r"\$8", False),
        (r"\$8", r"8\%", False),
        ("8%", "€8", False),
        ("8 cents", "$0.08", True),
        ("$8", "8 dollars", True),
        ("8 euros", "€8", True),
        ("8€", "€8", True),
        ("£8", "8 pounds", True),
        ("8 pounds", "3.62873896 kg", True),
        ("$2,400", "2400", True),
        ("€8", "8", True),
        ("$8$", "8 cents", True),
        ("8 cents", "€0.08", True),
        ("8¢", "$0.08", True),
        ("80 pence", "£0.80", True),
        ("3 pounds 20 pence", "£3.20", True),
        ("3 dollars and 20 cents", "$3.20", True),
        ("$8 per hour", "$8/h", True),
        ("$8 loss", "$8 profit", False),
        ("US$8", "8 USD", True),
    ],
)
def test_money_is_of_one_currency(answer, truth, same):
    assert same_answer(answer, truth) is same
