"""Files on disk: written whole or not at all, and read within limits.

A reader of what somebody else wrote decides first how much it is ready to take: a file's size, an
array's header and the depth of its JSON are checked before memory is spent on them.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished"
LONGEST_REASON = 300  # characters of an exception's message
JSON_BYTES = 2**20  # of a description; no such file here comes near it
CLOSE = 0.85  # likeness of two names from which on one is a slip of the other


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in errors of the system that do not, such as those of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{path} cannot be read or written: {error}") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is either the old one or the whole new one, also after a loss of power."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED
    )
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp's own mode would hide it from other users
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_folder(path: Path) -> list[Path]:
    """Make a folder with its parents; returns those that were made, for `remove_empty`."""
    made = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return made


def check_place(option: str, path: Path) -> None:
    """Check that a file or folder can be made at a path, before there is anything to write.

    Raises:
        ValueError: if a file is among its parents, or nothing can be written to the nearest one
            that exists.
    """
    places = (path, *path.parents) if path.is_dir() else path.parents
    place = next((each for each in places if each.exists()), Path())
    if not place.is_dir():
        raise ValueError(f"`{option}` must be in a folder, got {path}, where {place} is a file")
    try:
        # The permissions do not tell: root has all, and /proc takes nothing.
        Path(tempfile.mkdtemp(dir=place, suffix=UNFINISHED)).rmdir()
    except OSError as error:
        raise ValueError(
            f"`{option}` must be where files can be made, got {path} in {place}"
        ) from error


def remove_empty(folders: list[Path]) -> None:
    """Remove folders from the innermost outwards, up to the first that holds something."""
    for folder in folders:
        if folder.exists():
            if any(folder.iterdir()):
                break
            folder.rmdir()


def check_local(name: str, rule: str, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a name that means a path which does not exist, before the hub is asked for it.

    Args:
        name: a path, or a name on the Hugging Face hub.
        rule: start of the message, such as "`--tokenizer` must be a file or a name on the hub".
        suffixes: ends of names that no repository on the hub has.

    Raises:
        ValueError: with the nearest name in the same folder.
    """
    path = Path(name)
    on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII)
    local = not on_hub or ("/" in name and path.parent.is_dir()) or path.suffix in suffixes
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{rule}, {shown_path(name)} is a link to nothing")
    slip = path.suffix and near_path(path, CLOSE)  # one.tx, where there is one.txt
    if path.exists() or not (local or slip):
        return
    raise ValueError(f"{rule}, {shown_path(name)} is neither a file nor a folder{near_path(path)}")


def check_folder(path: Path) -> None:
    """Check that a saved model's folder is there; raises `ValueError` with the nearest name."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} must be the folder of a saved model, it is a link to nothing")
    if not path.exists():
        raise ValueError(
            f"{path} must be the folder of a saved model, there is no such folder{near_path(path)}"
        )


def near_path(path: Path, cutoff: float = 0.6) -> str:
    """A hint at the nearest name in the folder of a path that does not exist."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=cutoff)
    return f", did you mean {path.parent / close[0]}?" if close else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest of some names, for the end of a message; empty if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def counted(number: int, noun: str) -> str:
    """A number with its noun, as in "1 document" and "2,000 documents"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def is_unfinished(path: Path) -> bool:
    """True for a file that `write_atomically` left when its process was killed."""
    return path.name.startswith(".") and path.name.endswith(UNFINISHED)


def remove_unfinished(folder: Path) -> None:
    """Remove what `write_atomically` left in a folder when its process was killed."""
    if not folder.is_dir():
        return
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    with naming(path):
        try:
            os.fsync(handle)
        except OSError as error:
            # Some network file systems have no such call for folders.
            if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def read_json(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        ValueError: if there is no such file, or it holds anything else; the message names it.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "missing"
        raise ValueError(f"{path} must be a file with a JSON object, it is {kind}")
    check_bytes(path, limit)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold a JSON object: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def check_bytes(path: Path, limit: int) -> None:
    """Check that a file is no larger than its reader is ready to take; raises `ValueError`."""
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} must have at most {limit} bytes, got {size}")


def shown_path(name: str) -> str:
    """A path for a message, cut where it is long."""
    return name if len(name) <= 200 else f"{name[:197]}..."


def shown(value: object) -> str:
    """`repr` of a value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def reason(error: BaseException) -> str:
    """An exception's message in one line of bounded length, with its type where it says little."""
    if isinstance(error, KeyError):
        return f"there is no {' '.join(str(error).split())[:LONGEST_REASON]}"
    text = " ".join(str(error).split())
    if len(text) > LONGEST_REASON:
        text = text[:LONGEST_REASON].rsplit(" ", 1)[0] + " ..."
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
