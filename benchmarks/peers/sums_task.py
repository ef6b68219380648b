"""The same for a pretrained model of text, SmolLM2-135M-Instruct: the questions of examples/smollm2_sums.py."""

from __future__ import annotations

from picture_task import reward as reward
from toy_sizes import sized

GROUPS, ANSWERS, ANSWER_TOKENS = sized((16, 8, 20), toy=(2, 4, 6))
LEARNING_RATE = 5e-6
TILES = 1
"""Of pictures, of which there are none."""
TRAINABLE = ["language"]


def question(seed: int) -> str:
    return f"What is {10 + 37 * seed % 90} plus {10 + 53 * seed % 90}? Answer with the number only."
