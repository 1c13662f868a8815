"""The merge itself: weight after weight from the base through the adapter to new files, which appear all at once."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError, CheckpointError
from halfbyte.integrations.merging.adapter import Adapter, Skeleton
from halfbyte.integrations.merging.base import CONFIG_NAME, Base
from halfbyte.integrations.merging.output import Format, ShardWriter, give_back
from halfbyte.integrations.merging.survival import LayerSurvival, Survival, measure

__all__ = ["REPORT_NAME", "merge"]

REPORT_NAME = "halfbyte_merge.json"
_COPIED = (".json", ".jinja", ".txt", ".model", ".md")


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    to: str | None = None,
    quant_type: str | None = None,
    double_quant: bool | None = None,
    shard_bytes: int = 2 * 2**30,
    progress: Callable[[int, int], None] | None = None,
) -> Survival:
    """Merge an adapter into a checkpoint on the CPU, with one file of the result in memory at a time.

    Args:
        base: Folder of the base model: dense, 4-bit or 8-bit.
        adapter: Folder of the adapter.
        out: Folder to make. It appears when everything is written.
        to: ``"4bit"``, ``"8bit"`` or ``"bf16"``; None stores as the base is stored.
        quant_type: ``"nf4"`` or ``"fp4"``; None takes the base's, or nf4.
        double_quant: Whether 4-bit scales are quantized; None takes the base's, or yes.
        shard_bytes: Greatest size of a file.
        progress: Called with the number of tensors done and their total.

    Returns:
        What became of every weight that the adapter changes; also in ``halfbyte_merge.json`` of the folder.

    Raises:
        CheckpointError: Folders that are none, do not fit each other, or are damaged. Nothing is left behind.
        ArgumentError: ``out`` exists, or a format that does not.
        UnsupportedError: An adapter that cannot be merged.
    """
    out = Path(out)
    if out.exists():
        raise ArgumentError(f"{out} exists", expected="a folder that does not", hint="remove it or name another")
    if not out.parent.is_dir():
        raise ArgumentError(f"no folder {out.parent}", expected="one in which the result can be made")
    job = _Job(Base(Path(base)), Path(adapter), to, quant_type, double_quant)
    fresh = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    fresh.mkdir()
    try:
        survival = job.run(fresh, shard_bytes, progress)
        fresh.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"{out} could not be written ({error})", hint="free space on the disk, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return survival


class _Job:
    def __init__(self, base: Base, adapter: Path, to: str | None, quant_type: str | None, double: bool | None) -> None:
        self.base = base
        self.format = Format.of(base.quantization, to, quant_type, double)
        self.same = base.bits is not None and self.format == Format.of(base.quantization, None, None, None)
        self.skeleton = Skeleton(base.folder, base.quantization)
        self.adapter = Adapter(adapter, self.skeleton.model)
        self.dtype: torch.dtype = getattr(
            torch, str(base.config.get("dtype") or base.config.get("torch_dtype") or "bfloat16")
        )
        self._check()

    def _check(self) -> None:
        present = set(self.base.names)
        for path in self.adapter.layers:
            if f"{path}.weight" not in present:
                raise CheckpointError(
                    f"the adapter changes {path}.weight, which {self.base.folder} does not have",
                    expected="a base model with every layer of the adapter",
                    hint="it is tied to another weight, or stored under another name: use peft's merge_and_unload",
                )
        tied = set(getattr(self.skeleton.model, "all_tied_weights_keys", {}).values())
        shared = sorted(tied & {f"{path}.weight" for path in self.adapter.layers})
        apart = sorted(set(self.adapter.replaced) - present)
        if shared or apart:
            raise CheckpointError(
                f"the adapter changes {(shared or apart)[0]}, which the base model ties to another weight",
                expected="an adapter that leaves tied weights alone",
                hint="untie them first: set tie_word_embeddings to false and save the model",
            )

    def run(self, folder: Path, shard_bytes: int, progress: Callable[[int, int], None] | None) -> Survival:
        writer, found = ShardWriter(folder, shard_bytes), list[LayerSurvival]()
        biases = {f"{path}.bias" for path in self.adapter.layers}
        names = [name for name in self.base.names if name not in biases]
        for done, name in enumerate(names):
            path = name.removesuffix(".weight")
            if name.endswith(".weight") and path in self.adapter.layers:
                tensors, survived = self._merged(path)
                found.append(survived)
                give_back()
            else:
                tensors = self._kept(name)
            writer.add(tensors)
            if progress is not None:
                progress(done + 1, len(names))
        writer.finish()
        survival = Survival(tuple(found), tuple(sorted(self.adapter.replaced)), self.format.label, writer.nbytes)
        self._write_rest(folder, survival)
        return survival

    def _quantized(self, name: str) -> bool:
        """Whether the result has codes for this weight."""
        return self.format.to != "bf16" and (self.base.is_quantized(name) or self.skeleton.quantizable(name))

    def _stored(self, name: str, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The result's tensors for a weight in the model's own orientation."""
        if self._quantized(name):
            return self.format.encode(
                name, weight.t().contiguous() if self.skeleton.is_transposed(name) else weight, dtype
            )
        return {name: weight.to(dtype)}

    def _read(self, name: str) -> Tensor:
        """Values in the model's own orientation."""
        value = self.base.value(name)
        return value.t() if self.base.is_quantized(name) and self.skeleton.is_transposed(name) else value

    def _dtype(self, value: Tensor, name: str) -> torch.dtype:
        if not value.is_floating_point():
            return value.dtype
        if self.format.to == "bf16":
            return torch.bfloat16
        return self.dtype if self.base.is_quantized(name) else value.dtype

    def _kept(self, name: str) -> dict[str, Tensor]:
        if name in self.adapter.replaced:
            value = self.adapter.replaced[name]
            return self._stored(name, value, self._dtype(value, name) if value.dtype != torch.float32 else self.dtype)
        if self.same and self.base.is_quantized(name):
            return self.base.stored(name)
        value = self._read(name)
        return self._stored(name, value, self._dtype(value, name))

    def _merged(self, path: str) -> tuple[dict[str, Tensor], LayerSurvival]:
        name, beside = f"{path}.weight", f"{path}.bias"
        replaced = self.adapter.replaced
        weight = replaced[name] if name in replaced else self._read(name)
        bias = replaced.get(beside, self.base.checkpoint.get(beside))
        dtype = self._dtype(weight, name)
        # Copies in fp32 are dropped as soon as they can be: they are what a merge needs beside one file.
        sums, bias_sums = self.adapter.merged(path, weight, bias)
        tensors = self._stored(name, sums, dtype)
        exact = weight.float()
        change = sums.sub_(exact)
        before = exact if self.same else self._values(name, self._stored(name, exact, dtype))
        survived = measure(name, before, self._values(name, tensors), change, exact)
        if bias is not None and bias_sums is not None:
            tensors[beside] = bias_sums.to(self._dtype(bias, beside))
        return tensors, survived

    def _values(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        if not self._quantized(name):
            return tensors[name].float()
        values = self.format.decode(name, tensors)
        return values.t() if self.skeleton.is_transposed(name) else values

    def _write_rest(self, folder: Path, survival: Survival) -> None:
        for file in sorted(self.base.folder.iterdir()):
            if file.is_file() and file.suffix in _COPIED and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
        config: dict[str, Any] = {key: value for key, value in self.base.config.items() if key != "quantization_config"}
        quantization = self.format.config(self.base.quantization, self.dtype)
        if quantization is not None:
            config["quantization_config"] = quantization
        if self.format.to == "bf16":
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = "bfloat16"
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / REPORT_NAME).write_text(survival.json() + "\n", encoding="utf-8")
