"""Train a UNet, or a LoRA for it: the base model, a style, or an LCM-LoRA.

    the paper        python train.py --objective lcm --rank 64 --model weights/sd15.safetensors --data my_pictures \\
                         --out runs/lcm --steps 1000 --lr 1e-4
    a full LCM       python train.py --objective lcm --full --w 2:14 --lr 1e-6 --model ... --data ... --out runs/full
    a style LoRA     python train.py --objective diffusion --rank 8 --data my_pictures --out runs/style --steps 500
    a base model     python train.py --objective diffusion --full --data weights/emoji/art --out runs/base
    will it fit?     python train.py --objective lcm --rank 64 --model sdxl --plan 12
    many GPUs        torchrun --nproc_per_node 8 train.py ...

diffusion learns to predict the noise in z_t. lcm learns to jump from z_t to the end of the teacher's trajectory: the
teacher is the model itself with its LoRA off (a full LCM: a frozen copy), guided by w. --out gets lora.safetensors (or
model.safetensors), a sheet of pictures and measurements in metrics.jsonl at every save, and the last two states, with
which --resume goes on as if never stopped. Under torchrun, give --shutdown-timeout seconds enough to save on Ctrl-C.
"""

import argparse
import math
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minilcm.data.emoji import art_batches, cache_art, is_art, read_art, split_art
from minilcm.data.folders import batches, buckets, cache_latents, cache_text, read_cond, read_pictures
from minilcm.data.pictures import draw_sheet, save_png
from minilcm.data.shards import stream_batches
from minilcm.files.checkpoint import (
    latest_state,
    load_model,
    load_state,
    read_run,
    save_model,
    save_state,
    state_tensors,
)
from minilcm.files.identify import Config, identify, sd15_config, sdxl_config, ssd1b_config
from minilcm.files.lora_file import write_tau
from minilcm.files.safetensors_file import sha256
from minilcm.lcm import T_SCALE, K, update_ema
from minilcm.lora import ATTENTION, TARGETS, check_rank, get_tau
from minilcm.model.precision import default_dtype, peak_bytes
from minilcm.model.text import TextEncoder, with_sizes
from minilcm.model.unet import Cond
from minilcm.model.vae import VAE
from minilcm.objective import Objective, loss_of, make_networks
from minilcm.run.diagnostics import (
    append_metrics,
    consistency_along_trajectory,
    delta_norms,
    distance_to_teacher,
    fixed_noise,
    guided_trajectory,
    in_parts,
    lcm_columns,
    loss_by_band,
    loss_by_index,
)
from minilcm.run.plan import plan
from minilcm.run.processes import from_all_ranks, mean_over_ranks, start_ranks, sync_gradients, whole
from minilcm.schedule import T, make_schedule

SHIPPED = Path(__file__).parent / "weights/emoji/model.safetensors"
FAMILIES = {"sd15": sd15_config, "ssd1b": ssd1b_config, "sdxl": sdxl_config}
NOT_OF_THE_RUN = ("resume", "out", "device", "save_every", "plan", "w_range")  # flags that do not change its numbers


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
    readers = "shards: processes that read and decode, on each GPU; each needs a shard of its own (default 1)"
    add("--workers", type=int, default=1, metavar="N", help=readers)
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
    for flag in ("steps", "batch", "accumulate", "k", "looks", "workers", "save_every"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; give 1 or more")
    if args.seed < 0 or args.lr < 0:  # negative seeds are those of what is looked at
        parser.error(f"--seed is {args.seed}, --lr is {args.lr}; give 0 or more")
    if args.alpha is not None and not 0 < args.alpha < math.inf:
        parser.error(f"--alpha is {args.alpha}; give a number above 0")
    if args.k >= T:
        parser.error(f"--k is {args.k}; give a number of timesteps below {T}")
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


def forward_dtype(device: str) -> torch.dtype:
    """Of the forward pass: bfloat16 where it is fast. What is trained is float32, as the loss and the schedule are."""
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return torch.float32  # such a card emulates bfloat16
    return torch.bfloat16 if default_dtype(device) != torch.float32 else torch.float32


def is_large(config: Config) -> bool:
    """An official checkpoint, not a small model: gradient checkpointing is worth its time."""
    return config.unet.channels[0] >= 320


def objective_of(args: argparse.Namespace, config: Config) -> Objective:
    targets = ATTENTION if args.attention_only else TARGETS
    large = is_large(config)
    checkpointing = large if args.checkpointing is None else args.checkpointing
    narrow = large and forward_dtype(args.device) == torch.float32
    return Objective(args.objective, args.rank, args.alpha, targets, args.w_range, args.k, checkpointing, narrow)


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


class Data(NamedTuple):
    """What is trained on."""

    prompts: list[str]  # eight captions, for the sheet
    batches: Callable[..., Iterator]  # (seed, start) -> (z0 (b, 4, h, w), captions, size ids (b, 6), generator), ...
    cond_of: Callable[[list[str], Tensor], Cond]  # (captions, size ids)
    positions: list[int]  # in the shards of a stream, of each reading process
    idle: list[nn.Module]  # networks that are not needed any more, but for sheets


def open_data(
    args: argparse.Namespace, vae: VAE, text: TextEncoder, config: Config, model_sha256: str, rank: int, world: int
) -> Data:
    """Find out what --data is. Folders of pictures, and the emoji art's drawings, are encoded here; shards later."""
    size, place = args.size or config.size, dict(rank=rank, world=world)
    drop = 0.1 if args.objective == "diffusion" else 0.0  # for guidance the model must know the null condition too

    def encode(captions: list[str], size_ids: Tensor) -> Cond:
        return with_sizes(text.encode_captions(captions), size_ids)

    def eight(captions: list[str]) -> list[str]:
        return (captions[:: max(1, len(captions) // 8)] * 8)[:8]

    shards = [args.data] if args.data.suffix == ".tar" else sorted(args.data.glob("*.tar"))
    if shards and not is_art(shards[0]):  # shards of captioned pictures, read as they are needed
        positions = [0] * args.workers

        def streamed(seed: int, start: int = 0) -> Iterator:
            at = positions if seed == args.seed else [0] * args.workers
            return stream_batches(vae, shards, size, args.batch, seed, start, **place, positions=at, drop=drop)

        return Data(eight(next(streamed(-1))[1]), streamed, encode, positions, [])

    if shards:  # the emoji art, with captions made anew each time
        art = read_art(args.data)
        if (args.data / "held_out.txt").exists():
            art, _ = split_art(art, args.data / "held_out.txt", list(config.names) or None)
        elif config.names:
            art = [a for a in art if a.name in config.names]
        if not art:
            raise ValueError(f"{args.data}: none of its drawings has a name that {args.model} knows")
        cache = cache_art(vae, art, size, args.looks, args.seed, args.device)
        captions = [f"{a.name}, {a.style} style" if a.style else a.name for a in art]
        drawn = lambda seed, start=0: art_batches(cache, args.batch, seed, start, **place)  # noqa: E731
        return Data(eight(captions), drawn, encode, [], [vae])

    pictures = read_pictures(args.data)
    folder, captions = args.out.parent / "cache", [p.caption for p in pictures]
    targets = buckets(size) if config.unet.adm else [(size, size)]
    latents = cache_latents(vae, model_sha256, pictures, folder, targets, args.looks, args.device)
    texts = cache_text(text, model_sha256, captions, folder)
    return Data(
        eight(captions),
        lambda seed, start=0: batches(latents, args.batch, seed, start, **place, drop=drop),
        lambda captions, size_ids: read_cond(texts, captions, size_ids).to(args.device),
        [],
        [vae, text],
    )


def main(args: argparse.Namespace) -> None:
    device, half, schedule = args.device, forward_dtype(args.device), make_schedule()
    planned = FAMILIES.get(str(args.model)) if args.plan is not None else None
    config = planned() if planned else identify(args.model)
    objective, size = objective_of(args, config), config.size if args.size is None else args.size
    args.checkpointing = objective.checkpointing
    coarsest = 2 ** (len(config.vae.channels) + len(config.unet.channels) - 2)  # pixels per point of the lowest level
    if size < 1 or size % coarsest:
        raise ValueError(f"--size is {size}; give a multiple of {coarsest}")
    if args.plan is not None:
        return plan(objective, config, args.batch, size, device, half, bool(args.average), args.accumulate, args.plan)
    if config.unet.w_dim is not None:
        raise ValueError(
            f"{args.model}: a full LCM, which is no base to train on; give the model that it was made from"
        )
    rank, world = start_ranks(device)
    say = print if rank == 0 else lambda *_, **__: None
    if rank == 0:
        start_folder(args)
    # a frozen base of an official checkpoint is read as most of them are stored
    unet, vae, text, config = load_model(args.model, torch.float16 if args.rank and is_large(config) else torch.float32)
    if args.rank is not None:
        check_rank(unet, args.rank, objective.targets)  # before an hour of encoding
    model_sha256 = sha256(args.model)  # kept in the LoRA: whoever has it can tell its base
    flags = {k: str(v) for k, v in vars(args).items() if k not in NOT_OF_THE_RUN}
    flags |= {"model": f"{args.model.name}, sha256 {model_sha256[:10]}", "ranks": str(world)}
    state = latest_state(args.out) if args.resume else None
    if state is not None:
        check_flags(flags, read_run(state)["flags"])

    # ---- what it is trained on; the UNet comes after what encodes it
    vae, text = vae.to(device), text.to(device, torch.float32)
    data = open_data(args, vae, text, config, model_sha256, rank, world)
    null_cond = text.null_cond(args.batch)
    cond8, null8 = text.encode(data.prompts, (size, size)), text.null_cond(8, (size, size))
    fixed = list(islice(data.batches(-1), 8))  # for the loss that is compared from save to save
    for module in data.idle:
        module.cpu()

    # ---- what is trained
    nets = make_networks(objective, unet.to(device), half, args.seed, world)
    named = {name: x for name, x in unet.named_parameters() if x.requires_grad}
    parameters = list(named.values())
    average = {name: x.detach().clone() for name, x in named.items()} if args.average else {}
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, fused=True)
    say(f"training {sum(p.numel() for p in parameters):,} parameters in {len(parameters)} tensors")

    def batch_loss(z0: Tensor, captions: list[str], size_ids: Tensor, generator: torch.Generator) -> Tensor:
        cond, null = data.cond_of(captions, size_ids), with_sizes(null_cond, size_ids)
        return loss_of(objective, nets, z0.to(device), cond, null, generator, rank, world)

    # ---- what is looked at: the teacher's trajectories once, then at every save how far the student is from them
    z_T, _ = fixed_noise((8, 4, size // vae.factor, size // vae.factor), device)
    w = sum(args.w_range) / 2
    at_once = args.batch if args.checkpointing else 16  # where memory is short, no more than in a step
    student, teacher, target = (in_parts(network, at_once) for network in nets[:3])
    if args.objective == "lcm":
        trajectory = guided_trajectory(teacher, z_T, cond8, null8, schedule, w)
    else:
        before = guided_trajectory(teacher, z_T, cond8, null8, schedule, config.guidance - 1, steps=20)[-1].clone()

    def swap_average() -> None:
        for x, y in zip(named.values(), average.values()):
            kept = x.clone()
            x.copy_(y), y.copy_(kept)

    @torch.no_grad()
    def watch(step: int, loss: float) -> None:
        """A line of metrics.jsonl and a sheet, by the weights that the file has: the average, if there is one."""
        if average:
            swap_average()
        states = [generator.get_state() for *_, generator in fixed]  # the same numbers' worth of luck every time
        fixed_loss = sum(batch_loss(*batch).item() for batch in fixed) / len(fixed)
        [generator.set_state(state) for (*_, generator), state in zip(fixed, states)]
        record = {"step": step, "loss": loss, "fixed_loss": mean_over_ranks(fixed_loss)[0]}
        z0, captions, size_ids, _ = fixed[0]
        z0, cond, null = z0.to(device), data.cond_of(captions, size_ids), with_sizes(null_cond, size_ids)
        if args.objective == "lcm":
            record["loss_by_index"] = loss_by_index(student, teacher, target, z0, cond, null, schedule, w, args.k)
            along = consistency_along_trajectory(student, trajectory, cond8, schedule, w)
            record["self_consistency"], record["to_end"] = along
            record["to_teacher"] = distance_to_teacher(student, trajectory, cond8, schedule, w)
            columns = lcm_columns(student, teacher, trajectory, cond8, schedule, w)
        else:
            record["loss_by_band"] = loss_by_band(student, z0, cond, schedule)
            now = guided_trajectory(student, z_T, cond8, null8, schedule, config.guidance - 1, steps=20)[-1]
            columns = {"before, 20 DDIM": before, "now, 20 DDIM": now}
        if args.rank is not None:
            record["delta_norms"] = delta_norms(get_tau(unet))
        if average:
            swap_average()
        say(f"step {step} loss {loss:.4f} fixed {record['fixed_loss']:.4f}", flush=True)
        if rank == 0:
            append_metrics(args.out / "metrics.jsonl", record)
            vae.to(device)
            sheet = draw_sheet(columns, data.prompts, lambda z0: vae.decode_tiled(z0, tile=64))
            vae.to("cpu" if vae in data.idle else device)
            save_png(args.out / f"step_{step:06d}.png", sheet, f"step {step}")

    # ---- states: all that a run needs to go on
    saved = named | {f"average.{k}": v for k, v in average.items()}
    if nets.target_unet is not None:
        saved |= {f"target.{k}": v for k, v in nets.target_unet.named_parameters()}
    start = 0
    if state is not None:
        then = load_state(state, saved, optimizer)
        start, data.positions[:] = then["step"], then["positions"][rank]
        say(f"{args.out} is at step {start} of {args.steps}" + ", finished" * (start >= args.steps))

    def save(step: int) -> None:
        """The result and the state; every rank has a part in it, rank 0 writes."""
        recipe = {"objective": args.objective, "steps": str(step), "seed": str(args.seed)}
        recipe |= {"model": args.model.name, "model_sha256": model_sha256}
        if args.objective == "lcm":
            w = ":".join(f"{w:g}" for w in dict.fromkeys(args.w_range))
            recipe |= {"w": w, "k": str(args.k), "K": str(K), "timestep_scaling": f"{T_SCALE:g}"}
        weights = {}
        for name, x in (average or named).items():
            x = whole(x)  # one at a time on the cards; all of them in rank 0's main memory only
            weights |= {name: x.detach().cpu()} if rank == 0 else {}
        tensors = state_tensors(saved, optimizer, keep=rank == 0)
        about = {"step": step, "flags": flags, "positions": from_all_ranks(data.positions)}
        if rank != 0:
            return
        if args.rank is not None:
            tau = {path: (weights[f"{path}.lora_up.weight"], weights[f"{path}.lora_down.weight"], lora_alpha)
                   for path, (_, _, lora_alpha) in get_tau(unet).items()}  # fmt: skip
            write_tau(args.out / "lora.safetensors", tau, recipe)
        else:
            save_model(args.out / "model.safetensors", weights, vae, text, replace(config, unet=unet.cfg))
        save_state(args.out / f"state_{step:06d}.safetensors", tensors, about)
        for old in sorted(args.out.glob("state_*.safetensors"))[:-2]:
            old.unlink()

    # ---- the loop
    source = data.batches(args.seed, start * args.accumulate)
    bar = {"unit": " pictures", "unit_scale": args.batch * args.accumulate * world, "initial": start}
    progress = tqdm(range(start, args.steps), total=args.steps, disable=None if rank == 0 else True, **bar)
    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: finish the step in hand, then save
    for step in progress:
        # warm-up, then cosine
        lr = args.lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss = 0.0
        for i in range(args.accumulate):
            z0, captions, size_ids, generator = next(source)
            with sync_gradients(nets.net, i == args.accumulate - 1):
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

        memory = f"{peak_bytes(device) / 1e9:.1f} GB"
        progress.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", memory=memory, refresh=False)
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
        sys.exit("train.py: stopped before the first step")
