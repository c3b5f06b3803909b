"""Which keys of a file belong to which part of a model."""

import re
from collections import Counter

from .names import official_key, vae_key
from .safetensors_file import Header

# Key prefixes of each part of a checkpoint; the first is the one that is written
UNET = ("model.diffusion_model.", "diffusion_model.")
VAE_ = ("first_stage_model.", "vae.")
CLIP_L = (
    "cond_stage_model.transformer.text_model.",
    "conditioner.embedders.0.transformer.text_model.",
    "cond_stage_model.transformer.",  # old merges
    "cond_stage_model.model.",  # SD2's OpenCLIP-H, in CLIP-L's place
    "conditioner.embedders.0.model.",
)
BIG_G = ("conditioner.embedders.1.model.transformer.text_model.", "conditioner.embedders.1.model.")
PARTS = UNET, VAE_, CLIP_L, BIG_G
NO_WEIGHT = re.compile(  # buffers, and leftovers of training that no network needs
    r"(betas|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|sqrt_recip(m1)?_alphas_cumprod"
    r"|posterior_\w+|.*\.position_ids|.*\.logit_scale|model_ema\..*|denoiser\.sigmas|loss\..*"
    r"|embedding_manager\..*|global_step|v_pred|ztsnr"
    # of OpenCLIP-H, which SD2 reads up to its last layer but one
    r"|.*\.attn_mask|(cond_stage_model|conditioner\.embedders\.0)\.model\."
    r"(transformer\.resblocks\.23\..*|text_projection))"
)


def part_of(header: Header, prefixes: tuple[str, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{official key below the prefix: (key in the file, shape)} of one part's weights."""
    known = sum(PARTS, ())
    bare = {UNET: ("input_blocks.",), VAE_: ("encoder.conv_in.", "decoder.conv_in.")}
    if any(k.startswith(bare.get(prefixes, ())) for k in header):  # alone in its file
        prefixes += ("",)
    levels = {m[1] for k in header if (m := re.search(r"decoder\.up_blocks\.(\d+)\.", k))}
    part = {}
    for prefix in reversed(prefixes):  # where two give the same key, the first counts
        for k, entry in header.items():
            if next((p for p in known if k.startswith(p)), "") == prefix:
                name = k.removeprefix(prefix)
                name = vae_key(name, len(levels)) if VAE_[0] in prefixes else official_key(name)
                if not NO_WEIGHT.fullmatch(k) and not NO_WEIGHT.fullmatch(name):
                    part[name] = k, entry.shape
    return without_gaps(part) if UNET[0] in prefixes else part


def without_gaps(part: dict) -> dict:
    """The same under LDM's numbers, if diffusers' script has numbered the blocks of a small UNet.

    It counts three blocks a level where small-sd has two, puts the upsampler into the third, and
    leaves the first level's transformers under their names in diffusers.
    """
    blocks, names, n, small = {}, {}, Counter(), False
    for key in part:
        name = re.sub(r"^up_blocks\.0\.attentions\.(\d)\.", r"output_blocks.\1.1.", key)
        if match := re.fullmatch(r"(input|output)_blocks\.(\d+)\.(.+)", name):
            blocks.setdefault((match[1], int(match[2])), {})[match[3]] = key
    for (side, i), keys in sorted(blocks.items()):
        if all(re.fullmatch(r"\d\.conv\.\w+", k) for k in keys):  # the upsampler alone
            place = 2 if any(k.startswith("1.") for k in blocks.get((side, i - 1), ())) else 1
            keys = {f"{place}{k[1:]}": key for k, key in keys.items()}
            n[side] -= 1
            small = True
        names |= {key: f"{side}_blocks.{n[side]}.{k}" for k, key in keys.items()}
        n[side] += 1
    return {names.get(key, key): value for key, value in part.items()} if small else part
