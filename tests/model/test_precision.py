"""precision.py and what depends on the device, with devices that this machine hasn't."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minilcm.model import layers, vae
from minilcm.model.precision import default_dtype, forward_dtype


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_without_onednn_it_is_float32(monkeypatch, device):
    """PyTorch for Apple silicon or a Jetson has no operators in torch.ops.mkldnn."""
    monkeypatch.setitem(torch.ops.__dict__, "mkldnn", torch._ops._OpNamespace("no_such_library"))
    assert default_dtype(device) == forward_dtype(device) == torch.float32


def test_apples_gpu_is_not_asked_for_what_the_processor_can():
    assert default_dtype("mps") == torch.float32 and default_dtype("cuda") == torch.float16


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cards_before_ampere_train_in_float32(monkeypatch, device):
    """They emulate bfloat16; each card of a machine is asked for itself."""
    capability = {device: (7, 5)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.get)
    assert forward_dtype(device) == torch.float32
    capability[device] = 8, 0
    assert forward_dtype(device) == torch.bfloat16


def test_attention_on_apples_gpu_gets_contiguous_inputs(monkeypatch):
    """Others give wrong numbers there in PyTorch 2.8 (pytorch#163597)."""
    there = SimpleNamespace(device=torch.device("mps"), contiguous=lambda: "contiguous")
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: qkv)
    assert layers.attention(there, there, there) == ("contiguous",) * 3


def test_both_networks_attend_by_it(monkeypatch):
    calls = []
    for module in (layers, vae):
        monkeypatch.setattr(module, "attention", lambda q, k, v: calls.append(q.shape) or q)
    layers.CrossAttention(8, 6, 2)(torch.zeros(1, 4, 8), torch.zeros(1, 3, 6))
    vae.AttnBlock(8, 4)(torch.zeros(1, 8, 2, 2))
    assert calls == [(1, 2, 4, 4), (1, 1, 4, 8)]
