"""Whether calls that share a cached kernel share one to Triton too, without a GPU: the launches of
random calls are bound as Triton binds them, and what it specialises on is compared within each key.
Prints the kernels, with how many of their forms came more than once.

A process of its own (`test_triton_compiled.py`): the interpreter specialises nothing.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from spattention.impl.triton.compiled import CompiledKernelCache
from spattention.impl.triton.hopper import TileOrder
from spattention.serving.class_store import store
from tests.gpu import cases, decode_cases, placements
from tests.gpu.plans import changed_plans
from tests.impl.triton.without_gpu import HOPPER, launches_to
from tests.serving.class_caches import given

SEEDS = 4
BACKEND = make_backend(HOPPER)
BINDERS: dict[CompiledKernelCache, Any] = {}
FORMS: dict[Any, str] = {}
LAUNCHES: Counter[str] = Counter()


def examine(
    cache: CompiledKernelCache, programs: int, key: Any, *arguments: Any, **constants: Any
) -> None:
    function = cache.function
    if cache not in BINDERS:
        binder = create_function_from_signature(function.signature, function.params, BACKEND)
        BINDERS[cache] = binder
    _, specialization, options = BINDERS[cache](*arguments, **constants)
    module = function.__module__.removeprefix("spattention.impl.triton.")
    form = f"{module}.{function.__name__} {specialization} {options}"
    known = FORMS.setdefault((cache, key, *constants.values()), form)
    assert known == form, f"one key, two forms:\n{known}\n{form}"
    LAUNCHES[form] += 1


def main() -> None:
    """As on an H200, but for the launches themselves."""
    # With a head_dim that 16 does not divide, strides of dense tensors differ by heads too.
    training = [*cases.VARIANTS, *(replace(each, head_dim=20) for each in cases.VARIANTS[:12])]
    decoding = [
        *decode_cases.VARIANTS,
        *(each._replace(head_dim=20) for each in decode_cases.VARIANTS),
    ]
    for seed in range(SEEDS):
        longer = changed_plans(order=TileOrder.HEAD_MAJOR, persistent=True)
        with longer if seed % 2 else nullcontext():
            for variant in training:
                placements.train(cases.draw(variant, seed, "cpu"))
        for few in decoding:
            placements.decode(decode_cases.draw(few, seed, "cpu"))
    placements.paged("cpu")
    placements.write("cpu")
    for seed in range(SEEDS):
        for dtype in (torch.float32, torch.bfloat16):
            for head_dim in (16, 20):
                store(*given(seed, dtype, head_dim, shift=seed % 2))
    repeated = Counter(form.split()[0] for form, times in LAUNCHES.items() if times > 1)
    for name, forms in sorted(repeated.items()):
        print(name, forms)


with launches_to(examine):
    main()
