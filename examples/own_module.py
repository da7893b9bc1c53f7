"""The operator in a module of one's own, without Transformers: packed documents and a cache.

python examples/own_module.py              # a CPU, some seconds; needs torch alone
"""

from __future__ import annotations

import torch
from torch import nn

import spattention as spa


class BandedAttention(nn.Module):
    """Causal self-attention in which every head looks at its own band of distances."""

    def __init__(self, width: int, heads: int, span: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.pattern = spa.BandPattern.shared_local(heads, span, widths="geometric", local=8)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value, `[B, H, N, D]`; the operator takes any strides."""
        parts = self.qkv(x).chunk(3, dim=-1)
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)

    def forward(self, x: torch.Tensor, key_start: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = self.split(x)
        out = spa.band_attention(query, key, value, self.pattern, key_start=key_start)
        assert isinstance(out, torch.Tensor)  # `return_lse=True` gives a pair
        return self.out(out.transpose(1, 2).flatten(2))

    def step(self, x: torch.Tensor, store: spa.BandStore) -> torch.Tensor:
        """The next tokens of a text whose keys and values the store keeps, where bands reach."""
        query, key, value = self.split(x)
        store.append(key, value)
        out = spa.band_attention_cached(query, store, self.pattern)
        assert isinstance(out, torch.Tensor)  # `return_lse=True` gives a pair
        return self.out(out.transpose(1, 2).flatten(2))


def main() -> dict[str, float]:
    torch.manual_seed(0)
    span, width = 256, 64
    layer = BandedAttention(width, heads=8, span=span)
    x = torch.randn(1, 200, width)

    # Two documents in one row: the first key that each query may see is where its own begins.
    starts = torch.tensor([0] * 120 + [120] * 80, dtype=torch.int32)[None]
    packed = layer(x, starts)
    apart = torch.cat([layer(x[:, :120]), layer(x[:, 120:])], dim=1)
    difference = {"packed": (packed - apart).abs().max().item()}

    # A text beyond the span, token by token, from a store that does not grow without end.
    text = torch.randn(1, 600, width)
    store = spa.BandStore(layer.pattern, batch_size=1, num_key_heads=8, head_dim=width // 8)
    with torch.no_grad():
        whole = layer(text)
        steps = torch.cat([layer.step(text[:, k : k + 1], store) for k in range(600)], dim=1)
    difference["cached"] = (whole - steps).abs().max().item()

    layer(x).square().mean().backward()
    print(f"largest difference: {difference}")
    print(f"the store keeps {store.keys.numel() // (width // 8)} keys of {8 * 600}")
    return difference


if __name__ == "__main__":
    main()
