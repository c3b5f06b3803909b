"""The text encoders: prompts -> Cond, by open_clip's tower and tokenizer.

Official SD1.x files have the tower under Hugging Face's names with separate q, k, v projections;
open_clip fuses the three into one matrix: `clip_l_to_open_clip`, and its inverse. open_clip takes
longer to import than torch, so it is imported when a tower or tokenizer is built.
"""

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from .layers import timestep_embedding
from .unet import Cond

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transformer import TextTransformer

BOS, EOS, N_TOKENS, VOCAB = 49406, 49407, 77, 49408

RENAMED = {  # part of a CLIP-L key -> of open_clip's
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}


def qkv_rows(n: int) -> dict[str, slice]:
    """Where q, k and v are in the n rows of open_clip's fused in_proj."""
    return {x: slice(i * n // 3, (i + 1) * n // 3) for i, x in enumerate("qkv")}


def clip_l_to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP-L keys (below `text_model.`) -> open_clip's. Raises KeyError if q, k or v is missing."""
    out = {}
    for key, value in state.items():
        if qkv := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", key):
            rows = [state[key.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            out[f"transformer.resblocks.{qkv[1]}.attn.in_proj_{qkv[2]}"] = torch.cat(rows)
        elif not re.search(r"\.(k_proj|v_proj)\.|position_ids$", key):
            for theirs, ours in RENAMED.items():
                key = key.replace(theirs, ours)
            out[key] = value
    return out


def open_clip_to_clip_l(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `clip_l_to_open_clip`."""
    out, in_proj = {}, r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)"
    for key, value in state.items():
        if fused := re.fullmatch(in_proj, key):
            for x, rows in qkv_rows(len(value)).items():
                out[f"encoder.layers.{fused[1]}.self_attn.{x}_proj.{fused[2]}"] = value[rows]
        else:
            for theirs, ours in RENAMED.items():
                key = key.replace(ours, theirs)
            out[key] = value
    return out


@dataclass(frozen=True)
class TextConfig:
    width: int = 768
    layers: int = 12
    heads: int = 12
    open_clip: bool = False  # OpenCLIP's tower: GELU for QuickGELU, padded with 0 for EOS
    big: tuple[int, int, int] | None = None  # (width, layers, heads) of SDXL's OpenCLIP bigG


def sdxl_text() -> TextConfig:
    return TextConfig(big=(1280, 32, 20))


def sd2_text() -> TextConfig:
    """OpenCLIP-H, 23 of its 24 layers: SD2 reads the penultimate."""
    return TextConfig(width=1024, layers=23, heads=16, open_clip=True)


@cache
def tokenizer() -> "SimpleTokenizer":
    """CLIP's byte pairs: 20 MB of tables, shared by all models of a process."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@lru_cache(maxsize=100_000)  # captions come back every epoch
def byte_pairs(prompt: str) -> list[int]:
    """The prompt's tokens, without BOS and EOS."""
    return tokenizer().encode(prompt)


class TextEncoder(nn.Module):
    """CLIP-L's text tower, and in SDXL OpenCLIP bigG's beside it.

    SD1.x: context = the last layer after the final norm, (b, 77, 768); null is the prompt "".
    SD2.x: the same with OpenCLIP-H in CLIP-L's place, up to its penultimate layer, (b, 77, 1024).
    SDXL (2307.01952 section 2.1): context = both towers' penultimate layer, no final norm,
    (b, 77, 768 + 1280); vector = bigG's pooled text (1280) and six size ids, 256 sinusoids each,
    (b, 2816); null is zeros for text.
    """

    def __init__(self, cfg: TextConfig = TextConfig()):
        from open_clip.transformer import QuickGELU, TextTransformer

        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer()
        sizes = N_TOKENS, VOCAB, cfg.width, cfg.heads, cfg.layers
        how = dict(output_dim=None, proj_type="none")
        how["act_layer"] = nn.GELU if cfg.open_clip else QuickGELU
        self.tower = TextTransformer(*sizes, **how)
        self.tower.attn_mask = None  # built in `hidden`: a tower made on meta has only weights
        if cfg.big:
            width, layers, heads = cfg.big
            sizes = N_TOKENS, VOCAB, width, heads, layers
            self.big = TextTransformer(*sizes, output_dim=width)  # exact GELU
            self.big.attn_mask = None
        self.cut: set[str] = set()  # prompts reported as too long

    def tokenize(self, prompts: list[str], pad: int | None = None) -> Tensor:
        """(b, 77) int64: BOS, tokens, EOS, padding (bigG's is 0); what is cut off is printed."""
        pad_first = 0 if self.cfg.open_clip else EOS
        pad = pad_first if pad is None else pad
        rows = []
        for prompt in prompts:
            tokens = byte_pairs(prompt)
            if len(tokens) > N_TOKENS - 2 and pad == pad_first and prompt not in self.cut:
                self.cut.add(prompt)
                ignored = self.tokenizer.decode(tokens[N_TOKENS - 2 :])
                print(f"prompt cut after 75 tokens; ignored: {ignored!r}")
            tokens = [BOS, *tokens[: N_TOKENS - 2], EOS]
            rows.append(tokens + [pad] * (N_TOKENS - len(tokens)))
        return torch.tensor(rows)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (b, n) of the first tower -> context of SD1.x and SD2.x (b, n, width)."""
        return self.tower.ln_final(hidden(self.tower, ids)[0])

    @torch.no_grad()
    def encode(self, prompts: list[str], size: tuple[int, int] = (1024, 1024)) -> Cond:
        """Prompts -> Cond(context (b, 77, d), vector (b, 2816) or None); SDXL: size (W, H)."""
        if isinstance(prompts, str):
            raise ValueError(f"encode takes a list of prompts; give [{prompts!r}]")
        device = self.tower.positional_embedding.device
        ids = self.tokenize(prompts).to(device)
        if not self.cfg.big:
            return Cond(self(ids))
        ids_big = self.tokenize(prompts, pad=0).to(device)
        _, context = hidden(self.tower, ids)  # (b, 77, 768)
        last, context_big = hidden(self.big, ids_big)  # (b, 77, 1280)
        # pooled: bigG's last layer at the first EOS, which has the largest id, normed and projected
        at_eos = self.big.ln_final(last)[torch.arange(len(ids)), ids_big.argmax(dim=1)]  # (b, 1280)
        pooled = at_eos @ self.big.text_projection
        return Cond(torch.cat([context, context_big], dim=-1), add_size(pooled, uncut_ids(size)))

    def encode_captions(self, captions: list[str]) -> Cond:
        """`encode`, but an empty caption, dropped for guidance, gets sampling's null condition."""
        cond = self.encode(captions)
        if cond.vector is None:
            return cond  # SD1.x: "" is the null condition
        null = self.null_cond(len(captions))
        empty = torch.tensor([not x for x in captions], device=cond.context.device)  # (b,)
        context = torch.where(empty[:, None, None], null.context, cond.context)
        return Cond(context, torch.where(empty[:, None], null.vector, cond.vector))

    @torch.no_grad()
    def null_cond(self, b: int, size: tuple[int, int] = (1024, 1024)) -> Cond:
        """b rows of guidance's null condition: "" for SD1.x; for SDXL zeros, except the size."""
        if not self.cfg.big:
            return Cond(self.encode([""]).context.expand(b, -1, -1))
        weight, width = self.tower.positional_embedding, self.cfg.big[0]
        context = weight.new_zeros(b, N_TOKENS, self.cfg.width + width)
        return Cond(context, add_size(weight.new_zeros(b, width), uncut_ids(size)))


def uncut_ids(size: tuple[int, int]) -> Tensor:
    """The size ids (1, 6) of a picture of `size` (W, H) that was neither scaled nor cut."""
    width, height = size
    return torch.tensor([[height, width, 0, 0, height, width]])


def add_size(pooled: Tensor, size_ids: Tensor) -> Tensor:
    """Pooled text (b, d), and size ids (b or 1, 6) by 256 sinusoids each -> (b, d + 1536)."""
    embedded = timestep_embedding(size_ids.to(pooled.device).flatten(), 256)  # (b * 6, 256)
    embedded = rearrange(embedded, "(b six) d -> b (six d)", six=6).to(pooled.dtype)
    return torch.cat([pooled, embedded.expand(len(pooled), -1)], dim=-1)


def with_sizes(cond: Cond, size_ids: Tensor) -> Cond:
    """The same Cond with other size ids (b or 1, 6); unchanged for SD1.x, which has none."""
    if cond.vector is None:
        return cond
    return Cond(cond.context, add_size(cond.vector[:, : -6 * 256], size_ids))


def lora_weights(text: TextEncoder) -> dict[str, Tensor]:
    """{path in a tau + ".weight": view of the weight}: te1. is CLIP-L, te2. is bigG."""
    views = {}
    for te, tower in (("te1", text.tower), ("te2", getattr(text, "big", None))):
        for i, block in enumerate(tower.transformer.resblocks if tower else []):
            layer = f"{te}.encoder.layers.{i}"
            for x, rows in qkv_rows(len(block.attn.in_proj_weight)).items():
                views[f"{layer}.self_attn.{x}_proj.weight"] = block.attn.in_proj_weight[rows]
            views[f"{layer}.self_attn.out_proj.weight"] = block.attn.out_proj.weight
            views[f"{layer}.mlp.fc1.weight"] = block.mlp.c_fc.weight
            views[f"{layer}.mlp.fc2.weight"] = block.mlp.c_proj.weight
    if text.cfg.big:  # open_clip multiplies from the right, LoRA files from the left
        views["te2.text_projection.weight"] = text.big.text_projection.T
    return views


def hidden(tower: "TextTransformer", ids: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the last and of the penultimate layer, without final norm, (b, n, d) each."""
    n = ids.shape[1]
    x = tower.token_embedding(ids) + tower.positional_embedding[:n]  # (b, n, d)
    mask = torch.full((n, n), -torch.inf, dtype=x.dtype, device=x.device)
    mask = mask.triu(1)  # causal: -inf above the diagonal
    for block in tower.transformer.resblocks:
        before, x = x, block(x, attn_mask=mask)
    return x, before
