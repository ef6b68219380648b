"""Objects that Python code passes to a run, as settings know them: rows as a file beside it, functions by a name."""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, runtime_checkable

from foveate.errors import ConfigError, DataError, one_line
from foveate.files import atomic_write_bytes
from foveate.registry import name_of

if TYPE_CHECKING:
    import pyarrow as pa


@runtime_checkable
class _IsDataFrame(Protocol):
    columns: Any

    def to_dict(self, orient: Any) -> Any: ...

    def iterrows(self) -> Any: ...

    def __getitem__(self, key: Any) -> Any: ...


@runtime_checkable
class _WritesParquet(Protocol):
    def to_parquet(self, path_or_buf: Any) -> Any: ...


Reward = str | Callable[..., Any] | Sequence[str | Callable[..., Any] | tuple[str | Callable[..., Any], float]]

Environment = str | Callable[..., Any] | Mapping[str, Any]


ARGUMENTS = {
    "reward_funcs": "reward", "train_dataset": "train_data", "eval_dataset": "eval_data", "reward_function": "reward",
    "environment_factory": "environment", "tools": "environment",
}  # fmt: skip
"""Arguments of TRL's trainers, and what they are called here."""
_P = ParamSpec("_P")
_R = TypeVar("_R")


def checked_call(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, with a line about a call that Python itself would refuse without saying what to do: an argument of
    another trainer's name, one that is given twice, one that is missing. Raises ConfigError."""
    parameters = inspect.signature(function).parameters
    names = [name for name, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    shown = ", ".join(name for name in names if name != "self")

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for other, own in ARGUMENTS.items():
            if other in kwargs and own in parameters:
                raise ConfigError(f"argument {other}: it is called {own} here")
        for name in names[: len(args)]:
            if name in kwargs:
                raise ConfigError(
                    f"argument {name}: is given twice; settings of a group are named one by one, by their own name or "
                    f"by path: lora={{'rank': 16}}, or **{{'model.lora': {{'rank': 16}}}}, not {name}={{...}}"
                )
        for name in names[len(args) :]:
            if name not in kwargs:
                raise ConfigError(f"argument {name} is missing; call it with ({shown}, steps=100)")
        return function(*args, **kwargs)

    return call


def environment_settings(environment: Environment) -> dict[str, Any]:
    """The `environment` group of settings: of a name, of a function that returns an environment, or as it stands."""
    if isinstance(environment, Mapping):
        return {**environment, "name": _named(environment.get("name", ""))}
    return {"name": _named(environment)}


def reward_settings(reward: Reward | Mapping[str, Any]) -> dict[str, Any]:
    """The `reward` group of settings: of a function or a name, of a list of them or of (function or name, weight),
    whose weighted sum it is (without a weight it counts once, as in TRL), or as it stands."""
    if isinstance(reward, Mapping):
        return {**reward, "name": _reward_name(reward.get("name", "grounding"))}
    if isinstance(reward, str) or callable(reward):
        return {"name": _reward_name(reward)}
    given = reward if isinstance(reward, Sequence) else ()
    pairs = [(one, 1.0) if isinstance(one, str) or callable(one) else one for one in given]
    if not pairs or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise ConfigError(
            "reward: must be a function, a name, or a list of them or of (function or name, weight), such as "
            "[(right, 1.0), (short, 0.2)]"
        )
    weights: dict[str, float] = {}
    for one, weight in pairs:
        name = _reward_name(one)
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"reward: the weight of {name} must be a finite number, found {weight!r:.60}")
        if name in weights:
            raise ConfigError(f"reward: {name} is given twice; give each once, with its weight")
        weights[name] = float(weight)
    return {"name": "weighted_sum", "settings": {"weights": weights}}


def _reward_name(reward: str | Callable[..., Any]) -> str:
    """The name of a reward: of anything that can be called, by a function that calls it."""
    if isinstance(reward, str):
        return reward
    from foveate.rewards.callables import as_function

    return name_of(as_function(reward, "reward"))


def _named(environment: str | Callable[..., Any]) -> str:
    return environment if isinstance(environment, str) else name_of(environment)


def data_files(data: Any, file: Path) -> list[str]:
    """The files of some data: paths as they are; rows (a list of dicts, a Hugging Face dataset, a table of pandas or
    pyarrow) are written to `file`, unless it holds them already.

    Raises DataError for anything else, and for rows that no table can hold.
    """
    if isinstance(data, str | Path):
        return [str(data)]
    if isinstance(data, list | tuple) and data and all(isinstance(one, str | Path) for one in data):
        return [str(one) for one in data]
    content = _parquet(data)
    if not file.exists() or file.read_bytes() != content:
        atomic_write_bytes(file, content)
    return [str(file)]


def _parquet(data: Any) -> bytes:
    """Rows as the bytes of a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    if isinstance(data, list | tuple):
        pq.write_table(_table(data), buffer)
    elif isinstance(data, _IsDataFrame) and _has_objects(data):
        pq.write_table(_table(data.to_dict("records")), buffer)
    elif isinstance(data, _WritesParquet):  # datasets.Dataset, which embeds its images, and pandas.DataFrame
        data.to_parquet(buffer)
    elif isinstance(data, pa.Table):
        pq.write_table(data, buffer)
    else:
        raise DataError(
            f"rows must be a list of dicts, a datasets.Dataset, a DataFrame or paths, found {type(data).__name__}"
            f"{_remedy(data)}"
        )
    return buffer.getvalue()


def _remedy(data: Any) -> str:
    """The advice about something that holds rows, or gives them one by one."""
    if isinstance(data, Mapping) and data and all(isinstance(one, _WritesParquet) for one in data.values()):
        splits = [str(name) for name in data]
        split = "train" if "train" in splits else splits[0]
        return f" with the splits {', '.join(splits)}; give one of them: dataset[{split!r}]"
    return (
        "; give list(...) of it" if isinstance(data, Iterable) and not isinstance(data, Mapping | str | bytes) else ""
    )


def _has_objects(frame: _IsDataFrame) -> bool:
    """Whether a column of a DataFrame holds images of PIL or arrays of NumPy, which arrow takes in no column or in few
    forms."""
    import numpy as np
    from PIL import Image

    kinds = (Image.Image, np.ndarray)
    for name in frame.columns:
        first = next((value for value in frame[name] if value is not None), None)
        first = first[0] if isinstance(first, list | tuple) and first else first
        if isinstance(first, kinds):
            return True
    return False


def _table(rows: Sequence[Any]) -> pa.Table:
    import pyarrow as pa

    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number}: must be a dict, found {type(row).__name__}")
    if not rows:
        raise DataError("there are no rows")
    try:
        return pa.Table.from_pylist([_plain(row) for row in rows])
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError, OverflowError) as error:
        raise DataError(f"the rows do not make a table: {one_line(error)}; a column must have one type") from None


def picture_bytes(value: Any) -> Any:
    """A PIL image, or a picture as an array of NumPy (height, width, 3 or 4; uint8), as the bytes of a PNG file;
    anything else as it is."""
    import numpy as np
    from PIL import Image

    if isinstance(value, np.ndarray) and _is_picture(value):
        value = Image.fromarray(value)
    if not isinstance(value, Image.Image):
        return value
    file = io.BytesIO()
    value.save(file, "PNG")
    return file.getvalue()


def _is_picture(array: Any) -> bool:
    return array.dtype == "uint8" and array.ndim == 3 and array.shape[2] in (3, 4)


def _plain(value: Any) -> Any:
    """Images as the bytes of a PNG file, other arrays and scalars of NumPy as lists and numbers, paths as text, and NaN
    as nothing."""
    import numpy as np
    from PIL import Image

    if isinstance(value, np.ndarray | np.generic) and not _is_picture(value):
        return _plain(value.tolist())
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Image.Image | np.ndarray):
        return {"bytes": picture_bytes(value), "path": None}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
