"""A cached kernel is the one that Triton finds: some calls on a GPU, after the many that
`tests/impl/triton/compare_cached.py` binds without one.
"""

from __future__ import annotations

from typing import Any

import pytest

from spattention import attention
from spattention.impl.triton.compiled import CompiledKernelCache

from . import cases, decode_cases, placements


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that were launched; each is compared with what Triton finds for its call."""
    found: list[Any] = []
    launch = CompiledKernelCache.__call__

    def checked(
        self: CompiledKernelCache, programs: int, key: Any, *arguments: Any, **constants: Any
    ) -> None:
        launch(self, programs, key, *arguments, **constants)
        cached, *_ = self.compiled[key, *constants.values()]
        assert cached is self.function[(programs,)](*arguments, **constants)
        found.append(cached)

    monkeypatch.setattr(CompiledKernelCache, "__call__", checked)
    # Else later calls of a form are launched without asking for a kernel.
    monkeypatch.setattr(attention, "form_of", lambda *call: None)
    return found


@pytest.mark.parametrize("variant", [cases.VARIANTS[i] for i in (0, 6)], ids=str)
def test_training(variant: cases.Variant, asked: list[Any]) -> None:
    for seed in range(3):
        placements.train(cases.draw(variant, seed))
    assert len(asked) > len(set(asked)) > 3


@pytest.mark.parametrize("variant", [decode_cases.VARIANTS[2]], ids=str)
def test_decoding(variant: decode_cases.Variant, asked: list[Any]) -> None:
    for seed in range(3):
        placements.decode(decode_cases.draw(variant, seed))
    assert len(asked) > len(set(asked)) > 2


def test_stores(asked: list[Any]) -> None:
    placements.write("cuda")
    assert len(asked) > len(set(asked)) > 2
