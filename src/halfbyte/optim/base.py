"""What all optimizers share: states, settings by parameter, saving, and the step from closure to op calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte import backends as _backends  # defines and binds the ops
from halfbyte.errors import UnsupportedError
from halfbyte.formats.dynamic import dynamic_map
from halfbyte.optim import buckets, clipping, counting, paging, serialization, sharding
from halfbyte.optim import state as storage
from halfbyte.optim.grouping import Assigned, Chosen, Place, grouped
from halfbyte.optim.hyper import hyper_tensor, numbers_of
from halfbyte.optim.manager import GlobalOptimManager, MockArgs
from halfbyte.optim.naming import NamedType
from halfbyte.optim.options import Options
from halfbyte.optim.plans import Plan
from halfbyte.rules import Rule, rule_named

__all__ = ["Optimizer8bit"]

del _backends

_KEPT = (
    "args",
    "bias_correction",
    "initialized",
    "is_paged",
    "name2qmap",
    "non_castable_tensor_keys",
    "optimizer_name",
    "options",
)
"""What copies and pickles of an optimizer take along."""


class Optimizer8bit(torch.optim.Optimizer, metaclass=NamedType):
    """Base of all: keeps states in 8 or 32 bits and steps parameters by the rule called ``optimizer_name``.

    Args:
        params: Parameters or parameter groups.
        defaults: Settings of groups that have none of their own.
        optim_bits: 8 or 32.
        is_paged: Keep large states in host memory, on devices that have their own.
    """

    optimizer_name: str
    args: Any
    _FSDP_WRAPPED_QUANT_STATE_KEY = storage.WRAPPER
    _plan: Plan | None = None
    _warned = False

    def __init__(self, params: Any, defaults: dict[str, Any], optim_bits: int = 32, is_paged: bool = False) -> None:
        super().__init__(params, defaults)
        self.initialized = False
        self.is_paged = is_paged
        self.name2qmap: dict[str, Tensor] = {}
        self.mng = GlobalOptimManager.get_instance()
        self.non_castable_tensor_keys = set(storage.NON_CASTABLE)
        self.options = Options()
        self.bias_correction = True
        self.pagers = paging.Pagers()
        if optim_bits == 8:
            self.fill_qmap()

    def __getstate__(self) -> dict[str, Any]:
        self.finish_paging()
        # torch keeps only groups, defaults and states.
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in _KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mng = GlobalOptimManager.get_instance()
        self._plan, self.pagers = None, paging.Pagers()

    # Settings

    @property
    def rule(self) -> Rule:
        """The algorithm."""
        return rule_named(self.optimizer_name)

    def use(
        self, name: str, optim_bits: int, args: Any, min_8bit_size: int, max_unorm: float, skip_zeros: bool
    ) -> None:
        """Take over what is the same for all groups; ``args`` replaces the rest where given."""
        self.optimizer_name = name
        rule_named(name)
        self.args = args
        if args is None:
            self.args = MockArgs(
                {
                    "optim_bits": optim_bits,
                    "min_8bit_size": min_8bit_size,
                    "max_unorm": max_unorm,
                    "skip_zeros": skip_zeros,
                }
            )

    def fill_qmap(self) -> None:
        """Make the two code maps."""
        self.name2qmap["dynamic"] = torch.from_numpy(dynamic_map(signed=True))
        self.name2qmap["udynamic"] = torch.from_numpy(dynamic_map(signed=False))

    def usual_map(self, signed: bool, device: torch.device) -> Tensor:
        """The code map of states that can be negative, or of those that cannot."""
        name = "dynamic" if signed else "udynamic"
        if name not in self.name2qmap:
            self.fill_qmap()
        if self.name2qmap[name].device != device:
            self.name2qmap[name] = self.name2qmap[name].to(device)
        return self.name2qmap[name]

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Settings of one parameter: its group's, then the optimizer's, then overrides of the GlobalOptimManager."""
        config = {
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "lr": group["lr"],
            "alpha": group.get("alpha", 0.0),
            "t_alpha": group.get("t_alpha"),
            "t_beta3": group.get("t_beta3"),
            "optim_bits": self.args.optim_bits,
            "min_8bit_size": self.args.min_8bit_size,
            "max_unorm": getattr(self.args, "max_unorm", 0.0),
            "skip_zeros": getattr(self.args, "skip_zeros", False),
        }
        config.update(self.mng.override_of(self.param_groups[gindex]["params"][pindex]))
        return config

    def check_overrides(self) -> None:
        """Look up the parameters of module overrides among this optimizer's."""
        own = {id(p) for group in self.param_groups for p in group["params"]}
        for module, name, config in self.mng.module_weight_config_triple:
            weight = getattr(module, name)
            if id(weight) in own:
                self.mng.override_config(weight, key_value_dict=dict(config))

    def fingerprint(self) -> tuple[Any, ...]:
        """What settings of single parameters hang on, beside their groups."""
        args = self.args
        kept = tuple(getattr(args, name, None) for name in ("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros"))
        return (self.mng.changes, self.options, self.optimizer_name, self.bias_correction, *kept)

    def settings_at(self, place: Place, step: Any) -> dict[str, Any]:
        """Numbers of a step for the parameter at that place, as :func:`halfbyte.rules.hyper` takes them."""
        return numbers_of(self.get_config(*place, self.param_groups[place[0]]), step)

    # States

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32, parts: int = 0) -> Tensor:
        """Zeros for a state of ``p``; ``parts`` of them stacked, if not 0.

        A paged optimizer keeps large states of CUDA parameters in pinned host memory. Elsewhere it warns once and uses
        the device's own.
        """
        if self.is_paged and paging.pageable(p):
            shape = (parts, *p.shape) if parts else tuple(p.shape)
            made = paging.pinned_zeros(shape, dtype, type(self).__name__)
            if made is not None:
                return made
        elif self.is_paged and p.device.type != "cuda" and not self._warned:
            self._warned = True
            why = "On the CPU there is nothing to page: states are in host memory already"
            if p.device.type != "cpu":
                why = "Paging needs CUDA"
            warnings.warn(
                f"{type(self).__name__}: states are in ordinary memory of {p.device.type!r}, not paged. {why}",
                stacklevel=3,
            )
        return sharding.zeros_like(p, dtype, parts)

    def finish_paging(self) -> None:
        """Wait until paged states in host memory are those of the last step; ``state_dict`` does so itself."""
        self.pagers.finish()

    def to_gpu(self) -> None:
        """Move every state to its parameter's device, large ones of a paged optimizer to pinned host memory."""
        self.finish_paging()
        self._plan = None
        for p, state in self.state.items():
            if "state1" in state:
                serialization.place(state, p, self.is_paged)

    def prefetch_state(self, p: Tensor) -> None:
        """Kept for subclasses that call it: a step reads paged states where they are."""

    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Zero states for ``p``, in 8 bits where the settings say so and the whole parameter is large enough.

        Raises:
            UnsupportedError: ``optim_bits`` is neither 8 nor 32.
        """
        config = self.get_config(gindex, pindex, group)
        bits = config["optim_bits"]
        if bits not in {8, 32}:
            raise UnsupportedError(f"Amount of optimizer bits not supported: {bits}", expected="8 or 32")
        if p.numel() < config["min_8bit_size"]:
            bits = 32
        state = self.state[p]
        state["step"] = 0
        storage.fill(state, p, self.rule, bits, self.get_state_buffer, self.usual_map)
        if config["max_unorm"] > 0.0:
            state["unorm_vec"] = torch.zeros((1,), device=p.device)
        if self.options.percentile_clipping < 100:
            state["gnorm_vec"] = torch.zeros((clipping.HISTORY,), device=p.device)

    # The step

    @torch._disable_dynamo  # pyright: ignore  # the step is fused already: there is nothing to trace
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Args:
            closure: Evaluates the model anew and returns the loss.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            UnsupportedError: A gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._prepare()
        if self._plan is not None and self._plan.repeat(self):
            return loss
        chosen = [
            (group, p, gindex, pindex)
            for gindex, group in enumerate(self.param_groups)
            for pindex, p in enumerate(group["params"])
            if p.grad is not None
        ]
        if type(self).update_step is not Optimizer8bit.update_step:
            for group, p, gindex, pindex in chosen:
                self.step_one(group, p, gindex, pindex)
        else:
            assigned = self._update(chosen)
            self._plan = Plan(self, assigned) if assigned and Plan.possible(self, assigned) else None
        return loss

    @torch.no_grad()
    def step_one(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Step the parameter at this place alone, if it has a gradient."""
        if p.grad is not None:
            self._prepare()
            self._ensure_state(group, p, gindex, pindex)
            self.update_step(group, p, gindex, pindex)

    def _prepare(self) -> None:
        if not self.initialized:
            self.check_overrides()
            self.initialized = True

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Step one parameter. A subclass that overrides this steps its parameters one by one."""
        self._update([(group, p, gindex, pindex)])

    def _ensure_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> dict[str, Any]:
        if p.grad is not None and (p.grad.layout != torch.strided or p.is_complex()):
            kind = "complex" if p.is_complex() else f"{p.grad.layout} (sparse)"
            raise UnsupportedError(
                f"{type(self).__name__} got a {kind} gradient for a parameter of shape {tuple(p.shape)}",
                expected="dense real gradients",
                hint="for embeddings pass sparse=False",
            )
        state = self.state[p]
        if "state1" not in state:
            self.init_state(group, p, gindex, pindex)
        if state["state1"].device != p.device and not paging.pages(self.is_paged, p, state):
            serialization.move(state, p.device)
        return state

    def _update(self, chosen: Sequence[Chosen]) -> list[Assigned]:
        """Step these parameters; returns the bucket of each."""
        states = [(p, self._ensure_state(group, p, gindex, pindex)) for group, p, gindex, pindex in chosen]
        counting.advance(states, self.state.values(), self.options.capturable)
        assigned = grouped(self, chosen)
        buckets.run(dict.fromkeys(bucket for _, bucket, _ in assigned), self.hyper_of)
        return assigned

    def seed_of(self, step: Any) -> int:
        """Seed of random rounding in that step; -1 for none."""
        return int(step) * 40503 & 0x7FFFFFFF if self.options.stochastic_rounding else buckets.NEAREST

    def hyper_of(self, bucket: buckets.Bucket) -> Tensor:
        """A bucket's numbers as the tensor that ops take."""
        return self.hyper_tensor_of(bucket.settings, bucket.device)

    def hyper_tensor_of(self, settings: dict[str, Any], device: torch.device) -> Tensor:
        """Numbers of a step as the tensor that ops take; ``device`` as in :func:`halfbyte.optim.hyper.hyper_tensor`."""
        return hyper_tensor(device, **settings, bias_correction=self.bias_correction)

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with each parameter's tensors under one key, as bitsandbytes has it since 0.49."""
        self.finish_paging()
        return serialization.wrapped(super().state_dict(), self)

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load what :meth:`state_dict` returned, here or in bitsandbytes: wrapped or flat, blocks of 256 or 2048.

        Args:
            state_dict: Stays as it is.
            move_to_device: Move states to their parameters' devices.

        Raises:
            CheckpointError: It does not fit the parameters or the algorithm.
        """
        self.finish_paging()
        self._plan = None
        super().load_state_dict(serialization.held(state_dict))
        serialization.release(self, move_to_device)
