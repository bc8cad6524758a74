"""Masks for masked image modelling: block-wise (BootMAE's and BEiT's) and random (MAE's), each with an exact count.

A mask is a bool tensor (B, N) over the patches of a (rows, columns) grid, numbered row by row; True = masked.
Needs only torch.
"""
import math
import random

import torch
from torch import Tensor


def random_mask(batch: int, num_patches: int, num_masked: int, generator: torch.Generator | None = None) -> Tensor:
    """Mask patches uniformly at random, as MAE does.

    Returns bool (batch, num_patches) with exactly `num_masked` True in each row, the same for the same generator state.
    Raises ValueError unless 0 <= num_masked <= num_patches.
    """
    nothing = torch.zeros(batch, num_patches, dtype=torch.bool)
    return _fill_up(nothing, num_masked, generator)


def block_mask(
    batch: int,
    grid: tuple[int, int],
    num_masked: int,
    generator: torch.Generator | None = None,
    cover: float = 120 / 196,
    min_area: float = 16 / 196,
    max_area: float = 60 / 196,
    min_aspect: float = 0.3,
) -> Tensor:
    """Mask rectangles of patches until `cover` of the grid is masked, then random patches up to `num_masked`.

    The default fractions are the published recipe's 120, 16 and 60 of 14 x 14 patches. Height / width is
    log-uniform from `min_aspect` to 1 / `min_aspect`. A rectangle is kept only if it masks something new and
    does not overshoot `cover`.

    Returns bool (batch, rows * columns) with exactly `num_masked` True in each row, the same for the same generator
    state. Raises ValueError unless 0 <= num_masked <= rows * columns.
    """
    rows, columns = grid
    num_patches = rows * columns
    target = min(round(cover * num_patches), num_masked)
    log_aspect = math.log(min_aspect)
    uniform = random.Random(int(torch.randint(2**62, (), generator=generator))).random

    # A mask is one Python integer, a bit for each patch: union, overlap and count are then single operations, a hundred
    # times cheaper than tensor operations on so few patches. stack[h] has a 1 at the start of each of h rows, so
    # (bits of one row) * stack[h] repeats that row h times: a rectangle.
    stack = [sum(1 << (row * columns) for row in range(h)) for h in range(rows + 1)]
    masks = []
    for _ in range(batch):
        mask = covered = tries = 0
        while covered < target and tries < 1000:  # the last few may fit nowhere; random patches replace them
            tries += 1
            area = num_patches * (min_area + (max_area - min_area) * uniform())
            aspect = math.exp(log_aspect * (2 * uniform() - 1))
            height, width = round(math.sqrt(area * aspect)) or 1, round(math.sqrt(area / aspect)) or 1
            if height > rows or width > columns:
                continue
            top, left = int(uniform() * (rows - height + 1)), int(uniform() * (columns - width + 1))
            union = mask | ((1 << width) - 1) * stack[height] << (top * columns + left)
            if covered < union.bit_count() <= target:
                mask, covered = union, union.bit_count()
        masks.append(mask.to_bytes((num_patches + 7) // 8, "little"))

    packed = torch.frombuffer(bytearray(b"".join(masks)), dtype=torch.uint8).view(batch, -1)  # (B, N / 8 up) bytes
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1                        # (B, N / 8 up, 8) bits
    return _fill_up(bits.flatten(1)[:, :num_patches].bool(), num_masked, generator)            # (B, N)


def _fill_up(mask: Tensor, num_masked: int, generator: torch.Generator | None) -> Tensor:
    """Mask more patches at random, up to exactly `num_masked` in each row of bool (B, N)."""
    batch, num_patches = mask.shape
    if not 0 <= num_masked <= num_patches:
        raise ValueError(f"cannot mask {num_masked} of {num_patches} patches; num_masked must be 0 to {num_patches}")
    score = torch.rand(batch, num_patches, generator=generator) + mask    # the masked ones score highest, so they stay
    chosen = score.topk(num_masked, dim=1).indices                        # (B, M)
    return torch.zeros_like(mask).scatter(1, chosen, True)                # (B, N)
