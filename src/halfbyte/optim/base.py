"""The step loop that all optimizers share: states, settings by parameter, and one op call for all that go together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from halfbyte import backends as _backends  # defines and binds the ops
from halfbyte.errors import UnsupportedError
from halfbyte.formats.dynamic import dynamic_map
from halfbyte.optim import buckets, clipping, paging, serialization, sharding
from halfbyte.optim import state as storage
from halfbyte.optim.hyper import hyper_tensor, least
from halfbyte.optim.manager import GlobalOptimManager, MockArgs
from halfbyte.optim.naming import NamedType
from halfbyte.optim.options import Options
from halfbyte.optim.plans import Plan, Source
from halfbyte.rules import Rule, rule_named

__all__ = ["Optimizer8bit"]

_ops = torch.ops.halfbyte
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
    _pagers: dict[torch.device, paging.Pager]
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
        self._pagers = {}
        if optim_bits == 8:
            self.fill_qmap()

    def __getstate__(self) -> dict[str, Any]:
        self.finish_paging()
        # torch keeps only groups, defaults and states.
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in _KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mng = GlobalOptimManager.get_instance()
        self._plan, self._pagers = None, {}

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

    def settings_at(self, source: Source, step: Any) -> dict[str, Any]:
        """Numbers of a step, as :func:`halfbyte.rules.hyper` takes them."""
        gindex, pindex, group = source
        return self._settings(self.get_config(gindex, pindex, group), step)

    def _settings(self, config: dict[str, Any], step: Any) -> dict[str, Any]:
        betas = config["betas"]
        beta1, beta2, beta3 = (*betas, 0.0)[:3] if len(betas) < 3 else betas
        alpha, t_alpha, t_beta3 = config["alpha"], config["t_alpha"], config["t_beta3"]
        if t_alpha:
            alpha = least(step * alpha / t_alpha, alpha)
        if t_beta3:
            beta3 = slow_beta(beta1, beta3, step, t_beta3)
        return {
            "lr": config["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "beta3": beta3,
            "alpha": alpha,
            "eps": config["eps"],
            "weight_decay": config["weight_decay"],
            "step": step,
        }

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

    def _pages(self, p: Tensor, state: dict[str, Any]) -> bool:
        """Whether the states of ``p`` are in host memory, and ``p`` is not."""
        return self.is_paged and state["state1"].device.type == "cpu" and paging.pageable(p)

    def _pager(self, device: torch.device) -> paging.Pager:
        if device not in self._pagers:
            self._pagers[device] = paging.Pager(device)
        return self._pagers[device]

    def finish_paging(self) -> None:
        """Wait until paged states in host memory are those of the last step; ``state_dict`` does so itself."""
        for pager in self._pagers.values():
            pager.finish()

    def to_gpu(self) -> None:
        """Move every state to its parameter's device, large ones of a paged optimizer to pinned host memory."""
        self.finish_paging()
        self._plan = None
        for p, state in self.state.items():
            if "state1" in state:
                serialization.place(state, p, self.is_paged)

    def prefetch_state(self, p: Tensor) -> None:
        """Kept for subclasses that call it: paged states are fetched piece by piece while others are stepped."""

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
        state["step"] = self._first_step(p)
        storage.fill(state, p, self.rule, bits, self.get_state_buffer, self.usual_map)
        if config["max_unorm"] > 0.0:
            state["unorm_vec"] = torch.zeros((1,), device=p.device)
        if self.options.percentile_clipping < 100:
            state["gnorm_vec"] = torch.zeros((clipping.HISTORY,), device=p.device)

    def _first_step(self, p: Tensor) -> Any:
        if not self.options.capturable:
            return 0
        if p.device not in self._counters:
            self._counters[p.device] = torch.zeros((), dtype=torch.float32, device=p.device)
        return self._counters[p.device]

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
        if state["state1"].device != p.device and not self._pages(p, state):
            serialization.move(state, p.device)
        return state

    def _update(
        self, chosen: Iterable[tuple[dict[str, Any], Tensor, int, int]]
    ) -> list[tuple[Tensor, buckets.Bucket, Source]]:
        """Step these parameters; returns the bucket of each."""
        found: dict[Hashable, buckets.Bucket] = {}
        assigned: list[tuple[Tensor, buckets.Bucket, Source]] = []
        known: dict[Hashable, dict[str, Any]] = {}
        counted: set[int] = set()
        # On the device, all parameters that begin together count with one tensor.
        self._counters: dict[torch.device, Tensor] = {}
        for group, p, gindex, pindex in chosen:
            state = self._ensure_state(group, p, gindex, pindex)
            if not isinstance(state["step"], Tensor) or id(state["step"]) not in counted:
                counted.add(id(state["step"]))
                state["step"] += 1
            config = self.get_config(gindex, pindex, group)
            step = id(state["step"]) if isinstance(state["step"], Tensor) else state["step"]
            key = (gindex, id(self.mng.pid2config.get(id(p))), step)
            if key not in known:
                known[key] = self._settings(config, state["step"])
            bucket = self._assign(found, p, state, config, dict(known[key]))
            assigned.append((p, bucket, (gindex, pindex, group)))
        buckets.run(found.values(), self.hyper_of)
        return assigned

    def _assign(
        self,
        found: dict[Hashable, buckets.Bucket],
        p: Tensor,
        state: dict[str, Any],
        config: dict[str, Any],
        settings: dict[str, Any],
    ) -> buckets.Bucket:
        assert p.grad is not None
        rule, eight, part = self.rule, storage.is_8bit(state), sharding.part_of(p)
        paged = self._pages(p, state)
        param, grad = sharding.local(p.detach()), sharding.local(p.grad.detach())
        absmax = storage.absmax_of(state, rule) if eight else []
        maps = storage.maps_of(state, rule) if eight else []
        blocksize = storage.blocksize_here(p, absmax[0]) if eight else 0
        if self.options.percentile_clipping < 100:
            squared = sharding.total(grad.float().square().sum(), p)
            settings["grad_scale"] = clipping.percentile_scale(
                squared, state["gnorm_vec"], state["step"], self.options.percentile_clipping
            )
        if config["max_unorm"] > 0.0:
            settings["update_scale"] = self._trust(p, state, settings, config)
        key = (
            param.device,
            blocksize,
            config["skip_zeros"],
            id(part.group),
            paged,
            *map(id, maps),
            *(id(value) if isinstance(value, Tensor) else value for value in settings.values()),
        )
        if key not in found:
            bucket = buckets.Bucket(rule, settings, config["skip_zeros"], blocksize, maps, param.device, state["step"])
            bucket.seed = self.seed_of(state["step"])
            bucket.pager = self._pager(p.device) if paged else None
            found[key] = bucket
        found[key].add(part, param, grad, storage.states_of(state, rule), absmax, id(p))
        return found[key]

    def seed_of(self, step: Any) -> int:
        """Seed of random rounding in that step; -1 for none."""
        return int(step) * 40503 & 0x7FFFFFFF if self.options.stochastic_rounding else buckets.NEAREST

    def hyper_of(self, bucket: buckets.Bucket) -> Tensor:
        """A bucket's numbers as the tensor that ops take."""
        return self._hyper(bucket.settings, bucket.device)

    def _hyper(self, settings: dict[str, Any], device: torch.device) -> Tensor:
        return hyper_tensor(device, **settings, bias_correction=self.bias_correction)

    def _trust(self, p: Tensor, state: dict[str, Any], settings: dict[str, Any], config: dict[str, Any]) -> Tensor:
        """Factor that keeps the update's norm below ``max_unorm`` times the parameter's: LARS' and LAMB's bound."""
        rule, max_unorm = self.rule, config["max_unorm"]
        param = sharding.local(p.detach())
        if self._pages(p, state):
            self.finish_paging()
        states = [one.to(p.device) for one in storage.states_of(state, rule)]
        if storage.is_8bit(state):
            scales = storage.absmax_of(state, rule)
            blocksize = storage.blocksize_here(p, scales[0])
            states = [
                sharding.decode(codes, absmax, code, blocksize, p)
                for codes, absmax, code in zip(states, scales, storage.maps_of(state, rule), strict=True)
            ]
        hyper = self._hyper(settings, param.device)
        assert p.grad is not None
        squared = _ops.optimizer_update_norm(
            [param], [sharding.local(p.grad.detach())], states, hyper, rule.name, config["skip_zeros"]
        )
        total = sharding.total(torch.cat([squared, param.float().square().sum().reshape(1)]), p)
        state["unorm_vec"].copy_(total[:1])
        unorm, pnorm = total.sqrt().unbind()
        bound = max_unorm * pnorm + (config["eps"] if len(rule.signed) == 1 else 0.0)
        # A parameter of zeros has no length to be measured by: it moves freely, or it never would.
        return torch.where((unorm > bound) & (pnorm > 0), bound / unorm, torch.ones_like(unorm))

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


def slow_beta(beta1: float, beta3: float, step: Any, horizon: int) -> Any:
    """AdEMAMix's schedule of the slow mean's beta: its half-life grows linearly from that of ``beta1``.

    Pagliardini et al., arXiv:2409.03137, section 3.1.

    >>> round(slow_beta(0.9, 0.9999, 500, 1000), 6)
    0.9998
    """
    first, last = math.log(beta1), math.log(beta3)
    share = step / horizon
    exponent = first * last / ((1 - share) * last + share * first)
    found = exponent.exp() if isinstance(exponent, Tensor) else math.exp(exponent)
    return least(found, beta3)
