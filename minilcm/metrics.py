"""Does the picture show what the prompt says? Measured by CLIP (2103.00020): cosine of picture and caption.

The emoji model's judge is the image tower of the small CLIP whose text tower conditions the UNet, kept in its own file.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from .files.safetensors_file import read_tensors
from .model.text import EOS, TextEncoder


class Judge(nn.Module):
    """An image tower and the text projection that belongs to it."""

    def __init__(
        self, image_size: int, patch_size: int, width: int, layers: int, heads: int, embed_dim: int, text_width: int
    ):
        super().__init__()
        self.visual = VisionTransformer(image_size, patch_size, width, layers, heads, 4.0, output_dim=embed_dim)
        self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))
        self.size = image_size

    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels (b, 3, H, W) in [-1, 1] -> unit vectors (b, e)."""
        pixels = F.interpolate(pixels.clamp(-1, 1), (self.size, self.size), mode="bilinear", antialias=True)
        return F.normalize(self.visual(pixels), dim=-1)

    def text_features(self, text: TextEncoder, prompts: list[str]) -> Tensor:
        """Prompts -> unit vectors (n, e): the tower's output at the first EOS, projected."""
        ids = text.tokenize(prompts)
        tokens = text.encode(prompts).context.float()  # (n, 77, d)
        at_eos = tokens[torch.arange(len(prompts)), (ids == EOS).int().argmax(dim=1)]
        return F.normalize(at_eos @ self.text_projection, dim=-1)


def load_judge(path: str | Path) -> Judge:
    """The judge of `weights/emoji/judge.safetensors`, in float32."""
    tensors, metadata = read_tensors(path)
    judge = Judge(**json.loads(metadata["config"]))
    judge.load_state_dict({k: v.float() for k, v in tensors.items()})
    return judge.eval()


@torch.no_grad()
def clip_score(judge: Judge, text: TextEncoder, pixels: Tensor, prompts: list[str]) -> Tensor:
    """Cosine of each picture (b, 3, H, W) with its own prompt, (b,) in [-1, 1]; CLIPScore (2104.08718) is 2.5 of it."""
    features = judge.text_features(text, prompts)
    return (judge.image_features(pixels) * features).sum(dim=-1)


@torch.no_grad()
def prompt_accuracy(judge: Judge, text: TextEncoder, pixels: Tensor, names: list[str], choices: list[str]) -> Tensor:
    """Does the picture pick its own name among all? pixels (b, 3, H, W), names of length b -> (b,) bool.

    Chance is 1 / len(choices).
    """
    scores = judge.image_features(pixels) @ judge.text_features(text, choices).T  # (b, n)
    picked = scores.argmax(dim=1)
    return picked == torch.tensor([choices.index(name) for name in names], device=picked.device)


@torch.no_grad()
def self_consistency(f, z_start: Tensor, z_end: Tensor, t_start, t_end) -> Tensor:
    """Root mean square of f(z_start, t_start) - f(z_end, t_end) per image (b,): zero for a consistency function.

    z_end lies one solver step below z_start on the teacher's trajectory. Consistency Models (2303.01469) eq. 1.
    """
    gap = f(z_start, t_start) - f(z_end, t_end)
    return rearrange(gap, "b ... -> b (...)").square().mean(dim=1).sqrt()
