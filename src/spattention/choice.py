"""What commands know of a way to attend: its name, how to put it in a model, and its work."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .bands import BandPattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .baselines import Baseline

STOCK = "dense"
PATTERNS = ("shared_local", "exclusive", "sliding_window", "gapped", "local_only")
# name on the command line -> class in `spattention.baselines`, and what the name says already
BASELINES: dict[str, tuple[str, dict[str, str]]] = {
    "longformer": ("Longformer", {}),
    "bigbird": ("BigBird", {}),
    "reformer": ("Reformer", {}),
    "published_longformer": ("PublishedMask", {"mask": "longformer"}),
    "published_bigbird": ("PublishedMask", {"mask": "bigbird"}),
    "published_reformer": ("PublishedMask", {"mask": "reformer"}),
}
WIDTHS = ("uniform", "geometric", "equal_work")


class AttentionChoice(Protocol):
    """A way to attend. Baselines bring their own."""

    @property
    def name(self) -> str:
        """Short and unique: the row in a table, the folder of a run."""

    def apply(self, model: PreTrainedModel) -> None:
        """Put it in every attention layer of a model, in place."""

    def pairs(self, seq_len: int) -> int:
        """Attended (query, key) pairs of one layer over `seq_len` tokens, all heads together."""


@dataclass(frozen=True)
class StockDense:
    """Transformers' own dense attention, PyTorch's `scaled_dot_product_attention`."""

    num_heads: int
    name: str = STOCK

    def apply(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        own = config._attn_implementation
        if getattr(config, own, None) is not None:  # its section would be saved with the model
            raise ValueError(f"`model` must have stock attention for {self.name}, got {own}")
        model.set_attn_implementation("sdpa")

    def pairs(self, seq_len: int) -> int:
        return self.num_heads * seq_len * (seq_len + 1) // 2


@dataclass(frozen=True)
class Bands:
    """Sparse Patterned Attention with one pattern in all layers."""

    name: str
    pattern: BandPattern

    def apply(self, model: PreTrainedModel) -> None:
        from . import hf

        hf.apply(model, self.pattern)

    def pairs(self, seq_len: int) -> int:
        return sum(self.pattern.pairs(seq_len))


@dataclass
class Other:
    """A baseline: somebody else's sparse attention.

    Attributes:
        num_layers: of the model that it was last applied to; its layers may differ in work.
    """

    name: str
    baseline: Baseline
    num_layers: int | None = None

    def apply(self, model: PreTrainedModel) -> None:
        from . import baselines

        baselines.apply(model, self.baseline)
        self.num_layers = model.config.num_hidden_layers

    def pairs(self, seq_len: int) -> int:
        """The mean over the layers of the model that it was applied to; raises before that."""
        if self.num_layers is None:
            raise ValueError(f"`pairs` of {self.name} are known once it was applied to a model")
        return self.baseline.pairs(seq_len, self.num_layers)


def attention_choice(text: str, num_heads: int, span: int) -> AttentionChoice:
    """The choice that a user names on the command line.

    Args:
        text: `dense` (stock attention), a pattern of `BandPattern` with its options, as in
            `exclusive`, `shared_local:widths=geometric,local=64`, `exclusive:widths=0/64/512` (the
            edges of two heads), `shared_local:local=64/512` (a window for each head),
            `shared_local:kv_heads=4` (a band for each of 4 key/value heads) or
            `sliding_window:window=128`, or a baseline with its options, as in `bigbird:random=2` or
            `published_longformer`.
        num_heads: query heads of the model.
        span: context length of the model, in tokens.

    Raises:
        ValueError: if the name or an option is not known, or breaks a rule of what it names.
    """
    name = text.partition(":")[0]
    if text == STOCK:
        return StockDense(num_heads)
    if name in BASELINES:
        return Other(text, _baseline(text, num_heads, span))
    if name not in (STOCK, *PATTERNS):
        known = (STOCK, *PATTERNS, *BASELINES)
        raise ValueError(f"a pattern must be one of {known}, got {name!r}")
    return Bands(text, named_pattern(text, num_heads, span))


def named_pattern(text: str, num_heads: int, span: int) -> BandPattern:
    """The pattern that a user names as in `attention_choice`; `dense` attends everything."""
    name, colon, rest = text.partition(":")
    if name not in (STOCK, *PATTERNS):
        raise ValueError(f"a pattern must be one of {(STOCK, *PATTERNS)}, got {name!r}")
    constructor = getattr(BandPattern, name)
    known = [p for p in inspect.signature(constructor).parameters if p not in ("num_heads", "span")]
    options = _options(name, rest if colon else None, known)
    if name == "sliding_window":
        # As wide as the published ablation: one uniform band and its neighbour.
        options.setdefault("window", min(span, span // max(1, num_heads) + 1))
    return constructor(num_heads, span, **options)


def _baseline(text: str, num_heads: int, span: int) -> Baseline:
    """The baseline that a user names as in `attention_choice`."""
    from . import baselines

    name, colon, rest = text.partition(":")
    kind, given = BASELINES[name]
    constructor = getattr(baselines, kind)
    fixed = ("num_heads", "span", *given)
    known = [p for p in inspect.signature(constructor).parameters if p not in fixed]
    return constructor(num_heads, span, **given, **_options(name, rest if colon else None, known))


def _options(name: str, text: str | None, known: Sequence[str]) -> dict[str, Any]:
    """What stands behind the colon, None for no colon: NAME=VALUE, separated by commas."""
    options: dict[str, Any] = {}
    for item in () if text is None else text.split(","):
        key, equals, value = item.partition("=")
        if key not in known or not equals:
            raise ValueError(
                f"options of `{name}` are NAME=VALUE with a name of {list(known)}, got {item!r}"
            )
        if key in options:
            raise ValueError(f"option `{key}` of `{name}` must be given once, got {name}:{text}")
        options[key] = _value(name, key, value)
    return options


def _value(name: str, key: str, text: str) -> int | str | tuple[int, ...]:
    """An option's value as its constructor takes it: `widths` is a name or edges, `local` one
    integer or one per head, all others integers.
    """
    if key in ("widths", "local") and re.fullmatch("-?[0-9]+(/-?[0-9]+)+", text):
        return tuple(int(part) for part in text.split("/"))
    if key == "widths":
        if text not in WIDTHS:
            raise ValueError(
                f"option `{key}` of `{name}` must be one of {WIDTHS}, or edges as in 0/64/512, "
                f"got {text!r}"
            )
        return text
    if not re.fullmatch("-?[0-9]+", text):
        raise ValueError(f"option `{key}` of `{name}` must be an integer, got {text!r}")
    return int(text)
