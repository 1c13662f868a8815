"""Every public name of bitsandbytes 0.50.2, and those of 0.43.3 that it dropped: there and alike, or refused."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import logging
import operator
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import UnsupportedError
from halfbyte.integrations.bitsandbytes import names, retired
from tests.support.python import python, python_code

LIST: dict[str, Any] = json.loads((Path(__file__).parents[1] / "contracts" / "bitsandbytes_surface.json").read_text())
INSTALL = "import halfbyte; halfbyte.install_as_bitsandbytes()\n"
PRESENT = [
    (m, n)
    for m, members in LIST["0.50.2"].items()
    for n in members
    if f"{m}.{n}".lstrip(".") not in LIST["its own use"]
]
FORMER = [(m, n) for m, members in LIST["0.43.3"].items() for n in members]
PARAMETERS_OF_NEW = {"Params4bit", "Int8Params"}


def is_refused(module: str, name: str) -> bool:
    return names.retired_name(module, name) is not None


def named(module: str, name: str) -> Any:
    found = importlib.import_module(f"bitsandbytes.{module}".rstrip("."))
    return getattr(found, name)


@pytest.mark.parametrize(("module", "name"), PRESENT, ids=lambda value: value or "bitsandbytes")
def test_a_name_of_0_50_is_there_and_of_its_kind(module: str, name: str) -> None:
    value, told = named(module, name), LIST["0.50.2"][module][name]
    is_kind = {
        "class": inspect.isclass,
        "function": callable,
        "module": inspect.ismodule,
        "value": lambda v: v is not None,
    }
    assert is_kind[told["kind"]](value)
    if told["kind"] == "class" and not is_refused(module, name):
        assert [member for member in told.get("members", ()) if not hasattr(value, member)] == []


@pytest.mark.parametrize(
    ("module", "name"), [one for one in PRESENT if not is_refused(*one)], ids=lambda value: value or "bitsandbytes"
)
def test_a_call_of_0_50_means_the_same(module: str, name: str) -> None:
    expected = LIST["0.50.2"][module][name].get("parameters")
    if expected is None or name == "BNBNativeLibrary":
        return
    value = named(module, name)
    drop = 0
    if inspect.isclass(value):
        of_new = name in PARAMETERS_OF_NEW
        makers = [(vars(one).get("__init__"), vars(one).get("__new__")) for one in value.__mro__]
        found = (new if of_new or not inspect.isfunction(init) else init for init, new in makers)
        value, drop = next(getattr(maker, "__func__", maker) for maker in found if maker is not None), 1
    ours = [
        [p.name, p.kind.name, None if p.default is p.empty else repr(p.default)]
        for p in list(inspect.signature(value).parameters.values())[drop:]
    ]
    assert ours[: len(expected)] == expected
    assert all(one[2] is not None or one[1].startswith("VAR") for one in ours[len(expected) :])


@pytest.mark.parametrize(("module", "name"), FORMER, ids=lambda value: value or "bitsandbytes")
def test_a_name_of_0_43_works_or_says_what_to_use(module: str, name: str) -> None:
    value = named(module, name)
    if not is_refused(module, name):
        assert value is not None
        return
    with pytest.raises(UnsupportedError, match=rf"bitsandbytes\.\S*{name} was dropped in bitsandbytes 0\.\d+\nhint: "):
        value["adam"] if isinstance(value, dict) else value()


@pytest.mark.parametrize("module", LIST["modules of 0.43.3"])
def test_a_module_that_is_gone_says_what_to_use(module: str) -> None:
    with pytest.raises(
        ImportError, match=rf"halfbyte offers no bitsandbytes\.{module.partition('.')[0]}.*\nhint: use "
    ):
        importlib.import_module(f"bitsandbytes.{module}")


def test_a_stand_in_of_a_class_can_be_asked_about() -> None:
    assert not isinstance(torch.zeros(1), named("functional", "COOSparseTensor"))


def test_a_stand_in_is_one_and_the_same_by_every_path() -> None:
    assert named("functional", "COOSparseTensor") is named("functional", "COOSparseTensor")
    assert named("autograd", "undo_layout") is named("autograd._functions", "undo_layout")


@pytest.mark.parametrize("whole", retired.RETIRED)
def test_every_retired_name_is_refused_with_what_to_use(whole: str) -> None:
    module, _, name = whole.rpartition(".")
    value = named(module, name)
    with pytest.raises(UnsupportedError, match=rf"^bitsandbytes\.{whole} .*\nhint: (use |nothing)"):
        value["adam"] if isinstance(value, dict) else value()


def test_every_retired_and_every_better_name_is_in_the_list() -> None:
    listed = {f"{m}.{n}".lstrip(".") for m, n in (*PRESENT, *FORMER)}
    assert {name for name in (*retired.RETIRED, *LIST["better"]) if name not in listed} == set()


def test_the_page_of_names_is_current() -> None:
    done = python([str(Path(__file__).parents[2] / "tools" / "make_docs.py"), "--check"])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", sorted(names._LOGGERS))
def test_loggers_have_their_modules_name(module: str) -> None:
    assert named(module, "logger").name == f"bitsandbytes.{module}"


def test_a_level_set_on_bitsandbytes_holds_for_halfbyte() -> None:
    code = INSTALL + (
        "import logging, bitsandbytes\n"
        "logging.getLogger('bitsandbytes').setLevel(logging.ERROR)\n"
        "print(logging.getLogger('halfbyte').isEnabledFor(logging.WARNING))\n"
    )
    assert python_code(code) == "False\n"


@pytest.fixture
def backends(tmp_path: Path) -> Path:
    """A folder with a package that brings two backends by entry point: one that fails, one that works."""
    (tmp_path / "other.py").write_text(
        "import torch\n"
        "def broken(): raise OSError('no such device')\n"
        "def fine():\n"
        "    library = globals().setdefault('library', torch.library.Library('bitsandbytes', 'IMPL'))\n"
        "    library.impl('int8_vectorwise_dequant', lambda A, stats: torch.full(A.shape, 7.0), 'CPU')\n"
    )
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bitsandbytes.backends]\nbroken = other:broken\nfine = other:fine\n")
    return tmp_path


def test_backends_of_other_packages_are_loaded_and_a_broken_one_is_left_out(backends: Path) -> None:
    code = INSTALL + (
        "import bitsandbytes, torch\n"
        "A = torch.ones(2, 3, dtype=torch.int8)\n"
        "print(torch.ops.bitsandbytes.int8_vectorwise_dequant(A, torch.ones(2)).unique().tolist())\n"
    )
    done = python(["-c", code], path=[backends])
    assert done.stdout == "[7.0]\n"
    assert "backend broken (other:broken) could not be loaded and is left out: OSError: no such device" in done.stderr


def test_former_helpers_compute_what_they_did() -> None:
    F = named("", "functional")
    A, B = torch.randint(-128, 127, (5, 40), dtype=torch.int8), torch.randint(-128, 127, (40, 7), dtype=torch.int8)
    exact = A.long() @ B.long()
    assert torch.equal(F.igemm(A, B).long(), exact)
    assert torch.equal(F.igemm(A.t().contiguous(), B.t().contiguous(), None, True, True).long(), exact)
    assert torch.equal(F.batched_igemm(torch.stack([A, A]), torch.stack([B, B]))[1].long(), exact)
    values = torch.randn(1000)
    codes, state = F.quantize(values)
    assert (F.dequantize(codes, state) - values).abs().max() < 0.02 * values.abs().max()
    assert torch.equal(F.dequantize(codes, absmax=state[0], code=state[1]), F.dequantize(codes, state))
    quantiles = F.estimate_quantiles(torch.arange(10001).float())
    torch.testing.assert_close(quantiles, torch.linspace(1 / 512, 511 / 512, 256) * 10000, rtol=0, atol=0.51)
    assert F.create_quantile_map(values).shape == (256,)
    history = torch.zeros(100)
    for step in range(1, 4):
        norm, bound, scale = F.percentile_clipping(torch.full((4,), float(step)), history, step, 5)
        assert norm.item() == 2.0 * step
        assert (bound.item(), scale) == (2.0, pytest.approx(1.0 / step))
    paged = F.get_paged(3, 4, device=0)
    F.fill(paged, 2.0)
    F.prefetch_tensor(paged)
    assert paged.sum() == 24.0


def test_switchback_layers_train_and_fp8_layers_round() -> None:
    nn, research = named("", "nn"), named("", "research")
    torch.manual_seed(0)
    x = torch.randn(6, 64, requires_grad=True)
    for kind in (nn.SwitchBackLinear, nn.SwitchBackLinearGlobal, nn.SwitchBackLinearVectorwise, nn.SwitchBackLinearBnb):
        layer = kind(64, 32)
        layer(x).pow(2).sum().backward()
        exact = torch.nn.functional.linear(x, layer.weight, layer.bias)
        assert (layer(x) - exact).norm() / exact.norm() < 0.02
        torch.testing.assert_close(layer.weight.grad, (2 * layer(x)).t() @ x, rtol=1e-4, atol=1e-3)
    layer = nn.SwitchBackLinear(64, 32).eval()
    layer.prepare_for_eval()
    assert torch.equal(layer(x), layer(x))
    for kind in (research.nn.LinearFP8Mixed, research.nn.LinearFP8Global):
        layer = kind(64, 32)
        exact = torch.nn.functional.linear(x, layer.weight, layer.bias)
        error = (layer(x) - exact).norm() / exact.norm()
        assert 0.001 < error < 0.1
        layer(x).sum().backward()
        assert layer.weight.grad is not None


def test_outliers_of_a_model_are_traced() -> None:
    utils, nn = named("", "utils"), named("", "nn")
    tracer = utils.OutlierTracer.get_instance()
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    with torch.no_grad():
        model[1].weight[:, 5] *= 100
    tracer.initialize(model)
    x = torch.randn(4, 32)
    x[:, 3] = 50.0
    model(x)
    assert 3 in tracer.get_outliers(model[0].weight).tolist()
    assert tracer.get_outliers(model[1].weight).tolist() == [5]
    model(x)
    assert not model[0]._forward_pre_hooks

    class Aware(nn.OutlierAwareLinear):
        def quantize_weight(self, w: torch.Tensor, outlier_idx: torch.Tensor) -> torch.Tensor:
            return w.round() if outlier_idx is None else w

        def forward_with_outliers(self, x: torch.Tensor, outlier_idx: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight) + (0 if outlier_idx is None else 1)

    layer = Aware(32, 8)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight.round()))
    with pytest.raises(UnsupportedError, match="hint: override quantize_weight"):
        nn.OutlierAwareLinear(4, 4)(torch.zeros(1, 4))


def test_replace_linear_replaces_all_but_the_skipped() -> None:
    utils, nn = named("", "utils"), named("", "nn")
    model = torch.nn.ModuleDict(
        {"body": torch.nn.Sequential(torch.nn.Linear(8, 8)), "lm_head": torch.nn.Linear(8, 4, bias=False)}
    )
    make = functools.partial(nn.Linear8bitLt, has_fp16_weights=False)
    weight = operator.itemgetter(0)(model["body"]).weight.detach().clone()
    utils.replace_linear(model, make, copy_weights=True)
    assert isinstance(model["body"][0], nn.Linear8bitLt)
    assert type(model["lm_head"]) is torch.nn.Linear
    assert torch.equal(model["body"][0].weight.data, weight)
    assert logging.getLogger("bitsandbytes").name == "bitsandbytes"
