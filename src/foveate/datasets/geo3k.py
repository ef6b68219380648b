r"""Prepare Geometry3K (hiyouga/geometry3k on the Hugging Face hub): a problem, one image, an answer in \boxed{}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.data.hub import dataset_folder, is_hub_name
from foveate.data.parsers import Parser
from foveate.data.rows import Parsed, Place, parse_row
from foveate.data.validate import AS_IS, ReadOptions
from foveate.datasets.prepared import Prepared, prepare_splits
from foveate.errors import DataError, require

SOURCE = "hiyouga/geometry3k"
INSTRUCTION = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The "
    "reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
)
_NEEDED = ("images", "problem", "answer")


@dataclass(frozen=True, slots=True)
class Geo3kRows(Parser):
    """Rows with images, problem and answer as tasks of the geo3k reward; the problem is followed by an instruction."""

    instruction: str = INSTRUCTION

    def columns(self, names: Sequence[str]) -> list[str]:
        missing = [name for name in _NEEDED if name not in names]
        if missing:
            raise DataError(
                f"column {', '.join(missing)} is missing; Geometry3K has {', '.join(_NEEDED)}, the file has "
                f"{', '.join(names)}"
            )
        return list(_NEEDED)

    def __call__(self, raw: Mapping[str, Any], place: Place) -> Parsed:
        problem, answer = raw.get("problem"), raw.get("answer")
        content = f"{problem} {self.instruction}" if isinstance(problem, str) else problem
        return parse_row(
            {
                "data_source": SOURCE,
                "prompt": [{"role": "user", "content": content}],
                "images": raw.get("images"),
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": answer},
                "extra_info": {"answer": answer, "question": problem},
            },
            place,
        )

    def column_of(self, field: str) -> list[list[str]]:
        return [[{"prompt": "problem", "reward_model.ground_truth": "answer"}.get(field, field)]]


def prepare_geo3k(source: str, out: Path, *, reading: ReadOptions = AS_IS) -> Prepared:
    """Geometry3K as one parquet file per split (train, validation, test), with a manifest.

    source: a parquet file, a folder of them, a folder written by `datasets.save_to_disk`, or the name of a dataset on
    the hub (`hiyouga/geometry3k`), which is downloaded. Splits come from the names of the files. Raises DataError where
    there is none, or the hub is not reached, and for rows that cannot be used.
    """
    folder = Path(source)
    if not folder.exists():
        require(
            is_hub_name(source),
            f"{source}: no such file or folder, and no name of a dataset (owner/name); give the folder of a local "
            "copy: parquet files, or what datasets.save_to_disk wrote",
        )
        folder = dataset_folder(source)
    settings = {"dataset": SOURCE, "instruction": INSTRUCTION}
    return prepare_splits(folder, out, Geo3kRows(), settings=settings, reading=reading)
