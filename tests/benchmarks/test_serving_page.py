"""`docs/serving.md` states the figures of the newest results files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATTERNS = ("dense", "uniform", "geometric")


def newest(what: str, gpu: str = "h100") -> tuple[str, list[dict[str, Any]]]:
    """Name and rows of the newest results file."""
    path = max(
        (ROOT / "benchmarks/results").glob(f"{what}_{gpu}_*.json"), key=lambda p: p.name[-15:]
    )
    return path.name, json.loads(path.read_text())["rows"]


def table(first: str) -> list[list[str]]:
    """The cells of a table of the page, without the names of rows; one row has this name."""
    blocks = (ROOT / "docs/serving.md").read_text().split("\n\n")
    (found,) = (block for block in blocks if f"\n| {first} |" in block)
    rows = [line.strip("| ").split(" | ") for line in found.splitlines()[2:]]
    return [cells for _, *cells in rows]


def best(rows: list[dict[str, Any]], name: str, **wanted: Any) -> dict[str, Any]:
    """The row of a pattern as the back end runs it, with several classes side by side."""
    chosen = [
        row
        for row in rows
        if "order" in row
        and row["attention"].split(",")[0] == name
        and all(row[key] == value for key, value in wanted.items())
    ]
    return next((row for row in chosen if row["order"] == "side by side"), chosen[0])


def test_the_table_of_steps_is_the_newest() -> None:
    name, rows = newest("serving_replay")
    assert name in (ROOT / "docs/serving.md").read_text()
    (cudnn,) = (
        row["microseconds"]
        for row in rows
        if row.get("attention") == "dense, cuDNN" and row["requests"] == 8
    )
    found = table("requests of 65,536 tokens that fit")
    wanted: list[list[str]] = [[] for _ in found]
    for pattern in PATTERNS:
        equal = best(rows, pattern, part="equal lengths", requests=8)
        most = best(rows, pattern, part="equal lengths", requests=equal["most_requests"])
        turns = next(
            row
            for row in rows
            if row.get("order") == "in turns"
            and row["attention"].startswith(pattern)
            and (row["part"], row["requests"]) == ("equal lengths", 8)
        )
        mixed = best(rows, pattern, part="mixed lengths", requests=33)
        full = best(rows, pattern, part="mixed lengths", requests=mixed["most_requests"])
        times = [cudnn] * 3 if pattern == "dense" else [
            row["microseconds"] for row in (equal, turns, most)
        ]  # fmt: skip
        column = [equal["most_requests"], *times, mixed["most_requests"]]
        column += [mixed["microseconds"], full["microseconds"]]
        for cells, number in zip(wanted, column, strict=True):
            cells.append(f"{number:.0f}")
    assert found == wanted
    text = (ROOT / "docs/serving.md").read_text()
    geometric = best(rows, "geometric", part="equal lengths", requests=8)
    assert f"is {cudnn / geometric['microseconds']:.1f} times as fast" in text
    assert f"{geometric['most_requests'] / 8:.1f} times the\nrequests fit" in text


def test_the_table_of_a_queue_is_the_newest() -> None:
    name, rows = newest("serving_steps")
    assert name in (ROOT / "docs/serving.md").read_text()
    keys = {
        "steps": ",",
        "most_requests": "",
        "decode_milliseconds": ".0f",
        "prefill_milliseconds": ".0f",
        "new_tokens_per_second": ",.0f",
        "median_seconds_to_first_token": ".1f",
        "p90_seconds_to_first_token": ".1f",
    }
    wanted = [[f"{best(rows, p)[key]:{form}}" for p in PATTERNS] for key, form in keys.items()]
    assert table("steps") == wanted


def test_the_table_of_steps_in_vllm_is_the_newest() -> None:
    name, rows = newest("vllm_engine", "h200")
    text = (ROOT / "docs/serving.md").read_text()
    assert name in text
    found = {(row["pattern"], row["attention"], row["length"]): row for row in rows}
    flash = ("dense", "FLASH_ATTN")
    columns = [flash, ("uniform", ""), ("geometric", "")]
    wanted = []
    for key, digits in (("milliseconds_a_step", 2), ("seconds_before", 1)):
        for length in (16384, 65536):
            given = [found[*column, length] for column in columns]
            wanted.append([f"{row[key]:.{digits}f}" for row in given])
    assert table("a step at 16,384 tokens") == wanted
    dense, geometric = (
        [found[*column, length]["milliseconds_a_step"] for length in (16384, 65536)]
        for column in (flash, ("geometric", ""))
    )
    first, second = (a / b for a, b in zip(dense, geometric))
    assert f"is {first:.2f} times as fast" in text
    assert f"and {second:.2f} times at 65,536" in text
    _, rows = newest("vllm_cuda", "h200")  # with a profile
    found = {(row["pattern"], row["attention"], row["length"]): row for row in rows}
    scheduler = [
        found[*column, 16384]["profile"]["host_parts"]["AsyncScheduler.schedule"] / 1e3
        for column in (("geometric", ""), flash)
    ]
    assert (
        "takes {:.2f} ms with four classes of heads, {:.2f} with one".format(*scheduler).replace(
            "0.", "."
        )
        in text
    )


def test_the_table_beside_a_copy_is_the_newest() -> None:
    _, rows = newest("serving_replay")
    limits = [row for row in rows if row["part"] == "limits"]
    wanted = []
    for contiguous, paged in zip(limits[::2], limits[1::2]):
        copy = contiguous["copy_microseconds"]
        times = [copy, contiguous["microseconds"], paged["microseconds"]]
        wanted.append([f"{time:{'.1f' if copy < 100 else '.0f'}}" for time in times])
    blocks = (ROOT / "docs/serving.md").read_text().split("\n\n")
    (found,) = (block for block in blocks if "| a copy | contiguous | paged |" in block)
    assert [line.strip("| ").split(" | ")[2:] for line in found.splitlines()[2:]] == wanted


def test_the_table_of_prefill_is_the_newest() -> None:
    name, rows = newest("serving_prefill", "h200")
    assert name in (ROOT / "docs/serving.md").read_text()
    found = table("2,048 tokens")
    for step, cells in zip(dict.fromkeys(row["step"] for row in rows), found, strict=True):
        chosen = {row["pattern"]: row for row in rows if row["step"] == step}
        wanted = [
            f"{chosen[pattern][form]:,.0f}"
            for pattern in ("uniform", "geometric")
            for form in ("gathered", "in_place", "side_by_side")
        ]
        assert cells == wanted, step
