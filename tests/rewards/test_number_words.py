from __future__ import annotations

import pytest

from foveate.rewards.math import same_answer
from foveate.rewards.number_words import in_digits


@pytest.mark.parametrize(
    ("text", "digits"),
    [
        ("forty-seven", "47"),
        ("nine hundred and six", "906"),
        ("three thousand forty", "3040"),
        ("a hundred", "100"),
        ("two thirds", r"\frac{2}{3}"),
        ("half an hour", r"\frac{1}{2} hour"),
        ("three quarters of an hour", r"\frac{3}{4} hour"),
        ("four and a half days", r"4\frac{1}{2} days"),
        ("minus eight", "-8"),
        ("an hour", "1 hour"),
        ("三百零五", "305"),
        ("两个", "2个"),
        ("四分之三", r"\frac{3}{4}"),
        ("百分之八", r"8\%"),
        ("七成", r"70\%"),
    ],
)
def test_a_number_in_words_at_the_start_becomes_digits(text, digits):
    assert in_digits(text) == digits


@pytest.mark.parametrize("text", ["half-life", "third", "a square", "三角形", "四边形", "negative", "oneness", "一样"])
def test_a_word_that_begins_like_a_number_stays(text):
    assert in_digits(text) == text


def test_half_an_hour_is_thirty_minutes_and_not_thirty():
    assert same_answer("half an hour", "30 min")
    assert not same_answer("half an hour", "30")
