"""The allowed error: it holds for every draw of rounding, and for no error besides."""

import math

import pytest
import torch

import spattention as spa
from spattention.testing import Case, check_case, noise
from spattention.testing.oracle import operands
from spattention.testing.rounding import _sum_variance

# Scales and head dims: those of two are powers of two, the others round `query * scale`.
SHAPES = [(None, 64), (None, 128), (None, 80), (1.3, 128), (3.7, 64), (-0.7, 16), (0.0, 8)]


def draw(scale, dim, seed, dtype=torch.float32, heads=2, **options):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, 50, dim, generator=generator) for _ in range(3))
    key, value = key[:, : max(1, heads // 2)], value[:, : max(1, heads // 2)]
    pattern = spa.BandPattern.shared_local(heads, 50)
    return Case(query, key, value, pattern, dict(scale=scale, **options)).to(dtype)


@pytest.mark.parametrize(("scale", "dim"), SHAPES)
def test_rounding_errors_are_allowed(scale, dim):
    """Sharp rows, whose one error decides, among them."""
    for seed in range(40):
        check_case(draw(scale, dim, seed), impl="blockwise", seed=seed)


@pytest.mark.parametrize(("scale", "dim"), SHAPES[:-1])
def test_a_wrong_scale_is_not_allowed(scale, dim):
    wrong = (dim**-0.5 if scale is None else scale) * (1 + 1e-5)
    for seed in range(10):
        with pytest.raises(AssertionError, match="exceeds"):
            check_case(draw(scale, dim, seed), impl="blockwise", seed=seed, scale=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "dim"), SHAPES)
def test_a_missing_key_is_not_allowed(scale, dim, dtype):
    """One key of 50, for most of the queries that see it."""
    hidden = torch.zeros(1, 50, dtype=torch.int32)
    hidden[:, 10:] = 1
    case = draw(scale, dim, 0, dtype)
    with pytest.raises(AssertionError, match="exceeds"):
        check_case(case, impl="reference", key_start=hidden)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_noise_is_the_deviation_of_noisy_sums(scale, sinks):
    """Against draws: results of scores and products that carry the noise of their rounding."""
    options = {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])} if sinks else {}
    case = draw(scale, 16, 0, heads=4, **options)
    generator = torch.Generator().manual_seed(1)
    grads = (
        torch.randn(case.query.shape, generator=generator),
        torch.randn(case.query.shape[:3], generator=generator),
    )
    q, k, v, mask, scale, logits, group, d_out, d_lse = operands(case.to(torch.float64), grads)
    scores, products = scale * (q @ k.mT), d_out @ v.mT
    squares = scale**2 * (q.square() @ k.square().mT)
    unit, larger = torch.finfo(torch.float32).eps / 2, 1e3  # far above the rounding of float64
    s_noise = _sum_variance(scores, squares, 16, unit).sqrt()
    if scale != 2.0:
        s_noise = (s_noise.square() + unit**2 / 3 * squares).sqrt()
    t_noise = _sum_variance(products, d_out.square() @ v.square().mT, 16, unit).sqrt()

    def results(s, t):
        s = s.masked_fill(~mask, -math.inf)
        sink = torch.full((4, 1), -math.inf).double() if logits is None else logits[:, None]
        lse = torch.logaddexp(s.logsumexp(-1), sink)
        p = torch.exp(s - lse[..., None])
        delta = (p * t).sum(-1) - d_lse
        d_scores = scale * p * (t - delta[..., None])

        def grouped(tensor):
            return tensor.unflatten(1, (-1, group)).sum(2)

        found = {"lse": lse, "out": p @ v, "d_query": d_scores @ k}
        found |= {"d_key": grouped(d_scores.mT @ q), "d_value": grouped(p.mT @ d_out)}
        if sinks:
            found["d_sinks"] = -(torch.exp(sink - lse) * delta).sum((0, 2))
        return found

    clean = results(scores, products)
    squares = {name: torch.zeros_like(tensor) for name, tensor in clean.items()}
    draws = 300
    for _ in range(draws):
        s, t = (
            tensor + larger * deviation * torch.randn(tensor.shape, generator=generator).double()
            for tensor, deviation in ((scores, s_noise), (products, t_noise))
        )
        for name, tensor in results(s, t).items():
            squares[name] += (tensor - clean[name]).square() / draws
    expected = {name: float(tensor.max()) ** 0.5 / larger for name, tensor in squares.items()}
    assert noise(case, grads) == pytest.approx(expected, rel=0.25)
