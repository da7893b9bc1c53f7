"""Small models and the related systems that are tested in them."""

from __future__ import annotations

from typing import Any

import torch

from spattention import BandPattern
from spattention.related import CCA, DGA, MEA, Elementwise, RecurrentNear, Related, RRAttention
from tests.baselines.small_models import HEADS, LAYERS, SPAN, VOCABULARY, build, inputs, tokens

__all__ = ["HEADS", "LAYERS", "SPAN", "VOCABULARY", "build", "inputs", "tokens"]

EXCLUSIVE = BandPattern.exclusive(HEADS, SPAN)
CHOSEN: dict[str, Related] = {
    "mea": MEA(HEADS, SPAN),
    "mea_exclusive": MEA(HEADS, SPAN, EXCLUSIVE),
    "mea_without_norm": MEA(HEADS, SPAN, norm=0),
    "head_norm": MEA(HEADS, SPAN, mix=0),
    "virtual_heads": MEA(HEADS, SPAN, components=1),
    "cca": CCA(HEADS, SPAN, group=4, window=8),
    "cca_exclusive": CCA(HEADS, SPAN, BandPattern.exclusive(HEADS, 10), group=4, window=8),
    "rrattention_all": RRAttention(HEADS, SPAN, block=8, stride=4, tau=1),
    "rrattention": RRAttention(HEADS, SPAN, block=8, stride=4, tau=0.5),
    "rrattention_exclusive": RRAttention(HEADS, SPAN, EXCLUSIVE, block=8, stride=4, tau=0.5),
    "dga": DGA(HEADS, SPAN, group=4, share=0.25, samples=8),
    "dga_causal": DGA(HEADS, SPAN, group=3, share=0.25, block=10),
    "elementwise": Elementwise(HEADS, SPAN),
    "elementwise_exclusive": Elementwise(HEADS, SPAN, EXCLUSIVE, order=4),
}
CHOSEN |= {
    "recurrent_near": RecurrentNear(HEADS, SPAN, recurrent=2),
    "recurrent_exclusive": RecurrentNear(HEADS, SPAN, EXCLUSIVE, recurrent=2),
    "recurrent_by_layer": RecurrentNear(HEADS, SPAN, heads=((2, 3), (), (0, 1, 2, 3))),
}
# Later queries take part in the choice of keys: of a block, or of the whole sequence.
NOT_CAUSAL = ("dga", "rrattention", "rrattention_exclusive")
LLAMA_ALONE = ("virtual_heads",)  # they mix behind the norm of the keys


def scatter(model: Any, seed: int = 1) -> Any:
    """Move the weights that a related system added away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("mixing", "gain", "decay")):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * noise
    return model


def logits(model: Any, ids: torch.Tensor, **keywords: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **keywords).logits
