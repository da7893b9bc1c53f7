"""Small models and the related systems that are tested in them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from spattention import BandPattern
from spattention.related import CCA, DGA, MEA, Elementwise, RecurrentNear, Related, RRAttention

HEADS, SPAN, LAYERS, VOCABULARY = 4, 48, 3, 61
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

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}


def build(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A model in float64 and evaluation mode, with weights large enough that attention matters."""
    config: Any
    if family == "olmoe":
        more = {"num_key_value_heads": HEADS, "intermediate_size": 16, "num_experts": 4}
        config = transformers.OlmoeConfig(
            **{**COMMON, **more, "num_experts_per_tok": 2, **overrides}
        )
    else:
        kind = transformers.Qwen3Config if family == "qwen3" else transformers.LlamaConfig
        more = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
        config = kind(**{**COMMON, **more, **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", experts_implementation="eager"
    )
    return model.double().eval()


def scatter(model: Any, seed: int = 1) -> Any:
    """Move the weights that a related system added away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("mixing", "gain", "decay")):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * noise
    return model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def inputs(length: int, seed: int = 0) -> list[torch.Tensor]:
    """query `[2, 4, N, 8]`, key and value `[2, 2, N, 8]`, float64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, HEADS, length, 8), (2, 2, length, 8), (2, 2, length, 8))
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def logits(model: Any, ids: torch.Tensor, **keywords: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **keywords).logits
