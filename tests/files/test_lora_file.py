"""LoRA files: bitwise round trips, lora_alpha != rank, names both ways, a line for a wrong file."""

import json
import math
import os
import pickle
import re
from datetime import date

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_tau, tiny_unet, write_model
from torch import nn

from minilcm.files import safetensors_file as safefile
from minilcm.files.lora_file import lcm_scale, read_recipe, read_tau, speeds_up, write_tau
from minilcm.files.lora_keys import of_lora, split_key
from minilcm.files.names import module_table, text_table, to_diffusers_path
from minilcm.lora import ATTENTION, TARGETS, Tau, target_paths
from minilcm.merge import combine, delta, distance
from minilcm.model.unet import UNet, emoji, sd2, sd15, sdxl, small_sd, ssd1b, tiny_sd, vega

FAMILIES = (emoji, sd15, sd2, ssd1b, sdxl, vega, small_sd, tiny_sd)
FLAT = "lora_unet_down_blocks_0_resnets_0_conv1"


def mixed_tau() -> Tau:
    """All modules of the tiny UNet, each with a rank of its own and lora_alpha != rank."""
    unet = tiny_unet()
    taus = [random_tau(unet, seed, rank=seed, lora_alpha=seed + 0.3) for seed in (1, 2, 3, 4)]
    return {path: taus[i % 4][path] for i, path in enumerate(target_paths(unet))}


def same(a: Tau, b: Tau) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[p][0], b[p][0]) and torch.equal(a[p][1], b[p][1]) and a[p][2] == b[p][2]
        for p in a
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
    """write_tau in float32, read_tau: same paths, same bits, same lora_alpha, for several ranks."""
    tau = {
        path: (up, down, float(torch.tensor(lora_alpha)))
        for path, (up, down, lora_alpha) in mixed_tau().items()
    }
    write_tau(tmp_path / "lora.safetensors", tau, {}, torch.float32)
    assert same(read_tau(tmp_path / "lora.safetensors"), tau)


def test_live_parameters_can_be_written(tmp_path):
    """`get_tau` gives parameters that require grad; the file holds their values."""
    tau = {
        p: (nn.Parameter(up), nn.Parameter(down), 8.0) for p, (up, down, _) in mixed_tau().items()
    }
    write_tau(tmp_path / "lora.safetensors", tau, {}, torch.float32)
    assert same(read_tau(tmp_path / "lora.safetensors"), tau)


def test_float16_is_the_default_and_rounds_once(tmp_path):
    """The file has float16, read as that rounding in float32; a second trip changes nothing."""
    tau = mixed_tau()
    write_tau(tmp_path / "a.safetensors", tau, {})
    assert {value.dtype for value in load_file(tmp_path / "a.safetensors").values()} == {
        torch.float16
    }
    read = read_tau(tmp_path / "a.safetensors")
    assert all(
        torch.equal(read[p][0], tau[p][0].half().float()) and read[p][1].dtype == torch.float32
        for p in tau
    )
    write_tau(tmp_path / "b.safetensors", read, {})
    assert same(read_tau(tmp_path / "b.safetensors"), read)


def test_a_missing_alpha_means_rank(lora):
    """Without `.alpha` a LoRA has strength 1: lora_alpha = rank, by module (kohya's rule)."""
    spoil(
        lora, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(".alpha")]
    )
    assert sorted(
        (down.shape[0], lora_alpha) for _, down, lora_alpha in read_tau(lora).values()
    ) == [
        (1, 1.0),
        (3, 3.0),
    ]


def test_keys_are_kohyas(lora):
    """`lora_unet_` + path with underscores, three tensors a module; kohya's rank and alpha."""
    tensors = load_file(lora)
    assert len(tensors) == 6 and tensors[f"{FLAT}.alpha"].ndim == 0
    assert tensors[f"{FLAT}.lora_down.weight"].shape == (1, 32, 3, 3) and tensors[
        f"{FLAT}.lora_up.weight"
    ].shape == (
        32,
        1,
        1,
        1,
    )
    _, metadata = safefile.read_tensors(lora)
    assert metadata["ss_network_module"] == "networks.lora" and metadata["format"] == "pt"


@pytest.mark.parametrize(
    "name, recipe, expected",
    [
        ("fast", {"objective": "lcm"}, True),
        ("sd15-LCM", {}, True),
        ("style", {"objective": "diffusion"}, False),
        ("mix", {"combined": "a:1 b:1"}, True),
        ("mix", {"loras": '[{"file": "a", "sha256": "0", "scale": 0.5, "objective": "lcm"}]'}, 0.5),
        ("mix", {"loras": '[{"file": "my_LCM.safetensors", "sha256": "0", "scale": 0.5}]'}, 0.5),
        ("lcm", {"loras": '[{"file": "a", "sha256": "0", "scale": 1, "objective": "sgd"}]'}, False),
        ("mix", {"loras": '[{"file": "a", "sha256": "0", "scale": 1, "objective": "sgd"}]'}, False),
        ("mix", {"loras": '[{"file": "a", "scale": 1, "objective": "lcm"}]'}, False),
        ("mix", {"loras": "["}, False),
    ],
)
def test_an_lcm_lora_is_told_by_recipe_or_name(tmp_path, name, recipe, expected):
    """And by how much it is in a combination, as far as the recipe can be read."""
    path = tmp_path / f"{name}.safetensors"
    write_tau(path, mixed_tau(), recipe)
    assert lcm_scale(read_recipe(path), path.name) == expected
    assert speeds_up(path) == bool(expected)


def test_recipe_is_in_the_header(tmp_path):
    """What training recorded comes back by read_recipe from `minilcm.*`, with ranks and alphas."""
    recipe = {"objective": "lcm", "w": "7.5", "K": "50", "timestep_scaling": "10"}
    write_tau(tmp_path / "lora.safetensors", mixed_tau(), recipe)
    assert read_recipe(tmp_path / "lora.safetensors") == recipe
    _, metadata = safefile.read_tensors(tmp_path / "lora.safetensors")
    assert metadata["minilcm.w"] == "7.5" and metadata["ss_network_dim"] == "1,2,3,4"
    # the same bytes on another day: a run resumed after midnight ends as one nobody touched
    assert date.today().isoformat() not in metadata.values()
    assert metadata["ss_network_alpha"] == "1.3,2.3,3.3,4.3"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [TARGETS, ATTENTION])
def test_round_trip_of_every_family(tmp_path, family, targets):
    """Also where diffusers' names of one family are all among another's, as small-sd's attention
    is among SD1.x's.
    """
    with torch.device("meta"):
        unet = UNet(family())
    tau = {}
    for path in target_paths(unet, targets):
        out, *fan_in = unet.get_submodule(path).weight.shape
        up = torch.zeros(out, 1, *[1] * (len(fan_in) - 1))
        tau[path] = up, torch.zeros(1, *fan_in), 1.0
    write_tau(tmp_path / "lora.safetensors", tau, {})
    assert same(read_tau(tmp_path / "lora.safetensors"), tau)


# ---- names


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_a_bijection(family):
    """Each module has one flattened name in LDM and one in diffusers spelling; both come back."""
    with torch.device("meta"):
        unet = UNet(family())
    paths = [path for path, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    diffusers = [to_diffusers_path(path, unet.cfg) for path in paths]
    table = module_table(family)
    assert len(set(diffusers)) == len(paths) and set(target_paths(unet)) <= set(paths)
    assert [table[path.replace(".", "_")][0] for path in paths] == paths
    assert [table[path.replace(".", "_")][0] for path in diffusers] == paths


@pytest.mark.parametrize("family", [sd15, ssd1b, sdxl])
def test_diffusers_names_are_the_official_ones(official_lora_keys, family):
    """The map equals the one tracked by tensors through diffusers' converter, norms too."""
    official = official_lora_keys[family.__name__]
    assert {path: to_diffusers_path(path, family()) for path in official} == official


@pytest.mark.parametrize(
    "family, modules, parameters",
    [(sd15, 278, 67_252_224), (ssd1b, 423, 104_902_656), (sdxl, 788, 196_751_360)],
)
def test_official_lcm_lora_keys(official_lora_keys, family, modules, parameters):
    """Every key of the official file names a target of the LCM-LoRA, with rank 64's shapes."""
    keys = official_lora_keys[f"lcm_{family.__name__}"]
    with torch.device("meta"):
        unet = UNet(family())
    found, count = set(), 0
    for key, shape in keys.items():
        prefix, module, part = split_key(key)
        path = module_table(family).get(module.replace(".", "_"), (None,))[0]
        assert prefix == "" and path
        found.add(path)
        weight = unet.get_submodule(path).weight.shape
        if part == "down":
            assert shape == [64, *weight[1:]]
        if part == "up":
            assert shape == [weight[0], 64, *(1 for _ in weight[2:])]
        count += math.prod(shape) if part != "alpha" else 0
    assert found == set(target_paths(unet)) and len(found) == modules and count == parameters


SPELLINGS = [  # each of public files, by grammar; and what it names
    (
        "lora_unet_up_blocks_2_attentions_0_proj_in.lora_up.weight",
        "",
        "output_blocks.6.1.proj_in",
        "up",
    ),
    (
        "lora_unet_mid_block_resnets_0_time_emb_proj.alpha",
        "",
        "middle_block.0.emb_layers.1",
        "alpha",
    ),
    (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "",
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "down",
    ),
    ("lora_unet_output_blocks_5_2_conv.lora_down.weight", "", "output_blocks.5.2.conv", "down"),
    (
        "lora_unet_up_blocks_0_upsamplers_0_conv.lora_mid.weight",
        "",
        "output_blocks.2.1.conv",
        "mid",
    ),
    (
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "te1.",
        "encoder.layers.0.self_attn.q_proj",
        "down",
    ),
    (
        "lora_te1_text_model_encoder_layers_11_mlp_fc1.lora_up.weight",
        "te1.",
        "encoder.layers.11.mlp.fc1",
        "up",
    ),
    (
        "lora_te2_text_model_encoder_layers_31_self_attn_v_proj.lora_up.weight",
        "te2.",
        "encoder.layers.31.self_attn.v_proj",
        "up",
    ),
    ("lora_te2_text_projection.lora_down.weight", "te2.", "text_projection", "down"),
    (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "",
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "down",
    ),
    ("unet.mid_block.resnets.1.conv1.lora_B.weight", "", "middle_block.2.in_layers.2", "up"),
    (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "te1.",
        "encoder.layers.0.self_attn.q_proj",
        "down",
    ),
    (
        "base_model.model.mid_block.resnets.1.time_emb_proj.lora_B.weight",
        "",
        "middle_block.2.emb_layers.1",
        "up",
    ),
    ("unet.conv_in.lora_A.default.weight", "", "input_blocks.0.0", "down"),
    ("unet.conv_out.lora_B.default_0.weight", "", "out.2", "up"),
    (
        "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0.lora.down.weight",
        "",
        "output_blocks.5.1.transformer_blocks.0.attn2.to_out.0",
        "down",
    ),
    (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
        "",
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "down",
    ),
    (
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.up.weight",
        "",
        "middle_block.1.transformer_blocks.0.attn2.to_out.0",
        "up",
    ),
    (
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight",
        "te1.",
        "encoder.layers.0.self_attn.q_proj",
        "up",
    ),
    (
        "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora.down.weight",
        "te1.",
        "encoder.layers.3.self_attn.out_proj",
        "down",
    ),
    (
        "text_encoder_2.text_model.encoder.layers.1.self_attn.k_proj.lora_linear_layer.up.weight",
        "te2.",
        "encoder.layers.1.self_attn.k_proj",
        "up",
    ),
    (
        "diffusion_model.input_blocks.4.1.proj_in.lora_up.weight",
        "",
        "input_blocks.4.1.proj_in",
        "up",
    ),
    ("unet.input_blocks.4.1.proj_in.lora_down.weight", "", "input_blocks.4.1.proj_in", "down"),
    ("unet.input_blocks.4.1.proj_in.lora.alpha", "", "input_blocks.4.1.proj_in", "alpha"),
    ("lycoris_mid_block_attentions_0_proj_in.lora_up.weight", "", "middle_block.1.proj_in", "up"),
    ("lora_unet_mid_block_attentions_0_proj_in.scalar", "", "middle_block.1.proj_in", "scalar"),
    (
        "clip_l.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
        "te1.",
        "encoder.layers.0.mlp.fc1",
        "up",
    ),
    (
        "clip_g.text_model.encoder.layers.0.mlp.fc2.alpha",
        "te2.",
        "encoder.layers.0.mlp.fc2",
        "alpha",
    ),
    ("clip_g.text_projection.lora_up.weight", "te2.", "text_projection", "up"),
    (
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
        "te1.",
        "encoder.layers.0.mlp.fc1",
        "up",
    ),
    (
        "text_encoders.clip_g.transformer.text_projection.lora_up.weight",
        "te2.",
        "text_projection",
        "up",
    ),
    (
        "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "te1.",
        "encoder.layers.0.self_attn.q_proj",
        "down",
    ),
    (
        "base_model.model.encoder.layers.0.self_attn.q_proj.lora_B.default.weight",
        "te1.",
        "encoder.layers.0.self_attn.q_proj",
        "up",
    ),
]


@pytest.mark.parametrize("key, prefix, path, part", SPELLINGS)
def test_spellings(key, prefix, path, part):
    """All spellings, UNet and text: SD1.5's module (or tower) and the part that the key names."""
    got_prefix, module, got_part = split_key(key)
    flat = module.replace(".", "_")
    got = text_table().get(flat) if got_prefix else module_table(sd15)[flat][0]
    assert (got_prefix, got, got_part) == (prefix, path, part)
    assert of_lora(key) == (part in ("up", "down"))  # for `info`, and refused as --model


def test_the_upsampler_of_the_lowest_level(tmp_path):
    """`up_blocks_0_upsamplers_0_conv` is output_blocks.2.1 in SD1.5, .2.2 in SDXL (A1111: lost)."""
    flat = "lora_unet_up_blocks_0_upsamplers_0_conv"
    for other, path in (
        ("down_blocks_0_attentions_0_proj_in", "output_blocks.2.1.conv"),
        ("add_embedding_linear_1", "output_blocks.2.2.conv"),
    ):
        tensors = {
            f"{flat}.lora_down.weight": torch.ones(1, 1280, 3, 3),
            f"{flat}.lora_up.weight": torch.ones(1280, 1, 1, 1),
        }
        tensors |= {
            f"lora_unet_{other}.lora_down.weight": torch.ones(1, 3),
            f"lora_unet_{other}.lora_up.weight": torch.ones(3, 1),
        }
        save_file(tensors, tmp_path / "lora.safetensors")
        assert path in read_tau(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("style", ["diffusers", "ldm", "peft"])
def test_styles_come_back(tmp_path, style):
    """Each style in float32, text encoder too, ranks and lora_alphas different: the same tau."""
    tau = {
        path: (up, down, float(torch.tensor(lora_alpha)))
        for path, (up, down, lora_alpha) in mixed_tau().items()
    }
    tau["te1.encoder.layers.0.self_attn.q_proj"] = torch.ones(32, 2), torch.ones(2, 32), 7.0
    tau["te1.encoder.layers.1.mlp.fc1"] = torch.ones(64, 5), torch.ones(5, 32), 1.5
    write_tau(tmp_path / "lora.safetensors", tau, {}, torch.float32, style)
    assert same(read_tau(tmp_path / "lora.safetensors"), tau)


def test_sdxl_is_written_in_ldm_names_and_says_so(tmp_path):
    """Default names are G1 for SD1.x, G2 for SDXL; `ss_base_model_version` is for A1111's list."""
    for path, width, key, base in (
        (
            "input_blocks.7.1.proj_in",
            (1280, 1280, 1, 1),
            "lora_unet_down_blocks_2_attentions_0_proj_in",
            "sd_v1",
        ),
        (
            "input_blocks.7.1.proj_in",
            (1280, 1280),
            "lora_unet_input_blocks_7_1_proj_in",
            "sdxl_base_v1-0",
        ),
    ):
        up, down = torch.ones(width[0], 2, *width[2:]), torch.ones(2, *width[1:])
        tau = {path: (up, down, 1.0)}
        if base != "sd_v1":  # a module that only SDXL has
            tau["input_blocks.7.1.transformer_blocks.9.attn1.to_q"] = (
                torch.ones(1280, 2),
                torch.ones(2, 1280),
                1.0,
            )
        write_tau(tmp_path / "lora.safetensors", tau, {})
        tensors, metadata = safefile.read_tensors(tmp_path / "lora.safetensors")
        assert f"{key}.lora_up.weight" in tensors and metadata["ss_base_model_version"] == base
        assert set(read_tau(tmp_path / "lora.safetensors")) == set(tau)


def test_a_tucker_core_is_multiplied_out(tmp_path):
    """LoCon with lora_mid.

    delta[o, i, h, w] = alpha / r sum_pq up[o, p] mid[p, q, h, w] down[q, i]
    """
    g = torch.Generator().manual_seed(0)
    up, mid, down = (
        torch.randn(s, generator=g) for s in ((32, 3, 1, 1), (3, 3, 3, 3), (3, 32, 1, 1))
    )
    parts = {
        "lora_up.weight": up,
        "lora_mid.weight": mid,
        "lora_down.weight": down,
        "alpha": torch.tensor(1.5),
    }
    save_file({f"{FLAT}.{k}": v for k, v in parts.items()}, tmp_path / "lora.safetensors")
    ((path, tau),) = read_tau(tmp_path / "lora.safetensors").items()
    expected = 0.5 * torch.einsum(
        "op,pqhw,qi->oihw", up[:, :, 0, 0].double(), mid.double(), down[:, :, 0, 0].double()
    )
    torch.testing.assert_close(delta(*tau).double(), expected, rtol=1e-5, atol=1e-5)


def kernel_and_matrix() -> tuple[dict, dict]:
    """The tensors of one 1x1 convolution's LoRA, as kernels and as matrices."""
    g, flat = torch.Generator().manual_seed(0), "lora_unet_mid_block_attentions_0_proj_in"
    up, down = torch.randn(32, 3, generator=g), torch.randn(3, 32, generator=g)
    matrix = {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down}
    kernel = {key: x[:, :, None, None].contiguous() for key, x in matrix.items()}
    return kernel, matrix


def test_a_1x1_kernel_is_a_matrix(tmp_path):
    """Up and down as kernels, as matrices or one of each: the same delta; written again, it has the
    form of the official weight.
    """
    kernel, matrix = kernel_and_matrix()
    up, down = matrix
    taus = []
    for tensors in (
        kernel,
        matrix,
        {up: kernel[up], down: matrix[down]},
        kernel | {up: matrix[up]},
    ):
        save_file(tensors, tmp_path / "lora.safetensors")
        taus.append(read_tau(tmp_path / "lora.safetensors"))
        assert distance(taus[-1], taus[0]) == 0 and distance(taus[0], taus[-1]) == 0
        mixed, path = combine([taus[-1], taus[0]], [0.5, 0.5]), "middle_block.1.proj_in"
        torch.testing.assert_close(delta(*mixed[path]), delta(*taus[0][path]), rtol=1e-5, atol=1e-5)
        write_tau(tmp_path / "again.safetensors", taus[-1], {}, torch.float32)
        assert load_file(tmp_path / "again.safetensors")[up].shape == (32, 3, 1, 1)


def test_a_scalar_multiplies(tmp_path):
    """LyCORIS: delta = scalar alpha / r B A."""
    tensors = kernel_and_matrix()[0]
    save_file(tensors, tmp_path / "plain.safetensors")
    flat = next(iter(tensors)).split(".")[0]
    more = {f"{flat}.alpha": torch.tensor(6.0), f"{flat}.scalar": torch.tensor(0.25)}
    save_file(tensors | more, tmp_path / "scaled.safetensors")
    plain, scaled = (read_tau(tmp_path / f"{x}.safetensors") for x in ("plain", "scaled"))
    for path in plain:  # 0.25 * 6 / 3
        torch.testing.assert_close(delta(*scaled[path]), 0.5 * delta(*plain[path]))


@pytest.mark.parametrize("width, te", [(768, "te1."), (1280, "te2.")])
def test_peft_adapter_of_a_text_encoder(tmp_path, width, te):
    """It does not say of which of SDXL's two; the width does, and adapter_config.json tells
    lora_alpha.
    """
    key = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{key}.lora_A.weight": torch.ones(4, width)}
    tensors |= {f"{key}.lora_B.weight": torch.ones(width, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    ((path, (_, _, lora_alpha)),) = read_tau(tmp_path / "adapter_model.safetensors").items()
    assert (path, lora_alpha) == (f"{te}encoder.layers.0.self_attn.q_proj", 8.0)


def test_what_is_left_out_is_said(lora, capsys):
    """OneTrainer's embeddings of new words; modules without effect that no LoRA here can change, as
    ComfyUI's LoraSave writes them for embeddings.
    """
    te = "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding"

    def add(tensors):
        tensors["bundle_emb.my cat.clip_l"] = torch.ones(2, 768)
        tensors[f"{te}.lora_up.weight"] = torch.zeros(9, 2)
        tensors[f"{te}.lora_down.weight"] = torch.ones(2, 8)

    whole = read_tau(lora)
    capsys.readouterr()
    spoil(lora, add)
    assert same(read_tau(lora), whole)
    embeddings, nothing = capsys.readouterr().out.splitlines()
    assert embeddings.endswith("not used; these words mean nothing: my cat")
    assert nothing.endswith("change nothing are left out, first: te1.embeddings_token_embedding")
    spoil(lora, lambda tensors: tensors[f"{te}.lora_up.weight"].add_(1))
    with pytest.raises(ValueError, match="1 of 3 modules are in no known UNet, first: te1.embed"):
        read_tau(lora)


@pytest.mark.parametrize(
    "key, down, up",
    [
        ("transformer.single_transformer_blocks.0.attn.to_q", "A", "B"),
        ("transformer.transformer_blocks.0.attn.to_q", "A", "B"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "down", "up"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "down", "up"),
    ],
)
def test_lora_of_a_transformer(tmp_path, key, down, up):
    """LoRA files of Flux and SD3 are refused by what they are, in diffusers' and kohya's names."""
    path = tmp_path / "lora.safetensors"
    pair = {f"{key}.lora_{down}.weight": torch.ones(2, 3)}
    save_file(pair | {f"{key}.lora_{up}.weight": torch.ones(3, 2)}, path)
    with pytest.raises(ValueError, match="1 of 1 modules .* it is for SD3 or Flux"):
        read_tau(path)


def test_what_cannot_be_read_again_is_not_written(tmp_path):
    """Unknown modules, and values that float16 would make infinite."""
    path, one = tmp_path / "lora.safetensors", torch.ones(1, 1)
    for target, up, dtype, line in (
        ("te1.embeddings.token_embedding", one, torch.float32, "is in no known UNet"),
        ("input_blocks.99.0.in_layers.2", one, torch.float32, "is in no known UNet"),
        ("middle_block.1.proj_in", one * 7e4, torch.float16, "too large for float16; give --dtype"),
    ):
        with pytest.raises(ValueError, match=f"lora.safetensors: {target} .*{line}"):
            write_tau(path, {target: (up, one, 1.0)}, {}, dtype)
    assert not path.exists()
    write_tau(path, {target: (up, one, 1.0)}, {}, torch.float32)
    assert same(read_tau(path), {target: (up[..., None, None], one[..., None, None], 1.0)})


def test_peft_alpha_is_read(tmp_path):
    """lora_adapter_metadata, or adapter_config.json beside it, tells lora_alpha; rsLoRA's too."""
    key = "mid_block.resnets.0.conv1"
    tensors = {
        f"{key}.lora_A.weight": torch.ones(4, 32, 3, 3),
        f"{key}.lora_B.weight": torch.ones(32, 4, 1, 1),
    }
    path = tmp_path / "adapter_model.safetensors"
    config = {"unet.r": 4, "unet.lora_alpha": 8}
    save_file(
        {f"unet.{k}": v for k, v in tensors.items()},
        path,
        {"lora_adapter_metadata": json.dumps(config)},
    )
    assert [x[2] for x in read_tau(path).values()] == [8.0]
    config["unet.alpha_pattern"] = {key: 2}
    save_file(
        {f"unet.{k}": v for k, v in tensors.items()},
        path,
        {"lora_adapter_metadata": json.dumps(config)},
    )
    assert [x[2] for x in read_tau(path).values()] == [2.0]
    for other in ({"base.lora_alpha": 8}, {"lora_alpha": 8}, {}):  # which would be ignored
        config = {"lora_adapter_metadata": json.dumps(other)}
        save_file({f"unet.{k}": v for k, v in tensors.items()}, path, config)
        with pytest.raises(ValueError, match="its networks are none of unet, text_encoder and"):
            read_tau(path)
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, path)
    assert [x[2] for x in read_tau(path).values()] == [4.0]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    assert [x[2] for x in read_tau(path).values()] == [8.0]
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True})
    )
    assert [x[2] for x in read_tau(path).values()] == [16.0]


def test_peft_patterns(tmp_path):
    """alpha_pattern holds ends of names at a dot, or expressions; the first that fits (PEFT).

    attn1.to_k: "to_k"; attn2.to_k: the first, though "to_k" fits too; conv1: "[02]" fits 0 and not
    1; to_q: none, and "o_q" ends at no dot. rsLoRA's scale alpha / sqrt(r) is an alpha of
    alpha sqrt(r). Text encoders have their own.
    """
    attn = "unet.mid_block.attentions.0.transformer_blocks.0"
    expected = {f"{attn}.attn1.to_k": 2.0, f"{attn}.attn2.to_k": 3.0, f"{attn}.attn1.to_q": 8.0}
    expected |= {f"unet.mid_block.resnets.{i}.conv1": x for i, x in ((0, 5.0), (1, 8.0))}
    expected["text_encoder.text_model.encoder.layers.0.mlp.fc1"] = 6.0
    expected["text_encoder.encoder.layers.1.mlp.fc1"] = 7.0  # as transformers 5 names it
    patterns = {"attn2.to_k": 3, "to_k": 2, "o_q": 9, r"mid_block.resnets.[02]\.conv\d": 5}
    config = {"unet.lora_alpha": 8, "unet.alpha_pattern": patterns, "text_encoder.lora_alpha": 6}
    config["text_encoder.alpha_pattern"] = {"text_model.encoder.layers.1.mlp.fc1": 7}
    tensors = {}
    for name in expected:
        kernel = [3, 3] if "conv" in name else []
        tensors[f"{name}.lora_A.weight"] = torch.ones(4, 32, *kernel)
        tensors[f"{name}.lora_B.weight"] = torch.ones(32, 4, *[1 for _ in kernel])
    for factor, more in ((1, {}), (2, {"unet.use_rslora": True, "text_encoder.use_rslora": True})):
        save_file(
            tensors,
            tmp_path / "lora.safetensors",
            {"lora_adapter_metadata": json.dumps(config | more)},
        )
        got = sorted(
            lora_alpha for _, _, lora_alpha in read_tau(tmp_path / "lora.safetensors").values()
        )
        assert got == sorted(factor * x for x in expected.values())
        first = read_tau(tmp_path / "lora.safetensors")[
            "middle_block.1.transformer_blocks.0.attn2.to_k"
        ]
        assert first[2] == 3.0 * factor


def test_a_pattern_that_could_take_years_is_refused(tmp_path):
    """Nested repeats take time that is exponential in the length of the name."""
    tensors = {"unet.mid_block.resnets.0.conv1.lora_A.weight": torch.ones(4, 32, 3, 3)}
    tensors["unet.mid_block.resnets.0.conv1.lora_B.weight"] = torch.ones(32, 4, 1, 1)
    config = {"unet.lora_alpha": 8, "unet.alpha_pattern": {r"(\w+)+x": 3}}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    assert "has repeats or choices" in one_line(tmp_path / "lora.safetensors")


def test_a_bare_peft_adapter_without_its_settings_says_what_it_assumes(tmp_path, capsys):
    """PEFT's default alpha is 8: rank 64 read as alpha 64 would be 8 times too strong; one line."""
    name = "base_model.model.mid_block.resnets.0.conv1"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(4, 32, 3, 3),
        f"{name}.lora_B.weight": torch.ones(32, 4, 1, 1),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    read_tau(tmp_path / "adapter_model.safetensors")
    assert "no adapter_config.json: lora_alpha is taken as the rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_x.hada_w1_a",
        "lora_unet_x.lokr_w1",
        "lora_unet_x.dora_scale",
        "unet.x.lora_magnitude_vector",
        "lora_unet_x.diff",
        "lora_unet_x.diff_b",
        "lora_unet_x.w_norm",
        "lora_unet_x.on_input",
        "lora_unet_x.a1.weight",
        "lora_unet_x.oft_blocks",
    ],
)
def test_other_adapters_are_refused_by_name(lora, key):
    """LyCORIS' and PEFT's other kinds: one line with kind and key, though the rest is LoRA."""
    spoil(lora, lambda tensors: tensors.update({key: torch.zeros(2)}))
    assert re.search(
        rf"(LoHa|LoKr|DoRA|difference|IA3|GLoRA|OFT) is not LoRA.*{re.escape(key)}", one_line(lora)
    )


def test_one_module_in_both_spellings_is_refused(lora):
    """diffusers drops one of the two without a word."""
    twin = "lora_unet_input_blocks_1_0_in_layers_2"
    spoil(
        lora,
        lambda t: t.update({k.replace(FLAT, twin): v.clone() for k, v in t.items() if FLAT in k}),
    )
    assert "input_blocks.1.0.in_layers.2 is in the file twice" in one_line(lora)


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
    assert one_line(tmp_path).endswith("is a folder; give the single file")


def test_not_a_lora(tmp_path):
    """A checkpoint is told where it belongs; any other file is named by its first key, or empty."""
    assert "this is a checkpoint, not a LoRA file; pass it with --model" in one_line(
        write_model(tmp_path / "model.safetensors")
    )
    save_file({"b": torch.zeros(1), "a": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert "not a LoRA file (first key: a)" in one_line(tmp_path / "x.safetensors")
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
            {"lora_unet_down_blocks_9_resnets_0_conv1.lora_up.weight": torch.zeros(2, 2)},
            "has only one of lora_down and lora_up",
        ),
        (
            {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.zeros(())},
            "te1.encoder_layers_0_mlp_fc1 has only",
        ),
        ({f"{FLAT}.weight": torch.zeros(2)}, r"conv1.weight does not belong to a LoRA"),
        (
            {f"lora_unet_x.{x}.weight": torch.ones(2, 2) for x in ("lora_up", "lora_down")},
            "1 of 3 modules are in no.*: x",
        ),
        (
            {f"lora_te_x.{x}.weight": torch.ones(2, 2) for x in ("lora_up", "lora_down")},
            "1 of 3 modules are in no",
        ),
        (
            {f"{FLAT}.lora_up.weight": torch.zeros(32, 1, 1, 1, dtype=torch.int8)},
            "is int8, quantised; dequantise it first",
        ),
        ({f"{FLAT}.dora_scale": torch.zeros(2)}, r"DoRA is not LoRA.*conv1.dora_scale"),
        ({f"{FLAT}.lora_down.weight": None}, "has only one of lora_down and lora_up"),
        ({f"{FLAT}.lora_up.weight": None}, "has only one of lora_down and lora_up"),
        (
            {f"{FLAT}.lora_up.weight": torch.zeros(32, 3, 1, 1)},
            r"up \(32, 3, 1, 1\) does not fit down \(1, 32, 3, 3\)",
        ),
        ({f"{FLAT}.lora_up.weight": torch.zeros(32, 1)}, r"up \(32, 1\) does not fit down"),
        (
            {f"{FLAT}.lora_up.weight": torch.zeros(32, 1, 3, 3)},
            r"up \(32, 1, 3, 3\) does not fit down",
        ),
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
    """Modules unknown or half there, ranks that do not fit, not finite: a line naming the key."""

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
    """Whether writing or renaming fails, the old file is whole and no temporary file stays."""
    old = lora.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        *((safefile, "save_file") if where == "save_file" else (os, "replace")), fail
    )
    with pytest.raises(KeyboardInterrupt):
        write_tau(lora, mixed_tau(), {})
    assert lora.read_bytes() == old
    assert list(lora.parent.iterdir()) == [lora]
