"""Seconds and memory of drawing and training on a GPU, beside diffusers and PEFT; not in CI.

    python -m benchmarks.gpu --out gpu.json         four or five minutes on an H100
    python -m benchmarks.gpu --tiny --device cpu    every line on a processor: no number counts

Random weights and conditions, SD1.5 at 512 x 512 pixels, SDXL and SSD-1B at 1024 x 1024. Sections
of the table:

    machine     a large matrix product and a copy: rates of the card, to place the other numbers
    draw        four LCM steps without guidance, then the VAE, a picture at a time: seconds a
                picture. UNet in float16, the VAE in float16 for SD1.5 and in float32 for the
                others, as SDXL's own overflows in float16
    train       one LCM-LoRA step of rank 64 as train.py takes it, forward in bfloat16, with
                gradient checkpointing, clipping and AdamW; the peak of allocated memory beside
                what `train.py --plan` says
    emoji       draw by the small model: 64 channels in the UNet, 16 x 16 latents, a VAE of factor 8
    decode      the VAE alone, in its number formats and memory layouts
    compile     draw with torch.compile, which works for a minute at the first call

"channels last": what belongs to one pixel lies together in memory, as the card's convolutions want
it. Seconds are medians of five runs (of three slow ones) after one or two that do not count, GB the
peak during them, weights included.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.full_size import LAYERS
from minilcm.files.identify import Config, sd15_config, sdxl_config, ssd1b_config
from minilcm.lcm import sample_lcm
from minilcm.model.text import N_TOKENS
from minilcm.model.unet import Cond, UNet, UNetConfig, emoji
from minilcm.model.vae import VAE, VAEConfig
from minilcm.objective import Networks, Objective, loss_of, make_networks
from minilcm.run.plan import Step, peak_bytes, step_bytes
from minilcm.schedule import make_schedule
from minilcm.solver import guided_eps

FAMILIES = {"SD1.5": sd15_config(), "SSD-1B": ssd1b_config(), "SDXL": sdxl_config()}
EMOJI = replace(
    FAMILIES["SDXL"],
    unet=emoji(),
    vae=VAEConfig((32, 32, 64, 128), res_blocks=1, groups=8),
    size=128,
)
OBJECTIVE = Objective("lcm", rank=64, checkpointing=True)
COLUMNS = ("section", "model", "by", "batch", "seconds", "GB", "remark")

Result = tuple[float | None, float | None, str]  # (seconds, GB, remark)
# () -> z0 (b, 4, h, w); z0 -> pixels (b, 3, H, W)
Sampler = tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]


class Bench(NamedTuple):
    device: str
    half: torch.dtype  # of a UNet that draws
    forward: torch.dtype  # of the forward pass in training
    tiny: bool
    plans: dict[tuple[str, int], Future]  # {(model, batch): ({part: bytes}, parameters)}


def config_of(model: str, tiny: bool) -> Config:
    """The model's sizes; tiny: narrow, and the first only of transformer blocks in a row."""
    config = EMOJI if model == "emoji" else FAMILIES[model]
    if not tiny or model == "emoji":
        return replace(config, size=32) if tiny else config
    u = config.unet

    def first(levels: tuple) -> tuple:
        return tuple(tuple(min(d, 1) for d in level) for level in levels)

    channels = tuple(c // 5 for c in u.channels)
    unet = replace(u, channels=channels, down=first(u.down), up=first(u.up), middle=u.middle and 1)
    return replace(config, unet=unet, vae=replace(config.vae, channels=(32, 64, 64, 64)), size=64)


# ---- measuring


def build(
    bench: Bench, dtype: torch.dtype, make: Callable[[], nn.Module], by: str = ""
) -> nn.Module:
    """make(), frozen, with random weights of `dtype` drawn on the device itself."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(bench.device):
            return make().requires_grad_(False).eval().to(memory_format=layout_of(by))
    finally:
        torch.set_default_dtype(torch.float32)


def layout_of(by: str) -> torch.memory_format:
    return torch.channels_last if "channels last" in by else torch.contiguous_format


def random_cond(bench: Bench, config: Config, batch: int, dtype: torch.dtype) -> Cond:
    """What the text encoders would say: (b, 77, d), and SDXL's (b, adm)."""
    place = dict(device=bench.device, dtype=dtype)
    vector = torch.randn(batch, config.unet.adm, **place) if config.unet.adm else None
    return Cond(torch.randn(batch, N_TOKENS, config.unet.context_dim, **place), vector)


def measure(bench: Bench, work: Callable[[], object]) -> tuple[float, float, float]:
    """(median seconds, those of the first call, peak GB)."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if bench.device == "cuda":
            torch.cuda.synchronize()  # a call returns before its kernels have run
        return time.perf_counter() - start

    first = once()  # kernels are loaded and chosen
    if bench.tiny:
        return once(), first, peak_bytes(bench.device) / 1e9
    if once() < 1:
        once()
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = [once() for _ in range(3)]
    if sum(took) < 5:
        took += [once(), once()]
    return median(took), first, peak_bytes(bench.device) / 1e9


def matrix_product(bench: Bench, *_) -> Result:
    n = 256 if bench.tiny else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=bench.half) for _ in range(2))
    seconds = measure(bench, lambda: [a @ b for _ in range(10)])[0] / 10
    return seconds, None, f"{n} x {n}, {str(bench.half)[6:]}: {2e-12 * n**3 / seconds:.4g} TFLOP/s"


def copy(bench: Bench, *_) -> Result:
    # 4 GiB: no cache holds them
    x = torch.randn(2 ** (20 if bench.tiny else 30), device=bench.device)
    y = torch.empty_like(x)
    seconds = measure(bench, lambda: y.copy_(x))[0]
    return seconds, None, f"{2e-12 * x.nbytes / seconds:.3g} TB/s, read and written"


# ---- drawing


@torch.no_grad()
def draw(bench: Bench, model: str, by: str, batch: int) -> Result:
    """Noise on the CPU -> latents -> pixels."""
    config = config_of(model, bench.tiny)
    vae_dtype = bench.half if model == "SD1.5" else torch.float32
    sample, decode = (by_diffusers if by == "diffusers" else by_minilcm)(
        bench, config, vae_dtype, by, batch
    )
    steps, first, gb_steps = measure(bench, sample)
    z0 = sample().float()  # (b, 4, h, w)
    pixels, _, gb = measure(bench, lambda: [decode(row) for row in z0.split(1)])
    remark = f"UNet {steps / batch:.4f}, VAE {pixels / batch:.4f}" + f", first call {first:.0f}" * (
        by == "compiled"
    )
    return (steps + pixels) / batch, max(gb_steps, gb), remark


def noise(batch: int, config: Config) -> tuple[Tensor, list[torch.Generator]]:
    generators = [torch.Generator().manual_seed(i) for i in range(batch)]
    return torch.stack(
        [torch.randn(4, config.size // 8, config.size // 8, generator=g) for g in generators]
    ), generators


def by_minilcm(
    bench: Bench, config: Config, vae_dtype: torch.dtype, by: str, batch: int
) -> Sampler:
    unet = build(bench, bench.half, lambda: UNet(config.unet), by)
    vae = build(bench, vae_dtype, lambda: VAE(config.vae), by)
    cond, schedule = random_cond(bench, config, batch, bench.half), make_schedule()
    network = unet
    if by == "compiled":
        # reduce-overhead: CUDA graphs, so that the card waits for no launch
        compiled = torch.compile(
            unet, **(dict(backend="eager") if bench.tiny else dict(mode="reduce-overhead"))
        )

        def network(z_t: Tensor, t: int, cond: Cond) -> Tensor:
            # an int would be compiled in
            return compiled(z_t, torch.full((batch,), t, device=bench.device), cond)

    def sample() -> Tensor:
        z_T, generators = noise(batch, config)
        z_T = z_T.to(bench.device, memory_format=layout_of(by))
        return sample_lcm(guided_eps(network, cond, None, 0.0), z_T, schedule, 4, generators)

    return sample, vae.decode


def by_diffusers(
    bench: Bench, config: Config, vae_dtype: torch.dtype, by: str, batch: int
) -> Sampler:
    """What its pipelines do between text encoders and safety checker."""
    from diffusers import AutoencoderKL, LCMScheduler

    unet = build(bench, bench.half, lambda: diffusers_unet(config.unet))
    vae = build(
        bench,
        vae_dtype,
        lambda: AutoencoderKL(
            block_out_channels=config.vae.channels,
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
    )
    words = words_for(random_cond(bench, config, batch, bench.half))
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def sample() -> Tensor:
        z_T, generators = noise(batch, config)
        z_t = z_T.to(bench.device, bench.half)
        scheduler.set_timesteps(4, device=bench.device)
        for t in scheduler.timesteps:
            eps_hat = unet(z_t, t, **words, return_dict=False)[0]
            z_t, z0 = scheduler.step(eps_hat, t, z_t, generators, return_dict=False)
        return z0

    return sample, lambda z0: vae.decode(z0.to(vae_dtype) / config.vae.scale, return_dict=False)[
        0
    ].float()


def diffusers_unet(u: UNetConfig) -> nn.Module:
    """diffusers' UNet of the same sizes: SD1.5's or SDXL's."""
    from diffusers import UNet2DConditionModel

    xl = dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=u.adm,
    )
    return UNet2DConditionModel(
        block_out_channels=u.channels,
        down_block_types=[
            "CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in u.down
        ],
        up_block_types=["CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in u.up],
        transformer_layers_per_block=[max(1, *depths) for depths in u.down],
        attention_head_dim=u.heads
        or [c // u.head_dim for c in u.channels],  # the number of heads, whatever it says
        cross_attention_dim=u.context_dim,
        use_linear_projection=u.linear,
        **(xl if u.adm else {}),
    )


def words_for(cond: Cond) -> dict:
    """A Cond as diffusers' UNet takes it: SDXL's six sizes as numbers, to be embedded there."""
    if cond.vector is None:
        return {"encoder_hidden_states": cond.context}
    sizes = torch.full((len(cond.vector), 6), 1024.0, device=cond.vector.device)
    added = {"text_embeds": cond.vector[:, : -6 * 256], "time_ids": sizes}
    return {"encoder_hidden_states": cond.context, "added_cond_kwargs": added}


@torch.no_grad()
def decode(bench: Bench, model: str, by: str, batch: int) -> Result:
    """The VAE alone, as `by` says: FORMAT, or FORMAT channels last."""
    config = config_of(model, bench.tiny)
    vae = build(bench, getattr(torch, by.split()[0]), lambda: VAE(config.vae), by)
    z0 = torch.randn(batch, 4, config.size // 8, config.size // 8, device=bench.device)
    seconds, _, gb = measure(bench, lambda: vae.decode(z0.to(memory_format=layout_of(by))))
    return seconds / batch, gb, f"{config.size} x {config.size}"


# ---- training


def train(bench: Bench, model: str, by: str, batch: int) -> Result:
    """A step of LCM-LoRA distillation."""
    config = config_of(model, bench.tiny)
    if by == "diffusers":
        nets = networks_by_diffusers(bench, config)
    else:  # a frozen base is read in float16
        nets = make_networks(
            OBJECTIVE, build(bench, bench.half, lambda: UNet(config.unet)), bench.forward
        )
    parameters = [x for x in nets.net.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    z0 = torch.randn(batch, 4, config.size // 8, config.size // 8, device=bench.device)
    cond, null = (random_cond(bench, config, batch, torch.float32) for _ in range(2))
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        loss = loss_of(OBJECTIVE, nets, z0, cond, null, generator)
        loss.backward()
        assert loss.item() >= 0
        torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()

    seconds, _, gb = measure(bench, step)
    remark = f"{sum(x.numel() for x in parameters):,} trained"
    if by != "diffusers":
        planned = sum(bench.plans[model, batch].result()[0].values()) / 1e9
        remark += f", planned {planned:.2f} GB, measured / planned {gb / planned:.3f}"
    return seconds, gb, remark


def networks_by_diffusers(bench: Bench, config: Config) -> Networks:
    """The official SDXL script's way: one UNet, adapters off for the teacher, on for the target."""
    from peft import LoraConfig

    unet = build(bench, bench.forward, lambda: diffusers_unet(config.unet))
    unet.add_adapter(LoraConfig(r=OBJECTIVE.rank, lora_alpha=OBJECTIVE.rank, target_modules=LAYERS))
    for x in unet.parameters():
        if x.requires_grad:
            x.data = x.data.float()
    unet.train()
    unet.enable_gradient_checkpointing()

    def student(z_t: Tensor, t: Tensor, cond: Cond, w: Tensor) -> Tensor:
        with torch.autocast(bench.device, dtype=bench.forward, enabled=bench.device == "cuda"):
            return unet(z_t.to(bench.forward), t, **words_for(cond.to(dtype=bench.forward))).sample

    def teacher(*inputs) -> Tensor:
        unet.disable_adapters()
        eps_hat = student(*inputs)
        unet.enable_adapters()
        return eps_hat

    schedule = make_schedule().to(bench.device)
    return Networks(student, teacher, student, unet, schedule)


# ---- the table


def sections() -> dict[str, list[tuple[Callable, str, str, int]]]:
    """{section: [(function, model, by, batch)]}, what says most first."""
    three, layouts = ("ours", "ours, channels last", "diffusers"), ("", " channels last")
    formats = [
        f"{dtype}{layout}" for dtype in ("float32", "float16", "bfloat16") for layout in layouts
    ]
    return {
        "machine": [(matrix_product, "", "torch", 1), (copy, "", "torch", 1)],
        "draw SD1.5": [(draw, "SD1.5", by, b) for b in (1, 8) for by in three],
        "train SD1.5": [
            (train, "SD1.5", by, b) for b, by in ((1, "ours"), (4, "ours"), (4, "diffusers"))
        ],
        "draw SDXL": [(draw, "SDXL", by, b) for b in (1, 8) for by in three],
        "train SDXL": [(train, "SDXL", "ours", b) for b in (1, 4)],
        "emoji": [(draw, "emoji", "ours", b) for b in (1, 8, 64)],
        "train SSD-1B": [(train, "SSD-1B", "ours", b) for b in (1, 4)],
        "decode": [(decode, model, by, 1) for model in ("SD1.5", "SDXL") for by in formats],
        "compile": [(draw, "SD1.5", "compiled", 1)],
    }


def run_case(bench: Bench, function: Callable, model: str, by: str, batch: int) -> Result:
    """What `function` says; where it cannot, the remark says why."""
    if by == "diffusers" and (
        missing := [name for name in ("diffusers", "peft") if not find_spec(name)]
    ):
        return None, None, f"skipped: no {' and no '.join(missing)} here"
    try:
        return function(bench, model, by, batch)
    except torch.OutOfMemoryError:
        return None, None, "out of memory"
    except Exception as error:  # the other cases are worth their time all the same
        return None, None, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    add(
        "--device",
        choices=["cpu", "cuda"],
        default=cuda,
        help=f"where to run (default here: {cuda})",
    )
    add(
        "--budget",
        type=float,
        default=170,
        metavar="SECONDS",
        help="begin no section later than this (default 170)",
    )
    add(
        "--only",
        nargs="+",
        choices=list(sections()),
        metavar="SECTION",
        help=f"some of: {', '.join(sections())}",
    )
    add(
        "--out", type=Path, metavar="FILE.json", help="write the rows there too, after each of them"
    )
    add(
        "--tiny",
        action="store_true",
        help="narrow networks and small pictures, to try the program, not to measure",
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    start, rows, on_card = time.perf_counter(), [], args.device == "cuda"
    card = torch.cuda.get_device_name() if on_card else "a processor"
    about = {
        "card": card,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "tiny": args.tiny,
    }
    if find_spec("diffusers"):
        import diffusers  # takes seconds, which belong to no case

        about["diffusers"] = diffusers.__version__
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)

    chosen = {
        section: cases
        for section, cases in sections().items()
        if not args.only or section in args.only
    }
    half, forward = (torch.float16, torch.bfloat16) if on_card else (torch.float32, torch.float32)
    bench = Bench(args.device, half, forward, args.tiny, {})
    with ProcessPoolExecutor(6, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for _, model, by, batch in (
            case for cases in chosen.values() for case in cases if case[0] is train
        ):
            if by == "ours":  # fake tensors are slow: plan beside the drawing
                config = config_of(model, args.tiny)
                step = Step(batch, config.size, args.device, forward)
                bench.plans[model, batch] = pool.submit(step_bytes, OBJECTIVE, config, step)
        for section, cases in chosen.items():
            now = time.perf_counter() - start
            for function, model, by, batch in cases:
                if now > args.budget:
                    result = None, None, f"skipped: {now:.0f} s have gone by"
                else:
                    result = run_case(bench, function, model, by, batch)
                gc.collect()  # the case's networks
                if on_card:
                    torch.cuda.empty_cache()
                row = dict(zip(COLUMNS, (section, model, by, batch, *result)))
                rows.append(row)
                cells = [
                    "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)
                    for x in row.values()
                ]
                print(f"| {' | '.join(cells)} |", flush=True)
                if args.out:
                    args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
        pool.shutdown(cancel_futures=True)
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    sys.exit(any(row["remark"].startswith("failed") for row in rows))


if __name__ == "__main__":
    main(parse())
