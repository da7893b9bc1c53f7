"""Compile the kernels for sm_90 without a GPU, and tell what ptxas made of them.

python -m tests.impl.triton.compile_table --save table.json
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton

import spattention as spa
from spattention.impl import triton as kernels
from spattention.impl.triton.decode import append
from spattention.impl.triton.hopper import TileOrder
from tests.gpu.plans import changed_plans
from tests.impl.triton.without_gpu import launches_to

ROOT = Path(__file__).parents[3]
TWO = spa.BandPattern((((0, 20), (40, 90)),) * 8, 256)
ONE = spa.BandPattern((((0, 90),),) * 8, 256)
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of one kernel, in bytes."""

    form: str
    kernel: str
    registers: int
    stack: int
    spills: int
    shared: int
    serialized: bool
    sass: str = ""
    opcodes: str = ""

    @property
    def name(self) -> str:
        return f"{self.form}: {self.kernel}"


def train(
    dtype: torch.dtype,
    head_dim: int,
    pattern: spa.BandPattern,
    key_heads: int = 8,
    sinks: bool = False,
    d_lse: bool = False,
    **options: Any,
) -> None:
    like = {"dtype": dtype, "requires_grad": True}
    query = torch.zeros(1, 8, 256, head_dim, **like)
    key, value = (torch.zeros(1, key_heads, 256, head_dim, **like) for _ in range(2))
    if sinks:
        options["sinks"] = torch.zeros(8, dtype=dtype)
    out, lse = spa.band_attention(
        query, key, value, pattern, impl="triton", return_lse=True, **options
    )
    results = [out, lse] if d_lse else [out]
    torch.autograd.grad(results, (query, key, value), [torch.ones_like(each) for each in results])


def train_packed(dtype: torch.dtype, head_dim: int, key_heads: int = 8) -> None:
    query = torch.zeros(256, 8, head_dim, dtype=dtype, requires_grad=True)
    key, value = (
        torch.zeros(256, key_heads, head_dim, dtype=dtype, requires_grad=True) for _ in range(2)
    )
    offsets = torch.tensor([0, 100, 256], dtype=torch.int32)
    out = spa.band_attention_varlen(
        query, key, value, TWO, offsets, offsets, 156, 156, impl="triton"
    )
    torch.autograd.grad(out, (query, key, value), torch.ones_like(out))


def decode(dtype: torch.dtype, head_dim: int, queries: int, key_heads: int, **options: Any) -> None:
    query = torch.zeros(1, 8, queries, head_dim, dtype=dtype)
    key, value = (torch.zeros(1, key_heads, 256, head_dim, dtype=dtype) for _ in range(2))
    spa.band_attention(query, key, value, TWO, impl="triton", **options)


def rings(dtype: torch.dtype, queries: int, key_heads: int, head_dim: int = 128) -> None:
    kept = spa.BandStore(TWO, 1, key_heads, head_dim, dtype=dtype, slack=16)
    key, value = torch.zeros(2, 1, key_heads, queries, head_dim, dtype=dtype)
    append.write(key, value, kept.keys, kept.values, kept.position, kept.offsets, kept.lengths)
    kernels.attend_rings(
        torch.zeros(1, 8, queries, head_dim, dtype=dtype),
        kept.keys,
        kept.values,
        TWO,
        offsets=kept.offsets,
        lengths=kept.lengths,
        position=kept.position,
        scale=0.1,
        sinks=torch.zeros(8, dtype=dtype),
        key_start=None,
    )


def forms() -> Iterator[tuple[str, Any]]:
    """Name and call of every form; a call launches one kernel or several."""
    grouped = {"dtype": HALF, "key_heads": 2, "sinks": True, "d_lse": True}
    for head_dim in (64, 128):
        variants = {
            "two bands": {"dtype": BRAIN, "pattern": TWO},
            "one band": {"dtype": BRAIN, "pattern": ONE},
            "grouped, sinks": {"pattern": TWO, **grouped},
        }
        for variant, options in variants.items():
            for persistent in (False, True):
                order = TileOrder.HEAD_MAJOR if persistent else TileOrder.ROUND_ROBIN
                plan = {"order": order, "persistent": persistent, "split_backward": persistent}

                def call(options: Any = options, head_dim: int = head_dim, plan: Any = plan):
                    with changed_plans(**plan):
                        train(head_dim=head_dim, **options)

                shape = ", persistent, split" if persistent else ""
                yield f"hopper D{head_dim}, {variant}{shape}", call
    start = torch.zeros(1, 256, dtype=torch.int32)
    first = torch.zeros(1, dtype=torch.int32)
    for head_dim in (64, 128, 256):
        options = {"pattern": TWO, "key_start": start}
        yield f"portable D{head_dim}", lambda d=head_dim: train(BRAIN, d, TWO, query_start=1)
        yield f"portable D{head_dim}, float32", lambda d=head_dim: train(SINGLE, d, TWO)
        yield (
            f"portable D{head_dim}, grouped, sinks, first keys",
            lambda d=head_dim, o=options: train(head_dim=d, **o, **grouped),
        )
        yield f"portable D{head_dim}, packed", lambda d=head_dim: train_packed(BRAIN, d)
    yield "portable D128, start on device", lambda: train(BRAIN, 128, ONE, query_start=first)
    for head_dim in (64, 128, 256):
        yield f"decode D{head_dim}, 1 query", lambda d=head_dim: decode(BRAIN, d, 1, 8)
    yield "decode D128, 1 query of 4", lambda: decode(BRAIN, 128, 1, 2)
    yield "decode D128, 16 queries of 4", lambda: decode(BRAIN, 128, 16, 2)
    yield (
        "decode D128, first keys, start on device",
        lambda: decode(BRAIN, 128, 4, 2, key_start=first, query_start=first),
    )
    yield "decode D128, 1 query, float32", lambda: decode(SINGLE, 128, 1, 8)
    yield "decode D128, 16 queries of 4, float32", lambda: decode(SINGLE, 128, 16, 2)
    yield "store D128, 1 query", lambda: rings(BRAIN, 1, 2)
    yield "store D128, 16 queries", lambda: rings(BRAIN, 16, 2)


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def machine_code(cubin: bytes) -> tuple[str, str]:
    """Digests of the instructions with their operands, and of the operation codes alone. Places of
    parameters are left out: they follow the order of arguments."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    code = re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*?) *;", text)
    code = [re.sub(r"c\[0x0\]\[[^]]*\]|`\([^)]*\)", "", line) for line in code]
    opcodes = sorted(re.sub(r"^@!?\w+ ", "", line).split()[0] for line in code)
    return tuple(
        hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12] for lines in (code, opcodes)
    )


def compile_form(name: str, call: Any, codes: bool) -> list[Compiled]:
    """Compile what a call launches."""
    found: list[Compiled] = []

    def launched(kernel: Any, programs: int, depends: Any, *arguments: Any, **constants: Any):
        function = kernel.function
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            built = function.run(*arguments, grid=(programs,), warmup=True, **constants)
        text = log.getvalue()
        module = function.__module__.removeprefix("spattention.impl.triton.")

        def numbers(pattern: str) -> list[int]:
            return [int(number) for number in re.findall(pattern, text)]

        registers = numbers(r"Used (\d+) registers")
        if not registers:  # compiled before in this form
            return
        digests = machine_code(built.asm["cubin"]) if codes else ("", "")
        found.append(
            Compiled(
                form=name,
                kernel=f"{module}.{function.__name__}",
                registers=max(registers),
                stack=max(numbers(r"(\d+) bytes stack frame")),
                spills=sum(numbers(r"(\d+) bytes spill")),
                shared=built.metadata.shared,
                serialized="are serialized" in text,
                sass=digests[0],
                opcodes=digests[1],
            )
        )

    with launches_to(launched):
        call()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    rows = []
    begin = time.time()
    for name, call in forms():
        if options.only in name:
            for row in compile_form(name, call, options.save is not None):
                print(
                    f"{time.time() - begin:5.0f} s  {row.name:80} {row.registers:3} registers "
                    f"{row.stack:5} B stack {row.shared:6} B shared"
                    f"{' SERIALIZED' if row.serialized else ''}",
                    flush=True,
                )
                rows.append(row)
    if options.save is not None:
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        options.save.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
