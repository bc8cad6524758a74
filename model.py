"""BootMAE: Bootstrapped Masked Autoencoders (Dong et al., ECCV 2022, arXiv 2207.07116).

Read from the top: attention and blocks, the ViT, the decoder with feature injection, and
`BootMAE.forward`, which is the paper's figure of the architecture. Needs only torch.

Shapes: B images, N patches of p x p pixels and C channels, V of them visible, M = N - V masked;
encoder width D, decoder width d. CLS is always token 0, so an encoder sequence is 1 + V long.
"""
import argparse
import copy
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {  # name: keyword arguments of ViT and BootMAE
    "nano": dict(embed_dim=128, depth=4, num_heads=4),
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
}


# --------------------------------------------------------------------------------------------------
# Patches and positions


def patch_grid(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches for a side or (height, width). ValueError unless they fit."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height % patch_size or width % patch_size or min(height, width) < patch_size:
        raise ValueError(f"image size {height} x {width} is not divisible "
                         f"by patch_size {patch_size}")
    return height // patch_size, width // patch_size


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut (B, C, H, W) into patches (B, N, C*p*p), row by row; a patch is laid out (C, p, p)."""
    rows, columns = patch_grid(images.shape[2:], patch_size)
    x = images.unflatten(2, (rows, -1)).unflatten(4, (columns, -1))    # (B, C, rows, p, columns, p)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)        # (B, N, C*p*p)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Undo `patchify`: (B, N, C*p*p) -> (B, C, H, W)."""
    x = patches.unflatten(1, grid)                                     # (B, rows, columns, C*p*p)
    x = x.unflatten(3, (-1, patch_size, patch_size))                   # (B, rows, columns, C, p, p)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)        # (B, C, H, W)


def sincos_positions(embed_dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sin-cos positions, float32 (1, 1 + N, embed_dim).

    CLS gets zeros. A patch in row r and column c gets [sin r, cos r, sin c, cos c], each of D/4
    frequencies.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim {embed_dim} is not divisible by 4, as sin-cos positions need")
    quarter = embed_dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)      # (D/4,)
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    r, c = row.reshape(-1, 1) * omega, column.reshape(-1, 1) * omega                # (N, D/4)
    table = torch.cat([r.sin(), r.cos(), c.sin(), c.cos()], dim=1)                  # (N, D)
    return F.pad(table, (0, 0, 1, 0)).float()[None]                                 # (1, 1+N, D)


def resize_positions(table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Interpolate positions (1, 1 + rows * columns, D), all but CLS's, to another grid; bicubic."""
    if tuple(grid) == tuple(new_grid):
        return table
    x = table[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)         # (1, D, rows, columns)
    x = F.interpolate(x, new_grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], x.flatten(2).transpose(1, 2)], dim=1)


# --------------------------------------------------------------------------------------------------
# Transformer blocks. Their names, and so the keys in a state_dict, are timm's.


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(w)) v for h heads of width w: q (B, h, T, w), k and v (B, h, S, w).

    This is torch's fused kernel, except in bfloat16 on a CPU, where that kernel is 2 to 16 times
    slower than the plain products (torch 2.13, 26 to 577 tokens).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head attention: self-attention, or cross-attention to a context of width `context_dim`.

    A head is floor(dim / num_heads) wide, and num_heads need not divide dim: the published ViT-B
    regressor has 12 heads of 42 at width 512, so its q, k and v are 504 wide.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        inner = dim // num_heads * num_heads
        if not inner:
            raise ValueError(f"width {dim} is less than num_heads {num_heads}")
        if context_dim is None:
            self.qkv = nn.Linear(dim, 3 * inner)
        else:
            self.q = nn.Linear(dim, inner)
            self.kv = nn.Linear(context_dim, 2 * inner)
        self.proj = nn.Linear(inner, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, T, dim) -> (B, T, dim); cross-attention also has a context (B, S, context_dim)."""
        if context is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)                  # (B, T, h*w) each
        else:
            q, (k, v) = self.q(x), self.kv(context).chunk(2, -1)    # (B, T, h*w), (B, S, h*w) twice
        # Heads become a dimension: (B, h, T or S, w) each.
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = attend(q, k, v)                                         # (B, h, T, w)
        return self.proj(x.transpose(1, 2).flatten(2))              # (B, T, dim)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block, (B, T, D) -> (B, T, D). Samples skip a branch with probability drop_path."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = drop_path

    def drop(self, branch: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return branch
        keep = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1 - self.drop_path)   # (B, 1, 1)
        return branch * keep / (1 - self.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class DecoderBlock(Block):
    """A block with feature injection: cross-attention between self-attention and MLP.

    Queries come from all tokens of the decoder (CLS, visible, masked), keys and values from the
    encoder's CLS and visible tokens. With context_dim None there is no injection: a plain block.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None):
        super().__init__(dim, num_heads)
        self.cross_attn = None
        if context_dim is not None:
            self.norm_query = nn.LayerNorm(dim, eps=1e-6)
            self.norm_context = nn.LayerNorm(context_dim, eps=1e-6)
            self.cross_attn = Attention(dim, num_heads, context_dim)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x))
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.norm_query(x), self.norm_context(context))
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Xavier-uniform matrices, zero biases.

    `nn.Module.apply` visits children first, so an Attention overwrites the weights of its Linears.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):  # the patch embedding is a linear map of a patch
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)
    elif isinstance(module, Attention):  # q, k and v share a Linear, but each is its own matrix
        fused, parts = (module.qkv, 3) if hasattr(module, "qkv") else (module.kv, 2)
        for matrix in fused.weight.chunk(parts):
            nn.init.xavier_uniform_(matrix)


# --------------------------------------------------------------------------------------------------
# The encoder


class PatchEmbed(nn.Module):
    """Linear map of patches (B, V, C*p*p) -> (B, V, D), stored as timm stores it: a convolution."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2021) with fixed sin-cos positions.

    The state_dict is timm's. An encoder's fits a VisionTransformer of the same sizes that is made
    with num_classes=0, global_pool="avg" and fc_norm=False.
    Images are float (B, in_chans, H, W) in [-1, 1].
    img_size: a side, or (height, width). num_classes 0: an encoder, with a final norm; otherwise a
    classifier, with `fc_norm` and `head` on the mean of the patch tokens. drop_path rises linearly
    from 0 in the first block to its value in the last. branch_init scales the matrices that end the
    residual branches at the start: 1 as published, 0 for blocks that start as the identity.
    Raises ValueError unless img_size is divisible by patch_size, embed_dim by 4 and by num_heads.
    """

    def __init__(
        self, img_size: int | tuple[int, int] = 224, patch_size: int = 16, embed_dim: int = 768,
        depth: int = 12, num_heads: int = 12, num_classes: int = 0, drop_path: float = 0.0,
        branch_init: float = 1.0, in_chans: int = 3,
    ):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        self.patch_size, self.grid = patch_size, patch_grid(img_size, patch_size)
        self.sizes = dict(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim,
                          depth=depth, num_heads=num_heads, in_chans=in_chans)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", sincos_positions(embed_dim, self.grid))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
        # An encoder normalises every token at its end, a classifier only their mean.
        self.norm = nn.Identity() if num_classes else nn.LayerNorm(embed_dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6) if num_classes else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

        self.apply(init_weights)
        # Xavier branches are as large as the tokens that they are added to: after twelve, most of a
        # token is common to all tokens. With small ones a network learns in a few thousand steps.
        for block in self.blocks:
            block.attn.proj.weight.data.mul_(branch_init)
            block.mlp.fc2.weight.data.mul_(branch_init)
        nn.init.normal_(self.cls_token, std=1e-6)  # near zero: its content comes through attention
        if num_classes:  # near zero, so that all classes start equally likely
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            self.head.weight.data.mul_(0.001)

    def encode(
        self, patches: Tensor, visible: Tensor | None = None, taps: tuple[int, ...] = (),
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the blocks over patches (B, N, C*p*p), or those with indices `visible` (B, V) int64.

        Returns the last block's tokens (B, 1 + V, D), before the final norm, and a dict of the
        tokens after each block numbered in `taps` (the first block is 1). V is N without `visible`.
        `grid` is the patches' if it is not the model's; positions are then interpolated.
        """
        pos = resize_positions(self.pos_embed, self.grid, grid or self.grid)  # (1, 1+N, D)
        cls, pos = self.cls_token + pos[:, :1], pos[:, 1:]                    # (1, 1, D), (1, N, D)
        if visible is not None:
            patches = patches.take_along_dim(visible[:, :, None], dim=1)      # (B, V, C*p*p)
            pos = pos[0, visible]                                             # (B, V, D)
        x = self.patch_embed(patches) + pos                                   # (B, V, D)
        x = torch.cat([cls.expand(x.shape[0], -1, -1), x], dim=1)             # (B, 1+V, D)
        tapped = {}
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number in taps:
                tapped[number] = x
        return x, tapped

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes), or to the mean patch token (B, D)."""
        self.check_size(images)
        x, _ = self.encode(patchify(images, self.patch_size))                 # (B, 1+N, D)
        return self.head(self.fc_norm(self.norm(x)[:, 1:].mean(dim=1)))

    def check_size(self, images: Tensor) -> None:
        """Raise ValueError unless the images are of the size that the model was built for."""
        if patch_grid(images.shape[2:], self.patch_size) != self.grid:
            given, own = tuple(images.shape[2:]), tuple(n * self.patch_size for n in self.grid)
            raise ValueError(f"images are {given}; this model takes {own}: build it with img_size=")

    def feature_maps(self, images: Tensor, blocks: tuple[int, ...]) -> list[Tensor]:
        """Outputs of the blocks numbered in `blocks` (from 1), for dense prediction.

        They are maps (B, D, H/p, W/p). The image size may be any that patch_size divides: positions
        are interpolated. Gradients flow. UperNet and Mask R-CNN need four strides. With patches of
        16, these layers, one for each map, give strides 4, 8, 16 and 32:

            up = lambda: nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2)
            nn.Sequential(up(), nn.GELU(), up()), up(), nn.Identity(), nn.MaxPool2d(2)

        torchvision's MaskRCNN also needs an AnchorGenerator with one size for each map, and, for
        patches that do not divide 32, `size_divisible=` (48 for patches of 12).
        Raises ValueError for a block that is not there, or an image size that does not divide.
        """
        grid = patch_grid(images.shape[2:], self.patch_size)
        if not all(1 <= number <= len(self.blocks) for number in blocks):
            raise ValueError(f"blocks {tuple(blocks)}: this ViT has blocks 1 to {len(self.blocks)}")
        _, tapped = self.encode(patchify(images, self.patch_size), taps=tuple(blocks), grid=grid)
        return [tapped[number][:, 1:].transpose(1, 2).unflatten(2, grid) for number in blocks]


# --------------------------------------------------------------------------------------------------
# BootMAE


class Decoder(nn.Module):
    """Predicts the masked patches: the pixel regressor and the feature predictor are Decoders.

    context_dim is the width of the features injected into each block, or None for no injection.
    """

    def __init__(
        self, grid: tuple[int, int], in_dim: int, dim: int, depth: int, num_heads: int,
        out_dim: int, context_dim: int | None,
    ):
        super().__init__()
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", sincos_positions(dim, grid))
        self.blocks = nn.ModuleList(DecoderBlock(dim, num_heads, context_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out_dim)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, context: Tensor | None, masked: Tensor) -> Tensor:
        """latent (B, 1+V, D), context likewise, masked (B, M) int64 -> predictions (B, M, out_dim).

        The mask tokens are appended to the visible ones: attention knows no order.
        """
        tokens = self.embed(latent)                                    # (B, 1+V, d), with positions
        mask_tokens = self.mask_token + self.pos_embed[0, 1:][masked]  # (B, M, d), one per position
        x = torch.cat([tokens, mask_tokens], dim=1)                    # (B, 1+N, d)
        for block in self.blocks:
            x = block(x, context)
        return self.head(self.norm(x[:, tokens.shape[1]:]))            # (B, M, out_dim)


def normalize_patches(patches: Tensor, patch_size: int) -> Tensor:
    """Normalise each channel of each patch (..., C*p*p) by its own mean and biased variance.

    MAE normalises over all C*p*p values; per channel, the target loses the local colour as well.
    """
    x = patches.unflatten(-1, (-1, patch_size**2))                # (..., C, p*p)
    return F.layer_norm(x, x.shape[-1:], eps=1e-5).flatten(-2)    # (..., C*p*p)


def standardize(features: Tensor) -> Tensor:
    """LayerNorm without parameters over the last dimension, in float32."""
    return F.layer_norm(features.float(), features.shape[-1:], eps=1e-6)


def loss_weight(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Weight of each patch in the losses: m * avg3(m) + m, avg3 being a zero-padded 3 x 3 mean.

    The middle of a masked region, the hardest to fill in, weighs most: 2. A masked patch alone
    weighs 1 + 1/9, a visible one 0. Takes bool (B, rows * columns), returns float32 of that shape.
    Raises ValueError on another shape.
    """
    rows, columns = grid
    if mask.ndim != 2 or mask.shape[1] != rows * columns:
        needed = f"a {rows} x {columns} grid needs (B, {rows * columns})"
        raise ValueError(f"mask has shape {tuple(mask.shape)}; {needed}")
    m = mask.float().unflatten(1, grid)                           # (B, rows, columns)
    around = F.avg_pool2d(m[:, None], 3, stride=1, padding=1)     # (B, 1, rows, columns)
    return (m * around[:, 0] + m).flatten(1)                      # (B, N)


class Output(NamedTuple):
    """What `BootMAE.forward` returns. The predictions are for the masked patches, in order."""

    pixel_loss: Tensor         # scalar
    feature_loss: Tensor       # scalar, 0 without a feature target
    pixels: Tensor             # (B, M, C*p*p), normalised as `normalize_patches` does
    features: Tensor | None    # (B, M, D), the predicted teacher features, or None without a target
    masked: Tensor             # (B, M) int64, the indices of these patches, ascending


class BootMAE(nn.Module):
    """Pretraining: `.encoder`, its EMA copy `.teacher`, decoders `.regressor` and `.predictor`.

    img_size .. num_heads, branch_init, in_chans: as in `ViT`. decoder_dim: the regressor's width;
    the predictor is embed_dim wide. Then the paper's ablations. inject: the encoder blocks that the
    regressor and the predictor attend to (the first is 1, the last is -1, 0 is none).
    feature_target: False leaves out teacher and predictor. weighted_loss: False gives every masked
    patch weight 1.
    With inject=(0, 0) and both flags False this is MAE with three differences: pixels are
    normalised per channel, the decoder is shallower, and it adds positions to the mask tokens only.
    Raises ValueError for sizes that do not fit (see `ViT`), a decoder_dim not divisible by 4, or a
    block that is not there.
    """

    def __init__(
        self, img_size: int | tuple[int, int] = 224, patch_size: int = 16, embed_dim: int = 768,
        depth: int = 12, num_heads: int = 12, decoder_dim: int = 512, decoder_depth: int = 2,
        inject: tuple[int, int] = (1, -1), feature_target: bool = True, weighted_loss: bool = True,
        branch_init: float = 1.0, in_chans: int = 3,
    ):
        super().__init__()
        if not all(-1 <= number <= depth for number in inject):
            raise ValueError(f"inject {tuple(inject)}: blocks are numbered 1 to {depth}; "
                             "-1 is the last, 0 is none")
        self.encoder = ViT(img_size, patch_size, embed_dim, depth, num_heads,
                           branch_init=branch_init, in_chans=in_chans)
        self.patch_size, self.weighted_loss = patch_size, weighted_loss
        self.grid = self.encoder.grid
        self.inject = tuple(depth if number == -1 else number for number in inject)
        shallow, deep = (embed_dim if number else None for number in self.inject)
        self.regressor = Decoder(self.grid, embed_dim, decoder_dim, decoder_depth, num_heads,
                                 in_chans * patch_size**2, shallow)
        self.predictor = self.teacher = None
        if feature_target:
            self.predictor = Decoder(self.grid, embed_dim, embed_dim, decoder_depth, num_heads,
                                     embed_dim, deep)
            self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, images: Tensor, mask: Tensor) -> Output:
        """Losses for float images (B, C, H, W) in [-1, 1] under a mask, bool (B, N), True = masked.

        Every row of the mask must hide the same number of patches. Checking a mask on the CPU costs
        no GPU sync. Raises ValueError for images or a mask of another shape, dtype or count.
        """
        visible, masked = self.split(images, mask)                             # (B, V), (B, M)
        index = masked[:, :, None]                                             # (B, M, 1)
        patches = patchify(images, self.patch_size)                            # (B, N, C*p*p)
        masked_patches = patches.take_along_dim(index, dim=1)                  # (B, M, C*p*p)
        weight = self.masked_weight(mask, masked)                              # (B, M, 1)

        # Encoder: sees the visible patches alone. Two taps lead to the decoders.
        last, tapped = self.encoder.encode(patches, visible, self.inject)      # (B, 1+V, D)
        shallow, deep = (tapped.get(number) for number in self.inject)         # (B, 1+V, D) or None
        latent = self.encoder.norm(last)                                       # (B, 1+V, D)

        # Pixel regressor: the low-level target, with shallow features injected.
        pixels = self.regressor(latent, shallow, masked)                       # (B, M, C*p*p)
        pixel_target = normalize_patches(masked_patches, self.patch_size)      # (B, M, C*p*p)
        # A mean over the masked patches. The paper's mean over all, divided by mean(m), is the
        # same: the rest weighs 0.
        pixel_loss = (weight * (pixels.float() - pixel_target) ** 2).mean()

        features, feature_loss = None, torch.zeros_like(pixel_loss)
        if self.teacher is not None:
            # Feature predictor: the high-level target, with deep features injected.
            features = self.predictor(latent, deep, masked)                    # (B, M, D)
            # Momentum teacher: sees the whole image. `standardize` takes the place of its final
            # norm, without a learned scale that could shrink the target.
            with torch.no_grad():
                teacher_tokens, _ = self.teacher.encode(patches)               # (B, 1+N, D)
                feature_target = teacher_tokens[:, 1:].take_along_dim(index, dim=1)  # (B, M, D)
            error = standardize(features) - standardize(feature_target)        # (B, M, D)
            feature_loss = (weight * error**2).mean()

        return Output(pixel_loss, feature_loss, pixels, features, masked)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """After each step: teacher = momentum * teacher + (1 - momentum) * encoder, in one pass."""
        if self.teacher is not None:
            teacher, encoder = list(self.teacher.parameters()), list(self.encoder.parameters())
            torch._foreach_lerp_(teacher, encoder, 1 - momentum)

    @torch.compiler.disable  # V and M depend on the mask, and a compiled graph has fixed shapes
    def split(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the visible (B, V) and masked patches (B, M), int64, on the images' device."""
        self.encoder.check_size(images)
        shape = (len(images), self.grid[0] * self.grid[1])
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; "
                             f"it must be torch.bool {shape}, True = masked")
        low, high = torch.stack(mask.sum(dim=1).aminmax()).tolist()
        if low != high or not 0 < low < shape[1]:
            raise ValueError(f"rows of the mask hide {low} to {high} of {shape[1]} patches; "
                             f"each must hide the same number, 1 to {shape[1] - 1}")
        num_visible = shape[1] - low
        mask = mask.to(images.device, non_blocking=True)
        order = mask.byte().argsort(dim=1, stable=True)   # (B, N), the visible ones first
        return order[:, :num_visible], order[:, num_visible:]

    def masked_weight(self, mask: Tensor, masked: Tensor) -> Tensor:
        """Loss weights of the masked patches (B, M, 1): `loss_weight`'s, or all 1."""
        mask = mask.to(masked.device, non_blocking=True)
        weight = loss_weight(mask, self.grid) if self.weighted_loss else mask.float()  # (B, N)
        return weight.take_along_dim(masked, dim=1)[:, :, None]


# --------------------------------------------------------------------------------------------------
# Weights from files: this project's, the authors', MAE's and timm's

# The tensors of a plain ViT, and the beginnings of those of heads and decoders, which a file may
# hold as well. Any other may take part in the encoder's forward pass: then it is another network.
PLAIN = re.compile(r"cls_token|pos_embed|(patch_embed\.proj|norm|fc_norm|head"
                   r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]))\.(weight|bias)")
LEFT_OUT = re.compile(r"head|pre_logits|mask_token|masked_embed|decode|de_pos_embed|down|lm_head")


def load_vit(
    path: str, img_size: int | tuple[int, int] | None = None, num_classes: int | None = None,
    drop_path: float = 0.0, teacher: bool = False, num_heads: int | None = None,
    pixels: str = "signed", report: Callable[[str], None] = lambda line: None,
) -> ViT:
    """A ViT of the sizes found in a file of weights, in evaluation mode, for images in [-1, 1].

    path: an encoder.pt, best.pt or checkpoint.pt of this project, or a file of the authors, of MAE,
    or timm's state_dict of a plain ViT, as .safetensors too. img_size: None takes the file's; for
    any other, positions are interpolated. num_classes: None, or as many as the file has, takes its
    head, if there is one; another number a new head, 0 no head. teacher: take the teacher's weights
    from a pretraining checkpoint. num_heads: None takes that of a best.pt or checkpoint.pt; other
    files have none, so then that of SIZES for the width and depth found. pixels: "imagenet" for
    weights that were trained on pixels normalised with ImageNet's mean and deviation, which is
    folded into the patch embedding; "signed" for others.
    report: called with a line that says what was loaded, left out and new.
    Raises ValueError, naming the file and what to do, if it is no such file or fits no ViT.
    """
    if pixels not in ("signed", "imagenet"):
        raise ValueError(f"pixels={pixels!r} must be signed or imagenet")
    content = read_file(path)
    try:
        state, signed = _find_weights(content, teacher)
        embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        known = {(size["embed_dim"], size["depth"]): size["num_heads"] for size in SIZES.values()}
        settings = content.get("settings", {})  # of finetune.py: the sizes found in --init, too
        own = content.get("num_heads") or settings.get("sizes", settings).get("num_heads")
        num_heads = num_heads or own or known.get((embed_dim, depth))
        if num_heads is None:
            raise ValueError(f"has {depth} blocks of width {embed_dim}, and none of model.py's "
                             "SIZES has: give --num_heads (num_heads=)")
        # A head on the CLS token, or after another norm, is none on the normalised mean token.
        mean_head = "fc_norm.weight" in state and "norm.weight" not in state
        head = len(state.get("head.weight", ())) if mean_head else 0
        classes = head if num_classes is None else num_classes
        grid = _find_grid(state["pos_embed"], img_size and patch_grid(img_size, patch_size))
        vit = ViT(img_size or tuple(n * patch_size for n in grid), patch_size, embed_dim, depth,
                  num_heads, classes, drop_path, in_chans=in_chans)
        state["pos_embed"] = resize_positions(state["pos_embed"].float(), grid, vit.grid)
        note = f"{_copy(state, vit, classes == head)}; {num_heads} heads"
        if grid != vit.grid:
            note += "; positions interpolated from {} x {} to {} x {}".format(*grid, *vit.grid)
        if pixels == "imagenet":
            if signed or in_chans != 3:
                kind = "is this project's or the authors'" if signed else f"has {in_chans} channels"
                raise ValueError(f"{kind}: leave --init_pixels imagenet out")
            _fold_imagenet(vit.patch_embed.proj)
            note += "; ImageNet's mean and deviation folded into the patch embedding"
        elif not signed:
            note += ("; taken to expect pixels of -1 .. 1 (if trained on ImageNet's mean and "
                     "deviation, as MAE: --init_pixels imagenet)")
    except (ValueError, RuntimeError) as error:  # a RuntimeError of load_state_dict has many lines
        raise ValueError(f"{path} {' '.join(str(error).split())}") from error
    report(f"{path}: {note}")
    return vit.eval()


def read_file(path: str) -> dict:
    """A dict of tensors and plain values. ValueError names a file that is bad or holds code."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file  # a package that nothing else needs
            return load_file(path)
        # The authors' files hold their arguments, an argparse.Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=False))
    except Exception as error:  # many kinds: of a missing or bad file, or one that holds code
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ValueError(f"can't read {path} as plain tensors, and left it as it is "
                         f"({reason})") from error


def _find_weights(content: dict, teacher: bool) -> tuple[dict[str, Tensor], bool]:
    """A plain ViT's tensors by timm's names, with heads and decoders, from a file's content.

    Also whether the file is surely this project's or the authors', whose pixels are in [-1, 1].
    """
    wrappers = "model_ema" if teacher else "", "model", "state_dict", "module", "model_state_dict"
    found = [name for name in wrappers if isinstance(content.get(name), dict)]
    state = content[found[0]] if found else content
    if not all(isinstance(key, str) and isinstance(x, Tensor) for key, x in state.items()):
        raise ValueError("holds no state_dict of a ViT")
    while len({key.split(".")[0] for key in state}) == 1 and all("." in key for key in state):
        state = {key.partition(".")[2]: x for key, x in state.items()}  # module., _orig_mod. etc.
    if any(key.startswith("features.encoder.") for key in state):
        raise ValueError("is of a linear probe: give fine-tuning's best.pt, or an encoder.pt")
    if any("patch_embeddings." in key for key in state):
        raise ValueError("has transformers' names: take timm's file of the model, or convert them")
    pretraining = "regressor.mask_token" in state  # a checkpoint.pt of train.py
    if pretraining:
        part = "teacher." if teacher else "encoder."
        state = {key.removeprefix(part): x for key, x in state.items() if key.startswith(part)}
    if teacher and not (state if pretraining else "model_ema" in found):
        raise ValueError("holds no teacher (no teacher.* and no model_ema): leave --teacher out")

    # The authors' Linears of q, k and v have a bias for q and v only.
    q_biases = [key for key in state if re.fullmatch(r"blocks\.\d+\.attn\.q_bias", key)
                and key.replace("q_bias", "v_bias") in state]
    for key in q_biases:
        q_bias, v_bias = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        state[key.replace("q_bias", "qkv.bias")] = bias

    for key, x in state.items():
        if not PLAIN.fullmatch(key) and not LEFT_OUT.match(key):
            raise ValueError(f"fits no ViT: it has {key}, which a plain ViT lacks")
        if not x.isfinite().all():
            raise ValueError(f"can't be used: {key} has values that are not finite")
    for key, ndim in {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4,
                      "blocks.0.attn.qkv.weight": 2}.items():
        if key not in state or state[key].ndim != ndim:
            raise ValueError(f"fits no ViT: it has no {key} of {ndim} dimensions")
    return state, pretraining or bool(q_biases) or "classes" in content


def _find_grid(positions: Tensor, wanted: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of the patches that positions (1, 1 + N, D) in a file are for.

    Sin-cos positions tell them. Learned ones do not: they are taken for a square, or for `wanted`.
    """
    _, count, embed_dim = positions.shape
    grids = [(rows, (count - 1) // rows) for rows in range(1, count) if (count - 1) % rows == 0]
    for grid in grids:
        if torch.allclose(positions.float(), sincos_positions(embed_dim, grid), atol=0.01):
            return grid
    square = [(rows, columns) for rows, columns in grids if rows == columns]
    if not square and wanted not in grids:
        raise ValueError(f"fits no ViT: pos_embed has {count} positions, " + (
            "a square: none for CLS" if math.isqrt(count) ** 2 == count else
            "not one for CLS and a square; if its images are not square, give load_vit img_size"))
    return square[0] if square else wanted


def _copy(state: dict[str, Tensor], vit: ViT, head: bool) -> str:
    """Copy into `vit`, and say what. Norms and head may be new. head: whether to take that, too."""
    own = vit.state_dict()
    new = {key for key in own if key.startswith("head.") and not head
           or key.startswith(("norm.", "fc_norm.", "head.")) and key not in state}
    loaded = {key: state[key] for key in state.keys() & own.keys() - new}
    vit.load_state_dict(loaded | {key: own[key] for key in new})  # RuntimeError if one doesn't fit
    left_out, new = (", ".join(sorted({key.split(".")[0] for key in keys})) or "nothing"
                     for keys in (state.keys() - loaded.keys(), new))
    return f"{len(loaded)} tensors loaded; left out: {left_out}; new: {new}"


@torch.no_grad()
def _fold_imagenet(proj: nn.Conv2d) -> None:
    """Turn a patch embedding for ImageNet-normalised pixels into one for pixels in [-1, 1].

    For s in [-1, 1] it was given (u - mean) / std with u = (s + 1) / 2, so its sum of
    w (u - mean) / std is one of (0.5 w / std) s, and a bias more: w (0.5 - mean) / std.
    """
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    weight = proj.weight.double()                                         # (D, 3, p, p)
    proj.bias += (weight * (0.5 - mean) / std).sum(dim=(1, 2, 3))
    proj.weight.copy_(0.5 * weight / std)
