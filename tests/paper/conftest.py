"""Tiny, untaught stand-ins for the shipped model, LCM-LoRA and judge: all runs in seconds."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import CONFIG, ROOT, random_tau, tiny_unet, write_model

from minilcm.data.emoji import STYLES
from minilcm.files.lora_file import write_tau
from minilcm.files.safetensors_file import write_tensors
from minilcm.metrics import Judge
from paper import rank, setup
from weights.emoji.styles import KINDS

NAMES = (ROOT / "weights/emoji/names.txt").read_text().splitlines()[:300]


@pytest.fixture(scope="session", autouse=True)
def tiny_model(tmp_path_factory):
    """setup.shipped() is the tiny model; what is kept goes to a temporary folder."""
    folder = tmp_path_factory.mktemp("paper")
    config = replace(CONFIG, names=tuple(NAMES), guidance=1 + setup.W)
    write_model(folder / "model.safetensors", config=config)
    write_tau(folder / "lcm_lora.safetensors", random_tau(tiny_unet(), 1, 4, 4.0, size=0.1), {})
    torch.manual_seed(0)
    styles = [*STYLES, *KINDS]
    judge = Judge(NAMES, styles, 8, 16).state_dict()
    write_tensors(
        folder / "judge.safetensors", judge, {"config": json.dumps([NAMES, styles, 8, 16])}
    )
    with pytest.MonkeyPatch.context() as change:
        for constant, name in (("MODEL", "model"), ("LORA", "lcm_lora"), ("JUDGE", "judge")):
            change.setattr(setup, constant, folder / f"{name}.safetensors")
        for module in (setup, rank):
            change.setattr(module, "CACHE", folder / "kept")
        yield
