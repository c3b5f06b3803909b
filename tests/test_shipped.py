"""The weights that come with the repository are what the README says, and do what it promises."""

import torch
from safetensors import safe_open
from tiny import ROOT

import sample
from minilcm.cli.advice import nearest_names, on_prompt
from minilcm.data.pictures import read_image
from minilcm.files.checkpoint import load_judge, load_model
from minilcm.files.identify import open_checkpoint
from minilcm.files.lora_file import read_recipe, read_tau
from minilcm.merge import check_fit
from minilcm.metrics import accuracy
from minilcm.model.unet import emoji

WEIGHTS = ROOT / "weights/emoji"


def test_the_model_is_one_official_single_file():
    """Official prefixes, fp16, at most 48 MB, emoji config, names; unused tokens' rows are zero."""
    path = WEIGHTS / "model.safetensors"
    assert path.stat().st_size <= 48e6
    with safe_open(path, "pt") as f:
        prefixes = (
            "model.diffusion_model.",
            "first_stage_model.",
            "cond_stage_model.transformer.text_model.",
        )
        assert all(
            key.startswith(prefixes) and f.get_tensor(key).dtype == torch.float16
            for key in f.keys()
        )
    unet, vae, text, config = load_model(path)
    assert config.unet == emoji() and config.size == 128 and vae.factor == 8
    assert (
        list(config.names) == (WEIGHTS / "names.txt").read_text().splitlines()[: len(config.names)]
    )
    rows = text.tower.token_embedding.weight
    assert 0.9 < (rows == 0).all(dim=1).float().mean() < 1


def test_the_loras_fit_the_model():
    """Each LoRA's modules are the model's; the LCM-LoRA tells its w, K and timestep scaling."""
    unet = load_model(WEIGHTS / "model.safetensors")[0]
    for name in ("lcm_lora", "blueprint", "papercut"):
        check_fit(unet, read_tau(WEIGHTS / f"{name}.safetensors"))
    recipe = read_recipe(WEIGHTS / "lcm_lora.safetensors")
    assert recipe["K"] == "50" and recipe["timestep_scaling"] == "10" and float(recipe["w"]) > 0


@torch.no_grad()
def test_the_first_command_draws_what_it_says(tmp_path):
    """`sample.py NAME`, eight names: the judge finds at least six (chance: one in 300)."""
    judge = load_judge(WEIGHTS / "judge.safetensors")
    assert judge.names == list(open_checkpoint(WEIGHTS / "model.safetensors").config.names)
    chosen = [
        "pizza",
        "red apple",
        "banana",
        "strawberry",
        "cactus",
        "penguin",
        "soccer ball",
        "rainbow",
    ]
    sample.main(sample.parse([*chosen, "--out", f"{tmp_path}/"]))
    pictures = sorted(tmp_path.iterdir())
    pixels = torch.cat([read_image(p, (128, 128)) for p in pictures])
    assert accuracy(judge, pixels, chosen)[0].sum() >= 6


def test_the_readme_prompt_holds_a_known_name():
    """`a slice of pizza` is understood; an unknown thing gets its neighbours named."""
    names = load_model(WEIGHTS / "model.safetensors")[3].names
    assert not list(on_prompt("a slice of pizza", names, WEIGHTS / "art", False))
    assert len(nearest_names("a submarine", names, {})) == 3
    (line,) = on_prompt("phone", names, WEIGHTS / "art", False)
    assert "nearest: mobile phone, telephone" in line
