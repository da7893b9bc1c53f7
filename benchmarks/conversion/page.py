"""Write the tables of docs/finetuning.md and docs/conversion.md from results: no figure by hand.

    python -m benchmarks.conversion.page benchmarks/results/conversion_*.json

Every `<!-- conversion: NAME -->` of the page is followed by the table NAME, up to the next
`<!-- end -->`; `NAME at 8192` holds the rows fitted and trained at 8,192 tokens instead of 2,048.
Rows of several seeds are means, with the standard deviation in brackets; losses beyond dense's are
taken seed by seed, which is the order of the text. Losses of different texts are not compared:
files that hold losses must name the same text, or none.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tyro

from spattention.files import write_atomically
from spattention.markdown import table

PAGES = ("docs/finetuning.md", "docs/conversion.md")
ROOT = Path(__file__).parents[2]
CONTEXT = 2048  # of a table that names none
MARK = re.compile(
    r"(?P<mark><!-- conversion: (?P<name>[a-z-]+)(?: at (?P<context>\d+))? -->\n).*?"
    r"(?P<end><!-- end -->)",
    re.S,
)
SOURCES = ("wiki", "books")
SUMMARY = {  # rows of the short table, and what they are
    "dense": "dense",
    "fitted": "`fit`, the default",
    "fitted-prefix-sinks": "`fit` with sinks",
    "fitted-first": "`fit` with a dense first layer",
    "5:1": "5 windows : 1 dense layer",
    "5:1-sinks": "5 : 1 with sinks",
    "5:1-prefix": "5 : 1 with a prefix",
    "3:1-sinks": "3 : 1 with sinks",
    "window-prefix": "one window with a prefix",
}
MISSING = "-"

Runs = dict[tuple[str, float], list[dict[str, Any]]]  # row and million tokens -> one per seed


def main(files: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Fill the marked tables of the pages."""
    for name in PAGES:
        page = ROOT / name
        write_atomically(page, fill_all(page.read_text(encoding="utf-8"), files))


def fill_all(text: str, files: Sequence[Path]) -> str:
    """A page with the tables of all its marks."""

    def filled(found: re.Match[str]) -> str:
        return fill(found, read(files, int(found["context"] or CONTEXT)))

    return MARK.sub(filled, text)


def read(files: Sequence[Path], context: int = CONTEXT) -> Runs:
    """The runs of all files of a context, by row and tokens."""
    runs: Runs = defaultdict(list)
    texts: dict[str, str] = {}
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["settings"].get("context", CONTEXT) != context:
            continue
        if any("loss" in row for row in found["rows"]):
            texts[str(found["settings"].get("text"))] = file.name
        for row in found["rows"]:
            runs[row["row"], row["million_tokens"]].append(row)
    if len(texts) > 1:
        raise SystemExit(f"losses must be of one text, {list(texts.values())} differ in theirs")
    return runs


def holding(runs: Runs, part: str) -> Runs:
    """The runs that measured a part; raises where two files hold the same run of it."""
    kept = {key: [row for row in rows if row.get(part)] for key, rows in runs.items()}
    for (name, tokens), rows in kept.items():
        seeds = [row["seed"] for row in rows] if tokens else [0] * len(rows)
        if len(set(seeds)) < len(seeds):
            raise SystemExit(
                f"a run must be in one file, {part} of {name} at {tokens:g} M is there with seeds "
                f"{seeds}"
            )
    return {key: rows for key, rows in kept.items() if rows}


def fill(found: re.Match[str], runs: Runs) -> str:
    """A mark, its table, and its end."""
    name = found["name"]
    if name not in TABLES:
        raise SystemExit(f"a table must be one of {sorted(TABLES)}, got {name}")
    return f"{found['mark']}{TABLES[name](runs)}{found['end']}"


def summary(runs: Runs) -> str:
    """The rows that a reader chooses from: cost, loss and retrieval before and after training, and
    speed in multiples of dense attention's. Passkeys are those of the length that was fitted.
    """
    timed, runs = holding(runs, "speed"), holding(runs, "loss")
    main = _main(runs)
    head = ["attention", "pairs", "cache", "lost untrained", "passkeys", f"lost after {main:g} M"]
    lines = []
    for name, title in SUMMARY.items():
        if not (runs.get((name, 0)) or runs.get((name, main))):
            continue
        rows = runs.get((name, 0)) or runs[name, main]
        cells = [title, f"{rows[0]['pairs']:.2f}", f"{rows[0]['cache']:.2f}"]
        for tokens in (0, main):
            rows = runs.get((name, tokens), [])
            lost = [_differences(rows, runs["dense", tokens], source) for source in SOURCES]
            cells.append(" / ".join(f"{mean(each):+.3f}" for each in lost if each) or MISSING)
            keys = [row["passkeys"].get(str(CONTEXT)) for row in rows if row.get("passkeys")]
            shares = [share for found in keys if found for share in found.values()]
            cells.append(f"{mean(shares):.2f}" if shares else MISSING)
        lines.append([*cells, _times_dense(timed, name)])
    return _page([*head, "passkeys", "first pass / decoding, x"], lines)


def _times_dense(timed: Runs, name: str) -> str:
    """Speed of a first pass and of decoding at the longest length, in multiples of dense's."""
    if not (timed.get((name, 0)) and timed.get(("dense", 0))):
        return MISSING
    shares = []
    for part in ("prefill", "decode"):
        own, dense = (
            timed[each, 0][0]["speed"][part][max(timed[each, 0][0]["speed"][part], key=int)]
            for each in (name, "dense")
        )
        shares.append(f"{own['tokens_per_second'] / dense['tokens_per_second']:.1f}")
    return " / ".join(shares)


def before_training(runs: Runs) -> str:
    """Every row at 0 tokens, the best loss first."""
    asked, runs = holding(runs, "tasks"), holding(runs, "loss")
    dense = runs["dense", 0]
    names = sorted((name for name, tokens in runs if not tokens), key=lambda n: _total(runs[n, 0]))
    head = ["attention", "pairs", "cache", "lost on Wikipedia", "on books"]
    lines = []
    for name in names:
        rows = runs[name, 0]
        lost = [_figure(_differences(rows, dense, source)) for source in SOURCES]
        cells = [name, f"{rows[0]['pairs']:.2f}", f"{rows[0]['cache']:.2f}", *lost]
        lines.append([*cells, _passkeys(rows), _tasks(asked.get((name, 0), []))])
    return _page([*head, "passkeys", "zero-shot"], lines)


def after_training(runs: Runs) -> str:
    """Losses beyond dense trained on the same tokens, by number of tokens; dense's themselves."""
    asked, runs = holding(runs, "tasks"), holding(runs, "loss")
    amounts = sorted({tokens for _, tokens in runs if tokens})
    if not amounts:
        return ""
    main = _main(runs)
    # A row that was not trained on the main number of tokens shows its last one.
    last = {name: tokens for name, tokens in sorted(runs) if tokens}
    last |= {name: main for name, tokens in runs if tokens == main}
    names = sorted(last, key=lambda n: (last[n] != main, _total(runs[n, last[n]])))
    of = f" at {main:g} M" if len(amounts) > 1 else ""
    head = ["attention", "pairs", *(f"{tokens:g} M: Wikipedia / books" for tokens in amounts)]
    head += [f"{each}{of}" for each in ("seeds", "passkeys", "zero-shot")]
    lines = []
    for name in names:
        cells = []
        for tokens in amounts:
            rows, dense = runs.get((name, tokens), []), runs.get((_base(name), tokens), [])
            if name == _base(name):
                losses = [[row["loss"][source]["mean"] for row in rows] for source in SOURCES]
                figures = [_figure(each).removeprefix("+") for each in losses]
            else:
                figures = [_figure(_differences(rows, dense, source)) for source in SOURCES]
            cells.append(" / ".join(figures) if rows else MISSING)
        rows = runs[name, last[name]]
        more = [str(len(rows)), _passkeys(rows), _tasks(asked.get((name, last[name]), []))]
        lines.append([name, f"{rows[0]['pairs']:.2f}", *cells, *more])
    return _page(head, lines)


def _main(runs: Runs) -> float:
    """The number of tokens that most runs were trained on; of several the largest."""
    trained = [tokens for (_, tokens), rows in runs.items() if tokens for _ in rows]
    return max(trained, key=lambda each: (trained.count(each), each), default=0)


def needles(runs: Runs) -> str:
    """Share of passkeys found by length and depth, before training and after each number of
    tokens.
    """
    shown = dict(sorted(holding(runs, "passkeys").items()))
    lengths = sorted({int(n) for rows in shown.values() for n in rows[0]["passkeys"]})
    head = ["attention", "M tokens", *(f"{length:,}" for length in lengths)]
    lines = []
    for (name, tokens), rows in shown.items():
        cells = [name, f"{tokens:g}"]
        for length in map(str, lengths):
            depths = rows[0]["passkeys"].get(length, {})
            shares = [mean(row["passkeys"][length][depth] for row in rows) for depth in depths]
            cells.append(" ".join(f"{share:.2f}" for share in shares) or MISSING)
        lines.append(cells)
    return _page(head, lines)


def ruler(runs: Runs) -> str:
    """Score of each of RULER's tasks, with the standard error over its prompts."""
    runs = holding(runs, "ruler")
    tasks = sorted({t for rows in runs.values() for s in rows[0]["ruler"].values() for t in s})
    lines = []
    for (name, tokens), rows in sorted(runs.items()):
        for length, scores in rows[0]["ruler"].items():
            cells = [f"{scores[t]['mean']:.2f} ({scores[t]['error']:.2f})" for t in tasks]
            prompts = next(iter(scores.values()))["items"]
            lines.append([name, f"{tokens:g}", f"{int(length):,}", str(prompts), *cells])
    return _page(["attention", "M tokens", "length", "prompts", *tasks], lines)


def positions(runs: Runs) -> str:
    """Losses beyond dense's by position in the window, after the main number of tokens."""
    runs = holding(runs, "loss")
    last = _main(runs)
    dense = runs["dense", last]
    names = sorted(
        (
            name
            for name, tokens in runs
            if tokens == last and name != _base(name) and (_base(name), last) in runs
        ),
        key=lambda n: _total(runs[n, last]),
    )
    edges = dense[0]["loss"][SOURCES[0]]["edges"]
    ranges = [f"{near:,} to {far - 1:,}" for near, far in zip(edges, edges[1:])]
    lines = []
    for name in names:
        for source, title in zip(SOURCES, ("Wikipedia", "books")):
            parts = range(len(ranges))
            base = runs[_base(name), last]
            cells = [_figure(_differences(runs[name, last], base, source, k)) for k in parts]
            lines.append([name, title, *cells])
    return _page(["attention", "text", *ranges], lines)


def speeds(runs: Runs) -> str:
    """Pairs, bytes of the cache, and tokens per second of a first pass and of decoding."""
    runs = holding(runs, "speed")
    rows = [found[0] for (_, tokens), found in runs.items() if not tokens]
    if not rows:
        return ""
    lengths = list(rows[0]["speed"]["prefill"])
    (longest,) = rows[0]["speed"]["decode"]
    head = ["attention", *(f"pairs at {int(length):,}" for length in lengths), "cache, MB a text"]
    head += [f"first pass of {int(length):,}, tokens/s" for length in lengths]
    head += [f"{rows[0]['speed']['decode'][longest]['rows']} texts decoded, tokens/s"]
    lines = []
    for row in rows:
        prefill, step = row["speed"]["prefill"], row["speed"]["decode"][longest]
        cells = [row["row"], *(f"{prefill[length]['pairs']:.2f}" for length in lengths)]
        cells += [f"{step['cache_bytes'] / 1e6:.1f}"]
        cells += [f"{_round(prefill[length]['tokens_per_second']):,}" for length in lengths]
        lines.append([*cells, f"{_round(step['tokens_per_second']):,}"])
    return _page(head, lines)


def memories(runs: Runs) -> str:
    """Pairs and bytes of the cache of one long text, in numbers of two bytes."""
    rows = [found[0] for (_, tokens), found in holding(runs, "memory").items() if not tokens]
    if not rows:
        return ""
    tokens = rows[0]["memory"]["tokens"]
    head = ["attention", "pairs at 2,048", f"pairs at {tokens:,}", f"cache of {tokens:,}, MB", "x"]
    lines = []
    sizes = [2 * row["memory"]["bytes"] / row["memory"]["bytes_per_number"] for row in rows]
    for row, size in zip(rows, sizes):
        cells = [row["row"], f"{row['pairs']:.2f}", f"{row['memory']['pairs']:.2f}"]
        lines.append([*cells, f"{size / 1e6:.1f}", f"{sizes[0] / size:.1f}"])
    return _page(head, lines)


def _page(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(table(headings, rows)) + "\n"


TABLES: dict[str, Callable[[Runs], str]] = {
    "summary": summary,
    "memory": memories,
    "before": before_training,
    "after": after_training,
    "needles": needles,
    "ruler": ruler,
    "positions": positions,
    "speed": speeds,
}


def _base(name: str) -> str:
    """The dense row that a row is compared with: adapters with adapters."""
    return "dense-lora" if name.endswith("-lora") else "dense"


def _differences(
    rows: Sequence[dict[str, Any]],
    dense: Sequence[dict[str, Any]],
    source: str,
    part: int | None = None,
) -> list[float]:
    """Losses beyond dense's with the same seed, which reads the same text in the same order; beyond
    dense's mean over its seeds where that seed was not run. Of one part of the window, or of all.
    """
    if not dense or any(source not in row.get("loss", {}) for row in (*rows, *dense)):
        return []

    def loss(row: dict[str, Any]) -> float:
        found = row["loss"][source]
        return float(found["mean"] if part is None else found["parts"][part])

    same = {row["seed"]: loss(row) for row in dense}
    base = mean(same.values())
    return [loss(row) - same.get(row["seed"], base) for row in rows]


def _figure(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    spread = f" ({stdev(values):.3f})" if len(values) > 1 else ""
    return f"{mean(values):+.3f}{spread}"


def _round(value: float) -> int:
    """Three digits: more is noise."""
    return int(float(f"{value:.3g}"))


def _total(rows: Sequence[dict[str, Any]]) -> float:
    return mean(source["mean"] for row in rows for source in row["loss"].values())


def _passkeys(rows: Sequence[dict[str, Any]]) -> str:
    """Share of all passkeys, by length."""
    lengths = rows[0].get("passkeys", {})
    shares = [
        f"{mean(share for row in rows for share in row['passkeys'][length].values()):.2f}"
        for length in lengths
    ]
    return " ".join(shares) or MISSING


def _tasks(rows: Sequence[dict[str, Any]]) -> str:
    found = [task["mean"] for row in rows for task in row.get("tasks", {}).values()]
    return f"{100 * mean(found):.1f}" if found else MISSING


if __name__ == "__main__":
    tyro.cli(main)
