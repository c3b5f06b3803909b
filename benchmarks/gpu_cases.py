"""What gpu.py measures: (bench, model, by, batch) -> (seconds, GB, remark)."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.check import unet_arguments, vae_arguments
from benchmarks.full_size import LAYERS
from minilcm.files.identify import Config, sd15_config, sdxl_config, ssd1b_config
from minilcm.generate import noise
from minilcm.lcm import lcm_grid, sample_lcm
from minilcm.model.text import N_TOKENS
from minilcm.model.unet import Cond, UNet, emoji
from minilcm.model.vae import VAE, VAEConfig
from minilcm.objective import Networks, Objective, loss_of, make_networks
from minilcm.run.plan import peak_bytes
from minilcm.schedule import make_schedule
from minilcm.solver import guided_eps

FAMILIES = {"SD1.5": sd15_config(), "SSD-1B": ssd1b_config(), "SDXL": sdxl_config()}
SMALL = VAEConfig((32, 32, 64, 128), res_blocks=1, groups=8)
EMOJI = replace(FAMILIES["SDXL"], unet=emoji(), vae=SMALL, size=128)
OBJECTIVE = Objective("lcm", rank=64, checkpointing=True)

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


def latent_shape(config: Config) -> tuple[int, int, int]:
    return 4, config.size // 8, config.size // 8


# ---- measuring


def build(bench: Bench, dtype: torch.dtype, by: str, make: Callable, *args, **kwargs) -> nn.Module:
    """make(...), frozen, with random weights of `dtype` drawn on the device itself."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(bench.device):
            module = make(*args, **kwargs)
    finally:
        torch.set_default_dtype(torch.float32)
    return module.requires_grad_(False).eval().to(memory_format=layout_of(by))


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
    program = by_diffusers if by == "diffusers" else by_minilcm
    sample, decode = program(bench, config, vae_dtype, by, batch)
    steps, first, gb_steps = measure(bench, sample)
    z0 = sample().float()  # (b, 4, h, w)
    pixels, _, gb = measure(bench, lambda: [decode(row) for row in z0.split(1)])
    remark = f"UNet {steps / batch:.4f}, VAE {pixels / batch:.4f}"
    remark += f", first call {first:.0f}" * (by == "compiled")
    return (steps + pixels) / batch, max(gb_steps, gb), remark


def by_minilcm(
    bench: Bench, config: Config, vae_dtype: torch.dtype, by: str, batch: int
) -> Sampler:
    network = unet = build(bench, bench.half, by, UNet, config.unet)
    vae = build(bench, vae_dtype, by, VAE, config.vae)
    cond, schedule = random_cond(bench, config, batch, bench.half), make_schedule()
    if by == "compiled":
        # reduce-overhead: CUDA graphs, so that the card waits for no launch
        how = dict(backend="eager") if bench.tiny else dict(mode="reduce-overhead")
        compiled = torch.compile(unet, **how)

        def network(z_t: Tensor, t: int, cond: Cond) -> Tensor:
            # an int would be compiled in
            return compiled(z_t, torch.full((batch,), t, device=bench.device), cond)

    def sample() -> Tensor:
        z_T, generators = noise(range(batch), latent_shape(config))
        z_T = z_T.to(bench.device, memory_format=layout_of(by))
        return sample_lcm(
            guided_eps(network, cond, None, 0.0), z_T, schedule, lcm_grid(4), generators
        )

    return sample, vae.decode


def by_diffusers(
    bench: Bench, config: Config, vae_dtype: torch.dtype, by: str, batch: int
) -> Sampler:
    """What its pipelines do between text encoders and safety checker."""
    from diffusers import AutoencoderKL, LCMScheduler, UNet2DConditionModel

    unet = build(bench, bench.half, by, UNet2DConditionModel, **unet_arguments(config.unet))
    vae = build(bench, vae_dtype, by, AutoencoderKL, **vae_arguments(config.vae))
    words = words_for(random_cond(bench, config, batch, bench.half))
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def sample() -> Tensor:
        z_T, generators = noise(range(batch), latent_shape(config))
        z_t = z_T.to(bench.device, bench.half)
        scheduler.set_timesteps(4, device=bench.device)
        for t in scheduler.timesteps:
            eps_hat = unet(z_t, t, **words, return_dict=False)[0]
            z_t, z0 = scheduler.step(eps_hat, t, z_t, generators, return_dict=False)
        return z0

    def decode(z0: Tensor) -> Tensor:
        z0 = z0.to(vae_dtype) / config.vae.scale
        return vae.decode(z0, return_dict=False)[0].float()

    return sample, decode


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
    vae = build(bench, getattr(torch, by.split()[0]), by, VAE, config.vae)
    z0 = torch.randn(batch, *latent_shape(config), device=bench.device)
    seconds, _, gb = measure(bench, lambda: vae.decode(z0.to(memory_format=layout_of(by))))
    return seconds / batch, gb, f"{config.size} x {config.size}"


# ---- training


def train(bench: Bench, model: str, by: str, batch: int) -> Result:
    """A step of LCM-LoRA distillation."""
    config = config_of(model, bench.tiny)
    if by == "diffusers":
        nets = networks_by_diffusers(bench, config)
    else:  # a frozen base is read in float16
        unet = build(bench, bench.half, by, UNet, config.unet)
        nets = make_networks(OBJECTIVE, unet, bench.forward)
    parameters = [x for x in nets.net.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    z0 = torch.randn(batch, *latent_shape(config), device=bench.device)
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
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    arguments = unet_arguments(config.unet)
    unet = build(bench, bench.forward, "diffusers", UNet2DConditionModel, **arguments)
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
