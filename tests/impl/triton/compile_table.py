"""Compile the kernels for sm_90 without a GPU, and compare what ptxas says with a committed table.

    python -m tests.impl.triton.compile_table                  # show every form
    python -m tests.impl.triton.compile_table --check          # core forms, with this Triton
    python -m tests.impl.triton.compile_table --check --triton DIR --triton DIR
    python -m tests.impl.triton.compile_table --update --triton DIR ...

`DIR` is a folder with another Triton: `pip install --no-deps --target DIR triton==3.9.0`. A check
fails where a kernel is serialised, or has more registers, spills or shared memory than in the
table. `--update` compiles every form and writes the table; it is needed whenever a kernel, a launch
or the forms change. `--newest` compares a Triton that the table does not have with the newest one
that it has.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
TABLE = HERE / "compile_table.json"
KERNELS = ROOT / "src" / "spattention" / "impl" / "triton"
# Whatever chooses or makes a compiled form; not the operators around the kernels.
SOURCES = (
    *sorted(path for path in KERNELS.rglob("*.py") if path.name not in ("__init__.py", "op.py")),
    HERE / "compile_forms.py",
    HERE / "without_gpu.py",
)
NUMBERS = ("registers", "stack", "spills", "shared")


@dataclass(frozen=True)
class Compiled:
    """Numbers of ptxas for one kernel; stack, spills and shared memory in bytes."""

    name: str
    registers: int
    stack: int
    spills: int
    shared: int
    serialized: bool = False
    instructions: str = ""
    opcodes: str = ""
    products: int = 0  # tensor-core instructions; only `chip_table.py` counts them

    def __str__(self) -> str:
        return (
            f"{self.name:78} {self.registers:3} registers {self.stack:5} B stack "
            f"{self.spills:5} B spills {self.shared:6} B shared"
            f"{' SERIALIZED' if self.serialized else ''}"
        )


def digest(paths: Iterable[Path] = SOURCES) -> str:
    """Digest of the code of files, without comments, docstrings and blank lines."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode())
        found.update(code_of(path.read_text()).encode())
    return found.hexdigest()


def code_of(source: str) -> str:
    """A source without comments, docstrings and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            assert docstring.end_lineno is not None
            for row in range(docstring.lineno, docstring.end_lineno + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def differences(
    found: Iterable[Compiled], expected: dict[str, list[int]], forms: Iterable[str]
) -> list[str]:
    """What is worse than in a table, one line each; the table has `NUMBERS` of each kernel.

    Args:
        found: the compiled kernels.
        expected: a version's table.
        forms: the forms that were compiled, all of whose kernels must be found.
    """
    worse = []
    names = set()
    for kernel in found:
        names.add(kernel.name)
        if kernel.serialized:
            worse.append(f"{kernel.name}: wgmma instructions are serialized")
        if kernel.name not in expected:
            worse.append(f"{kernel.name}: not in the table")
            continue
        for what, limit in zip(NUMBERS, expected[kernel.name]):
            number = getattr(kernel, what)
            if number > limit:
                worse.append(f"{kernel.name}: {number} {what}, {limit} in the table")
    prefixes = tuple(f"{form}: " for form in forms)
    missing = [name for name in expected if name.startswith(prefixes) and name not in names]
    return worse + [f"{name}: not compiled" for name in missing]


def compile_forms(forms: Iterable[str] | None, codes: bool = False) -> list[Compiled]:
    """Compile the kernels of forms (None for all) with this process's Triton; print each.

    Args:
        forms: names in `compile_forms.py`.
        codes: also make digests of the machine code.
    """
    import triton

    from .compile_forms import forms as all_forms

    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    logs: dict[int, str] = {}

    def numbers(name: str, built: Any, log: str) -> Compiled:
        digests = machine_code(built.asm["cubin"]) if codes else ("", "")
        return replace(from_ptxas(name, built, log), instructions=digests[0], opcodes=digests[1])

    rows = []
    for form, call in all_forms():
        if forms is None or form in forms:
            for row in compile_form(form, call, logs, numbers):
                print(row, flush=True)
                rows.append(row)
    return rows


def compile_form(
    form: str,
    call: Callable[[], None],
    logs: dict[int, str],
    numbers: Callable[[str, Any, str], Compiled],
    **target: Any,
) -> list[Compiled]:
    """The kernels that a call launches.

    Args:
        form: name of the call.
        call: to make.
        logs: the assembler's, of the kernels that other calls compiled for the same GPU.
        numbers: makes a row of a kernel's name, what was compiled, and the assembler's log.
        target: arguments of `launches_to`, for another GPU than an H200.
    """
    from .without_gpu import launches_to

    found: list[Compiled] = []
    launches: Counter[str] = Counter()

    def launched(kernel: Any, programs: int, key: Any, *arguments: Any, **constants: Any) -> None:
        function = kernel.function
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            built = function.run(*arguments, grid=(programs,), warmup=True, **constants)
        log = logs.setdefault(id(built), printed.getvalue())
        module = function.__module__.removeprefix("spattention.impl.triton.")
        name = f"{module}.{function.__name__}"
        launches[name] += 1
        again = f" ({launches[name]})" if launches[name] > 1 else ""
        found.append(numbers(f"{form}: {name}{again}", built, log))

    with launches_to(launched, **target):
        call()
    return found


def from_ptxas(name: str, built: Any, log: str) -> Compiled:
    """The numbers of a kernel for an NVIDIA GPU."""

    def numbers(pattern: str) -> list[int]:
        return [int(number) for number in re.findall(pattern, log)]

    return Compiled(
        name=name,
        registers=max(numbers(r"Used (\d+) registers")),
        stack=max(numbers(r"(\d+) bytes stack frame")),
        spills=sum(numbers(r"(\d+) bytes spill")),
        shared=built.metadata.shared,
        serialized="are serialized" in log,
    )


def machine_code(cubin: bytes) -> tuple[str, str]:
    """Digests of the instructions with their operands, and of the sorted operation codes. Addresses
    of kernel parameters are left out: they follow the order of arguments.
    """
    import triton

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [disassembler, "-c", file.name], capture_output=True, text=True, check=True
        )
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*?) *;", done.stdout)
    lines = [re.sub(r"c\[0x0\]\[[^]]*\]|`\([^)]*\)", "", line) for line in lines]
    codes = sorted(re.sub(r"^@!?\w+ ", "", line).split()[0] for line in lines)
    instructions, opcodes = (
        hashlib.sha256("\n".join(each).encode()).hexdigest()[:12] for each in (lines, codes)
    )
    return instructions, opcodes


def ptxas_version() -> str:
    """Release of the assembler that this Triton uses for sm_90."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(90).version)


def check(forms: Iterable[str], newest: bool) -> list[str]:
    """Differences of this process's Triton from the committed table."""
    import triton

    tables = json.loads(TABLE.read_text())["tables"]
    version = triton.__version__
    if version not in tables:
        if not newest:
            return [f"Triton {version} is not in the table, which has {', '.join(tables)}"]
        version = max(tables, key=lambda each: [int(part) for part in each.split(".")])
        print(f"Triton {triton.__version__} is not in the table: compared with {version}")
    return differences(compile_forms(forms), tables[version]["kernels"], forms)


def update() -> None:
    """Compile every form, and write this process's Triton into the table."""
    import triton

    rows = compile_forms(None)
    serialized = [row.name for row in rows if row.serialized]
    if serialized:
        raise SystemExit("serialized: " + ", ".join(serialized))
    old = json.loads(TABLE.read_text()) if TABLE.exists() else {"sources": "", "tables": {}}
    sources = digest()
    if old["sources"] != sources:
        old["tables"] = {}
    old["tables"][triton.__version__] = {
        "ptxas": ptxas_version(),
        "kernels": {row.name: [getattr(row, number) for number in NUMBERS] for row in rows},
    }
    write_table(TABLE, sources, old["tables"])


def write_table(path: Path, sources: str, tables: dict[str, Any]) -> None:
    """Write the table, a kernel per line."""
    lines = [
        "{",
        f' "sources": "{sources}",',
        f' "numbers": {json.dumps(NUMBERS)},',
        ' "tables": {',
    ]
    for version, table in sorted(tables.items()):
        lines.append(f'  "{version}": {{"ptxas": "{table["ptxas"]}", "kernels": {{')
        kernels = [f"   {json.dumps(name)}: {row}" for name, row in table["kernels"].items()]
        lines.append(",\n".join(kernels))
        lines.append("  }},")
    lines[-1] = "  }}"
    lines += [" }", "}"]
    path.write_text("\n".join(lines) + "\n")


def run_with(folder: str, arguments: list[str]) -> int:
    """Exit status of this command with the Triton in a folder."""
    paths = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "tests.impl.triton.compile_table", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


def main() -> int:
    """Show, check or update."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare core forms with the table")
    parser.add_argument("--all", action="store_true", help="compare every form")
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--newest", action="store_true", help="check an unknown Triton too")
    parser.add_argument("--triton", action="append", default=[], metavar="DIR")
    parser.add_argument("--save", type=Path, metavar="FILE", help="JSON with digests of the code")
    options = parser.parse_args()
    if options.triton:
        flags = [
            f"--{name}" for name in ("check", "all", "update", "newest") if vars(options)[name]
        ]
        return max(run_with(folder, flags) for folder in options.triton)
    os.environ["TRITON_INTERPRET"] = "0"
    import triton

    from .compile_forms import CORE
    from .compile_forms import forms as all_forms

    print(f"Triton {triton.__version__}, ptxas {ptxas_version()}", flush=True)
    if options.update:
        update()
        return 0
    if not options.check:
        rows = compile_forms(None, codes=options.save is not None)
        if options.save is not None:
            lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
            options.save.write_text(f"[\n{lines}\n]\n")
        return 0
    forms = [name for name, _ in all_forms()] if options.all else CORE
    worse = check(forms, options.newest)
    for line in worse:
        print(f"WORSE  {line}")
    print(f"Triton {triton.__version__}: {len(worse)} differences for the worse")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
