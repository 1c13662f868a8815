"""The adapter: peft's own layers around a model without values, which merge one weight at a time."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from halfbyte.errors import CheckpointError, UnsupportedError

__all__ = ["Adapter", "Skeleton"]

_PREFIX = "base_model.model."
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of LoRA that take their factors off the base weight."""


class Skeleton:
    """The base model's modules on the meta device, and which of them transformers would quantize.

    Args:
        folder: The base model.
        quantization: Its quantization_config, or an empty one.

    Raises:
        CheckpointError: config.json names no model that transformers has.
    """

    def __init__(self, folder: Path, quantization: dict[str, Any]) -> None:
        config = transformers.AutoConfig.from_pretrained(folder)
        vars(config).pop("quantization_config", None)
        kind = getattr(transformers, str((config.architectures or [None])[0]), None)
        if kind is None:
            raise CheckpointError(
                f"config.json of {folder} names the architecture {config.architectures}",
                expected="a class of the installed transformers",
                hint="models with code of their own cannot be merged by this command; use peft's merge_and_unload",
            )
        with torch.device("meta"):
            self.model: Any = kind(config)
        asked = quantization.get("llm_int8_skip_modules")
        skips = list(asked) if asked is not None else get_keys_to_not_convert(self.model)
        kept = getattr(self.model, "_keep_in_fp32_modules", None)
        self._skips = [*skips, *(kept or ())]
        self._quantizable = {
            name: type(module)
            for name, module in self.model.named_modules()
            if type(module) in (torch.nn.Linear, Conv1D) and should_convert_module(name, self._skips)
        }

    def quantizable(self, weight: str) -> bool:
        """Whether transformers quantizes this weight."""
        owner, _, last = weight.rpartition(".")
        return last == "weight" and owner in self._quantizable

    def is_transposed(self, weight: str) -> bool:
        """Whether the model keeps this weight as (in, out), which is quantized as (out, in)."""
        return self._quantizable.get(weight.rpartition(".")[0]) is Conv1D


class Adapter:
    """An adapter's folder on the modules of its base model.

    Args:
        folder: As peft's ``save_pretrained`` writes it.
        model: The base model on the meta device; its layers get peft's around them.

    Attributes:
        layers: Path of each module that is changed -> peft's layer.
        replaced: Weights of the base model that the adapter brings along: trained whole, or biases.

    Raises:
        CheckpointError: No adapter, or one of another model.
        UnsupportedError: A method that has nothing to merge.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder = folder
        config = _config(folder)
        self._origin = f"the model it was trained on ({config.base_model_name_or_path or 'not recorded'})"
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        _give_shapes(model)
        own = copy.copy(config)
        # Modules that were trained whole need no layers of peft: their weights are taken as they are.
        own.inference_mode, own.modules_to_save, own.task_type = True, None, None
        try:
            self.model: Any = peft.get_peft_model(model, own)
            weights = peft.load_peft_weights(str(folder), device="cpu")
            whole = {key: _plain(key) for key in weights}
            self.replaced = {name: weights[key] for key, name in whole.items() if name in names}
            weights = {key: value for key, value in weights.items() if whole[key] not in names}
            result: Any = peft.set_peft_model_state_dict(self.model, dict(weights))
            expected = peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)
        except (ValueError, RuntimeError, KeyError, OSError, SafetensorError) as error:
            lines = [line.strip() for line in str(error).strip().splitlines()]
            raise CheckpointError(
                f"the adapter {folder} does not fit the base model: {' '.join(lines[:2])}", expected=self._origin
            ) from error
        absent = sorted(key for key in set(expected) - set(weights) if _plain(key) not in names)
        self._check_keys(sorted(getattr(result, "unexpected_keys", ())), absent)
        self.layers = {
            name.removeprefix(_PREFIX): _mergeable(name.removeprefix(_PREFIX), module)
            for name, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer) and name.startswith(_PREFIX)
        }

    def _check_keys(self, foreign: list[str], absent: list[str]) -> None:
        if foreign:
            raise CheckpointError(
                f"the adapter {self.folder} has {len(foreign)} weights that the base model has no place for, first "
                f"{foreign[0].removeprefix(_PREFIX)}",
                expected=self._origin,
            )
        if absent:
            raise CheckpointError(
                f"the adapter {self.folder} lacks {absent[0].removeprefix(_PREFIX)}",
                expected="every weight of each layer that adapter_config.json names",
                hint="it is incomplete, or was saved without its projections: save it again",
            )

    def merged(self, path: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a module with the adapter in them, in fp32.

        Raises:
            CheckpointError: Shapes that do not fit, or an adapter with NaN or inf.
            UnsupportedError: peft defines no merging for this method.
        """
        layer, base = self.layers[path], self.layers[path].get_base_layer()
        if base.weight.shape != weight.shape:
            raise CheckpointError(
                f"{path}.weight has shape {tuple(weight.shape)}", expected=f"{tuple(base.weight.shape)}, by config.json"
            )
        before = base.weight, getattr(base, "bias", None)
        base.weight = torch.nn.Parameter(weight.detach().to(torch.float32, copy=True), requires_grad=False)
        if bias is not None:
            base.bias = torch.nn.Parameter(bias.detach().to(torch.float32, copy=True), requires_grad=False)
        try:
            with torch.no_grad():
                layer.float().merge()
            sums = base.weight.detach()
            if not math.isfinite(float(sums.sum())):
                raise CheckpointError(
                    f"{path}: base and adapter add up to NaN or inf",
                    expected="finite values",
                    hint="one of them is damaged, or the adapter's training diverged",
                )
            return sums, None if bias is None else base.bias.detach()
        except NotImplementedError:
            raise UnsupportedError(
                f"peft defines no merging for {type(layer).__module__}.{type(layer).__name__}",
                hint="keep the adapter beside the base model",
            ) from None
        finally:
            base.weight = before[0]
            if bias is not None:
                base.bias = before[1]
            # What a method remembers for unmerging would keep every weight alive.
            vars(layer).pop("_caches", None)
            if getattr(layer, "_base_weight_before_merge", None) is not None:
                layer._base_weight_before_merge = None


def _plain(key: str) -> str:
    """The name that a parameter has without peft."""
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".")


def _give_shapes(model: Any) -> None:
    """Put parameters of the right shapes, all of one stored zero, in the place of those on the meta device.

    peft moves an adapter to where its base layer is, which must not be the meta device.
    """
    shaped: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in shaped:
                values = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                shaped[id(parameter)] = torch.nn.Parameter(values, requires_grad=False)
            setattr(module, name, shaped[id(parameter)])


def _mergeable(path: str, layer: Any) -> Any:
    if type(layer).__name__ == "ParamWrapper" or not hasattr(layer.get_base_layer(), "weight"):
        raise UnsupportedError(
            f"{path}: the adapter changes a parameter that is no layer's weight",
            hint="merge it with peft's merge_and_unload, on the dense model",
        )
    return layer


def _config(folder: Path) -> Any:
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"no adapter at {folder}",
            expected="a folder with adapter_config.json and adapter_model.safetensors",
            hint="the order is: halfbyte merge BASE ADAPTER OUT",
        )
    try:
        config: Any = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'} cannot be read ({error!r})",
            expected="an adapter of a method that the installed peft has",
            hint="pip install -U peft",
        ) from None
    if config.is_prompt_learning:
        raise UnsupportedError(
            f"{folder} is a {config.peft_type.value} adapter, which changes no weight",
            hint="only adapters of the LoRA family and their like can be merged",
        )
    start = str(getattr(config, "init_lora_weights", ""))
    if start.lower().startswith(_CHANGES_BASE):  # peft takes some in any case of letters
        raise UnsupportedError(
            f"{folder} was initialised by {start}, which changed the base weights as well",
            expected="an adapter of the weights as they are stored",
            hint="save it with path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it",
        )
    return config
