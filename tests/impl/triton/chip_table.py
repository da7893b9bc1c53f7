"""Compile the portable and decoding kernels for GPUs that no test here has, and compare the
result with a committed table.

    python -m tests.impl.triton.chip_table                    # show every form
    python -m tests.impl.triton.chip_table --check            # two forms per GPU
    python -m tests.impl.triton.chip_table --check --all
    python -m tests.impl.triton.chip_table --update

A check fails where a kernel does not compile, needs more shared memory than the GPU has, lost its
tensor-core instructions, or has more registers, spills or shared memory than in the table. The
table is that of one Triton; `--update` writes it with the Triton of this process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .compile_table import HERE, KERNELS, SOURCES, Compiled, compile_form, digest, from_ptxas
from .compile_table import differences as worse_numbers

TABLE = HERE / "chip_table.json"
# The Hopper kernels run on none of these GPUs.
PORTABLE_SOURCES = tuple(path for path in SOURCES if KERNELS / "hopper" not in path.parents)
NUMBERS = ("registers", "stack", "spills", "shared", "products")


@dataclass(frozen=True)
class Chip:
    """A GPU to compile for.

    Args:
        gpus: products that have it.
        capability: compute capability that the rules see.
        backend: Triton's, "cuda" or "hip".
        arch: its number or name there.
        shared: bytes of shared memory that a program may have.
        product: the tensor-core instruction of this generation.
    """

    gpus: str
    capability: tuple[int, int]
    backend: str
    arch: int | str
    shared: int
    product: str

    @property
    def target(self) -> Any:
        """Triton's description."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, 64 if self.backend == "hip" else 32)

    def numbers(self, name: str, built: Any, log: str) -> Compiled:
        """The row of a kernel; spills of AMD's are those of vector registers."""
        if self.backend == "hip":
            code = built.asm["amdgcn"]

            def number(what: str) -> int:
                return int(re.findall(rf"\.{what}:\s*(\d+)", code)[0])

            found = Compiled(
                name,
                registers=number("vgpr_count"),
                stack=number("private_segment_fixed_size"),
                spills=4 * number("vgpr_spill_count"),
                shared=built.metadata.shared,
            )
        else:
            code = built.asm["ptx"]
            found = from_ptxas(name, built, log)
        return replace(found, products=code.count(self.product))


KIB = 1024
CHIPS = {
    "sm_80": Chip("A100", (8, 0), "cuda", 80, 163 * KIB, "mma.sync"),
    "sm_86": Chip("RTX 30", (8, 6), "cuda", 86, 99 * KIB, "mma.sync"),
    "sm_89": Chip("RTX 40, L40S", (8, 9), "cuda", 89, 99 * KIB, "mma.sync"),
    "sm_100": Chip("B200", (10, 0), "cuda", 100, 227 * KIB, "tcgen05.mma"),
    "sm_120": Chip("RTX 50", (12, 0), "cuda", 120, 99 * KIB, "mma.sync"),
    "gfx942": Chip("MI300", (0, 0), "hip", "gfx942", 64 * KIB, "v_mfma"),
}
FORMS = (
    "portable D64",
    "portable D128",
    "portable D256",
    "portable D128, float32",
    "portable D256, float32",
    "portable D128, grouped, sinks, first keys",
    "portable D128, prefix",
    "decode D128, 1 query",
    "decode D256, 1 query",
    "decode D128, 16 queries of 4",
    "decode D128, 16 queries of 4, float32",
    "store D128, 1 query",
)
QUICK = ("portable D128", "portable D128, grouped, sinks, first keys")


def forms_of(chip: str, chosen: Iterable[str]) -> list[str]:
    """The forms that a GPU runs: AMD's no float32."""
    return [form for form in chosen if chip != "gfx942" or "float32" not in form]


def compile_chips(chosen: Iterable[str]) -> dict[str, list[Compiled]]:
    """Compile the kernels of forms for all GPUs, in as many processes as there are cores."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return dict(zip(CHIPS, pool.map(compile_chip, CHIPS, [tuple(chosen)] * len(CHIPS))))


def compile_chip(name: str, chosen: Iterable[str]) -> list[Compiled]:
    """Compile the kernels of forms for a GPU; print each."""
    import triton

    from .compile_forms import forms as all_forms

    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    chip = CHIPS[name]
    calls = dict(all_forms())
    logs: dict[int, str] = {}
    target = {"compute_capability": chip.capability, "target": chip.target}
    rows = []
    for form in forms_of(name, chosen):
        for row in compile_form(form, calls[form], logs, chip.numbers, **target):
            print(f"{name:7} {row} {row.products:3} products", flush=True)
            rows.append(row)
    return rows


def differences(
    chip: Chip, found: list[Compiled], expected: dict[str, list[int]], forms: Iterable[str]
) -> list[str]:
    """What is worse than in the table or does not fit the GPU, one line each."""
    worse = worse_numbers(found, expected, forms)
    for kernel in found:
        if kernel.shared > chip.shared:
            limit = f"{chip.shared} on {chip.gpus}"
            worse.append(f"{kernel.name}: {kernel.shared} bytes of shared memory, {limit}")
        products = expected.get(kernel.name, [0] * len(NUMBERS))[NUMBERS.index("products")]
        if products and not kernel.products:
            worse.append(f"{kernel.name}: no `{chip.product}`, {products} in the table")
    return worse


def check(forms: Iterable[str]) -> list[str]:
    """Differences of all GPUs from the committed table."""
    import triton

    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        return [f"Triton {triton.__version__} is not that of the table, {table['triton']}"]
    worse = []
    for name, found in compile_chips(forms).items():
        lines = differences(CHIPS[name], found, table["chips"][name], forms_of(name, forms))
        worse += [f"{name} {line}" for line in lines]
    return worse


def update() -> None:
    """Compile every form for every GPU, and write the table."""
    import triton

    write_table(TABLE, digest(PORTABLE_SOURCES), triton.__version__, compile_chips(FORMS))


def write_table(path: Path, sources: str, version: str, chips: dict[str, list[Compiled]]) -> None:
    """Write the table, a kernel per line."""
    lines = [
        "{",
        f' "sources": "{sources}",',
        f' "triton": "{version}",',
        f' "numbers": {json.dumps(NUMBERS)},',
        ' "chips": {',
    ]
    blocks = []
    for name, rows in chips.items():
        kernels = [
            f"   {json.dumps(row.name)}: {[getattr(row, number) for number in NUMBERS]}"
            for row in rows
        ]
        blocks.append(f'  "{name}": {{\n' + ",\n".join(kernels) + "\n  }")
    lines += [",\n".join(blocks), " }", "}"]
    path.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Show, check or update."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the table")
    parser.add_argument("--all", action="store_true", help="every form")
    parser.add_argument("--update", action="store_true", help="write the table")
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"
    if options.update:
        update()
        return 0
    if not options.check:
        compile_chips(FORMS)
        return 0
    worse = check(FORMS if options.all else QUICK)
    for line in worse:
        print(f"WORSE  {line}")
    print(f"{len(CHIPS)} GPUs: {len(worse)} differences for the worse")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
