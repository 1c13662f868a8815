"""transformers, peft and accelerate find bitsandbytes, whether they came before halfbyte or after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.python import python_code

PROBES = """\
def probes():
    import accelerate.utils.imports as a, peft.import_utils as p, transformers.utils as t
    return [
        t.is_bitsandbytes_available(), t.is_bitsandbytes_available("0.48"),
        a.is_bnb_available(), a.is_bnb_available(min_version="0.48.0"), a.is_4bit_bnb_available(),
        a.is_8bit_bnb_available(), a.is_bitsandbytes_multi_backend_available(),
        p.is_bnb_available(), p.is_bnb_4bit_available(),
    ]
"""

INSTALL = "import halfbyte; halfbyte.install_as_bitsandbytes()\n"

TRAIN = """\
import sys, torch, transformers, peft
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
import bitsandbytes as bnb
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=BitsAndBytesConfig(load_in_4bit=True))
print(model.num_parameters(), peft.helpers.bnb is bnb, sys.modules["transformers.integrations.bitsandbytes"].bnb is bnb)
model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"]))
print(type(model.base_model.model.model.layers[0].mlp.up_proj))
model.merge_and_unload()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=BitsAndBytesConfig(load_in_4bit=True))
model = peft.get_peft_model(model, peft.IA3Config(target_modules=["up_proj"], feedforward_modules=[]))
print(type(model.base_model.model.model.layers[0].mlp.up_proj))
print(type(model.base_model.model.dequantize().model.layers[0].mlp.gate_proj))
"""

TRAINED = """\
311936 True True
<class 'peft.tuners.lora.bnb.Linear4bit'>
<class 'peft.tuners.ia3.bnb.Linear4bit'>
<class 'torch.nn.modules.linear.Linear'>
"""

LATE = f"""\
import transformers, accelerate, peft, peft.helpers
import peft.tuners.ia3.bnb, peft.tuners.adalora.bnb
import transformers.integrations.bitsandbytes
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(any(probes()))
{INSTALL}
print(all(probes()))
"""

ORDERS = {
    "before them": (INSTALL + "print(any([]))\nprint(all(probes()))\n"),
    "after they were imported and probed": LATE,
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_all_probes_say_yes_and_4bit_training_works(order: str, llama_dir: Path) -> None:
    code = f"import sys; sys.argv = ['-c', {str(llama_dir)!r}]\n" + PROBES + order + TRAIN
    assert python_code(code) == "False\nTrue\n" + TRAINED


def test_replacing_an_imported_original_reaches_the_libraries_that_hold_it(tmp_path: Path) -> None:
    original = tmp_path / "bitsandbytes"
    original.mkdir()
    (original / "__init__.py").write_text("__version__ = '0.50.2'\nclass nn:\n    class Linear4bit: pass\n")
    info = tmp_path / "bitsandbytes-0.50.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.50.2\n")
    code = (
        "import peft.helpers, transformers.integrations.bitsandbytes as t\n"
        "print(t.bnb.__version__, peft.helpers.bnb.__version__)\n"
        "import halfbyte; halfbyte.install_as_bitsandbytes(replace=True)\n"
        "print(t.bnb.__version__, peft.helpers.bnb.__version__)\n"
    )
    assert python_code(code, path=[tmp_path]) == "0.50.2 0.50.2\n0.50.2+halfbyte 0.50.2+halfbyte\n"
