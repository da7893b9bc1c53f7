"""Registration of band models with vLLM, by its entry point `vllm.general_plugins`.

vLLM calls `register` in each of its processes, before it reads a model folder. Nothing of vLLM's
models is imported until a band model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from packaging.version import Version

from ..hf.section import ARCHITECTURE_PREFIX
from .checks import FAMILIES, check_architectures, check_cache_dtype, check_ranks

MODELS = "spattention.serving.vllm_models"
# vLLM changes the interfaces that this library implements from one release to the next.
OLDEST, BEFORE = "0.32", "0.34"


def register() -> None:
    """Make band models known to vLLM, for this process. Calling it again does nothing.

    A folder with bands that vLLM would otherwise run without them is refused at start-up.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    names = [ARCHITECTURE_PREFIX + family for family in FAMILIES]
    if names[0] in MODELS_CONFIG_MAP:
        return
    for name in names:
        ModelRegistry.register_model(name, f"{MODELS}:{name}")
        MODELS_CONFIG_MAP[name] = _band_model_config()
    # vLLM has no hook for folders that name a stock architecture, and would run them dense.
    ModelRegistry.inspect_model_cls = _checking(ModelRegistry.inspect_model_cls)


def check_settings(vllm_config: Any) -> None:
    """vLLM's settings for a band model; raises `ValueError` for those that are not supported."""
    import vllm

    if not Version(OLDEST) <= Version(vllm.__version__) < Version(BEFORE):
        raise ValueError(
            f"vLLM must be at least {OLDEST} and below {BEFORE} for spattention, got "
            f"{vllm.__version__}"
        )
    config = vllm_config.model_config.hf_text_config
    parallel = vllm_config.parallel_config
    check_cache_dtype(vllm_config.cache_config.cache_dtype, vllm_config.model_config.dtype)
    check_ranks(
        config.num_attention_heads, config.num_key_value_heads, parallel.tensor_parallel_size
    )
    for name, given in (
        ("decode_context_parallel_size", parallel.decode_context_parallel_size),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size),
    ):
        if given != 1:
            raise ValueError(f"`{name}` must be 1 for spattention, got {given}")
    for name, given in (
        ("speculative_config", vllm_config.speculative_config),
        ("kv_transfer_config", vllm_config.kv_transfer_config),
    ):
        if given is not None:
            raise ValueError(f"`{name}` must be None for spattention, got {type(given).__name__}")
    # vLLM makes a `kv_transfer_config` of it, after these checks.
    offloaded = vllm_config.cache_config.kv_offloading_size
    if offloaded is not None:
        raise ValueError(f"`kv_offloading_size` must be None for spattention, got {offloaded}")


def _band_model_config() -> Any:
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class BandModelConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            check_settings(vllm_config)

    return BandModelConfig


def _checking(inspect: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(inspect)
    def checked(architectures: str | list[str], model_config: Any) -> Any:
        names = [architectures] if isinstance(architectures, str) else list(architectures)
        check_architectures(model_config.hf_text_config, names)
        impl = str(getattr(model_config.model_impl, "value", model_config.model_impl))
        if names[0].startswith(ARCHITECTURE_PREFIX) and impl not in ("auto", "vllm"):
            raise ValueError(f"`model_impl` must be 'auto' or 'vllm' for spattention, got {impl!r}")
        return inspect(architectures, model_config)

    return checked
