"""Writing into rings, through Triton's interpreter."""

import pytest
import torch

import spattention as spa
from spattention.impl.triton import write_rings
from spattention.impl.triton.decode import append

P = spa.BandPattern
PATTERN = P(intervals=(((0, 8),), (), ((0, 4), (9, 30)), ((5, 6),)), span=40)


@pytest.mark.parametrize("head_dim", [16, 80])
def test_rings_hold_what_the_plain_append_puts_there(head_dim: int) -> None:
    """Several times around the shortest ring; a head without a ring is passed over."""
    stores = [
        spa.BandStore(PATTERN, 2, 4, head_dim, value_dim=24, slack=3, dtype=torch.float32)
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 3, 4, 70, 9, 1, 2, 33) * 4:
        key = torch.randn(2, tokens, 4, head_dim, generator=generator).transpose(1, 2)
        value = torch.randn(2, 4, tokens, 24, generator=generator)
        plain, written = stores
        write_rings(
            key,
            value,
            keys=written.keys,
            values=written.values,
            position=written.position,
            offsets=written.offsets,
            lengths=written.lengths,
        )
        written.position.add_(tokens)
        plain.append(key, value)
        assert torch.equal(plain.keys, written.keys)
        assert torch.equal(plain.values, written.values)
    assert plain.keys[:, -1].eq(0).all()


def test_opcheck() -> None:
    store = spa.BandStore(PATTERN, 2, 4, 16, slack=3)
    key, value = torch.randn(2, 2, 4, 3, 16)
    rings = (store.keys, store.values, store.position, store.offsets, store.lengths)
    torch.library.opcheck(append.write, (key, value, *rings))
