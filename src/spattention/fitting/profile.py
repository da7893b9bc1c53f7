"""The profile of a dense model: what each of its heads attends, as `hf.profile` measures it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import check_bytes, write_atomically
from ..scalars import as_int
from .bins import distance_edges

FORMAT = "spattention-profile"
VERSION = 1
DIGITS = 6  # significant digits of what is stored
MOST_BYTES = 2**29  # of a file; 64 layers of 64 heads over 65,536 tokens take half of it
MOST_TOKENS = 2**31 - 1
SHARE_ERROR = 1e-3  # rounding of some thousand stored shares stays far below it
COUNTS = ("length", "rows", "tokens", "needles", "needles_found", "sensitivity_rows")
MAY_BE_ZERO = ("needles", "needles_found", "sensitivity_rows")
SHARES = ("first", "distance", "first_distance")
ARRAYS = (*SHARES, "first_logits", "needle", "sensitivity", "needle_sensitivity")
OPTIONAL = ("needle", "sensitivity", "needle_sensitivity")
ADDED = (
    "sensitivity",
    "sensitivity_rows",
    "needle_sensitivity",
)  # entries that files of earlier versions lack


@dataclass(frozen=True)
class ModelIdentity:
    """The facts by which a profile's model is recognised.

    Attributes:
        name: name or path that the model was loaded by; for reading only.
        layers: attention layers of the decoder.
        heads: query heads per layer.
        kv_heads: key/value heads per layer.
        vocabulary: entries of the embedding.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


@dataclass(frozen=True, eq=False)
class Profile:
    """Shares of attention of the heads of a dense model: means over queries, all positions alike.

    L layers, H query heads, F first tokens, E bins of distance. Shares are fractions of a head's
    attention; those of a head add up to 1, less what goes to a learned sink of the model.

    Args:
        model: the model that was profiled.
        length: tokens of the longest row.
        rows: rows that were profiled.
        tokens: tokens in these rows, each of them a query.
        digest: names the tokens: the start of their SHA-256 in hexadecimal.
        first: float64 `[L, H, F]`, share on each of the first F tokens.
        distance: float64 `[L, H, E]`, share by bin of `edges`, apart from the first F tokens.
        first_distance: float64 `[L, H, F, E]`, `first` by the distance from query to that token.
        first_logits: float64 `[L, H, F]`, mean scaled score of each first token over the queries
            that see it: where learned sinks can start.
        needle: float64 `[L, H]`, share that the queries which predict an answer give to the needle
            that holds it; None if no needles were asked for.
        needles: needles asked for.
        needles_found: needles of which the model predicted every token of the answer.
        sensitivity: float64 `[L, H, E]`, how much the loss minds what a head no longer attends, by
            bin of distance, apart from the first F tokens. It is the mean over queries of the
            squared derivative of a row's loss (a sum over its tokens) with respect to a term added
            to the scores of the bin. None if it was not asked for.
        sensitivity_rows: rows that it was measured on.
        needle_sensitivity: float64 `[L, H]`, the share of each head in how much the answers mind
            their needles, a mean over needles. What an answer minds is the squared derivative of
            its log-probability with respect to a term added to a head's scores with the needle's
            sentence, summed over the queries after it. None if it was not asked for.

    Raises:
        ValueError: if a value has the wrong type, shape or range, or shares exceed 1.
    """

    model: ModelIdentity
    length: int
    rows: int
    tokens: int
    digest: str
    first: Tensor
    distance: Tensor
    first_distance: Tensor
    first_logits: Tensor
    needle: Tensor | None = None
    needles: int = 0
    needles_found: int = 0
    sensitivity: Tensor | None = None
    sensitivity_rows: int = 0
    needle_sensitivity: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self.model).items():
            if name != "name":
                _check_count(f"model.{name}", value, 1)
        if not isinstance(self.model.name, str):
            raise ValueError(f"`model.name` must be a string, got {self.model.name!r}")
        if self.model.heads % self.model.kv_heads:
            raise ValueError(
                f"`model.kv_heads` must divide `model.heads` = {self.model.heads}, got "
                f"{self.model.kv_heads}"
            )
        for name in COUNTS:
            _check_count(name, getattr(self, name), 0 if name in MAY_BE_ZERO else 1)
        if not self.length <= self.tokens:
            raise ValueError(
                f"`tokens` must be at least `length` = {self.length}, got {self.tokens}"
            )
        if not isinstance(self.digest, str):
            raise ValueError(f"`digest` must be a string, got {self.digest!r}")
        if (self.needle is None) != (self.needles == 0) or self.needles_found > self.needles:
            raise ValueError(
                "`needle` must be given for at least `needles_found` needles, got "
                f"{'none' if self.needle is None else 'shares'}, needles = {self.needles} and "
                f"needles_found = {self.needles_found}"
            )
        if (self.sensitivity is None) != (self.sensitivity_rows == 0):
            raise ValueError(
                "`sensitivity` must be given for `sensitivity_rows` rows, got "
                f"{'none' if self.sensitivity is None else 'values'} and {self.sensitivity_rows}"
            )
        if self.needle_sensitivity is not None and self.needle is None:
            raise ValueError("`needle_sensitivity` must be None without `needle`, got values")
        self._check_arrays()

    def _check_arrays(self) -> None:
        layers, heads, bins = self.model.layers, self.model.heads, len(self.edges) - 1
        if not isinstance(self.first, Tensor) or self.first.dim() != 3:
            raise ValueError("`first` must be a tensor [layers, heads, first tokens]")
        tokens = self.first.shape[-1]
        if tokens > self.length:
            raise ValueError(
                f"`first` must be of at most `length` = {self.length} tokens, got {tokens}"
            )
        shapes = {
            "first": (layers, heads, tokens),
            "distance": (layers, heads, bins),
            "first_distance": (layers, heads, tokens, bins),
            "first_logits": (layers, heads, tokens),
            "needle": (layers, heads),
            "sensitivity": (layers, heads, bins),
            "needle_sensitivity": (layers, heads),
        }
        for name, shape in shapes.items():
            values = getattr(self, name)
            if name in OPTIONAL and values is None:
                continue
            if not isinstance(values, Tensor) or values.dtype != torch.float64:
                raise ValueError(f"`{name}` must be a float64 tensor, got {_kind(values)}")
            if tuple(values.shape) != shape:
                raise ValueError(
                    f"`{name}` must have the shape {list(shape)}, got {list(values.shape)}"
                )
            if not bool(values.isfinite().all()):
                raise ValueError(f"`{name}` must be finite, got NaN or infinity")
            if name == "sensitivity" and bool((values < 0).any()):
                raise ValueError(f"`{name}` must be at least 0, got {float(values.min())}")
            if name not in ("first_logits", "sensitivity") and (
                bool((values < 0).any()) or bool((values > 1 + SHARE_ERROR).any())
            ):
                raise ValueError(
                    f"`{name}` must hold shares from 0 to 1, got {float(values.min())} to "
                    f"{float(values.max())}"
                )
        total = self.first.sum(-1) + self.distance.sum(-1)
        if bool((total > 1 + SHARE_ERROR).any()):
            raise ValueError(
                f"the shares of a head must add up to at most 1, got {float(total.max())}"
            )
        gap = (self.first_distance.sum(-1) - self.first).abs()
        if gap.numel() and float(gap.max()) > SHARE_ERROR:
            raise ValueError(
                "`first_distance` must add up to `first` over distances, got a difference of "
                f"{float(gap.max())}"
            )

    @property
    def edges(self) -> tuple[int, ...]:
        """Edges of the bins of distance, E + 1 tokens: exact up to 64, then 8 per doubling."""
        return distance_edges(self.length)

    @property
    def prefix_max(self) -> int:
        """Number of first tokens F whose shares were measured."""
        return self.first.shape[-1]

    def by_distance(self, prefix: int = 0) -> Tensor:
        """Shares by bin of distance apart from the first `prefix` tokens, `[L, H, E]`."""
        return self.distance + self.first_distance[:, :, prefix:].sum(dim=2)

    def check_model(self, model: ModelIdentity) -> None:
        """Check that this is a profile of that model; names are not compared.

        Raises:
            ValueError: naming what differs, with both numbers.
        """
        for field in fields(ModelIdentity):
            mine, other = getattr(self.model, field.name), getattr(model, field.name)
            if field.name != "name" and mine != other:
                raise ValueError(
                    f"`profile` must be that of the model: it has {field.name} = {mine} (profile "
                    f"of {self.model.name or 'a model without a name'}), the model "
                    f"{model.name or ''} has {other}"
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Profile):
            return NotImplemented
        for field in fields(Profile):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            same = (
                torch.equal(mine, theirs)
                if isinstance(mine, Tensor) and isinstance(theirs, Tensor)
                else mine is theirs or (not isinstance(mine, Tensor) and mine == theirs)
            )
            if not same:
                return False
        return True

    def __hash__(self) -> int:
        return hash((self.model, self.length, self.tokens, self.digest))

    def __repr__(self) -> str:
        return (
            f"Profile({self.model.name or 'model'}: {self.model.layers} layers of "
            f"{self.model.heads} heads, {self.tokens:,} tokens in {self.rows} rows of up to "
            f"{self.length}, {self.needles} needles)"
        )

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        arrays = {
            name: None if getattr(self, name) is None else getattr(self, name).tolist()
            for name in ARRAYS
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": asdict(self.model),
            "digest": self.digest,
            **{name: getattr(self, name) for name in COUNTS},
            "edges": list(self.edges),
            **arrays,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Profile:
        """The profile that `to_dict` wrote.

        Raises:
            ValueError: if it is no such dictionary, or an entry breaks a rule of `Profile`.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"a profile must have the format {FORMAT!r}, got {found!r}")
        if data.get("version") != VERSION or isinstance(data.get("version"), bool):
            raise ValueError(
                f"a profile's `version` must be {VERSION} (the one this library writes), got "
                f"{data.get('version')!r}"
            )
        names = {"format", "version", "model", "digest", "edges", *COUNTS, *ARRAYS}
        if set(data) | set(ADDED) != names:
            raise ValueError(
                f"a profile must have the entries {sorted(names)}, got {sorted(map(str, data))}"
            )
        known = {field.name for field in fields(ModelIdentity)}
        if not isinstance(data["model"], Mapping) or set(data["model"]) != known:
            raise ValueError(f"`model` must have the entries {sorted(known)}")
        _check_count("length", data["length"], 1)
        if data["edges"] != list(distance_edges(data["length"])):
            raise ValueError(
                f"`edges` must be those of `length` = {data['length']}: exact up to 64, then 8 per "
                "doubling"
            )
        data = {"sensitivity": None, "sensitivity_rows": 0, "needle_sensitivity": None, **data}
        arrays: dict[str, Any] = {name: _array(name, data[name]) for name in ARRAYS}
        counts = {name: data[name] for name in COUNTS}
        return cls(ModelIdentity(**data["model"]), digest=data["digest"], **counts, **arrays)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON: the whole file or none of it."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile that `save` wrote.

        Raises:
            ValueError: if there is no such file, or it is damaged, foreign, or of another version;
                the message names the file.
        """
        source = Path(path)
        if not source.is_file():
            found = "it is a folder" if source.is_dir() else "there is no such file"
            raise ValueError(f"{source} must be a profile, {found}")
        check_bytes(source, MOST_BYTES)
        try:
            return cls.from_dict(json.loads(source.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source} must be a profile of spattention: {error}") from error


def rounded(values: Tensor) -> Tensor:
    """The values as float64 with the digits that a file keeps, so that saving loses nothing."""
    flat = [float(f"{value:.{DIGITS}g}") for value in values.flatten().tolist()]
    return torch.tensor(flat, dtype=torch.float64).view(values.shape)


def _array(name: str, value: Any) -> Tensor | None:
    if name in OPTIONAL and value is None:
        return None
    try:
        return torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"`{name}` must be nested lists of numbers: {error}") from None


def _check_count(name: str, value: Any, least: int) -> None:
    found = as_int(value)
    if found is None or not least <= found <= MOST_TOKENS:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}")


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
