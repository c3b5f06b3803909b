"""LoRA files by other programs, which minilcm reads: the parts kohya, peft and diffusers-old."""

import gzip
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.check import clip_arguments, difference, unet_arguments
from benchmarks.full_size import HERE, LAYERS, OURS
from minilcm.files.lora_file import read_tau
from minilcm.merge import delta

Deltas = dict[str, Callable[[], Tensor]]  # {path: the other program's delta, when called}


class Fact(NamedTuple):
    what: str
    holds: bool
    figures: str


# ---- networks of the others, and LoRA layers on them


TEXT_LAYERS = "q_proj k_proj v_proj out_proj fc1 fc2".split()


def diffusers_unet(family: str) -> nn.Module:
    """The base of a LoRA, of which only names and shapes matter: its memory is never touched."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_arguments(OURS[family]()))
    return unet.to_empty(device="cpu").requires_grad_(False)


def clip(width: int = 768, layers: int = 12, flat: bool = False) -> nn.Module:
    """A text encoder, likewise. `flat`: transformers 5's CLIPTextModel has no `text_model.`"""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**clip_arguments(width, layers, width // 64, open_clip=False))
    with torch.device("meta"):
        text = (CLIPTextModel if flat else CLIPTextModelWithProjection)(config)
    return text.to_empty(device="cpu").requires_grad_(False)


def paths_in_tau(family: str, unet: nn.Module, texts: list[nn.Module]) -> dict[nn.Module, str]:
    """{module: its path in a tau}; the UNet's by the official map, which is not minilcm's own."""
    official = json.loads(gzip.decompress((HERE / "official_lora_keys.json.gz").read_bytes()))
    names = dict(unet.named_modules())
    paths = {names[theirs]: ldm for ldm, theirs in official[family].items() if theirs in names}
    for i, text in enumerate(texts, start=1):
        for name, module in text.named_modules():
            paths[module] = f"te{i}.{name.removeprefix('text_model.')}"
    return paths


def peft_layers(paths: dict[nn.Module, str], *models: nn.Module) -> dict[str, nn.Module]:
    """{path: PEFT's layer around the module}."""
    from peft.tuners.lora import LoraLayer

    layers = [m for model in models for m in model.modules() if isinstance(m, LoraLayer)]
    return {paths[layer.get_base_layer()]: layer for layer in layers}


def peft_deltas(paths: dict[nn.Module, str], *models: nn.Module) -> Deltas:
    layers = peft_layers(paths, *models)
    return {path: partial(layer.get_delta_weight, "default") for path, layer in layers.items()}


def compare(what: str, file: Path, expected: Deltas) -> Fact:
    """read_tau(file) against the other program's deltas."""
    try:
        tau = read_tau(file)
    except ValueError as error:
        return Fact(what, False, str(error).replace(str(file.parent), "..."))
    worst, where = 0.0, "none"
    for path in tau.keys() & expected.keys():
        theirs, ours = expected[path]().detach(), delta(*tau[path])
        far = difference(ours, theirs) if ours.shape == theirs.shape else float("inf")
        if not far <= worst:
            worst, where = far, path
    modules = f"{len(tau)} of {len(expected)} modules"
    figures = f"{modules}, largest relative difference {worst:.1e} ({where})"
    return Fact(what, tau.keys() == expected.keys() and worst <= 1e-6, figures)


# ---- the files


def kohya(folder: Path) -> Iterator[Fact]:
    """LyCORIS' network for kohya: ranks and alphas differ in Linear, kernels, downsamplers."""
    from lycoris.kohya import create_network

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    # the built-in "full" preset fails: it finds time_embedding twice
    (folder / "preset.toml").write_text(
        "enable_conv = true\n"
        'unet_target_module = ["Transformer2DModel", "ResnetBlock2D",'
        ' "Downsample2D", "Upsample2D"]\n'
        'unet_target_name = ["conv_in", "conv_out"]\n'
        'text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]\n'
        "text_encoder_target_name = []\n"
        "module_algo_map.Downsample2D = {dim = 2, alpha = 5}\n"
    )
    for family, texts, dtype, options in (
        ("sd15", [clip()], torch.float32, {}),
        # rsLoRA's alpha is no number that float16 holds
        ("sd15", [clip()], torch.float32, {"rs_lora": True}),
        ("sd15", [clip()], torch.float32, {"use_tucker": True}),
        ("sd15", [clip(flat=True)], torch.float32, {}),
        ("sdxl", [clip(), clip(1280, 32)], torch.float16, {"use_tucker": True}),
    ):
        unet, file = diffusers_unet(family), folder / "kohya.safetensors"
        text = texts if family == "sdxl" else texts[0]
        settings = dict(conv_dim=3, conv_alpha=2.0, algo="locon", **options)
        preset = str(folder / "preset.toml")
        network = create_network(1.0, 4, 3.0, None, text, unet, preset=preset, **settings)
        network.apply_to(text, unet, True, True)
        for parameter in network.parameters():  # lora_up begins at zero; numbers that float16 holds
            parameter.data = torch.randn(parameter.shape).half().float()
        network.save_weights(str(file), dtype, {})
        paths, loras = paths_in_tau(family, unet, texts), network.loras
        expected = {paths[x.org_module[0]]: lambda x=x: x.get_diff_weight()[0] for x in loras}
        kind = " ".join(options) or "plain"
        names = "" if hasattr(texts[0], "text_model") else ", text encoder of transformers 5"
        yield compare(f"LyCORIS, {family}, {kind}, {str(dtype)[6:]}{names}", file, expected)


def peft(folder: Path) -> Iterator[Fact]:
    """Each adapter as PEFT's own folder, and as diffusers' pipeline saves it, with its metadata."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model

    # of the names' ends, or regular expressions
    ranks = {"to_k": 3, r"up_blocks\.\d.attentions.1.proj_in": 5, "mid_block.resnets.0.conv1": 2}
    alphas = {"to_k": 2, "attn1.to_q": 1.5, r"down_blocks\.[02].resnets.0.conv\d": 7, "mlp.fc1": 3}
    patterns = dict(rank_pattern=ranks, alpha_pattern=alphas)
    for family, flat, what, options in (
        ("sd15", False, "alpha 4 of rank 8", {}),
        ("sd15", False, "rsLoRA", {"use_rslora": True}),
        ("sd15", False, "patterns", patterns),
        ("sd15", False, "rsLoRA, patterns", {"use_rslora": True, **patterns}),
        ("sd15", True, "text encoder of transformers 5", {}),
        ("sdxl", False, "patterns", patterns),
    ):
        unet, text = diffusers_unet(family), clip(flat=flat)
        how = dict(init_lora_weights=False, **options)
        config = LoraConfig(r=8, lora_alpha=4, target_modules=LAYERS, **how)
        text_config = LoraConfig(r=2, lora_alpha=6, target_modules=TEXT_LAYERS, **how)
        paths = paths_in_tau(family, unet, [text])
        model = get_peft_model(unet, config)
        inject_adapter_in_model(text_config, text)
        if not flat:
            model.save_pretrained(folder / "adapter")
            file = folder / "adapter" / "adapter_model.safetensors"
            yield compare(f"PEFT's folder, {family}, {what}", file, peft_deltas(paths, unet))
        pipeline = StableDiffusionPipeline if family == "sd15" else StableDiffusionXLPipeline
        pipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(unet),
            text_encoder_lora_layers=get_peft_model_state_dict(text),
            unet_lora_adapter_metadata=config.to_dict(),
            text_encoder_lora_adapter_metadata=text_config.to_dict(),
        )
        file = folder / "pytorch_lora_weights.safetensors"
        expected = peft_deltas(paths, unet, text)
        yield compare(f"diffusers' save_lora_weights, {family}, {what}", file, expected)


def diffusers_old(folder: Path) -> Iterator[Fact]:
    """Attention processors with LoRA inside (0.17), `.lora.down` (0.22), and kohya's names."""
    unet, text = diffusers_unet("sd15"), clip()
    paths, file = paths_in_tau("sd15", unet, [text]), folder / "pytorch_lora_weights.safetensors"
    yield from by_processors(file, unet, text, paths)
    yield from by_renaming(file, unet, text, paths)


def by_processors(
    file: Path, unet: nn.Module, text: nn.Module, paths: dict[nn.Module, str]
) -> Iterator[Fact]:
    """Attention processors with LoRA inside, of the UNet alone and of both."""
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.utils import AttnProcsLayers
    from diffusers.models.attention_processor import Attention
    from diffusers.models.lora import LoRALinearLayer

    expected: Deltas = {}

    def old_layers(*linears: nn.Linear) -> nn.ModuleDict:
        layers = {}
        for name, linear in zip(("to_q", "to_k", "to_v", "to_out"), linears):
            layer = LoRALinearLayer(linear.in_features, linear.out_features, rank=4)
            nn.init.normal_(layer.up.weight)
            layers[f"{name}_lora"] = layer
            expected[paths[linear]] = lambda layer=layer: layer(torch.eye(layer.in_features)).T
        return nn.ModuleDict(layers)

    what = "diffusers of 2023, processor.to_q_lora.down"
    processors = {
        f"{name}.processor": old_layers(m.to_q, m.to_k, m.to_v, m.to_out[0])
        for name, m in unet.named_modules()
        if isinstance(m, Attention)
    }
    layers = AttnProcsLayers(processors)
    write, state = StableDiffusionPipeline.write_lora_layers, layers.state_dict()
    write(state, str(file.parent), True, file.name, None, True)
    yield compare(f"{what}, no prefix", file, expected)
    processors = {
        name: old_layers(m.q_proj, m.k_proj, m.v_proj, m.out_proj)
        for name, m in text.named_modules()
        if name.endswith("self_attn")
    }
    StableDiffusionPipeline.save_lora_weights(file.parent, layers, AttnProcsLayers(processors))
    yield compare(f"{what}, unet. and text_encoder.", file, expected)


def by_renaming(
    file: Path, unet: nn.Module, text: nn.Module, paths: dict[nn.Module, str]
) -> Iterator[Fact]:
    """PEFT's layers under the names of 2023, diffusers' own and kohya's."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from safetensors.torch import save_file

    layers = LAYERS + TEXT_LAYERS
    config = LoraConfig(r=4, lora_alpha=4, target_modules=layers, init_lora_weights=False)
    for model in (unet, text):
        inject_adapter_in_model(config, model)
    expected = peft_deltas(paths, unet, text)
    states = [get_peft_model_state_dict(model) for model in (unet, text)]
    renamed = [convert_state_dict_to_diffusers(state) for state in states]
    StableDiffusionPipeline.save_lora_weights(file.parent, *renamed)
    what = "diffusers of 2023, to_q.lora.down, q_proj.lora_linear_layer.down"
    yield compare(what, file, expected)
    state = StableDiffusionPipeline.pack_weights(states[0], "unet")
    state |= StableDiffusionPipeline.pack_weights(states[1], "text_encoder")
    save_file(convert_state_dict_to_kohya(state), file)
    yield compare("diffusers' convert_state_dict_to_kohya", file, expected)
