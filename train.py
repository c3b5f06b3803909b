"""Train a UNet, or a LoRA for it: the base model, a style, or an LCM-LoRA.

    the paper        python train.py --objective lcm --rank 64 --model weights/sd15.safetensors --data my_pictures \\
                         --out runs/lcm --steps 1000
    a full LCM       python train.py --objective lcm --full --w 2:14 --model ... --data ... --out runs/full
    a style LoRA     python train.py --objective diffusion --rank 8 --data my_pictures --out runs/style --steps 500
    a base model     python train.py --objective diffusion --full --data weights/emoji/art --out runs/base
    will it fit?     python train.py --objective lcm --rank 64 --model sdxl --plan 12
    many GPUs        torchrun --nproc_per_node 8 train.py ...

diffusion learns to predict the noise in z_t. lcm learns to jump from z_t to the end of the teacher's trajectory: the
teacher is the model itself with its LoRA off (a full LCM: a frozen copy), guided by w. --out gets lora.safetensors (or
model.safetensors), a sheet of pictures and a line of metrics.jsonl at every save, and the last two states, with which
--resume goes on as if never stopped.
"""

import argparse
import copy
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minilcm.art import art_batches, cache_art, read_art, split_art
from minilcm.checkpoint import latest_state, load_model, load_state, read_run, save_model, save_state, state_tensors
from minilcm.data import batches, buckets, cache_latents, cache_text, read_cond, read_pictures
from minilcm.family import Config, identify, sd15_config, sdxl_config, ssd1b_config
from minilcm.lcm import T_SCALE, K, Network, guidance_embedding, lcd_loss, update_ema
from minilcm.lora import ATTENTION, TARGETS, add_lora, get_tau, lora_off
from minilcm.lora_io import write_tau
from minilcm.memory import LiveBytes, add_checkpointing, default_dtype, resident, size_of
from minilcm.pictures import draw_sheet, save_png
from minilcm.ranks import mean_over_ranks, shard, start_ranks, whole
from minilcm.safefile import sha256
from minilcm.schedule import T, diffusion_loss, make_schedule
from minilcm.text import TextEncoder, with_sizes
from minilcm.unet import Cond, UNet
from minilcm.vae import VAE
from minilcm.watch import (
    append_metrics,
    consistency_along_trajectory,
    delta_norms,
    distance_to_teacher,
    fixed_noise,
    guided_trajectory,
    lcm_columns,
    loss_by_band,
    loss_by_index,
)

CUDA_CONTEXT = 0.5  # GB that CUDA takes for itself, about
SHIPPED = Path(__file__).parent / "weights/emoji/model.safetensors"
FAMILIES = {"sd15": sd15_config, "ssd1b": ssd1b_config, "sdxl": sdxl_config}
NOT_OF_THE_RUN = ("resume", "out", "device", "save_every", "plan", "w_range")  # flags that do not change its numbers
W_DIM = 256  # sinusoids of a full LCM's guidance embedding


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"train.py: {message}")  # one line, exit 1
    add = parser.add_argument
    objectives = "what to learn: eps, or the consistency function"
    add("--objective", choices=["diffusion", "lcm"], required=True, help=objectives)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, metavar="N", help="train a LoRA of rank N on the frozen UNet")
    size.add_argument("--full", action="store_true", help="train all weights of the UNet; lcm: with w as an input")
    add("--alpha", type=float, help="lora_alpha; the LoRA's strength is alpha / rank (default: the rank)")
    add("--attention-only", action="store_true", help="LoRA on attention projections only, as many style LoRAs have it")
    add(
        "--model",
        type=Path,
        default=SHIPPED,
        help="checkpoint to start from (default: the shipped emoji model); with --plan also sd15, ssd1b or sdxl",
    )
    add("--data", type=Path, help=".tar shards, a folder of them, or a folder of pictures with .txt captions")
    add("--out", type=Path, help="folder for the result, the sheets and the states")
    add("--steps", type=int, default=1000, help="optimizer steps (default 1000)")
    add("--batch", type=int, default=16, help="pictures in the network at a time, on each GPU (default 16)")
    add("--accumulate", type=int, default=1, metavar="N", help="add up the gradients of N batches a step (default 1)")
    again = "compute blocks again in the backward pass: slower, far smaller (default: yes, but for small models)"
    add("--checkpointing", action=argparse.BooleanOptionalAction, help=again)
    add("--size", type=int, metavar="PIXELS", help="of the square pictures (default: the model's own size)")
    add("--lr", type=float, default=3e-4, help="learning rate after warm-up, then cosine to 0 (default 3e-4)")
    guidance = (
        "lcm: guidance distilled in, the paper's w = guidance - 1; LOW:HIGH for a full LCM (default 7.5, or 2:14)"
    )
    add("--w", metavar="W[:HIGH]", help=guidance)
    add("--k", type=int, default=T // K, help="lcm: skipping interval in timesteps (default 20)")
    add("--average", type=float, metavar="MU", help="write an average of the weights, of rate MU (default: 0.9995 with "
        "--objective diffusion --full, else none)")  # fmt: skip
    add("--looks", type=int, default=8, help="compositions made and encoded of each drawing (default 8)")
    add("--seed", type=int, default=0, help="all randomness comes from it (default 0)")
    add("--save-every", type=int, default=500, metavar="N", help="save and draw a sheet every N steps (default 500)")
    add("--resume", action="store_true", help="go on from the last state in --out")
    plan_help = "print the memory of a step, part by part, and whether it fits a card of GB; trains nothing"
    add("--plan", type=float, nargs="?", const=0.0, metavar="GB", help=plan_help)
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], help="cpu or cuda (default: cuda if there; with --plan cuda)")
    args = parser.parse_args(argv)

    if args.plan is None and (args.data is None or args.out is None):
        parser.error("--data and --out are needed, but with --plan")
    for flag in ("steps", "batch", "accumulate", "k", "looks", "save_every"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; give 1 or more")
    if args.average is None and args.objective == "diffusion" and args.full:
        args.average = 0.9995
    if args.average is not None and not 0 < args.average < 1:
        parser.error(f"--average is {args.average}; give a number between 0 and 1")
    args.w = args.w or ("2:14" if args.full else "7.5")
    words = args.w.split(":")
    try:
        args.w_range = float(words[0]), float(words[-1])
    except ValueError:
        args.w_range = math.nan, math.nan
    if not (len(words) <= 2 and 0 <= args.w_range[0] <= args.w_range[1] < math.inf):
        parser.error(f"--w is {args.w}; give a number, or LOW:HIGH, for example 2:14")
    if args.objective == "lcm" and args.rank is not None and len(words) == 2:
        parser.error(f"--w is {args.w}: an LCM-LoRA takes no w, so one is distilled in; give one number, or --full")
    if args.device == "cuda" and args.plan is None and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch sees no CUDA device; give --device cpu")
    args.device = args.device or (cuda if args.plan is None else "cuda")
    return args


# ---- the three networks of Algorithm 1


class Networks(NamedTuple):
    """(z_t, t, cond, w) -> eps_hat, three times. LCM-LoRA: one UNet with LoRA on, off, and on without gradient, which
    takes no w. Full LCM: a student that does, a frozen teacher, and an average of the student as target.
    """

    student: Network
    teacher: Network
    target: Network
    target_unet: UNet | None = None
    ddp: DistributedDataParallel | None = None


def make_networks(args: argparse.Namespace, unet: UNet, half: torch.dtype, world: int = 1) -> Networks:
    """Prepare the UNet for training, in place: LoRA, or an input for w; over `world` ranks DDP or FSDP2."""
    target_unet = ddp = None
    if args.rank is not None:
        targets = ATTENTION if args.attention_only else TARGETS
        add_lora(unet, args.rank, args.alpha, targets, torch.Generator().manual_seed(args.seed))
    elif args.objective == "lcm":
        teacher_unet = copy.deepcopy(unet)
        teacher_unet.load_state_dict({key: x.to(half) for key, x in unet.state_dict().items()}, assign=True)
        width = unet.cfg.channels[0]
        with torch.device(unet.out[2].weight.device):
            unet.time_embedding = nn.ModuleDict({"cond_proj": nn.Linear(W_DIM, width, bias=False)})
        nn.init.zeros_(unet.time_embedding["cond_proj"].weight)  # the student begins as the teacher, whatever w
        unet.cfg = replace(unet.cfg, w_dim=W_DIM)
        target_unet = copy.deepcopy(unet)
    if args.rank is None:
        unet.requires_grad_(True)
    if args.checkpointing:
        add_checkpointing(unet)
    net = unet
    if world > 1 and args.rank is not None:
        net = ddp = DistributedDataParallel(unet)
    elif world > 1:
        for whole_unet in [unet] if target_unet is None else [unet, teacher_unet, target_unet]:
            shard(whole_unet)

    def run(network: nn.Module, z_t: Tensor, t: Tensor, cond: Cond, *w_emb: Tensor) -> Tensor:
        with torch.autocast(z_t.device.type, dtype=half, enabled=half != torch.float32):
            return network(z_t, t, cond, *w_emb)

    def lora_teacher(z_t: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        with lora_off(unet):
            return run(unet, z_t, t, cond)

    if target_unet is None:
        return Networks(
            student=lambda z_t, t, cond, w=None: run(net, z_t, t, cond),
            teacher=lora_teacher,
            target=lambda z_t, t, cond, w=None: run(unet, z_t, t, cond),
            ddp=ddp,
        )
    return Networks(
        student=lambda z_t, t, cond, w: run(net, z_t, t, cond, guidance_embedding(w, W_DIM)),
        teacher=lambda z_t, t, cond, w=None: run(teacher_unet, z_t, t, cond),
        target=lambda z_t, t, cond, w: run(target_unet, z_t, t, cond, guidance_embedding(w, W_DIM)),
        target_unet=target_unet,
    )


def loss_of(
    args: argparse.Namespace,
    nets: Networks,
    z0: Tensor,
    cond: Cond,
    null_cond: Cond,
    generator: torch.Generator,
    rank: int = 0,
    world: int = 1,
) -> Tensor:
    """The objective on clean latents z0 (b, 4, h, w) -> scalar; noise from the CPU generator, drawn for all ranks."""
    schedule, b = make_schedule(), len(z0)
    if args.objective == "lcm":
        together = not args.checkpointing  # teacher at cond and null in one batch of 2b, where there is memory for it
        return lcd_loss(*nets[:3], z0, cond, null_cond, schedule, generator, args.w_range, None, args.k, together,
            rank, world)  # fmt: skip
    rows = slice(rank * b, (rank + 1) * b)
    t = torch.randint(0, T, (world * b,), generator=generator)[rows].to(z0.device)
    eps = torch.randn(world * b, *z0.shape[1:], generator=generator)[rows].to(z0.device)
    return diffusion_loss(lambda z_t, t: nets.student(z_t, t, cond, None), z0, t, eps, schedule)


def forward_dtype(device: str) -> torch.dtype:
    """Of the forward pass: bfloat16 where it is fast. What is trained is float32, as the loss and the schedule are."""
    return torch.bfloat16 if default_dtype(device) != torch.float32 else torch.float32


# ---- will it fit?


def plan(args: argparse.Namespace) -> None:
    """Print the bytes of a step by part, from the shapes alone: the real code on fake tensors, which have no memory.

    They are said to lie on the CPU: autograd's backward asks for a real card. The shapes are the same.
    """
    config = FAMILIES[str(args.model)]() if str(args.model) in FAMILIES else identify(args.model)
    half, size, chosen = forward_dtype(args.device), args.size or config.size, args.checkpointing
    columns = {}
    for args.checkpointing in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True):
            vae = VAE(config.vae)
            torch.set_default_dtype(half if args.rank is not None else torch.float32)
            unet, text = UNet(config.unet), TextEncoder(config.text)
            torch.set_default_dtype(torch.float32)
            base = size_of(unet.parameters())
            nets = make_networks(args, unet, half)
            trained = [x for x in unet.parameters() if x.requires_grad]
            side = size // vae.factor
            z0 = torch.randn(args.batch, 4, side, side)
            cond = text.null_cond(args.batch, (size, size))
            with LiveBytes() as live:
                loss_of(args, nets, z0, cond, cond, torch.Generator()).backward()
            with LiveBytes() as encoding, torch.no_grad():
                vae.moments(torch.randn(1, 3, size, size))
            gradients = size_of(x.grad for x in trained)
        copies = size_of(nets.target_unet.parameters()) + base * half.itemsize // 4 if nets.target_unet else 0
        columns[args.checkpointing] = {
            "UNet": base,
            "teacher and target": copies,
            "LoRA" if args.rank is not None else "input for w": size_of(unet.parameters()) - base,
            "gradients": gradients,
            "Adam's moments": 2 * size_of(trained),
            "average": size_of(trained) if args.average else 0,
            "activations": live.peak - gradients,
        }
        stages = {
            "encoding pictures": size_of(vae.parameters()) + encoding.peak,
            "text encoders": size_of(text.parameters()),
        }
    args.checkpointing = is_large(config) if chosen is None else chosen
    parts, other = columns[args.checkpointing], columns[not args.checkpointing]
    size_text = f"{args.batch} x {size}x{size}, {str(half)[6:]}, checkpointing {'on' if args.checkpointing else 'off'}"
    print(f"{args.objective}, {sum(x.numel() for x in trained):,} parameters to train, batch {size_text}")
    for part, size_in_bytes in parts.items():
        if size_in_bytes:
            print(f"  {part:20} {size_in_bytes / 1e9:7.2f} GB")
    flag = f"--{'no-' * args.checkpointing}checkpointing"
    print(f"  activations with {flag} would be {other['activations'] / 1e9:.2f} GB")
    for stage, size_in_bytes in stages.items():
        print(f"before training, then off the card: {stage} {size_in_bytes / 1e9:.2f} GB")
    total = max(sum(parts.values()), *stages.values()) / 1e9
    if args.plan:
        room = args.plan - total - CUDA_CONTEXT
        fits = f"fits, {room:.2f} GB are left" if room >= 0 else f"does not fit, {-room:.2f} GB are missing"
        print(f"on a card of {args.plan:g} GB, {CUDA_CONTEXT} of them for CUDA itself: {fits}")
    print(f"total {total:.2f} GB")


def is_large(config: Config) -> bool:
    """An official checkpoint, not a small model: gradient checkpointing is worth its time."""
    return config.unet.channels[0] >= 320


# ---- the loop


@contextmanager
def sync_gradients(nets: Networks, unet: UNet, last: bool) -> Iterator[None]:
    """Over several ranks, gradients are averaged in the last of the batches that are accumulated only."""
    if hasattr(unet, "set_requires_gradient_sync"):  # FSDP2
        unet.set_requires_gradient_sync(last)
    with nets.ddp.no_sync() if nets.ddp is not None and not last else nullcontext():
        yield


def start_folder(args: argparse.Namespace) -> None:
    """Make --out, and clear it of what a killed run left half written."""
    args.out.mkdir(parents=True, exist_ok=True)
    if list(args.out.glob("state_*.safetensors")) and not args.resume:
        raise ValueError(f"{args.out} holds a run already; go on with --resume, or give another --out")
    for part in args.out.glob(".*.part"):
        part.unlink()


def check_flags(now: dict[str, str], then: dict[str, str]) -> None:
    """Raises ValueError with both values of the first flag by which a resumed run would be another run."""
    for key, value in now.items():
        if (was := then.get(key)) != value:
            flag = key.replace("_", "-")
            raise ValueError(f"--resume: --{flag} was {was}, is now {value}; give the flags of that run")


def main(args: argparse.Namespace) -> None:
    if args.plan is not None:
        return plan(args)
    rank, world = start_ranks(args.device)
    device, schedule, half = args.device, make_schedule(), forward_dtype(args.device)
    unet, vae, text, config = load_model(args.model)
    if config.unet.w_dim is not None:
        raise ValueError(
            f"{args.model}: a full LCM, which is no base to train on; give the model that it was made from"
        )
    if args.full and config.text.big:
        raise ValueError("--full: a checkpoint with two text encoders cannot be written yet; give --rank N")
    unet = unet.to(device, half if args.rank is not None else torch.float32)  # a frozen base needs no more bits
    vae, text = vae.to(device), text.to(device)
    args.checkpointing = is_large(config) if args.checkpointing is None else args.checkpointing
    size = args.size or config.size
    if rank == 0:
        start_folder(args)

    # ---- what is trained
    nets = make_networks(args, unet, half, world)
    named = {name: x for name, x in unet.named_parameters() if x.requires_grad}
    parameters = list(named.values())
    average = {name: x.detach().clone() for name, x in named.items()} if args.average else {}
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, fused=True)
    say = print if rank == 0 else lambda *_, **__: None
    say(f"training {sum(p.numel() for p in parameters):,} parameters in {len(parameters)} tensors")

    # ---- what it is trained on: z0 and captions of every step, and Cond of them
    model_sha256 = sha256(args.model)  # kept in the LoRA: whoever has it can tell its base
    is_art = args.data.suffix == ".tar" or any(args.data.glob("*.tar"))
    if is_art:  # the emoji art: captions are made anew each time
        art = read_art(args.data)
        if (args.data / "held_out.txt").exists():
            art, _ = split_art(art, args.data / "held_out.txt", list(config.names) or None)
        elif config.names:
            art = [a for a in art if a.name in config.names]
        if not art:
            raise ValueError(f"{args.data}: none of its drawings has a name that {args.model} knows")
        cache = cache_art(vae, art, size, args.looks, args.seed, device)
        captions = [f"{a.name}, {a.style} style" if a.style else a.name for a in art]

        def steps(seed: int, start: int = 0, rank: int = 0, world: int = 1):
            return art_batches(cache, args.batch, seed, start, rank, world)

        def cond_of(captions: list[str], size_ids: Tensor) -> Cond:
            return with_sizes(text.encode(captions), size_ids)
    else:  # a folder: pictures and captions are encoded once and for all runs
        pictures = read_pictures(args.data)
        folder, captions = args.out.parent / "cache", [p.caption for p in pictures]
        targets = buckets(size) if config.unet.adm else [(size, size)]
        cache = cache_latents(vae, model_sha256, pictures, folder, targets, args.looks, device)
        texts = cache_text(text, model_sha256, captions, folder)
        drop = 0.1 if args.objective == "diffusion" else 0.0  # for guidance the model must know "" too

        def steps(seed: int, start: int = 0, rank: int = 0, world: int = 1):
            return batches(cache, args.batch, seed, start, rank, world, drop)

        def cond_of(captions: list[str], size_ids: Tensor) -> Cond:
            return read_cond(texts, captions, size_ids).to(device)

    # eight of the captions, spread over the data, for the sheet
    prompts = (captions[:: max(1, len(captions) // 8)] * 8)[:8]
    null_cond, cond8, null8 = (
        text.null_cond(args.batch),
        text.encode(prompts, (size, size)),
        text.null_cond(8, (size, size)),
    )

    vae.cpu()  # until a sheet is drawn
    if not is_art:
        text.cpu()

    # ---- what is looked at: the teacher's trajectories once, then at every save how far the student is from them
    z_T, _ = fixed_noise((8, 4, size // vae.factor, size // vae.factor), device)
    w = sum(args.w_range) / 2
    if args.objective == "lcm":
        trajectory = guided_trajectory(nets.teacher, z_T, cond8, null8, schedule, w)
    else:
        base = nets.teacher if args.rank is not None else nets.student
        before = guided_trajectory(base, z_T, cond8, null8, schedule, config.guidance - 1, steps=20)[-1].clone()

    # ---- resume
    run = {k: str(v) for k, v in vars(args).items() if k not in NOT_OF_THE_RUN}
    saved_tensors = named | {f"average.{k}": v for k, v in average.items()}
    if nets.target_unet is not None:
        saved_tensors |= {f"target.{k}": v for k, v in nets.target_unet.named_parameters()}
    start = 0
    if args.resume:
        state = latest_state(args.out)
        check_flags(run, read_run(state)["flags"])
        start = load_state(state, saved_tensors, optimizer)["step"]

    def batch_loss(z0: Tensor, captions: list[str], size_ids: Tensor, generator: torch.Generator) -> Tensor:
        cond, null = cond_of(captions, size_ids), with_sizes(null_cond, size_ids)
        return loss_of(args, nets, z0.to(device), cond, null, generator, rank, world)

    fixed = [next(steps(-1 - i, 0, rank, world)) for i in range(8)]

    @torch.no_grad()
    def validate() -> float:
        """The loss at a fixed set of (z0, t, noise): the same numbers' worth of luck every time."""
        total = 0.0
        for z0, captions, size_ids, generator in fixed:
            before = generator.get_state()
            total += batch_loss(z0, captions, size_ids, generator).item() / len(fixed)
            generator.set_state(before)
        return mean_over_ranks(total)[0]

    def save(step: int) -> None:
        """The result and the state; every rank has a part in it, rank 0 writes."""
        recipe = {"objective": args.objective, "steps": str(step), "seed": str(args.seed)}
        recipe |= {"model": args.model.name, "model_sha256": model_sha256}
        if args.objective == "lcm":
            w = ":".join(f"{w:g}" for w in dict.fromkeys(args.w_range))
            recipe |= {"w": w, "k": str(args.k), "K": str(K), "timestep_scaling": f"{T_SCALE:g}"}
        weights = {name: whole(x) for name, x in (average or named).items()}
        tensors = state_tensors(saved_tensors, optimizer)
        if rank != 0:
            return
        if args.rank is not None:
            tau = {path: (weights[f"{path}.lora_up.weight"], weights[f"{path}.lora_down.weight"], lora_alpha)
                   for path, (_, _, lora_alpha) in get_tau(unet).items()}  # fmt: skip
            write_tau(args.out / "lora.safetensors", tau, recipe)
        else:
            save_model(args.out / "model.safetensors", weights, vae, text, replace(config, unet=unet.cfg))
        save_state(args.out / f"state_{step:06d}.safetensors", tensors, {"step": step, "flags": run})
        for old in sorted(args.out.glob("state_*.safetensors"))[:-2]:
            old.unlink()

    @torch.no_grad()
    def watch(step: int, loss: float) -> None:
        """A line of metrics.jsonl and a sheet, by the weights that the file has: the average, if there is one."""
        live = {k: x.detach().clone() for k, x in named.items()} if average else {}
        [named[k].copy_(average[k]) for k in live]
        record = {"step": step, "loss": loss, "fixed_loss": validate()}
        z0, captions, size_ids, _ = fixed[0]
        z0, cond, null = z0.to(device), cond_of(captions, size_ids), with_sizes(null_cond, size_ids)
        if args.objective == "lcm":
            record["loss_by_index"] = loss_by_index(*nets[:3], z0, cond, null, schedule, w, args.k)
            along = consistency_along_trajectory(nets.student, trajectory, cond8, schedule, w)
            record["self_consistency"], record["to_end"] = along
            record["to_teacher"] = distance_to_teacher(nets.student, trajectory, cond8, schedule, w)
            columns = lcm_columns(nets.student, nets.teacher, trajectory, cond8, schedule, w)
        else:
            record["loss_by_band"] = loss_by_band(nets.student, z0, cond, schedule)
            now = guided_trajectory(nets.student, z_T, cond8, null8, schedule, config.guidance - 1, steps=20)[-1]
            columns = {"before, 20 DDIM": before, "now, 20 DDIM": now}
        if args.rank is not None:
            record["delta_norms"] = delta_norms(get_tau(unet))
        [named[k].copy_(x) for k, x in live.items()]
        say(f"step {step} loss {loss:.4f} fixed {record['fixed_loss']:.4f}", flush=True)
        if rank == 0:
            append_metrics(args.out / "metrics.jsonl", record)
            with resident(vae, device):
                sheet = draw_sheet(columns, prompts, vae.decode)
            save_png(args.out / f"step_{step:06d}.png", sheet, f"step {step}")

    data = steps(args.seed, start * args.accumulate, rank, world)
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=None if rank == 0 else True)
    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: finish the step in hand, then save
    for step in progress:
        # warm-up, then cosine
        lr = args.lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss = 0.0
        for i in range(args.accumulate):
            z0, captions, size_ids, generator = next(data)
            with sync_gradients(nets, unet, i == args.accumulate - 1):
                part = batch_loss(z0, captions, size_ids, generator) / args.accumulate
                part.backward()
            loss += part.item()
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, 1.0)).item()
        loss, stopping = mean_over_ranks(loss, float(bool(stop)))  # all ranks must decide alike
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss is {loss}, norm of its gradient {norm} at step {step}, with {captions[0]!r} and others"
            raise ValueError(f"{what}; the last saved state is good, lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        if nets.target_unet is not None:
            update_ema(nets.target_unet, unet)
        if average:
            # average <- mu average + (1 - mu) weights, with mu growing to its rate
            mu = min(args.average, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), [x.detach() for x in named.values()], 1 - mu)

        progress.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stopping:
            save(step + 1)
            watch(step + 1, loss)
        elif (step + 1) % 10 == 0 and rank == 0:
            append_metrics(args.out / "metrics.jsonl", {"step": step + 1, "loss": loss})
        if stopping:
            sys.exit(f"stopped after step {step + 1}; go on with --resume" if rank == 0 else 1)


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:  # before the first step
        sys.exit("train.py: stopped; nothing was trained yet")
