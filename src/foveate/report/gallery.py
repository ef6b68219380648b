"""The report's gallery: held-out images with the true box and the predicted one at several steps.

An image is embedded once; boxes are vectors over it, so that steps are switched without another copy.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from foveate.data.answers import AnswerTurn, ScoredRow
from foveate.data.images import open_picture
from foveate.errors import DataError, one_line
from foveate.evaluate.draw import encode_jpeg
from foveate.evaluate.predictions import Evaluation, observed_path, thumbnail_path
from foveate.evaluate.turns import looks_of
from foveate.files import read_inside

PICTURE_BUDGET = 2_300_000
"""Bytes of all embedded pictures together, before base64 makes four of three."""
OBSERVED_BUDGET = 1_500_000
"""Bytes of all pictures that answers have observed."""
TEXT_BUDGET, PIECE_BUDGET = 700_000, 20_000
"""Characters of all questions and answers together, and tokens whose probability is shown."""
MAX_SIDE, MIN_SIDE = 400, 96
GALLERY_STEPS, MOST_FRAMES = 8, 1600
TEXT_LIMIT, LEAST_TEXT = 6000, 120


@dataclass(frozen=True, slots=True)
class ShownTurn:
    """One turn of an answer with several. `pictures` are data URIs of what was observed; `calls` are the names of
    tools, each with whether the call went wrong."""

    role: str
    thought: str
    said: str
    calls: tuple[tuple[str, bool], ...]
    reward: float | None
    pictures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GalleryFrame:
    """One row of the gallery at one step: `row` is None when that evaluation did not hold the row. `thought` is
    what stands in `<think>` tags, `said` the rest, both shortened to the room of the page; `pieces` are [text, p].
    `turns` are those of an answer with several, and `looks` the places of the first image that its calls looked at."""

    step: int
    thought: str
    said: str
    pieces: tuple[tuple[str, float], ...]
    row: ScoredRow | None
    outcome: str
    box: tuple[float, float, float, float] | None
    turns: tuple[ShownTurn, ...] = ()
    looks: tuple[tuple[float, float, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Card:
    """One row of the gallery. `picture` is a data URI or empty; `true_box` is the ground truth, or the part to look at,
    as x, y, width, height in thousandths; `tags` are those by which the rows differ."""

    row: ScoredRow
    picture: str
    width: int
    height: int
    true_box: tuple[float, float, float, float] | None
    frames: tuple[GalleryFrame, ...]
    tags: tuple[tuple[str, str], ...]

    @property
    def outcomes(self) -> str:
        return "".join(frame.outcome for frame in self.frames)


def gallery_cards(run_folder: Path, ids: Sequence[str], evaluations: Sequence[Evaluation]) -> tuple[Card, ...]:
    """The rows named by `ids`, in that order, as far as an evaluation holds them."""
    shown = spread(evaluations, max(2, min(GALLERY_STEPS, MOST_FRAMES // max(1, len(ids)))))
    by_step = [{row.id: row for row in evaluation.predictions} for evaluation in shown]
    known: dict[str, ScoredRow] = {}
    for rows in by_step:
        known |= {row_id: rows[row_id] for row_id in ids if row_id in rows}
    share = PICTURE_BUDGET // max(1, len(known))
    frames_in_all = max(1, len(known) * len(shown))
    room = (
        min(TEXT_LIMIT, max(LEAST_TEXT, TEXT_BUDGET // frames_in_all)),
        PIECE_BUDGET // frames_in_all,
        OBSERVED_BUDGET // frames_in_all,
    )
    telling = telling_tags(known.values())
    cards = []
    for row_id in ids:
        if row_id not in known:
            continue
        row = known[row_id]
        picture, width, height = embed_picture(thumbnail_path(run_folder, row_id), share)
        frames = tuple(
            _frame(run_folder, evaluation, rows.get(row_id), *room)
            for evaluation, rows in zip(shown, by_step, strict=True)
        )
        tags = tuple((name, value) for name, value in row.tags.items() if name in telling)
        cards.append(
            Card(
                row,
                picture,
                width,
                height,
                rectangle(row.look_box if row.shown.iou is None else row.ground_truth),
                frames,
                tags,
            )
        )
    return tuple(cards)


def _frame(
    run_folder: Path, evaluation: Evaluation, row: ScoredRow | None, text_room: int, piece_room: int, byte_room: int
) -> GalleryFrame:
    """Outcome "h" is a hit, right by half at least, "m" a miss, "n" neither: not defined, or the row was not asked."""
    if row is None:
        return GalleryFrame(evaluation.step, "", "", (), None, "n", None)
    answer = row.shown
    outcome = "n" if answer.right is None else "h" if answer.right >= 0.5 else "m"
    thought, said = split_thinking(answer.text)
    pieces = tuple((text, round(math.exp(logprob), 3)) for text, logprob in answer.logprobs[:piece_room])
    said, thought = shorten(said, text_room), shorten(thought, text_room)
    turns = _shown_turns(run_folder, answer.turns, text_room, byte_room)
    looks = tuple(shape for box in looks_of(answer.turns) if (shape := rectangle(box)) is not None)
    return GalleryFrame(evaluation.step, thought, said, pieces, row, outcome, rectangle(answer.box), turns, looks)


def _shown_turns(
    run_folder: Path, turns: Sequence[AnswerTurn], text_room: int, byte_room: int
) -> tuple[ShownTurn, ...]:
    """The turns of an answer in the room of the page: so many characters, and bytes of pictures, which are left out
    where there is no room for them."""
    images = sum(len(turn.images) for turn in turns)
    found: list[ShownTurn] = []
    for turn in turns:
        thought, said = (shorten(text, text_room // len(turns)) for text in split_thinking(turn.text))
        pictures = []
        for image in turn.images:
            path = observed_path(run_folder, image.path or "none")
            uri, *_ = embed_picture(path, byte_room // images)
            if uri and len(uri) <= 2 * byte_room // images:
                pictures.append(uri)
        calls = tuple((str(call.get("name", "?")), bool(call.get("error"))) for call in turn.calls)
        found.append(ShownTurn(turn.role, thought, said, calls, turn.reward, tuple(pictures)))
    return tuple(found)


def telling_tags(rows: Iterable[ScoredRow]) -> set[str]:
    """The names of the tags that have more than one value in these rows."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.tags.items():
            values.setdefault(name, set()).add(value)
    return {name for name, found in values.items() if len(found) > 1}


def split_thinking(text: str) -> tuple[str, str]:
    """The text of the first `<think>` section, one without an end included, and everything else."""
    before, opening, rest = text.partition("<think>")
    thought, _, after = rest.partition("</think>")
    return (thought.strip(), f"{before}{after}".strip()) if opening else ("", text)


def spread(evaluations: Sequence[Evaluation], count: int) -> tuple[Evaluation, ...]:
    """The first, the last, and evenly between them, `count` evaluations at most."""
    if len(evaluations) <= count:
        return tuple(evaluations)
    return tuple(evaluations[round(index * (len(evaluations) - 1) / (count - 1))] for index in range(count))


def rectangle(box: Sequence[float] | None) -> tuple[float, float, float, float] | None:
    """A box by its corners, in any order, as x, y, width, height."""
    if box is None:
        return None
    (left, right), (top, bottom) = sorted((box[0], box[2])), sorted((box[1], box[3]))
    return (left, top, right - left, bottom - top)


def embed_picture(path: Path, limit: int) -> tuple[str, int, int]:
    """A thumbnail as data URI, with its width and height: no longer than `MAX_SIDE` pixels, and made smaller until it
    takes at most `limit` bytes or would be shorter than `MIN_SIDE`. Without a file: an empty URI and a square. The file
    lies in a folder of the run; raises DataError for one that does not, or that is no picture."""
    if not path.exists():
        return "", 1, 1
    data = read_inside(path, path.parent.parent)
    try:
        return _embedded(data, limit)
    except (OSError, ValueError, SyntaxError) as error:  # of Pillow, and of a picture that is refused
        raise DataError(f"{path}: {one_line(error)}; delete the file, or let the run write it again") from error


def _embedded(data: bytes, limit: int) -> tuple[str, int, int]:
    with open_picture(data) as (image, _):
        width, height = image.size
        side = max(image.size)
        if side > MAX_SIDE:
            side, data = MAX_SIDE, encode_jpeg(image, MAX_SIDE, quality=85)
        while len(data) > limit and side > MIN_SIDE:
            # The bytes of a JPEG grow about with its pixels, so that mostly the first guess fits.
            side = max(MIN_SIDE, round(side * min(0.9, 0.97 * math.sqrt(limit / len(data)))))
            data = encode_jpeg(image, side, quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}", width, height


def shorten(text: str, room: int = 1200) -> str:
    """Text for the page: the marks of images removed, long answers shortened with a count of the missing characters."""
    plain = text.replace("<image>", "").strip()
    if len(plain) <= room:
        return plain
    return f"{plain[:room]} … ({len(plain) - room} more characters)"
