"""Reference tensors by other people's code: run this file to write the four files beside it.

    samplers.safetensors  diffusers' LCM, TCD, DDIM and DPM-Solver++ schedulers around toy_eps
    unet.safetensors      diffusers' UNet2DConditionModel in five small shapes
    vae.safetensors       diffusers' AutoencoderKL, four levels and three, and AutoencoderTiny
    text.safetensors      transformers' CLIPTextModel on open_clip's tokens

The committed files were made on a CPU with torch 2.14.1, diffusers 0.42.1, transformers 5.24.0,
open_clip_torch 3.3.0. Running this needs those packages; tests need torch and safetensors only, so
the others are imported inside functions.

No weight is stored. Models are filled tensor by tensor with fill(LDM key name, LDM shape); a test
fills ours likewise: `model.load_state_dict(filled(about(path)["keys"][kind]))` is strict, so it
also proves that the two key sets are one. The metadata of each file has one entry, "about", a JSON
object: the versions that made it and, for models, keys[kind][name] = shape.
"""

import json
import math
import os
import re
import zlib
from pathlib import Path

import torch
from torch import Tensor

REFERENCE = Path(__file__).resolve().parent
STEPS = (1, 2, 4, 8, 10, 50)
TCD = [(0.0, 4), (0.3, 1), (0.3, 4), (0.75, 8), (1.0, 4)]  # (gamma, steps)
TCD += [(0.3, [800]), (0.9, [999, 600, 361, 20])]  # or the timesteps
PROMPTS = ("", "a slice of pizza", "cat face, noto style, on a red background")


# What the tests import
# ------------------------------------------------------------------------------------------------


def toy_eps(z_t: Tensor, t: int | Tensor) -> Tensor:
    """A network in closed form, (b, c, h, w) and t (an int or (b,)) to (b, c, h, w), smooth and
    nonlinear.

    Roughly what a network trained on data of unit variance would say, so that samplers stay of
    order 1.
    """
    # (b or 1, 1, 1, 1)
    s = torch.as_tensor(t, device=z_t.device).to(z_t.dtype).reshape(-1, 1, 1, 1) / 1000
    channel = torch.arange(z_t.shape[1], device=z_t.device, dtype=z_t.dtype).reshape(1, -1, 1, 1)
    # A pixel with its neighbours in channel, row and column.
    mixed = 0.8 * z_t + 0.4 * z_t.roll(1, 1) - 0.3 * z_t.roll(1, 2) + 0.2 * z_t.roll(-1, 3)
    bent = torch.tanh(mixed + torch.sin(6 * s + channel))
    return torch.sin(1.4 * s) * z_t + 0.5 * torch.cos(1.4 * s) * bent


def generators() -> list[torch.Generator]:
    """One CPU generator per image of the batch of two, seeds 0 and 1."""
    return [torch.Generator().manual_seed(seed) for seed in (0, 1)]


def draw(generators: list[torch.Generator], shape: tuple[int, ...] = (4, 8, 8)) -> Tensor:
    """The next noise of every generator, (len(generators), *shape)."""
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators])


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight called `name`: normal numbers seeded by crc32 of the name, in float32.

    Two or more axes: times fan_in^-0.5. One axis: 1 + 0.1 n for a norm's weight, 0.1 n for a bias.
    """
    normal = torch.randn(
        tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
    )
    if len(shape) > 1:
        return normal * math.prod(shape[1:]) ** -0.5
    return 1 + 0.1 * normal if name.endswith("weight") else 0.1 * normal


def filled(keys: dict[str, list[int]]) -> dict[str, Tensor]:
    """A state dict with these keys and shapes."""
    return {name: fill(name, shape) for name, shape in keys.items()}


def about(path: str | Path) -> dict:
    """The JSON in a reference file's metadata."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["about"])


# Writing
# ------------------------------------------------------------------------------------------------


def versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in packages}


def save(name: str, tensors: dict[str, Tensor], facts: dict) -> None:
    from safetensors.torch import save_file

    for key, x in tensors.items():
        if x.is_floating_point() and not x.isfinite().all():
            raise ValueError(f"{name}: {key} is not finite")
    path = REFERENCE / name
    temporary = path.with_suffix(".tmp")
    # One entry: safetensors does not keep the order of several, and the same tensors must give
    # the same bytes.
    save_file(
        {k: x.contiguous() for k, x in tensors.items()},
        temporary,
        {"about": json.dumps(facts, sort_keys=True)},
    )
    os.replace(temporary, path)
    print(f"{name}: {len(tensors)} tensors, {path.stat().st_size} bytes, {facts['versions']}")
    for key, x in sorted(tensors.items()):
        spread = (
            f"mean {x.mean():+.3f}, std {x.std():.3f}, max {x.abs().max():.2f}"
            if x.is_floating_point()
            else ""
        )
        print(f"  {key:36} {str(tuple(x.shape)):18} {str(x.dtype)[6:]:8} {spread}")


def fill_module(module: torch.nn.Module, to_ldm) -> dict[str, list[int]]:
    """Fill another library's module under LDM names: to_ldm(name, shape) -> (name, shape)."""
    keys = {}
    state = {}
    for name, x in module.state_dict().items():
        if name.endswith("position_ids"):  # a buffer of older transformers, no weight
            state[name] = x
            continue
        ldm_name, ldm_shape = to_ldm(name, tuple(x.shape))
        if ldm_name in keys:
            raise ValueError(f"{name}: a second tensor for {ldm_name}")
        keys[ldm_name] = list(ldm_shape)
        state[name] = fill(ldm_name, ldm_shape).reshape(x.shape)
    module.load_state_dict(state)
    module.eval()
    return keys


# Samplers
# ------------------------------------------------------------------------------------------------


def make_samplers() -> None:
    """z0 that diffusers' schedulers reach from z_T, and the timesteps they stop at."""
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        LCMScheduler,
        TCDScheduler,
    )

    schedule = dict(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000
    )
    z_T = draw(generators())  # (2, 4, 8, 8)
    # the clean latent of img2img
    z_init = 0.8 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    tensors = {"z_T": z_T, "img2img/z_init": z_init, "img2img/noise": z_T.clone()}

    v = dict(prediction_type="v_prediction")  # toy_eps is taken for v
    zero_snr = dict(rescale_betas_zero_snr=True)
    for kind, says in (("v", v), ("v_zero_snr", v | zero_snr)):
        for steps in (1, 4):
            scheduler = LCMScheduler(**schedule, **says, original_inference_steps=50)
            scheduler.set_timesteps(steps, original_inference_steps=50)
            rng = generators()
            z_t = draw(rng)
            for t in scheduler.timesteps:
                z_t, z0 = scheduler.step(toy_eps(z_t, t), t, z_t, generator=rng, return_dict=False)
            tensors[f"lcm_{kind}/{steps}/z0"] = z0

    for strength in (1.0, 0.8, 0.5):
        for steps in STEPS if strength == 1 else (4,):
            scheduler = LCMScheduler(**schedule, original_inference_steps=50)
            scheduler.set_timesteps(steps, original_inference_steps=50, strength=strength)
            key = f"lcm/{steps}" if strength == 1 else f"lcm_s{strength}/{steps}"
            rng = generators()
            z_t = draw(rng)  # z_T again, which leaves rng where the sampler's own noise begins
            if strength < 1:
                z_t = scheduler.add_noise(z_init, z_t, scheduler.timesteps[:1].repeat(2))
                tensors[f"{key}/z_start"] = z_t
            for t in scheduler.timesteps:
                z_t, z0 = scheduler.step(toy_eps(z_t, t), t, z_t, generator=rng, return_dict=False)
            tensors[f"{key}/z0"] = z0
            tensors[f"{key}/timesteps"] = scheduler.timesteps.clone()

    for kind, says in (("", {}), ("_v", v)):
        for gamma, steps in TCD:
            scheduler = TCDScheduler(**schedule, **says, original_inference_steps=50)
            how = {"num_inference_steps": steps} if isinstance(steps, int) else {"timesteps": steps}
            scheduler.set_timesteps(**how)
            rng = generators()
            z_t = draw(rng)
            for t in scheduler.timesteps:
                how = dict(eta=gamma, generator=rng, return_dict=False)
                z_t, _ = scheduler.step(toy_eps(z_t, t), t, z_t, **how)
            tensors[f"tcd{kind}/{gamma}/{steps}/z0"] = z_t
            tensors[f"tcd{kind}/{gamma}/{steps}/timesteps"] = scheduler.timesteps.clone()

    def run(key, make, counts=STEPS):
        for steps in counts:
            scheduler = make()
            scheduler.set_timesteps(steps)
            z_t = z_T
            for t in scheduler.timesteps:
                z_t = scheduler.step(toy_eps(z_t, t), t, z_t, return_dict=False)[0]
            tensors[f"{key}/{steps}/z0"] = z_t
            tensors[f"{key}/{steps}/timesteps"] = scheduler.timesteps.clone()

    # eta is an argument of step, 0 by default
    ddim = dict(**schedule, clip_sample=False, set_alpha_to_one=False)
    run("ddim_trailing", lambda: DDIMScheduler(**ddim, timestep_spacing="trailing", steps_offset=0))
    ends = dict(timestep_spacing="trailing", steps_offset=0)
    run("ddim_v", lambda: DDIMScheduler(**ddim, **v, **ends), (1, 4))
    run("ddim_v_zero_snr", lambda: DDIMScheduler(**ddim, **v, **zero_snr, **ends), (1, 4))
    run("ddim_leading", lambda: DDIMScheduler(**ddim, timestep_spacing="leading", steps_offset=1))
    dpmpp = dict(
        **schedule,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
        use_karras_sigmas=False,
    )
    run("dpmpp_trailing", lambda: DPMSolverMultistepScheduler(**dpmpp, timestep_spacing="trailing"))
    run("dpmpp_linspace", lambda: DPMSolverMultistepScheduler(**dpmpp, timestep_spacing="linspace"))
    save("samplers.safetensors", tensors, {"versions": versions("torch", "diffusers")})


# UNet
# ------------------------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_to_ldm(module: str, res_blocks: int, up_attention: list[bool]) -> str:
    """diffusers' module path to LDM's. res_blocks: per level; up_attention[b]: does up b attend?"""
    if module in UNET_ENDS:
        return UNET_ENDS[module]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", module):
        kind, i, rest = match.groups()
        return (
            f"middle_block.{2 * int(i)}.{RESNET[rest]}"
            if kind == "resnets"
            else f"middle_block.1.{rest}"
        )
    side, b, kind, i, rest = re.fullmatch(
        r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", module
    ).groups()
    first = int(b) * (res_blocks + 1) + (1 if side == "down" else 0)  # input_blocks.0 is conv_in
    block = f"{'input' if side == 'down' else 'output'}_blocks"
    if kind == "resnets":
        return f"{block}.{first + int(i)}.0.{RESNET[rest]}"
    if kind == "attentions":
        return f"{block}.{first + int(i)}.1.{rest}"
    if kind == "downsamplers":
        return f"{block}.{first + res_blocks}.0.op"
    last = 2 if up_attention[int(b)] else 1  # upsamplers: the last part of the level's last block
    return f"{block}.{first + res_blocks}.{last}.conv"


def unet_kinds() -> dict[str, dict]:
    """UNet2DConditionModel's arguments. Its attention_head_dim is here the *number* of heads."""
    down, cross_down = "DownBlock2D", "CrossAttnDownBlock2D"
    up, cross_up = "UpBlock2D", "CrossAttnUpBlock2D"
    common = dict(
        block_out_channels=(32, 64, 64), cross_attention_dim=48, norm_num_groups=8, sample_size=8
    )
    sdxl = dict(
        **common,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,  # pooled text, six time ids
        down_block_types=(down, cross_down, cross_down),
        up_block_types=(cross_up, cross_up, up),
        attention_head_dim=(2, 4, 4),  # heads of width 16
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2, 3],
    )
    return {
        "sd": dict(
            **common,
            down_block_types=(cross_down, cross_down, down),
            up_block_types=(up, cross_up, cross_up),
            attention_head_dim=8,
        ),
        "sdxl": sdxl,
        "ssd": sdxl
        | dict(
            mid_block_type="UNetMidBlock2D",
            transformer_layers_per_block=[1, [1, 2], [2, 1]],
            reverse_transformer_layers_per_block=[[2, 1, 2], [1, 2, 1], 1],
        ),
        "emoji": dict(
            **common,
            layers_per_block=1,
            down_block_types=(down, cross_down, cross_down),
            up_block_types=(cross_up, cross_up, up),
            attention_head_dim=4,
        ),
        "tiny": dict(
            **common,
            layers_per_block=1,
            down_block_types=(cross_down,) * 3,
            mid_block_type=None,
            up_block_types=(cross_up,) * 3,
            attention_head_dim=8,
        ),
    }


@torch.no_grad()
def make_unet() -> None:
    """eps_hat of small UNets at two different t, one per image."""
    from diffusers import UNet2DConditionModel

    g = torch.Generator().manual_seed(3)
    z_t, context, pooled = (
        torch.randn(2, *shape, generator=g) for shape in ((4, 8, 8), (7, 48), (24,))
    )
    t = torch.tensor([37, 801])
    # Original (h, w), crop (top, left), target (h, w).
    time_ids = torch.tensor([[64, 48, 0, 4, 64, 64], [32, 40, 8, 0, 64, 56]])
    tensors = {"z_t": z_t, "t": t, "context": context, "pooled": pooled, "time_ids": time_ids}
    keys = {}
    for kind, arguments in unet_kinds().items():
        unet = UNet2DConditionModel(**arguments)
        up_attention = [name.startswith("CrossAttn") for name in arguments["up_block_types"]]

        def to_ldm(name, shape):
            module, leaf = name.rsplit(".", 1)
            return (
                f"{unet_to_ldm(module, unet.config.layers_per_block, up_attention)}.{leaf}",
                shape,
            )

        keys[kind] = fill_module(unet, to_ldm)
        added = None
        if unet.config.addition_embed_type == "text_time":
            added = {"text_embeds": pooled, "time_ids": time_ids}

            def keep_vector(module, inputs):  # what label_emb reads: pooled, then the six sinusoids
                tensors["vector"] = inputs[0].clone()

            unet.add_embedding.register_forward_pre_hook(keep_vector)
        tensors[f"{kind}/eps_hat"] = unet(z_t, t, context, added_cond_kwargs=added).sample
    save("unet.safetensors", tensors, {"versions": versions("torch", "diffusers"), "keys": keys})


# VAE
# ------------------------------------------------------------------------------------------------

VAE_NAMES = (
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
    ("downsamplers.0.conv", "downsample.conv"),
    ("upsamplers.0.conv", "upsample.conv"),
    ("resnets", "block"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)


def vae_to_ldm(name: str, shape: tuple[int, ...], levels: int) -> tuple[str, tuple[int, ...]]:
    """Name and shape of a VAE tensor in LDM: decoder.up by resolution, attention as 1x1 convs."""
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for theirs, ldm in VAE_NAMES:
        name = re.sub(rf"(?<=\.){re.escape(theirs)}(?=\.)", ldm, name)
    return name, (*shape, 1, 1) if re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name) else shape


@torch.no_grad()
def make_vae() -> None:
    """Posterior mean and std of pixels, and pixels of a latent, all without the scale factor."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    g = torch.Generator().manual_seed(4)
    pixels = torch.rand(2, 3, 32, 32, generator=g) * 2 - 1
    tensors = {"pixels": pixels}
    keys = {}
    for kind, channels, res_blocks in (("f8", (16, 16, 32, 32), 2), ("f4", (16, 32, 32), 1)):
        levels = len(channels)
        vae = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=res_blocks,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=32,
        )
        keys[kind] = fill_module(vae, lambda name, shape: vae_to_ldm(name, shape, levels))
        posterior = vae.encode(pixels).latent_dist
        z = torch.randn(posterior.mean.shape, generator=g)
        tensors |= {f"{kind}/mean": posterior.mean, f"{kind}/std": posterior.std}
        tensors |= {f"{kind}/z": z, f"{kind}/decoded": vae.decode(z).sample}
    tiny = AutoencoderTiny(encoder_block_out_channels=(64,), num_encoder_blocks=(1,))
    keys["tiny"] = fill_module(tiny.decoder, lambda name, shape: (f"decoder.{name}", shape))
    tensors["tiny/decoded"] = tiny.decode(tensors["f8/z"]).sample
    save("vae.safetensors", tensors, {"versions": versions("torch", "diffusers"), "keys": keys})


# Text
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def make_text() -> None:
    """Small text encoders: CLIP-L as in SD1.5 and in SDXL (a layer less, no final norm); bigG."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    bos, eos, length = 49406, 49407, 77
    tokenizer = SimpleTokenizer()
    rows = [[bos, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    # (3, 77), padded with eos
    tokens = torch.tensor([row + [eos] * (length - len(row)) for row in rows])

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=4 * 32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=length,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    model = CLIPTextModel(config)
    keys = fill_module(model, lambda name, shape: (name.removeprefix("text_model."), shape))
    out = model(tokens, output_hidden_states=True)
    tensors = {
        "tokens": tokens,
        "last_hidden_state": out.last_hidden_state,
        "penultimate": out.hidden_states[-2],
    }

    big = CLIPTextConfig(
        **config.to_dict()
        | dict(
            hidden_size=48,
            intermediate_size=4 * 48,
            projection_dim=48,
            hidden_act="gelu",
            pad_token_id=0,
        )
    )
    model = CLIPTextModelWithProjection(big).eval()
    keys_big = fill_module(
        model, lambda name, shape: ("big." + name.removeprefix("text_model."), shape)
    )
    # padded with 0
    tokens = torch.tensor([row + [eos] + [0] * (length - 1 - len(row)) for row in rows])
    out = model(tokens, output_hidden_states=True)
    tensors |= {
        "tokens_big": tokens,
        "penultimate_big": out.hidden_states[-2],
        "pooled": out.text_embeds,
    }
    made_by = versions("torch", "transformers", "open_clip_torch")
    about = {"versions": made_by, "keys": {"clip": keys, "big": keys_big}, "prompts": PROMPTS}
    save("text.safetensors", tensors, about)


if __name__ == "__main__":
    make_samplers()
    make_unet()
    make_vae()
    make_text()
