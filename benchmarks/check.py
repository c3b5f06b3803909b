"""Do minilcm and diffusers compute the same, with your own files?

    python -m benchmarks.check sd15.safetensors --lora lcm.safetensors

Without the `reference` extra it only says which files it knows, by their checksums. With it each
program reads the checkpoint and the LoRA files by code of its own, and both get the same tokens,
latents and noise, in float32 on the processor, in pictures of at most 256x256: text, VAE, UNet,
UNet with each LoRA, and 4 steps of LCM and of DDIM with the first. A difference is the largest one
as a share of the largest value. One model is in memory at a time. It stands here and not in the
package, which imports neither diffusers nor transformers.
"""

import gc
import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minilcm.files.checkpoint import Model, load_checkpoint
from minilcm.files.identify import Config, open_checkpoint
from minilcm.files.lora_file import read_tau
from minilcm.files.safetensors_file import read_header, sha256
from minilcm.generate import generate, noise
from minilcm.merge import merge_into
from minilcm.model.text import TextConfig
from minilcm.model.unet import UNetConfig
from minilcm.model.vae import VAEConfig
from minilcm.schedule import make_schedule

PROMPT, SEED, T_MIDDLE = "a lighthouse in a storm, oil painting", 1, 500
# sums in another order differ by at most 5e-6; one tensor 1 % larger, in 96 of 100 cases by more
EQUAL = 2e-5
OFFICIAL = {  # sha256: what it is, as public projects that pin these files give it
    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa": "SD1.5, pruned, EMA only",
    "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b": "SDXL base 1.0",
    "1895a00bfc769a00b0c0c43a95e433e79e9db8a85402b45a33e8448785bde94d": "SSD-1B for A1111",
    "8f90d840e075ff588a58e22c6586e2ae9a6f7922996ee6649a7f01072333afe4": "LCM-LoRA for SD1.5",
    "a764e6859b6e04047cd761c08ff0cee96413a8e004c9f07707530cd776b19141": "LCM-LoRA for SDXL",
}


class Inputs(NamedTuple):
    """What both programs get."""

    z_t: Tensor  # (1, 4, h, w)
    pixels: Tensor  # (1, 3, H, W) in [-1, 1]
    seed: int = SEED  # of z_T and the noise between steps


def check(path: Path, loras: list[Path], prediction: str | None = None) -> bool:
    """Print what the files are, the table of differences and one word; True if all is equal.

    Raises ValueError if a file cannot be read, or diffusers is not installed.
    """
    for file in (path, *loras):
        print(f"{file}: {OFFICIAL.get(sha256(file), 'not one of the official files we know')}")
    differences = compare(path, loras, prediction)
    for part, far in differences.items():
        print(f"{part:34} {far:.1e}{'' if far < EQUAL else '  <- differs'}")
    first = next((part for part, far in differences.items() if not far < EQUAL), None)
    print("equal" if first is None else f"minilcm and diffusers begin to differ at: {first}")
    return first is None


def compare(path: Path, loras: list[Path], prediction: str | None = None) -> dict[str, float]:
    """{part: largest difference as a share of the largest value}, in the order of a picture's
    making.
    """
    for package in ("diffusers", "transformers", "peft"):  # before the minutes our half takes
        if find_spec(package) is None:
            how = 'pip install -e ".[reference]"'
            raise ValueError(f"check needs the reference extra ({package}); {how}")
    model = load_checkpoint(open_checkpoint(path, prediction))
    config = model.config
    if config.unet.w_dim is not None:
        raise ValueError(f"{path}: a full LCM; check the model that it was made from")
    side = min(config.size, 256)
    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(1, 4, side // model.vae.factor, side // model.vae.factor, generator=generator)
    inputs = Inputs(z_t, torch.rand(1, 3, side, side, generator=generator) * 2 - 1)
    tokens = model.text.tokenize([PROMPT]), model.text.tokenize([PROMPT], pad=0)
    ours = by_minilcm(model, loras, inputs)
    del model
    gc.collect()
    theirs = by_diffusers(path, config, loras, inputs, tokens)
    return {part: difference(ours[part], theirs[part]) for part in ours}


def difference(x: Tensor, y: Tensor) -> float:
    return ((x - y).abs().max() / y.abs().max().clamp(min=1e-9)).item()


@torch.no_grad()
def by_minilcm(model: Model, loras: Iterable[Path], x: Inputs) -> dict[str, Tensor]:
    unet, vae, text, config = model
    cond = text.encode([PROMPT], (1024, 1024))
    out = {"text": cond.context}
    if cond.vector is not None:
        out["pooled text"] = cond.vector[:, : config.text.big[0]]
    out["VAE, encode"] = vae.encode_mean(x.pixels)
    out["VAE, decode"] = vae.decode(x.z_t)
    out["UNet"] = unet(x.z_t, T_MIDDLE, cond)
    taus = [{k: v for k, v in read_tau(f).items() if not k.startswith("te")} for f in loras]
    for file, tau in zip(loras, taus):
        merge_into(unet, tau)
        out[f"UNet + {file.stem}"] = unet(x.z_t, T_MIDDLE, cond)
        merge_into(unet, tau, -1.0)
    if taus:
        merge_into(unet, taus[0])
    how = dict(schedule=make_schedule(config.unet.v, config.unet.zero_snr), steps=4)
    for sampler in ("lcm", "ddim"):
        z0 = generate(lambda z, t: unet(z, t, cond), [x.seed], x.z_t.shape[1:], sampler, **how)
        out[f"4 steps of {sampler}, latents"] = z0
        if sampler == "lcm":
            out["4 steps of lcm, pixels"] = vae.decode(z0).clamp(-1, 1)
    return out


# ---- the same networks as diffusers and transformers describe them


def unet_arguments(cfg: UNetConfig) -> dict:
    """Of diffusers' UNet2DConditionModel."""
    kinds = ["CrossAttnDown" if any(level) else "Down" for level in cfg.down]
    kinds_up = ["CrossAttnUp" if any(level) else "Up" for level in cfg.up]
    middle = {None: "UNetMidBlock2D", 0: None}.get(cfg.middle, "UNetMidBlock2DCrossAttn")
    # diffusers calls a number of heads attention_head_dim
    heads = cfg.heads or tuple(width // cfg.head_dim for width in cfg.channels)
    arguments = dict(
        block_out_channels=cfg.channels,
        layers_per_block=len(cfg.down[0]),
        down_block_types=[f"{kind}Block2D" for kind in kinds],
        up_block_types=[f"{kind}Block2D" for kind in kinds_up],
        mid_block_type=middle,
        transformer_layers_per_block=[list(d) if any(d) else 1 for d in cfg.down],
        reverse_transformer_layers_per_block=[list(d) if any(d) else 1 for d in cfg.up],
        attention_head_dim=heads,
        use_linear_projection=cfg.linear,
        cross_attention_dim=cfg.context_dim,
        norm_num_groups=cfg.groups,
    )
    if cfg.adm is not None:
        arguments |= dict(addition_embed_type="text_time", addition_time_embed_dim=256)
        arguments |= dict(projection_class_embeddings_input_dim=cfg.adm)
    return arguments


def vae_arguments(cfg: VAEConfig) -> dict:
    """Of diffusers' AutoencoderKL."""
    levels = len(cfg.channels)
    return dict(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=cfg.channels,
        layers_per_block=cfg.res_blocks,
        norm_num_groups=cfg.groups,
        scaling_factor=cfg.scale,
    )


def clip_arguments(width: int, layers: int, heads: int, open_clip: bool) -> dict:
    """Of transformers' CLIPTextConfig."""
    return dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act="gelu" if open_clip else "quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=0 if open_clip else 49407,
    )


def fill(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Strictly, but for what newer versions do not keep."""
    own = module.state_dict()
    if not next(iter(own)).startswith("text_model."):  # transformers 5 has no such level
        state = {k.removeprefix("text_model."): w for k, w in state.items()}
    state = {k: w for k, w in state.items() if k in own or "position_ids" not in k}
    state.pop("logit_scale", None)
    missing, unexpected = module.load_state_dict(state, strict=False)
    if left := [k for k in missing if "position_ids" not in k] + unexpected:
        raise ValueError(f"diffusers reads other keys from this file, first: {left[0]}")
    return module.float().eval()


def text_by_others(cfg: TextConfig, tensors: dict[str, Tensor], tokens: tuple[Tensor, Tensor]):
    """(context, pooled text or None) by transformers, from tokens padded in either tower's way."""
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_open_clip_checkpoint,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = cfg.width, cfg.layers, cfg.heads
    first = CLIPTextModel(CLIPTextConfig(**clip_arguments(*sizes, cfg.open_clip)))
    if cfg.open_clip:  # whose converter reads half the width from the model
        first.config.projection_dim = cfg.width // 2
        state = convert_open_clip_checkpoint(first, dict(tensors))
        state = {k: w for k, w in state.items() if not k.startswith("text_projection")}
    else:
        state = convert_ldm_clip_checkpoint(dict(tensors))
    states = fill(first, state)(tokens[0], output_hidden_states=True)
    if not cfg.big:
        return states.last_hidden_state, None
    width, layers, heads = cfg.big
    big = CLIPTextModelWithProjection(CLIPTextConfig(**clip_arguments(width, layers, heads, True)))
    prefix = "conditioner.embedders.1.model."
    state = convert_open_clip_checkpoint(big, dict(tensors), prefix=prefix)
    states_big = fill(big, state)(tokens[1], output_hidden_states=True)
    both = states.hidden_states[-2], states_big.hidden_states[-2]
    return torch.cat(both, dim=-1), states_big.text_embeds


def unet_by_diffusers(cfg: UNetConfig, path: Path) -> nn.Module:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from safetensors.torch import load_file

    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_arguments(cfg))
    tensors = {k: w for k, w in load_file(path).items() if k.startswith("model.diffusion_model.")}
    state = convert_ldm_unet_checkpoint(tensors, unet.config)
    del tensors  # each float16 tensor goes when its float32 copy is made
    unet.load_state_dict({k: state.pop(k).float() for k in list(state)}, assign=True)
    return unet


def load_lora(unet: nn.Module, file: Path, xl: bool) -> None:
    """As diffusers' pipeline does, for the UNet alone."""
    from diffusers import StableDiffusionPipeline as SD
    from diffusers import StableDiffusionXLPipeline as SDXL

    pipeline = SDXL if xl else SD
    lora, alphas = pipeline.lora_state_dict(file, unet_config=unet.config)
    said = read_header(file)[1].get("lora_adapter_metadata")
    how = dict(adapter_name=file.stem, metadata=json.loads(said) if said else None)
    pipeline.load_lora_into_unet(lora, alphas, unet, **how)


@torch.no_grad()
def by_diffusers(
    path: Path, config: Config, loras: list[Path], x: Inputs, tokens: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from safetensors.torch import load_file

    tensors, out, v = load_file(path), {}, config.vae
    context, pooled = text_by_others(config.text, tensors, tokens)
    out["text"], added = context, None
    if pooled is not None:
        time_ids = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]])
        out["pooled text"], added = pooled, {"text_embeds": pooled, "time_ids": time_ids}

    vae = AutoencoderKL(**vae_arguments(v))
    fill(vae, convert_ldm_vae_checkpoint(dict(tensors), vae.config))
    out["VAE, encode"] = vae.encode(x.pixels).latent_dist.mean * v.scale
    out["VAE, decode"] = vae.decode(x.z_t / v.scale).sample

    del tensors
    unet = unet_by_diffusers(config.unet, path)

    def eps_of(z_t: Tensor, t: int | Tensor) -> Tensor:
        return unet(z_t, t, context, added_cond_kwargs=added).sample

    out["UNet"] = eps_of(x.z_t, T_MIDDLE)
    for file in loras:
        load_lora(unet, file, xl=pooled is not None)
        unet.set_adapters([file.stem], [1.0])
        out[f"UNet + {file.stem}"] = eps_of(x.z_t, T_MIDDLE)
    if loras:
        unet.set_adapters([loras[0].stem], [1.0])

    says = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    says |= dict(timestep_spacing="trailing", rescale_betas_zero_snr=config.unet.zero_snr)
    says |= dict(prediction_type="v_prediction" if config.unet.v else "epsilon")
    ends = dict(clip_sample=False, set_alpha_to_one=False)
    schedulers = {"lcm": LCMScheduler(**says), "ddim": DDIMScheduler(**says, **ends)}
    for sampler, scheduler in schedulers.items():
        z_t, (generator,) = noise([x.seed], x.z_t.shape[1:])
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            z_t = scheduler.step(eps_of(z_t, t), t, z_t, generator=generator).prev_sample
        out[f"4 steps of {sampler}, latents"] = z_t
        if sampler == "lcm":
            out["4 steps of lcm, pixels"] = vae.decode(z_t / v.scale).sample.clamp(-1, 1)
    return out


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lora", type=Path, action="append", default=[], metavar="FILE")
    says = "what the UNet predicts (default: what the file says, else eps)"
    parser.add_argument("--prediction", choices=["eps", "v"], help=says)
    args = parser.parse_args(argv)
    try:
        sys.exit(not check(args.model, args.lora, args.prediction))
    except (ValueError, OSError) as error:
        sys.exit(f"check: {error}")


if __name__ == "__main__":
    main()
