"""Attention that commands name on the command line: its name, how to apply it, and its work."""

from __future__ import annotations

import difflib
import inspect
import re
from collections import Counter
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
LONGEST_VALUE = 4000  # characters of an option, which Python's conversion of integers allows too
WIDTHS = ("uniform", "geometric", "equal_work")


class AttentionChoice(Protocol):
    """Attention of one kind for all layers of a model."""

    @property
    def name(self) -> str:
        """A short and unique name, for the row in a table and the folder of a run."""

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
    """A baseline: another sparse attention.

    Attributes:
        num_layers: layers of the model that it was last applied to, whose work may differ.
    """

    name: str
    baseline: Baseline
    num_layers: int | None = None

    def apply(self, model: PreTrainedModel) -> None:
        from . import baselines

        baselines.apply(model, self.baseline)
        self.num_layers = model.config.num_hidden_layers

    def pairs(self, seq_len: int) -> int:
        """The mean over the layers of the model that it was applied to; raises before `apply`."""
        if self.num_layers is None:
            raise ValueError(f"`pairs` of {self.name} are known once it was applied to a model")
        return self.baseline.pairs(seq_len, self.num_layers)


def attention_choice(text: str, num_heads: int, span: int) -> AttentionChoice:
    """Read the name of an attention choice, with its options.

    Args:
        text: `dense` (stock attention), a pattern of `BandPattern` with its options, as in
            `exclusive`, `shared_local:widths=geometric,local=64`, `exclusive:widths=0/64/512` (the
            edges of two heads), `shared_local:local=64/512` (a window for each head),
            `shared_local:kv_heads=4` (a band for each of 4 key/value heads),
            `sliding_window:window=128,prefix=4` (the first 4 tokens beside every band), or a
            baseline with its options, as in `bigbird:random=2` or `published_longformer`.
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
        raise ValueError(f"a pattern must be one of {known}, got {name!r}{_near(name, known)}")
    return Bands(text, named_pattern(text, num_heads, span))


def named_pattern(text: str, num_heads: int, span: int) -> BandPattern:
    """Read the name of a pattern, as in `attention_choice`; `dense` attends everything."""
    name, colon, rest = text.partition(":")
    known_names = (STOCK, *PATTERNS)
    if name not in known_names:
        raise ValueError(
            f"a pattern must be one of {known_names}, got {name!r}{_near(name, known_names)}"
        )
    constructor = getattr(BandPattern, name)
    known = [p for p in inspect.signature(constructor).parameters if p not in ("num_heads", "span")]
    options = _options(name, rest if colon else None, known)
    if name == "sliding_window":
        # As wide as the published ablation: one uniform band and its neighbour.
        options.setdefault("window", min(span, span // max(1, num_heads) + 1))
    return constructor(num_heads, span, **options)


def is_dense(pattern: BandPattern) -> bool:
    """True if every head attends all distances of the span."""
    return all(head == ((0, pattern.span),) for head in pattern.intervals)


def pattern_remarks(pattern: BandPattern) -> list[str]:
    """Remarks on a pattern that is valid and hardly meant: dense, or with equal or empty heads."""
    name = pattern.recipe["name"] if pattern.recipe else "the pattern"
    heads = pattern.num_heads
    if is_dense(pattern) and name != STOCK:
        return [f"every head of {name} attends all distances: this is dense attention"]
    remarks = []
    if empty := sum(not head for head in pattern.intervals):
        remarks.append(f"{empty} of {heads} heads of {name} attend nothing")
    most, count = Counter(pattern.intervals).most_common(1)[0]
    if name in ("shared_local", "exclusive", "gapped") and most and count > 1:
        bands = " ".join(f"[{near}, {far})" for near, far in most)
        remarks.append(f"{count} of {heads} heads of {name} attend the same distances {bands}")
        if name == "shared_local":
            remarks[-1] += ": their own bands lie within the local window; a smaller `local` helps"
    return remarks


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _baseline(text: str, num_heads: int, span: int) -> Baseline:
    """Read the name of a baseline, as in `attention_choice`."""
    from . import baselines

    name, colon, rest = text.partition(":")
    kind, given = BASELINES[name]
    constructor = getattr(baselines, kind)
    fixed = ("num_heads", "span", *given)
    known = [p for p in inspect.signature(constructor).parameters if p not in fixed]
    return constructor(num_heads, span, **given, **_options(name, rest if colon else None, known))


def _options(name: str, text: str | None, known: Sequence[str]) -> dict[str, Any]:
    """Read the options behind the colon, NAME=VALUE separated by commas; None without a colon."""
    options: dict[str, Any] = {}
    for item in () if text is None else text.split(","):
        key, equals, value = item.partition("=")
        if key not in known or not equals:
            raise ValueError(
                f"options of `{name}` are NAME=VALUE with a name of {list(known)}, got {item!r}"
                f"{_near(key, known) if key not in known else ''}"
            )
        if key in options:
            raise ValueError(f"option `{key}` of `{name}` must be given once, got {name}:{text}")
        options[key] = _value(name, key, value)
    return options


def _value(name: str, key: str, text: str) -> int | str | tuple[int, ...]:
    """Read an option's value: `widths` is a name or edges, `local` one integer or one per head,
    all others are integers.
    """
    if len(text) > LONGEST_VALUE:
        raise ValueError(
            f"option `{key}` of `{name}` must have at most {LONGEST_VALUE} characters, got "
            f"{len(text)}"
        )
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
