"""The marks among weights, against the config that an engine reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

import spattention as spa
from spattention.hf.config import section_of
from spattention.serving.marks import without_marks

from .folders import COMMON, FIRST, SECOND


def state() -> dict[str, Any]:
    """Weights of a model with bands, as an engine reads them from a file."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))
    spa.hf.apply(model, (FIRST, SECOND))
    return {str(name): tensor.clone() for name, tensor in model.state_dict().items()}


def test_weights_come_without_their_marks() -> None:
    weights = state()
    kept = dict(without_marks(weights.items(), section_of((FIRST, SECOND), False)))
    assert [name for name in weights if name not in kept] == [
        f"model.layers.{i}.self_attn.spattention_mark" for i in range(2)
    ]
    unmarked = list(without_marks(kept.items(), section_of((FIRST, SECOND), False)))
    assert len(unmarked) == len(kept)


@pytest.mark.parametrize("other", [FIRST, None, replace(SECOND, prefix=1)])
def test_marks_of_other_bands_are_refused(other: Any) -> None:
    """As saved, and in the precision that an engine may have converted them to."""
    section = section_of((FIRST, other), False)
    for dtype in (torch.float32, torch.bfloat16):
        weights = ((name, tensor.to(dtype)) for name, tensor in state().items())
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.spattention_mark, .*got"):
            list(without_marks(weights, section))
