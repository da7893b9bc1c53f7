"""Useful work of a training step: the numerator of MFU (model FLOP utilisation).

Useful work per token is 6 x active parameters, plus 14 x D per attended (query, key) pair: two
products of the forward pass and five of the backward, each 2 x D. Recomputation does not count.
"""

from __future__ import annotations

from typing import Any

from ..choice import AttentionChoice
from ..hf.decoder import head_dim
from ..models import parameters_of


def work_per_token(model: Any, attention: AttentionChoice, context: int) -> float:
    """Useful floating-point operations per token, forward and backward."""
    config = model.config.get_text_config()
    pairs = attention.pairs(context) * config.num_hidden_layers / context
    return 6 * parameters_of(model).active + 14 * head_dim(config) * pairs
