"""MEA, Multi-head Explicit Attention (arXiv:2601.19611v1, Shanghai AI Lab and Fudan, 2026).

Key and value heads are linear combinations of component heads (Eqs. 10 and 11), with one matrix
`W [h', h]` for keys and one for values in each layer, shared by all positions and channels:

    mixed_a = sum_c W[c, a] component_c          K_lc = HLC(W_K, K),  V_lc = HLC(W_V, V)

Queries are not mixed. Causal softmax attention over the mixed heads follows, then an RMSNorm over
the channels of each head (Eq. 12), then the output projection. In grouped-query attention the
key/value heads are mixed, and a query head reads the mixed head of its group (Eqs. 15 and 17).

As many mixed heads as components: the matrices come right behind the projections, so before a norm
of the keys (Qwen3, OLMoE) and before rotary positions, and the cache holds mixed heads. Without the
head norm this is multi-head attention with other projections, which the paper says too: `fold`
multiplies the matrices into them. The fair baseline is the head norm alone, `mix=0`.

Fewer components h' ("virtual heads", Eqs. 36 to 38): the projections give h' component heads, the
cache holds those, and each step mixes what the cache returns. Rotary positions turn all heads
alike, so mixing after them is the same (Eq. 13); a norm of the keys is not linear, and such models
raise. In a model with weights, components and matrices come from a singular value decomposition of
the projection, reshaped to `[d * hidden, h]`: the left vectors are the components, `diag(sigma) Vt`
the matrix. Here both are rescaled, by one number, so that components are as large as the heads
were; the product is the same.

Not published, and chosen here: the matrices start at the identity; the norm has a gain of its own
per channel, shared by the heads of a layer, and adds 1e-5 to the mean square, as in the
Differential Transformer whose form Eq. 12 has. The norm is there from the start, so a model with
`norm=1` does not start as multi-head attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..bands import BandPattern
from ..baselines.adapter import apply, check_integers, remove
from ..hf.apply import apply as apply_bands
from ..hf.decoder import attention_modules, head_dim, key_heads
from ..hf.sinks import new_parameter
from .method import Related, causal_attention, causal_pairs, causal_weights, check_bands, norm_heads

PROJECTIONS = ("k_proj", "v_proj")


@dataclass(frozen=True)
class MEA(Related):
    """Mixed key and value heads, and a norm per head.

    Args:
        num_heads: query heads.
        span: longest input, in tokens.
        bands: bands of the query heads; None attends all of the past.
        mix: 1 mixes heads; 0 leaves the head norm alone.
        norm: 1 has an RMSNorm of each head's output; 0 has none.
        components: component heads; default 0, as many as the model has key/value heads.
    """

    kind: ClassVar[str] = "mea"
    has_weights: ClassVar[bool] = True

    bands: BandPattern | None = None
    mix: int = 1
    norm: int = 1
    components: int = 0

    def __post_init__(self) -> None:
        check_bands(self, self.bands)
        check_integers(
            self.kind,
            mix=(self.mix, 0, 1),
            norm=(self.norm, 0, 1),
            components=(self.components, 0, self.num_heads),
        )
        if self.components and not self.mix:
            raise ValueError(f"`components` of `mea` need mix=1, got {self.components} with mix=0")
        if not self.mix and not self.norm:
            raise ValueError("`mix` and `norm` of `mea` must not both be 0: nothing would be left")

    def pairs(self, seq_len: int, num_layers: int) -> int:
        return causal_pairs(self.num_heads, seq_len, self.bands)

    def layer(self, index: int, num_layers: int) -> HeadMixingAttention:
        """A layer without mixing and norm: see `Baseline.layer`."""
        return HeadMixingAttention(None, self.bands)

    def layer_in(self, module: Any, num_layers: int) -> HeadMixingAttention:
        """See `Baseline.layer_in`."""
        return HeadMixingAttention(getattr(module, "head_mixing", None), self.bands)

    def check(self, module: Any) -> None:
        if not self.mix:
            return
        heads, name = key_heads(module.config), type(module).__name__
        for each in PROJECTIONS:
            if not isinstance(getattr(module, each, None), torch.nn.Linear):
                raise ValueError(
                    "`model` must have separate linear projections k_proj and v_proj without "
                    f"adapters for mea, got {type(getattr(module, each, None)).__name__} as {each} "
                    f"of {name}"
                )
        if self.components > heads:
            raise ValueError(
                f"`components` of `mea` must be at most the {heads} key/value heads, got "
                f"{self.components}"
            )
        bounded = getattr(module.config, "clip_qkv", None) is not None
        if self.components and (hasattr(module, "k_norm") or bounded):
            raise ValueError(
                f"`components` of `mea` must be 0 for a model with "
                f"{'clip_qkv' if bounded else 'a norm of its keys'}, which does not commute with "
                f"mixing, got {self.components} for {name}"
            )

    def equip(self, module: Any) -> None:
        """Give an attention module its matrices and norm."""
        if self.mix and not self.components:
            for name in PROJECTIONS:
                mixed = MixedProjection(module, getattr(module, name), key_heads(module.config))
                setattr(module, name, mixed)
        if self.norm or self.components:
            module.head_mixing = HeadMixing(module, self)


class MixedProjection(torch.nn.Module):
    """A projection whose heads are mixed.

    Args:
        module: the attention module that it is part of.
        projection: gives the component heads.
        heads: number of components and of mixed heads.

    Attributes:
        mixing: `[components, heads]`, the identity at first.
    """

    def __init__(self, module: Any, projection: torch.nn.Linear, heads: int) -> None:
        super().__init__()
        self.projection = projection
        self.mixing = new_parameter(module, torch.eye(heads))

    def forward(self, hidden: Tensor) -> Tensor:
        """Mixed heads side by side, `[..., heads * d]`."""
        found = self.projection(hidden)
        components = found.unflatten(-1, (self.mixing.shape[0], -1))
        return mix_heads(components, self.mixing, dim=-2).flatten(-2)


class HeadMixing(torch.nn.Module):
    """Weights of an attention module besides its projections.

    Attributes:
        key_mixing: `[components, heads]` where there are fewer components than heads, else None.
        value_mixing: alike.
        gain: `[d]` of the head norm, or None.
    """

    def __init__(self, module: Any, method: MEA) -> None:
        super().__init__()
        self.key_mixing = self.value_mixing = self.gain = None
        if method.components:
            heads = key_heads(module.config)
            module.k_proj, key_mixing = split_heads(module.k_proj, heads, method.components)
            module.v_proj, value_mixing = split_heads(module.v_proj, heads, method.components)
            self.key_mixing = new_parameter(module, key_mixing)
            self.value_mixing = new_parameter(module, value_mixing)
        if method.norm:
            self.gain = new_parameter(module, torch.ones(head_dim(module.config)))


class HeadMixingAttention:
    """The attention of one layer, after its projections.

    Args:
        weights: of the layer; None for no mixing behind the projections, and no norm.
        bands: as in `MEA`.
    """

    def __init__(self, weights: HeadMixing | None, bands: BandPattern | None) -> None:
        self.mixing = weights
        self.bands = bands

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        weights = self.mixing
        if weights is not None and weights.key_mixing is not None:
            assert weights.value_mixing is not None
            key = mix_heads(key, weights.key_mixing, dim=1)
            value = mix_heads(value, weights.value_mixing, dim=1)
        out = causal_attention(query, key, value, scale, self.bands)
        return out if weights is None or weights.gain is None else norm_heads(out, weights.gain)

    def weights(self, query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
        """See `LayerAttention.weights`; rows without keys are zero."""
        if self.mixing is not None and self.mixing.key_mixing is not None:
            key = mix_heads(key, self.mixing.key_mixing, dim=1)
        return causal_weights(query, key, scale, start, stop, self.bands)


def mix_heads(components: Tensor, mixing: Tensor, dim: int) -> Tensor:
    """Eq. 10, `mixed_a = sum_c mixing[c, a] component_c`, along the axis `dim` of heads."""
    mixed = components.movedim(dim, -1) @ mixing.to(components.dtype)
    return mixed.movedim(-1, dim)


def split_heads(
    projection: torch.nn.Linear, heads: int, components: int
) -> tuple[torch.nn.Linear, Tensor]:
    """Eqs. 36 to 38: the best approximation of a projection's heads by fewer components.

    Args:
        projection: `[heads * d]` features out.
        heads: in the projection.
        components: at most `heads`.

    Returns:
        A projection of `components * d` features, and the matrix `[components, heads]`. Weights on
        the meta device are only given their shape.
    """
    weight, bias = projection.weight, projection.bias
    size = projection.out_features // heads
    smaller = _linear_like(projection, components * size)
    if weight.device.type == "meta":
        return smaller, torch.empty(components, heads, device="meta")
    with torch.no_grad():
        columns = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
        matrix = columns.detach().double().unflatten(0, (heads, size)).flatten(1)  # [heads, d * n]
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        size_of_head = matrix.norm() / heads**0.5
        basis = (right[:components] * size_of_head).unflatten(1, (size, -1)).flatten(0, 1)
        smaller.weight.copy_(basis[:, : weight.shape[1]])
        if bias is not None:
            smaller.bias.copy_(basis[:, -1])
        mixing = (left[:, :components] * sigma[:components] / size_of_head).T
    return smaller, mixing


def fold(model: Any) -> Any:
    """Multiply the mixing matrices of a model into its projections, in place: same outputs, no
    mixing left, and with virtual heads the cache of all heads.

    Args:
        model: a model with `MEA`, its weights in floating point and without adapters.

    Returns:
        The same model: with the head norm alone if it has one, otherwise with stock attention or
        the bands of `spattention.hf`, and their `BandCache`.

    Raises:
        ValueError: if the model mixes no heads. It is then as it was.
    """
    section = getattr(getattr(model, "config", None), MEA.kind, None)
    method = None if section is None else MEA.from_section(section)
    if method is None or not method.mix:
        raise ValueError("`model` must mix its heads, got one without `mea` or with mix=0")
    modules = attention_modules(model, model.config)
    gains = {}
    for index, module in modules.items():
        weights: Any = getattr(module, "head_mixing", None)
        for name in PROJECTIONS:
            projection = getattr(module, name)
            if method.components:
                mixing = weights.key_mixing if name == "k_proj" else weights.value_mixing
            else:
                projection, mixing = projection.projection, projection.mixing
            setattr(module, name, _folded(projection, mixing))
        if weights is not None:
            gains[index] = weights.gain
            del module.head_mixing
    remove(model)
    if method.norm:
        apply(model, MEA(method.num_heads, method.span, method.bands, mix=0))
        for index, module in modules.items():
            module.head_mixing.gain = gains[index]
    elif method.bands is not None:
        apply_bands(model, method.bands)
    return model


def _folded(projection: torch.nn.Linear, mixing: Tensor) -> torch.nn.Linear:
    """`W'[a] = sum_c mixing[c, a] W[c]`, and the bias alike."""
    weight, bias = projection.weight, projection.bias
    components, heads = mixing.shape
    size = projection.out_features // components
    found = _linear_like(projection, heads * size)
    with torch.no_grad():
        for to, given in ((found.weight, weight), (found.bias, bias)):
            if given is not None:
                exact = given.double().unflatten(0, (components, size))
                to.copy_(mix_heads(exact, mixing, dim=0).flatten(0, 1))
    return found


def _linear_like(projection: torch.nn.Linear, features: int) -> torch.nn.Linear:
    """A projection to other features, with a bias, device and dtype as the one given."""
    weight = projection.weight
    return torch.nn.Linear(
        projection.in_features,
        features,
        bias=projection.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
