"""Masks for masked image modelling: block-wise (BootMAE's and BEiT's) and random (MAE's).

A mask is a bool tensor (B, N) over the patches of a (rows, columns) grid, numbered row by row;
True = masked. Every row has exactly the count asked for, and equal states of the generator give
equal masks. Needs only torch and numpy.
"""
import math
import random

import numpy as np
import torch
from torch import Tensor


def random_mask(
    batch: int, num_patches: int, num_masked: int, generator: torch.Generator | None = None
) -> Tensor:
    """Mask patches uniformly at random, as MAE does. Returns bool (batch, num_patches).

    Raises ValueError unless 0 <= num_masked <= num_patches.
    """
    return _fill_up(torch.zeros(batch, num_patches, dtype=torch.bool), num_masked, generator)


def block_mask(
    batch: int, grid: tuple[int, int], num_masked: int, generator: torch.Generator | None = None
) -> Tensor:
    """Mask rectangles up to 120 / 196 of the grid, then random patches up to `num_masked`.

    A rectangle has 16 to 60 of 14 x 14 patches, as published, or as large a share of another grid.
    Its height / width is log-uniform from 0.3 to 1 / 0.3. One that overshoots is left out.
    Returns bool (batch, rows * columns). ValueError unless 0 <= num_masked <= rows * columns.
    """
    rows, columns = grid
    unit = rows * columns / 196
    target = min(round(120 * unit), num_masked)
    uniform = random.Random(int(torch.randint(2**62, (), generator=generator))).random

    masks = np.zeros((batch, rows, columns), dtype=bool)  # numpy: torch takes longer a call
    for mask in masks:
        masked = tries = 0
        while masked < target and tries < 1000:  # the last few patches may fit nowhere
            tries += 1
            area = unit * (16 + 44 * uniform())
            aspect = 0.3 ** (2 * uniform() - 1)
            height = round(math.sqrt(area * aspect)) or 1
            width = round(math.sqrt(area / aspect)) or 1
            if height > rows or width > columns:
                continue
            top = int(uniform() * (rows - height + 1))
            left = int(uniform() * (columns - width + 1))
            rectangle = mask[top : top + height, left : left + width]  # a view
            added = height * width - np.count_nonzero(rectangle)
            if masked + added <= target:
                rectangle[:] = True
                masked += added
    return _fill_up(torch.from_numpy(masks).flatten(1), num_masked, generator)


def _fill_up(mask: Tensor, num_masked: int, generator: torch.Generator | None) -> Tensor:
    """Mask more patches at random, up to exactly `num_masked` in each row of bool (B, N)."""
    num_patches = mask.shape[1]
    if not 0 <= num_masked <= num_patches:
        raise ValueError(f"cannot mask {num_masked} of {num_patches} patches; "
                         f"num_masked must be 0 to {num_patches}")
    score = torch.rand(mask.shape, generator=generator) + mask  # masked: 1 or more, so they stay
    chosen = score.topk(num_masked, dim=1).indices                 # (B, num_masked)
    return torch.zeros_like(mask).scatter(1, chosen, True)         # (B, N)
