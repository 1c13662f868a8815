"""Embedding tables and output heads that transformers quantizes with the rest of a model, where that is asked for.

It is asked for by ``BitsAndBytesConfig(..., quantize_embeddings=True)``, by setting that attribute on a config, or by
``HALFBYTE_QUANTIZE_EMBEDDINGS=1``. A checkpoint that was saved so is recognised by its keys.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from safetensors import safe_open

from halfbyte import _env
from halfbyte.errors import UnsupportedError
from halfbyte.functional import dequantize_4bit, int8_vectorwise_dequant
from halfbyte.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt
from halfbyte.nn.embedding_kinds import why_not

__all__ = ["OPTION", "extend", "extend_config", "extend_models"]

OPTION = "quantize_embeddings"
"""Keyword and attribute of BitsAndBytesConfig."""

logger = logging.getLogger("halfbyte")


def extend_config(config_class: Any) -> None:
    """Give BitsAndBytesConfig the keyword :data:`OPTION`; transformers would drop it as unknown."""
    initialise, to_diff_dict = config_class.__init__, config_class.to_diff_dict

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - takes the place of one
        wanted = kwargs.pop(OPTION, False)
        initialise(self, *args, **kwargs)
        if wanted:  # a config without it is saved as it always was
            vars(self)[OPTION] = True

    def to_diff_dict_without(self: Any) -> dict[str, Any]:
        plain = copy.copy(self)
        wanted = vars(plain).pop(OPTION, False)
        return to_diff_dict(plain) | ({OPTION: True} if wanted else {})

    __init__.__wrapped__ = initialise  # pyright: ignore[reportFunctionMemberAccess]
    config_class.__init__, config_class.to_diff_dict = __init__, to_diff_dict_without


def extend(quantizer: Any) -> None:
    """Teach one of transformers' two bitsandbytes quantizers to load, save and dequantize tables and heads."""
    before, needs = quantizer._process_model_before_weight_loading, quantizer.param_needs_quantization
    after, dequantize = quantizer._process_model_after_weight_loading, quantizer._dequantize
    plain_state = quantizer.get_state_dict_and_metadata

    def _process_model_before_weight_loading(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = before(self, model, *args, **kwargs)
        for name in _to_convert(self, model, kwargs.get("checkpoint_files")):
            _convert(self, model, name)
        return found

    def param_needs_quantization(self: Any, model: Any, param_name: str, **kwargs: Any) -> bool:
        owner, _, own = param_name.rpartition(".")
        is_table = own == "weight" and isinstance(model.get_submodule(owner), (Embedding4bit, Embedding8bit))
        return is_table or needs(self, model, param_name, **kwargs)

    def _process_model_after_weight_loading(self: Any, model: Any, **kwargs: Any) -> Any:
        _share_states(model)
        _initialise_buffers(model)
        return after(self, model, **kwargs)

    def get_state_dict_and_metadata(self: Any, model: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        doubled = _statistics_of_tied(model)
        if not doubled:
            return plain_state(self, model)
        return {key: value for key, value in model.state_dict().items() if key not in doubled}, {}

    def _dequantize(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        return _dequantize_tables(dequantize(self, model, *args, **kwargs), kwargs.get("dtype", args and args[0]))

    for replacement in (
        _process_model_before_weight_loading,
        param_needs_quantization,
        _process_model_after_weight_loading,
        get_state_dict_and_metadata,
        _dequantize,
    ):
        setattr(quantizer, replacement.__name__, replacement)


def extend_models() -> None:
    """Make ``resize_token_embeddings`` of transformers' models say what it cannot do, where a table is quantized."""
    model_class: Any = sys.modules["transformers.modeling_utils"].PreTrainedModel
    resize = model_class.resize_token_embeddings

    def resize_token_embeddings(self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        table = self.get_input_embeddings()
        if not isinstance(table, (Embedding4bit, Embedding8bit)) or new_num_tokens is None:
            return resize(self, new_num_tokens, *args, **kwargs)
        if new_num_tokens == table.num_embeddings:
            return table
        raise UnsupportedError(
            f"a quantized table of {table.num_embeddings} rows cannot become one of {new_num_tokens}",
            expected="a table in 16 or 32 bits",
            hint="resize and save the model before it is quantized, or load it without quantize_embeddings",
        )

    model_class.resize_token_embeddings = resize_token_embeddings


def _to_convert(quantizer: Any, model: Any, files: Iterable[str] | None) -> list[str]:
    """Names of the tables and heads to quantize."""
    config = quantizer.quantization_config
    names = list(_candidates(model, getattr(config, "llm_int8_skip_modules", None) or ()))
    if quantizer.pre_quantized and files:
        suffix = ".SCB" if config.load_in_8bit else ".weight.absmax"
        saved = {key.removesuffix(suffix) for key in _keys(files) if key.endswith(suffix)}
        quantized = [name for name in names if any(one == name or name.endswith(f".{one}") for one in _bare(saved))]
        # A tied head has no keys of its own: it goes with its table.
        ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        tied = {target.removesuffix(".weight"): source.removesuffix(".weight") for target, source in ties.items()}
        return [name for name in names if name in quantized or tied.get(name) in quantized]
    asked = bool(getattr(config, OPTION, False) or _env.get("HALFBYTE_QUANTIZE_EMBEDDINGS"))
    return names if asked else []


def _bare(names: set[str]) -> set[str]:
    """The names, and those without what stands before the first dot: a base model's checkpoint has no prefix."""
    return names | {name.partition(".")[2] for name in names if "." in name}


def _candidates(model: Any, skipped: Iterable[str]) -> Iterator[str]:
    """Embedding layers as long as the vocabulary, and the output head, unless they are to be skipped."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = getattr(table, "num_embeddings", 0)
    for name, module in model.named_modules():
        if any(name == skip or name.endswith(f".{skip}") for skip in skipped):
            continue
        if isinstance(module, torch.nn.Embedding) and rows and module.num_embeddings >= rows:
            reason = why_not(type(module)) or ("it has max_norm" if module.max_norm is not None else None)
            if reason is None:
                yield name
            else:
                logger.warning("%s stays as it is: %s", name, reason)
        elif module is head and type(module) is torch.nn.Linear:
            yield name


def _keys(files: Iterable[str]) -> Iterator[str]:
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                yield from opened.keys()


def _convert(quantizer: Any, model: Any, name: str) -> None:
    """Put the quantized layer in place, still on the meta device."""
    config, module = quantizer.quantization_config, model.get_submodule(name)
    layer: Any
    with torch.device("meta"):
        if config.load_in_8bit:
            layer = _layer_8bit(config, module)
        elif isinstance(module, torch.nn.Embedding):
            layer = Embedding4bit.from_embedding(
                module, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_storage
            )
        else:
            layer = Linear4bit(
                module.in_features,
                module.out_features,
                module.bias is not None,
                config.bnb_4bit_compute_dtype,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
                quant_storage=config.bnb_4bit_quant_storage,
            )
        if quantizer.pre_quantized:
            # The loader casts what it reads to the dtype that stands here.
            stored = torch.int8 if config.load_in_8bit else config.bnb_4bit_quant_storage
            layer.weight.data = layer.weight.data.to(stored)
    layer.source_cls = type(module)
    model.set_submodule(name, layer.requires_grad_(False))


def _layer_8bit(config: Any, module: Any) -> Any:
    if isinstance(module, torch.nn.Embedding):
        return Embedding8bit.from_embedding(module)
    return Linear8bitLt(
        module.in_features,
        module.out_features,
        module.bias is not None,
        has_fp16_weights=config.llm_int8_has_fp16_weight,
        threshold=config.llm_int8_threshold,
    )


def _share_states(model: Any) -> None:
    """A head that is tied has its table's parameter by now, with whose state it computes."""
    for layer in model.modules():
        if isinstance(layer, Linear4bit) and getattr(layer.weight, "quant_state", None) is not None:
            layer.quant_state = layer.weight.quant_state


def _initialise_buffers(model: Any) -> None:
    """Values that no checkpoint holds, such as Gemma's scale: transformers takes a layer with a quantized weight for
    initialised as a whole."""
    waiting = [layer for layer in model.modules() if hasattr(layer, "plain") and list(layer.buffers())]
    for layer in waiting:
        layer._is_hf_initialized = False
    if waiting:
        model.initialize_weights()


def _dequantize_tables(model: Any, dtype: torch.dtype | None) -> Any:
    tables = {name: layer for name, layer in model.named_modules() if isinstance(layer, (Embedding4bit, Embedding8bit))}
    for name, table in tables.items():
        model.set_submodule(name, _plain(table, dtype))
    if tables:
        model.tie_weights()
    return model


def _statistics_of_tied(model: Any) -> set[str]:
    """Keys that describe a weight a second time, since two layers hold it: safetensors keeps one of them only."""
    doubled: set[str] = set()
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    named = model.named_modules(remove_duplicate=False)
    layers = {name: layer for name, layer in named if isinstance(layer, (Embedding4bit, Embedding8bit))}
    seen = {id(layer.weight) for layer in layers.values()}
    for name, layer in model.named_modules():
        is_head = isinstance(layer, (Linear4bit, Linear8bitLt)) and f"{name}.weight" in ties
        if is_head and id(layer.weight) in seen:
            state: dict[str, Any] = {}
            layer._save_to_state_dict(state, f"{name}.", True)  # pyright: ignore[reportPrivateUsage]
            doubled |= set(state) - {f"{name}.weight", f"{name}.bias"}
    return doubled


def _plain(table: Any, dtype: torch.dtype | None) -> torch.nn.Embedding:
    """The layer that a quantized one was made from, with the values it looks up."""
    if isinstance(table, Embedding8bit):
        values = int8_vectorwise_dequant(table.weight.data, table.weight.SCB)
    else:
        values = dequantize_4bit(table.weight.data, table.weight.quant_state)
    kind = getattr(table, "plain", torch.nn.Embedding)
    layer: Any = kind.__new__(kind)
    own = {"dtype", "quant_state", "quant_storage", "source_cls"}
    vars(layer).update({name: value for name, value in vars(table).items() if name not in own})
    layer._parameters = {"weight": torch.nn.Parameter(values.to(dtype or table.dtype), requires_grad=False)}
    return layer
