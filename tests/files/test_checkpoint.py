"""Model files: round trip, official prefixes, strict loading; and the state of a run."""

import dataclasses
import json
import math
import os
import re
from functools import cache

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import CONFIG, TWO_TOWERS, random_tau, tiny_text, tiny_unet, tiny_vae, write_model
from torch import nn

from minilcm.files import safetensors_file as safefile
from minilcm.files.checkpoint import load_model, places, save_model
from minilcm.files.identify import (
    from_json,
    open_checkpoint,
    sd2_config,
    sd15_config,
    sdxl_config,
    ssd1b_config,
    to_json,
)
from minilcm.files.lora_file import write_tau
from minilcm.files.names import to_diffusers_path, vae_key
from minilcm.files.safetensors_file import read_header, read_tensors
from minilcm.files.tools import info
from minilcm.model.text import TextConfig, lora_weights, open_clip_to_clip_l
from minilcm.model.tiny_vae import TinyDecoder
from minilcm.model.unet import (
    UNet,
    UNetConfig,
    emoji,
    sd2,
    sd15,
    sdxl,
    small_sd,
    ssd1b,
    tiny_sd,
    vega,
)
from minilcm.run.state import load_state, save_state, state_tensors

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."


SD2 = dataclasses.replace(CONFIG, text=TextConfig(32, 23, 2, open_clip=True), names=())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def contents(model):
    """(tensors, metadata) of the good file, to spoil copies of."""
    return read_tensors(model)


def error_of(path, tensors=None, metadata=None) -> str:
    """The one line with which load_model refuses these contents."""
    if tensors is not None:
        save_file(tensors, path, metadata)
    with pytest.raises(ValueError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


# ---- families


def header_file(path, shapes: dict[str, list[int]], dtype: str = "F16", metadata: dict = {}):
    """A safetensors file with these keys and zeros for data, which take no room on disk."""
    header, end = {"__metadata__": metadata}, 0
    for key, shape in shapes.items():
        begin, end = end, end + safefile.BYTES[dtype] * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + end)
    return path


@cache
def unet_keys(cfg: UNetConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {UNET + key: list(x.shape) for key, x in UNet(cfg).state_dict().items()}


def single_file(official_keys, family: str) -> dict[str, list[int]]:
    """Keys and shapes of the official file of a family, all parts."""
    xl = family != "sd15"
    shapes = {UNET + k: s for k, s in official_keys[family].items()}
    shapes |= {VAE + k: s for k, s in official_keys["vae"].items()}
    clip_l = "conditioner.embedders.0.transformer.text_model." if xl else TEXT
    shapes |= {clip_l + k: s for k, s in official_keys["clip_l"].items()}
    shapes |= (
        {"conditioner.embedders.1.model." + k: s for k, s in official_keys["big_g"].items()}
        if xl
        else {}
    )
    return shapes


@pytest.mark.parametrize(
    "family, config", [("sd15", sd15_config), ("sdxl", sdxl_config), ("ssd1b", ssd1b_config)]
)
def test_families_are_identified_by_their_header(tmp_path, official_keys, family, config):
    """The official key lists as files of full size without data; the UNet under three prefixes."""
    shapes = single_file(official_keys, family)
    assert open_checkpoint(header_file(tmp_path / "whole.safetensors", shapes)).config == config()
    for prefix in (UNET, "diffusion_model.", ""):
        unet = {prefix + k: s for k, s in official_keys[family].items()}
        assert open_checkpoint(header_file(tmp_path / "unet.safetensors", unet)).config == config()


def test_full_lcm_is_identified(tmp_path):
    """A UNet with cond_proj takes w: w_dim 256, under either name."""
    for name in ("time_embedding.cond_proj.weight", "time_embed.cond_proj.weight"):
        keys = unet_keys(sd15()) | {UNET + name: [320, 256]}
        path = header_file(tmp_path / "lcm.safetensors", keys)
        assert open_checkpoint(path).config.unet == dataclasses.replace(sd15(), w_dim=256)


def with_shape(shapes: dict, key: str, axis: int, size: int) -> dict:
    """The same keys with one axis changed wherever a key ends in `key`."""
    return {
        k: [*s[:axis], size, *s[axis + 1 :]] if k.endswith(key) else s for k, s in shapes.items()
    }


def koala() -> UNetConfig:
    return dataclasses.replace(
        sdxl(), down=((0,), (2,), (6,)), middle=6, up=((6, 6), (2, 2), (0, 0))
    )


def koala_700m() -> UNetConfig:
    return dataclasses.replace(
        koala(), down=((0,), (2,), (5,)), middle=0, up=((5, 5), (2, 2), (0, 0))
    )


@pytest.mark.parametrize("make", [sd15, small_sd, tiny_sd, sdxl, ssd1b, vega, koala, koala_700m])
def test_sizes_are_read_from_the_shapes(tmp_path, make):
    """The sizes that distilled models change, from a file of their full size that holds no data."""
    config = open_checkpoint(header_file(tmp_path / "model.safetensors", unet_keys(make()))).config
    family = sdxl_config() if make().adm else sd15_config()
    assert config == dataclasses.replace(family, unet=make())


@pytest.mark.parametrize(
    "make, count", [(small_sd, 579_384_964), (tiny_sd, 323_384_964), (vega, 745_225_604)]
)
def test_published_numbers_of_parameters(make, count):
    """579 M and 323 M by Segmind's announcement, 745 M by the card of Segmind-Vega."""
    assert sum(math.prod(shape) for shape in unet_keys(make()).values()) == count


def by_diffusers_script(key: str, cfg: UNetConfig) -> str:
    """The key of a small UNet in a file that convert_diffusers_to_original_stable_diffusion.py has
    written: 3 i + j for block j of level i, whether there are so many or not, and no map for
    transformers in up_blocks.0.
    """
    path, leaf = key.removeprefix(UNET).rsplit(".", 1)
    names = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", to_diffusers_path(path, cfg))
    if names is None:
        return key
    side, i, kind, j, rest = names.groups()
    i, j = int(i), int(j)
    if kind in ("resnets", "attentions"):
        if (side, kind, i) == ("up", "attentions", 0):
            return f"{UNET}up_blocks.0.attentions.{j}.{rest}.{leaf}"
        block = f"input_blocks.{3 * i + j + 1}" if side == "down" else f"output_blocks.{3 * i + j}"
        rest = path.split(".", 3)[3] if kind == "resnets" else rest
        return f"{UNET}{block}.{int(kind == 'attentions')}.{rest}.{leaf}"
    if side == "down":
        return f"{UNET}input_blocks.{3 * (i + 1)}.0.op.{leaf}"
    return f"{UNET}output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.conv.{leaf}"


@pytest.mark.parametrize("make", [small_sd, tiny_sd])
def test_gaps_in_the_numbers_of_small_unets(tmp_path, make):
    """Files by diffusers' script are read under LDM's numbers, each weight at its place."""
    theirs = {by_diffusers_script(k, make()): k for k in unet_keys(make())}
    assert len(theirs) == len(unet_keys(make())) and theirs.keys() != unet_keys(make()).keys()
    shapes = {k: unet_keys(make())[ours] for k, ours in theirs.items()}
    path = header_file(tmp_path / "model.safetensors", shapes)
    assert open_checkpoint(path).config.unet == make()
    where = {
        place.key: f"{UNET}{path}.weight" for path, place in places(read_header(path)[0]).items()
    }
    assert where == {k: ours for k, ours in theirs.items() if len(shapes[k]) > 1}


FOREIGN = [
    (
        lambda: unet_keys(dataclasses.replace(sd2(), adm=2048)),
        "an unknown UNet (width 320, in 4, context 1024, adm 2048)",
    ),
    (
        lambda: with_shape(unet_keys(sd15()), "input_blocks.0.0.weight", 1, 9),
        "an inpainting UNet (9 input channels)",
    ),
    (
        lambda: with_shape(unet_keys(sdxl()), "input_blocks.0.0.weight", 1, 8),
        "a pix2pix UNet (8 input channels)",
    ),
    (lambda: with_shape(unet_keys(sdxl()), "input_blocks.0.0.weight", 0, 384), "the SDXL refiner"),
    (lambda: with_shape(unet_keys(sd15()), "input_blocks.0.0.weight", 0, 256), "the x4 upscaler"),
    (
        lambda: with_shape(unet_keys(sdxl()), "attn2.to_k.weight", 1, 4096),
        "an unknown UNet (width 320, in 4, con",
    ),
    (lambda: unet_keys(sdxl()) | {"edm_mean": [4]}, "an EDM checkpoint (key edm_mean)"),
    (
        lambda: unet_keys(sdxl()) | {"edm_vpred.sigma_max": []},
        "an EDM checkpoint (key edm_vpred.sigma_max)",
    ),
    (
        lambda: unet_keys(sd15()) | {UNET + "input_blocks.1.1.time_stack.0.weight": [1]},
        "a video UNet",
    ),
    (
        lambda: {"down_blocks.0.resnets.0.conv1.weight": [320, 320, 3, 3]},
        "a diffusers UNet (down_blocks)",
    ),
    (lambda: {"model.diffusion_model.joint_blocks.0.x": [1]}, "Stable Diffusion 3"),
    (lambda: {"double_blocks.0.x": [1]}, "Flux"),
    (lambda: {"clf.1.weight": [1]}, "Stable Cascade"),
    (
        lambda: {"first_stage_model.encoder.conv_in.weight": [1]},
        "a VAE without UNet; pass it with --vae",
    ),
    (lambda: {"text_model.encoder.layers.0.x": [1]}, "a text encoder without UNet"),
    (lambda: {"a": [1]}, "not an LDM checkpoint (first key: a)"),
    (lambda: {"lora_unet_x.lora_up.weight": [1]}, "this is a LoRA file"),
    (lambda: {"unet.x.lora_A.weight": [1]}, "this is a LoRA file"),
    (lambda: {"unet.x.processor.to_q_lora.down.weight": [1]}, "this is a LoRA file"),
]


@pytest.mark.parametrize("keys, message", FOREIGN, ids=[message for _, message in FOREIGN])
def test_other_files_are_named(tmp_path, keys, message):
    """What it is instead, in one line, from the header; nothing is guessed from a missing key."""
    path = header_file(tmp_path / "x.safetensors", keys())
    with pytest.raises(ValueError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert message in str(caught.value)


# ---- what the network predicts


@pytest.mark.parametrize(
    "marks, metadata, v, zero_snr",
    [
        ((), {}, False, False),
        (("v_pred",), {}, True, False),
        (("v_pred", "ztsnr"), {}, True, True),  # NoobAI-XL
        (("ztsnr",), {}, True, True),  # noise alone tells nothing to a network that predicts noise
        ((), {"modelspec.prediction_type": "v"}, True, False),  # kohya
        ((), {"modelspec.predict_key": "v"}, True, False),  # ComfyUI
        ((), {"modelspec.prediction_type": "epsilon"}, False, False),
    ],
)
def test_files_that_predict_v(tmp_path, marks, metadata, v, zero_snr):
    """By keys or metadata; --prediction overrules both."""
    path, keys = tmp_path / "model.safetensors", dict.fromkeys(marks, [0])
    header_file(path, unet_keys(ssd1b()) | keys, metadata=metadata)
    says = ssd1b_config().unet
    assert open_checkpoint(path).config.unet == dataclasses.replace(says, v=v, zero_snr=zero_snr)
    assert open_checkpoint(path, "eps").config.unet == says
    by_flag = dataclasses.replace(says, v=True, zero_snr=zero_snr)
    assert open_checkpoint(path, "v").config.unet == by_flag


def test_a_model_that_predicts_v_is_saved_as_one(tmp_path, capsys):
    """With the keys by which other programs know it, which loading takes as used."""
    unet = dataclasses.replace(CONFIG.unet, v=True, zero_snr=True)
    config = dataclasses.replace(CONFIG, unet=unet)
    path = write_model(tmp_path / "v.safetensors", config=config)
    assert {"v_pred", "ztsnr"} <= read_header(path)[0].keys()
    assert load_model(path).config == config and capsys.readouterr().out == ""


# ---- variations in the wild


def test_wild_spellings_load(tmp_path, contents, model):
    """Other prefixes, CLIP-L without text_model., VAE attention as matrices: the same model."""
    tensors, metadata = contents
    wild = {}
    for key, value in tensors.items():
        key = key.replace(UNET, "diffusion_model.").replace(VAE, "vae.")
        key = key.replace("transformer.text_model.", "transformer.")
        for ours, theirs in (
            ("attn_1.q.", "to_q."),
            ("attn_1.k.", "to_k."),
            ("attn_1.v.", "to_v."),
            ("attn_1.proj_out.", "to_out.0."),
        ):
            if ours in key:
                key = key.replace(ours, "attn_1." + theirs)
                value = value[:, :, 0, 0] if value.ndim == 4 else value
        wild[key] = (
            value[:, :, 0, 0]
            if key.endswith(("proj_in.weight", "proj_out.weight")) and value.ndim == 4
            else value
        )
    save_file({k: v.contiguous() for k, v in wild.items()}, tmp_path / "wild.safetensors", metadata)
    for ours, theirs in zip(load_model(model), load_model(tmp_path / "wild.safetensors")):
        if isinstance(ours, nn.Module):
            a, b = ours.state_dict(), theirs.state_dict()
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_vae_of_its_own(tmp_path, contents):
    """Without a VAE the line names --vae; with one, bare or prefixed, that one is taken."""
    tensors, metadata = contents
    save_file(
        {k: v for k, v in tensors.items() if not k.startswith(VAE)},
        tmp_path / "no.safetensors",
        metadata,
    )
    with pytest.raises(ValueError, match="no VAE in the file; give one with --vae FILE"):
        load_model(tmp_path / "no.safetensors")
    other = tiny_vae(seed=5).state_dict()
    for prefix in ("", "vae.", VAE):
        save_file(
            {prefix + k: v.contiguous() for k, v in other.items()}, tmp_path / "vae.safetensors"
        )
        vae = load_model(tmp_path / "no.safetensors", vae_path=tmp_path / "vae.safetensors")[1]
        assert all(torch.equal(value, other[key]) for key, value in vae.state_dict().items())


def test_a_tiny_decoder(tmp_path, contents, model):
    """TAESD in its own names, in diffusers' and with a prefix; an encoder, a decoder of other
    latents and a model of another factor are refused in one line.
    """
    config = dataclasses.replace(CONFIG, vae=dataclasses.replace(CONFIG.vae, channels=(16,) * 4))
    metadata, path = {"minilcm.config": to_json(config)}, tmp_path / "f8.safetensors"
    save_file({k: v for k, v in contents[0].items() if not k.startswith(VAE)}, path, metadata)
    own = {k: torch.full_like(v, 0.01) for k, v in TinyDecoder().state_dict().items()}

    def in_diffusers(key: str) -> str:
        number, rest = key.split(".", 1)
        return f"decoder.layers.{int(number) - 1}.{rest}"

    encoder = {"encoder.layers.0.weight": torch.zeros(64, 3, 3, 3)}
    spellings = own, {in_diffusers(k): v for k, v in own.items()} | encoder
    for tensors in (*spellings, {f"taesd_decoder.{k}": v for k, v in own.items()}):
        save_file(tensors, tmp_path / "taesd.safetensors")
        vae = load_model(path, vae_path=tmp_path / "taesd.safetensors").vae
        assert isinstance(vae, TinyDecoder) and not any(p.is_meta for p in vae.parameters())
        assert all(torch.equal(value, own[key]) for key, value in vae.state_dict().items())
    with pytest.raises(ValueError, match="taesd.safetensors: a tiny decoder of SD or SDXL"):
        load_model(model, vae_path=tmp_path / "taesd.safetensors")
    taesd3 = own | {"1.weight": torch.zeros(64, 16, 3, 3)}
    its_encoder = {
        "0.weight": encoder["encoder.layers.0.weight"],
        "3.conv.0.weight": own["7.weight"],
    }
    for tensors, line in (
        (taesd3, r"tiny decoder: 1.weight is \(64, 16, 3, 3\), not \(64, 4, 3, 3\)"),
        (its_encoder, "no VAE in the file"),
        (own | {"19.bias": torch.full((3,), torch.nan)}, "19.bias has values that are not finite"),
    ):
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=f"other.safetensors: {line}"):
            load_model(path, vae_path=tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "out.2.weight",
            torch.full((4, 32, 3, 3), torch.nan),
            "out.2.weight has values that are not finite",
        ),
        (
            "out.2.weight",
            torch.zeros(4, 32, 3, 3, dtype=torch.int8),
            "out.2.weight is I8, quantised; dequantise it first",
        ),
        ("out.2.scale_weight", torch.ones(1), "out.2.scale_weight is F32, quantised"),
    ],
)
def test_values_that_cannot_be_used(tmp_path, contents, key, value, message):
    """NaN, integers, scaled float8: one line with the key."""
    tensors = contents[0] | {UNET + key: value}
    assert message in error_of(tmp_path / "bad.safetensors", tensors, contents[1])


# ---- models


def test_round_trip_rounds_to_float16_and_nothing_else(model):
    """Each tensor comes back frozen, in float32, as its float16 rounding, under the same key."""
    loaded = load_model(model)
    for module, original in zip(loaded, (tiny_unet(), tiny_vae(), tiny_text())):
        state, expected = module.state_dict(), original.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key].half().float()) for key in expected)
        assert (
            not any(p.requires_grad or p.is_meta for p in module.parameters())
            and not module.training
        )
        assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_loaded_model_computes_what_the_saved_one_does(model):
    """Text, UNet and VAE of the file give the saved modules' outputs, up to float16 rounding."""
    unet, vae, text, _ = load_model(model)
    cond = text.encode(["cat face"])
    z_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = [
            (cond.context, tiny_text().encode(["cat face"]).context),
            (unet(z_t, 499, cond), tiny_unet()(z_t, 499, cond)),
            (vae.decode(z_t), tiny_vae().decode(z_t)),
        ]
    for a, b in pairs:
        assert (a - b).abs().max() < 0.02 * b.abs().max()


def test_saving_what_was_loaded_gives_the_same_file(model, tmp_path):
    """float16 survives float32 unchanged: load and save is the identity on tensors and config."""
    unet, vae, text, config = load_model(model)
    save_model(tmp_path / "again.safetensors", unet.state_dict(), vae, text, config)
    tensors, metadata = read_tensors(model)
    again, metadata_again = read_tensors(tmp_path / "again.safetensors")
    assert tensors.keys() == again.keys() and metadata == metadata_again
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)


def test_two_text_towers_round_trip(tmp_path):
    """SDXL's layout: both towers come back under official prefixes; saved again, the same file."""
    path = write_model(tmp_path / "two.safetensors", config=TWO_TOWERS)
    unet, vae, text, config = load_model(path)
    assert config == TWO_TOWERS
    state, expected = text.state_dict(), tiny_text(0, TWO_TOWERS.text).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key].half().float()) for key in expected)
    tensors, metadata = read_tensors(path)
    assert {
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
        "conditioner.embedders.1.model.text_projection",
        "model.diffusion_model.label_emb.0.0.weight",
    } < tensors.keys()
    assert not any(key.startswith("cond_stage_model") for key in tensors)
    save_model(tmp_path / "again.safetensors", unet.state_dict(), vae, text, config)
    again, metadata_again = read_tensors(tmp_path / "again.safetensors")
    assert metadata == metadata_again and tensors.keys() == again.keys()
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)


def test_sd2_layout(tmp_path, capsys):
    """OpenCLIP-H under cond_stage_model.model., also as sgm has it; what SD2 does not read of it,
    its 24th layer and projection, needs no line; saved again the file is the same.
    """
    path = write_model(tmp_path / "sd2.safetensors", config=SD2)
    tensors, metadata = read_tensors(path)
    tower = "cond_stage_model.model."
    ours = {k.removeprefix(tower): x for k, x in tensors.items() if k.startswith(tower)}
    expected = tiny_text(0, SD2.text).tower.state_dict()
    assert ours.keys() == expected.keys()
    assert {k for k in tensors if not k.startswith((UNET, VAE, tower))} == set()
    last = {k.replace(".22.", ".23."): x.clone() for k, x in ours.items() if ".22." in k}
    last |= {"text_projection": torch.ones(32, 32), "logit_scale": torch.ones(())}
    last |= {"attn_mask": torch.ones(77, 77)}
    others = {k: x for k, x in tensors.items() if not k.startswith(tower)}
    for prefix in (tower, "conditioner.embedders.0.model."):
        more = {prefix + k: x.contiguous() for k, x in (ours | last).items()}
        save_file(others | more, tmp_path / "other.safetensors", metadata)
        unet, vae, text, config = load_model(tmp_path / "other.safetensors")
        state = text.tower.state_dict()
        assert all(torch.equal(state[k], expected[k].half().float()) for k in expected)
        assert config == SD2 and capsys.readouterr().out == ""
    save_model(tmp_path / "again.safetensors", unet.state_dict(), vae, text, config)
    again, _ = read_tensors(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)


def test_sd2_by_its_header(tmp_path, capsys):
    """512 pixels and noise, or 768 and v: by --prediction, since a file of SD2.x does not tell; a
    line says so unless the metadata does.
    """
    path = header_file(tmp_path / "sd2.safetensors", unet_keys(sd2()))
    assert open_checkpoint(path).config == sd2_config()
    assert "SD2.x, taken to predict noise; give --prediction v" in capsys.readouterr().out
    by_v = dataclasses.replace(sd2_config(), size=768, unet=dataclasses.replace(sd2(), v=True))
    assert open_checkpoint(path, "v").config == by_v
    assert open_checkpoint(path, "eps").config == sd2_config()
    for word, config in (("v", by_v), ("epsilon", sd2_config())):
        said = {"modelspec.prediction_type": word}
        assert open_checkpoint(header_file(path, unet_keys(sd2()), metadata=said)).config == config
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("config, count", [("SD2", 23 * 6), ("TWO_TOWERS", 2 * 6 + 1)])
def test_where_a_lora_finds_the_weights_of_text_towers(tmp_path, config, count):
    """Every weight that a LoRA may change while drawing is found in the file, the same numbers: in
    Hugging Face's names for CLIP-L, in open_clip's for OpenCLIP-H and bigG.
    """
    path = write_model(tmp_path / "model.safetensors", config=globals()[config])
    where, tensors = places(read_header(path)[0]), read_tensors(path)[0]
    weights = lora_weights(load_model(path).text)
    assert len(weights) == count
    for key, weight in weights.items():
        place = where[key.removesuffix(".weight")]
        assert torch.equal(place.view(tensors[place.key].float()), weight)


BIG_G = "conditioner.embedders.1.model."
STRAYS = {  # where tools and merges leave a key, and whether it is a known leftover
    BIG_G + "transformer.text_model.embeddings.position_ids": True,  # ComfyUI
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": True,
    "cond_stage_model.transformer.embeddings.position_ids": True,
    BIG_G + "logit_scale": True,
    BIG_G + "transformer.text_model.extra": False,
    "cond_stage_model.transformer.extra": False,
    "diffusion_model.extra.weight": False,
    "vae.extra.weight": False,
    "encoder.conv_in.weight": False,
    "input_blocks.0.0.weight": False,
}


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("two") / "plain.safetensors", config=TWO_TOWERS)


def same_model(a, b) -> bool:
    """Whether two files hold the same networks."""
    pairs = zip(load_model(a)[:3], load_model(b)[:3])
    return all(
        torch.equal(value, y.state_dict()[key])
        for x, y in pairs
        for key, value in x.state_dict().items()
    )


@pytest.mark.parametrize("key", STRAYS)
def test_a_stray_key_hides_no_part(tmp_path, two_towers, key, capsys):
    """A key under another of a part's prefixes: the part is read, and what is no known leftover is
    named.
    """
    tensors, metadata = read_tensors(two_towers)
    save_file(tensors | {key: torch.zeros(1)}, tmp_path / "stray.safetensors", metadata)
    assert same_model(tmp_path / "stray.safetensors", two_towers)
    lines = capsys.readouterr().out.splitlines()
    if STRAYS[key]:
        assert not lines
    else:
        (line,) = lines
        assert "1 keys " in line and key.endswith(line.split("first: ")[1])
    info(tmp_path / "stray.safetensors")
    unused = [x for x in capsys.readouterr().out.splitlines() if "not used" in x]
    assert any(key in x for x in unused) == (STRAYS[key] or "extra" not in key)


def test_two_spellings_of_one_key(tmp_path, contents, capsys):
    """A merge of an old and a new checkpoint: the first prefix counts, the other key is named."""
    key = TEXT + "final_layer_norm.bias"
    old = "cond_stage_model.transformer.final_layer_norm.bias"
    tensors, metadata = contents
    save_file(tensors | {old: torch.ones(32)}, tmp_path / "both.safetensors", metadata)
    text = load_model(tmp_path / "both.safetensors").text
    assert torch.equal(text.tower.ln_final.bias, tensors[key].float())
    assert f"1 keys belong to no part and are not used, first: {old}" in capsys.readouterr().out


def in_hugging_face_layout(tensors: dict) -> dict:
    """bigG by transformers' names: q, k, v apart, text_projection a Linear beside text_model."""
    out = {k: v for k, v in tensors.items() if not k.startswith(BIG_G)}
    state = {k.removeprefix(BIG_G): v for k, v in tensors.items() if k.startswith(BIG_G)}
    projection = state.pop("text_projection").T.contiguous()
    out[BIG_G + "transformer.text_projection.weight"] = projection
    return out | {
        BIG_G + "transformer.text_model." + k: v.contiguous()
        for k, v in open_clip_to_clip_l(state).items()
    }


def test_big_g_in_hugging_faces_layout(tmp_path, two_towers):
    """It loads, and a LoRA finds the same weights in it as in open_clip's layout: all that one may
    change.
    """
    tensors, metadata = read_tensors(two_towers)
    path = tmp_path / "hf.safetensors"
    save_file(in_hugging_face_layout(tensors), path, metadata)
    assert same_model(path, two_towers)
    here, there = (places(safefile.read_header(x)[0]) for x in (two_towers, path))
    assert here.keys() == there.keys()
    parts = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"
    one = {f"te2.encoder.layers.0.{part}" for part in (*parts, "mlp.fc1", "mlp.fc2")}
    assert {p for p in here if p.startswith("te2.")} == one | {"te2.text_projection"} | {
        p.replace("layers.0", f"layers.{i}") for p in one for i in range(TWO_TOWERS.text.big[1])
    }
    other = read_tensors(path)[0]
    for p in here:
        assert torch.equal(here[p].view(tensors[here[p].key]), there[p].view(other[there[p].key]))


VAE_KEYS = {  # diffusers' AutoencoderKL -> the official key; 4 levels
    "encoder.down_blocks.0.resnets.1.conv1.weight": "encoder.down.0.block.1.conv1.weight",
    "encoder.down_blocks.1.resnets.0.conv_shortcut.bias": (
        "encoder.down.1.block.0.nin_shortcut.bias"
    ),
    "encoder.down_blocks.2.downsamplers.0.conv.weight": "encoder.down.2.downsample.conv.weight",
    "decoder.up_blocks.0.resnets.2.norm2.weight": "decoder.up.3.block.2.norm2.weight",
    "decoder.up_blocks.2.upsamplers.0.conv.bias": "decoder.up.1.upsample.conv.bias",
    "decoder.mid_block.resnets.1.conv2.weight": "decoder.mid.block_2.conv2.weight",
    "encoder.mid_block.attentions.0.group_norm.weight": "encoder.mid.attn_1.norm.weight",
    "encoder.mid_block.attentions.0.to_q.weight": "encoder.mid.attn_1.q.weight",
    "encoder.mid_block.attentions.0.to_out.0.bias": "encoder.mid.attn_1.proj_out.bias",
    "decoder.mid_block.attentions.0.query.weight": "decoder.mid.attn_1.q.weight",
    "decoder.mid_block.attentions.0.key.bias": "decoder.mid.attn_1.k.bias",
    "decoder.mid_block.attentions.0.value.weight": "decoder.mid.attn_1.v.weight",
    "decoder.mid_block.attentions.0.proj_attn.weight": "decoder.mid.attn_1.proj_out.weight",
    "decoder.conv_norm_out.weight": "decoder.norm_out.weight",
    "encoder.conv_in.weight": "encoder.conv_in.weight",
    "post_quant_conv.bias": "post_quant_conv.bias",
}


def test_vae_by_diffusers_names(tmp_path, contents, official_keys):
    """The names lead to official keys, these to themselves; a VAE by diffusers' names loads, also
    with its attention as matrices; as a model it is called what it is.
    """
    assert {vae_key(key, 4): key for key in official_keys["vae"]} == {
        key: key for key in official_keys["vae"]
    }
    for theirs, ours in VAE_KEYS.items():
        assert vae_key(theirs, 4) == ours and ours in official_keys["vae"]
    tensors, metadata = contents
    official = {k.removeprefix(VAE): v for k, v in tensors.items() if k.startswith(VAE)}
    inverse = {}
    for level in range(3):
        for part, block in (("resnets.0.", "block.0."), ("resnets.1.", "block.1.")):
            inverse[f"encoder.down.{level}.{block}"] = f"encoder.down_blocks.{level}.{part}"
            inverse[f"decoder.up.{level}.{block}"] = f"decoder.up_blocks.{2 - level}.{part}"
        inverse[f"encoder.down.{level}.downsample."] = (
            f"encoder.down_blocks.{level}.downsamplers.0."
        )
        inverse[f"decoder.up.{level}.upsample."] = f"decoder.up_blocks.{2 - level}.upsamplers.0."
    inverse |= {"mid.block_1.": "mid_block.resnets.0.", "mid.block_2.": "mid_block.resnets.1."}
    inverse |= {"mid.attn_1.norm.": "mid_block.attentions.0.group_norm."}
    inverse |= {f"mid.attn_1.{x}.": f"mid_block.attentions.0.to_{x}." for x in "qkv"}
    inverse |= {"mid.attn_1.proj_out.": "mid_block.attentions.0.to_out.0."}
    inverse |= {"nin_shortcut": "conv_shortcut", ".norm_out.": ".conv_norm_out."}
    theirs = {}
    for key, value in official.items():
        value = value[:, :, 0, 0].contiguous() if "attn_1" in key and value.ndim == 4 else value
        for a, b in inverse.items():
            key = key.replace(a, b)
        theirs[key] = value
    save_file(theirs, tmp_path / "vae.safetensors")
    rest = {k: v for k, v in tensors.items() if not k.startswith(VAE)}
    save_file(rest, tmp_path / "rest.safetensors", metadata)
    vae = load_model(tmp_path / "rest.safetensors", vae_path=tmp_path / "vae.safetensors").vae
    assert all(torch.equal(vae.state_dict()[k].half(), v) for k, v in official.items())
    assert "this is a VAE without UNet; pass it with --vae" in error_of(
        tmp_path / "vae.safetensors"
    )


def test_dtype_of_the_weights(model):
    """`dtype` is that of all of UNet and text tower; the VAE stays float32, as SDXL's must."""
    unet, vae, text, _ = load_model(model, torch.bfloat16)
    assert {p.dtype for module in (unet, text) for p in module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in vae.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", [emoji, sd15, sd2, sdxl, ssd1b])
def test_config_round_trip(model, family):
    """A config comes back equal, tuples as tuples and None as None, from JSON and from a file."""
    config = dataclasses.replace(CONFIG, unet=family())
    assert from_json(to_json(config)) == config
    assert load_model(model)[3] == CONFIG


def test_keys_have_the_official_prefixes(contents):
    """The keys of a file by CompVis: first_stage_model., cond_stage_model.transformer., ..."""
    tensors, metadata = contents
    official = (
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.decoder.up.2.upsample.conv.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    )
    assert all(key in tensors for key in official)
    assert all(key.startswith((UNET, VAE, TEXT)) for key in tensors)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert json.loads(metadata["minilcm.config"])["names"] == list(CONFIG.names)


@pytest.mark.parametrize("prefix, what", [(UNET, "UNet"), (VAE, "VAE")])
def test_missing_extra_and_misshapen_keys(tmp_path, contents, prefix, what):
    """Each problem is counted, its first keys named, all in one line; nothing is lenient."""
    tensors, metadata = dict(contents[0]), contents[1]
    keys = sorted(key for key in tensors if key.startswith(prefix))
    first, second, third = (key.removeprefix(prefix) for key in keys[:3])
    del tensors[keys[0]], tensors[keys[1]]
    tensors[prefix + "extra.weight"] = torch.zeros(1)
    tensors[keys[2]] = torch.zeros(3, 1)
    message = error_of(tmp_path / "bad.safetensors", tensors, metadata)
    missing = f"bad.safetensors: {what}: 2 missing keys, first: {first}, {second}; "
    assert missing + "1 unknown keys, first: extra.weight; " in message
    assert f"{third} is (3, 1), not {tuple(contents[0][keys[2]].shape)}" in message


@pytest.mark.parametrize("proj", ["q", "k", "v"])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_text_tower_without_one_of_q_k_v(tmp_path, contents, proj, part):
    """q, k and v are fused on load; a file without one, or with another width, gives one line."""
    tensors, metadata = dict(contents[0]), contents[1]
    key = f"{TEXT}encoder.layers.0.self_attn.{proj}_proj.{part}"
    value = tensors.pop(key)
    assert "text tower" in error_of(tmp_path / "bad.safetensors", tensors, metadata)
    tensors[key] = value.repeat(*[2] * value.ndim)
    assert "text tower" in error_of(tmp_path / "bad.safetensors", tensors, metadata)


def test_keys_outside_the_three_parts(tmp_path, contents, capsys):
    """What belongs to no part is named, but buffers and leftovers of training need no line."""
    tensors = contents[0] | {
        "model_diffusion.out.2.weight": torch.zeros(1),
        UNET + "odd.weight": torch.zeros(1),
    }
    tensors |= {
        "alphas_cumprod": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9),
        "betas": torch.zeros(1000),
    }
    tensors |= {TEXT + "embeddings.position_ids": torch.zeros(1, 77)}
    save_file(tensors, tmp_path / "more.safetensors", contents[1])
    load_model(tmp_path / "more.safetensors")
    out = capsys.readouterr().out
    assert "UNet: 1 keys not used, first: odd.weight\n" in out
    assert "1 keys belong to no part and are not used, first: model_diffusion.out.2.weight\n" in out
    assert len(out.splitlines()) == 2


def test_no_config_and_a_config_of_another_version(tmp_path, contents):
    """Others' checkpoints have no minilcm.config; a damaged or newer one is refused in one line."""
    tensors, path = contents[0], tmp_path / "bad.safetensors"
    assert "detected an unknown UNet (width 32, in 4, context 32, adm None)" in error_of(
        path, tensors, {"format": "pt"}
    )
    config = json.loads(contents[1]["minilcm.config"])
    newer = config | {"unet": config["unet"] | {"flash": True}}
    for text in ("{", "[]", "{}", json.dumps(newer)):
        assert "minilcm.config" in error_of(path, tensors, {"minilcm.config": text})


def test_a_lora_given_as_checkpoint(tmp_path):
    """The message says what the file is and which flag takes it."""
    write_tau(tmp_path / "lora.safetensors", random_tau(tiny_unet(), 0, 2, 3.0), {})
    error = error_of(tmp_path / "lora.safetensors")
    assert "this is a LoRA file, not a checkpoint; pass it with --lora" in error


@pytest.mark.parametrize("fraction", [0, 1e-6, 1e-3, 0.01, 0.5, 0.9999])
def test_truncated_file(tmp_path, model, fraction):
    """Cut anywhere (in the length, the header, the data), the file is refused in one line."""
    path, whole = tmp_path / "cut.safetensors", model.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    message = error_of(path)
    assert "damaged or incomplete" in message or "not a safetensors file" in message


def test_missing_file(tmp_path):
    assert error_of(tmp_path / "none.safetensors").endswith("no such file")


def test_failed_save_keeps_the_old_model(tmp_path, model, monkeypatch):
    """An error while writing leaves the file of the last save as it was, and no temporary file."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(model.read_bytes())

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("minilcm.files.safetensors_file.save_file", full)
    with pytest.raises(OSError):
        write_model(path, seed=1)
    assert path.read_bytes() == model.read_bytes() and list(tmp_path.iterdir()) == [path]


# ---- the state of a run


def small_run(steps: int, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network trained for some steps, so that the optimizer has moments."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    for i in range(steps):
        train_step(net, optimizer, i)
    return net, optimizer


def train_step(net, optimizer, i: int) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(i))
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_state_round_trip_is_bitwise(tmp_path):
    """Weights, Adam's moments and count, the run's JSON: bit for bit; so is the next step."""
    net, optimizer = small_run(3)
    run = {"step": 3, "flags": {"lr": "0.01"}}
    save_state(
        tmp_path / "state.safetensors", state_tensors(dict(net.named_parameters()), optimizer), run
    )
    with safe_open(tmp_path / "state.safetensors", "pt") as f:
        assert {f"optimizer.0.{key}" for key in ("step", "exp_avg", "exp_avg_sq")} <= set(f.keys())

    other, other_optimizer = small_run(0, seed=1)
    assert (
        load_state(tmp_path / "state.safetensors", dict(other.named_parameters()), other_optimizer)
        == run
    )
    for i in range(2):
        for a, b in zip(net.parameters(), other.parameters()):
            assert torch.equal(a, b)
        state, other_state = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
        assert state.keys() == other_state.keys() == set(range(4))
        for moments, other_moments in zip(state.values(), other_state.values()):
            assert moments.keys() == other_moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(
                torch.equal(moments[key], other_moments[key])
                and moments[key].dtype == torch.float32
                for key in moments
            )
        assert state[0]["step"] == 3 + i
        train_step(net, optimizer, 3), train_step(other, other_optimizer, 3)


def test_state_is_loaded_into_the_parameters_that_the_optimizer_holds(tmp_path):
    """load_state fills tensors in place: optimizer, average and compiled network keep theirs."""
    net, optimizer = small_run(2)
    save_state(
        tmp_path / "state.safetensors", state_tensors(dict(net.named_parameters()), optimizer), {}
    )
    other, other_optimizer = small_run(0, seed=1)
    pointers = [p.data_ptr() for p in other.parameters()]
    load_state(tmp_path / "state.safetensors", dict(other.named_parameters()), other_optimizer)
    assert [p.data_ptr() for p in other.parameters()] == pointers
    assert all(
        a is b for a, b in zip(other.parameters(), other_optimizer.param_groups[0]["params"])
    )


def test_state_of_another_run_is_refused(tmp_path):
    """Other keys or shapes: ValueError with the file, and no tensor has changed."""
    net, optimizer = small_run(2)
    save_state(
        tmp_path / "state.safetensors", state_tensors(dict(net.named_parameters()), optimizer), {}
    )
    wider = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    deeper = nn.Sequential(*net, nn.Linear(2, 2))
    for other in (wider, deeper):
        before = [p.detach().clone() for p in other.parameters()]
        with pytest.raises(
            ValueError, match="state.safetensors: state of another model or objective"
        ):
            load_state(
                tmp_path / "state.safetensors",
                dict(other.named_parameters()),
                torch.optim.AdamW(other.parameters()),
            )
        assert all(torch.equal(p, b) for p, b in zip(other.parameters(), before))
    with pytest.raises(ValueError, match="none.safetensors: no such file"):
        load_state(tmp_path / "none.safetensors", dict(net.named_parameters()), optimizer)


def test_failed_save_keeps_the_old_state(tmp_path, monkeypatch):
    """An interrupted save_state leaves the last good state."""
    net, optimizer = small_run(1)
    path = tmp_path / "state.safetensors"
    save_state(path, state_tensors(dict(net.named_parameters()), optimizer), {"step": 1})
    old = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("minilcm.files.safetensors_file.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_state(path, state_tensors(dict(net.named_parameters()), optimizer), {"step": 2})
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
