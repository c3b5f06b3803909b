"""The keys of a LoRA file, in the spellings that people have -> tensors by module.

G1  lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight   kohya, diffusers' names: SD1.x
G2  lora_unet_input_blocks_4_1_proj_in.lora_down.weight             kohya, LDM names: SDXL
G3  lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha              kohya, text encoders
G4  unet.down_blocks.1.attentions.0.proj_in.lora_A.weight           PEFT, diffusers today
G5  unet.down_blocks.1.attentions.0.[...].processor.to_q_lora.down.weight    diffusers of 2023
G6  diffusion_model.input_blocks.4.1.proj_in.lora_up.weight         ComfyUI, LDM names
    text_encoders.clip_g.transformer.text_model.[...].lora_up.weight
G7  unet.input_blocks.4.1.proj_in.lora_up.weight, clip_g.text_model.[...]    OneTrainer
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from ..merge import no_kernel
from .safetensors_file import all_finite

PREFIXES = {  # of a file's key, as a regular expression -> of a path in tau
    r"(lora_te2|text_encoder_2|(text_encoders\.)?clip_g(\.transformer)?)"
    r"[._](text_model[._])?": "te2.",
    r"(lora_te1?|text_encoder|(text_encoders\.)?clip_l(\.transformer)?)"
    r"[._](text_model[._])?": "te1.",
    # PEFT's adapter of one text encoder; transformers 5 has dropped text_model
    r"text_model\.|(?=encoder\.layers\.)": "te1.",
    r"lora_unet[._]|unet\.|diffusion_model\.|lycoris_": "",
    r"": "",  # no prefix; the last one
}
REFUSED = {  # adapters that are not LoRA: mark in a key -> kind
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.(dora_scale|lora_magnitude_vector)": "DoRA",
    r"\.diff(_b)?$|\.lora_[AB](\.\w+)?\.bias$|\.modules_to_save\.": "a full weight difference",
    r"\.[wb]_norm$": "a norm difference",
    r"\.on_input$|\.ia3_l": "IA3",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.b?oft_": "OFT",
    r"\.lora_embedding_[AB]": "a change of embeddings",
}
FLOAT_TYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
FLOAT_TYPES |= {torch.float8_e4m3fn, torch.float8_e5m2}  # others are of quantised models


def split_key(key: str) -> tuple[str, str, str] | None:
    """A key in any spelling -> (prefix in tau, module, up | down | mid | alpha | scalar)."""
    key = key.removeprefix("base_model.model.")
    # G5: attn1.processor.to_q_lora.down.weight; in text encoders self_attn.to_q_lora.down.weight
    if old := re.fullmatch(r"(.*?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight", key):
        theirs = "to_out.0" if old[2] == "out" else f"to_{old[2]}"
        tail = f"{old[2]}_proj" if "self_attn" in old[1] else theirs
        key = f"{old[1]}.{tail}.lora_{old[3]}.weight"
    ending = r"(.+?)\.(?:lora_linear_layer\.|lora[._])(down|up|mid|A|B)(?:\.\w+)?\.weight"
    match = re.fullmatch(ending, key) or re.fullmatch(r"(.+?)(?:\.lora)?\.(alpha|scalar)", key)
    if not match:
        return None
    prefix = next(p for p in PREFIXES if re.match(p, match[1]))
    part = {"A": "down", "B": "up"}.get(match[2], match[2])
    return PREFIXES[prefix], re.sub(rf"^({prefix})", "", match[1], count=1), part


def of_lora(key: str) -> bool:
    """Whether a key is one of a LoRA file, in any spelling that `split_key` knows."""
    split = split_key(key)
    return split is not None and split[2] in ("up", "down")


BUNDLED = "bundle_emb."  # OneTrainer: embeddings of new words, beside the LoRA
Module = tuple[str, str]  # (prefix in tau, flattened name)


def by_module(
    path: Path, tensors: dict[str, Tensor]
) -> tuple[dict[Module, dict[str, Tensor]], dict[Module, str]]:
    """({module: {"up", "down", ...: tensor}}, {module: its spelling}). Raises as `read_tau`."""
    for key in sorted(tensors):
        for mark, kind in REFUSED.items():
            if re.search(mark, key):
                what = f"{kind} is not LoRA and cannot be added to one (first key: {key})"
                how = "merge it by the program that made it, then python -m minilcm extract"
                raise ValueError(f"{path}: {what}; {how}")
    keys = {key: split_key(key) for key in sorted(tensors) if not key.startswith(BUNDLED)}
    if not any(keys.values()):
        is_model = any("diffusion_model." in key for key in keys)
        model = "a checkpoint, not a LoRA file; pass it with --model, or before the LoRA files"
        what = model if is_model else "not a LoRA file"
        raise ValueError(f"{path}: this is {what} (first key: {min(keys, default='none')})")

    modules: dict[Module, dict[str, Tensor]] = {}
    spelled: dict[Module, str] = {}
    for key, split in keys.items():
        value = tensors[key]
        if split is None:
            raise ValueError(f"{path}: key {key} does not belong to a LoRA")
        if value.dtype not in FLOAT_TYPES and split[2] not in ("alpha", "scalar"):
            kind = str(value.dtype)[6:]
            raise ValueError(f"{path}: {key} is {kind}, quantised; dequantise it first")
        value = value.float()
        if not all_finite(value):
            raise ValueError(f"{path}: {key} has values that are not finite")
        prefix, name, part = split
        module = prefix, name.replace(".", "_")
        if part in modules.setdefault(module, {}):
            twice = f"{''.join(module)} is in the file twice, the second time as {key}"
            raise ValueError(f"{path}: {twice}")
        modules[module][part], spelled[module] = value, name
    for (prefix, flat), parts in modules.items():
        if "up" not in parts or "down" not in parts:
            what = "has only one of lora_down and lora_up; the file is incomplete"
            raise ValueError(f"{path}: {prefix}{flat} {what}")
        check_shapes(f"{path}: {prefix}{flat}", **parts)
    if bundled := sorted({k.split(".")[1] for k in tensors if k.startswith(BUNDLED)}):
        words = ", ".join(bundled)
        print(f"{path}: has embeddings, which are not used; these words mean nothing: {words}")
    # PEFT's adapter of one text encoder does not say of which; bigG is 1280 wide
    if all(re.match(r"(base_model\.model\.)?(text_model|encoder\.layers)\.", k) for k in keys):
        if any(parts["down"].shape[1] == 1280 for parts in modules.values()):
            modules = {("te2.", flat): parts for (_, flat), parts in modules.items()}
            spelled = {("te2.", flat): name for (_, flat), name in spelled.items()}
    return modules, spelled


def check_shapes(
    name: str, up: Tensor, down: Tensor, mid: Tensor | None = None, **numbers: Tensor
) -> None:
    """Raises ValueError unless up (out, r), down (r, in) fit and `numbers` are one value each."""
    rank, ones = down.shape[:1], (1,) * (len(no_kernel(down.shape)) - 2)
    shape = up.shape if ones else no_kernel(up.shape)
    if down.ndim not in (2, 4) or shape[1:] != (*rank, *ones) or 0 in (*up.shape, *down.shape):
        raise ValueError(f"{name} up {tuple(up.shape)} does not fit down {tuple(down.shape)}")
    kernels = (*rank, *rank, 1, 1), (*rank, *rank, 3, 3)
    if mid is not None and (mid.shape not in kernels or len(no_kernel(down.shape)) != 2):
        raise ValueError(f"{name} mid {tuple(mid.shape)} does not fit down {tuple(down.shape)}")
    for what, number in numbers.items():
        if number.numel() != 1:
            raise ValueError(f"{name} {what} has {number.numel()} values, not one")
