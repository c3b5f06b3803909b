"""Files of minilcm, which other programs read: the parts merged, sdcpp and lists."""

import gc
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.check import PROMPT, difference, vae_arguments
from benchmarks.files_by_others import Fact, clip, diffusers_unet, paths_in_tau, peft_layers
from benchmarks.full_size import HERE, SIDE, make_files
from minilcm.files.checkpoint import load_model
from minilcm.files.lora_file import read_tau, write_tau
from minilcm.generate import generate
from minilcm.merge import delta
from minilcm.model.vae import VAEConfig
from minilcm.solver import guided_eps

SCALE = 0.7  # of a LoRA, where pictures are drawn


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
    eps_fn = guided_eps(unet, text.encode([PROMPT], (8 * SIDE, 8 * SIDE)), None, 0.0)
    pixels = generate(eps_fn, [1], (4, SIDE, SIDE), "lcm", 4, vae.decode).clamp(-1, 1)
    return (pixels[0].permute(1, 2, 0) + 1) * 127.5


def same_picture(what: str, a: Tensor, b: Tensor, more: str = "", holds: bool = True) -> Fact:
    """The mean difference is at most a level of 255; `more`, `holds`: what else was looked at."""
    far = (a - b).abs()
    figures = f"mean difference {far.mean():.4f} of 255 levels, largest {far.max():.2f}"
    holds = holds and far.mean().item() <= 1 and b.std().item() > 10
    return Fact(what, holds, f"{figures}, spread {b.std():.1f}{more}")


def clip_tokenizer() -> Callable:
    """transformers' CLIPTokenizer, with the vocabulary of open_clip."""
    import open_clip.tokenizer as open_clip
    from transformers import CLIPTokenizer

    text = gzip.decompress(Path(open_clip.default_bpe()).read_bytes()).decode()
    merges = text.split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(open_clip.bytes_to_unicode().values())
    words = [*letters, *(x + "</w>" for x in letters), *(x.replace(" ", "") for x in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocabulary, [tuple(x.split()) for x in merges], model_max_length=77)


def write_configs(folder: Path, family: str = "sd15") -> None:
    """What diffusers wants beside a single file: configurations and the vocabulary."""
    from diffusers import AutoencoderKL, LCMScheduler
    from diffusers import StableDiffusionPipeline as SD
    from diffusers import StableDiffusionXLPipeline as SDXL

    with torch.device("meta"):
        vae = AutoencoderKL(**vae_arguments(VAEConfig()))
    says = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    schedule = LCMScheduler(**says, steps_offset=1)
    unet, text, tokenizer = diffusers_unet(family), clip(flat=True), clip_tokenizer()
    if family == "sd15":
        safety = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe = SD(vae, text, tokenizer, unet, schedule, **safety)
    else:
        big = clip(1280, 32)
        pipe = SDXL(vae, text, big, tokenizer, tokenizer, unet, schedule)
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

    model, lora, both = make_merged(folder)
    write_configs(folder / "config")
    picture = by_minilcm(both)

    def open_pipe(file: Path) -> StableDiffusionPipeline:
        gc.collect()
        how = dict(config=str(folder / "config"), torch_dtype=torch.float32)
        pipe = StableDiffusionPipeline.from_single_file(file, **how)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(pipe: StableDiffusionPipeline) -> Tensor:
        how = dict(generator=torch.Generator().manual_seed(1), height=8 * SIDE, width=8 * SIDE)
        how |= dict(num_inference_steps=4, guidance_scale=1.0, output_type="pt")
        return pipe(PROMPT, **how).images[0].permute(1, 2, 0) * 255

    yield same_picture("diffusers, merged file", draw(open_pipe(both)), picture)
    pipe, tau = open_pipe(model), read_tau(lora)
    far, what = (draw(pipe) - picture).abs().mean().item(), "diffusers, base alone, for comparison"
    yield Fact(what, far > 5, f"mean difference {far:.4f} of 255 levels")
    paths = paths_in_tau("sd15", pipe.unet, [])
    for style in ("diffusers", "peft"):
        write_tau(lora, tau, {}, style=style)
        pipe.load_lora_weights(str(lora), adapter_name="lcm")
        pipe.set_adapters("lcm", SCALE)
        layers = peft_layers(paths, pipe.unet)
        scales = {round(layer.scaling["lcm"] / SCALE, 9) for layer in layers.values()}
        worst = 0.0
        for path, parts in tau.items():
            theirs, ours = layers[path].get_delta_weight("lcm"), SCALE * delta(*parts)
            worst = max(worst, difference(theirs, ours))
        more = f"; {len(layers)} of {len(tau)} modules, alpha / rank {scales}"
        more += f", deltas within {worst:.1e}"
        holds = layers.keys() == tau.keys() and len(tau) == 278 and scales == {8 / 64}
        what = f"diffusers, base + {SCALE} LoRA, style {style}"
        yield same_picture(what, draw(pipe), picture, more, holds and worst <= 1e-6)
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
    how = dict(width=8 * SIDE, height=8 * SIDE, seed=1, sample_steps=4, cfg_scale=1.0)
    how |= dict(sample_method=sd.SampleMethod.LCM, scheduler=sd.Scheduler.LCM)
    job = sd.SDImageGenParams(prompt=PROMPT, **how)
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
    from tests.files import test_readers as rules

    unets = json.loads(gzip.decompress((HERE / "official_keys.json.gz").read_bytes()))
    to_diffusers = json.loads(gzip.decompress((HERE / "official_lora_keys.json.gz").read_bytes()))
    for family, style, modules, lost in rules.CASES:
        numbers = rules.write_numbered(folder / "lora.safetensors", family, style)
        names, keys = rules.read_names(folder / "lora.safetensors"), unets[family.__name__]
        comfyui = rules.comfyui_table(keys, to_diffusers[family.__name__])
        a1111 = rules.a1111_table(keys, list(names))
        for program, table, expected in (
            ("ComfyUI", comfyui, modules),
            ("A1111", a1111, modules - len(lost)),
        ):
            found = {name for name, n in names.items() if numbers.get(table.get(name)) == n}
            figures = f"{len(found)} of {len(names)} modules, {expected} expected"
            if len(found) < len(names):
                figures += f"; not {', '.join(sorted(names.keys() - found))}"
            what = f"{program}, {family.__name__}, style {style or 'by default'}"
            yield Fact(what, len(found) == expected, figures)
