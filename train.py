"""Train a UNet, or a LoRA for it: the base model, a style, or an LCM-LoRA.

    the paper        python train.py --objective lcm --rank 16 --model weights/emoji/model.safetensors \\
                         --data weights/emoji/art --out runs/lcm --steps 1500
    a style LoRA     python train.py --objective diffusion --rank 8 --data my_pictures --out runs/style --steps 500
    a base model     python train.py --objective diffusion --full --model runs/start.safetensors \\
                         --data weights/emoji/art --out runs/base --steps 14000

diffusion learns to predict the noise in z_t. lcm learns to jump from z_t to the end of the teacher's trajectory: the
teacher is the model itself with its LoRA off, guided by w. --out gets lora.safetensors (or model.safetensors), a sheet
of pictures after every save, and state.safetensors, with which --resume goes on as if never stopped.
"""

import argparse
import math
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minilcm.art import Art, art_batches, cache_art, read_art, split_art
from minilcm.checkpoint import load_model, load_state, save_model, save_state
from minilcm.data import decode, read_pictures
from minilcm.lcm import T_SCALE, K, lcd_loss, sample_lcm
from minilcm.lora import ATTENTION, TARGETS, add_lora, get_tau, lora_off
from minilcm.lora_io import write_tau
from minilcm.memory import default_dtype
from minilcm.pictures import contact_sheet, save_png, to_images
from minilcm.safefile import sha256
from minilcm.schedule import T, diffusion_loss, make_schedule
from minilcm.solver import guided_eps, sample_ddim

SHIPPED = Path(__file__).parent / "weights/emoji/model.safetensors"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"train.py: {message}")  # one line, exit 1
    add = parser.add_argument
    add(
        "--objective",
        choices=["diffusion", "lcm"],
        required=True,
        help="what to learn: eps, or the consistency function",
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, metavar="N", help="train a LoRA of rank N on the frozen UNet")
    size.add_argument("--full", action="store_true", help="train all weights of the UNet (diffusion only)")
    add("--alpha", type=float, help="lora_alpha; the LoRA's strength is alpha / rank (default: the rank)")
    add(
        "--attention-only",
        action="store_true",
        help="LoRA on the attention projections only, as many style LoRAs have it",
    )
    add("--model", type=Path, default=SHIPPED, help="checkpoint to start from (default: the shipped emoji model)")
    add(
        "--data",
        type=Path,
        required=True,
        help=".tar shards, a folder of them, or a folder of pictures with .txt captions",
    )
    add("--out", type=Path, required=True, help="folder for the result, the sheets and the state")
    add("--steps", type=int, default=1000, help="optimizer steps (default 1000)")
    add("--batch", type=int, default=16, help="pictures a step (default 16)")
    add("--lr", type=float, default=3e-4, help="learning rate after warm-up, then cosine to 0 (default 3e-4)")
    add(
        "--w",
        type=float,
        default=7.5,
        help="lcm: guidance strength distilled in, the paper's w = guidance - 1 (default 7.5)",
    )
    add("--k", type=int, default=T // K, help="lcm: skipping interval in timesteps (default 20)")
    add("--looks", type=int, default=8, help="compositions made and encoded of each drawing (default 8)")
    add("--seed", type=int, default=0, help="all randomness comes from it (default 0)")
    add("--save-every", type=int, default=500, metavar="N", help="save and draw a sheet every N steps (default 500)")
    add("--resume", action="store_true", help="go on from --out/state.safetensors")
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: cuda if there)",
    )
    args = parser.parse_args(argv)
    if args.objective == "lcm" and args.full:
        parser.error("--objective lcm needs --rank N")
    for flag in ("steps", "batch", "k", "looks", "save_every"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; give 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch sees no CUDA device; give --device cpu")
    return args


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device, schedule = args.device, make_schedule()
    half = torch.bfloat16 if default_dtype(device) != torch.float32 else torch.float32  # of the UNet's forward only
    unet, vae, text, config = load_model(args.model)
    unet, vae, text = unet.to(device), vae.to(device), text.to(device)
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "state.safetensors").exists() and not args.resume:
        raise ValueError(f"{args.out} holds a run already; go on with --resume, or give another --out")

    # ---- what is trained
    if args.rank is not None:
        targets = ATTENTION if args.attention_only else TARGETS
        parameters = add_lora(unet, args.rank, args.alpha, targets, torch.Generator().manual_seed(args.seed))
        named = {f"{path}.{part}": x for path, tau in get_tau(unet).items() for part, x in zip(("up", "down"), tau)}
    else:
        parameters = list(unet.requires_grad_(True).parameters())
        named = dict(unet.named_parameters())
    # EMA of full weights; a LoRA is written as it is
    average = {name: x.detach().clone() for name, x in named.items()} if args.full else {}
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, fused=True)
    print(f"training {sum(p.numel() for p in parameters):,} parameters in {len(parameters)} tensors")

    # ---- what it is trained on
    if args.data.suffix == ".tar" or any(args.data.glob("*.tar")):
        art = read_art(args.data)
    else:
        art = [Art(p.caption, (), None, decode(p.file.read_bytes()).convert("RGBA")) for p in read_pictures(args.data)]
    if (args.data / "held_out.txt").exists():
        art, _ = split_art(art, args.data / "held_out.txt", list(config.names) or None)
    elif config.names:
        art = [a for a in art if a.style is None or a.name in config.names]
    if not art:
        raise ValueError(f"{args.data}: none of its drawings has a name that {args.model} knows")
    cache = cache_art(vae, art, config.size, args.looks, args.seed, device)
    null_cond = text.null_cond(args.batch)

    model_sha256 = sha256(args.model)  # kept in the LoRA: whoever has it can tell its base

    # ---- resume
    run = {k: str(v) for k, v in vars(args).items() if k not in ("resume", "out", "device", "save_every")}
    start = 0
    if args.resume:
        saved = load_state(
            args.out / "state.safetensors", named | {f"average.{k}": v for k, v in average.items()}, optimizer
        )
        for key, value in run.items():
            if (was := saved["flags"].get(key)) != value:
                raise ValueError(
                    f"--resume: --{key.replace('_', '-')} was {was}, is now {value}; give the flags of that run"
                )
        start = saved["step"]

    # ---- the three networks of Algorithm 1: one UNet with LoRA on, off, and on without gradient

    def student(z_t: Tensor, t: Tensor, cond, w=None) -> Tensor:
        with torch.autocast(device, dtype=half, enabled=half != torch.float32):
            return unet(z_t, t, cond)

    def teacher(z_t: Tensor, t: Tensor, cond, w=None) -> Tensor:
        with lora_off(unet):
            return student(z_t, t, cond)

    def loss_of(z0: Tensor, captions: list[str], size_ids: Tensor, generator: torch.Generator) -> Tensor:
        z0, cond = z0.to(device), text.encode(captions)
        if args.objective == "lcm":
            w_range = (args.w, args.w)
            return lcd_loss(student, teacher, student, z0, cond, null_cond, schedule, generator, w_range, k=args.k)
        t = torch.randint(0, T, (len(z0),), generator=generator)
        eps = torch.randn(z0.shape, generator=generator)
        return diffusion_loss(lambda z_t, t: student(z_t, t, cond), z0, t.to(device), eps.to(device), schedule)

    fixed = [next(art_batches(cache, args.batch, seed=-1 - i)) for i in range(8)]

    @torch.no_grad()
    def validate() -> float:
        """The loss at a fixed set of (z0, t, noise): the same numbers' worth of luck every time."""
        total = 0.0
        for z0, captions, size_ids, generator in fixed:
            before = generator.get_state()
            total += loss_of(z0, captions, size_ids, generator).item() / len(fixed)
            generator.set_state(before)
        return total

    def save(step: int) -> None:
        unet.eval()
        recipe = {"objective": args.objective, "steps": str(step), "seed": str(args.seed)}
        recipe |= {"model": args.model.name, "model_sha256": model_sha256}
        if args.rank is not None:
            if args.objective == "lcm":
                recipe |= {"w": f"{args.w:g}", "k": str(args.k), "K": str(K), "timestep_scaling": f"{T_SCALE:g}"}
            write_tau(args.out / "lora.safetensors", get_tau(unet), recipe)
        else:
            save_model(args.out / "model.safetensors", average, vae, text, config)
        state = named | {f"average.{k}": v for k, v in average.items()}
        save_state(args.out / "state.safetensors", state, optimizer, {"step": step, "flags": run})

    @torch.no_grad()
    def draw(step: int) -> None:
        """Eight fixed prompts, the same noise each time: 4 LCM steps, or 20 guided DDIM steps."""
        prompts = [f"{a.name}, {a.style} style" if a.style else a.name for a in to_draw]
        generators = [torch.Generator().manual_seed(i) for i in range(8)]
        side = config.size // vae.factor
        z_T = torch.stack([torch.randn(4, side, side, generator=g) for g in generators]).to(device)
        live = {k: v.detach().clone() for k, v in named.items()}
        if args.full:  # draw with the average, as the file has it
            [x.copy_(average[k]) for k, x in named.items()]
        cond = text.encode(prompts)
        if args.objective == "lcm":
            z0 = sample_lcm(guided_eps(unet, cond, None, 0.0), z_T, schedule, 4, generators)
        else:
            z0 = sample_ddim(guided_eps(unet, cond, text.null_cond(8), config.guidance - 1), z_T, schedule, 20)
        [x.copy_(live[k]) for k, x in named.items()]
        sheet = contact_sheet(to_images(vae.decode(z0)), prompts, 8)
        save_png(args.out / f"step_{step:06d}.png", sheet, f"step {step}")

    # eight drawings spread over the data, as they would be asked for
    to_draw = (art[:: max(1, len(art) // 8)] * 8)[:8]
    data = art_batches(cache, args.batch, args.seed, start)
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=None)
    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: finish the step in hand, then save
    for step in progress:
        # warm-up, then cosine
        lr = args.lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss = loss_of(*next(data))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not (loss.isfinite() and norm.isfinite()):
            what = f"loss is {loss.item()}, norm of its gradient {norm.item()} at step {step}"
            raise ValueError(f"{what}; the last saved state is good, lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        if args.full:
            # average <- mu average + (1 - mu) weights, with mu growing to 0.9995
            mu = min(0.9995, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), [x.detach() for x in named.values()], 1 - mu)

        progress.set_postfix(loss=f"{loss.item():.4f}", lr=f"{lr:.1e}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stop:
            print(f"step {step + 1} loss {loss.item():.4f} fixed {validate():.4f} lr {lr:.2e}", flush=True)
            save(step + 1)
            draw(step + 1)
        if stop:
            sys.exit(f"stopped after step {step + 1}; go on with --resume")


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:  # before the first step
        sys.exit("train.py: stopped; nothing was trained yet")
