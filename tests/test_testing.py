"""The allowed error: it holds for every draw of rounding, and for no error besides."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch

import spattention as spa
from spattention.testing import Case, check_case, noise
from spattention.testing.oracle import operands
from spattention.testing.rounding import EXPONENTIAL, JOINS

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


def perturbed(case, grads, generator, amount):
    """The results in float64 with each rounding of `rounding.py` drawn, `amount` times as large."""
    q, k, v, mask, scale, logits, group, d_out, d_lse = operands(case.to(torch.float64), grads)
    unit = amount * torch.finfo(torch.float32).eps / 2
    rounded = scale != 2.0

    def rounding(*like):
        return 1 + unit / math.sqrt(3) * torch.randn(like, generator=generator, dtype=q.dtype)

    def total(terms):
        """A sum over the last axis in one accumulator."""
        found = torch.zeros_like(terms[..., 0])
        for term in terms.unbind(-1):
            moved = (term != 0).to(term)  # a masked one is none
            found = (found + term) * (1 + (rounding(*found.shape) - 1) * moved)
        return found * rounding(*found.shape)

    def scores():
        scaled = q * scale * (rounding(*q.shape) if rounded else 1)
        return total(scaled[:, :, :, None] * k[:, :, None]).masked_fill(~mask, -math.inf)

    s, again = scores(), scores()
    t = total(d_out[:, :, :, None] * v[:, :, None])
    sink = torch.full((4, 1), -math.inf).to(q) if logits is None else logits[:, None]
    lse = torch.logaddexp(s.logsumexp(-1), sink)
    weights = torch.exp(s - lse[..., None])
    exponent = (s - lse[..., None]).masked_fill(~mask, 0.0).abs()

    def exponential(weights):
        noise = [rounding(*weights.shape) - 1 for _ in range(2)]
        return weights * (1 + exponent * noise[0] + EXPONENTIAL * noise[1])

    forward = exponential(weights)
    share = torch.exp(sink - lse)
    forward = forward / (forward.sum(-1) + share)[..., None]
    out = total(forward[..., None, :] * v.mT[:, :, None])
    stored = lse * (1 + math.sqrt(JOINS) * (rounding(*lse.shape) - 1))
    p = exponential(torch.exp(again - stored[..., None]))
    delta = total(d_out * out * rounding(*out.shape)) - d_lse
    delta = delta * rounding(*delta.shape)
    g = p * (t - delta[..., None])

    def grouped(tensor):
        return tensor.unflatten(1, (-1, group)).sum(2)

    found = {"lse": stored, "out": out}
    found["d_query"] = scale * total(g[..., None, :] * k.mT[:, :, None])
    found["d_key"] = grouped(scale * total(g.mT[..., None, :] * q.mT[:, :, None]))
    found["d_value"] = grouped(total(p.mT[..., None, :] * d_out.mT[:, :, None]))
    if logits is not None:
        found["d_sinks"] = -(torch.exp(sink - stored) * delta).sum((0, 2))
    return found


@pytest.mark.parametrize(("scale", "sinks"), [(0.3, False), (2.0, True)])
def test_noise_is_the_deviation_of_rounded_sums(scale, sinks):
    """Its derivatives against draws: each rounding enlarged, so that float64 sees it."""
    options = {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])} if sinks else {}
    case = draw(scale, 16, 0, heads=4, **options)
    generator = torch.Generator().manual_seed(1)
    grads = (
        torch.randn(case.query.shape, generator=generator),
        torch.randn(case.query.shape[:3], generator=generator),
    )
    clean = perturbed(case, grads, generator, 0.0)
    squares = {name: torch.zeros_like(tensor) for name, tensor in clean.items()}
    draws, amount = 100, 100.0
    for _ in range(draws):
        for name, tensor in perturbed(case, grads, generator, amount).items():
            squares[name] += (tensor - clean[name]).square() / draws
    found = {name: float(tensor.max()) ** 0.5 / amount for name, tensor in squares.items()}
    assert noise(case, grads) == pytest.approx(found, rel=0.3)


def test_a_case_is_frozen():
    case = Case(*torch.randn(3, 1, 2, 8, 4).unbind(), spa.BandPattern.dense(2, 8))
    with pytest.raises(FrozenInstanceError):
        case.value = case.key
