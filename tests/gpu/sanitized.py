"""Small cases of every kernel for compute-sanitizer, checked against float64 on the CPU.

    compute-sanitizer --tool memcheck python -m tests.gpu.sanitized
    compute-sanitizer --tool racecheck python -m tests.gpu.sanitized --part 0 --parts 4
    compute-sanitizer --tool racecheck python -m tests.gpu.sanitized --only drawn

The sanitizer slows every kernel down, so that the oracle stays on the CPU. Parts can run at the
same time; a first run without the sanitizer compiles the kernels for all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from spattention import BandPattern
from spattention.testing import Case, check_error, exact, noise, plain, run

from . import cases, decode_cases
from .plans import DRAWN, changed_plans, larger_plans, multiprocessors

LONGEST = 200  # tokens of random cases, most of which are one block
LONGER = 500  # tokens: several blocks of keys take turns at a block of queries


def small_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and check of every case."""
    for variant in cases.VARIANTS:
        case = cases.draw(variant, 0, "cpu", LONGEST)
        for plan in ({}, *(larger_plans(variant) if variant.hopper else ())):
            yield f"{variant} {plan}", lambda c=case, p=plan: check(c, p)
        if variant.hopper:
            yield f"{variant} any order", lambda c=case: check(c, {}, deterministic=False)
        if variant.fuses:
            fused: dict[str, Any] = {"fused_backward": True}
            yield f"{variant} {fused}", lambda c=case, p=fused: check(c, p, deterministic=False)
            yield f"{variant} {fused} in turn", lambda c=case, p=fused: check(c, p)
            longer = longer_case(variant)
            for plan in (fused, larger_plans(variant)[0]):
                yield f"{variant} {plan} longer", lambda c=longer, p=plan: check(c, p)
            for count in (1, 3):
                yield f"{variant} drawn by {count}", lambda c=longer, n=count: check_drawn(c, n)
        if variant.dtype == cases.BRAIN:
            prefix = min(5, case.pattern.span)
            pattern = BandPattern(case.pattern.intervals, case.pattern.span, prefix=prefix)
            yield f"{variant} prefix", lambda c=case, p=pattern: check(replace(c, pattern=p), {})
    for few in decode_cases.VARIANTS:
        case = decode_cases.draw(few, 0, "cpu")
        yield f"decode {few}", lambda c=case: check(c, {}, backward=False)


def longer_case(variant: cases.Variant) -> Case:
    """A case with several blocks of queries and keys, and bands that end within them."""
    heads = 4 * variant.group
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, count, LONGER, variant.head_dim, generator=generator).to(variant.dtype)
        for count in (heads, 4, 4)
    )
    sinks = torch.randn(heads, generator=generator).to(variant.dtype)
    options = {"sinks": sinks} if variant.sinks else {}
    if variant.intervals == 1:
        pattern = BandPattern.sliding_window(heads, LONGER, LONGER - 40)
    else:
        pattern = BandPattern.shared_local(heads, LONGER, local=40, widths="geometric")
    return Case(query, key, value, pattern, options)


def check(case: Case, plan: dict[str, Any], backward: bool = True, **options: Any) -> None:
    """Run a case on the GPU; assert that outputs and gradients are within the error budget."""
    generator = torch.Generator().manual_seed(0)
    rows = case.query.shape[:2][::-1] if case.packed else case.query.shape[:3]
    d_out = torch.randn(case.query.shape, generator=generator).to(case.query.dtype)
    grads = (d_out, torch.randn(rows, generator=generator)) if backward else None
    on_gpu = None if grads is None else (grads[0].cuda(), grads[1].cuda())
    with changed_plans(**plan):
        found = run(moved(case), on_gpu, impl="triton", **options)
    truth, rough, deviations = exact(case, grads), plain(case, grads), noise(case, grads)
    for name in truth:
        check_error(name, found[name].cpu(), rough[name], truth[name], deviations[name])


def check_drawn(case: Case, programs: int) -> None:
    """Check a forward pass whose programs draw several blocks of queries each."""
    with multiprocessors(programs):
        check(case, DRAWN, backward=False)


def moved(case: Case) -> Case:
    """The same case on the GPU, strides kept."""
    options = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in case.options.items()
    }
    query, key, value = (tensor.cuda() for tensor in (case.query, case.key, case.value))
    return Case(query, key, value, case.pattern, options)


def main() -> int:
    """Check the cases of a part; the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with it in their name")
    options = parser.parse_args()
    failed = count = 0
    named = (each for each in small_cases() if options.only in each[0])
    for index, (name, run_check) in enumerate(named):
        if index % options.parts != options.part:
            continue
        count += 1
        try:
            run_check()
        except AssertionError as error:
            failed += 1
            print(f"FAILED {name}: {error}", flush=True)
    print(f"part {options.part} of {options.parts}: {count} cases, {failed} failed", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
