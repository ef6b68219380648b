"""The text of an answer while it grows, and the texts that stop it."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.serve.text import GrowingText

STORY = "A red square, 3 × 4 – «größer» 🙂🙃 … 中文字 <box>[[1, 2, 3, 4]]</box> end"


def bytes_of(text):
    return tuple(text.encode())


def decode(token_ids):
    """A tokenizer whose tokens are bytes: the hardest case, where most tokens end within a character."""
    return bytes(token_ids).decode(errors="replace")


def grow(token_ids, stops=()):
    growing, pieces = GrowingText(decode, stops), []
    for token in token_ids:
        pieces.append(growing.add(token))
        if growing.done:
            break
    return growing, [*pieces, growing.end()]


def test_pieces_are_the_text_and_no_piece_holds_half_of_a_character():
    growing, pieces = grow(bytes_of(STORY))
    assert "".join(pieces) == STORY == growing.whole()
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) == len(STORY), "a character is given out as soon as it is whole"


def test_bytes_that_are_no_text_come_out_as_in_the_whole():
    token_ids = tuple(np.random.default_rng(0).integers(0, 256, 400).tolist())
    assert "".join(grow(token_ids)[1]) == decode(token_ids)


@pytest.mark.parametrize(
    "stops", [["</box>"], ["[[1", "2, 3"], ["字 <"], ["end"], ["🙃"], ["A red"], ["nowhere", ", "]]
)
def test_a_stop_text_ends_the_answer_before_it_whatever_tokens_it_spans(stops):
    growing, pieces = grow(bytes_of(STORY), stops)
    places = [STORY.find(stop) for stop in stops if stop in STORY]
    assert "".join(pieces) == STORY[: min(places)] == growing.whole()
    assert growing.done


def test_the_beginning_of_a_stop_text_is_held_until_it_is_none():
    growing = GrowingText(decode, ["abcd", "bx"])
    said = [growing.add(token) for token in b"zabcabe"]
    assert said == ["z", "", "", "", "abc", "", "abe"]
    assert not growing.done
    assert [growing.add(token) for token in b"ab"] == ["", ""]
    assert growing.end() == "ab"


def test_a_stop_text_that_does_not_come_changes_nothing():
    growing, pieces = grow(bytes_of(STORY), ["endless", "<box>[[1, 2, 3, 5"])
    assert "".join(pieces) == STORY
    assert not growing.done
