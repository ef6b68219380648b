"""What `rollout.staleness` saves, and what it costs in reward.

python benchmarks/staleness.py time [--seconds 1.0] [--steps 8]
python benchmarks/staleness.py tail [--tick 0.004] [--steps 30]
python benchmarks/staleness.py curves [--steps 60] [--seeds 0 1 2] [--staleness 0 1 2] [--partial]

`time`: a run whose engine sleeps for a while in every round, and whose update sleeps as long, so that it can be
measured on one core: seconds of a step by staleness. `tail`: a made-up engine whose answers are long now and then (one
group in twelve has 160 tokens, the others 20, of `tick` seconds each, all side by side) before a learner that sleeps 40
ticks: the length of a step where long answers hold the others up and where they do not. `curves`: GSPO on the shapes
from the shipped cold start, the mean reward of every ten steps, and the accuracy on held-out scenes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from peers.toy_sizes import sized
from torch import Tensor

from foveate.algorithms.advantages import grpo
from foveate.algorithms.table import Algorithm
from foveate.config.recipe import load_recipe
from foveate.config.runs import RLSettings
from foveate.data.stream import Stream
from foveate.datasets.shapes import prepare_shapes
from foveate.log import read_metrics
from foveate.records import Answer, Prompt, SamplingParams, Score, Task
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.train.async_rollouts import AsyncRollouts
from foveate.train.clock import Clock
from foveate.train.rl import run_rl
from foveate.train.rollouts import SyncRollouts

HERE = Path(__file__)
SECONDS = "FOVEATE_BENCHMARK_SECONDS"
SCENES = sized({"train": 2000, "test": 320}, toy={"train": 32, "test": 4})


class SleepingEngine(NativeEngine):
    """Takes a while for every round, without computing."""

    def stream(
        self, requests: Sequence[Request], sampling: SamplingParams
    ) -> Generator[tuple[int, tuple[Answer, ...]]]:
        time.sleep(float(os.environ[SECONDS]))
        yield from super().stream(requests, sampling)


def sleeping_grpo(rewards_S: Tensor, group_S: Tensor) -> Tensor:
    """Advantages of GRPO, after a while: the time of an update."""
    time.sleep(float(os.environ[SECONDS]))
    return grpo(rewards_S, group_S)


SLEEPING = Algorithm(advantage=f"{HERE}:sleeping_grpo", loss="gspo", source="")


def settings_of(folder: Path, data: Path, staleness: int, algorithm: str = "gspo", **changes: Any) -> RLSettings:
    """The demo's recipe with a staleness; `changes` are settings by their dotted names."""
    values = {"run": folder, "data.train": f"[{data}/train.parquet]", "data.test": f"[{data}/test.parquet]"}
    values["rollout.staleness"] = staleness
    values["algorithm"] = f"{{name: '{algorithm}', correction: {{mode: token-truncate}}}}"
    values |= changes
    recipe = HERE.parent.parent / "src" / "foveate" / "recipes" / "shapes_gspo.yaml"
    return load_recipe(recipe, [f"{name}={value}" for name, value in values.items()], RLSettings)


def measure_time(seconds: float, steps: int) -> None:
    os.environ[SECONDS] = str(seconds)
    small = {
        "rollout.engine": f"{HERE}:SleepingEngine", "algorithm": f"{HERE}:SLEEPING", "train.steps": steps,
        "train.prompts_per_step": 2, "rollout.samples": 4, "eval.every": 0, "optim.warmup_steps": 0,
        "train.save_every": 0,
    }  # fmt: skip
    found: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as name:
        prepare_shapes(Path(name), {"train": 64, "test": 8})
        for staleness in (0, 1, 2):
            run = run_rl(settings_of(Path(name) / str(staleness), Path(name), staleness, **small))
            found[staleness] = statistics.median(row["time/step"] for row in read_metrics(run.metrics)[1:])
            saved = 1 - found[staleness] / found[0]
            print(f"staleness {staleness}: {found[staleness]:.3f} s a step, {saved:.0%} saved", flush=True)


class Numbers:
    """A reader whose tasks are the numbers of its stream, and what grades their answers."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def take(self, count: int) -> list[tuple[Task, Prompt]]:
        rows = self._stream.draw(count)
        return [(Task(str(row), "made up", (), (), row), Prompt((row,), (), None, (row,))) for row in rows]

    def prefetch(self, _: Sequence[tuple[Answer, Task]]) -> list[Any]:
        return []

    def grade_many(self, pairs: Sequence[tuple[Answer, Task]], _: Sequence[Any] = ()) -> list[Score]:
        return [Score(0.0) for _ in pairs]

    def metrics(self) -> dict[str, float]:
        return {}


class TailEngine:
    """Answers of a token per tick, all side by side."""

    def __init__(self, tick: float) -> None:
        self.version, self._tick, self._paused = 0, tick, threading.Event()

    def stream(self, requests: Sequence[Request], sampling: SamplingParams) -> Iterator[Any]:
        grown = {
            i: request.partial_answers[0] if request.partial_answers else None for i, request in enumerate(requests)
        }
        while grown and not self._paused.is_set():
            time.sleep(self._tick)
            for index, before in [*grown.items()]:
                [row] = requests[index].prompt.token_ids
                made = 1 + (0 if before is None else len(before.token_ids))
                finish = "stop" if made == (160 if row % 12 == 0 else 20) else "abort"
                one = Answer.sampled((row,), (0.0,), "", finish, self.version)
                grown[index] = one if before is None else before.continued_by(one, "")
                if finish == "stop":
                    yield index, (grown.pop(index),) * sampling.samples
        yield from ((index, (one,) * sampling.samples) for index, one in grown.items() if one is not None)

    def pause(self) -> None:
        self._paused.set()

    def resume(self) -> None:
        self._paused.clear()


def measure_tail(tick: float, steps: int) -> None:
    cases = [{"staleness": k, "partial": partial, "over_sample": 0} for k in (1, 2) for partial in (False, True)]
    cases += [{"staleness": k, "partial": True, "over_sample": 4} for k in (2, 6)]
    limited = [(case, None) for case in cases] + [({"staleness": 2}, 40 * tick)]
    for case, limit in limited:
        engine: Any = TailEngine(tick)
        stream, reader = Stream(960, 0, 8), Numbers(Stream(960, 0, 8))
        parts: Any = reader
        sampler = SyncRollouts(parts, engine, parts, SamplingParams(2), 0, False, limit)
        said: list[dict[str, float]] = []
        cut = 0
        begin = time.monotonic()
        with closing(AsyncRollouts(sampler, stream, count=8, step=0, last=steps, **case)) as ahead:
            for step in range(1, steps + 1):
                clock = Clock()
                groups, _ = ahead.draw(step, 8, 0, clock)
                cut += sum(group.answers[0].finish == "abort" for group in groups)
                said.append(ahead.metrics())
                time.sleep(40 * tick)
                with ahead.at_rest(clock):
                    engine.version = step
        ticks = (time.monotonic() - begin) / steps / tick
        mixed = statistics.mean(row.get("rollout/staleness_mixed", 0.0) for row in said)
        dropped = sum(row["rollout/groups_dropped"] for row in said)
        what = ", ".join(f"{name} {value}" for name, value in {**case, "time_limit": limit}.items() if value)
        print(
            f"{what}: {ticks:.1f} ticks a step; {mixed:.1%} of the answers of several versions, {dropped:.0f} groups "
            f"dropped, {cut} cut, of {8 * steps}",
            flush=True,
        )


def measure_curves(steps: int, seeds: Sequence[int], staleness: Sequence[int], partial: bool, out: Path) -> None:
    data = out / "data"
    if not data.exists():
        prepare_shapes(data, SCENES)
    for seed in seeds:
        for k in staleness:
            changes: dict[str, Any] = {"seed": seed, "train.steps": steps, "train.save_every": 0}
            changes |= {"eval.every": steps, "eval.samples": 1}
            changes |= {"rollout.partial": "true", "rollout.over_sample": 4} if partial and k else {}
            begin = time.perf_counter()
            run = run_rl(settings_of(out / f"staleness-{k}-seed-{seed}", data, k, **changes))
            rows = read_metrics(run.metrics)
            reward = [row["reward/mean"] for row in rows]
            tenths = [statistics.mean(reward[i : i + 10]) for i in range(0, steps, 10)]
            step_s = statistics.median(row["time/step"] for row in rows)
            print(
                f"staleness {k}, seed {seed}: reward by tens of steps {' '.join(f'{x:.3f}' for x in tenths)}; held out "
                f"{rows[-1]['eval/greedy_accuracy']:.3f}; {step_s:.2f} s a step, {time.perf_counter() - begin:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    timing = parts.add_parser("time")
    timing.add_argument("--seconds", type=float, default=1.0)
    timing.add_argument("--steps", type=int, default=8)
    tail = parts.add_parser("tail")
    tail.add_argument("--tick", type=float, default=0.004)
    tail.add_argument("--steps", type=int, default=30)
    curves = parts.add_parser("curves")
    curves.add_argument("--steps", type=int, default=60)
    curves.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    curves.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    curves.add_argument("--partial", action="store_true", help="with partial rollouts and over-sampling of 4")
    curves.add_argument("--out", type=Path, default=Path("runs/staleness"))
    chosen = parser.parse_args()
    if chosen.part == "time":
        measure_time(chosen.seconds, chosen.steps)
    elif chosen.part == "tail":
        measure_tail(chosen.tick, chosen.steps)
    else:
        measure_curves(chosen.steps, chosen.seeds, chosen.staleness, chosen.partial, chosen.out)


if __name__ == "__main__":
    sys.exit(main())
