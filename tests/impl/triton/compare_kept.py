"""Whether calls that share a kept kernel share one to Triton too, without a GPU: the launches of
random calls are bound as Triton binds them, and what it specialises on is compared within each key.
Prints the kernels, with how many of their forms came more than once.

A process of its own (`test_triton_compiled.py`): the interpreter specialises nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from spattention.impl.triton import config, launch, op
from spattention.impl.triton.compiled import Kernel
from spattention.impl.triton.decode import launch as decode_launch
from tests.gpu import cases, decode_cases, placements

SEEDS = 4
BACKEND = make_backend(GPUTarget("cuda", 90, 32))
BINDERS: dict[Kernel, Any] = {}
FORMS: dict[Any, str] = {}
LAUNCHES: Counter[str] = Counter()


def examine(self: Kernel, programs: int, depends: Any, *arguments: Any, **constants: Any) -> None:
    function = self.function
    if self not in BINDERS:
        BINDERS[self] = create_function_from_signature(function.signature, function.params, BACKEND)
    _, specialization, options = BINDERS[self](*arguments, **constants)
    module = function.__module__.removeprefix("spattention.impl.triton.")
    form = f"{module}.{function.__name__} {specialization} {options}"
    known = FORMS.setdefault((self, depends, *constants.values()), form)
    assert known == form, f"one key, two forms:\n{known}\n{form}"
    LAUNCHES[form] += 1


def main() -> None:
    """As on an H200, but for the launches themselves."""
    Kernel.__call__ = examine  # type: ignore[method-assign]
    op.INTERPRETED = True  # so that tensors of the CPU are taken
    config.HOPPER_TRITON = triton.__version__
    launch.compute_capability = decode_launch.compute_capability = lambda device: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    # With a head_dim that 16 does not divide, strides of dense tensors differ by heads too.
    training = [*cases.VARIANTS, *(replace(each, head_dim=20) for each in cases.VARIANTS[:12])]
    decoding = [
        *decode_cases.VARIANTS,
        *(each._replace(head_dim=20) for each in decode_cases.VARIANTS),
    ]
    for seed in range(SEEDS):
        if seed % 2:  # what the rules choose for longer bands
            launch.order, launch.is_long = (lambda *shape: 0), (lambda *shape: True)
        for variant in training:
            placements.train(cases.draw(variant, seed, "cpu"))
        for few in decoding:
            placements.decode(decode_cases.draw(few, seed, "cpu"))
    placements.write("cpu")
    repeated = Counter(form.split()[0] for form, times in LAUNCHES.items() if times > 1)
    for name, forms in sorted(repeated.items()):
        print(name, forms)


main()
