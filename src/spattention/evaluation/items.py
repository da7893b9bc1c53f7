"""Items of local tasks: the fields that each task reads, checked before any of them is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..files import shown

Item = Mapping[str, Any]


class Rule(NamedTuple):
    """A rule for a field: its text, and a test of the value, given the whole item."""

    text: str
    holds: Callable[[Any, Item], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _one_of(*values: Any) -> Rule:
    return Rule(
        f"one of {list(values)}",
        lambda value, item: any(type(value) is type(each) and value == each for each in values),
    )


def _texts(least: int, most: int = 100) -> Rule:
    def holds(value: Any, item: Item) -> bool:
        return isinstance(value, list) and least <= len(value) <= most and all(map(_is_text, value))

    return Rule(f"a list of at least {least} strings", holds)


def _index(field: str) -> Rule:
    """An index into a list of the item, as an integer or as its digits."""

    def holds(value: Any, item: Item) -> bool:
        digits = str(value)
        known = type(value) in (int, str) and digits.isascii() and digits.isdecimal()
        return known and len(digits) < 4 and int(digits) < len(item[field])

    return Rule(f"an index into `{field}`", holds)


TEXT = Rule("a string that is not blank", lambda value, item: _is_text(value))
ANY_TEXT = Rule("a string", lambda value, item: isinstance(value, str))
BLANK = Rule("a string with a `_`", lambda value, item: isinstance(value, str) and "_" in value)
ARC = {"query": TEXT, "choices": _texts(2), "gold": _index("choices")}
# Lists come before the indices into them.
FIELDS: dict[str, dict[str, Rule]] = {
    "hellaswag": {
        "activity_label": ANY_TEXT,
        "ctx_a": ANY_TEXT,
        "ctx_b": ANY_TEXT,
        "endings": _texts(2),
        "label": _index("endings"),
    },
    "winogrande": {
        "sentence": BLANK,
        "option1": TEXT,
        "option2": TEXT,
        "answer": _one_of("1", "2"),
    },
    "copa": {
        "premise": TEXT,
        "choice1": TEXT,
        "choice2": TEXT,
        "question": _one_of("cause", "effect"),
        "label": _one_of(0, 1),
    },
    "piqa": {"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": _one_of(0, 1)},
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "lambada_openai": {"query": TEXT, "answers_text": _texts(1)},
    "mmlu": {
        "subject": TEXT,
        "question": TEXT,
        "choices": _texts(4, 4),
        "answer": _one_of(*range(4)),
    },
}


def read_items(path: Path, task: str) -> Iterator[tuple[str, Item]]:
    """Read the items of a local task, a key of `FIELDS`, from JSON lines, each as its line and as
    an object.

    Raises:
        ValueError: naming the file, the line, the field and its rule, at the first bad item.
    """
    if path.is_dir():
        raise ValueError(f"{path} must be a file with items of the local task {task}, not a folder")
    if not path.is_file():
        raise ValueError(f"{path} is missing: it holds the items of the local task {task}")
    count = 0
    try:
        # A newline alone ends a line: texts may hold other separators.
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    count += 1
                    yield line.rstrip("\n"), _item(f"{path}, line {number}", line, task)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error
    if not count:
        raise ValueError(f"{path} must hold items of the task {task}, got none")


def _item(where: str, line: str, task: str) -> Item:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be a JSON object: {error}") from error
    if not isinstance(item, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(item).__name__}")
    fields = FIELDS[task]
    if missing := [name for name in fields if name not in item]:
        raise ValueError(
            f"{where} must have the fields {list(fields)} of {task}, {missing} are missing"
        )
    for name, rule in fields.items():
        if not rule.holds(item[name], item):
            raise ValueError(f"{where}: `{name}` must be {rule.text}, got {shown(item[name])}")
    return item
