"""Registration of band models with SGLang, by its entry point `sglang.srt.plugins`.

SGLang calls `register` in each of its processes, before it reads its settings or a model folder. It
logs an error there and carries on; a folder with bands then has no model class, and SGLang stops.
Nothing of SGLang's models is imported until a band model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from packaging.version import Version

from ..hf.config import NAME
from .checks import (
    BACKEND,
    SGLANG_FAMILIES,
    check_architectures,
    check_cache_dtype,
    check_ranks,
)

MODELS = "spattention.serving.sglang_models"
# SGLang changes the interfaces that this library implements from one release to the next.
OLDEST, BEFORE = "0.5.23", "0.5.24"
# Settings that must keep their default: attention would be wrong, or was never tried.
REFUSED = {
    "speculative_algorithm": None,
    "enable_hierarchical_cache": False,
    "enable_hisparse": False,
    "enable_lmcache": False,
    "enable_flexkv": False,
    "enable_unified_memory": False,
    "enable_unified_cache_external_linker": False,
    "enable_kv_cache_sharding": False,
    "disaggregation_mode": "null",
    "disaggregation_decode_enable_offload_kvcache": False,
    "enable_pdmux": False,
    "enable_two_batch_overlap": False,
    "enable_dp_attention": False,
    "attn_dp_size": 1,
    "dcp_size": 1,
    "attn_cp_size": 1,
    "dllm_algorithm": None,
}


def register() -> None:
    """Make band models known to SGLang, for this process. Calling it again does nothing.

    A folder with bands that SGLang would otherwise run without them is refused at start-up.
    """
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.arg_groups.model_override_base import register_model_override_predicate
    from sglang.srt.layers.attention.attention_registry import (
        ATTENTION_BACKENDS,
        register_attention_backend,
    )
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if BACKEND in ATTENTION_BACKENDS:
        return
    register_attention_backend(BACKEND)(_create_backend)
    add_attention_backend_choices([BACKEND])
    register_model_override_predicate(lambda architecture: True)(choose_backend)
    HookRegistry.register(
        "sglang.srt.model_loader.utils.get_model_architecture", find_model, HookType.AROUND
    )


def _create_backend(model_runner: Any) -> Any:
    from .sglang_backend import create

    return create(model_runner)


def choose_backend(server_args: Any, hf_config: Any) -> dict[str, Any]:
    """The settings that SGLang takes over for a model: this library's back end where it has bands.

    Raises:
        ValueError: if SGLang would run a model with bands without them, or with settings that are
            not supported.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view

    settings = resolving_view(server_args)
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    # The user's, since SGLang has filled in those of some devices by now.
    chosen = {name: getattr(server_args, name) for name in names}
    text_config = check_model(hf_config)
    if text_config is None:
        for name, given in chosen.items():
            if given == BACKEND:
                raise ValueError(
                    f"`{name}` must not be {BACKEND!r} for a model without bands, got "
                    f"{list(hf_config.architectures or [])}"
                )
        return {}
    for name, given in chosen.items():
        if given not in (None, BACKEND):
            raise ValueError(f"`{name}` must be {BACKEND!r} for a model with bands, got {given!r}")
    check_settings(settings, text_config)
    return {"attention_backend": BACKEND}


def check_model(hf_config: Any) -> Any:
    """The text config of a folder with bands, None for other models; raises `ValueError` for a
    folder that cannot be served.
    """
    # Not `get_text_config`, which refuses some of the models that SGLang serves without this.
    parts = [hf_config, *vars(hf_config).values()]
    banded = next((part for part in parts if getattr(part, NAME, None) is not None), None)
    architectures = list(hf_config.architectures or [])
    holder = hf_config if banded is None else banded
    check_architectures(holder, architectures, SGLANG_FAMILIES)
    return banded


def check_settings(settings: Any, text_config: Any) -> None:
    """SGLang's settings for a band model; raises `ValueError` for those that are not supported."""
    import sglang

    if not Version(OLDEST) <= Version(sglang.__version__) < Version(BEFORE):
        raise ValueError(
            f"SGLang must be at least {OLDEST} and below {BEFORE} for spattention, got "
            f"{sglang.__version__}"
        )
    dtype = settings.kv_cache_dtype
    check_cache_dtype("bfloat16" if dtype == "bf16" else dtype)
    heads, kv_heads = text_config.num_attention_heads, text_config.num_key_value_heads
    check_ranks(heads, kv_heads, settings.tp_size)
    for name, wanted in REFUSED.items():
        given = getattr(settings, name)
        if given != wanted:
            raise ValueError(f"`{name}` must be {wanted!r} for spattention, got {given!r}")
    if settings.model_impl not in ("auto", "sglang"):
        raise ValueError(
            f"`model_impl` must be 'auto' or 'sglang' for spattention, got {settings.model_impl!r}"
        )
    graphs = settings.cuda_graph_config
    if graphs is not None and graphs.prefill.backend not in ("breakable", "disabled"):
        raise ValueError(
            "`cuda_graph_backend_prefill` must be 'breakable' or 'disabled' for spattention, got "
            f"{graphs.prefill.backend!r}"
        )


def find_model(original: Callable[[Any], Any], model_config: Any) -> Any:
    """Hook around SGLang's choice of a model class: the classes of band models are registered where
    one is built, and nothing else may build it.
    """
    if check_model(model_config.hf_config) is None:
        return original(model_config)
    from sglang.srt.models.registry import ModelRegistry

    architecture = model_config.hf_config.architectures[0]
    if not ModelRegistry.is_arch_supported(architecture):
        ModelRegistry.register(MODELS, strict=True)
    model_class, name = original(model_config)
    if name != architecture:
        raise ValueError(
            f"`architectures` {architecture} must be built by spattention, got {name} from SGLang"
        )
    return model_class, name
