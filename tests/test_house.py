"""The layout rules of docs/design.md, checked against the source tree.

Each check takes a tree of sources, so that a planted violation shows that it can fail.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "spattention"

MAX_PARAMETERS = 12
MAX_LINES = 500
MAX_TEST_NAME = 50
# Operator schemas and public signatures that follow FlashAttention's conventions.
MANY_PARAMETERS = {
    "attention.py",
    "checks.py",
    "impl/blockwise.py",
    "impl/triton/op.py",
    "impl/triton/decode/op.py",
}
OPENINGS = ("What", "Whether", "Where", "Of", "As")


def allowed_imports() -> dict[str, set[str]]:
    """The table of docs/design.md: room -> rooms that it may import."""
    text = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| `([\w]+)` \|[^|]*\| (.*?) \|$", text, re.M)
    return {room: set(re.findall(r"`(\w+)`", allowed)) for room, allowed in rows}


def modules(source: Path) -> dict[str, Path]:
    """Dotted names, relative to the package, of all modules."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: Path) -> dict[str, set[str]]:
    """Imports within the package, module by module, those inside functions included."""
    known = modules(source)
    edges: dict[str, set[str]] = defaultdict(set)
    for name, path in known.items():
        package = list(path.relative_to(source).parts[:-1])
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = package[: len(package) - node.level + 1]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                target = ".".join([*base, alias.name])
                target = target if target in known else ".".join(base)
                if target in known and target != name:
                    edges[name].add(target)
    return edges


def room(module: str) -> str:
    return module.split(".")[0]


def wrong_directions(source: Path, allowed: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {target}"
        for module, targets in sorted(imports(source).items())
        for target in sorted(targets)
        if module
        and target  # the version, from the package itself
        and module != "__main__"
        and room(module) != room(target)
        and room(target) not in allowed.get(room(module), set())
    ]


def circles(source: Path) -> list[list[str]]:
    """Groups of modules that import one another in a circle, packages' own files left out."""
    edges = imports(source)
    reach = {module: {module} for module in modules(source)}
    changed = True
    while changed:
        changed = False
        for found in reach.values():
            more = set().union(*(edges.get(each, set()) for each in found)) - found
            if more:
                found |= more
                changed = True
    return [
        sorted({module, other})
        for module in reach
        for other in reach[module]
        if module < other and module in reach[other] and module
    ]


def functions(source: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in modules(source).values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield str(path.relative_to(source)), node


def long_signatures(source: Path) -> list[str]:
    def count(node: ast.FunctionDef) -> int:
        given = node.args
        return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)

    return [
        f"{path}:{node.name} has {count(node)} parameters"
        for path, node in functions(source)
        if count(node) > MAX_PARAMETERS and path not in MANY_PARAMETERS and not is_kernel(node)
    ]


def is_kernel(node: ast.FunctionDef) -> bool:
    """Kernels take pointers and compile-time constants, at most 25 of them."""
    jit = any("jit" in ast.unparse(each) for each in node.decorator_list)
    return jit and len(node.args.args) <= 25


def bad_docstrings(source: Path) -> list[str]:
    found = []
    for path in modules(source).values():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                words = (ast.get_docstring(node) or "-").split()
                if words and words[0] in OPENINGS:
                    name = getattr(node, "name", "module")
                    found.append(f"{path.relative_to(source)}:{name} opens with {words[0]}")
    return found


# Documented methods of NamedTuples, and a suffix of lm-evaluation-harness' files.
PUBLIC_UNDERSCORES = {"_fields", "_replace", "_asdict", "_make", "_tasks"}
OUR_MARK = "_spattention_"  # attributes that the package puts on other libraries' objects


def own_names(source: Path) -> set[str]:
    """Names with an underscore that the package itself defines."""
    names = set(PUBLIC_UNDERSCORES)
    for path in modules(source).values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) in {"self", "cls"} else set()
    return names


def is_private(name: str) -> bool:
    return any(re.fullmatch(r"_(?!_)\w+", part) for part in name.split("."))


def private_names(tree: ast.Module) -> Iterator[str]:
    """Underscored names of attributes, absolute imports and strings that are one name."""
    parts = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Constant) and id(node) not in parts:
            if re.fullmatch(r"[\w.]+", str(node.value)) and is_private(str(node.value)):
                yield str(node.value)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from filter(is_private, names)


def private_uses(source: Path) -> list[str]:
    """Private names of other libraries outside `compat`."""
    own = own_names(source)
    return [
        f"{path.relative_to(source)} names {name}"
        for module, path in modules(source).items()
        if room(module) != "compat"
        for name in private_names(ast.parse(path.read_text()))
        if name not in own and not name.startswith(OUR_MARK)
    ]


def long_test_names(folder: Path) -> list[str]:
    """Tests whose names are sentences, which belong in their docstrings."""
    return [
        f"{path.relative_to(folder)}:{node.name} has {len(node.name)} characters"
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test")
        and len(node.name) > MAX_TEST_NAME
    ]


def retired_words() -> list[str]:
    """The table of docs/design.md: words that the package no longer uses."""
    text = (ROOT / "docs" / "design.md").read_text().split("| retired | write |")[1]
    rows = re.findall(r"^\| (`.*?`) \|", text.split("\n\n")[0], re.M)
    return [word for row in rows for word in re.findall(r"`([\w ]+)`", row)]


def retired_uses(source: Path) -> list[str]:
    pattern = re.compile(r"\b(" + "|".join(retired_words()).replace(" ", r"\s+") + r")\b", re.I)
    return [
        f"{path.relative_to(source)} writes {word!r}"
        for path in modules(source).values()
        for word in pattern.findall(path.read_text())
    ]


def long_files(source: Path) -> list[str]:
    lines = {path: len(path.read_text().splitlines()) for path in modules(source).values()}
    return [
        f"{path.relative_to(source)} has {count} lines"
        for path, count in lines.items()
        if count > MAX_LINES
    ]


def test_imports_follow_the_table():
    assert wrong_directions(SOURCE, allowed_imports()) == []


def test_no_circle_of_imports():
    assert circles(SOURCE) == []


def test_signatures_are_short():
    assert long_signatures(SOURCE) == []


def test_docstrings_open_with_a_verb_or_noun():
    assert bad_docstrings(SOURCE) == []


def test_files_are_short():
    assert long_files(SOURCE) == []


def test_private_names_are_in_compat_alone():
    assert private_uses(SOURCE) == []


def test_no_retired_words():
    assert len(retired_words()) > 10
    assert retired_uses(SOURCE) == []


def test_names_of_tests_are_short():
    assert long_test_names(ROOT / "tests") == []


def test_a_planted_long_name_is_found(tmp_path):
    (tmp_path / "test_new.py").write_text(f"def test_{'x' * 46}():\n    pass\n")
    assert long_test_names(tmp_path)


def benchmark_faults(folder: Path) -> list[str]:
    """Imports of the command line, and changes of the import path, in benchmarks/."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            bad = [n for n in names if n.startswith("spattention.cli") or n == "sys.path"]
            found += [f"{path.relative_to(folder)} names {name}" for name in bad]
    return found


def test_benchmarks_are_a_package_below_no_command():
    assert (ROOT / "benchmarks" / "__init__.py").exists()
    assert benchmark_faults(ROOT / "benchmarks") == []


@pytest.mark.parametrize(
    "line", ["from spattention.cli import main", "import spattention.cli", "sys.path.insert(0, '')"]
)
def test_a_planted_fault_of_benchmarks_is_found(line, tmp_path):
    (tmp_path / "new.py").write_text(f"import sys\n{line}\n")
    assert benchmark_faults(tmp_path)


PLANTED = {
    "directions": ("bands.py", "from .attention import band_attention\n"),
    "circles": ("impl/layout.py", "from . import reference\n"),
    "signatures": ("merging.py", f"def f({', '.join(f'a{i}' for i in range(13))}): ...\n"),
    "docstrings": ("merging.py", 'def f():\n    """Whether it is so."""\n'),
    "files": ("merging.py", "# line\n" * 500),
    "words": ("merging.py", "# Mended, and goes\n# on.\n"),
    "private attribute": ("merging.py", "def f():\n    return torch._C._is_tracing()\n"),
    "private import": ("merging.py", "from torch._dynamo import config\n"),
    "private string": ("merging.py", 'def f(x):\n    return getattr(x, "_version")\n'),
}


@pytest.mark.parametrize("rule", PLANTED)
def test_a_planted_violation_is_found(rule, tmp_path):
    for path in modules(SOURCE).values():
        copy = tmp_path / path.relative_to(SOURCE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    name, text = PLANTED[rule]
    with (tmp_path / name).open("a") as file:
        file.write("\n" + text)
    found = {
        "directions": lambda: wrong_directions(tmp_path, allowed_imports()),
        "circles": lambda: circles(tmp_path),
        "signatures": lambda: long_signatures(tmp_path),
        "docstrings": lambda: bad_docstrings(tmp_path),
        "files": lambda: long_files(tmp_path),
        "private": lambda: private_uses(tmp_path),
        "words": lambda: retired_uses(tmp_path),
    }[rule.split()[0]]()
    assert found
