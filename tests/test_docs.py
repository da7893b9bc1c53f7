"""What the pages say about the library is true: names, examples, shares, tests that they name."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest

import spattention as spa
from spattention.cache_layout import ring_lengths

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
P = spa.BandPattern


def blocks(page: Path) -> list[str]:
    found = re.findall(r"^( *)```python\n(.*?)^\1```", page.read_text(), re.M | re.S)
    return [_without_prompts(textwrap.dedent(text)) for _, text in found]


def _without_prompts(text: str) -> str:
    """The code of a session at Python's prompt."""
    if not text.startswith(">>> "):
        return text
    return "\n".join(line[4:] for line in text.splitlines() if line.startswith((">>> ", "... ")))


EXAMPLES = [(page, text) for page in PAGES for text in blocks(page)]


def dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    base = dotted(node.value) if isinstance(node, ast.Attribute) else None
    return base and f"{base}.{node.attr}"


@pytest.mark.parametrize(("page", "text"), EXAMPLES, ids=lambda value: getattr(value, "stem", ""))
def test_names_in_examples_exist(page, text):
    for node in ast.walk(ast.parse(text)):
        name = dotted(node) if isinstance(node, ast.Attribute) else None
        if name and name.startswith("spa."):
            found = spa
            for part in name.split(".")[1:]:
                found = getattr(found, part)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spattention"):
            names = ", ".join(alias.name for alias in node.names)
            if node.module == "spattention.adapters":  # named as the trainers that they need
                pytest.importorskip(names)
            exec(f"from {node.module} import {names}", {})


def test_works_with_names_tests_that_exist():
    rows = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs" / "works-with.md").read_text())
    assert len(rows) > 10
    assert [row for row in rows if not (ROOT / row).is_file()] == []


def test_the_readme_is_short():
    """About 500 words, code and addresses left out: one screen or two."""
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.S)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|<img[^>]*>|\]\([^)]*\)", " ", text)
    assert len(re.findall(r"[A-Za-z0-9][\w.,':()/-]*", text)) <= 500


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (
            P.shared_local(8, 1024, widths="geometric"),
            "| 1,024 | H = 8, geometric | .33 | .33, .59 |",
        ),
        (
            P.shared_local(8, 2048, widths="geometric", local=64),
            "| 2,048 | H = 8, geometric, `local=64` | .18 | .27, .55 |",
        ),
        (
            P.shared_local(16, 4096, widths="geometric"),
            "| 4,096 | H = 16, geometric | .12 | .24, .35 |",
        ),
        (
            P.shared_local(16, 16384, widths="geometric"),
            "| 16,384 | H = 16, geometric | .12 | .23, .35 |",
        ),
        (
            P.shared_local(16, 65536, widths="geometric"),
            "| 65,536 | H = 16, geometric | .12 | .23, .35 |",
        ),
        (
            P.shared_local(16, 131072, widths="geometric"),
            "| 131,072 | H = 16, geometric | .12 | .23, .35 |",
        ),
        (P.shared_local(32, 8192, widths="geometric"), "| a band for each query head | .09 |"),
        (P.shared_local(32, 8192, widths="geometric", kv_heads=8), "| `kv_heads=8` | .18 |"),
    ],
    ids=range(8),
)
def test_shares_of_pairs_are_those_of_the_patterns(pattern, said):
    assert said in (ROOT / "docs" / "choosing.md").read_text()
    n = pattern.span
    share = sum(pattern.pairs(n)) / (pattern.num_heads * n * (n + 1) / 2)
    assert f" {share:.2f} ".replace(" 0.", " .") in said
    if "H =" in said:
        assert f"| {_kept(pattern, 1)}, {_kept(pattern, 4)} |" in said


def _kept(pattern, group):
    """Share of a dense cache that a store keeps, where `group` heads share a key/value head."""
    heads = pattern.num_heads // group
    kept = sum(ring_lengths(pattern, heads)) / (heads * pattern.span)
    return f"{kept:.2f}".removeprefix("0")
