"""Group G: nothing fails and nothing is said, but the result is slow, large or wrong."""

from __future__ import annotations

from halfbyte.doctor.catalogue.entry import FailureClass, Remedy
from halfbyte.doctor.catalogue.links import links

__all__ = ["CLASSES"]

_RECEIPT = Remedy("see what was quantized, and in what it computes", "halfbyte.receipt(model)")

CLASSES = (
    FailureClass(
        "G1",
        "4-bit layers compute in float32",
        "BitsAndBytesConfig(load_in_4bit=True) computes in float32 unless told otherwise, several times slower than in "
        "the model's own 16 bits.",
        (
            Remedy(
                "say what to compute in",
                "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)",
            ),
            Remedy("on GPUs before Ampere (T4)", "bnb_4bit_compute_dtype=torch.float16"),
        ),
        texts=(r"Input type into Linear4bit is torch\.\w+, but bnb_4bit_compute_d?type=torch\.float32",),
        sources=links("bnb#2077"),
    ),
    FailureClass(
        "G2",
        "A mixture-of-experts model stayed in 16 bits",
        "transformers 5 keeps all experts of a layer in one 3-dimensional parameter; bitsandbytes quantizes linear "
        "layers only, skips it without a word and still reports a 4-bit model.",
        (_RECEIPT, Remedy("use halfbyte in its place: it quantizes fused experts", "python -m halfbyte run SCRIPT.py")),
        here="halfbyte quantizes them, and its receipt says which share of the weights is quantized.",
        sources=links("bnb#1849 unsloth#5344"),
    ),
    FailureClass(
        "G3",
        "Layers were moved to the CPU or disk, so generation is many times slower",
        "The GPU was too full when the model was loaded with device_map='auto'.",
        (
            Remedy("see where the layers are", "print(set(model.hf_device_map.values()))"),
            Remedy("keep everything on the GPU, or fail plainly", "device_map={'': 0}"),
        ),
        texts=(r"Some parameters are on the meta device because they were offloaded to the (?:cpu|disk)",),
        follows=("E7",),
        sources=links("unsloth#5344"),
    ),
    FailureClass(
        "G4",
        "Sharded 4-bit weights come back altered",
        "Packed codes kept in a bfloat16 container contain patterns that mean NaN; copies under FSDP2 rewrite those, "
        "and about one element in a thousand changes.",
        (
            Remedy(
                "keep packed codes as bytes (FSDP2 shards them from torch 2.13 on)",
                "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.uint8)",
            ),
        ),
        here="halfbyte keeps packed codes in uint8.",
        sources=links("bnb#1945"),
    ),
    FailureClass(
        "G5",
        "The optimizer's precision depends on how many GPUs share the model",
        "8-bit state is used for large tensors only, and the size of the local shard decides, not the parameter's.",
        (Remedy("use halfbyte's optimizers: they look at the whole parameter", "import halfbyte.optim"),),
        here="halfbyte decides by the whole parameter.",
        sources=links("bnb#2080 ao#4912"),
    ),
    FailureClass(
        "G6",
        "A program chose bfloat16 on a T4, where it is emulated",
        "The same as B5, seen from the outside: training or generation is several times slower than in float16.",
        (
            Remedy("compute in float16", "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)"),
            Remedy("with the Trainer", "TrainingArguments(bf16=False, fp16=True)"),
        ),
        sources=links("soup#385"),
    ),
)
"""In order of their ids."""
