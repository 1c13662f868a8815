"""diffusers' own quantizer with halfbyte in bitsandbytes' place, on a small random transformer and its pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.nn import Linear4bit, Linear8bitLt

diffusers = pytest.importorskip("diffusers")

SETTINGS: dict[int, dict[str, Any]] = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    8: {"load_in_8bit": True},
}
each_width = pytest.mark.parametrize("bits", SETTINGS)


@pytest.fixture(scope="module")
def pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional diffusion transformer of two blocks with its autoencoder and scheduler."""
    torch.manual_seed(4)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=8,
        sample_size=8,
        num_embeds_ada_norm=8,
        patch_size=2,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    pipeline = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=diffusers.DDIMScheduler())
    folder = tmp_path_factory.mktemp("dit")
    pipeline.save_pretrained(folder)
    return folder


def load(folder: Path, bits: int | None = None) -> Any:
    settings = {} if bits is None else {"quantization_config": diffusers.BitsAndBytesConfig(**SETTINGS[bits])}
    return diffusers.DiTTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=torch.float32, **settings
    ).eval()


def inputs() -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, (Linear4bit, Linear8bitLt))]


@each_width
@torch.no_grad()
def test_a_model_loads_saves_loads_again_and_dequantizes(bits: int, pipeline_dir: Path, tmp_path: Path) -> None:
    dense, model, given = load(pipeline_dir), load(pipeline_dir, bits), inputs()
    linear = [module for module in dense.modules() if type(module) is torch.nn.Linear]
    assert len(layers(model)) == len(linear)
    exact, found = dense(**given).sample, model(**given).sample
    assert (found - exact).norm() < (0.3 if bits == 4 else 0.05) * exact.norm()
    model.save_pretrained(tmp_path)
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float32).eval()
    assert torch.equal(again(**given).sample, found)
    plain = model.dequantize()
    assert not layers(plain)
    assert (plain(**given).sample - found).norm() < (1e-4 if bits == 4 else 0.05) * exact.norm()


@each_width
def test_a_pipeline_runs_with_a_quantized_transformer(bits: int, pipeline_dir: Path) -> None:
    pipeline = diffusers.DiTPipeline.from_pretrained(pipeline_dir, transformer=load(pipeline_dir, bits))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        class_labels=[1], num_inference_steps=2, guidance_scale=1.0, output_type="np", generator=torch.manual_seed(1)
    ).images
    dense = diffusers.DiTPipeline.from_pretrained(pipeline_dir)
    dense.set_progress_bar_config(disable=True)
    exact = dense(
        class_labels=[1], num_inference_steps=2, guidance_scale=1.0, output_type="np", generator=torch.manual_seed(1)
    ).images
    assert images.shape == exact.shape
    assert 0 < abs(images - exact).mean() < 0.1


@each_width
@torch.no_grad()
def test_a_quantized_transformer_compiles_without_graph_breaks(bits: int, pipeline_dir: Path) -> None:
    model, given = load(pipeline_dir, bits), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given).sample, model(**given).sample, atol=1e-4, rtol=1e-4)
