"""Train a small CLIP on the art and its captions, for its text tower, which conditions the UNet.

    python -m weights.emoji.train_clip --out runs/text --names 300 --steps 2500

Class: open_clip's CLIP, with images of 64x64. Loss: InfoNCE in both directions (2103.00020), where
*every* caption of the batch that fits a picture counts as right ("a cat" fits all cats). Held-out
(name, style) pairs are never shown. Writes text.safetensors under CLIP-L's official keys; rows of
tokens never trained are zero, which git packs to nothing.
"""

import argparse
import json
import random
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minilcm.data.emoji import COLORS, STYLES, Art, caption, read_art, split_art
from minilcm.files.safetensors_file import read_tensors, write_tensors
from minilcm.model.precision import autocast, forward_dtype
from minilcm.model.text import EOS, VOCAB, TextConfig, TextEncoder, open_clip_to_clip_l
from minilcm.objective import learning_rate

from .training import degrade, flags, pool_of

HERE = Path(__file__).parent
SIZE, WIDTH = 64, 128  # of the pictures; of both embeddings
TEXT = TextConfig(width=128, layers=4, heads=4)


def parse() -> argparse.Namespace:
    parser = flags(__doc__, "text.safetensors", steps=2500, batch=96, looks=16, lr=1e-3)
    init = "start from the clip.safetensors that an earlier run wrote"
    parser.add_argument("--init", type=Path, help=init)
    names = "how many names of names.txt (default 300)"
    parser.add_argument("--names", type=int, default=300, help=names)
    return parser.parse_args()


# ---- pictures, and what is true of them


def numbers(words: tuple[str | None, ...], names: list[str]) -> list[int]:
    """(name, style, colour) as numbers, -1 for what is not said."""
    lists = names, list(STYLES), list(COLORS)
    return [-1 if word is None else every.index(word) for word, every in zip(words, lists)]


def lessons(
    art: list[Art], names: list[str], looks: int, seed: int, device: str
) -> tuple[Tensor, Tensor, list[Art], list[str]]:
    """(pixels (m, 3, S, S) uint8, what is true of them (m, 3), m drawings, m colours)."""
    pixels, colors = pool_of(art, SIZE, looks, seed, device)
    shown = [a for a in art for _ in range(looks)]
    true = [numbers((a.name, a.style, color), names) for a, color in zip(shown, colors)]
    return pixels, torch.tensor(true), shown, colors


# ---- both encoders, and the loss


def make_clip(device: str, init: Path | None) -> tuple[open_clip.CLIP, TextEncoder]:
    """One set of text weights: the tower that will condition the UNet is the one trained."""
    vision = dict(image_size=SIZE, patch_size=8, width=192, layers=6, head_width=32)
    tower = dict(width=TEXT.width, layers=TEXT.layers, heads=TEXT.heads)
    clip = open_clip.CLIP(WIDTH, vision, tower, quick_gelu=False).to(device)
    text = TextEncoder(TEXT).to(device)
    if init:
        clip.load_state_dict(read_tensors(init)[0], strict=False)
    for name, _ in text.tower.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(text.tower.get_submodule(module), leaf, clip.get_parameter(name))
    return clip, text


def encode_text(clip: open_clip.CLIP, text: TextEncoder, ids: Tensor) -> Tensor:
    """Unit vectors (b, e) of tokens (b, 77): the tower's output at the first EOS, projected."""
    end = (ids == EOS).int().argmax(dim=1)
    # nothing behind the last EOS is needed: attention is causal
    tokens = text(ids[:, : int(end.max()) + 1])
    return F.normalize(tokens[torch.arange(len(ids)), end] @ clip.text_projection, dim=-1)


def info_nce(images: Tensor, texts: Tensor, fits: Tensor, logit_scale: Tensor) -> Tensor:
    """Of unit vectors (b, e) and of which text j fits which image i, (b, b) of 1 and 0."""
    # p(j | i) = softmax_j(scale image_i . text_j); q(j | i) = fits_ij / sum_j fits_ij, uniform
    logits = logit_scale.exp().clamp(max=100) * images.float() @ texts.float().T  # (b, b)
    # - mean_i sum_j q(j | i) log p(j | i)
    to_texts = F.cross_entropy(logits, fits / fits.sum(1, keepdim=True))
    to_images = F.cross_entropy(logits.T, fits.T / fits.T.sum(1, keepdim=True))
    return (to_texts + to_images) / 2


# ---- what is measured and written


@torch.no_grad()
def accuracy(
    clip: open_clip.CLIP, text: TextEncoder, names: list[str], pixels: Tensor, true: Tensor
) -> float:
    """How often is a picture (m, 3, S, S) nearest to its own name?"""
    images = torch.cat([F.normalize(clip.visual(x / 127.5 - 1), dim=-1) for x in pixels.split(64)])
    of_names = encode_text(clip, text, text.tokenize(names).to(pixels.device))  # (names, e)
    nearest = (images @ of_names.T).argmax(dim=1)
    return (nearest.cpu() == true[:, 0]).float().mean().item()


def write(folder: Path, clip: open_clip.CLIP, text: TextEncoder, used: Tensor) -> None:
    """clip.safetensors, for --init; text.safetensors, with the embeddings of `used` tokens only."""
    write_tensors(folder / "clip.safetensors", clip.state_dict(), {})
    tower = {key: x.clone() for key, x in text.tower.state_dict().items()}
    tower["token_embedding.weight"][~used.to(clip.logit_scale.device)] = 0
    config = json.dumps(dict(width=TEXT.width, layers=TEXT.layers, heads=TEXT.heads))
    write_tensors(folder / "text.safetensors", open_clip_to_clip_l(tower), {"config": config})


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)

    # ---- what it is trained on
    names = (HERE / "names.txt").read_text().splitlines()[: args.names]
    seen, held_out = split_art(read_art(HERE / "art"), HERE / "art/held_out.txt", names)
    pixels, true, art, colors = lessons(seen, names, args.looks, args.seed, args.device)
    test, test_true, *_ = lessons(held_out, names, 4, -1, args.device)
    some = random.Random(0).sample(range(len(art)), min(512, len(art)))

    # ---- what is trained
    torch.manual_seed(args.seed)
    clip, text = make_clip(args.device, args.init)
    how = dict(weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    optimizer = torch.optim.AdamW(clip.parameters(), args.lr, **how)

    # ---- the loop
    generator = torch.Generator(args.device).manual_seed(args.seed)
    rng, start = random.Random(args.seed), time.time()
    used = torch.zeros(VOCAB, dtype=torch.bool)
    for step in tqdm(range(args.steps), disable=None):
        optimizer.param_groups[0]["lr"] = args.lr * learning_rate(1.0, step, args.steps)
        index = [rng.randrange(len(art)) for _ in range(args.batch)]
        x = degrade(pixels[index] / 127.5 - 1, generator)  # (b, 3, S, S)
        captions, said = zip(*(caption(art[i], colors[i], rng) for i in index))
        ids = text.tokenize(list(captions))  # (b, 77)
        used[ids.unique()] = True
        says = torch.tensor([numbers(words, names) for words in said])  # (b, 3)
        # (pictures, captions): whether all that the caption says is true of the picture
        fits = ((says[None] == true[index][:, None]) | (says[None] < 0)).all(dim=2)
        with autocast(args.device, forward_dtype(args.device)):
            images = F.normalize(clip.visual(x), dim=-1)  # (b, e)
            texts = encode_text(clip, text, ids.to(args.device))  # (b, e)
        loss = info_nce(images, texts, fits.float().to(args.device), clip.logit_scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()

        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            clip.eval()
            on_seen = accuracy(clip, text, names, pixels[some], true[some])
            on_held_out = accuracy(clip, text, names, test, test_true)
            clip.train()
            right = f"right: seen {on_seen:.3f} held-out {on_held_out:.3f}"
            took = f"{time.time() - start:.0f} s"
            print(f"step {step + 1} loss {loss.item():.3f} {right} {took}", flush=True)
            write(args.out, clip, text, used)


if __name__ == "__main__":
    main()
