"""Tasks for the environment `gui`, drawn screens with a sentence each, and conversations that fulfil them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from foveate.datasets.distinct import distinct_of_split, drawn_number
from foveate.datasets.traces import DRAWN_SPLITS, drawn_task, recorded_trace, write_splits
from foveate.environments.calls import hermes_call
from foveate.environments.gui import Gui, screen_task
from foveate.environments.observe import encoded
from foveate.environments.screen import WIDGET_KINDS, ScreenTask, WidgetKind, draw_screen, solution


def gui_scenes(
    seed: int, split: str, count: int, kinds: Sequence[WidgetKind] = WIDGET_KINDS
) -> Iterator[tuple[int, WidgetKind]]:
    """`count` numbers of screens with the kind of their task, the same for the same seed, each another screen. A screen
    belongs to one split, whatever the seed: one in eight to `test`, and of the rest one in four to `traces`."""
    rng = np.random.default_rng([seed, DRAWN_SPLITS.index(split)])
    return distinct_of_split(
        split,
        count,
        lambda _: (int(rng.integers(2**31)), kinds[int(rng.integers(len(kinds)))]),
        lambda one: _number(screen_task(*one)),
        has_traces=True,
    )


def _number(task: ScreenTask) -> int:
    return drawn_number((task.screen, task.sentence))


def gui_rows(
    seed: int,
    split: str,
    count: int,
    *,
    side: int = 448,
    kinds: Sequence[WidgetKind] = WIDGET_KINDS,
    careless: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Rows in the field's parquet schema. Those of `traces` are whole conversations: the shortest calls that fulfil the
    task, with the screen after each; a share `careless` of them presses OK at once. The ground truth is the state that
    is asked for, as JSON."""
    environment, rng = Gui(side=side), np.random.default_rng([seed, DRAWN_SPLITS.index(split), 1])
    for index, (scene, kind) in enumerate(gui_scenes(seed, split, count, kinds)):
        task = screen_task(scene, kind)
        calls = [hermes_call(name, arguments) for name, arguments in solution(task)]
        answers = calls if split == "traces" else calls[:1]
        if split == "traces" and rng.random() < careless:
            answers = calls[-1:]
        picture = encoded(draw_screen(task.screen, side))
        row = drawn_task(f"<image>\n{task.sentence}", picture, {"scene": scene, "kind": kind})
        content = recorded_trace(environment, row, 0, answers)
        yield {
            "data_source": "gui",
            "prompt": content["prompt"],
            "images": content["images"],
            "ability": "gui",
            "reward_model": {"style": "environment", "ground_truth": json.dumps(dict(task.goal))},
            "extra_info": {
                "split": split,
                "index": index,
                "id": f"{split}-{scene}-{kind}",
                "scene": scene,
                "kind": kind,
                "calls": len(answers) if split == "traces" else len(calls),
                "response": content["response"] if split == "traces" else None,
            },
        }


def prepare_gui(
    folder: Path,
    rows: dict[str, int],
    *,
    seed: int = 0,
    side: int = 448,
    kinds: Sequence[WidgetKind] = WIDGET_KINDS,
    careless: float = 0.0,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the files of the asked splits (`train`, `test`, `traces`) with so many rows each, and a manifest. `side`
    must be that of the environment; `careless`: as in `gui_rows`. `advance` is told of each row."""
    made = {
        split: gui_rows(seed, split, count, side=side, kinds=kinds, careless=careless) for split, count in rows.items()
    }
    extra_info = {
        "split": pa.string(),
        "index": pa.int64(),
        "id": pa.string(),
        "scene": pa.int64(),
        "kind": pa.string(),
        "calls": pa.int64(),
        "response": pa.string(),
    }
    write_splits(
        folder,
        made,
        extra_info,
        {"seed": seed, "side": side, "kinds": [*kinds], "careless": careless, "rows": rows},
        advance,
    )
