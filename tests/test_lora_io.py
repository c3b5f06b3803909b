"""LoRA files: bitwise round trips with lora_alpha != rank, names that come back, and one line for each kind of wrong
file.
"""

import os
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_tau, tiny_unet, write_model
from torch import nn

from minilcm import safefile
from minilcm.lora import Tau, target_paths
from minilcm.lora_io import PREFIX, module_table, read_recipe, read_tau, to_ldm_path, write_tau
from minilcm.unet import UNet, emoji, sd15, sdxl, ssd1b

FAMILIES = (emoji, sd15, ssd1b, sdxl)
FLAT = PREFIX + "input_blocks_1_0_in_layers_2"


def mixed_tau() -> Tau:
    """All modules of the tiny UNet, each with a rank of its own and lora_alpha != rank."""
    unet = tiny_unet()
    taus = [random_tau(unet, seed, rank=seed, lora_alpha=seed + 0.3) for seed in (1, 2, 3, 4)]
    return {path: taus[i % 4][path] for i, path in enumerate(target_paths(unet))}


def same(a: Tau, b: Tau) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[p][0], b[p][0]) and torch.equal(a[p][1], b[p][1]) and a[p][2] == b[p][2] for p in a
    )


@pytest.fixture
def lora(tmp_path):
    """A small good LoRA file to spoil: one convolution and one Linear."""
    paths = ("input_blocks.1.0.in_layers.2", "middle_block.1.transformer_blocks.0.attn1.to_out.0")
    write_tau(tmp_path / "lora.safetensors", {p: mixed_tau()[p] for p in paths}, {})
    return tmp_path / "lora.safetensors"


def spoil(path, change) -> None:
    """Rewrite a LoRA file with its tensors passed through `change` (in place)."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# ---- round trips


def test_float32_round_trip_is_bitwise(tmp_path):
    """write_tau in float32, read_tau: same paths, same bits, and lora_alpha as float32 holds it, for several ranks."""
    tau = {path: (up, down, float(torch.tensor(lora_alpha))) for path, (up, down, lora_alpha) in mixed_tau().items()}
    write_tau(tmp_path / "lora.safetensors", tau, {}, torch.float32)
    assert same(read_tau(tmp_path / "lora.safetensors"), tau)


def test_live_parameters_can_be_written(tmp_path):
    """`get_tau` gives parameters that require grad; the file holds their values."""
    tau = {p: (nn.Parameter(up), nn.Parameter(down), 8.0) for p, (up, down, _) in mixed_tau().items()}
    write_tau(tmp_path / "lora.safetensors", tau, {}, torch.float32)
    assert same(read_tau(tmp_path / "lora.safetensors"), tau)


def test_float16_is_the_default_and_rounds_once(tmp_path):
    """The file's tensors are float16, read back as float32 of exactly that rounding; a second round trip changes
    nothing.
    """
    tau = mixed_tau()
    write_tau(tmp_path / "a.safetensors", tau, {})
    assert {value.dtype for value in load_file(tmp_path / "a.safetensors").values()} == {torch.float16}
    read = read_tau(tmp_path / "a.safetensors")
    assert all(torch.equal(read[p][0], tau[p][0].half().float()) and read[p][1].dtype == torch.float32 for p in tau)
    write_tau(tmp_path / "b.safetensors", read, {})
    assert same(read_tau(tmp_path / "b.safetensors"), read)


def test_a_missing_alpha_means_rank(lora):
    """Files without `.alpha` have strength 1, so lora_alpha = rank, module by module (kohya's rule)."""
    spoil(lora, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(".alpha")])
    assert sorted((down.shape[0], lora_alpha) for _, down, lora_alpha in read_tau(lora).values()) == [
        (1, 1.0),
        (3, 3.0),
    ]


def test_keys_are_kohyas(lora):
    """`lora_unet_` + path with underscores, three tensors a module; the header has kohya's rank and alpha."""
    tensors = load_file(lora)
    assert len(tensors) == 6 and tensors[f"{FLAT}.alpha"].ndim == 0
    assert tensors[f"{FLAT}.lora_down.weight"].shape == (1, 32, 3, 3) and tensors[f"{FLAT}.lora_up.weight"].shape == (
        32,
        1,
        1,
        1,
    )
    _, metadata = safefile.read_tensors(lora)
    assert metadata["ss_network_module"] == "networks.lora" and metadata["format"] == "pt"


def test_recipe_is_in_the_header(tmp_path):
    """What training recorded comes back by read_recipe, and lies under `minilcm.*`; ranks and alphas are listed."""
    recipe = {"objective": "lcm", "w": "7.5", "K": "50", "timestep_scaling": "10"}
    write_tau(tmp_path / "lora.safetensors", mixed_tau(), recipe)
    assert read_recipe(tmp_path / "lora.safetensors") == recipe
    _, metadata = safefile.read_tensors(tmp_path / "lora.safetensors")
    assert metadata["minilcm.w"] == "7.5" and metadata["ss_network_dim"] == "1,2,3,4"
    assert metadata["ss_network_alpha"] == "1.3,2.3,3.3,4.3"


# ---- names


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_a_bijection(family):
    """Each adaptable module of the UNet has a flattened name of its own, which comes back to its path."""
    with torch.device("meta"):
        unet = UNet(family())
    paths = [path for path, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(module_table(family)) == len(paths)
    assert set(target_paths(unet)) <= set(paths)
    assert [to_ldm_path(path.replace(".", "_")) for path in paths] == paths


def test_families_agree_on_names():
    """A flattened name that two families have means the same path in both, so the order of look-up does not matter."""
    for one in FAMILIES:
        for other in FAMILIES:
            shared = module_table(one).keys() & module_table(other).keys()
            assert all(module_table(one)[flat] == module_table(other)[flat] for flat in shared)


def test_unknown_names_are_none():
    """Neither a dotted path, nor a norm, nor a text encoder's module is taken for a UNet module."""
    for flat in ("input_blocks.1.0.in_layers.2", "input_blocks_1_0_in_layers_0", "te_text_model_encoder", "", "out"):
        assert to_ldm_path(flat) is None


# ---- wrong files


def one_line(path) -> str:
    """The message of read_tau's ValueError, which is one line beginning with the path."""
    with pytest.raises(ValueError) as caught:
        read_tau(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def test_missing_file(tmp_path):
    """No such file, and a folder, which is no file either."""
    assert one_line(tmp_path / "no.safetensors").endswith("no such file")
    assert one_line(tmp_path).endswith("no such file")


def test_not_a_lora(tmp_path):
    """A checkpoint is told where it belongs; any other safetensors file is named by its first key; an empty one too."""
    assert "this is a checkpoint; pass it with --model" in one_line(write_model(tmp_path / "model.safetensors"))
    save_file({"b": torch.zeros(1), "a": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert "no LoRA file (first key: a)" in one_line(tmp_path / "x.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    assert "first key: none" in one_line(tmp_path / "empty.safetensors")


def test_pickle_is_refused(tmp_path):
    """A .pt or .ckpt is not opened, whatever it is called, and the message says why."""
    (tmp_path / "lora.safetensors").write_bytes(pickle.dumps({"lora_unet_x": 1}))
    assert "pickle files" in one_line(tmp_path / "lora.safetensors")
    torch.save({"lora_unet_x": torch.zeros(1)}, tmp_path / "lora.pt")
    assert "pickle files" in one_line(tmp_path / "lora.pt")


@pytest.mark.parametrize("fraction", [0.0, 0.0005, 0.1, 0.5, 0.999])
def test_truncated_file(tmp_path, fraction):
    """Cut in the length, the header or the data: always one line, and never some of the modules."""
    path = tmp_path / "lora.safetensors"
    write_tau(path, mixed_tau(), {})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    assert "not a safetensors file" in one_line(path) or "damaged or incomplete" in one_line(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": torch.zeros(2, 2)},
            "names no module of a known UNet",
        ),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.zeros(())}, "lora_te_text.* names no module"),
        ({f"{FLAT}.dora_scale": torch.zeros(2)}, r"in_layers_2.dora_scale names no module"),
        ({f"{FLAT}.lora_down.weight": None}, "has only one of lora_down and lora_up"),
        ({f"{FLAT}.lora_up.weight": None}, "has only one of lora_down and lora_up"),
        ({f"{FLAT}.lora_up.weight": torch.zeros(32, 3, 1, 1)}, r"up \(32, 3, 1, 1\) does not fit down \(1, 32, 3, 3\)"),
        ({f"{FLAT}.lora_up.weight": torch.zeros(32, 1)}, r"up \(32, 1\) does not fit down"),
        ({f"{FLAT}.lora_up.weight": torch.zeros(32, 1, 3, 3)}, r"up \(32, 1, 3, 3\) does not fit down"),
        ({f"{FLAT}.lora_up.weight": torch.zeros(32)}, r"up \(32,\) does not fit down"),
        (
            {f"{FLAT}.lora_up.weight": torch.full((32, 1, 1, 1), float("nan"))},
            "lora_up.weight has values that are not finite",
        ),
        ({f"{FLAT}.alpha": torch.tensor(float("inf"))}, "alpha has values that are not finite"),
        ({f"{FLAT}.alpha": torch.ones(2)}, r"alpha"),
    ],
)
def test_wrong_contents(lora, change, message):
    """Modules unknown or half there, ranks that do not fit, values not finite: one line naming key or path."""

    def apply(tensors):
        for key, value in change.items():
            tensors[key] = value
            if value is None:
                del tensors[key]

    spoil(lora, apply)
    assert re.search(message, one_line(lora))


# ---- writing


@pytest.mark.parametrize("where", ["save_file", "replace"])
def test_interrupted_write_leaves_the_old_file(lora, monkeypatch, where):
    """Whether writing or renaming fails, the old file is whole, and no temporary file stays behind."""
    old = lora.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((safefile, "save_file") if where == "save_file" else (os, "replace")), fail)
    with pytest.raises(KeyboardInterrupt):
        write_tau(lora, mixed_tau(), {})
    assert lora.read_bytes() == old
    assert list(lora.parent.iterdir()) == [lora]
