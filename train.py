"""Train a UNet, or a LoRA for it: the base model, a style, or an LCM-LoRA.

    the paper        python train.py --objective lcm --rank 64 --model weights/sd15.safetensors --data my_pictures \\
                         --out runs/lcm --steps 1000 --lr 1e-4
    a full LCM       python train.py --objective lcm --full --w 2:14 --lr 1e-6 --model ... --data ... --out runs/full
    a style LoRA     python train.py --objective diffusion --rank 8 --data my_pictures --out runs/style --steps 500
    a base model     python train.py --objective diffusion --full --data weights/emoji/art --out runs/base
    will it fit?     python train.py --objective lcm --rank 64 --model sdxl --plan 12
    many GPUs        torchrun --nproc_per_node 8 train.py ...

diffusion learns to predict the noise in z_t. lcm learns to jump from z_t to the end of the teacher's trajectory: the
teacher is the model itself with its LoRA off (for a full LCM: a frozen copy), guided by w. At every save, --out gets
lora.safetensors (or model.safetensors), a sheet of pictures and a line of measurements in metrics.jsonl. It also keeps
the last two states, from which --resume continues as if never stopped. Under torchrun, a --shutdown-timeout of some
seconds leaves time to save on Ctrl-C.
"""

import argparse
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minilcm.data.open import Data, Reading, open_data
from minilcm.data.pictures import draw_sheet, save_png
from minilcm.files.checkpoint import load_checkpoint, save_model
from minilcm.files.identify import FAMILIES, Checkpoint, Config, is_large, open_checkpoint
from minilcm.files.lora_file import write_tau
from minilcm.files.safetensors_file import sha256
from minilcm.generate import noise
from minilcm.lcm import GRID, T_SCALE, Network, update_ema
from minilcm.lora import ATTENTION, TARGETS, check_rank, get_tau
from minilcm.merge import delta_norms
from minilcm.model.precision import default_dtype
from minilcm.model.text import TextEncoder, with_sizes
from minilcm.model.unet import Cond, UNet
from minilcm.model.vae import VAE
from minilcm.objective import Networks, Objective, learning_rate, loss_of, make_networks, one_process
from minilcm.run.diagnostics import (
    Probe,
    append_metrics,
    diffusion_record,
    guided_ddim,
    guided_trajectory,
    in_parts,
    lcm_record,
)
from minilcm.run.plan import Step, peak_bytes, plan
from minilcm.run.processes import (
    from_all_processes,
    mean_over_processes,
    replicate,
    shard,
    start_processes,
    sync_gradients,
    whole,
)
from minilcm.run.state import latest_state, load_state, read_run, save_state, state_tensors
from minilcm.schedule import T

SHIPPED = Path(__file__).parent / "weights/emoji/model.safetensors"
NOT_OF_THE_RUN = ("resume", "out", "device", "save_every", "plan", "w_range")  # flags that do not change its numbers


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"train.py: {message}")  # one line, exit 1
    add = parser.add_argument
    objectives = "what to learn: the noise, or the consistency function"
    add("--objective", choices=["diffusion", "lcm"], required=True, help=objectives)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, metavar="N", help="train a LoRA of rank N on the frozen UNet")
    size.add_argument("--full", action="store_true", help="train all weights of the UNet; lcm: w becomes an input")
    add("--alpha", type=float, help="lora_alpha; the LoRA's strength is alpha / rank (default: the rank)")
    add("--attention-only", action="store_true", help="LoRA on attention projections only, as in many style LoRAs")
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
    add("--accumulate", type=int, default=1, metavar="N", help="sum the gradients of N batches per step (default 1)")
    recompute = "gradient checkpointing: recompute blocks in the backward pass; slower, much less memory (default: on "
    add("--checkpointing", action=argparse.BooleanOptionalAction, help=recompute + "for large models)")
    add("--size", type=int, metavar="PIXELS", help="width and height of the pictures (default: the model's own size)")
    add("--lr", type=float, default=3e-4, help="learning rate: 100 steps of warm-up, then cosine to 0 (default 3e-4)")
    guidance = "lcm: guidance to distil, the paper's w = guidance - 1; LOW:HIGH for a full LCM (default 7.5, or 2:14)"
    add("--w", metavar="W[:HIGH]", help=guidance)
    add("--k", type=int, default=T // GRID, help="lcm: skipping interval in timesteps (default 20)")
    average = "write an average of the weights, of rate MU (default: 0.9995 for diffusion --full, else none)"
    add("--average", type=float, metavar="MU", help=average)
    add("--looks", type=int, default=8, help="times each picture is cut, or drawing composed, and encoded (default 8)")
    readers = "shards: processes per GPU that read and decode; each needs a shard of its own (default 1)"
    add("--workers", type=int, default=1, metavar="N", help=readers)
    add("--seed", type=int, default=0, help="of all randomness (default 0)")
    add("--save-every", type=int, default=500, metavar="N", help="save and draw a sheet every N steps (default 500)")
    add("--resume", action="store_true", help="continue from the last state in --out")
    plan_help = "print the memory of a training step by part, and whether GB suffice; nothing is trained"
    add("--plan", type=float, nargs="?", const=0.0, metavar="GB", help=plan_help)
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], help="cpu or cuda (default: cuda if available; with --plan cuda)")
    args = parser.parse_args(argv)
    check_values(args, parser.error)
    if args.device == "cuda" and args.plan is None and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch sees no CUDA device; give --device cpu")
    args.device = args.device or (cuda if args.plan is None else "cuda")
    return args


def check_values(args: argparse.Namespace, error: Callable[[str], None]) -> None:
    """Call `error` for the first flag whose value makes no sense; fill in what depends on other flags."""
    if args.plan is None and (args.data is None or args.out is None):
        error("--data and --out are required, except with --plan")
    for flag in ("steps", "batch", "accumulate", "k", "looks", "workers", "save_every"):
        if getattr(args, flag) < 1:
            error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; give 1 or more")
    if args.seed < 0 or args.lr < 0:  # negative seeds are for what is measured
        error(f"--seed is {args.seed}, --lr is {args.lr}; give 0 or more")
    if args.alpha is not None and not 0 < args.alpha < math.inf:
        error(f"--alpha is {args.alpha}; give a number above 0")
    if args.k >= T:
        error(f"--k is {args.k}; give a number of timesteps below {T}")
    if args.average is None and args.objective == "diffusion" and args.full:
        args.average = 0.9995
    if args.average is not None and not 0 < args.average < 1:
        error(f"--average is {args.average}; give a number between 0 and 1")
    args.w = args.w or ("2:14" if args.full else "7.5")
    words = args.w.split(":")
    try:
        args.w_range = float(words[0]), float(words[-1])
    except ValueError:
        args.w_range = math.nan, math.nan
    if not (len(words) <= 2 and 0 <= args.w_range[0] <= args.w_range[1] < math.inf):
        error(f"--w is {args.w}; give a number, or LOW:HIGH, for example 2:14")
    if args.objective == "lcm" and args.rank is not None and len(words) == 2:
        error(f"--w is {args.w}: an LCM-LoRA has no input for w, so one value is distilled; give one number, or --full")


# ---- set-up


def forward_dtype(device: str) -> torch.dtype:
    """Of the forward pass: bfloat16 where it is fast. Trained weights, loss and schedule are float32."""
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return torch.float32  # such a GPU emulates bfloat16
    return torch.bfloat16 if default_dtype(device) != torch.float32 else torch.float32


def objective_of(args: argparse.Namespace, config: Config) -> Objective:
    targets = ATTENTION if args.attention_only else TARGETS
    large = is_large(config)
    checkpointing = large if args.checkpointing is None else args.checkpointing
    narrow = large and forward_dtype(args.device) == torch.float32
    return Objective(args.objective, args.rank, args.alpha, targets, args.w_range, args.k, checkpointing, narrow)


def picture_size(args: argparse.Namespace, config: Config) -> int:
    """Raises ValueError unless the lowest level of the UNet has a whole number of points."""
    size = config.size if args.size is None else args.size
    coarsest = 2 ** (len(config.vae.channels) + len(config.unet.channels) - 2)  # pixels per point of the lowest level
    if size < 1 or size % coarsest:
        raise ValueError(f"--size is {size}; give a multiple of {coarsest}")
    return size


def start_folder(args: argparse.Namespace) -> None:
    """Make --out, and remove what a killed run left half written."""
    args.out.mkdir(parents=True, exist_ok=True)
    if list(args.out.glob("state_*.safetensors")) and not args.resume:
        raise ValueError(f"{args.out} already holds a run; continue it with --resume, or give another --out")
    for part in args.out.glob(".*.part"):
        part.unlink()


def check_flags(now: dict[str, str], then: dict[str, str]) -> None:
    """Raises ValueError with both values of the first flag that would make the resumed run another run."""
    for key, value in now.items():
        if (was := then.get(key)) != value:
            flag = key.replace("_", "-")
            raise ValueError(f"--resume: --{flag} was {was}, is now {value}; give the flags of that run")


class Base(NamedTuple):
    """The model that training starts from."""

    unet: UNet
    vae: VAE
    text: TextEncoder
    config: Config
    sha256: str  # of its file; the LoRA's metadata keeps it, so that its base can be told


def load_base(args: argparse.Namespace, checkpoint: Checkpoint, objective: Objective) -> Base:
    if checkpoint.config.unet.w_dim is not None:
        raise ValueError(f"{args.model}: a full LCM cannot be trained further; give the model that it was made from")
    # float16, in which most official checkpoints are stored, is enough for a frozen base
    frozen = args.rank is not None and is_large(checkpoint.config)
    base = Base(*load_checkpoint(checkpoint, torch.float16 if frozen else torch.float32), sha256(args.model))
    if args.rank is not None:
        check_rank(base.unet, args.rank, objective.targets)  # before an hour of encoding
    return base


class Training(NamedTuple):
    """What is trained."""

    unet: UNet
    nets: Networks
    named: dict[str, Tensor]  # the trained parameters
    average: dict[str, Tensor]  # of them; empty without --average
    optimizer: torch.optim.Optimizer

    def saved(self) -> dict[str, Tensor]:
        """All tensors of a state, but the optimizer's."""
        saved = self.named | {f"average.{k}": v for k, v in self.average.items()}
        if self.nets.target_unet is not None:
            saved |= {f"target.{k}": v for k, v in self.nets.target_unet.named_parameters()}
        return saved

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange weights and average; a second call undoes it."""
        for x, y in zip(self.named.values(), self.average.values()):
            kept = x.clone()
            x.copy_(y), y.copy_(kept)


def start_training(args: argparse.Namespace, objective: Objective, unet: UNet, world: int) -> Training:
    wrap = one_process if world == 1 else shard if args.full else replicate
    nets = make_networks(objective, unet, forward_dtype(args.device), args.seed, wrap)
    named = {name: x for name, x in unet.named_parameters() if x.requires_grad}
    average = {name: x.detach().clone() for name, x in named.items()} if args.average else {}
    optimizer = torch.optim.AdamW(named.values(), lr=args.lr, weight_decay=0.0, fused=True)
    return Training(unet, nets, named, average, optimizer)


# ---- what every save measures and writes


def make_probe(
    args: argparse.Namespace,
    training: Training,
    z0: Tensor,
    conds: tuple[Cond, Cond],
    prompts: tuple[Cond, Cond],
    factor: int,
    size: int,
    config: Config,
) -> Probe:
    """Before the first step: the teacher's trajectories, or what the model draws."""
    _, teacher, _ = in_parts_of(args, training.nets)
    schedule, like = training.nets.schedule, z0.new_empty(8, 4, size // factor, size // factor)
    if args.objective == "lcm":
        w = sum(args.w_range) / 2
        z_T, _ = noise(range(8), like.shape[1:], args.device)
        before = guided_trajectory(teacher, z_T, *prompts, schedule, w)
    else:
        w = config.guidance - 1
        before = guided_ddim(teacher, like, *prompts, schedule, w)
    return Probe(z0, *conds, *prompts, w, before)


@torch.no_grad()
def loss_on(batches: list[tuple], batch_loss: Callable[..., Tensor]) -> float:
    """The mean loss on batches; their generators are restored, so that every evaluation sees the same noise."""
    states = [generator.get_state() for *_, generator in batches]
    loss = sum(batch_loss(*batch).item() for batch in batches) / len(batches)
    for (*_, generator), state in zip(batches, states):
        generator.set_state(state)
    return mean_over_processes(loss)[0]


@torch.no_grad()
def measurements(
    args: argparse.Namespace, training: Training, probe: Probe, fixed_loss: Callable[[], float]
) -> tuple[dict, dict[str, Tensor]]:
    """(measurements, {label: z0} for the sheet) of the weights that are written: the average, if there is one."""
    if training.average:
        training.swap_average()
    student, teacher, target = in_parts_of(args, training.nets)
    schedule = training.nets.schedule
    record = {"fixed_loss": fixed_loss()}
    if args.objective == "lcm":
        more, columns = lcm_record(student, teacher, target, probe, schedule, args.k)
    else:
        more, columns = diffusion_record(student, probe, schedule)
    if args.rank is not None:
        more["delta_norms"] = delta_norms(get_tau(training.unet))
    if training.average:
        training.swap_average()
    return record | more, columns


def in_parts_of(args: argparse.Namespace, nets: Networks) -> tuple[Network, Network, Network]:
    """Student, teacher and target for measuring: if memory is short, on no more images than a training step has."""
    most = args.batch if args.checkpointing else 16
    return tuple(in_parts(network, most) for network in nets[:3])


def write_sheet(path: Path, columns: dict[str, Tensor], data: Data, vae: VAE, device: str, about: str) -> None:
    vae.to(device)
    sheet = draw_sheet(columns, data.prompts, lambda z0: vae.decode_tiled(z0, tile=64))
    vae.to("cpu" if vae in data.idle else device)
    save_png(path, sheet, about)


def recipe_of(args: argparse.Namespace, step: int, model_sha256: str) -> dict[str, str]:
    """What the metadata of a LoRA tells."""
    recipe = {"objective": args.objective, "steps": str(step), "seed": str(args.seed)}
    recipe |= {"model": args.model.name, "model_sha256": model_sha256}
    if args.objective == "lcm":
        w = ":".join(f"{w:g}" for w in dict.fromkeys(args.w_range))
        recipe |= {"w": w, "k": str(args.k), "K": str(GRID), "timestep_scaling": f"{T_SCALE:g}"}
    return recipe


def write_result(args: argparse.Namespace, training: Training, base: Base, run: dict, first: bool) -> None:
    """The result and the state; `run` has step, flags and positions. Every process must call this; the first writes."""
    step = run["step"]
    weights = {}
    for name, x in (training.average or training.named).items():
        x = whole(x)  # one at a time on the GPU; all of them only in the main memory of the first process
        weights |= {name: x.detach().cpu()} if first else {}
    tensors = state_tensors(training.saved(), training.optimizer, keep=first)
    if not first:
        return
    if args.rank is not None:
        tau = {
            path: (weights[f"{path}.lora_up.weight"], weights[f"{path}.lora_down.weight"], lora_alpha)
            for path, (_, _, lora_alpha) in get_tau(training.unet).items()
        }
        write_tau(args.out / "lora.safetensors", tau, recipe_of(args, step, base.sha256))
    else:
        config = replace(base.config, unet=training.unet.cfg)
        save_model(args.out / "model.safetensors", weights, base.vae, base.text, config)
    save_state(args.out / f"state_{step:06d}.safetensors", tensors, run)
    for old in sorted(args.out.glob("state_*.safetensors"))[:-2]:
        old.unlink()


# ---- the run


def main(args: argparse.Namespace) -> None:
    # ---- what is learned, and whether it fits
    official = FAMILIES[str(args.model)].config if args.plan is not None and str(args.model) in FAMILIES else None
    checkpoint = None if official else open_checkpoint(args.model)
    config = official() if official else checkpoint.config
    objective, size = objective_of(args, config), picture_size(args, config)
    args.checkpointing = objective.checkpointing
    if args.plan is not None:
        half = forward_dtype(args.device)
        step = Step(args.batch, size, args.device, half, bool(args.average), args.accumulate)
        return plan(objective, config, step, args.plan)

    # ---- the model, and the state to continue from
    process, world = start_processes(args.device)
    if process == 0:
        start_folder(args)
    base = load_base(args, checkpoint, objective)
    flags = {k: str(v) for k, v in vars(args).items() if k not in NOT_OF_THE_RUN}
    flags |= {"model": f"{args.model.name}, sha256 {base.sha256[:10]}", "ranks": str(world)}
    state = latest_state(args.out) if args.resume else None
    if state is not None:
        check_flags(flags, read_run(state)["flags"])
    train(args, objective, base, size, flags, state, process, world)


def train(
    args: argparse.Namespace,
    objective: Objective,
    base: Base,
    size: int,
    flags: dict[str, str],
    state: Path | None,
    process: int,
    world: int,
) -> None:
    device, first = args.device, process == 0
    say = print if first else lambda *_, **__: None

    # ---- the data; what encodes it leaves the GPU before the UNet comes
    vae, text = base.vae.to(device), base.text.to(device, torch.float32)
    drop = 0.1 if args.objective == "diffusion" else 0.0  # for guidance the model must know the null condition, too
    how = Reading(size, args.batch, args.looks, args.workers, args.seed, drop, device, process, world)
    data = open_data(args.data, vae, text, base.config, base.sha256, args.out.parent / "cache", how)
    null_cond = text.null_cond(args.batch)
    prompts = text.encode(data.prompts, (size, size)), text.null_cond(8, (size, size))
    fixed = list(islice(data.batches(-1), 8))  # for the loss that is compared from save to save
    for module in data.idle:
        module.cpu()

    # ---- what is trained
    training = start_training(args, objective, base.unet.to(device), world)
    say(f"training {sum(x.numel() for x in training.named.values()):,} parameters in {len(training.named)} tensors")

    def batch_loss(z0: Tensor, captions: list[str], size_ids: Tensor, generator: torch.Generator) -> Tensor:
        cond, null = data.cond_of(captions, size_ids), with_sizes(null_cond, size_ids)
        return loss_of(objective, training.nets, z0.to(device), cond, null, generator, process, world)

    # ---- what every save is measured on, and what it writes
    z0, captions, size_ids, _ = fixed[0]
    conds = data.cond_of(captions, size_ids), with_sizes(null_cond, size_ids)
    probe = make_probe(args, training, z0.to(device), conds, prompts, vae.factor, size, base.config)

    def measure(step: int, loss: float) -> None:
        """A line of metrics.jsonl and a sheet, by the weights that the result has: the average, if there is one."""
        record, columns = measurements(args, training, probe, lambda: loss_on(fixed, batch_loss))
        say(f"step {step} loss {loss:.4f} fixed {record['fixed_loss']:.4f}", flush=True)
        if first:
            append_metrics(args.out / "metrics.jsonl", {"step": step, "loss": loss} | record)
            write_sheet(args.out / f"step_{step:06d}.png", columns, data, vae, device, f"step {step}")

    def save(step: int) -> None:
        run = {"step": step, "flags": flags, "positions": from_all_processes(data.positions)}
        write_result(args, training, base, run, first)

    # ---- where it starts
    start = 0
    if state is not None:
        then = load_state(state, training.saved(), training.optimizer)
        start, data.positions[:] = then["step"], then["positions"][process]
        say(f"{args.out} is at step {start} of {args.steps}" + ", finished" * (start >= args.steps))
    loop(args, data, training, batch_loss, save, measure, start, process, world)


def loop(
    args: argparse.Namespace,
    data: Data,
    training: Training,
    batch_loss: Callable[..., Tensor],
    save: Callable[[int], None],
    measure: Callable[[int, float], None],
    start: int,
    process: int,
    world: int,
) -> None:
    _, nets, named, average, optimizer = training
    device, source = args.device, data.batches(args.seed, start * args.accumulate)
    bar = {"unit": " pictures", "unit_scale": args.batch * args.accumulate * world, "initial": start}
    progress = tqdm(range(start, args.steps), total=args.steps, disable=None if process == 0 else True, **bar)
    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: finish the current step, then save
    for step in progress:
        lr = learning_rate(args.lr, step, args.steps)  # warm-up, then cosine
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss = 0.0
        for i in range(args.accumulate):
            z0, captions, size_ids, generator = next(source)
            with sync_gradients(nets.net, i == args.accumulate - 1):
                part = batch_loss(z0, captions, size_ids, generator) / args.accumulate
                part.backward()
            loss += part.item()
        norm = whole(torch.nn.utils.clip_grad_norm_(named.values(), 1.0)).item()
        loss, stopping = mean_over_processes(loss, float(bool(stop)))  # all processes must decide alike
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss is {loss}, norm of its gradient {norm} at step {step}, with {captions[0]!r} and others"
            raise ValueError(f"{what}; the last saved state is good, lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        if nets.target_unet is not None:
            update_ema(nets.target_unet, training.unet)
        if average:
            # average <- mu average + (1 - mu) weights, mu growing to its rate
            mu = min(args.average, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), [x.detach() for x in named.values()], 1 - mu)

        memory = f"{peak_bytes(device) / 1e9:.1f} GB"
        progress.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", memory=memory, refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stopping:
            save(step + 1)
            measure(step + 1, loss)
        elif (step + 1) % 10 == 0 and process == 0:
            append_metrics(args.out / "metrics.jsonl", {"step": step + 1, "loss": loss})
        if stopping:
            sys.exit(f"stopped after step {step + 1}; go on with --resume" if process == 0 else 1)


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:  # before the first step
        sys.exit("train.py: stopped before the first step")
