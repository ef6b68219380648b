"""How fast answers are graded: mathematics in worker processes, boxes in this one.

The answers are those of a policy in training: groups of 16 to one problem, of which some are right in another form,
some wrong, some malformed, and a few in ten thousand never end.

    python benchmarks/rewards.py [--answers 10000] [--workers 2]
"""

from __future__ import annotations

import argparse
import random
import time

from foveate.records import Message, Task
from foveate.rewards.pool import Graders

GROUP = 16
HOSTILE = "9^{9^{9^{9}}}"


def problem(index: int, chance: random.Random) -> tuple[Task, list[str]]:
    """A task and its answers: a number, a fraction, a root, an angle, a percentage, an interval or a polynomial."""
    a, b, c = (chance.randint(2, 99) for _ in range(3))
    kinds = [
        (f"{a * b}", [f"{a * b}", f"{a * b}.0", f"{a} \\cdot {b}", f"{a * b + 1}", f"{a * b}\\text{{ cm}}"]),
        (
            f"\\frac{{{a}}}{{{b}}}",
            [f"{a}/{b}", f"\\dfrac{{{2 * a}}}{{{2 * b}}}", f"{a / b:.3f}", f"\\frac{{{b}}}{{{a}}}"],
        ),
        (
            f"{a}\\sqrt{{{c}}}",
            [f"\\sqrt{{{a * a * c}}}", f"{a}\\sqrt{c}", f"{a + 1}\\sqrt{{{c}}}", f"{a * c**0.5:.2f}"],
        ),
        (f"{a}^\\circ", [f"{a}", f"{a}°", f"{a + 1}^\\circ", f"{a} degrees", f"m\\angle A = {a}"]),
        (f"{a}\\%", [f"{a}%", f"{a / 100}", f"\\frac{{{a}}}{{100}}", f"{b}\\%"]),
        (f"[{a}, {a + b}]", [f"[{a},{a + b}]", f"({a},{a + b})", f"[{a},{a + b})", f"x \\in [{a},{a + b}]"]),
        (f"x^2+{a + b}x+{a * b}", [f"(x+{a})(x+{b})", f"{a * b}+{a + b}x+x^2", f"(x-{a})(x+{b})"]),
        ("B", ["B", "(B)", "B. seven", "A", "\\text{B}", "seven"]),
    ]
    truth, forms = kinds[index % len(kinds)]
    forms = [truth, *forms, "\\frac{1}{", "I do not know", f"{a}{b}\\pi"]
    task = Task(str(index), "math", (Message("user", "Solve.\nA. six\nB. seven"),), (), truth, {}, f"row {index}")
    return task, [f"<think>{'so ' * 200}</think> \\boxed{{{chance.choice(forms)}}}" for _ in range(GROUP)]


def answers(count: int, hostile: int, chance: random.Random) -> list[tuple[str, Task]]:
    """`count` answers with their tasks, group by group; the last of some groups never end."""
    groups = [problem(index, chance) for index in range(-(-count // GROUP))]
    pairs = [(text, task) for task, texts in groups for text in texts][:count]
    for place in chance.sample(range(count), hostile):
        pairs[place] = (f"<think></think>\\boxed{{{HOSTILE}}}", pairs[place][1])
    return pairs


def boxes(count: int, chance: random.Random) -> list[tuple[str, Task]]:
    """Answers with one box."""
    task = Task("b", "grounding", (), (), [100, 200, 300, 400], {"width": 640, "height": 480})
    return [(f"<box>[[{chance.randint(0, 200)}, 190, 310, 400]]</box>", task) for _ in range(count)]


def measure(name: str, pairs: list[tuple[str, Task]], workers: int | None, time_limit: float) -> None:
    """Print the seconds of two rounds over the answers, the first with empty caches."""
    begin = time.perf_counter()
    with Graders(name, {}, workers=workers, time_limit=time_limit) as graders:
        graders(*pairs[0])
        started = time.perf_counter() - begin
        for _ in range(2):
            begin = time.perf_counter()
            scores = graders.grade_many(pairs)
            seconds = time.perf_counter() - begin
            right = sum(score.parts.get("accuracy", score.parts.get("hit", 0.0)) for score in scores)
            print(
                f"{name:10s} {len(pairs)} answers in {seconds:6.2f} s, {1e3 * seconds / len(pairs):.3f} ms each, "
                f"{100 * right / len(pairs):.0f} % right; start {started:.1f} s; not graded: {dict(graders.failures)}"
            )


def processor_time(name: str, pairs: list[tuple[str, Task]]) -> None:
    """Print the processor seconds of grading in this process, which other work on the machine does not change."""
    with Graders(name, {}, workers=0) as graders:
        begin = time.process_time()
        graders.grade_many(pairs)
        seconds = time.process_time() - begin
    print(f"{name:10s} {len(pairs)} answers take {seconds:.1f} processor seconds")


def main() -> None:
    """Grade the same answers by each reward."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--hostile", type=int, default=3, help="answers that never end")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=5.0)
    options = parser.parse_args()
    chance = random.Random(0)
    pairs = answers(options.answers, options.hostile, chance)
    for name in ("math", "geo3k"):
        processor_time(name, [pair for pair in pairs if HOSTILE not in pair[0]])
    measure("math", pairs, options.workers, options.time_limit)
    measure("geo3k", pairs, options.workers, options.time_limit)
    measure("grounding", boxes(options.answers, chance), None, options.time_limit)


if __name__ == "__main__":
    main()
