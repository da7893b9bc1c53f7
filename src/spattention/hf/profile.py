"""Measure what the heads of a dense model attend: `spattention.fit` turns it into patterns.

While a profile is taken, the model's attention runs here, in blocks of queries: the weights
`[B, H, block, K]` of a block are summed up and give the block's output. No mask is made, no kernel
is needed, and the model does what it does with its own attention, up to rounding.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..compat.huggingface import attention_name, set_attention_name
from ..fitting.bins import distance_edges
from ..fitting.profile import MOST_TOKENS, ModelIdentity, Profile, rounded
from ..scalars import as_int, has_values, int_at_least
from .attention import HONOURED, WITHOUT_EFFECT
from .config import NAME
from .decoder import attention_modules, check_model, key_heads, text_config_of, text_configs
from .mask import rows_mask
from .needles import Needle, as_needle, plant
from .packing import PACKING
from .progress import reporting
from .sensitivity import NeedleSums, SensitivitySums, Sums, attend, descend, softmax

BLOCK = 2**24  # weights that exist at a time
EVERY_EDGE = distance_edges(2**24)  # of rows of any length; the last bins stay empty


def profile(
    model: Any,
    batches: Iterable[Any],
    *,
    needles: int | Sequence[Any] | None = None,
    tokenizer: Any = None,
    sensitivity: int = 0,
    prefix_max: int = 16,
    progress: bool = True,
) -> Profile:
    """Measure what each head of a dense causal language model attends.

    One pass over some tens of thousands of tokens is enough for `spattention.fit`. The weights are
    exact, and exist for a block of queries at a time. Afterwards, and whatever happens meanwhile,
    the model has its own attention and modes of training again. Ctrl-C raises `KeyboardInterrupt`;
    nothing is returned then.

    Args:
        model: a Transformers causal language model without bands, on any device.
        batches: integer token ids, `[N]` or `[B, N]` each, or mappings with `input_ids` of that
            shape and, optionally, an `attention_mask`, whose masked tokens are left out.
        needles: measure which heads fetch: a number of passkeys to plant in the first rows, which
            needs `tokenizer`; or triples `(tokens, (start, stop) of the needle, (start, stop) of
            the answer)`, or needles of `spattention.hf.needles`, in rows of any length. The queries
            that count are those that predict the answer's tokens.
        tokenizer: the model's.
        sensitivity: measure how much the loss minds that heads no longer attend some distances, on
            this number of first rows, and how much the answers mind their needles, if there are
            any: a backward pass each.
        prefix_max: first tokens of a row whose shares are measured one by one; at least 1.
        progress: show a bar; plain lines where standard error is no terminal.

    Returns:
        The shares of attention by layer and head; see `Profile`.

    Raises:
        ValueError: if the model is not dense, causal and of Transformers' attention interface, or
            the tokens are not those of the model.
    """
    subject = _Subject(model)
    prefix_max = int_at_least("prefix_max", prefix_max, 1)
    sensitivity = int_at_least("sensitivity", sensitivity, 0)
    if sensitivity and torch.is_inference_mode_enabled():
        raise ValueError(f"`sensitivity` must be 0 under `torch.inference_mode`, got {sensitivity}")
    planted, triples = _needles(needles, tokenizer)
    if isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable):
        raise ValueError(
            f"`batches` must be an iterable of token ids, got {type(batches).__name__}"
        )
    sums = _Sums(prefix_max)
    minded: SensitivitySums | None = None
    digest, lengths, kept = hashlib.sha256(), list[int](), list[Tensor]()
    number = len(batches) if isinstance(batches, Sized) else None
    with reporting(progress) as report, _watching(subject, sums):
        for rows in report(_batches(batches, subject), "profiling", number):
            for row in rows:
                digest.update(len(row).to_bytes(8, "little") + row.numpy().tobytes())
                lengths.append(len(row))
                if len(kept) < max(planted, sensitivity):
                    kept.append(row)
            together = len({len(row) for row in rows}) == 1
            for same in [torch.stack(rows)] if together else [row[None] for row in rows]:
                subject.run(same)
        if not lengths:
            raise ValueError("`batches` must hold at least one row of tokens, got none")
        if len(lengths) < sensitivity:
            raise ValueError(
                f"`sensitivity` must be at most the {len(lengths)} rows of `batches`, got "
                f"{sensitivity}"
            )
        if sensitivity:
            sums.sensitivity = minded = SensitivitySums(EVERY_EDGE, prefix_max)
            for row in report(kept[:sensitivity], "gradients", sensitivity):
                descend(subject.model, row, minded)
            sums.sensitivity = None
        if planted:
            triples = plant(kept[:planted], planted, tokenizer)
        fetched = _Fetched()
        sums.fetched = fetched
        for number, needle in enumerate(triples):
            where = f"needle {number} of `needles`"
            check_row(needle.tokens, subject.config.vocab_size, subject.longest, where)
        for needle in report(triples, "needles", len(triples)):
            fetched.start(needle)
            logits = subject.run(needle.tokens[None], needle.queries)
            likeliest = logits[0].argmax(dim=-1).cpu()
            fetched.found += int(torch.equal(likeliest, needle.answer_tokens))
        if sensitivity and triples:
            asked = NeedleSums()
            sums.sensitivity = asked
            for needle in report(triples, "gradients of needles", len(triples)):
                asked.needle = needle
                descend(subject.model, needle.tokens, asked, needle.answer)
            fetched.sensitivity = rounded(asked.mean())
    return sums.profile(subject, lengths, digest.hexdigest()[:16], minded, sensitivity)


class _Subject:
    """The model: checked, with what is needed to run it and to restore it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = text_config_of(model)
        own = attention_name(self.config)
        if own == NAME or getattr(self.config, str(own), None) is not None:
            raise ValueError(f'`model` must be dense, with its own attention, got one with "{own}"')
        self.modules = attention_modules(model, self.config)
        check_model(model, self.config, self.modules)
        missing = [k for k in range(self.config.num_hidden_layers) if k not in self.modules]
        if missing:
            raise ValueError(
                f"`model` must have softmax attention in every layer, got none in {missing}"
            )
        self.configs = text_configs(model, self.config, self.modules)
        self.longest: int | None = getattr(self.config, "max_position_embeddings", None)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def run(self, ids: Tensor, queries: range | None = None) -> Tensor:
        """Logits `[B, queries, vocabulary]` of rows `[B, N]`; of the last query by default."""
        where = range(ids.shape[1] - 1, ids.shape[1]) if queries is None else queries
        more = {"logits_to_keep": ids.shape[1] - where.start} if self._keeps else {}
        with torch.compiler.set_stance("force_eager"):  # compiled layers would not call back here
            logits = self.model(input_ids=ids.to(self.model.device), use_cache=False, **more).logits
        before = ids.shape[1] - logits.shape[1]
        return logits[:, where.start - before : where.stop - before]


@contextmanager
def _watching(subject: _Subject, sums: _Sums) -> Iterator[None]:
    """Evaluation mode, and attention that adds to `sums`; both end with the context."""
    name = f"{NAME}_profile_{id(sums)}"
    modes = {module: module.training for module in subject.model.modules()}
    own = {id(config): attention_name(config) for config in subject.configs}
    ALL_ATTENTION_FUNCTIONS[name] = sums.attend
    ALL_MASK_ATTENTION_FUNCTIONS[name] = rows_mask
    try:
        for config in subject.configs:
            set_attention_name(config, name)
        subject.model.eval()
        yield
    finally:
        for config in subject.configs:
            set_attention_name(config, own[id(config)])
        for module, training in modes.items():
            module.training = training
        del ALL_ATTENTION_FUNCTIONS[name], ALL_MASK_ATTENTION_FUNCTIONS[name]


class _Fetched:
    """Attention on needles: sums over needles of the mean over the answer's queries."""

    def __init__(self) -> None:
        self.needle: Needle | None = None
        self.count = 0
        self.found = 0
        self.shares: dict[int, Tensor] = {}  # layer -> [H]
        self.sensitivity: Tensor | None = None  # [L, H]

    def start(self, needle: Needle) -> None:
        self.needle = needle
        self.count += 1

    def add(self, layer: int, weights: Tensor, start: int) -> None:
        """Weights `[1, H, R, K]` of the queries from position `start`."""
        assert self.needle is not None
        queries = self.needle.queries
        first, last = max(queries.start - start, 0), min(queries.stop - start, weights.shape[2])
        if first < last:
            keys = slice(self.needle.needle.start, self.needle.needle.stop)
            share = weights[0, :, first:last, keys].double().sum(dim=(1, 2)).cpu() / len(queries)
            self.shares[layer] = self.shares.get(layer, torch.zeros_like(share)) + share


class _LayerSums:
    """Sums of one layer over all queries, float64 on the layer's device."""

    def __init__(self, heads: int, kv_heads: int, tokens: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        bins = len(EVERY_EDGE) - 1
        self.kv_heads = kv_heads
        self.distance = zeros(heads, bins)
        self.first = zeros(heads, tokens, bins)
        self.logits = zeros(heads, tokens)

    def add(self, scores: Tensor, weights: Tensor, start: int, bins: Tensor) -> None:
        """Add a block of queries that see all keys up to their own: `[B, H, R, start + R]`."""
        keys = weights.shape[3]
        tokens = min(self.first.shape[1], keys)
        total = weights.sum(dim=0)
        position = torch.arange(start, keys, device=weights.device)[:, None]
        back = position - torch.arange(tokens, device=weights.device)  # [R, tokens]
        seen = back >= 0
        place = torch.arange(tokens, device=weights.device) * self.first.shape[2]
        index = place + bins[back.clamp(min=0)]
        self.first.flatten(1).index_add_(
            1, index.flatten(), total[..., :tokens].flatten(1).double()
        )
        logits = scores[..., :tokens].masked_fill(~seen, 0.0).sum(dim=(0, 2), dtype=torch.float64)
        self.logits[:, :tokens] += logits
        total[..., :tokens] = 0
        self.distance.index_add_(1, bins[:keys], by_distance(total).double())


class _Sums:
    """The attention function of a profile, and what it has added up."""

    def __init__(self, prefix_max: int) -> None:
        self.prefix_max = prefix_max
        self.layers: dict[int, _LayerSums] = {}
        self.fetched: _Fetched | None = None
        self.sensitivity: Sums | None = None
        self._bins: dict[torch.device, Tensor] = {}

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        """Causal attention, `[B, N, H, Dv]`; arguments are those of Transformers' interface."""
        _check_call(module, query, key, attention_mask, keywords)
        batch, heads, length, width = query.shape
        groups, sinks = key.shape[1], keywords.get("s_aux")
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        scale = width**-0.5 if scaling is None else scaling
        if self.sensitivity is not None:
            q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
            minded = attend(self.sensitivity, module.layer_idx, q, k, v, scale, sinks)
            return minded.to(query.dtype), None
        keys, values = key.to(dtype).mT, value.to(dtype)
        out = query.new_empty(batch, length, heads, value.shape[-1])
        rows = max(1, min(128, BLOCK // (batch * heads * length)))
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            shape = (batch, heads, stop - start)
            block = query[:, :, start:stop].to(dtype).reshape(batch, groups, -1, width)
            scores = (block @ keys[..., :stop]).view(*shape, stop) * scale
            tokens = torch.arange(stop, device=query.device)
            scores.masked_fill_(tokens > tokens[start:, None], -torch.inf)
            weights = softmax(scores, sinks)
            seen = weights.view(batch, groups, -1, stop) @ values[:, :, :stop]
            out[:, start:stop] = seen.view(*shape, -1).transpose(1, 2)
            if self.fetched is not None:
                self.fetched.add(module.layer_idx, weights, start)
            else:
                self._layer(module, query, groups).add(
                    scores, weights, start, self._bin_of(length, query.device)
                )
        return out, None

    def _layer(self, module: Any, query: Tensor, kv_heads: int) -> _LayerSums:
        if module.layer_idx not in self.layers:
            self.layers[module.layer_idx] = _LayerSums(
                query.shape[1], kv_heads, self.prefix_max, query.device
            )
        return self.layers[module.layer_idx]

    def _bin_of(self, length: int, device: torch.device) -> Tensor:
        """The bin of each distance below `length`, int64."""
        found = self._bins.get(device)
        if found is None or len(found) < length:
            edges = torch.tensor(EVERY_EDGE, device=device)
            distance = torch.arange(length, device=device)
            found = torch.searchsorted(edges, distance, right=True) - 1
            self._bins[device] = found
        return found

    def profile(
        self,
        subject: _Subject,
        lengths: Sequence[int],
        digest: str,
        minded: SensitivitySums | None,
        minded_rows: int,
    ) -> Profile:
        """The means of everything that was added up."""
        layers = [self.layers[k] for k in sorted(self.layers)]
        heads = {layer.distance.shape[0] for layer in layers}
        groups = {layer.kv_heads for layer in layers}
        if (
            len(layers) != subject.config.num_hidden_layers
            or len(heads | {0}) > 2
            or len(groups) > 1
        ):
            raise ValueError(
                f"`model` must have the same heads in all of its {subject.config.num_hidden_layers}"
                f" layers, got {len(layers)} layers of {sorted(heads)} heads, "
                f"{sorted(groups)} of keys and values"
            )
        longest, queries = max(lengths), sum(lengths)
        bins, tokens = len(distance_edges(longest)) - 1, min(self.prefix_max, longest)
        first = torch.stack([layer.first.cpu() for layer in layers])[:, :, :tokens, :bins] / queries
        distance = torch.stack([layer.distance.cpu() for layer in layers])[..., :bins] / queries
        seen = [sum(max(0, length - token) for length in lengths) for token in range(tokens)]
        logits = torch.stack([layer.logits.cpu() for layer in layers])[..., :tokens]
        fetched = self.fetched
        needle = None
        if fetched is not None and fetched.count:
            shares = [fetched.shares[k] for k in sorted(fetched.shares)]
            needle = rounded(torch.stack(shares) / fetched.count)
        return Profile(
            model=identity(subject.model, next(iter(groups))),
            length=longest,
            rows=len(lengths),
            tokens=queries,
            digest=digest,
            first=rounded(first.sum(dim=-1)),
            distance=rounded(distance),
            first_distance=rounded(first),
            first_logits=rounded(logits / torch.tensor(seen)),
            needle=needle,
            needles=fetched.count if fetched else 0,
            needles_found=fetched.found if fetched else 0,
            sensitivity=None if minded is None else rounded(minded.mean()[..., :bins]),
            sensitivity_rows=minded_rows,
            needle_sensitivity=fetched.sensitivity if fetched else None,
        )


def identity(model: Any, kv_heads: int | None = None) -> ModelIdentity:
    """The facts by which a model's profile is recognised."""
    config = model.config.get_text_config()
    return ModelIdentity(
        name=str(model.config.name_or_path or type(model).__name__),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=key_heads(config) if kv_heads is None else kv_heads,
        vocabulary=config.vocab_size,
    )


def by_distance(weights: Tensor) -> Tensor:
    """Sums of weights by distance: `[H, R, K]`, whose last query sees the last key, to `[H, K]`."""
    rows, keys = weights.shape[1:]
    # Row r of the reversed keys is moved r to the right by reading rows that are one shorter than
    # those written: each column then holds one distance.
    padded = torch.nn.functional.pad(weights.flip(-1), (0, rows))
    width = keys + rows - 1
    moved = padded.flatten(1)[:, : rows * width].unflatten(1, (rows, width))
    return moved.sum(dim=1)[:, rows - 1 :]


def _check_call(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, keywords: dict[str, Any]
) -> None:
    """Check that a layer attends as dense causal attention does."""
    window = keywords.get("sliding_window")
    length = query.shape[2]
    if window is not None and window < length:
        raise ValueError(
            f"`model` must be dense, got a sliding window of {window} tokens in layer "
            f"{module.layer_idx} and rows of {length}"
        )
    if mask is not None or key.shape[2] != length:
        raise ValueError(
            f"`model` must attend its input alone, got a mask or a cache in layer "
            f"{module.layer_idx}"
        )
    known = (HONOURED | WITHOUT_EFFECT) - {"softcap", *PACKING}
    for name, given in keywords.items():
        changes = name not in known and given is not None and given is not False
        if changes or (name == "is_causal" and given is False):
            raise ValueError(
                f"`model` must be dense and causal, got `{name}` of {type(given).__name__}"
            )


def _batches(batches: Iterable[Any], subject: _Subject) -> Iterator[list[Tensor]]:
    """The rows of each batch, int64 `[N]` on the CPU, without masked tokens."""
    for number, batch in enumerate(batches):
        where = f"batch {number} of `batches`"
        mask = None
        if isinstance(batch, Mapping):
            if "input_ids" not in batch:
                raise ValueError(f"{where} must have `input_ids`, got {sorted(map(str, batch))}")
            if batch.get("position_ids") is not None:
                raise ValueError(
                    f"{where} must not have `position_ids`: give documents as rows of their own"
                )
            mask = batch.get("attention_mask")
            batch = batch["input_ids"]
        ids = _integers(batch, where)
        rows = list(ids)
        if mask is not None:
            seen = torch.as_tensor(mask).cpu()
            seen = seen[None] if seen.dim() == 1 else seen
            if seen.shape != ids.shape:
                raise ValueError(
                    f"`attention_mask` of {where} must have the shape {list(ids.shape)} of its "
                    f"tokens, got {list(seen.shape)}"
                )
            rows = [row[kept.bool()] for row, kept in zip(rows, seen)]
        for row in rows:
            check_row(row, subject.config.vocab_size, subject.longest, where)
        yield rows


def _integers(batch: Any, where: str) -> Tensor:
    try:
        ids = torch.as_tensor(batch).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{where} must be token ids [N] or [B, N], got {type(batch).__name__}"
        ) from None
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"{where} must be integer token ids, got {ids.dtype}")
    if not has_values(ids):
        raise ValueError(
            f"{where} must be a dense tensor with values, got {ids.dtype}, {ids.layout}, on "
            f"{ids.device}"
        )
    if ids.dim() not in (1, 2):
        raise ValueError(f"{where} must be token ids [N] or [B, N], got {list(ids.shape)}")
    return ids.long()[None] if ids.dim() == 1 else ids.long()


def check_row(row: Tensor, vocabulary: int, longest: int | None, where: str) -> None:
    """Check that a row of tokens is one that the model takes."""
    if not len(row):
        raise ValueError(f"{where} must hold at least one token per row, got a row of none")
    most = min(longest or MOST_TOKENS, EVERY_EDGE[-1])
    if len(row) > most:
        raise ValueError(f"{where} must hold at most {most} tokens per row, got {len(row)}")
    if int(row.min()) < 0 or int(row.max()) >= vocabulary:
        raise ValueError(
            f"{where} must hold tokens from 0 to {vocabulary - 1}, the model's, got "
            f"{int(row.min())} to {int(row.max())}"
        )


def _needles(needles: Any, tokenizer: Any) -> tuple[int, list[Needle]]:
    """The number of needles to plant, or the needles given."""
    if needles is None:
        return 0, []
    count = as_int(needles)
    if count is not None:
        if count < 1:
            raise ValueError(f"`needles` must be at least 1, or None, got {count}")
        if tokenizer is None:
            raise ValueError(f"`tokenizer` must be given to plant {count} needles, got None")
        return count, []
    if isinstance(needles, str | Mapping) or not isinstance(needles, Sequence) or not needles:
        raise ValueError(
            "`needles` must be a number, or triples (tokens, needle range, answer range), got "
            f"{needles!r}"
        )
    return 0, [as_needle(given, number) for number, given in enumerate(needles)]
