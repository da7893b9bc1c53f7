"""Attention that commands name on the command line: its name, how to apply it, and its work."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from .bands import BandPattern
from .constructor import CONSTRUCTORS
from .files import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .baselines import Baseline

STOCK = "dense"
EXPLICIT = "intervals"  # a pattern written out
# name on the command line -> class in `spattention.baselines`, and what the name says already
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "longformer": ("Longformer", {}),
    "bigbird": ("BigBird", {}),
    "reformer": ("Reformer", {}),
    "published_longformer": ("PublishedMask", {"mask": "longformer"}),
    "published_bigbird": ("PublishedMask", {"mask": "bigbird"}),
    "published_reformer": ("PublishedMask", {"mask": "reformer"}),
}
# the same for classes in `spattention.related`
RELATED: dict[str, tuple[str, dict[str, Any]]] = {
    "mea": ("MEA", {}),
    "cca": ("CCA", {}),
    "rrattention": ("RRAttention", {}),
    "dga": ("DGA", {}),
    "elementwise": ("Elementwise", {}),
    "recurrent_near": ("RecurrentNear", {"heads": None}),
}
LONGEST_VALUE = 4000  # characters of an option, which Python's conversion of integers allows too
MOST_EQUAL = 0.75  # of the heads of a pattern; the first of geometric bands always are
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
class DenseAttention:
    """Transformers' own dense attention, PyTorch's `scaled_dot_product_attention`."""

    num_heads: int
    name: str = STOCK

    def apply(self, model: PreTrainedModel) -> None:
        from .compat.huggingface import attention_name

        config = model.config.get_text_config()
        own = attention_name(config)
        if getattr(config, own, None) is not None:  # its section would be saved with the model
            raise ValueError(f"`model` must have stock attention for {self.name}, got {own}")
        model.set_attn_implementation("sdpa")

    def pairs(self, seq_len: int) -> int:
        return self.num_heads * seq_len * (seq_len + 1) // 2


@dataclass(frozen=True)
class BandAttention:
    """Sparse Patterned Attention with one pattern in all layers."""

    name: str
    pattern: BandPattern

    def apply(self, model: PreTrainedModel) -> None:
        from . import hf

        hf.apply(model, self.pattern)

    def pairs(self, seq_len: int) -> int:
        return sum(self.pattern.pairs(seq_len))


@dataclass
class OtherAttention:
    """A baseline or a related system: another attention.

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
            `shared_local:kv_heads=4` (a band for each of 4 key/value heads) or
            `sliding_window:window=128,prefix=4` (the first 4 tokens beside every band), `intervals`
            with those of each head, as in `intervals:heads=0-8/0-4+16-32` (those of one head are
            for all, and `none` is a head without keys), or a baseline or related system with its
            options, as in `bigbird:random=2`, `published_longformer` or `mea:bands=exclusive`.
            `bands` is the name of a pattern with its options, and comes last.
        num_heads: query heads of the model.
        span: context length of the model, in tokens.

    Raises:
        ValueError: if the name or an option is not known, or breaks a rule of what it names.
    """
    name = text.partition(":")[0]
    if text == STOCK:
        return DenseAttention(num_heads)
    if is_other(text):
        return OtherAttention(text, other_attention(text, num_heads, span))
    if name not in (*CONSTRUCTORS, EXPLICIT):
        raise _unknown("a pattern", name, (*CONSTRUCTORS, EXPLICIT, *BASELINES, *RELATED))
    return BandAttention(text, named_pattern(text, num_heads, span))


def is_other(text: str) -> bool:
    """True if a name is that of a baseline or a related system."""
    return text.partition(":")[0] in (*BASELINES, *RELATED)


def named_pattern(text: str, num_heads: int, span: int, what: str = "a pattern") -> BandPattern:
    """Read the name of a pattern with its options, as in `attention_choice`; `dense` attends
    everything. Errors call it `what`."""
    name, colon, rest = text.partition(":")
    known_names = (*CONSTRUCTORS, EXPLICIT)
    if name not in known_names:
        raise _unknown(what, name, known_names)
    if name == EXPLICIT:
        return _explicit(
            _options(name, rest if colon else None, ("heads", "prefix")), num_heads, span
        )
    constructor = getattr(BandPattern, name)
    known = [p for p in inspect.signature(constructor).parameters if p not in ("num_heads", "span")]
    options = _options(name, rest if colon else None, known)
    if name == "sliding_window":
        # As wide as the published ablation: one uniform band and its neighbour.
        options.setdefault("window", min(span, span // max(1, num_heads) + 1))
    return constructor(num_heads, span, **options)


def _unknown(what: str, name: str, known: Sequence[str]) -> ValueError:
    first, separator, rest = name.partition(",")
    if separator and first in known:
        hint = f"; options follow a colon, as in {first}:{rest}"
    else:
        hint = did_you_mean(name, known)
    return ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}{hint}")


def _explicit(options: dict[str, Any], num_heads: int, span: int) -> BandPattern:
    """The pattern of intervals that are written out."""
    if "heads" not in options:
        raise ValueError(f"`{EXPLICIT}` must have the option `heads`, as in {EXPLICIT}:heads=0-8")
    heads = options["heads"]
    if len(heads) not in (1, num_heads):
        raise ValueError(
            f"option `heads` of `{EXPLICIT}` must have the intervals of one head or of all "
            f"{num_heads}, got {len(heads)}"
        )
    intervals = heads * num_heads if len(heads) == 1 else heads
    return BandPattern(intervals, span, prefix=options.get("prefix", 0))


def is_dense(pattern: BandPattern) -> bool:
    """True if every head attends all distances of the span."""
    return all(head == ((0, pattern.span),) for head in pattern.intervals)


def pattern_remarks(
    pattern: BandPattern, name: str | None = None, most_equal: float = 0.0
) -> list[str]:
    """Remarks on a pattern that is valid and hardly meant: dense, or with equal or empty heads.
    They call it `name`, by default its constructor. A share `most_equal` of the heads may attend
    the same distances without a remark."""
    kind = pattern.constructor["name"] if pattern.constructor else None
    name = name or kind or "the pattern"
    heads = pattern.num_heads
    if is_dense(pattern) and name != STOCK:
        return [f"every head of {name} attends all distances: this is dense attention"]
    remarks = []
    if empty := sum(not head for head in pattern.intervals):
        remarks.append(f"{empty} of {heads} heads of {name} attend nothing")
    most, count = Counter(pattern.intervals).most_common(1)[0]
    distinct = kind in ("shared_local", "exclusive", "gapped")
    # Query heads of one key/value head share their band by design.
    made = pattern.constructor or {}
    group = made["num_heads"] // made["kv_heads"] if "kv_heads" in made else 1
    if distinct and most and count > max(group, most_equal * heads):
        bands = " ".join(f"[{near}, {far})" for near, far in most)
        remarks.append(f"{count} of {heads} heads of {name} attend the same distances {bands}")
        if kind == "shared_local":
            remarks[-1] += ": their own bands lie within the local window; a smaller `local` helps"
    return remarks


def other_attention(text: str, num_heads: int, span: int) -> Baseline:
    """Read the name of a baseline or a related system, as in `attention_choice`."""
    from . import baselines, related

    name, colon, rest = text.partition(":")
    kind, given = (BASELINES | RELATED)[name]
    constructor = getattr(baselines if name in BASELINES else related, kind)
    parameters = inspect.signature(constructor).parameters
    known = [p for p in parameters if p not in ("num_heads", "span", *given)]
    pattern = None
    if "bands" in known:  # its options have colons and commas too, so it comes last
        known.remove("bands")
        rest, found, after = rest.partition("bands=")
        pattern = after if found else None
        if found and rest and not rest.endswith(","):
            raise ValueError(f"options of `{name}` must be separated by commas, got {text!r}")
        if found and "," in after.partition(":")[0]:
            raise ValueError(f"`bands` of `{name}` must come last, got {text!r}")
        if found:
            rest = rest.removesuffix(",")
            colon = rest
    decimals = {p for p in known if parameters[p].annotation == "float"}
    nested = ("bands",) if "bands" in parameters else ()
    options = _options(name, rest if colon else None, known, decimals, nested)
    other: Baseline = constructor(num_heads, span, **given, **options)
    if pattern is None:
        return other
    assert isinstance(other, related.Related)
    bands = named_pattern(pattern, num_heads, other.band_span, f"`bands` of `{name}`")
    return replace(other, bands=bands)  # type: ignore[call-arg]  # those with `bands` alone


def _options(
    name: str,
    text: str | None,
    known: Sequence[str],
    decimals: Collection[str] = (),
    nested: Sequence[str] = (),
) -> dict[str, Any]:
    """Read the options behind the colon, NAME=VALUE separated by commas; None without a colon.
    Values of `decimals` are decimal numbers; `nested` are options that were taken off before.
    """
    options: dict[str, Any] = {}
    for item in () if text is None else text.split(","):
        key, equals, value = item.partition("=")
        if key not in known or not equals:
            raise ValueError(
                f"options of `{name}` are NAME=VALUE with a name of {[*known, *nested]}, got "
                f"{item!r}{'' if key in known else did_you_mean(key, [*known, *nested])}"
            )
        if key in options:
            raise ValueError(f"option `{key}` of `{name}` must be given once, got {name}:{text}")
        options[key] = _decimal(name, key, value) if key in decimals else _value(name, key, value)
    return options


def _value(name: str, key: str, text: str) -> int | str | tuple[Any, ...]:
    """Read an option's value: `widths` is a name or edges, `local` one integer or one per head,
    `heads` the intervals of each head, all others are integers.
    """
    if len(text) > LONGEST_VALUE:
        raise ValueError(
            f"option `{key}` of `{name}` must have at most {LONGEST_VALUE} characters, got "
            f"{len(text)}"
        )
    if key == "heads":
        return _intervals(name, text)
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


def _intervals(name: str, text: str) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Read intervals, as in 0-8/0-4+16-32/none."""
    head = r"(none|[0-9]+-[0-9]+(\+[0-9]+-[0-9]+)*)"
    if not re.fullmatch(f"{head}(/{head})*", text):
        raise ValueError(
            f"option `heads` of `{name}` must be intervals as in 0-8/0-4+16-32/none, got {text!r}"
        )
    return tuple(
        tuple(tuple(map(int, part.split("-"))) for part in each.split("+") if part != "none")
        for each in text.split("/")
    )


def _decimal(name: str, key: str, text: str) -> float:
    """Read a decimal number, as in 0.95 or 1e-3."""
    if len(text) > LONGEST_VALUE or not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?(e-?[0-9]{1,3})?", text):
        raise ValueError(f"option `{key}` of `{name}` must be a number, got {text[:100]!r}")
    return float(text)
