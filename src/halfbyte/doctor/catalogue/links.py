"""Addresses of sources, from the short names that the catalogue uses."""

from __future__ import annotations

__all__ = ["links"]

_REPOSITORIES = {
    "accelerate": "huggingface/accelerate",
    "ao": "pytorch/ao",
    "bnb": "bitsandbytes-foundation/bitsandbytes",
    "cog-svd": "replicate/cog-svd",
    "colab": "googlecolab/colabtools",
    "comfy": "Comfy-Org/ComfyUI",
    "diffusers": "huggingface/diffusers",
    "dlami": "aws-samples/aws-deep-learning-ami-ubuntu-dcv-desktop",
    "exo": "exo-explore/exo",
    "gpustack": "gpustack/gpustack",
    "kaggle": "Kaggle/docker-python",
    "kernels": "huggingface/kernels",
    "lightning": "Lightning-AI/pytorch-lightning",
    "llama-cpp-python": "abetlen/llama-cpp-python",
    "llamafactory": "hiyouga/LlamaFactory",
    "lora-scripts": "Akegarasu/lora-scripts",
    "mamba": "state-spaces/mamba",
    "numba": "numba/numba",
    "nvidia-container-toolkit": "NVIDIA/nvidia-container-toolkit",
    "nvidia-docker": "NVIDIA/nvidia-docker",
    "outlines": "dottxt-ai/outlines",
    "peft": "huggingface/peft",
    "sglang": "sgl-project/sglang",
    "soup": "MakazhanAlpamys/Soup",
    "stable-diffusion": "CompVis/stable-diffusion",
    "textgen": "oobabooga/textgen",
    "torch": "pytorch/pytorch",
    "trak": "MadryLab/trak",
    "transformers": "huggingface/transformers",
    "triton": "triton-lang/triton",
    "triton-windows": "woct0rdho/triton-windows",
    "ubuntu-driver": "NVIDIA/ubuntu-packaging-nvidia-driver",
    "unsloth": "unslothai/unsloth",
    "vllm": "vllm-project/vllm",
    "wsl": "microsoft/WSL",
    "xpu-triton": "intel/intel-xpu-backend-for-triton",
}


def links(text: str) -> tuple[str, ...]:
    """Addresses for words like ``torch#25581``; a full address stays as it is.

    >>> links("torch#25581 https://example.org")
    ('https://github.com/pytorch/pytorch/issues/25581', 'https://example.org')
    """
    return tuple(word if "://" in word else _issue(word) for word in text.split())


def _issue(word: str) -> str:
    name, _, number = word.partition("#")
    return f"https://github.com/{_REPOSITORIES[name]}/issues/{number}"
