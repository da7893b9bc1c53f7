"""Bands in Axolotl, as a plugin that its YAML file names.

plugins:
  - spattention.adapters.axolotl.BandPlugin
band_pattern: shared_local:widths=geometric
band_span: 4096  # default: sequence_len
attn_implementation: sdpa

The model is converted after it was built and before adapters are added. A base model that was saved
with bands needs no `band_pattern`: the plugin registers the bands, and the model opens with them.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

if find_spec("axolotl") is None:
    raise ImportError("`spattention.adapters.axolotl` needs Axolotl: install `axolotl`")

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from .. import hf
from ..choice import named_pattern


class BandArgs(BaseModel):
    """Fields of the YAML file.

    Attributes:
        band_pattern: a pattern and its options, as commands name it; None for a base model that
            has bands.
        band_span: context length of the pattern, in tokens; default `sequence_len`.
        band_sinks: add a learned sink to every head, zero at first.
    """

    band_pattern: str | None = None
    band_span: int | None = None
    band_sinks: bool = False


class BandPlugin(BasePlugin):
    """Axolotl's hooks: register before a model is opened, convert after it was built."""

    def get_input_args(self) -> str:
        """The class with the plugin's fields, by name."""
        return f"{__name__}.BandArgs"

    def register(self, cfg: Any) -> None:
        """Let folders with bands be opened."""
        hf.register()

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse settings under which packed documents would see each other.

        Raises:
            ValueError: for `sample_packing` without an `attn_implementation` that leaves
                `position_ids` as they are.
        """
        if cfg.sample_packing and cfg.attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                "`attn_implementation` must be sdpa or eager where bands meet `sample_packing`, "
                f"got {cfg.attn_implementation}"
            )

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Give the model its bands.

        Raises:
            ValueError: if there is no pattern, neither in `cfg` nor in the model, or
                `spattention.hf.apply` refuses the model.
        """
        config = model.config.get_text_config()
        if cfg.band_pattern is None:
            if not hasattr(model.config, hf.NAME) and not hasattr(config, hf.NAME):
                raise ValueError("`band_pattern` must be given for a base model without bands")
            return
        span = cfg.band_span or cfg.sequence_len
        pattern = named_pattern(cfg.band_pattern, config.num_attention_heads, span)
        hf.apply(model, pattern, sinks=bool(cfg.band_sinks))
