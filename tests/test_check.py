"""minilcm against diffusers on the same files; at full size: benchmarks/full_size.py."""

import sys
from dataclasses import replace

import pytest
import torch
from tiny import CONFIG, TWO_TOWERS, random_tau, tiny_unet, write_model

from benchmarks import check
from minilcm.files.lora_file import write_tau

ALIKE = ((1, 1), (0, 0), (0, 0))  # diffusers' blocks have transformers everywhere or nowhere
PLAIN = replace(CONFIG, unet=replace(CONFIG.unet, up=ALIKE))
V = replace(PLAIN, unet=replace(PLAIN.unet, v=True))
XL = replace(TWO_TOWERS, unet=replace(TWO_TOWERS.unet, up=ALIKE))
PARTS = ["text", "VAE, encode", "VAE, decode", "UNet", "UNet + style"]


def others() -> None:
    for package in ("diffusers", "transformers", "peft"):
        reason = f"{package} is not installed: pip install -e .[reference]"
        pytest.importorskip(package, reason=reason)


def files(folder, config):
    model, lora = write_model(folder / "model.safetensors", 0, config), folder / "style.safetensors"
    tau = random_tau(tiny_unet(0, config.unet), 1, 2, 4.0)
    middle = {path: x for path, x in tau.items() if path.startswith("middle_block")}
    write_tau(lora, middle, {}, torch.float32)  # the middle has a place in all families
    return model, lora


@pytest.mark.parametrize("config", [PLAIN, V, XL], ids=["SD1", "v", "SDXL"])
def test_equal(tmp_path, capsys, config):
    others()
    model, lora = files(tmp_path, config)
    with pytest.raises(SystemExit) as stopped:
        check.main([str(model), "--lora", str(lora)])
    out = capsys.readouterr().out
    assert not stopped.value.code and out.splitlines()[-1] == "equal", out
    assert all(f"\n{part} " in out for part in PARTS)
    assert ("pooled text" in out) == (config is XL)


@pytest.mark.parametrize(
    "module, key, part",
    [
        ("unet", "middle_block.1.proj_in.weight", "UNet"),
        ("vae", "decoder.conv_in.weight", "VAE, decode"),
        ("vae", "encoder.conv_in.weight", "VAE, encode"),
        ("text", "tower.token_embedding.weight", "text"),
    ],
)
def test_one_weight_changed(tmp_path, capsys, monkeypatch, module, key, part):
    """One tensor of ours is 1 % larger: the part that it is in is named."""
    others()
    model, lora = files(tmp_path, PLAIN)

    def spoilt(*args):
        loaded = load(*args)
        getattr(loaded, module).state_dict()[key].mul_(1.01)
        return loaded

    load = check.load_checkpoint
    monkeypatch.setattr(check, "load_checkpoint", spoilt)
    assert not check.check(model, [lora])
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"begin to differ at: {part}")


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    model = write_model(tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r'reference extra \(diffusers\); pip install -e "\.\[reference\]"$'
    ):
        check.check(model, [])
