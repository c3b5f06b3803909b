"""Train a UNet, or a LoRA for it: the base model, a style, or an LCM-LoRA.

    the report     python train.py --objective lcm --rank 64 --lr 1e-4 --data my_pictures \\
                       --model weights/v1-5-pruned-emaonly.safetensors --out runs/lcm
    no pictures    python train.py --objective lcm --rank 64 --data prompts.txt --out ...
    a full LCM     python train.py --objective lcm --full --w 2:14 --lr 1e-6 --data ... --out ...
    a style LoRA   python train.py --objective diffusion --rank 8 --data my_pictures --out ...
    all weights    python train.py --objective diffusion --full --data weights/emoji/art --out ...
    will it fit?   python train.py --objective lcm --rank 64 --model sdxl --plan 12
    many GPUs      torchrun --nproc_per_node 8 train.py ...

diffusion learns to predict the noise in z_t. lcm learns to jump from z_t to the end of the
teacher's trajectory: the teacher is the model itself with its LoRA off (for a full LCM: a frozen
copy), guided by w. At every save, --out gets lora.safetensors (or model.safetensors; of a full LCM
also its averaged target), a sheet of pictures and a line of measurements in metrics.jsonl. The
fixed loss is the mean over the same 8 batches with the same noise. For lcm it stays flat, since the
student is compared with itself: look at the sheets, and at to_teacher, the distance to where the
teacher's own path ends (of eight pictures only). --resume continues as if never stopped.
"""

import math
import signal
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minilcm.cli.output import run_script
from minilcm.data.batches import Batch, in_background
from minilcm.data.open import Reading, Source, find_data, open_data
from minilcm.files.checkpoint import Model, load_checkpoint
from minilcm.files.identify import FAMILIES, Checkpoint, check_size, is_large, open_checkpoint
from minilcm.files.lora_file import EMOJI, is_shipped, read_tau
from minilcm.files.safetensors_file import sha256
from minilcm.lcm import GRID, update_ema
from minilcm.lora import ATTENTION, TARGETS, check_rank, check_tau, get_tau, set_tau
from minilcm.model.precision import forward_dtype, resident
from minilcm.model.unet import UNet
from minilcm.objective import Objective, learning_rate, loss_of, make_networks, one_process
from minilcm.run import diagnostics, processes
from minilcm.run import state as states
from minilcm.run.plan import Step, peak_bytes, plan
from minilcm.schedule import T


def parse(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"train.py: {message}")  # one line, exit 1
    group = parser.add_argument_group("what is trained")
    add, size = group.add_argument, group.add_mutually_exclusive_group()
    add("--objective", choices=["diffusion", "lcm"], help="learn to predict noise, or to jump")
    size.add_argument("--rank", type=int, metavar="N", help="train a LoRA of this rank")
    size.add_argument("--full", action="store_true", help="train the whole UNet")
    add("--alpha", type=float, help="lora_alpha; the strength is alpha / rank (default: the rank)")
    add("--attention-only", action="store_true", help="LoRA on attention only, as many styles")
    model = "where to start (default: the shipped model); with --plan also sd15, sd2, ssd1b, sdxl"
    add("--model", type=Path, default=EMOJI / "model.safetensors", help=model)
    add("--prediction", choices=["eps", "v"], help="what the UNet predicts (default: by the file)")
    add("--init", type=Path, metavar="FILE", help="a LoRA of this --rank to start from")
    add = parser.add_argument_group("--objective lcm").add_argument
    guidance = "guidance - 1 to distil (default 7.5; for the shipped model give 3); LOW:HIGH draws "
    guidance += "one a picture: a full LCM is told it (default 2:14), a LoRA learns a mixture"
    add("--w", metavar="W|LOW:HIGH", help=guidance)
    add("--k", type=int, help="timesteps in a skip: 20, 40, ... (default 20)")
    psi = "DDIM steps of the teacher in one skip; more let --k be longer (default 1)"
    add("--psi-steps", type=int, metavar="N", help=psi)
    add = parser.add_argument_group("data and output").add_argument
    data = "a .tar shard, a folder of them, or of pictures with captions; or a .txt with a prompt "
    data += "a line, for which the model draws the pictures itself (guided, 25 steps of DDIM)"
    add("--data", type=Path, help=data)
    add("--size", type=int, metavar="PIXELS", help="width and height (default: the model's)")
    looks = "variants of each picture (crop, composition or seed), encoded once (default 8)"
    add("--looks", type=int, default=8, help=looks)
    add("--workers", type=int, default=1, metavar="N", help="shard readers per GPU (default 1)")
    add("--out", type=Path, help="folder for the result, the sheets and the states")
    add("--cache", type=Path, metavar="DIR", help="for encoded pictures (default: cache/ in --out)")
    add("--save-every", type=int, metavar="N", help="in steps (default: steps / 4, 25 to 500)")
    add("--resume", action="store_true", help="continue from the last state in --out")
    add = parser.add_argument_group("steps").add_argument
    add("--steps", type=int, default=1000, help="optimizer steps (default 1000)")
    add("--batch", type=int, default=16, help="pictures at a time, on each GPU (default 16)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches in a step (default 1)")
    rate = "learning rate (default 3e-4), after a warm-up of at most 100 steps; then a cosine to 0"
    add("--lr", type=float, default=3e-4, help=rate)
    add("--constant-lr", action="store_true", help="no warm-up, no cosine: as the official scripts")
    average = "write the weights' average (EMA), decay MU (default with diffusion --full: 0.9995)"
    add("--average", type=float, metavar="MU", help=average)
    add("--seed", type=int, default=0, help="of all randomness, 0 to 2^64 - 1 (default 0)")
    add = parser.add_argument_group("memory and speed").add_argument
    plan_help = "print the memory of a training step, and whether GB suffice; nothing is trained"
    add("--plan", type=float, nargs="?", const=0.0, metavar="GB", help=plan_help)
    recompute = "gradient checkpointing: slower, much less memory (default: on for large models)"
    add("--checkpointing", action=BooleanOptionalAction, help=recompute)
    add("--quantize", action="store_true", help="LoRA: frozen weights in int8, half their memory")
    add("--compile", action="store_true", help="torch.compile: slow to start, then faster")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if available; with --plan cuda")
    args = parser.parse_args(argv)
    check_values(args, parser.error)
    cuda = torch.cuda.is_available() or args.plan is not None
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda, but PyTorch sees no CUDA device; give --device cpu")
    args.device = args.device or ("cuda" if cuda else "cpu")
    return args


def check_values(args: Namespace, error: Callable[[str], None]) -> None:
    """Call `error` for the first senseless value; fill in what depends on other flags."""
    needed = {"--objective": args.objective, "--rank N or --full": args.full or args.rank}
    needed |= {"--data": args.data, "--out": args.out} if args.plan is None else {}
    if missing := [flag for flag, given in needed.items() if given is None]:
        error(f"required: {', '.join(missing)}")
    if args.plan is None and str(args.model) in FAMILIES:
        error(f"--model {args.model} is a name for --plan only; give the checkpoint's file")
    if args.plan is None and args.out.resolve() == args.data.resolve():
        error(f"--out and --data are both {args.out}: sheets would be read as data; give another")
    if args.init is not None and args.alpha is not None:
        error(f"--alpha is {args.alpha}, but --init {args.init} has its own; leave --alpha out")
    for flag in ("init", "quantize"):
        if getattr(args, flag) and args.rank is None:
            error(f"--{flag} is for a LoRA; give --rank in place of --full")
    of_lcm = {"w": "2:14" if args.full else "7.5", "k": T // GRID, "psi_steps": 1}
    for flag, default in of_lcm.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
        elif args.objective != "lcm":
            error(f"--{flag.replace('_', '-')} is for --objective lcm; leave it out")
    if args.save_every is None:
        args.save_every = min(500, max(25, args.steps // 4))
    counts = "steps", "batch", "accumulate", "k", "psi_steps", "looks", "workers", "save_every"
    for flag in counts:
        if getattr(args, flag) < 1:
            error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; give 1 or more")
    if not 0 <= args.seed < 2**64:  # negative seeds are for what is measured
        error(f"--seed is {args.seed}; give 0 to {2**64 - 1}")
    if not 0 <= args.lr < math.inf:
        error(f"--lr is {args.lr}; give 0 or more")
    if args.alpha is not None and not 0 < args.alpha < math.inf:
        error(f"--alpha is {args.alpha}; give a number above 0")
    if args.k >= T:
        error(f"--k is {args.k}; give a number of timesteps below {T}")
    if args.k % (T // GRID):
        where = f"where another begins (t = 19, 39, ..., {T - 1}) or at t = 0"
        error(f"--k is {args.k}; give a multiple of {T // GRID}: a skip must end {where}")
    if args.average is None and args.objective == "diffusion" and args.full:
        args.average = 0.9995
    if args.average is not None and not 0 < args.average < 1:
        error(f"--average is {args.average}; give a number between 0 and 1")
    words = args.w.split(":")
    try:
        args.w_range = float(words[0]), float(words[-1])
    except ValueError:
        args.w_range = math.nan, math.nan
    if not (len(words) <= 2 and 0 <= args.w_range[0] <= args.w_range[1] < math.inf):
        error(f"--w is {args.w}; give a number, or LOW:HIGH, for example 2:14")


# ---- set-up


def objective_of(args: Namespace, large: bool) -> Objective:
    targets = ATTENTION if args.attention_only else TARGETS
    checkpointing = large if args.checkpointing is None else args.checkpointing
    narrow = large and forward_dtype(args.device) == torch.float32
    skip = dict(w_range=args.w_range, k=args.k, psi_steps=args.psi_steps)
    memory = dict(checkpointing=checkpointing, narrow=narrow, quantized=args.quantize)
    return Objective(args.objective, args.rank, args.alpha, targets, **skip, **memory)


def load_base(args: Namespace, checkpoint: Checkpoint, objective: Objective) -> Model:
    """The model that training starts from."""
    if checkpoint.config.unet.w_dim is not None:
        raise ValueError(f"{args.model}: a full LCM is no base; give the model it was made from")
    # float16, in which most official checkpoints are stored, is enough for a frozen base
    frozen = args.rank is not None and is_large(checkpoint.config)
    base = load_checkpoint(checkpoint, torch.float16 if frozen else torch.float32)
    if args.rank is not None:
        check_rank(base.unet, args.rank, objective.targets)  # before an hour of encoding
    if args.init is not None:
        check_tau(base.unet, read_tau(args.init), args.rank, objective.targets, str(args.init))
    return base


def start_training(
    args: Namespace, objective: Objective, unet: UNet, reading: Reading
) -> states.Training:
    wrap = processes.shard if args.full else torch.nn.parallel.DistributedDataParallel
    wrap = wrap if reading.world > 1 else one_process
    nets = make_networks(objective, unet, forward_dtype(args.device), args.seed, wrap)
    if args.init is not None:
        set_tau(unet, read_tau(args.init))
    named = {name: x for name, x in unet.named_parameters() if x.requires_grad}
    average = {name: x.detach().clone() for name, x in named.items()} if args.average else {}
    if reading.process == 0:
        count = sum(x.numel() for x in named.values())
        print(f"training {count:,} parameters in {len(named)} tensors")
    optimizer = torch.optim.AdamW(named.values(), lr=args.lr, weight_decay=0.0, fused=True)
    return states.Training(unet, nets, named, average, optimizer)


# ---- the run


def main(args: Namespace) -> None:
    # ---- what is learned, and whether it fits
    official = FAMILIES.get(str(args.model))  # with --plan only
    checkpoint = None if official else open_checkpoint(args.model, args.prediction)
    config = official.config() if official else checkpoint.config
    objective = objective_of(args, is_large(config))
    size = config.size if args.size is None else args.size
    check_size(config, size)
    args.checkpointing = objective.checkpointing
    if args.plan is not None:
        dtype = forward_dtype(args.device)
        step = Step(args.batch, size, args.device, dtype, bool(args.average), args.accumulate)
        return plan(objective, config, step, args.plan)

    # ---- the data and the folder, which no other run may use
    source = find_data(args.data)
    process, world = processes.start_processes(args.device)
    drop = 0.1 if args.objective == "diffusion" else 0.0
    place = args.device, process, world
    reading = Reading(size, args.batch, args.looks, args.workers, args.seed, drop, *place)
    with states.locked(args.out) if process == 0 else nullcontext():
        if process == 0:
            states.start_folder(args.out, args.resume)
        train(args, objective, load_base(args, checkpoint, objective), source, reading)


def train(
    args: Namespace, objective: Objective, base: Model, source: Source, reading: Reading
) -> None:
    device, size, first = args.device, reading.size, reading.process == 0
    say = tqdm.write if first else lambda _: None  # above the bar, not into it

    # ---- the state to continue from
    model_sha256 = sha256(args.model)  # kept in the LoRA, so that its base can be told
    flags = states.flags_of(args, model_sha256, source.identity(), reading.world)
    state = states.latest_state(args.out) if args.resume else None
    if state is not None:
        states.check_flags(flags, states.read_run(state)["flags"])

    # ---- the data; what encodes it leaves the GPU before the UNet comes
    say(f"reading and encoding {args.data}, before the first step")
    vae, text = base.vae.to(device), base.text.to(device, torch.float32)
    data = open_data(source, base, model_sha256, args.cache or args.out / "cache", reading)
    null_cond = text.null_cond(args.batch)
    sheet_conds = text.encode(data.prompts, (size, size)), text.null_cond(8, (size, size))
    data.free()

    # ---- what is trained
    training = start_training(args, objective, base.unet.to(device), reading)

    def batch_loss(batch: Batch) -> Tensor:
        return loss_of(objective, training.nets, *batch[:4], reading.process, reading.world)

    # ---- what every save measures and writes
    most = args.batch if args.checkpointing else 16  # if memory is short, no more than in a step
    networks = [diagnostics.in_parts(network, most) for network in training.nets[:3]]
    schedule, guidance = training.nets.schedule, base.config.guidance
    fixed = list(islice(data.on_device(device, null_cond, -1), 8))  # compared from save to save
    measured_on = *fixed[0][:3], sheet_conds, size // vae.factor
    probe = diagnostics.make_probe(objective, networks[1], *measured_on, schedule, guidance)

    @torch.compiler.set_stance("force_eager")  # batches of other sizes than the compiled one
    def save(step: int, loss: float) -> None:
        """The result and the state; by the weights written, a line of metrics.jsonl and a sheet."""
        run = {"step": step, "flags": flags, "positions": processes.gather(data.positions)}
        recipe = states.recipe_of_run(objective, step, args.seed, args.model.name, model_sha256)
        states.save_run(args.out, training, base, recipe, run, first)
        training.swap_average()
        fixed_loss, tau = diagnostics.loss_on(fixed, batch_loss), get_tau(training.unet)
        record, columns = diagnostics.measure(objective, networks, probe, schedule, tau)
        training.swap_average()
        say(f"step {step}: loss {loss:.4f}, fixed loss {fixed_loss:.4f}")
        if first:
            losses = {"step": step, "loss": loss, "fixed_loss": fixed_loss}
            diagnostics.append_metrics(args.out / "metrics.jsonl", losses | record)
            with resident(vae, device) if vae in data.idle else nullcontext():
                diagnostics.write_sheet(args.out, step, columns, data.prompts, vae)

    start = states.restore(state, training, data.positions, reading.process) if state else 0
    if state:
        say(f"{args.out} is at step {start} of {args.steps}" + ", finished" * (start >= args.steps))
    drawn = data.on_device(device, null_cond, args.seed, start * args.accumulate)
    if device == "cuda" and not data.positions:  # saved positions must not be ahead of the step
        drawn = in_background(drawn)
    loop(args, drawn, training, batch_loss, save, start, reading)
    say(states.how_to_draw(args, data.prompts[0], is_shipped(args.model)) if first else "")


def loop(
    args: Namespace,
    drawn: Iterator[Batch],
    training: states.Training,
    batch_loss: Callable[[Batch], Tensor],
    save: Callable[[int, float], None],
    start: int,
    reading: Reading,
) -> None:
    unet, nets, named, average, optimizer = training
    first = reading.process == 0
    log = {} if sys.stderr.isatty() else {"mininterval": 60, "maxinterval": 60}  # seconds
    bar = {"total": args.steps, "initial": start, "unit": " steps", "disable": not first}
    progress = tqdm(range(start, args.steps), **bar, **log)
    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: finish the step, then save
    if args.compile:
        unet.compile(dynamic=False)
    for step in progress:
        lr = args.lr if args.constant_lr else learning_rate(args.lr, step, args.steps)
        optimizer.param_groups[0]["lr"] = lr

        loss = 0.0
        for i in range(args.accumulate):
            batch = next(drawn)
            with processes.sync_gradients(nets.net, i == args.accumulate - 1):
                part = batch_loss(batch) / args.accumulate
                part.backward()
            loss += part.item()
        norm = processes.whole(torch.nn.utils.clip_grad_norm_(named.values(), 1.0)).item()
        loss, stopping = processes.mean_over_processes(loss, float(bool(stop)))  # all decide alike
        if not (math.isfinite(loss) and math.isfinite(norm)):
            where = f"at step {step}, with {batch.captions[0]!r} and others"
            what = f"loss is {loss}, norm of its gradient {norm} {where}"
            raise ValueError(f"{what}; the last saved state is good; try a new --out, lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        if nets.target_unet is not None:
            update_ema(nets.target_unet, unet)
        if average:
            training.update_average(args.average, step)

        memory = f"{peak_bytes(args.device) / 1e9:.1f} GB"
        progress.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", memory=memory, refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stopping:
            save(step + 1, loss)
        elif (step + 1) % 10 == 0 and first:
            diagnostics.append_metrics(args.out / "metrics.jsonl", {"step": step + 1, "loss": loss})
        if stopping:
            sys.exit(f"stopped after step {step + 1}; continue with --resume" if first else 1)


if __name__ == "__main__":
    run_script("train.py", main, parse, "stopped before the first step")
