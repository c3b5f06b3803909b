"""Time and memory of one LCM-LoRA training step, beside diffusers and PEFT; not in CI.

    python -m benchmarks.train    (`reference` extra; 14 GB of memory, 3 GB of disk under TMPDIR)

SD1.5 at 256x256, batch 1, a LoRA of rank 64, random weights, on the CPU. A step is forward,
backward, clipping, AdamW.

    minilcm              what train.py does: one UNet, in float32 with the frozen weights in float16
                         until they are used
    diffusers one UNet   what the official SDXL script does: adapters disabled for the teacher,
                         enabled for the target
    diffusers two UNets  what the official webdataset scripts do: the teacher is a UNet of its own

Weights, latents, noise, n, w and contexts are the same, and so must be the loss of the first step,
to 1e-4. Each run is a process of its own, the programs take turns. The memory is the highest
resident set from the first step on, weights and imports included; the peak while loading stands
beside. Prints medians of the steps after the first, and ratios. With and without gradient
checkpointing.
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing import Process
from pathlib import Path
from statistics import median

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn

import minilcm.model.precision
from benchmarks.full_size import SIDE, make_files
from minilcm.files.checkpoint import load_strict, read_part
from minilcm.files.lora_file import read_tau
from minilcm.files.parts import UNET
from minilcm.files.safetensors_file import read_header
from minilcm.model.unet import Cond, UNet, sd15
from minilcm.objective import Objective, loss_of, make_networks
from tests.tiny import load_tau

W, RANK, LORA_ALPHA, LR = 7.5, 64, 8.0, 1e-4

# (z0, cond, null_cond, generator) -> scalar
LossFn = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]


def read_unet(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Official keys, no prefix; the file has float16."""
    model = folder / "model.safetensors"
    return read_part(model, read_header(model)[0], UNET, dtype)


def autocast(dtype: torch.dtype):
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)


# ---- the programs: weights in, (loss function, trained parameters) out


def by_minilcm(
    folder: Path, dtype: torch.dtype, checkpointing: bool
) -> tuple[LossFn, list[nn.Parameter]]:
    narrow = dtype == torch.float32
    how = dict(w_range=(W, W), checkpointing=checkpointing, narrow=narrow)
    objective = Objective("lcm", RANK, LORA_ALPHA, **how)
    with torch.device("meta"):
        unet = UNet(sd15())
    load_strict(unet, read_unet(folder, torch.float16 if narrow else dtype), "UNet")
    nets = make_networks(objective, unet, dtype)
    load_tau(unet, read_tau(folder / "lora.safetensors"))

    def loss(z0, cond, null_cond, generator):
        return loss_of(objective, nets, z0, Cond(cond), Cond(null_cond), generator)

    return loss, [x for x in unet.parameters() if x.requires_grad]


def diffusers_unet(folder: Path, dtype: torch.dtype) -> nn.Module:
    """SD1.5's, frozen."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    state = {f"model.diffusion_model.{key}": x for key, x in read_unet(folder, dtype).items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(state, unet.config), assign=True)
    return unet.requires_grad_(False)


def by_diffusers(
    folder: Path, dtype: torch.dtype, checkpointing: bool, two: bool
) -> tuple[LossFn, list[nn.Parameter]]:
    from diffusers import StableDiffusionPipeline as SD

    unet = diffusers_unet(folder, dtype)
    teacher_unet = copy.deepcopy(unet) if two else None
    lora = SD.lora_state_dict(folder / "lora.safetensors", unet_config=unet.config)
    SD.load_lora_into_unet(*lora, unet, adapter_name="lcm")
    parameters = []
    for name, x in unet.named_parameters():
        x.requires_grad_("lora_" in name)
        if x.requires_grad:
            x.data = x.data.float()
            parameters.append(x)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = torch.cumprod(1 - beta, 0)

    def predict(net: nn.Module, z: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps), float32."""
        with autocast(dtype):
            eps = net(z.to(dtype), t, encoder_hidden_states=context.to(dtype)).sample.float()
        a = alpha_bar[t].reshape(-1, 1, 1, 1)
        return (z - (1 - a).sqrt() * eps) / a.sqrt(), eps

    def consistency(z: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        s = 10.0 * t.reshape(-1, 1, 1, 1)
        return 0.25 / (s**2 + 0.25) * z + s / (s**2 + 0.25).sqrt() * x0

    def loss_of(z0, cond, null_cond, generator):
        n = torch.randint(0, 50, (len(z0),), generator=generator)
        w = torch.empty(len(z0)).uniform_(W, W, generator=generator).reshape(-1, 1, 1, 1)
        noise = torch.randn(z0.shape, generator=generator)
        start = 20 * n + 19
        end = (start - 20).clamp(min=0)
        a, a_end = (alpha_bar[t].reshape(-1, 1, 1, 1) for t in (start, end))
        z_start = a.sqrt() * z0 + (1 - a).sqrt() * noise
        f_start = consistency(z_start, predict(unet, z_start, start, cond)[0], start)
        with torch.no_grad():
            if not two:
                unet.disable_adapters()
            x0_cond, eps_cond = predict(teacher_unet if two else unet, z_start, start, cond)
            x0_null, eps_null = predict(teacher_unet if two else unet, z_start, start, null_cond)
            x0, eps = x0_cond + w * (x0_cond - x0_null), eps_cond + w * (eps_cond - eps_null)
            z_end = a_end.sqrt() * x0 + (1 - a_end).sqrt() * eps
            if not two:
                unet.enable_adapters()
            f_end = consistency(z_end, predict(unet, z_end, end, cond)[0], end)
        return (((f_start - f_end) ** 2 + 0.001**2).sqrt() - 0.001).mean()

    return loss_of, parameters


PROGRAMS = {
    "minilcm": lambda *args: by_minilcm(*args),
    "diffusers one UNet": lambda *args: by_diffusers(*args, two=False),
    "diffusers two UNets": lambda *args: by_diffusers(*args, two=True),
}


# ---- measuring


def peak() -> int:
    """The highest resident set of this process since it began, or since `forget_peak`."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


def forget_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading left behind
    Path("/proc/self/clear_refs").write_text("5")


def job(program: str, checkpointing: bool, dtype: torch.dtype, steps: int, folder: Path) -> None:
    """Run in a process of its own; prints {"losses", "seconds", "processor", "peak", "loading"}."""
    loss_fn, parameters = PROGRAMS[program](folder, dtype, checkpointing)
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=program == "minilcm")
    count = sum(x.numel() for x in parameters)
    assert count == 67_252_224 and all(x.dtype == torch.float32 for x in parameters), count
    g = torch.Generator().manual_seed(0)
    shapes = (1, 4, SIDE, SIDE), (1, 77, 768), (1, 77, 768)
    z0, cond, null_cond = (torch.randn(shape, generator=g) for shape in shapes)
    loading = peak()
    forget_peak()
    losses, seconds, processor = [], [], []
    for step in range(steps + 1):
        start, start_processor = time.perf_counter(), time.process_time()
        loss = loss_fn(z0, cond, null_cond, torch.Generator().manual_seed(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)
    facts = {"losses": losses, "seconds": seconds[1:], "processor": processor[1:]}
    print(json.dumps(facts | {"peak": peak(), "loading": loading}))


def run(*argv) -> dict:
    command = [sys.executable, "-m", "benchmarks.train", "--job", *map(str, argv)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def bench(dtype: str, rounds: int, steps: int, folder: Path) -> bool:
    """Print the table; -> whether all programs have the same loss."""
    files = Process(target=make_files, args=("sd15", folder))  # gives its memory back
    files.start(), files.join()
    switch = (False, True) if hasattr(minilcm.model.precision, "add_checkpointing") else (False,)
    results: dict[tuple[str, bool], list[dict]] = {}
    for _ in range(rounds):
        for checkpointing in switch:
            for program in PROGRAMS:
                facts = run(program, checkpointing, dtype, steps, folder)
                results.setdefault((program, checkpointing), []).append(facts)
    threads = torch.get_num_threads()
    print(f"SD1.5, {8 * SIDE} pixels, batch 1, rank {RANK}, {dtype}, {threads} threads")
    print(f"{rounds} processes each, {steps} steps after the first\n")
    table = {}
    for (program, checkpointing), runs in results.items():
        seconds = [x for one in runs for x in one["seconds"]]
        middle, memory = median(seconds), max(one["peak"] for one in runs)
        table[program, checkpointing] = middle, memory
        first, last = runs[0]["losses"][0], runs[0]["losses"][-1]
        what, loading = program + ", checkpointing" * checkpointing, max(x["loading"] for x in runs)
        print(
            f"{what:36} {middle:6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})  "
            f"{memory / 1e9:6.2f} GB (loading {loading / 1e9:.2f})  "
            f"loss {first:.7f}, {steps} steps later {last:.7f}"
        )
    print()
    for ours in switch:
        for (program, theirs), figures in table.items():
            if program != "minilcm":
                a, b = ("with" if x else "no" for x in (ours, theirs))
                seconds, memory = (x / y for x, y in zip(table["minilcm", ours], figures))
                what = f"minilcm, {a} checkpointing, of {program}, {b} checkpointing:"
                print(f"{what:74} time {seconds:.2f}, memory {memory:.2f}")
    print("goals: time 0.7; memory 0.65 of one UNet, 0.45 of two")
    first = [one["losses"][0] for runs in results.values() for one in runs]
    far = max(first) / min(first) - 1
    print(f"first losses differ by {far:.1e} of themselves, goal 1e-4")
    return far <= 1e-4


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        _, _, program, checkpointing, dtype, steps, folder = sys.argv
        job(program, checkpointing == "True", getattr(torch, dtype), int(steps), Path(folder))
    else:
        raw = argparse.RawDescriptionHelpFormatter
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
        add, dtypes = parser.add_argument, ["float32", "bfloat16", "float16"]
        best = str(minilcm.model.precision.default_dtype("cpu")).removeprefix("torch.")
        base = f"of the frozen base (default: what this processor does well, {best})"
        add("--dtype", choices=dtypes, default=best, help=base)
        add("--rounds", type=int, default=2, help="processes of each program (default 2)")
        add("--steps", type=int, default=3, help="steps timed in each (default 3)")
        args = parser.parse_args()
        with tempfile.TemporaryDirectory() as name:
            sys.exit(not bench(args.dtype, args.rounds, args.steps, Path(name)))
