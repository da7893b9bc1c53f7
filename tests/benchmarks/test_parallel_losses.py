"""The comparison of loss curves of context parallelism with those of one GPU."""

import torch

from benchmarks.parallel_losses import OTHER, other_kernels, summary
from spattention import BandPattern, band_attention
from spattention.impl import reference

STEPS = 4


def curve(seed: int, way: str, ranks: int, offset: float) -> dict:
    return {"seed": seed, "way": way, "ranks": ranks, "losses": [offset] * STEPS}


def curves(seed: int, parallel: float) -> list[dict]:
    """Three curves of one GPU, on average 2 apart, and one that is `parallel` from the lowest."""
    one = [curve(seed, f"one GPU, {n}", 1, offset) for n, offset in enumerate((0.0, 3.0, 2.0))]
    return [*one, curve(seed, "context parallelism", 2, parallel)]


def of_all_steps(rows: list[dict], *compared: str) -> dict:
    """The row that compares two ways, context parallelism and splits by default."""
    compared = compared or ("context parallelism", "one GPU, splits")
    rows = [row for row in summary(rows) if row["steps"] == STEPS]
    (found,) = (row for row in rows if (row["way"], row["compared_with"]) == compared)
    return found


def test_every_excess_is_shown_with_its_interval():
    """Seed by seed the excess is 6.33 and 8.33, with a standard error of 1."""
    found = of_all_steps([*curves(0, 10.0), *curves(1, 12.0)])
    assert found["of_one_gpu"] == 2.0
    assert abs(found["excess"] - 22 / 3) < 1e-12
    low, high = found["excess_95"]
    assert abs(low - (22 / 3 - 12.71)) < 1e-12
    assert abs(high - (22 / 3 + 12.71)) < 1e-12
    assert found["no_farther"] is False
    assert found["seeds_no_farther"] == 0


def test_an_excess_is_no_farther_up_to_zero():
    """Of -1 and 1.33 the mean is above 0, of -1 and .33 below."""
    assert of_all_steps([*curves(0, 2.0), *curves(1, 5.0)])["no_farther"] is False
    found = of_all_steps([*curves(0, 2.0), *curves(1, 4.0)])
    assert found["no_farther"] is True
    assert found["seeds_no_farther"] == 1


def test_other_kernels_are_compared_as_well():
    """With the same splits, and with context parallelism, over the seeds that have a curve of them
    and splits."""
    rows = [*curves(0, 10.0), *curves(1, 12.0), *curves(2, 50.0)]
    rows += [curve(seed, OTHER, 1, 10.0 + 2 * seed) for seed in (0, 1, 3)]
    found = of_all_steps(rows, OTHER, "one GPU, splits")
    assert found["seeds"] == 2
    assert abs(found["excess"] - 22 / 3) < 1e-12
    assert of_all_steps(rows, "context parallelism", OTHER)["excess"] == 0.0
    assert of_all_steps(rows)["seeds"] == 3


def test_other_kernels_are_remembered_by_no_form(monkeypatch):
    """A form that remembered them would run them outside the context too."""
    seen = []
    stock = reference.attend
    monkeypatch.setattr(reference, "attend", lambda call: seen.append(call.form) or stock(call))
    tensors = [torch.randn(1, 4, 8, 16) for _ in range(3)]
    with other_kernels(torch.device("cpu")):
        band_attention(*tensors, BandPattern.dense(4, 8))
    assert seen == [None]


def test_other_kernels_differ_in_few_bits():
    """They replace those of a form that has run before, and only inside the context."""
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 4, 256, 32, generator=random).bfloat16() for _ in range(3)]
    pattern = BandPattern.shared_local(4, 256, widths="geometric")
    before = band_attention(*tensors, pattern)
    with other_kernels(torch.device("cpu")):
        other = band_attention(*tensors, pattern)
    assert 0 < (other != before).double().mean() < 0.01
    assert torch.equal(before, band_attention(*tensors, pattern))
