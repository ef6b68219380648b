"""A run folder as training leaves it, made up: for tests of what reads one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

from foveate.data.answers import ImageReference, ScoredAnswer, ScoredRow
from foveate.evaluate.draw import save_thumbnail
from foveate.evaluate.predictions import (
    thumbnail_path,
    write_evaluation,
    write_gallery,
    write_skipped,
)

COLOURS = {"red": "#d64545", "blue": "#3a66d6", "green": "#3ba55d", "yellow": "#e8b93a"}
RELATIONS = ("left", "right", "above", "below")


def make_run(folder: Path, steps: int = 60, rows: int = 40, photographs: bool = False, seed: int = 0) -> Path:
    """A run folder as training leaves it: a policy that learns to choose the right one of two like objects."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [make_scene(f"test-{index:04d}", rng, photographs) for index in range(rows)]
    luck = [rng.random() for _ in scenes]
    for step in range(0, steps + 1, max(1, steps // 3)):
        skill = 0.41 + 0.28 * (1 - math.exp(-3 * step / steps))
        predictions = [
            make_prediction(scene, distractor, relation, chance, skill, rng)
            for (scene, distractor, relation, _), chance in zip(scenes, luck, strict=True)
        ]
        write_evaluation(folder, step, predictions)
    for scene, _, _, picture in scenes:
        save_thumbnail(picture, thumbnail_path(folder, scene.id))
    write_gallery(folder, [scene.id for scene, *_ in scenes])
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(make_step(step, steps, rng)) + "\n" for step in range(1, steps + 1))
    )
    (folder / "config.yaml").write_text(
        "model: assets/tiny\nalgorithm: gspo\nloss:\n  clip_low: 0.0003\n  clip_high: 0.0004\n"
    )
    (folder / "versions.json").write_text(json.dumps({"foveate": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0"}))
    (folder / "notes.txt").write_text(
        "The cold start was trained on labels that are right in 40 % of the scenes and otherwise name the larger of "
        "the two like objects.\nReinforcement learning has to unlearn that shortcut; no new labels are involved.\n"
    )
    write_skipped(folder, ["train.parquet, row 17, field images: pictures/17.png is missing; restore the file"])
    return folder


def make_scene(
    row_id: str, rng: random.Random, photograph: bool
) -> tuple[ScoredRow, Sequence[float], str, Image.Image]:
    """A row without answers, the box of the object that it could be mistaken for, and the picture."""
    size = rng.choice([(640, 427), (427, 640), (480, 360)]) if photograph else (112, 112)
    colour, relation = rng.choice(list(COLOURS)), rng.choice(RELATIONS)
    near, far = (round(rng.uniform(60, 160)), round(rng.uniform(560, 640)))
    side = [round(rng.uniform(180, 330)) for _ in range(2)]
    across = [round(rng.uniform(80, 600)) for _ in range(2)]
    boxes = [
        [start, other, start + width, other + width]
        if relation in ("left", "right")
        else [other, start, other + width, start + width]
        for start, other, width in zip((near, far), across, side, strict=True)
    ]
    target, distractor = boxes if relation in ("left", "above") else reversed(boxes)
    picture = Image.new("RGB", size, (236, 234, 228))
    pen = ImageDraw.Draw(picture)
    if photograph:
        for y in range(0, size[1], 3):
            pen.line(
                (0, y, size[0], y + rng.randint(-30, 30)), fill=tuple(rng.randint(90, 220) for _ in range(3)), width=3
            )
    for box in (target, distractor):
        scaled = [value * size[axis % 2] / 1000 for axis, value in enumerate(box)]
        pen.ellipse(scaled, fill=COLOURS[colour])
    question = f"<image>\nWhere is the {colour} circle {relation} of the other one? Answer with its box."
    row = a_row(row_id, question=question, answer=target, width=size[0], height=size[1], tags={"relation": relation})
    return row, distractor, relation, picture


def make_prediction(
    scene: ScoredRow, distractor: Sequence[float], relation: str, luck: float, skill: float, rng: random.Random
) -> ScoredRow:
    ease = {"left": 0.1, "right": 0.05, "above": -0.05, "below": -0.12}[relation]
    truth = scene.ground_truth
    box, iou = jittered(truth if luck < skill + ease else distractor, truth, rng)
    if luck > 0.97:
        silent = an_answer("I cannot tell.", 0.0, iou=0.0, hit=False)
        return replace(scene, answers=(replace(silent, greedy=True), silent))
    drawn = [jittered(truth if rng.random() < skill - 0.04 else distractor, truth, rng) for _ in range(8)]
    sampled = [an_answer(as_text(guess), overlap, iou=overlap, hit=overlap >= 0.5) for guess, overlap in drawn]
    greedy = an_answer(as_text(box), iou, iou=iou, hit=iou >= 0.5, box=tuple(box), greedy=True)
    return replace(scene, answers=(greedy, *sampled))


def jittered(box: Sequence[float], true: Sequence[float], rng: random.Random) -> tuple[list[int], float]:
    guess = [round(min(1000, max(0, value + rng.gauss(0, 16)))) for value in box]
    width = min(guess[2], true[2]) - max(guess[0], true[0])
    height = min(guess[3], true[3]) - max(guess[1], true[1])
    shared = max(0, width) * max(0, height)
    areas = sum((one[2] - one[0]) * (one[3] - one[1]) for one in (guess, true))
    return guess, shared / (areas - shared)


def as_text(box: Sequence[float]) -> str:
    return f"<box>[[{', '.join(str(value) for value in box)}]]</box>"


def make_step(step: int, steps: int, rng: random.Random) -> dict[str, float | None]:
    gain = 1 - math.exp(-3 * step / steps)
    return {
        "step": step,
        "reward/mean": 0.38 + 0.22 * gain + rng.gauss(0, 0.02),
        "reward/std": 0.3 - 0.05 * gain + rng.gauss(0, 0.01),
        "reward/iou": 0.36 + 0.2 * gain + rng.gauss(0, 0.02),
        "reward/hit": 0.4 + 0.25 * gain + rng.gauss(0, 0.025),
        "reward/parsed": min(1, 0.98 + rng.gauss(0, 0.01)),
        "reward/failed": 0.0,
        "answer/length": 14 + rng.gauss(0, 0.4),
        "answer/length_max": 18 + rng.randint(0, 6),
        "answer/truncated": max(0.0, rng.gauss(0, 0.004)),
        "loss/policy": rng.gauss(0, 0.003),
        "loss/approx_kl": abs(rng.gauss(0, 1e-4)),
        "loss/entropy": 0.9 - 0.4 * gain + rng.gauss(0, 0.015),
        "loss/clip_fraction": min(1, max(0, 0.3 * gain + rng.gauss(0, 0.04))),
        "loss/ratio_max": 1 + abs(rng.gauss(0, 0.0008)),
        "loss/ratio_min": 1 - abs(rng.gauss(0, 0.0008)),
        "engine/logprob_difference": abs(rng.gauss(2e-7, 1e-7)),
        "engine/logprob_difference_max": abs(rng.gauss(4e-6, 2e-6)),
        "optim/grad_norm": None if step == 31 else 1.2 + abs(rng.gauss(0, 0.3)),
        "optim/lr": 1e-4 * min(1, step / 10),
        "optim/update_skipped": float(step == 31),
        "rollout/groups_without_advantage": max(0, 6 + rng.gauss(0, 2)),
        "time/generate": 0.7 + abs(rng.gauss(0, 0.05)),
        "time/update": 0.5 + abs(rng.gauss(0, 0.05)),
        "time/generate_tokens_per_second": 2400 + rng.gauss(0, 150),
        "time/update_tokens_per_second": 9100 + rng.gauss(0, 500),
    }


def an_answer(
    text: str, score: float, iou: float | None = None, hit: bool | None = None, **fields: object
) -> ScoredAnswer:
    """An answer with its score; iou and hit become parts of it where they are given."""
    parts = {name: float(value) for name, value in (("iou", iou), ("hit", hit)) if value is not None}
    return ScoredAnswer(text, "stop", len(text), score=score, parts=parts, note="", **fields)


def a_row(
    row_id: str = "a",
    *,
    question: str = "Where is it?",
    answer: object = (100, 200, 300, 400),
    width: int = 640,
    height: int = 480,
    text: str = "<box>[[100, 200, 300, 400]]</box>",
    box: tuple[float, ...] | None = (100, 200, 300, 400),
    score: float = 1.0,
    iou: float | None = 1.0,
    hit: bool | None = True,
    tags: dict[str, str] | None = None,
    sampled: tuple[ScoredAnswer, ...] = (),
) -> ScoredRow:
    """A row with a greedy answer, a hit, and sampled ones. `answer` is the ground truth."""
    return ScoredRow(
        id=row_id,
        source="shapes",
        where="test.parquet, row 0",
        question=question,
        prompt=({"role": "user", "content": question},),
        images=(ImageReference("a.png", width, height),) if width else (),
        ground_truth=list(answer) if isinstance(answer, tuple) else answer,
        answers=(an_answer(text, score, iou, hit, box=box, greedy=True), *sampled),
        tags=tags or {},
    )


def a_miss(row_id: str = "a", **changes: object) -> ScoredRow:
    return a_row(row_id, **{"box": None, "text": "no", "score": 0.0, "iou": 0.0, "hit": False} | changes)
