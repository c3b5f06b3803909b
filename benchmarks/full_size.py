"""Parity at full size with diffusers, transformers and open_clip on the same random weights.

    python -m benchmarks.full_size sd15    (or sd2, sdxl, sdxl_v, ssd1b, vega)

Needs the `reference` extra and 16 GB of memory. Makes a checkpoint with random weights under the
official keys and an LCM-LoRA-shaped LoRA (rank 64, alpha 8), lets minilcm compute UNet, UNet + 0.7
LoRA, VAE both ways, TAESD and text, then lets the others, in float32, and prints the largest
difference as a share of the largest value; also with the LoRA as minilcm writes it, read by
diffusers. sd2 and sdxl_v predict v, sdxl_v with zero terminal SNR: with these z0 by 4 LCM and 4
DDIM steps, for sd15 prompt to pixels, 4 LCM steps at 256x256 by diffusers' pipeline. Seeds: each
tensor's from the crc32 of its name.
"""

import argparse
import gc
import gzip
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from minilcm.files.checkpoint import load_checkpoint, load_vae
from minilcm.files.identify import open_checkpoint
from minilcm.files.lora_file import read_tau, write_tau
from minilcm.files.names import to_diffusers_path
from minilcm.files.safetensors_file import read_header, read_tensors, write_tensors
from minilcm.lcm import sample_lcm
from minilcm.lora import target_paths
from minilcm.merge import merge_into
from minilcm.model.tiny_vae import TinyDecoder
from minilcm.model.unet import UNet, sd2, sd15, sdxl, ssd1b, vega
from minilcm.schedule import make_schedule
from minilcm.solver import guided_eps, sample_ddim
from tests.reference.make_reference import fill

HERE = Path(__file__).resolve().parents[1] / "tests/reference"
PROMPT = "a lighthouse in a storm, oil painting"
SIDE = 32  # latents, 256 pixels
OURS = {"sd15": sd15, "sd2": sd2, "sdxl": sdxl, "sdxl_v": sdxl, "ssd1b": ssd1b, "vega": vega}
XL = ("sdxl", "sdxl_v", "ssd1b", "vega")
V = {"sd2": {}, "sdxl_v": {"rescale_betas_zero_snr": True}}  # family: more of diffusers' schedulers


def lora_shapes(family: str) -> dict[str, list[int]]:
    """Keys and shapes of the official LCM-LoRA, or of one that is made alike."""
    official = json.loads(gzip.decompress((HERE / "official_lora_keys.json.gz").read_bytes()))
    if keys := official.get(f"lcm_{family.removesuffix('_v')}"):
        return keys
    with torch.device("meta"):
        unet = UNet(OURS[family]())
    shapes = {}
    for path in target_paths(unet):
        out, *fan_in = unet.get_submodule(path).weight.shape
        name = f"lora_unet_{to_diffusers_path(path, unet.cfg).replace('.', '_')}"
        shapes[f"{name}.lora_up.weight"] = [out, 64, *[1] * (len(fan_in) - 1)]
        shapes[f"{name}.lora_down.weight"] = [64, *fan_in]
        shapes[f"{name}.alpha"] = []
    return shapes


def model_shapes(family: str) -> dict[str, list[int]]:
    """Keys and shapes of a checkpoint, all parts."""
    from open_clip.transformer import TextTransformer

    keys = json.loads(gzip.decompress((HERE / "official_keys.json.gz").read_bytes()))
    with torch.device("meta"):
        unet = {k: list(x.shape) for k, x in UNet(OURS[family]()).state_dict().items()}
        h = TextTransformer(77, 49408, 1024, 16, 24, output_dim=1024).state_dict()
    towers = {"cond_stage_model.transformer.text_model.": keys["clip_l"]}
    if family == "sd2":
        towers = {"cond_stage_model.model.": {k: list(x.shape) for k, x in h.items()}}
    if family in XL:
        towers = {"conditioner.embedders.0.transformer.text_model.": keys["clip_l"]}
        towers["conditioner.embedders.1.model."] = keys["big_g"]
    parts = {"model.diffusion_model.": unet, "first_stage_model.": keys["vae"]} | towers
    shapes = {prefix + k: shape for prefix, part in parts.items() for k, shape in part.items()}
    return shapes | ({"v_pred": [0], "ztsnr": [0]} if family == "sdxl_v" else {})


def make_files(family: str, folder: Path) -> tuple[Path, Path]:
    """(checkpoint, LoRA) with random float16 weights, and TAESD beside them; deltas are about a
    tenth of the weights.
    """
    tensors = {}
    for key, shape in model_shapes(family).items():
        if key.endswith("position_ids"):
            tensors[key] = torch.arange(77)[None]
        else:
            tensors[key] = fill(key, shape).half()
    write_tensors(folder / "model.safetensors", tensors, {})
    tensors = {}
    for key, shape in lora_shapes(family).items():
        tensors[key] = (
            torch.tensor(8.0).half() if key.endswith("alpha") else fill(key, shape).half()
        )
        if key.endswith("lora_up.weight"):
            tensors[key] = tensors[key] * 0.8  # times alpha / rank = 1/8
    write_tensors(folder / "lora.safetensors", tensors, {})
    tiny = {k: fill(k, x.shape).half() for k, x in TinyDecoder().state_dict().items()}
    write_tensors(folder / "taesd.safetensors", tiny, {})
    return folder / "model.safetensors", folder / "lora.safetensors"


def inputs(family: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "z_t": torch.randn(1, 4, SIDE, SIDE, generator=g),
        "pixels": torch.rand(1, 3, 8 * SIDE, 8 * SIDE, generator=g) * 2 - 1,
        "z_T": torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1)),
    }


@torch.no_grad()
def by_minilcm(family: str, model: Path, lora: Path) -> dict[str, Tensor]:
    x, out = inputs(family), {}
    checkpoint = open_checkpoint(model, "v" if family == "sd2" else None)
    unet, vae, text, config = load_checkpoint(checkpoint)
    cond = text.encode([PROMPT], (1024, 1024))
    out["tokens"] = text.tokenize([PROMPT])
    out["tokens_big"] = text.tokenize([PROMPT], pad=0)
    out["context"] = cond.context
    out["vector"] = cond.vector if cond.vector is not None else torch.zeros(1, 1)
    out["eps_hat"] = unet(x["z_t"], 500, cond)
    tau = read_tau(lora)
    merge_into(unet, tau, 0.7)
    out["eps_hat + 0.7 LoRA"] = unet(x["z_t"], 500, cond)
    out["z0"] = vae.encode_mean(x["pixels"])
    out["decoded"] = vae.decode(out["z0"])
    tiny = model.with_name("taesd.safetensors")
    out["decoded, tiny"] = load_vae(tiny, read_header(tiny)[0], config).decode(x["z_t"])
    if family in V:
        eps_fn, schedule = guided_eps(unet, cond, None, 0.0), make_schedule(True, unet.cfg.zero_snr)
        rng = torch.Generator().manual_seed(1)
        z_T = torch.randn(1, 4, SIDE, SIDE, generator=rng)
        out["4 LCM steps, z0"] = sample_lcm(eps_fn, z_T, schedule, 4, [rng])
        out["4 DDIM steps, z0"] = sample_ddim(eps_fn, z_T, schedule, 4)
    if family == "sd15":
        generator = torch.Generator().manual_seed(1)
        z_T = torch.randn(1, 4, SIDE, SIDE, generator=generator)
        z0 = sample_lcm(guided_eps(unet, cond, None, 0.0), z_T, make_schedule(), 4, [generator])
        out["4 steps, pixels"] = vae.decode(z0).clamp(-1, 1)
    return out


def load(module, state: dict[str, Tensor], rename=lambda key: key) -> None:
    """Strictly, but for position_ids, which newer transformers do not keep."""
    state = {
        rename(k): v for k, v in state.items() if not k.endswith(("position_ids", "logit_scale"))
    }
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not [k for k in missing if not k.endswith("position_ids")] and not unexpected, (
        missing[:3],
        unexpected[:3],
    )
    module.eval()


# ---- the networks as diffusers and transformers describe them


SDXL_BLOCKS = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    cross_attention_dim=2048,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


def distilled(down: list, up: list) -> dict:
    """An SDXL of other depths with a bare middle block."""
    depths = dict(transformer_layers_per_block=down, reverse_transformer_layers_per_block=up)
    return SDXL_BLOCKS | depths | dict(mid_block_type="UNetMidBlock2D")


UNETS = {
    "sd15": dict(cross_attention_dim=768, attention_head_dim=8),
    "sd2": dict(
        cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ),
    "sdxl": SDXL_BLOCKS,
    "sdxl_v": SDXL_BLOCKS,
    "ssd1b": distilled([1, [2, 2], [4, 4]], [[4, 4, 10], [2, 1, 1], 1]),
    "vega": distilled([1, [1, 1], [2, 2]], [[2, 2, 2], [1, 1, 1], 1]),
}
VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    scaling_factor=0.18215,
)
# the modules of an LCM-LoRA, by the ends of their names
LAYERS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
).split()


def clip_config(width: int, layers: int, **more):
    """Of CLIP-L's kind: quick GELU, padded with EOS, unless `more` says otherwise."""
    from transformers import CLIPTextConfig

    config = dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
        hidden_act="quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    return CLIPTextConfig(**config | more)


@torch.no_grad()
def by_others(family: str, model: Path, lora: Path, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The others: diffusers' converters, networks and LoRA loader; transformers; open_clip."""
    from diffusers import (
        AutoencoderKL,
        AutoencoderTiny,
        DDIMScheduler,
        LCMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    x, out = inputs(family), {}
    tensors, _ = read_tensors(model)
    if family == "sd2":
        config = clip_config(1024, 23, hidden_act="gelu", pad_token_id=0, projection_dim=512)
        clip_l = CLIPTextModel(config)
        state = convert_open_clip_checkpoint(clip_l, dict(tensors))
        state = {k: x for k, x in state.items() if not k.startswith("text_projection")}
    else:
        clip_l = CLIPTextModel(clip_config(768, 12))
        state = convert_ldm_clip_checkpoint(dict(tensors))
    strip = next(iter(clip_l.state_dict())).startswith("text_model.")
    load(clip_l, state, (lambda k: k) if strip else (lambda k: k.removeprefix("text_model.")))
    states = clip_l(ours["tokens"], output_hidden_states=True)
    added = None
    if family not in XL:
        context, vector = states.last_hidden_state, torch.zeros(1, 1)
    else:
        big = CLIPTextModelWithProjection(clip_config(1280, 32, hidden_act="gelu", pad_token_id=0))
        prefix = "conditioner.embedders.1.model."
        load(big, convert_open_clip_checkpoint(big, dict(tensors), prefix=prefix))
        states_big = big(ours["tokens_big"], output_hidden_states=True)
        context = torch.cat([states.hidden_states[-2], states_big.hidden_states[-2]], dim=-1)
        time_ids = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]])
        added = {"text_embeds": states_big.text_embeds, "time_ids": time_ids}
        vector = states_big.text_embeds
        del big
    out["context"], out["vector"] = context, vector
    del clip_l

    vae = AutoencoderKL(**VAE | ({"scaling_factor": 0.13025} if family in XL else {}))
    load(vae, convert_ldm_vae_checkpoint(dict(tensors), vae.config))
    scale = vae.config.scaling_factor
    out["z0"] = vae.encode(x["pixels"]).latent_dist.mean * scale
    out["decoded"] = vae.decode(out["z0"] / scale).sample
    tiny, theirs = AutoencoderTiny(), read_tensors(model.with_name("taesd.safetensors"))[0]
    theirs = {f"{int(k.split('.')[0]) - 1}.{k.split('.', 1)[1]}": w for k, w in theirs.items()}
    load(tiny.decoder, {f"layers.{k}": w for k, w in theirs.items()})
    out["decoded, tiny"] = tiny.decode(x["z_t"]).sample

    tensors = {k: w for k, w in tensors.items() if k.startswith("model.diffusion_model.")}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[family])
    state = convert_ldm_unet_checkpoint(tensors, unet.config)
    del tensors
    unet.load_state_dict({k: state.pop(k).float() for k in list(state)}, assign=True)
    gc.collect()
    out["eps_hat"] = unet(x["z_t"], 500, context, added_cond_kwargs=added).sample
    pipeline = StableDiffusionXLPipeline if family in XL else StableDiffusionPipeline
    state, alphas = pipeline.lora_state_dict(lora, unet_config=unet.config)
    pipeline.load_lora_into_unet(state, alphas, unet, adapter_name="lcm")
    unet.set_adapters(["lcm"], [0.7])
    out["eps_hat + 0.7 LoRA"] = unet(x["z_t"], 500, context, added_cond_kwargs=added).sample
    if family in V:
        says = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        says |= dict(prediction_type="v_prediction", timestep_spacing="trailing") | V[family]
        ends = dict(clip_sample=False, set_alpha_to_one=False)
        for name, scheduler in (
            ("4 LCM steps, z0", LCMScheduler(**says)),
            ("4 DDIM steps, z0", DDIMScheduler(**says, **ends)),
        ):
            rng = torch.Generator().manual_seed(1)
            z_t = torch.randn(1, 4, SIDE, SIDE, generator=rng)
            scheduler.set_timesteps(4)
            for t in scheduler.timesteps:
                v = unet(z_t, t, context, added_cond_kwargs=added).sample
                z_t = scheduler.step(v, t, z_t, generator=rng).prev_sample
            out[name] = z_t
    for style in (None, "diffusers", "peft"):  # the same LoRA as minilcm writes it
        write_tau(lora.with_name("written.safetensors"), read_tau(lora), {}, style=style)
        state, alphas = pipeline.lora_state_dict(
            lora.with_name("written.safetensors"), unet_config=unet.config
        )
        metadata = read_header(lora.with_name("written.safetensors"))[1].get(
            "lora_adapter_metadata"
        )
        metadata = json.loads(metadata) if metadata else None
        unet.delete_adapters(["lcm"])
        pipeline.load_lora_into_unet(state, alphas, unet, adapter_name="lcm", metadata=metadata)
        unet.set_adapters(["lcm"], [0.7])
        eps_hat = unet(x["z_t"], 500, context, added_cond_kwargs=added).sample
        out[f"written, {style}"] = eps_hat
        ours[f"written, {style}"] = ours["eps_hat + 0.7 LoRA"]
    if family == "sd15":
        scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        pipe = StableDiffusionPipeline(
            vae, None, None, unet, scheduler, None, None, requires_safety_checker=False
        )
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        z_T = torch.randn(1, 4, SIDE, SIDE, generator=generator)
        pictures = pipe(
            prompt_embeds=context,
            latents=z_T,
            generator=generator,
            num_inference_steps=4,
            guidance_scale=1.0,
            height=8 * SIDE,
            width=8 * SIDE,
            output_type="pt",
        ).images
        out["4 steps, pixels"] = pictures * 2 - 1
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=UNETS)
    family = parser.parse_args().family
    with tempfile.TemporaryDirectory() as name:
        model, lora = make_files(family, Path(name))
        gc.collect()
        ours = by_minilcm(family, model, lora)
        gc.collect()
        theirs = by_others(family, model, lora, ours)
    worst = 0.0
    for key, expected in theirs.items():
        got = ours[key][:, : expected.shape[1]] if key == "vector" else ours[key]
        far = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()
        print(f"{key:20} {far:.2e} of the largest value, {expected.abs().max():.2f}")
        if key == "4 steps, pixels":
            levels = (got - expected).abs().mean().item() * 127.5
            print(f"{'':20} mean difference {levels:.4f} of 255 levels")
        else:
            worst = max(worst, far)
    print(f"{family}: worst {worst:.2e}, goal 1e-4")
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main()
