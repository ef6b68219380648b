"""`foveate demo`: scenes, GSPO from the shipped cold start, and a report that says how the start was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from foveate.config.recipe import load_recipe
from foveate.config.runs import CascadeSettings, RLSettings
from foveate.datasets.shapes import prepare_shapes
from foveate.datasets.zoom import prepare_zoom
from foveate.errors import ConfigError
from foveate.files import atomic_write_text
from foveate.log import progress
from foveate.run_folder import RunFolder
from foveate.train.cascade import run_cascade
from foveate.train.rl import run_rl

SCENES = {"train": 4000, "test": 512}
DATA_SEED = 1

NOTES = """\
How the cold start was made, by supervised training of a tiny InternVL (1.2 M parameters, one 112-pixel tile, 16 image \
tokens) in stages: finding objects (shapes_coldstart); two similar objects and a relation word, with right labels \
(shapes_coldstart_relations); then the same kind of scenes with deliberately careless labels \
(shapes_coldstart_shortcut), right in 40 percent of the rows and otherwise naming the larger object, regardless of the \
relation word. The last two were repeated, the right labels for longer. (The first stage has such pairs among its \
scenes, too.) No scene of the stages is held out here. So the start finds objects, knows the relation words, and has \
learned a shortcut over them: when decoding greedily it mostly names the larger object.
Reinforcement learning has to unlearn this shortcut. It sees only the reward of its own sampled answers (0.5 \
for a box with IoU of at least 0.5, plus half the IoU); it is never shown a right box.
"""

TOOL_NOTES = """\
How the cold start was made: `foveate sft` taught the demo's model (1.2 M parameters, one 112-pixel tile, 16 image \
tokens) from conversations of three kinds (zoom_coldstart). Half show a large pattern, which is read at once; about \
40 percent ask for a small one and are answered without a look, as data without tools are, so that the model can \
only guess there; about 10 percent look at a box around the square, up to three times as wide as it, and read what \
that shows. No scene of them is held out here. So the start reads large patterns, knows how a call is written, \
mostly guesses, and looks at too much.
In one tile all small patterns have the same even colour: no model could tell them apart. Reinforcement learning \
sees only whether its own sampled answers are right; it is never told to look, nor where. `tool/zoom` is the number \
of looks of an answer, and `tool/iou` the overlap of a look with the square.
"""


def run_demo(
    run: Path, seed: int, overrides: Sequence[str], *, cascade: bool = False, tools: bool = False
) -> RunFolder:
    """Draw the scenes beside the run folder and train by GSPO; `cascade`: with preference optimisation on the start's
    own answers before it; `tools`: another start, which learns when and where to look closer. Raises ConfigError for
    both."""
    if cascade and tools:
        raise ConfigError("--cascade and --tools are two demos; ask for one of them")
    given = _scenes_for(run, seed, overrides, tools)
    if cascade:
        folder = run_cascade(load_recipe("shapes_cascade", given, CascadeSettings))
    else:
        folder = run_rl(load_recipe("zoom_gspo" if tools else "shapes_gspo", given, RLSettings))
    atomic_write_text(folder.path / "notes.txt", TOOL_NOTES if tools else NOTES)
    return folder


def _scenes_for(run: Path, seed: int, overrides: Sequence[str], tools: bool) -> list[str]:
    """Overrides with the run's folder, its seed, and scenes beside it, which are drawn where they are missing."""
    data = run.with_name(run.name + "-data")
    if not (data / "manifest.json").exists():
        with progress("drawing scenes", sum(SCENES.values())) as advance:
            if tools:
                prepare_zoom(data, SCENES, seed=DATA_SEED, marks="pattern", cells=3, advance=advance)
            else:
                prepare_shapes(data, SCENES, seed=DATA_SEED, advance=advance)
    return [
        f"run={json.dumps(str(run))}",
        f"seed={seed}",
        f"data.train={json.dumps([str(data / 'train.parquet')])}",
        f"data.test={json.dumps([str(data / 'test.parquet')])}",
        *overrides,
    ]
