"""The first of the random cases; `random_cases.py` runs any number of others."""

import pytest
import torch
from random_cases import check, check_poisoned, draw


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_random_calls_with_and_without_poison(first: int) -> None:
    """A token that is not seen never matters, whatever it holds, forward or backward."""
    for seed in range(first, first + 20):
        check(seed, "blockwise")


def test_the_reference_keeps_unseen_tokens_out() -> None:
    for seed in range(30):
        check(seed, "reference")


def test_other_devices_keep_unseen_tokens_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What blockwise does where reading a flag would wait for a device, here on the CPU."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False))
    for seed in range(40):
        check_poisoned(draw(seed), seed, "blockwise")
