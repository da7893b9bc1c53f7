"""Open the folder of a saved model: find it, check its files, load config, weights and tokenizer.

A folder may come from a stranger. None of its code is run, nothing is looked up on the hub, and
sizes are compared with the files before memory is taken. Libraries raise exceptions of many types
for a damaged file; here each becomes a `ValueError` that names the file.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)

from . import baselines, hf, related
from .compat.huggingface import ATTENTION_KEYS
from .files import read_json, reason
from .hf.adapter_files import refuse_adapter
from .hf.config import NAME as BANDS
from .hf.config import read_section, remove_section
from .hf.weights import is_mark
from .training.checkpoints import MANIFEST, DamagedCheckpoint, check, newest_good

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the order in which Transformers looks
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
COUNTS = ("n_layer", "n_layers", "n_head", "n_heads", "n_routed_experts")  # beside `num_*`
MOST = 2**16  # layers, heads, experts or labels
LONGEST_CHUNK = 2**31 - 1  # tokens
LARGEST_JSON = 2**28  # bytes; the largest tokenizers have some 30 MB
LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


@dataclass(frozen=True)
class Weights:
    """The weights of a saved model, without their values and without marks: the files that hold
    them, and the numbers of tensors and of values."""

    files: tuple[Path, ...]
    tensors: int
    elements: int


def model_folder(path: Path) -> Path:
    """Find the folder of a saved model; newer checkpoints that are damaged are named on standard
    error.

    Args:
        path: that folder; the folder of a training run, for its newest whole checkpoint; or the
            folder of a comparison, for the model that it names.

    Raises:
        ValueError: if there is no such model, or a checkpoint differs from its manifest.
    """
    if not path.is_dir():
        raise ValueError(f"{path} must be the folder of a saved model, there is no such folder")
    if (path / CONFIG).is_file():
        if (path / MANIFEST).is_file():
            _check_manifest(path)
        return path
    if (path / "run.json").is_file():
        found, problems = newest_good(path)
        if found is None:
            told = "; ".join(problems) or "it has none"
            raise ValueError(f"{path} must hold a whole checkpoint: {told}")
        for problem in problems:
            _warn(f"damaged checkpoint: {problem}; {found} is taken instead")
        return found
    if (path / "results.json").is_file():
        return _of_comparison(path)
    refuse_adapter(path)
    raise ValueError(
        f"{path} must hold a saved model ({CONFIG}), a training run (run.json) or a comparison "
        "(results.json), it has none of them"
    )


def open_config(folder: Path) -> Any:
    """The config of a saved model, with its values checked."""
    hf.register()
    baselines.register()
    related.register()
    refuse_adapter(folder)
    file = folder / CONFIG
    content = read_json(file, LARGEST_JSON)
    if (folder / GENERATION).exists():  # Transformers passes over a damaged one in silence
        read_json(folder / GENERATION, LARGEST_JSON)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = " and `auto_map`; a folder's own code is never run" if content.get("auto_map") else ""
        raise ValueError(
            f"{file} must have a `model_type` that Transformers knows, got {kind!r}{own}"
        )
    _check_counts(file, content)
    _check_attention(file, content)
    with named_errors(file, "must be a config of Transformers"):
        config = AutoConfig.from_pretrained(folder, **LOCAL)
        text = config.get_text_config()
        if not isinstance(text, PreTrainedConfig):
            raise TypeError(f"`text_config` must be an object, got {type(text).__name__}")
        read_section(text)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{file} must describe a decoder alone, got an encoder and a decoder")
    _check_sizes(file, text)
    if (folder / GENERATION).exists():
        with named_errors(folder / GENERATION, "must be a generation config of Transformers"):
            GenerationConfig.from_pretrained(folder, **LOCAL)
    for each in (config, text):  # as the commands read results, whatever the folder says
        each.return_dict, each.output_hidden_states = True, False
    return config


def open_weights(folder: Path) -> Weights:
    """Read which tensors a saved model has; raises ValueError for a file that is not whole."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            files: tuple[Path, ...] = (folder / name,)
            break
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = _indexed(index)
            break
    else:
        raise ValueError(f"{folder} must hold weights ({' or '.join(WEIGHTS)}), it has none")
    sizes = [size for path in files for size in _tensor_sizes(path)]
    return Weights(files, len(sizes), sum(sizes))


def model_digest(folder: Path) -> str:
    """SHA-256 of a model's config and weights, in hexadecimal: it tells saved models apart."""
    open_config(folder)
    found = hashlib.sha256()
    for path in (folder / CONFIG, *open_weights(folder).files):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def open_model(folder: Path, *, dtype: torch.dtype | None = None, dense: bool = False) -> Any:
    """Load a saved causal language model for evaluation, on the GPU if there is one.

    Args:
        folder: as `model_folder` returned it.
        dtype: of the weights; None for the dtype that the config names.
        dense: load it without its bands and their sinks, with PyTorch's dense attention in every
            layer that has no other attention of its own.

    Raises:
        ValueError: if a file is damaged or missing, or config and weights do not match.
    """
    config, weights = open_config(folder), open_weights(folder)
    file = folder / CONFIG
    if dense:
        remove_section(config)
    options: dict[str, Any] = {"attn_implementation": "sdpa"} if dense else {}
    _check_built(file, config, weights)
    if dtype is not None:
        options["dtype"] = dtype
    rule = f"must hold the weights of the model that {file} describes"
    with named_errors(weights.files[0], rule):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **LOCAL,
            **options,
        )
    _check_loaded(weights.files[0], rule, model, found, dense)
    _only_tokens(model, file)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer that is saved with a model."""
    open_config(folder)  # which the tokenizer's class may depend on
    present = {
        name: read_json(folder / name, LARGEST_JSON)
        for name in TOKENIZER
        if (folder / name).exists()
    }
    own = [folder / name for name, content in present.items() if "auto_map" in content]
    rule = "must hold a tokenizer"
    if TOKENIZER[0] in present:
        with named_errors(folder / TOKENIZER[0], rule):
            Tokenizer.from_file(str(folder / TOKENIZER[0]))
    # The first is whole: what remains is said by the others.
    file = folder / next((name for name in TOKENIZER[1:] if name in present), "")
    if own:
        file, rule = own[0], "must name a tokenizer of Transformers; a folder's code is never run"
    with named_errors(file, rule):
        found = AutoTokenizer.from_pretrained(folder, **LOCAL)
        words = len(found) - len(found.all_special_tokens)
        found.decode(found("a")["input_ids"])  # some damage is seen at the first text
    if words <= 0:
        # Without files Transformers makes an empty one of the model's family.
        raise ValueError(f"{folder} must hold a tokenizer, got none with words")
    return found


@contextmanager
def named_errors(file: Path, rule: str) -> Iterator[None]:
    """Turn any exception inside into a ValueError of one line that names a file and its rule."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the libraries' Rust code is no `Exception`
        raise ValueError(f"{file} {rule}: {reason(error)}") from error


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_manifest(folder: Path) -> None:
    """Compare a checkpoint with its manifest; damage that can be described better comes first."""
    try:
        check(folder)
    except DamagedCheckpoint as error:
        open_config(folder)
        open_weights(folder)
        raise ValueError(
            f"{error}; if it was changed on purpose, remove {folder / MANIFEST}"
        ) from error


def _of_comparison(folder: Path) -> Path:
    file = folder / "results.json"
    named = read_json(file, LARGEST_JSON).get("model")
    inside = isinstance(named, str) and (folder / named).resolve().is_relative_to(folder.resolve())
    if not named or not inside or not (folder / named / CONFIG).is_file():
        raise ValueError(
            f"{file} must name the folder of a saved model in {folder} as `model`, got {named!r}"
        )
    return folder / named


def _check_counts(file: Path, content: Any) -> None:
    """Check the counts in a config, of which Transformers makes lists as soon as it reads them."""
    for name, value in content.items() if isinstance(content, Mapping) else ():
        _check_counts(file, value)
        if (name.startswith("num_") or name in COUNTS) and type(value) is int and value > MOST:
            raise ValueError(f"{file}: `{name}` must be at most {MOST:,}, got {value}")


def _check_attention(file: Path, content: Mapping[str, Any]) -> None:
    """Refuse attention from the hub, and bands or another attention without their section."""
    named = content.get("attn_implementation")
    sections = (BANDS, *(kind.kind for kind in (*baselines.KINDS, *related.KINDS)))
    if named in sections and content.get(named) is None:
        raise ValueError(
            f"{file} must have the section `{named}`, as `attn_implementation` names it; got none"
        )
    for name in ATTENTION_KEYS:
        value = content.get(name)
        for each in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(each, str) and "/" in each:
                raise ValueError(
                    f"{file} must name attention that is installed as `{name}`, got {each!r}: code "
                    "from the hub is never run"
                )


def _check_sizes(file: Path, text: Any) -> None:
    """Check the numbers of a text config that memory and text lengths depend on."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        value = getattr(text, name, 1)  # models without attention have no heads
        if type(value) is not int or value < 1:
            raise ValueError(f"{file}: `{name}` must be a positive integer, got {value!r}")
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk is not None and (type(chunk) is not int or not 1 <= chunk <= LONGEST_CHUNK):
        raise ValueError(
            f"{file}: `attention_chunk_size` must be an integer from 1 to {LONGEST_CHUNK:,}, got "
            f"{chunk!r}"
        )
    longest = getattr(text, "max_position_embeddings", None)
    if longest is None:  # some models have no longest text
        return
    if type(longest) is not int or longest < 1:
        raise ValueError(
            f"{file}: `max_position_embeddings` must be a positive integer, got {longest!r}"
        )
    section = read_section(text)
    for pattern in () if section is None else section.layer_patterns:
        if pattern is not None and pattern.span > longest:
            raise ValueError(
                f"{file}: every `span` of `spattention` must be at most `max_position_embeddings` "
                f"= {longest}, got {pattern.span}"
            )


def _check_built(file: Path, config: Any, weights: Weights) -> None:
    """Build the model without memory, and compare its size with the weights' files."""
    layers = config.get_text_config().num_hidden_layers
    if layers > weights.tensors:  # before the modules of every layer are made
        raise ValueError(
            f"{file}: `num_hidden_layers` must be at most the {weights.tensors} tensors of "
            f"{weights.files[0]}, got {layers}"
        )
    with named_errors(file, "must describe a causal language model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    count = sum(parameter.numel() for parameter in model.parameters())
    quantized = getattr(config, "quantization_config", None) is not None  # several values in one
    if count > weights.elements and not quantized:
        raise ValueError(
            f"{file} must describe the model in {weights.files[0]}, which has {weights.elements:,} "
            f"parameters, got one of {count:,}"
        )


def _check_loaded(
    weights: Path, rule: str, model: Any, found: Mapping[str, Any], dense: bool
) -> None:
    """Check that every weight came from the files; Transformers would only warn, and draw it."""
    if mismatched := found["mismatched_keys"]:
        name, saved, wanted = min(mismatched)
        raise ValueError(
            f"{weights} {rule}: {name} must have the shape {list(wanted)}, got {list(saved)}"
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{weights} {rule}: {len(missing)} are missing, {_some(missing)}")
    unused = sorted(found["unexpected_keys"])
    if dense:
        unused = [name for name in unused if not (name.endswith(".sinks") or is_mark(name))]
    if marks := [name for name in unused if is_mark(name)]:
        raise ValueError(
            f"{weights} {rule}: they were trained with another attention, as {_some(marks)} says, "
            f"and {CONFIG} names none"
        )
    if unused:
        _warn(f"{weights.parent} has {len(unused)} weights of no use: {_some(unused)}")
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            raise ValueError(f"{weights.parent} must hold finite weights, {name} has NaN or inf")


def _is_finite(values: torch.Tensor) -> bool:
    if not values.is_floating_point() or not values.numel():
        return True
    values = values.float() if values.element_size() == 1 else values  # float8 has no `aminmax`
    return all(bool(bound.isfinite()) for bound in values.aminmax())


def _only_tokens(model: Any, file: Path) -> None:
    """Keep of a folder's generation config the special tokens alone: options say the rest."""
    kept = {}
    entries = model.config.get_text_config().vocab_size
    for name in TOKENS:
        value = getattr(model.generation_config, name, None)
        several = value if isinstance(value, list) and name == "eos_token_id" else [value]
        for each in several if value is not None else ():
            if type(each) is not int or not -1 <= each < entries:
                raise ValueError(
                    f"`{name}` in {file.with_name(GENERATION)} or {file} must be a token below the "
                    f"{entries} of the model, got {each!r}"
                )
        kept[name] = value
    model.generation_config = GenerationConfig(**kept)


def _indexed(index: Path) -> tuple[Path, ...]:
    """The files that an index of weights names, all of them in its folder."""
    named = read_json(index, LARGEST_JSON).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{index} must have a `weight_map`, got {type(named).__name__}")
    files = []
    for name in sorted({str(value) for value in named.values()}):
        path = index.parent / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{index} must name files in its folder, got {name!r}")
        files.append(path)
    return tuple(files)


def _tensor_sizes(path: Path) -> list[int]:
    """The number of values of each tensor in a file but marks; the values are not read."""
    if path.suffix == ".safetensors":
        with (
            named_errors(path, "must be a whole file of safetensors"),
            safe_open(path, "pt") as file,
        ):
            names = [name for name in file.keys() if not is_mark(name)]  # noqa: SIM118
            return [math.prod(file.get_slice(name).get_shape()) for name in names]
    try:
        # Nothing but tensors is unpickled, and on the meta device they take no memory.
        found = torch.load(path, map_location="meta", weights_only=True)
        return [tensor.numel() for name, tensor in found.items() if not is_mark(name)]
    except Exception as error:  # PyTorch's message advises to unpickle whatever is there
        raise ValueError(
            f"{path} must hold tensors by name, as `torch.save` writes them, and nothing else"
        ) from error
