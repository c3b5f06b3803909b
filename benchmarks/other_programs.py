"""Files of other programs that minilcm reads, and files of minilcm that others read; not in CI.

    python -m benchmarks.other_programs all    (or kohya, peft, diffusers-old, merged, sdcpp, lists)

Needs the `reference` extra; from PyPI also lycoris-lora for kohya, cyllama for sdcpp, pytest for
lists; 16 GB of memory and, under TMPDIR, 8 GB of disk. Weights are random and full size, nothing is
downloaded.

    kohya          LoRA files by LyCORIS as kohya's trainer runs it: plain, rsLoRA, Tucker, text
    peft           adapter folders by PEFT, files by diffusers' save_lora_weights: patterns of rank
                   and alpha, rsLoRA
    diffusers-old  the spellings of 2023, by what diffusers still has of that code
    merged         what `python -m minilcm merge` writes, and LoRA files, by diffusers' pipeline
    sdcpp          the same by stable-diffusion.cpp
    lists          names that ComfyUI and A1111 look for

A LoRA file is compared module by module: minilcm's delta against the one that the other program's
own layer gives. Prints a line for each fact and exits with 1 if one fails.
"""

import argparse
import gc
import gzip
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn

from benchmarks.check import PROMPT, clip_arguments, unet_arguments, vae_arguments
from benchmarks.full_size import HERE, LAYERS, OURS, SIDE, make_files
from minilcm.files.checkpoint import load_model
from minilcm.files.lora_file import read_tau, write_tau
from minilcm.lcm import sample_lcm
from minilcm.merge import delta
from minilcm.model.vae import VAEConfig
from minilcm.schedule import make_schedule
from minilcm.solver import guided_eps

SCALE = 0.7  # of a LoRA, where pictures are drawn


class Fact(NamedTuple):
    what: str
    holds: bool
    figures: str


# ---- networks of the others


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
    official = json.loads(gzip.decompress((HERE / "official_lora_keys.json.gz").read_bytes()))[
        family
    ]
    names = dict(unet.named_modules())
    paths = {names[diffusers]: ldm for ldm, diffusers in official.items() if diffusers in names}
    for i, text in enumerate(texts, start=1):
        paths |= {
            m: f"te{i}.{name.removeprefix('text_model.')}" for name, m in text.named_modules()
        }
    return paths


def compare(what: str, file: Path, expected: dict[str, Callable[[], Tensor]]) -> Fact:
    """read_tau(file) against `expected`, {path: the other's delta, when called}."""
    try:
        tau = read_tau(file)
    except ValueError as error:
        return Fact(what, False, str(error).replace(str(file.parent), "..."))
    worst, where = 0.0, "none"
    for path in tau.keys() & expected.keys():
        theirs = expected[path]().detach()
        ours = delta(*tau[path])
        far = (
            ((ours - theirs).abs().max() / theirs.abs().max()).item()
            if ours.shape == theirs.shape
            else float("inf")
        )
        if not far <= worst:
            worst, where = far, path
    figures = (
        f"{len(tau)} of {len(expected)} modules, largest relative difference {worst:.1e} ({where})"
    )
    return Fact(what, tau.keys() == expected.keys() and worst <= 1e-6, figures)


# ---- LoRA files by other programs


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
        paths = paths_in_tau(family, unet, texts)
        expected = {
            paths[x.org_module[0]]: lambda x=x: x.get_diff_weight()[0] for x in network.loras
        }
        kind = " ".join(options) or "plain"
        names = "" if hasattr(texts[0], "text_model") else ", text encoder of transformers 5"
        yield compare(f"LyCORIS, {family}, {kind}, {str(dtype)[6:]}{names}", file, expected)


def peft(folder: Path) -> Iterator[Fact]:
    """Each adapter as PEFT's own folder, and as diffusers' pipeline saves it, with its metadata."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    patterns = dict(  # of the names' ends, or regular expressions
        rank_pattern={
            "to_k": 3,
            r"up_blocks\.\d.attentions.1.proj_in": 5,
            "mid_block.resnets.0.conv1": 2,
        },
        alpha_pattern={
            "to_k": 2,
            "attn1.to_q": 1.5,
            r"down_blocks\.[02].resnets.0.conv\d": 7,
            "mlp.fc1": 3,
        },
    )
    for family, flat, what, options in (
        ("sd15", False, "alpha 4 of rank 8", {}),
        ("sd15", False, "rsLoRA", {"use_rslora": True}),
        ("sd15", False, "patterns", patterns),
        ("sd15", False, "rsLoRA, patterns", {"use_rslora": True, **patterns}),
        ("sd15", True, "text encoder of transformers 5", {}),
        ("sdxl", False, "patterns", patterns),
    ):
        unet, text = diffusers_unet(family), clip(flat=flat)
        config = LoraConfig(
            r=8, lora_alpha=4, target_modules=LAYERS, init_lora_weights=False, **options
        )
        text_config = LoraConfig(
            r=2, lora_alpha=6, target_modules=TEXT_LAYERS, init_lora_weights=False, **options
        )
        bases = paths_in_tau(family, unet, [text])
        model = get_peft_model(unet, config)
        inject_adapter_in_model(text_config, text)

        def layers(*models: nn.Module) -> dict[str, Callable[[], Tensor]]:
            found = [m for model in models for m in model.modules() if isinstance(m, LoraLayer)]
            return {
                bases[m.get_base_layer()]: partial(m.get_delta_weight, "default") for m in found
            }

        if not flat:
            model.save_pretrained(folder / "adapter")
            file = folder / "adapter" / "adapter_model.safetensors"
            yield compare(f"PEFT's folder, {family}, {what}", file, layers(unet))
        pipeline = StableDiffusionPipeline if family == "sd15" else StableDiffusionXLPipeline
        pipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(unet),
            text_encoder_lora_layers=get_peft_model_state_dict(text),
            unet_lora_adapter_metadata=config.to_dict(),
            text_encoder_lora_adapter_metadata=text_config.to_dict(),
        )
        file = folder / "pytorch_lora_weights.safetensors"
        yield compare(f"diffusers' save_lora_weights, {family}, {what}", file, layers(unet, text))


def diffusers_old(folder: Path) -> Iterator[Fact]:
    """Attention processors with LoRA inside (0.17), `.lora.down` (0.22), and kohya's names."""
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.utils import AttnProcsLayers
    from diffusers.models.attention_processor import Attention
    from diffusers.models.lora import LoRALinearLayer
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    unet, text, expected, processors = diffusers_unet("sd15"), clip(), {}, {"unet": {}, "text": {}}
    paths, file = paths_in_tau("sd15", unet, [text]), folder / "pytorch_lora_weights.safetensors"

    def old_layers(linears: dict[str, nn.Linear]) -> nn.ModuleDict:
        layers = {}
        for name, linear in linears.items():
            layer = layers[f"{name}_lora"] = LoRALinearLayer(
                linear.in_features, linear.out_features, rank=4
            )
            nn.init.normal_(layer.up.weight)
            expected[paths[linear]] = lambda layer=layer: layer(torch.eye(layer.in_features)).T
        return nn.ModuleDict(layers)

    for name, m in unet.named_modules():
        if isinstance(m, Attention):
            linears = {"to_q": m.to_q, "to_k": m.to_k, "to_v": m.to_v, "to_out": m.to_out[0]}
            processors["unet"][f"{name}.processor"] = old_layers(linears)
    layers = AttnProcsLayers(processors["unet"])
    what = "processor.to_q_lora.down"
    StableDiffusionPipeline.write_lora_layers(
        layers.state_dict(), str(folder), True, file.name, None, True
    )
    yield compare(f"diffusers of 2023, {what}, no prefix", file, expected)
    for name, m in text.named_modules():
        if name.endswith("self_attn"):
            linears = {"to_q": m.q_proj, "to_k": m.k_proj, "to_v": m.v_proj, "to_out": m.out_proj}
            processors["text"][name] = old_layers(linears)
    StableDiffusionPipeline.save_lora_weights(folder, layers, AttnProcsLayers(processors["text"]))
    yield compare(f"diffusers of 2023, {what}, unet. and text_encoder.", file, expected)

    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=LAYERS + TEXT_LAYERS, init_lora_weights=False
    )
    for model in (unet, text):
        inject_adapter_in_model(config, model)
    layers = {
        paths[m.get_base_layer()]: m
        for x in (unet, text)
        for m in x.modules()
        if isinstance(m, LoraLayer)
    }
    expected = {path: partial(m.get_delta_weight, "default") for path, m in layers.items()}
    states = [get_peft_model_state_dict(model) for model in (unet, text)]
    StableDiffusionPipeline.save_lora_weights(
        folder, *[convert_state_dict_to_diffusers(state) for state in states]
    )
    yield compare(
        "diffusers of 2023, to_q.lora.down, q_proj.lora_linear_layer.down", file, expected
    )
    state = StableDiffusionPipeline.pack_weights(states[0], "unet")
    state |= StableDiffusionPipeline.pack_weights(states[1], "text_encoder")
    save_file(convert_state_dict_to_kohya(state), file)
    yield compare("diffusers' convert_state_dict_to_kohya", file, expected)


# ---- files of minilcm in other programs


def make_merged(folder: Path) -> tuple[Path, Path, Path]:
    """(base, minilcm's LoRA, base + 0.7 LoRA merged by command) of SD1.5, rank 64, alpha 8."""
    model, lora = make_files("sd15", folder)
    write_tau(folder / "written.safetensors", read_tau(lora), {})
    merged, lora = folder / "merged.safetensors", folder / "written.safetensors"
    command = [sys.executable, "-m", "minilcm", "merge", model, f"{lora}:{SCALE}", "-o", merged]
    subprocess.run(command, cwd=HERE.parents[1], check=True, stdout=subprocess.DEVNULL)
    return model, lora, merged


@torch.no_grad()
def by_minilcm(model: Path) -> Tensor:
    """4 LCM steps, seed 1, (H, W, 3) of 0 to 255."""
    unet, vae, text, _ = load_model(model)
    generator = torch.Generator().manual_seed(1)
    z_T = torch.randn(1, 4, SIDE, SIDE, generator=generator)
    eps_fn = guided_eps(unet, text.encode([PROMPT], (8 * SIDE, 8 * SIDE)), None, 0.0)
    pixels = vae.decode(sample_lcm(eps_fn, z_T, make_schedule(), 4, [generator])).clamp(-1, 1)
    return (pixels[0].permute(1, 2, 0) + 1) * 127.5


def same_picture(what: str, a: Tensor, b: Tensor, more: str = "", holds: bool = True) -> Fact:
    """The mean difference is at most a level of 255; `more`, `holds`: what else was looked at."""
    far = (a - b).abs()
    figures = f"mean difference {far.mean():.4f} of 255 levels, largest {far.max():.2f}"
    holds = holds and far.mean().item() <= 1 and b.std().item() > 10
    return Fact(what, holds, f"{figures}, spread {b.std():.1f}{more}")


def write_configs(folder: Path, family: str = "sd15") -> None:
    """What diffusers wants beside a single file: configurations, and open_clip's vocabulary."""
    import open_clip.tokenizer as open_clip
    from diffusers import (
        AutoencoderKL,
        LCMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )
    from transformers import CLIPTokenizer

    merges = (
        gzip.decompress(Path(open_clip.default_bpe()).read_bytes())
        .decode()
        .split("\n")[1 : 49152 - 256 - 2 + 1]
    )
    letters = list(open_clip.bytes_to_unicode().values())
    words = [*letters, *(x + "</w>" for x in letters), *(x.replace(" ", "") for x in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocabulary, [tuple(x.split()) for x in merges], model_max_length=77)
    with torch.device("meta"):
        vae = AutoencoderKL(**vae_arguments(VAEConfig()))
    schedule = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    unet, text, big = diffusers_unet(family), clip(flat=True), clip(1280, 32)
    if family == "sd15":
        pipe = StableDiffusionPipeline(
            vae, text, tokenizer, unet, schedule, None, None, requires_safety_checker=False
        )
    else:
        pipe = StableDiffusionXLPipeline(vae, text, big, tokenizer, tokenizer, unet, schedule)
        big.config.save_pretrained(folder / "text_encoder_2")
        tokenizer.save_pretrained(folder / "tokenizer_2")
    pipe.save_config(folder)
    for name in ("unet", "vae", "scheduler"):
        getattr(pipe, name).save_config(folder / name)
    text.config.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")


def merged(folder: Path) -> Iterator[Fact]:
    """from_single_file, prompt to pixels: the merged file, then the base with minilcm's LoRAs."""
    from diffusers import StableDiffusionPipeline
    from peft.tuners.lora import LoraLayer

    model, lora, both = make_merged(folder)
    write_configs(folder / "config")
    picture = by_minilcm(both)

    def open_pipe(file: Path) -> StableDiffusionPipeline:
        gc.collect()
        pipe = StableDiffusionPipeline.from_single_file(
            file, config=str(folder / "config"), torch_dtype=torch.float32
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(pipe: StableDiffusionPipeline) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        images = pipe(
            PROMPT,
            num_inference_steps=4,
            guidance_scale=1.0,
            height=8 * SIDE,
            width=8 * SIDE,
            generator=generator,
            output_type="pt",
        ).images
        return images[0].permute(1, 2, 0) * 255

    yield same_picture("diffusers, merged file", draw(open_pipe(both)), picture)
    pipe, tau = open_pipe(model), read_tau(lora)
    far = (draw(pipe) - picture).abs().mean().item()
    yield Fact(
        "diffusers, base alone, for comparison", far > 5, f"mean difference {far:.4f} of 255 levels"
    )
    paths = paths_in_tau("sd15", pipe.unet, [])
    for style in ("diffusers", "peft"):
        write_tau(lora, tau, {}, style=style)
        pipe.load_lora_weights(str(lora), adapter_name="lcm")
        pipe.set_adapters("lcm", SCALE)
        layers = {
            paths[m.get_base_layer()]: m for m in pipe.unet.modules() if isinstance(m, LoraLayer)
        }
        scales = {round(m.scaling["lcm"] / SCALE, 9) for m in layers.values()}
        worst = 0.0
        for path, parts in tau.items():
            theirs, ours = layers[path].get_delta_weight("lcm"), SCALE * delta(*parts)
            worst = max(worst, ((ours - theirs).abs().max() / ours.abs().max()).item())
        more = f"; {len(layers)} of {len(tau)} modules, alpha / rank {scales}"
        more += f", deltas within {worst:.1e}"
        holds = (
            layers.keys() == tau.keys() and len(tau) == 278 and scales == {8 / 64} and worst <= 1e-6
        )
        yield same_picture(
            f"diffusers, base + {SCALE} LoRA, style {style}", draw(pipe), picture, more, holds
        )
        pipe.unload_lora_weights()


def draw_sdcpp(model: Path, lora: Path | None, mode: str) -> tuple[Tensor, str]:
    """(picture (H, W, 3), log) by stable-diffusion.cpp: its LCM sampler, torch's noise, seed 1."""
    from cyllama import sd

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # it draws progress bars there
    log: list[str] = []
    sd.set_log_callback(lambda level, message: log.append(message))
    context = sd.SDContextParams(model_path=str(model), n_threads=2)
    context.rng_type = context.sampler_rng_type = sd.RngType.CPU
    context.lora_apply_mode = sd.LoraApplyMode[mode]
    job = sd.SDImageGenParams(
        prompt=PROMPT,
        width=8 * SIDE,
        height=8 * SIDE,
        seed=1,
        sample_steps=4,
        cfg_scale=1.0,
        sample_method=sd.SampleMethod.LCM,
        scheduler=sd.Scheduler.LCM,
    )
    if lora:
        job.set_loras([{"path": str(lora), "multiplier": SCALE}])
    image = sd.SDContext(context).generate_with_params(job)[0].to_numpy()
    return torch.from_numpy(image.copy()).float(), "".join(log)


def sdcpp(folder: Path) -> Iterator[Fact]:
    """stable-diffusion.cpp: the merged file; base and LoRA, merged by it or added in each layer."""
    model, lora, both = make_merged(folder)
    picture = by_minilcm(both)

    def run(*job) -> tuple[Tensor, str]:
        # C++ that may take its process down
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(draw_sdcpp, *job).result()

    merged, _ = run(both, None, "AUTO")
    yield same_picture("stable-diffusion.cpp, merged file, against minilcm", merged, picture)
    for mode in ("IMMEDIATELY", "AT_RUNTIME"):
        image, log = run(model, lora, mode)
        applied = re.findall(r"\((\d+) / (\d+)\) LoRA tensors", log)
        more = f"; LoRA tensors applied: {', '.join(f'{a} of {b}' for a, b in applied)}"
        what = f"stable-diffusion.cpp, base + {SCALE} LoRA {mode.lower()}, against its merged file"
        yield same_picture(what, image, merged, more, applied == [("834", "834")])


def lists(folder: Path) -> Iterator[Fact]:
    """ComfyUI's and A1111's rules on names: tests/files/test_readers.py holds and checks them."""
    from tests.files.test_readers import (
        CASES,
        a1111_table,
        comfyui_table,
        read_names,
        write_numbered,
    )

    unets = json.loads(gzip.decompress((HERE / "official_keys.json.gz").read_bytes()))
    to_diffusers = json.loads(gzip.decompress((HERE / "official_lora_keys.json.gz").read_bytes()))
    for family, style, modules, lost in CASES:
        numbers = write_numbered(folder / "lora.safetensors", family, style)
        names, keys = read_names(folder / "lora.safetensors"), unets[family.__name__]
        for program, table in (
            ("ComfyUI", comfyui_table(keys, to_diffusers[family.__name__])),
            ("A1111", a1111_table(keys, list(names))),
        ):
            found = [
                name
                for name, number in names.items()
                if name in table and numbers[table[name]] == number
            ]
            expected = modules - len(lost) if program == "A1111" else modules
            not_found = sorted(names.keys() - set(found))
            figures = f"{len(found)} of {len(names)} modules, {expected} expected"
            figures += f"; not {', '.join(not_found)}" if not_found else ""
            what = f"{program}, {family.__name__}, style {style or 'by default'}"
            yield Fact(what, len(found) == expected, figures)


PARTS = {
    "kohya": kohya,
    "peft": peft,
    "diffusers-old": diffusers_old,
    "merged": merged,
    "sdcpp": sdcpp,
    "lists": lists,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "all"])
    part = parser.parse_args().part
    if part == "all":  # a process each, which gives its memory back
        command = [sys.executable, "-m", "benchmarks.other_programs"]
        sys.exit(max([subprocess.run([*command, part]).returncode != 0 for part in PARTS]))
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        for fact in PARTS[part](Path(name)):
            print(f"{'holds' if fact.holds else 'FAILS'}  {fact.what}: {fact.figures}", flush=True)
            failed += not fact.holds
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
