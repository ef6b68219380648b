"""From a raw row of a file to a Task: rows recognised by their columns, with a mapping for what differs.

A parser is plain data, so that worker processes can be given one.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Protocol

from foveate.data.conversations import TURN_KEYS, are_messages, common_prompt, shown
from foveate.data.image_values import is_no_image
from foveate.data.numbered_marks import without_numbers
from foveate.data.options import OPTION_COLUMNS, option_columns, options_of, with_options
from foveate.data.recognise import (
    COLUMNS,
    CONSTANT,
    SCHEMA_FIELDS,
    Roles,
    form_of,
    nearest,
    roles_of,
    unread_answers,
    unread_media,
)
from foveate.data.referring import BOX_FIELDS, GroundingRows, format_box, is_only_a_box
from foveate.data.rows import Parsed, Place, Problem, parse_row
from foveate.data.sources import dig, read_literal
from foveate.errors import DataError
from foveate.registry import suggestion

# The targets that a column can be mapped to, and where it goes in a row of the schema.
TARGETS = {
    "prompt": "the question as text, or messages [{role, content}] or [{from, value}]",
    "images": "an image or a list of images: paths, bytes, base64, or mappings with one of them",
    "videos": "a video file or a list of them: paths, bytes, or mappings with one of them; or lists of frames",
    "answer": "the ground truth of the reward",
    "source": "the name of the dataset; without it the name of the file",
    "id": "a name of the row",
    "system": "a system prompt",
    "response": "the answer that supervised training imitates",
    "chosen": "the better answer of a preference pair",
    "rejected": "the worse answer of a preference pair",
    "ability": "the kind of task",
}
_VERL = frozenset(("data_source", "reward_model"))  # beside a prompt: a row of verl's schema, with its marks
_MEDIA_COLUMNS = frozenset((*COLUMNS["images"], *COLUMNS["videos"]))


class Parser(Protocol):
    """From a raw row to a Task, or to None with all problems of the row."""

    def columns(self, names: Sequence[str]) -> list[str]:
        """The columns to read of a file with these. Raises DataError, without a place, if needed ones are missing."""
        ...

    def __call__(self, raw: Mapping[str, Any], place: Place) -> Parsed: ...

    def must_look(self, names: Sequence[str] | None) -> bool:  # noqa: ARG002 - for those that look
        """Whether `settled` is needed for a file with these columns; None: every row may have others."""
        return False

    def settled(self, rows: Sequence[Mapping[str, Any]], place: Place) -> Parser:  # noqa: ARG002 - for those that look
        """The parser for a file that begins with these rows."""
        return self

    def described(self, row: Mapping[str, Any]) -> list[str]:  # noqa: ARG002 - for those that recognise
        """The form of a row like this one, and what is read from where, a line each."""
        return []

    def column_of(self, field: str) -> list[list[str]]:
        """The columns, and the fields below them, that a field of the schema (`extra_info.id`) may be read from."""
        return [field.split(".")]


@dataclass(frozen=True, slots=True)
class RecognisedRows(Parser):
    """Rows of any columns that `recognise.COLUMNS` knows, and RefCOCO-style rows.

    mapping: for what differs, target (see `TARGETS`) -> column of the file; a dot goes into a field (`meta.label`), and
    `=text` stands for the text itself in every row (`source: =clevr`). Other targets join `extra_info` under their own
    name, and so do columns without a role. A question without `<image>` marks gets one per image in front, except in
    rows of the parquet schema, which must have them.
    """

    mapping: Mapping[str, str] = field(default_factory=dict)
    grounding: GroundingRows = field(default_factory=GroundingRows)

    def __post_init__(self) -> None:
        for target, column in self.mapping.items():
            near = get_close_matches(target, TARGETS, 1, 0.85)
            if near and target not in TARGETS and target != column:
                raise DataError(
                    f"data.columns: {target} is no target; did you mean {near[0]}? Targets: {', '.join(TARGETS)}; "
                    "other names become fields of extra_info, and must not be nearly one of these"
                )

    def columns(self, names: Sequence[str]) -> list[str]:
        for target, column in self.mapping.items():
            if not column.startswith(CONSTANT) and (name := column.split(".")[0]) not in names:
                raise DataError(
                    f"column {name!r}, named by data.columns as {target}, is missing"
                    f"{suggestion(name, names, then='the file has')} {', '.join(names)}"
                )
        roles = self._roles(names)
        given = f"data.columns: has {', '.join(self.mapping)}" if self.mapping else f"the file has {', '.join(names)}"
        if "prompt" not in roles.candidates and not {"chosen", "sent"} & {*roles.candidates, *names}:
            near = suggestion("prompt", self.mapping) if self.mapping else ""
            raise DataError(
                f"column prompt is missing{near}; {given}; known are {', '.join(COLUMNS['prompt'])}; another one is "
                f"named by data.columns: --column prompt=COLUMN; targets: {', '.join(TARGETS)}"
            )
        if not self._takes("chosen") and ("chosen" in roles.candidates) != ("rejected" in roles.candidates):
            raise DataError(f"{given}; a preference pair needs both chosen and rejected")
        return list(names)

    def must_look(self, names: Sequence[str] | None) -> bool:
        return names is None or self._may_refer(names)

    def settled(self, rows: Sequence[Mapping[str, Any]], place: Place) -> RecognisedRows:
        referring = [row for row in rows if self._refers(row)]
        return replace(self, grounding=self.grounding.settled(referring, place))

    def described(self, row: Mapping[str, Any]) -> list[str]:
        if self._refers(row):
            return self.grounding.described(row)
        values, used = self._values(row, self._roles(row))
        roles = [f"{role} from {column}" for role, column in used.items() if not is_no_image(values[role])]
        if _ends_with_answer(values.get("prompt")):
            roles.append("response, and answer where there is no other, from its last turn")
        elif "response" in used and "answer" not in used:
            roles = [role.replace("response from", "response and answer from") for role in roles]
        kept = [name for name in _others(row, self._roles(row), used) if _is_kept(row[name])]
        return [f"{form_of(row, used)}: {', '.join(roles)}" + (f"; kept: {', '.join(kept)}" if kept else "")]

    def column_of(self, field: str) -> list[list[str]]:
        role = next((role for role, known in SCHEMA_FIELDS.items() if known == field), field)
        if role in self.mapping or (role := role.removeprefix("extra_info.")) in self.mapping:
            return [self.mapping[role].split(".")]
        return [path.split(".") for path in dict.fromkeys((field, role, *COLUMNS.get(role, ())))]

    def stand_in(self, row: Mapping[str, Any], field: str) -> str:
        """The mapping, as `TARGET=COLUMN`, that fills a field which a row lacks from another column; empty if none."""
        role = next((role for role, known in SCHEMA_FIELDS.items() if known == field), field)
        values, used = self._values(row, self._roles(row))
        others = {"answer": ("chosen",), "response": ("answer", "chosen")}.get(role, ())
        texts = [other for other in others if isinstance(values.get(other), str) or are_messages(values.get(other))]
        named = unread_answers(row, _others(row, self._roles(row), used)) if others else ()
        boxes = [name for name in BOX_FIELDS if role == "answer" and name in row]
        columns = (*(used[other] for other in texts), *named, *boxes)
        column = next((column for column in columns if not column.startswith(CONSTANT)), None)
        return f"{role}={column}" if column is not None else ""

    def __call__(self, raw: Mapping[str, Any], place: Place) -> Parsed:
        if self._refers(raw):
            return self._grounded(raw, place)
        roles = self._roles(raw)
        values, used = self._values(raw, roles)
        if "prompt" not in values:
            chosen = next((values[role] for role in ("chosen", "response", "answer") if role in values), None)
            pair = common_prompt(chosen, values.get("rejected"))
            if pair is None:
                return None, [Problem(str(place), "prompt", self._no_prompt(raw))]
            values["prompt"] = pair
        if _is_box_reply(values, raw):
            return self._grounded(raw, place)
        others = _others(raw, roles, used)
        told = _unread(raw, others, values, used, place)
        named = [used["source"]] if used.get("source") not in (None, "data_source", *self.mapping.values()) else []
        row = _schema_row(raw, roles, [*others, *named], values, place)  # a function of yours may name the column
        try:
            row["prompt"], row["images"] = without_numbers(row["prompt"], row["images"])
        except DataError as error:
            return None, [Problem(str(place), used.get("prompt", "prompt"), str(error)), *told]
        task, problems = parse_row(
            row, place,
            marks_in_front=used.get("prompt", "prompt") != "prompt" or "prompt" in self.mapping or not _VERL & {*raw},
        )  # fmt: skip
        if any(not problem.warning for problem in told):
            task = None
        if task is not None and "reward_model" not in raw and _is_trl_prompt(used, values, self.mapping):
            task = replace(task, conversational=True)
        return task, [self._renamed(problem, used, raw) for problem in problems] + told

    def _grounded(self, raw: Mapping[str, Any], place: Place) -> Parsed:
        """A row about a box, with the reply that supervised training imitates: its own, or else the box itself."""
        task, problems = self.grounding(raw, place)
        if task is None:
            return None, problems
        response = _reply(raw.get("conversations")) or format_box(task.answer)
        return replace(task, meta={**task.meta, "response": response}), problems

    def _takes(self, column: str) -> bool:
        """Whether the mapping takes a column, or a field of that name, for something else."""
        return any(target != column and path.split(".")[-1] == column for target, path in self.mapping.items())

    def _roles(self, names: Sequence[str] | Mapping[str, Any]) -> Roles:
        return roles_of(tuple(names), tuple(self.mapping.items()))

    def _may_refer(self, names: Container[str]) -> bool:
        """Whether there can be RefCOCO-style rows in a file with these columns: an expression, or a box beside a
        conversation, and no other prompt."""
        boxed = "conversations" in names and any(name in names for name in BOX_FIELDS)
        return not self.mapping and "prompt" not in names and "image" in names and ("sent" in names or boxed)

    def _refers(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is a RefCOCO-style one."""
        given = [name for name, value in row.items() if value is not None]
        return "prompt" not in row and self._may_refer(given) and not is_no_image(row["image"])

    def _values(self, raw: Mapping[str, Any], roles: Roles) -> tuple[dict[str, Any], dict[str, str]]:
        """The value of each role that there is a column for, and the column that it is from."""
        values: dict[str, Any] = {}
        used: dict[str, str] = {}
        for role, columns in roles.candidates.items():
            for column in columns:
                if column.startswith(CONSTANT):
                    value = column[1:]
                else:  # mostly without a point
                    value = dig(raw, column.split(".")) if "." in column else raw.get(column)
                if role not in values or (is_no_image(values[role]) and not is_no_image(value)):
                    values[role], used[role] = value, column
        return values, used

    def _no_prompt(self, raw: Mapping[str, Any]) -> str:
        inner = next((name for name, value in raw.items() if _are_rows(value)), None)
        if inner is not None:
            return (
                f"is missing, and {inner} holds a list of {len(raw[inner])} rows: a file is an array of rows, or has "
                f"one a line; write what stands under {inner} alone"
            )
        near = next((f"; {name} is nearly {known}" for name in raw if (known := nearest(name, COLUMNS["prompt"]))), "")
        return (
            f"is missing; the row has {', '.join(map(str, raw)) or 'nothing'}{near}; known are "
            f"{', '.join(COLUMNS['prompt'])}; another one is named by data.columns: --column prompt=COLUMN"
        )

    def _renamed(self, problem: Problem, used: Mapping[str, str], raw: Mapping[str, Any]) -> Problem:
        role = next((role for role, known in SCHEMA_FIELDS.items() if known == problem.field), problem.field)
        column = used.get(role, problem.field)
        if role in self.mapping and not column.startswith(CONSTANT) and column.split(".")[0] not in raw:
            what = f"the row has no column {column}, which data.columns or --column names for {role}"
            return replace(problem, what=what)
        return problem if column == problem.field else replace(problem, field=f"{problem.field} (column {column})")


def _others(raw: Mapping[str, Any], roles: Roles, used: Mapping[str, str]) -> list[str]:
    """The columns of a row that hold no role: unknown ones, and those of a role that another column has."""
    unused = roles.paths.difference(used.values())
    return [*roles.kept, *sorted(name for name in unused if name in raw)] if unused else [*roles.kept]


def _schema_row(
    raw: Mapping[str, Any], roles: Roles, others: Sequence[str], values: Mapping[str, Any], place: Place
) -> dict[str, Any]:
    """A row of the parquet schema with the same content."""
    extra = {name: raw[name] for name in others if name.lower() not in _MEDIA_COLUMNS and _is_kept(raw[name])}
    extra |= {role: value for role, value in values.items() if role not in COLUMNS and value is not None}
    for name in [name for name in extra if name.lower() in OPTION_COLUMNS]:
        extra[name.lower()] = _plain_options(extra.pop(name))
    if roles.letters:
        extra["choices"] = [raw[name] for name in roles.letters if raw[name] is not None]
    info = raw.get("extra_info")
    if info is None or isinstance(info, dict):
        info = {**extra, **(info or {})}
        info |= {
            role: values[role] for role in ("id", "response", "chosen", "rejected") if values.get(role) is not None
        }
    return {
        "data_source": values.get("source", place.name),
        "prompt": _prompt(raw, values, extra),
        "images": _listed(values.get("images")),
        "videos": _listed(values.get("videos")),
        "reward_model": {"ground_truth": values.get("answer")},
        "extra_info": info,
        "ability": values.get("ability"),
        "system": values.get("system"),
    }


def _prompt(raw: Mapping[str, Any], values: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
    """The prompt of a row: an instruction with its input, a question with the options that stand beside it."""
    prompt = values["prompt"]
    turns = _listed(prompt)
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        prompt = turns
    elif not isinstance(prompt, str):
        return prompt
    elif isinstance(more := raw.get("input"), str) and more and raw.get("instruction") == prompt:
        prompt = f"{prompt}\n{more}"
    written = next((extra[name] for name in OPTION_COLUMNS if extra.get(name)), None)
    return with_options(prompt, options_of(written) or option_columns(extra), written)


def _plain_options(value: Any) -> Any:
    """Options as rewards read them: a list of texts as it is, marked text too, all other forms by label."""
    listed = _listed(value)
    if isinstance(listed, list) and not any(isinstance(one, Mapping) for one in listed):
        return listed
    return options_of(value) or value


def _unread(
    raw: Mapping[str, Any], names: Sequence[str], values: Mapping[str, Any], used: Mapping[str, str], place: Place
) -> list[Problem]:
    """Columns that look like images, videos or answers and are read by nobody: an error where the row has none, else
    a warning."""
    told: list[Problem] = []
    for name, kind in unread_media(raw, names):
        target = kind if kind in COLUMNS else "images"
        has = not is_no_image(values.get(target)) and kind in COLUMNS
        told.append(Problem(str(place), name, (
            f"looks like {kind} and is read by nobody" + (f", since {used[target]} has them" if has else "")
            + (f"; rename it {target}, or map it: --column {target}={name}" if kind in COLUMNS and not has else "")
            + f"; to keep it as a field: --column {name}={name}"
        ), warning=has))  # fmt: skip
    media = {problem.field for problem in told}
    has_answer = any(not is_no_image(values.get(role)) for role in ("answer", "response", "chosen"))
    for name in unread_answers(raw, [name for name in names if name not in media]):
        known = used["answer"] if has_answer and "answer" in used else "the row"
        what = f"{known} has one" if has_answer else "the row has none"
        told.append(Problem(str(place), name, (
            f"looks like an answer and is kept as a field, since {what}; to take it: --column answer={name}"
        ), warning=True))  # fmt: skip
    for name in names:
        if name.lower() in OPTION_COLUMNS and not is_no_image(raw[name]) and not options_of(raw[name]):
            told.append(Problem(str(place), name, (
                f"holds no options that can be read ({shown(raw[name])}), and the model is not shown it; write a list, "
                "or a mapping by label"
            ), warning=True))  # fmt: skip
    if is_no_image(values.get("images")) and is_no_image(values.get("videos")):
        told += [
            Problem(str(place), f"{name}.{inner}", (
                f"looks like {kind} and is read by nobody; map it: --column {kind}={name}.{inner}; to keep it as a "
                f"field: --column {name}={name}"
            ))
            for name in names if isinstance(raw[name], Mapping) and name.lower() not in OPTION_COLUMNS
            for inner, kind in unread_media(raw[name], list(raw[name])) if name not in media
        ]  # fmt: skip
    info = raw.get("extra_info")
    if isinstance(info, dict) and is_no_image(values.get("images")):
        told += [
            Problem(str(place), f"extra_info.{name}", f"looks like {kind} and is read by nobody", warning=True)
            for name, kind in unread_media(info, list(info))
        ]
    return told


def _is_kept(value: Any) -> bool:
    """Whether a column without a role joins `extra_info`: not where it is null, an empty mapping, or encoded data."""
    inner = (
        value.get("bytes") if isinstance(value, Mapping) else value[0] if isinstance(value, list) and value else value
    )
    return value is not None and value != {} and not isinstance(inner, bytes)


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value[:10])


def _listed(value: Any) -> Any:
    """A list that was written as text, as cells of tables have it; anything else as it is."""
    found = read_literal(value) if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]" else None
    return found if isinstance(found, list) else value


def _is_trl_prompt(used: Mapping[str, str], values: Mapping[str, Any], mapping: Mapping[str, str]) -> bool:
    """Whether a prompt is a list of messages in the column that TRL reads, or in one that is mapped to it."""
    prompt = values.get("prompt")
    named = used.get("prompt") == "prompt" or "prompt" in mapping
    return named and isinstance(prompt, list) and are_messages(prompt) and "role" in prompt[0]


def _ends_with_answer(prompt: Any) -> bool:
    last = prompt[-1] if isinstance(prompt, list) and len(prompt) > 1 else None
    return isinstance(last, Mapping) and any(last.get(role) in ("assistant", "gpt") for role in TURN_KEYS)


def _is_box_reply(values: Mapping[str, Any], raw: Mapping[str, Any]) -> bool:
    """A question about one image whose answer is a box: its ground truth is the box itself."""
    turns = raw.get("conversations")
    one = isinstance(raw.get("image"), str | Mapping) and is_no_image(values.get("answer"))
    if not one or turns != values.get("prompt") or not isinstance(turns, list) or len(turns) != 2:
        return False
    return is_only_a_box(_reply(turns))


def _reply(turns: Any) -> str:
    """The second turn of a conversation as LLaVA has it; empty where there is none."""
    turn = turns[1] if isinstance(turns, list) and len(turns) > 1 else None
    reply = turn.get("value") if isinstance(turn, Mapping) else None
    return reply if isinstance(reply, str) else ""
