"""vLLM serves band models: `pip install 'spattention[vllm]' && vllm serve FOLDER`.

vLLM finds `register` by the entry point `vllm.general_plugins`; nobody has to call it.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("vllm") is None:
    raise ImportError("`spattention.vllm` needs vLLM: install `spattention[vllm]`")

from .serving.vllm_plugin import register

__all__ = ["register"]
