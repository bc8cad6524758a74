"""Tests: each against plain loops written from the paper's definitions, or against a property that must hold.

    python -m pytest -q
    BOOTMAE_OFFICIAL=path/to/checkout python -m pytest -q       compares with the authors' code as well
"""
import argparse
import contextlib
import copy
import csv
import functools
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile as JPEG
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import data
import finetune
import train
from masking import block_mask, random_mask
from model import (
    SIZES,
    Attention,
    BootMAE,
    ViT,
    from_official,
    load_matching,
    load_vit,
    loss_weight,
    normalize_patches,
    patchify,
    read_weights,
    resize_positions,
    sincos_positions,
    sizes_of,
    unpatchify,
)

torch.set_num_threads(1)  # as in the processes that `launch` starts, so that sums are the same to the bit
HERE = os.path.dirname(os.path.abspath(__file__))
GRIDS = [(14, 14), (8, 8), (16, 16), (4, 4), (3, 5), (7, 20), (1, 9), (2, 2)]


# ----------------------------------------------------------------------------------------------------------------------
# Naive versions: one sample, one token, one head at a time, in float64


def linear(w, prefix, x):
    return w[prefix + ".weight"] @ x + w[prefix + ".bias"]


def layer_norm(x, weight=1.0, bias=0.0):
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weight + bias


def norm(w, prefix, tokens):
    return [layer_norm(t, w[prefix + ".weight"], w[prefix + ".bias"]) for t in tokens]


def attend(queries, keys, values, heads):
    """Lists of vectors; softmax(q k / sqrt(width)) v, head by head."""
    width = len(queries[0]) // heads
    out = []
    for q in queries:
        parts = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = [math.exp(float(q[part] @ k[part]) / math.sqrt(width)) for k in keys]
            parts.append(sum(s / sum(scores) * v[part] for s, v in zip(scores, values)))
        out.append(torch.cat(parts))
    return out


def self_attention(w, prefix, tokens, heads):
    thirds = [linear(w, prefix + ".qkv", t).chunk(3) for t in tokens]
    mixed = attend(*([t[i] for t in thirds] for i in range(3)), heads)
    return [linear(w, prefix + ".proj", t) for t in mixed]


def cross_attention(w, prefix, tokens, context, heads):
    queries = [linear(w, prefix + ".q", t) for t in tokens]
    halves = [linear(w, prefix + ".kv", t).chunk(2) for t in context]
    mixed = attend(queries, [h[0] for h in halves], [h[1] for h in halves], heads)
    return [linear(w, prefix + ".proj", t) for t in mixed]


def mlp(w, prefix, tokens):
    hidden = [linear(w, prefix + ".fc1", t) for t in tokens]
    hidden = [0.5 * t * (1 + torch.erf(t / math.sqrt(2))) for t in hidden]
    return [linear(w, prefix + ".fc2", t) for t in hidden]


def add(tokens, branch):
    return [a + b for a, b in zip(tokens, branch)]


def naive_positions(dim, rows, columns):
    table = []
    for r in range(rows):
        for c in range(columns):
            omega = [10000 ** (-k / (dim // 4)) for k in range(dim // 4)]
            table.append([math.sin(r * o) for o in omega] + [math.cos(r * o) for o in omega]
                         + [math.sin(c * o) for o in omega] + [math.cos(c * o) for o in omega])
    return torch.tensor(table, dtype=torch.float64)


def naive_patches(image, p):
    """(3, H, W) to a list of vectors (3*p*p), channel first, row by row."""
    patches = []
    for top in range(0, image.shape[1], p):
        for left in range(0, image.shape[2], p):
            places = [(ch, top + y, left + x) for ch in range(3) for y in range(p) for x in range(p)]
            patches.append(torch.stack([image[place] for place in places]))
    return patches


def naive_encoder(w, prefix, patches, numbers, grid, heads, depth):
    """Outputs of all blocks, each a list of 1 + len(numbers) vectors."""
    weight = w[prefix + "patch_embed.proj.weight"].flatten(1)
    positions = naive_positions(len(weight), *grid)
    x = [w[prefix + "cls_token"][0, 0]]
    x += [weight @ patches[n] + w[prefix + "patch_embed.proj.bias"] + positions[n] for n in numbers]
    outputs = []
    for i in range(depth):
        name = f"{prefix}blocks.{i}."
        x = add(x, self_attention(w, name + "attn", norm(w, name + "norm1", x), heads))
        x = add(x, mlp(w, name + "mlp", norm(w, name + "norm2", x)))
        outputs.append(x)
    return outputs


def naive_decoder(w, prefix, latent, context, visible, grid, heads, depth):
    """Predictions for all N patches, in image order."""
    projected = [linear(w, prefix + "embed", t) for t in latent]
    positions = naive_positions(len(projected[0]), *grid)
    x = [projected[0]]
    for n in range(grid[0] * grid[1]):
        x.append(projected[1 + visible.index(n)] if n in visible else w[prefix + "mask_token"][0, 0] + positions[n])
    for i in range(depth):
        name = f"{prefix}blocks.{i}."
        x = add(x, self_attention(w, name + "attn", norm(w, name + "norm1", x), heads))
        if context is not None:
            queries, keys = norm(w, name + "norm_query", x), norm(w, name + "norm_context", context)
            x = add(x, cross_attention(w, name + "cross_attn", queries, keys, heads))
        x = add(x, mlp(w, name + "mlp", norm(w, name + "norm2", x)))
    return [linear(w, prefix + "head", t) for t in norm(w, prefix + "norm", x)[1:]]


def naive_weight(mask, rows, columns):
    """w = m * avg3(m) + m, for one list of 0 and 1."""
    weight = []
    for r in range(rows):
        for c in range(columns):
            around = sum(mask[y * columns + x] for y in range(r - 1, r + 2) for x in range(c - 1, c + 2)
                         if 0 <= y < rows and 0 <= x < columns)
            weight.append(mask[r * columns + c] * around / 9 + mask[r * columns + c])
    return weight


def naive_normalize(patch, p):
    channels = []
    for channel in patch.view(3, p * p):
        mean = sum(channel) / (p * p)
        variance = sum((v - mean) ** 2 for v in channel) / (p * p)
        channels.append((channel - mean) / torch.sqrt(variance + 1e-5))
    return torch.cat(channels)


def naive_bootmae(w, images, mask, p, grid, heads, depth, decoder_depth, inject=(1, -1), feature_target=True,
                  weighted=True):
    """Both losses and all predictions, from a state_dict in float64."""
    all_pixels, all_features, pixel_errors, feature_errors = [], [], [], []
    for image, row in zip(images, mask.tolist()):
        patches = naive_patches(image, p)
        visible = [n for n, hidden in enumerate(row) if not hidden]
        outputs = naive_encoder(w, "encoder.", patches, visible, grid, heads, depth)
        latent = norm(w, "encoder.norm", outputs[-1])
        shallow, deep = (None if tap == 0 else outputs[tap - 1 if tap > 0 else tap] for tap in inject)
        weight = naive_weight([float(m) for m in row], *grid) if weighted else [float(m) for m in row]
        pixels = naive_decoder(w, "regressor.", latent, shallow, visible, grid, heads, decoder_depth)
        pixel_errors += [(weight[n] * (pixels[n] - naive_normalize(patches[n], p)) ** 2).mean()
                         for n in range(len(row))]
        all_pixels.append(torch.stack(pixels))
        if feature_target:
            features = naive_decoder(w, "predictor.", latent, deep, visible, grid, heads, decoder_depth)
            target = naive_encoder(w, "teacher.", patches, range(len(patches)), grid, heads, depth)[-1][1:]
            feature_errors += [(weight[n] * (layer_norm(features[n]) - layer_norm(target[n])) ** 2).mean()
                               for n in range(len(row))]
            all_features.append(torch.stack(features))
    ratio = mask.double().mean()
    pixel_loss = torch.stack(pixel_errors).mean() / ratio
    feature_loss = torch.stack(feature_errors).mean() / ratio if feature_target else torch.tensor(0.0)
    return pixel_loss, feature_loss, torch.stack(all_pixels), torch.stack(all_features) if feature_target else None


SMALL = dict(img_size=(8, 12), patch_size=4, embed_dim=24, depth=3, num_heads=3, decoder_dim=20, decoder_depth=2)


def small_model(seed=0, **changes):
    """A model in float64 with every parameter away from its initial value, the teacher away from the encoder."""
    torch.manual_seed(seed)
    model = BootMAE(**SMALL | changes).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64) * 2 - 1
    return model, images, random_mask(2, 6, 4, torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# model.py


@pytest.mark.parametrize("changes", [
    {}, {"inject": (0, 0)}, {"inject": (2, 1)}, {"inject": (-1, -1)}, {"feature_target": False},
    {"weighted_loss": False}, {"inject": (0, 0), "feature_target": False}, {"decoder_depth": 1},
], ids=str)
def test_forward_matches_the_definition(changes):
    model, images, mask = small_model(**changes)
    out = model(images, mask)
    settings = SMALL | changes
    pixel_loss, feature_loss, pixels, features = naive_bootmae(
        model.state_dict(), images, mask, 4, (2, 3), 3, 3, settings["decoder_depth"], settings.get("inject", (1, -1)),
        settings.get("feature_target", True), settings.get("weighted_loss", True))
    masked = out.masked[:, :, None]
    assert torch.equal(out.masked, mask.nonzero()[:, 1].view(2, 4))  # in ascending order
    torch.testing.assert_close(out.pixels, pixels.take_along_dim(masked, 1), rtol=0, atol=1e-6)  # float32 positions
    torch.testing.assert_close(out.pixel_loss.double(), pixel_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.feature_loss.double(), feature_loss.double(), rtol=1e-5, atol=0)
    if features is None:
        assert out.features is None
    else:
        torch.testing.assert_close(out.features, features.take_along_dim(masked, 1), rtol=0, atol=1e-6)


def test_attention_widths_that_do_not_divide():
    attention = Attention(512, 12, context_dim=768)
    assert attention.q.weight.shape == (504, 512) and attention.kv.weight.shape == (1008, 768)
    assert attention.proj.weight.shape == (512, 504)


@pytest.mark.parametrize("grid", [(14, 14), (2, 5)])
def test_positions(grid):
    table = sincos_positions(32, grid)
    assert table.shape == (1, 1 + grid[0] * grid[1], 32) and table[0, 0].abs().max() == 0
    torch.testing.assert_close(table[0, 1:].double(), naive_positions(32, *grid), rtol=0, atol=1e-6)


def test_positions_are_never_trained():
    assert not [name for name, _ in BootMAE(**SMALL).named_parameters() if "pos_embed" in name]


def test_resized_positions_keep_cls_and_smooth_maps():
    grid, new_grid = (6, 8), (12, 4)
    ramp = torch.arange(48.0).view(1, 48, 1).repeat(1, 1, 4)
    table = torch.cat([torch.full((1, 1, 4), 7.0), ramp], dim=1)
    resized = resize_positions(table, grid, new_grid)
    assert resized.shape == (1, 49, 4) and (resized[0, 0] == 7).all()
    expected = torch.nn.functional.interpolate(ramp.view(6, 8, 4).permute(2, 0, 1)[None], new_grid, mode="bicubic")
    torch.testing.assert_close(resized[0, 1:], expected[0].permute(1, 2, 0).reshape(48, 4))
    assert resize_positions(table, grid, grid) is table


def test_patchify():
    image = torch.rand(2, 3, 8, 12)
    patches = patchify(image, 4)
    for b in range(2):
        torch.testing.assert_close(patches[b], torch.stack(naive_patches(image[b], 4)))
    assert torch.equal(unpatchify(patches, 4, (2, 3)), image)


def test_pixel_targets_are_normalised_per_channel():
    patches = torch.rand(2, 5, 48, dtype=torch.float64) * torch.tensor([0.1, 1, 3]).repeat_interleave(16)
    normalized = normalize_patches(patches, 4)
    for b in range(2):
        for n in range(5):
            torch.testing.assert_close(normalized[b, n], naive_normalize(patches[b, n], 4))
    assert normalized.view(2, 5, 3, 16).mean(dim=3).abs().max() < 1e-6  # a mean over all channels would fail here


def test_masked_pixels_do_not_reach_the_encoder():
    model, images, mask = small_model()
    visible, _ = model.split(images, mask)
    latent, _ = model.encoder.encode(patchify(images, 4), visible)
    changed = patchify(images, 4).clone()
    changed[mask] = 9.0
    again, _ = model.encoder.encode(changed, visible)
    assert torch.equal(latent, again)
    out, out_again = model(images, mask), model(unpatchify(changed, 4, (2, 3)), mask)
    assert torch.equal(out.pixels, out_again.pixels) and torch.equal(out.features, out_again.features)


def test_order_of_visible_tokens_does_not_matter():
    model, images, mask = small_model()
    visible, _ = model.split(images, mask)
    latent, _ = model.encoder.encode(patchify(images, 4), visible)
    turned, _ = model.encoder.encode(patchify(images, 4), visible.flip(1))
    torch.testing.assert_close(latent[:, 1:].flip(1), turned[:, 1:])
    torch.testing.assert_close(latent[:, 0], turned[:, 0])


def test_gradients_go_where_they_should():
    model, images, mask = small_model()
    model(images, mask).feature_loss.backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is None for p in model.regressor.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in model.encoder.named_parameters())
    model.zero_grad()
    out = model(images, mask)
    (out.pixel_loss + out.feature_loss).backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused  # DistributedDataParallel would stop at one


def test_visible_patches_do_not_count_in_the_losses():
    """Only predictions of masked patches carry a gradient."""
    model, images, mask = small_model()
    for decoder, loss in ("regressor", "pixel_loss"), ("predictor", "feature_loss"):
        seen = []
        layer = getattr(model, decoder).norm
        handle = layer.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        out = model(images, mask)
        handle.remove()
        assert [tokens.shape[1] for tokens in seen] == [4]  # M, in training nothing else is predicted
        assert torch.isfinite(getattr(out, loss))


def test_teacher_update():
    model, *_ = small_model()
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    model.update_teacher(0.9)
    for name, p in model.teacher.named_parameters():
        student = model.encoder.get_parameter(name)
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * student)
    model.update_teacher(1.0)
    fresh = BootMAE(**SMALL)
    assert all(torch.equal(a, b) for a, b in zip(fresh.encoder.parameters(), fresh.teacher.parameters()))


def test_losses_fall_on_a_fixed_batch():
    torch.manual_seed(0)
    model = BootMAE(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, decoder_dim=32, decoder_depth=1)
    shapes = data.Shapes(8, 32)
    images = data.scale_pixels(torch.stack([data.to_tensor(shapes.open(i)) for i in range(8)]))
    mask = random_mask(8, 16, 12, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    history = []
    for _ in range(150):
        out = model(images, mask)
        (out.pixel_loss + out.feature_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(0.99)
        history.append((out.pixel_loss.item(), out.feature_loss.item()))
    assert history[-1][0] < 0.3 * history[0][0] and history[-1][1] < 0.3 * history[0][1]


def test_every_linear_map_starts_xavier_uniform():
    """In encoder and decoders; q, k and v each as a matrix of its own."""
    torch.manual_seed(0)
    model = BootMAE(32, 8, embed_dim=64, depth=2, num_heads=4, decoder_dim=32, decoder_depth=2)
    for name, module in model.named_modules():
        if hasattr(module, "weight") and "norm" not in name:
            fused = {"qkv": 3, "kv": 2}.get(name.split(".")[-1], 1)
            for matrix in module.weight.flatten(1).chunk(fused):
                bound = math.sqrt(6 / sum(matrix.shape))
                assert 0.95 * bound < matrix.abs().max() <= bound, name
            assert module.bias.abs().max() == 0, name
    for decoder in model.regressor, model.predictor:
        assert 0.014 < decoder.mask_token.std() < 0.026
    assert 0 < model.encoder.cls_token.abs().max() < 1e-4
    head = ViT(32, 8, embed_dim=64, depth=1, num_heads=4, num_classes=100).head
    assert 1.9e-5 < head.weight.std() < 2.1e-5 and head.bias.abs().max() == 0


def test_encoder_of_vit_base():
    encoder = ViT(**SIZES["base"])
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == 85.6  # and 0.2 M fixed positions
    blocks = ("norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias norm2.weight "
              "norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias").split()
    timm = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    timm |= {f"blocks.{i}.{name}" for i in range(12) for name in blocks}
    assert set(encoder.state_dict()) == timm
    classifier = ViT(img_size=32, patch_size=8, embed_dim=64, depth=12, num_heads=4, num_classes=10)
    timm = timm - {"norm.weight", "norm.bias"} | {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(classifier.state_dict()) == timm and classifier.head.weight.abs().max() < 1e-4


def test_classifier_matches_the_definition():
    torch.manual_seed(0)
    model = ViT((8, 12), 4, 24, 3, 3, num_classes=5, drop_path=0.3).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    image, w = torch.rand(1, 3, 8, 12, dtype=torch.float64), model.state_dict()
    tokens = naive_encoder(w, "", naive_patches(image[0], 4), range(6), (2, 3), 3, 3)[-1][1:]
    mean = norm(w, "fc_norm", [sum(tokens) / 6])[0]
    torch.testing.assert_close(model.eval()(image)[0], linear(w, "head", mean), rtol=0, atol=1e-6)


def test_drop_path():
    """Each sample's branch is dropped or scaled up by 1 / keep; rates rise linearly over the blocks."""
    model = ViT(img_size=8, patch_size=4, embed_dim=8, depth=4, num_heads=2, drop_path=0.3)
    assert [round(block.drop_path, 6) for block in model.blocks] == [0, 0.1, 0.2, 0.3]
    block = model.blocks[3].train()
    kept = block.drop(torch.ones(4000, 2, 8))
    assert all(len(sample.unique()) == 1 for sample in kept[:50])
    assert {round(v, 4) for v in kept.unique().tolist()} == {0.0, round(1 / 0.7, 4)} and abs(kept.mean() - 1) < 0.05
    assert torch.equal(block.eval().drop(torch.ones(3, 2, 8)), torch.ones(3, 2, 8))


def test_feature_maps():
    torch.manual_seed(0)
    encoder = ViT(img_size=16, patch_size=4, embed_dim=8, depth=3, num_heads=2).double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    outputs = naive_encoder(encoder.state_dict(), "", naive_patches(images[0].detach(), 4), range(16), (4, 4), 2, 3)
    maps = encoder.feature_maps(images, (3, 1))
    for number, fmap in zip((3, 1), maps):
        assert fmap.shape == (2, 8, 4, 4)
        for n in range(16):
            torch.testing.assert_close(fmap[0, :, n // 4, n % 4], outputs[number - 1][1 + n], rtol=0, atol=1e-6)
    maps[0].sum().backward()
    assert images.grad.abs().min(dim=1).values.max() > 0
    assert encoder.feature_maps(torch.rand(1, 3, 24, 8, dtype=torch.float64), (2,))[0].shape == (1, 8, 6, 2)
    with pytest.raises(ValueError, match="1 to 3"):
        encoder.feature_maps(images, (0,))


def test_forward_waits_for_no_gpu():
    """A tensor on the meta device has no values to wait for; the mask stays on the CPU."""
    model, images, mask = small_model()
    out = model.to("meta")(images.to("meta"), mask)
    (out.pixel_loss + out.feature_loss).backward()
    assert out.pixels.shape == (2, 4, 48) and out.pixels.is_meta


@pytest.mark.parametrize("call, message", [
    (lambda: BootMAE(img_size=30, patch_size=4), "30 x 30 is not divisible by patch_size 4"),
    (lambda: ViT(embed_dim=30, num_heads=3), "embed_dim 30 is not divisible by 4"),
    (lambda: ViT(embed_dim=32, num_heads=3), "not divisible by num_heads 3"),
    (lambda: BootMAE(**SMALL | {"decoder_dim": 18}), "18 is not divisible by 4"),
    (lambda: BootMAE(**SMALL | {"inject": (1, 4)}), "numbered 1 to 3"),
    (lambda: small_model()[0](torch.zeros(2, 3, 8, 8), torch.zeros(2, 6, dtype=torch.bool)), r"images are \(8, 8\)"),
    (lambda: small_model()[0](torch.zeros(2, 3, 8, 12), torch.zeros(2, 5, dtype=torch.bool)), r"mask is .*\(2, 5\)"),
    (lambda: small_model()[0](torch.zeros(2, 3, 8, 12), torch.zeros(2, 6)), "must be torch.bool"),
    (lambda: small_model()[0](torch.zeros(2, 3, 8, 12), torch.eye(6)[:2].bool() | (torch.arange(2) == 0)[:, None]),
     "1 to 6 of 6"),
    (lambda: small_model()[0](torch.zeros(2, 3, 8, 12), torch.ones(2, 6, dtype=torch.bool)), "6 to 6 of 6"),
    (lambda: ViT(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2)(torch.zeros(1, 3, 20, 20)), "img_size="),
    (lambda: random_mask(2, 6, 7), "cannot mask 7 of 6"),
    (lambda: block_mask(2, (2, 3), -1), "cannot mask -1 of 6"),
    (lambda: loss_weight(torch.zeros(2, 5, dtype=torch.bool), (2, 3)), "2 x 3 grid needs"),
])
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ----------------------------------------------------------------------------------------------------------------------
# The authors' files


def official_checkpoint(dim=48, depth=2, heads=6, width=32, p=4, grid=(3, 3), seed=0):
    """Random values in the authors' layout; heads that do not divide the widths, as 12 do not divide 512."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return 0.2 * torch.randn(*shape, generator=g, dtype=torch.float64)

    def attention(prefix, width, context=None):
        inner = width // heads * heads
        weights = {"qkv.weight": rand(3 * inner, width)} if context is None else {
            "q.weight": rand(inner, width), "kv.weight": rand(2 * inner, context)}
        weights |= {"q_bias": rand(inner), "v_bias": rand(inner)}
        weights |= {"proj.weight": rand(width, inner), "proj.bias": rand(width)}
        return {prefix + name: value for name, value in weights.items()}

    def block(prefix, width, context=None):
        weights = attention(prefix + "attn.", width)
        for name in ("norm1", "norm2") + (("norm3",) if context else ()):
            weights |= {f"{prefix}{name}.weight": 1 + rand(width), f"{prefix}{name}.bias": rand(width)}
        if context:
            weights |= attention(prefix + "c_attn.", width, context)
            weights |= {f"{prefix}norm4.weight": 1 + rand(context), f"{prefix}norm4.bias": rand(context)}
        weights |= {f"{prefix}mlp.fc1.weight": rand(4 * width, width), f"{prefix}mlp.fc1.bias": rand(4 * width),
                    f"{prefix}mlp.fc2.weight": rand(width, 4 * width), f"{prefix}mlp.fc2.bias": rand(width)}
        return weights

    def table(width):
        return torch.cat([torch.zeros(1, width, dtype=torch.float64), naive_positions(width, *grid)])[None]

    theirs = {"patch_embed.proj.weight": rand(dim, 3, p, p), "patch_embed.proj.bias": rand(dim),
              "cls_token": rand(1, 1, dim), "pos_embed": table(dim), "de_pos_embed": table(width),
              "norm.weight": 1 + rand(dim), "norm.bias": rand(dim)}
    for i in range(depth):
        theirs |= block(f"blocks.{i}.", dim)
    for suffix, d in ("", width), ("_1", dim):
        theirs |= {f"down{suffix}.weight": rand(d, dim), f"down{suffix}.bias": rand(d),
                   f"mask_token{suffix}": rand(1, 1, d),
                   f"decode_norm{suffix}.weight": 1 + rand(d), f"decode_norm{suffix}.bias": rand(d)}
        for i in range(2):
            theirs |= block(f"decode_blocks{suffix}.{i}.", d, dim)
    return theirs | {"lm_head.proj.weight": rand(width, 3, p, p), "lm_head.proj.bias": rand(3),
                     "lm_head_1.weight": rand(dim, dim), "lm_head_1.bias": rand(dim)}


def as_theirs_says(theirs, average, images, mask, heads, p, grid, depth=2):
    """The naive forward over the authors' keys: their biases put together here, their head a transposed convolution."""
    w = {}
    for prefix, source in ("encoder.", theirs), ("teacher.", average):
        for key, value in source.items():
            if key.startswith(("patch_embed", "cls_token", "blocks", "norm.")):
                w[prefix + key] = value
    for prefix, suffix in ("regressor.", ""), ("predictor.", "_1"):
        for ours, name in ("embed.", "down"), ("norm.", "decode_norm"), ("blocks.", "decode_blocks"):
            for key, value in theirs.items():
                if key.startswith(f"{name}{suffix}."):
                    key = key.removeprefix(f"{name}{suffix}.").replace("c_attn", "cross_attn")
                    w[prefix + ours + key.replace("norm3", "norm_query").replace("norm4", "norm_context")] = value
        w[prefix + "mask_token"] = theirs["mask_token" + suffix]
    for key in [key for key in w if key.endswith("q_bias")]:
        stem, q, v = key.removesuffix("q_bias"), w[key], w[key.replace("q_bias", "v_bias")]
        w |= {stem + "qkv.bias": torch.cat([q, 0 * v, v])} if stem + "qkv.weight" in w else {
            stem + "q.bias": q, stem + "kv.bias": torch.cat([0 * v, v])}
    w |= {"predictor.head.weight": theirs["lm_head_1.weight"], "predictor.head.bias": theirs["lm_head_1.bias"]}
    d = len(theirs["lm_head.proj.weight"])  # the transposed convolution: push each unit vector through it
    unit = torch.eye(d, dtype=torch.float64)[:, :, None, None]
    columns = torch.nn.functional.conv_transpose2d(unit, theirs["lm_head.proj.weight"], stride=p).flatten(1)
    nothing = torch.zeros(1, d, 1, 1, dtype=torch.float64)
    bias = torch.nn.functional.conv_transpose2d(nothing, theirs["lm_head.proj.weight"], theirs["lm_head.proj.bias"], p)
    w |= {"regressor.head.weight": columns.T, "regressor.head.bias": bias.flatten()}
    return naive_bootmae(w, images, mask, p, grid, heads, depth, 2)


def test_from_official_pretraining():
    theirs, average = official_checkpoint(), official_checkpoint(seed=1)
    assert theirs["decode_blocks.0.attn.q_bias"].shape == (30,)  # floor(32 / 6) * 6, as 504 is for 512 and 12
    model = BootMAE(img_size=12, patch_size=4, embed_dim=48, depth=2, num_heads=6, decoder_dim=32).double()
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64) * 2 - 1
    mask = random_mask(2, 9, 6, torch.Generator().manual_seed(0))
    for checkpoint, teacher in ({"model": theirs, "model_ema": average}, average), (theirs, theirs):
        model.load_state_dict(from_official(checkpoint), strict=True)
        out = model(images, mask)
        pixel_loss, feature_loss, pixels, features = as_theirs_says(theirs, teacher, images, mask, 6, 4, (3, 3))
        pixels, features = (values.take_along_dim(out.masked[:, :, None], 1) for values in (pixels, features))
        torch.testing.assert_close(out.pixels, pixels, rtol=0, atol=1e-5)
        torch.testing.assert_close(out.features, features, rtol=0, atol=1e-5)
        torch.testing.assert_close(out.pixel_loss.double(), pixel_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(out.feature_loss.double(), feature_loss, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="surprise"):
        from_official(theirs | {"surprise.weight": torch.zeros(1)})


def test_from_official_fine_tuned():
    """Their classifier: biases apart, fc_norm and head."""
    torch.manual_seed(0)
    model = ViT(img_size=12, patch_size=4, embed_dim=48, depth=2, num_heads=6, num_classes=5).double()
    theirs = {key: value for key, value in official_checkpoint().items()
              if key.startswith(("patch_embed", "cls_token", "pos_embed", "blocks"))}
    theirs |= {"fc_norm.weight": torch.rand(48), "fc_norm.bias": torch.rand(48), "head.weight": torch.rand(5, 48),
               "head.bias": torch.rand(5)}
    model.load_state_dict(from_official({"model": theirs}), strict=True)
    bias = model.blocks[1].attn.qkv.bias
    assert torch.equal(bias[:48], theirs["blocks.1.attn.q_bias"]) and bias[48:96].abs().max() == 0
    assert torch.equal(bias[96:], theirs["blocks.1.attn.v_bias"])
    assert torch.equal(model.head.weight.float(), theirs["head.weight"])


@pytest.fixture
def official(monkeypatch):
    """Imports a module of the authors' code, from the checkout that BOOTMAE_OFFICIAL names, without timm or a GPU.

    Stand-ins take the place of old packages, and of their files for data sets and optimizers, which are not run here.
    """
    if not os.environ.get("BOOTMAE_OFFICIAL"):
        pytest.skip("BOOTMAE_OFFICIAL names no checkout of https://github.com/LightDXY/BootMAE")
    anything = MagicMock(register_model=lambda factory: factory, to_2tuple=lambda n: (n, n),
                         trunc_normal_=torch.nn.init.trunc_normal_, inf=math.inf)
    names = ["timm", "timm.models", "timm.models.layers", "timm.models.registry", "timm.utils", "torch._six",
             "torchvision", "torchvision.utils", "tensorboardX", "datasets", "optim_factory"]
    monkeypatch.syspath_prepend(os.path.abspath(os.environ["BOOTMAE_OFFICIAL"]))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda.amp, "autocast", contextlib.nullcontext)
    monkeypatch.setattr(random, "randint", lambda low, high: low)  # no roll of their mask's order by 0 to 3

    def load(name):
        with patch.dict("sys.modules", dict.fromkeys(names, anything)):  # forgets their modules afterwards
            return importlib.import_module(name)

    return load


def official_vit(module, monkeypatch, class_name, factory, **sizes):
    """What their ViT-B `factory` builds, but with other `sizes`; float64, with no parameter at its initial value."""
    build = getattr(module, class_name)
    monkeypatch.setattr(module, class_name, lambda **settings: build(**settings | sizes))
    return shaken(getattr(module, factory)().double())


def shaken(module):
    for p in module.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return module


def assert_same_gradients(ours, theirs):
    """To 1e-6 of each tensor's largest; under our names by from_official. Where k has a bias, its gradient is 0."""
    expected = from_official({name: p.grad for name, p in theirs.named_parameters() if p.requires_grad})
    for name, p in ours.named_parameters():
        if p.requires_grad:
            grad, wanted = p.grad, expected[name]
            if name == "regressor.head.bias":  # theirs is one a channel, and so the sum over its pixels
                grad, wanted = grad.view(3, -1).sum(dim=1), wanted.view(3, -1)[:, 0]
            scale = float(wanted.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("weighted", [True, False])
def test_official_pretraining(official, monkeypatch, weighted):
    """One step of their train_one_epoch, with its own losses: ViT-B's 12 blocks and heads, but 96 and 64 wide."""
    torch.manual_seed(0)
    script, module = official("run_pretraining"), official("models.modeling_pretrain_bootmae")
    theirs = official_vit(module, monkeypatch, "VisionTransformerForMaskedImageModeling",
                          "bootmae_base", img_size=32, patch_size=4, embed_dim=96, decode_dim=64)
    theirs.lm_head_1.weight.data *= 0.01  # features, and below pixels, so alike that the norms' eps count
    theirs.lm_head_1.bias.data *= 0.01
    average = shaken(copy.deepcopy(theirs))
    images = torch.rand(3, 3, 32, 32).double() * 2 - 1
    images *= torch.tensor([1, 0.1, 0.01]).view(3, 1, 1, 1)
    mask = block_mask(3, (8, 8), 48)

    seen = []
    theirs.register_forward_hook(lambda module, args, out: seen.append(out))
    theirs.__dict__["module"] = theirs  # as of DistributedDataParallel
    scaler = MagicMock(side_effect=lambda loss, *args, **named: loss.backward() or 0.0)
    scaler.state_dict.return_value = {"scale": 1.0}
    args = SimpleNamespace(feature_weight=1, epochs=8, window_size=(8, 8), patch_size=(4, 4), mask_num=48,
                           weight_mask=weighted, model_ema_decay=0.999)
    losses = script.train_one_epoch(  # epoch 0 of 8: the feature loss counts half
        theirs, [((images, mask), None)], MagicMock(), torch.device("cpu"), 0, scaler, rank=1, start_steps=0,
        update_freq=1, args=args, model_ema=MagicMock(ema=average))

    ours = BootMAE(32, 4, 96, 12, 12, decoder_dim=64, weighted_loss=weighted).double()
    state = from_official({"model": theirs.state_dict(), "model_ema": average.state_dict()})
    for name, table in ours.state_dict().items():  # before theirs take their place
        if name.endswith("pos_embed"):
            torch.testing.assert_close(table, state[name], rtol=0, atol=1e-6)
    ours.load_state_dict(state)
    out = ours(images, mask)
    (out.pixel_loss + 0.5 * out.feature_loss).backward()
    assert torch.equal(out.masked, mask.nonzero()[:, 1].view(3, 48))
    pixels, features = patchify(seen[0][0], 4)[mask].view(3, 48, 48), seen[0][1][mask].view(3, 48, 96)
    torch.testing.assert_close(out.pixels, pixels, rtol=0, atol=1e-8)
    torch.testing.assert_close(out.features, features, rtol=0, atol=1e-8)
    assert float(out.pixel_loss) == pytest.approx(losses["Rloss"], rel=1e-6)
    assert float(out.feature_loss) == pytest.approx(losses["Ploss"], rel=1e-6)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("key", ["model", "module"])  # deepspeed, which their recipe turns on, writes 'module'
def test_official_fine_tuning(official, monkeypatch, key):
    """Their classifier, ViT-B's blocks and heads but 96 wide; the grid is 14 x 14, as their positions always are."""
    torch.manual_seed(0)
    module = official("models.modeling_finetune_bootmae")
    theirs = official_vit(module, monkeypatch, "VisionTransformer", "bootmae_base_patch16_224",
                          img_size=56, patch_size=4, embed_dim=96, num_classes=7)
    ours = ViT(56, 4, 96, 12, 12, num_classes=7).double()
    ours.load_state_dict(from_official({key: theirs.state_dict()}))
    images, labels = torch.rand(3, 3, 56, 56).double() * 2 - 1, torch.tensor([0, 3, 6])
    logits = []
    for model in ours, theirs:
        logits.append(model(images))
        torch.nn.functional.cross_entropy(logits[-1], labels).backward()
    torch.testing.assert_close(*logits, rtol=0, atol=1e-8)
    assert_same_gradients(ours, theirs)


# ----------------------------------------------------------------------------------------------------------------------
# masking.py


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_masks_have_exact_counts(grid):
    num_patches = grid[0] * grid[1]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        for num_masked in {0, 1, num_patches // 2, round(0.75 * num_patches), num_patches - 1, num_patches}:
            masks = random_mask(8, num_patches, num_masked, generator), block_mask(8, grid, num_masked, generator)
            for mask in masks:
                assert mask.dtype == torch.bool and mask.shape == (8, num_patches)
                assert all(sum(row) == num_masked for row in mask.tolist())


def is_union_of_rectangles(mask, smallest):
    """Whether each masked patch lies in a fully masked rectangle of at least `smallest` patches; mask is 2-D."""
    rows, columns = mask.shape
    left = mask.copy()
    for top in range(rows):
        for side in range(columns):
            for bottom in range(top + 1, rows + 1):
                for right in range(side + 1, columns + 1):
                    if (bottom - top) * (right - side) >= smallest and mask[top:bottom, side:right].all():
                        left[top:bottom, side:right] = False
    return not left.any()


def test_block_masks_are_blocks():
    """120 of 196 in rectangles of 16 or more (rounding takes a 16.0 .. down to 15), the rest anywhere."""
    blocks = block_mask(12, (14, 14), 120, torch.Generator().manual_seed(0)).view(12, 14, 14).numpy()
    assert all(is_union_of_rectangles(mask, 14) for mask in blocks)
    scattered = random_mask(12, 196, 120, torch.Generator().manual_seed(0)).view(12, 14, 14).numpy()
    assert not any(is_union_of_rectangles(mask, 14) for mask in scattered)
    generator = torch.Generator().manual_seed(1)
    mean = loss_weight(block_mask(64, (14, 14), 147, generator), (14, 14)).mean()
    assert mean > loss_weight(random_mask(64, 196, 147, generator), (14, 14)).mean() + 0.02  # masked neighbours


def test_block_areas_and_aspects():
    """Where one rectangle of 100 patches is all that is wanted, its sides show the range of aspects, 0.3 .. 1 / 0.3."""
    aspects = []
    for seed in range(200):
        mask = block_mask(1, (40, 40), 100, torch.Generator().manual_seed(seed), 100 / 1600, 100 / 1600, 100 / 1600)
        mask = mask.view(40, 40).numpy()
        height, width = (mask.sum(axis=1) >= 5).sum(), (mask.sum(axis=0) >= 5).sum()
        assert 88 <= height * width <= 100  # what rounding the sides leaves is filled up at random
        aspects.append(height / width)
    assert 0.27 < min(aspects) < 0.4 and 2.5 < max(aspects) < 3.7 and 0.8 < np.median(aspects) < 1.25


@pytest.mark.parametrize("grid, bound, side", [
    ((46, 56), {"max_area": 16 / 196}, 15), ((41, 44), {"min_area": 60 / 196}, 23)], ids=["smallest", "largest"])
def test_blocks_have_16_to_60_of_196_patches(grid, bound, side):
    """With one bound moved onto the other's default, all squares are alike, and one of them fills the whole mask.

    On these grids a bound that is only 1 of 196 further out makes most squares one wider or narrower.
    """
    masks = block_mask(50, grid, side**2, torch.Generator().manual_seed(0), min_aspect=1.0, **bound)
    holes = torch.nn.functional.max_pool2d(1 - masks.view(50, *grid).float(), side, stride=1)
    assert (holes.flatten(1).min(dim=1).values == 0).all()


def test_masks_follow_the_generator_and_reach_every_patch():
    for make in (lambda g: random_mask(200, 64, 48, g), lambda g: block_mask(200, (8, 8), 48, g)):
        a, b, c = (make(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert torch.equal(a, b) and not torch.equal(a, c)
        frequency = a.float().mean(dim=0)
        assert frequency.min() > 0.4 and frequency.max() < 0.98
        assert len({tuple(row) for row in a.tolist()}) == 200


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_loss_weight(grid):
    mask = random_mask(4, grid[0] * grid[1], grid[0] * grid[1] // 2 + 1, torch.Generator().manual_seed(0))
    weight = loss_weight(mask, grid)
    for b in range(4):
        expected = naive_weight([float(m) for m in mask[b]], *grid)
        torch.testing.assert_close(weight[b], torch.tensor(expected), rtol=0, atol=1e-6)
    assert weight[~mask].abs().max() == 0 and weight[mask].min() >= 1 + 1 / 9 - 1e-6 and weight.max() <= 2 + 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# data.py


def test_folders(tmp_path):
    names = ["b/2.jpg", "b/10.PNG", "a/x.jpg/deep/1.webp", "a/z.tif", "ü ☃/é.gif", "top.bmp", "b.png"]
    for name in names + ["a/.hidden.png", "a/.ipynb_checkpoints/1.png", ".thumbnails/1.png", "none/1.pdf"]:
        os.makedirs((tmp_path / name).parent, exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    os.link(tmp_path / "b.png", os.fsencode(tmp_path) + b"/a/\xff\xfe.png")  # no valid UTF-8
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    os.symlink("self", tmp_path / "b" / "self")
    folder = data.ImageFolder(tmp_path)
    found = [os.fsencode(os.path.relpath(folder.name(i), tmp_path)) for i in range(len(folder))]
    assert found == sorted([os.fsencode(name) for name in names] + [b"a/\xff\xfe.png"])
    assert folder.classes == ["a", "b", "ü ☃"] and folder.labels.tolist() == [0, 0, 0, -1, 1, 1, -1, 2]
    subset = data.Subset(folder, [4, 0])
    assert len(subset) == 2 and subset.labels.tolist() == [1, 0] and subset.classes == folder.classes
    assert isinstance(subset.indices, np.ndarray) and subset.open(0).filename == folder.name(4) == subset.name(0)
    assert data.ImageFolder(tmp_path, ["ü ☃", "more", "b", "a"]).labels.tolist() == [3, 3, 3, -1, 2, 2, -1, 0]
    assert data.ImageFolder(tmp_path / "a" / "x.jpg" / "deep").labels.tolist() == [-1]
    for path, classes, message in ("", ["ü ☃", "b"], "lacks: a"), ("", [], "lacks: a"), ("none", None, "no images"):
        with pytest.raises(ValueError, match=message):
            data.ImageFolder(tmp_path / path, classes)


COLOURS, LEVELS = np.uint8([[250, 20, 30], [40, 200, 10], [20, 60, 220], [0, 0, 0]]), np.uint8([0, 255, 77, 180])
CUT, VEIL, T, BICUBIC = [0, 255, 255, 255], np.uint8([0, 128, 255, 255]), Image.Transpose, Image.Resampling.BICUBIC


def quarters(values):
    return Image.fromarray(values.reshape(2, 2, *values.shape[1:]).repeat(24, axis=0).repeat(32, axis=1))  # 64 x 48


RGB, PALETTE, RGBA = quarters(COLOURS), quarters(COLOURS).quantize(4), quarters(np.c_[COLOURS, VEIL])
KINDS = {  # name: image, colours of the quarters, their opacity (what lies below is white)
    "rgb.png": (RGB, COLOURS), "progressive.jpg": (RGB, COLOURS), "large.jpg": (RGB.resize((1280, 960)), COLOURS),
    "odd_tag.jpg": (RGB, COLOURS), "cmyk.jpg": (RGB.convert("CMYK"), COLOURS), "l.jpg": (quarters(LEVELS), LEVELS),
    "la.png": (quarters(np.c_[LEVELS, VEIL]), LEVELS, VEIL), "rgba.png": (RGBA, COLOURS, VEIL),
    "rgba.webp": (RGBA, COLOURS, VEIL), "p.png": (PALETTE, COLOURS), "p.gif": (PALETTE, COLOURS),
    "p_cut.png": (PALETTE, COLOURS, CUT), "cut.gif": (PALETTE, COLOURS, CUT), "rgb_cut.png": (RGB, COLOURS, CUT),
    "1.png": (quarters(LEVELS).point(lambda v: 255 * (v > 99), "1"), 255 * (LEVELS > 99)),
    "16.png": (quarters(LEVELS * np.uint16(257)), LEVELS), "i.tif": (quarters(LEVELS * np.int32(257)), LEVELS),
    "16.pgm": (quarters(LEVELS * np.uint16(257)), LEVELS), "f.tif": (quarters(LEVELS / np.float32(9)), LEVELS),
}
TURNS = [None, T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_90, T.TRANSVERSE, T.ROTATE_270]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_becomes_upright_rgb(tmp_path, name):
    image, colours, opacity = (*KINDS[name], [255] * 4)[:3]
    expected = 255 + (colours.reshape(4, -1) - 255.0) * np.reshape(opacity, (4, 1)) / 255
    extra = dict(transparency=image.getpixel((0, 0))) if "cut" in name else dict(quality=95, progressive="pro" in name)
    for orientation, turn in enumerate(TURNS[: 1 if name.endswith(("gif", "pgm")) else 8], start=1):
        exif = Image.Exif()
        exif.update({0x0112: orientation, 0x0131: "72 "})  # "odd": Software made XResolution, a number; does no harm
        exif = exif.tobytes().replace(b"\x01\x31", b"\x01\x1a" if "odd" in name else b"\x01\x31")
        (image if turn is None else image.transpose(turn)).save(tmp_path / name, exif=exif, lossless=True, **extra)
        one, two = (data.ImageFolder(tmp_path).open(0) for _ in range(2))
        # a crop of the whole of 4 : 3 is as wide as a crop gets, and nothing else fits
        for out in data.random_resized_crop(one, 32, random.Random(0), (1, 1)), data.center_crop(two, 32, 1):
            assert out.mode == "RGB" and out.size == (32, 32)
            seen = np.asarray(out, dtype=float)[[8, 8, 24, 24], [8, 24, 8, 24]]  # the middles of the quarters
            assert np.abs(seen - expected).max() <= (4 if name.endswith("jpg") else 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_upright_crop_may_be_oblong(tmp_path, orientation):
    turn, exif = TURNS[orientation - 1], Image.Exif()
    exif[0x0112] = orientation
    (RGB if turn is None else RGB.transpose(turn)).save(tmp_path / "x.png", exif=exif)
    image = Image.open(tmp_path / "x.png")
    out = data.crop_resize(image, (0, 0, *image.size), (32, 24))
    assert out.size == (32, 24)
    assert np.abs(np.asarray(out, dtype=float)[[6, 6, 18, 18], [8, 24, 8, 24]] - COLOURS).max() <= 1


def test_large_jpegs_are_decoded_small(tmp_path, monkeypatch):
    """To at least twice the pixels wanted; an opened image stays as it is, so that another view can be taken of it."""
    pixels, drafts, draft = np.random.default_rng(0).integers(0, 256, (75, 64, 3), dtype=np.uint8), [], JPEG.draft

    def recorded(image, mode, size):
        drafts.append(draft(image, mode, size))
        return drafts[-1]

    monkeypatch.setattr(JPEG, "draft", recorded)
    Image.fromarray(pixels).resize((1101, 807), BICUBIC).save(tmp_path / "x.jpg", quality=92)
    full, opened, shrinks = Image.open(tmp_path / "x.jpg").convert("RGB"), Image.open(tmp_path / "x.jpg"), []
    for box in (0, 0, 1101, 807), (301, 200, 1101, 807), (5, 7, 400, 407), (100.5, 50.25, 700, 790), (40, 40, 160, 150):
        drafts.clear()
        view = data.crop_resize(opened, box, (40, 32))
        assert np.array_equal(view, data.crop_resize(Image.open(tmp_path / "x.jpg"), box, (40, 32)))
        assert opened.size == (1101, 807)
        error = np.subtract(view, full.resize((40, 32), BICUBIC, box), dtype=int)
        shrinks.append(round(1101 / drafts[0][1][2]) if drafts else 1)
        assert np.abs(error).mean() < 2 if shrinks[-1] > 1 else not error.any()
    assert shrinks == [8, 8, 4, 4, 1]


def test_crops_flip_and_tensors():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 256, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    assert np.array_equal(data.center_crop(photo, 224), pixels[38:262, 16:240])  # the short side is 256 already
    by_hand = photo.crop((0, 6, 256, 294)).resize((64, 72), BICUBIC).crop((8, 12, 56, 60))
    assert np.abs(np.subtract(by_hand, data.center_crop(photo, 48, 0.75), dtype=int)[2:-2, 2:-2]).max() <= 1
    flips = [np.array(data.flip(photo, random.Random(i)))[0, 0].tolist() for i in range(100)]
    assert 30 < flips.count(pixels[0, -1].tolist()) < 70 and pixels[0, 0].tolist() in flips
    assert np.array_equal(data.to_tensor(photo), np.stack([pixels[..., c] for c in range(3)]))
    assert np.allclose(data.scale_pixels(torch.arange(256).byte()), np.arange(256) / 127.5 - 1, rtol=0, atol=1e-6)


def test_random_resized_crop():
    y, x = np.mgrid[:40, :60]
    image, rng = Image.fromarray(np.stack([4 * x, 6 * y, 0 * x], axis=-1).astype(np.uint8)), random.Random(0)
    inner = (np.arange(4, 28) + 0.5) / 32  # away from the edges, where a resize looks beyond
    for low, high in (0.2, 1), (0.08, 1), (0.2, 0.4):
        boxes = []
        for _ in range(400):  # the colours tell where the box was
            out = data.random_resized_crop(image, 32, rng, *[(low, high)] * (high + low != 1.2))
            out = np.asarray(out, dtype=float)[4:28, 4:28] / [4, 6, 1] + 0.5
            boxes.append([*np.polyfit(inner, out[..., 0].mean(axis=0), 1), *np.polyfit(inner, out[..., 1].mean(1), 1)])
        w, left, h, top = np.array(boxes).round().T
        area, aspect, right, bottom = w * h / 2400, np.log(w / h), 60 - w, 40 - h
        assert low - 0.02 < min(area) < low + 0.04 and min(high - 0.02, 0.8) < max(area) < high + 0.02
        assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all() and ((w - 0.5) / (h + 0.5) <= 4 / 3).all()
    # the last ones always fit, so that none is redrawn
    assert [area.mean(), area.std(), aspect.mean()] == pytest.approx([0.3, 0.2 / 12**0.5, 0], abs=0.02)
    assert [aspect.std(), (left / right).mean(), (top / bottom).mean()] == pytest.approx([0.166, 0.5, 0.5], abs=0.04)
    assert min(left) == min(top) == max(left - right) == max(top - bottom) == 0
    for width, height in [(1, 1), (1, 500), (700, 1), (1200, 3)] * 9:  # very long: the middle
        ramp = Image.fromarray(np.linspace(0, 200, width * height).reshape(width, height).T.astype(np.uint8))
        for out in data.random_resized_crop(ramp, 32, rng, (0.08, 1)), data.center_crop(ramp, 32):
            assert out.size == (32, 32) and np.abs(np.asarray(out) - 100.0 * (width + height > 2)).max() < 3


def test_samples_and_broken_files(tmp_path):
    def view(image, rng):
        return data.to_tensor(data.flip(data.random_resized_crop(image, 8, rng), rng)), rng.random()
    samples, other = (data.Samples(data.Shapes(6, 16), view, seed) for seed in (0, 1))
    first, keys = [samples[key] for key in range(24)], [20, 3, 3, 11]  # four epochs
    assert [sample[2] for sample in first] == [0, 1, 2, 3, 4, 5] * 4
    assert len({sample[1] for sample in first + [other[key] for key in range(6)]}) == 30
    loader = torch.utils.data.DataLoader(samples, batch_size=None, sampler=keys, num_workers=2)
    assert all(s[0].equal(first[key][0]) and tuple(s[1:]) == first[key][1:] for key, s in zip(keys, loader))
    Image.effect_noise((64, 64), 50).save(noise := io.BytesIO(), "jpeg")
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)  # a bomb: sound, but for its size
    chunks = b"IHDR" + header, b"IDAT" + zlib.compress(bytes(20_000 * 2501), 1), b"IEND"
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    broken = [noise.getvalue()[:-400], b"\x89PNG\r\n\x1a\n" + b"".join(chunks)], [b"", b"text"]
    for name, level, contents in zip("ab", (40, 200), broken):  # of ten images 0, 1, 5 and 6 are broken
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("L", (9, 9), level).save(tmp_path / name / f"{i}.png")
            if i < 2:
                (tmp_path / name / f"{i}.png").write_bytes(contents[i])
    samples, again, labels = *(data.Samples(data.ImageFolder(tmp_path), view) for _ in range(2)), {}
    for key in range(200):
        pixels, draw, label = samples[key]
        assert pixels.unique().tolist() == [[40, 200][label]]
        assert torch.equal(pixels, again[key][0]) and (draw, label) == again[key][1:]
        labels.setdefault(key % 10, set()).add(int(label))
    assert list(labels.values()) == [{0, 1}] * 2 + [{0}] * 3 + [{0, 1}] * 2 + [{1}] * 3  # another one each epoch
    assert samples.broken.nonzero()[:, 0].tolist() == [0, 1, 5, 6]
    for path in tmp_path.glob("*/*"):
        path.write_bytes(b"")
    strict = data.Samples(samples.source, view, replace=False)
    for i in range(10):
        assert samples[i][0].unique().tolist() == [128] and samples[i][2] == i // 5
        assert strict[i][0].unique().tolist() == [128] and strict[i][2] == -1
    assert samples.broken.all() and strict.broken.all()


def test_samples_can_be_sent_to_other_processes():
    """As a start by spawn does; the flags of broken files stay in shared memory."""
    args = train.parse_args([*TRAIN[1:]])
    source = data.Subset(data.Shapes(12, 32), [5, 7])
    samples = data.Samples(source, functools.partial(train.pretrain_sample, args=args, grid=(4, 4)))
    assert samples.broken.is_shared()  # for a start by fork
    again = pickle.loads(ForkingPickler.dumps(samples))
    again.broken[1] = True
    assert samples.broken.tolist() == [False, True] and torch.equal(samples[0][0], again[0][0])


@pytest.mark.parametrize("length, batch_size, accum_steps, world_size", [(53, 12, 1, 1), (53, 12, 3, 2), (24, 8, 2, 4)])
def test_batches(length, batch_size, accum_steps, world_size):
    whole, per_epoch = list(data.Batches(length, batch_size, epochs=3, seed=1)), length // batch_size
    orders = {tuple(range(per_epoch * batch_size))}
    for seed, e in itertools.product((0, 1, 2), range(3)):
        keys = sum(list(data.Batches(length, batch_size, 3, seed))[e * per_epoch : (e + 1) * per_epoch], [])
        assert len(keys) == len(set(keys)) == per_epoch * batch_size and {key // length for key in keys} == {e}
        orders.add(tuple(key % length for key in keys))
    assert len(orders) == 1 + 9 and len(whole) == 3 * per_epoch  # each epoch of each seed has an order of its own
    for start in 0, 1, per_epoch, 2 * per_epoch + 1, 3 * per_epoch:
        ranks = [data.Batches(length, batch_size, 3, 1, start, accum_steps, r, world_size) for r in range(world_size)]
        assert {len(r) for r in ranks} == {len(list(r)) for r in ranks} == {(3 * per_epoch - start) * accum_steps}
        streams = [iter(rank) for rank in ranks]
        for batch in whole[start:]:
            pieces = [next(stream) for stream in streams for _ in range(accum_steps)]
            assert sorted(sum(pieces, [])) == sorted(batch) and len({len(piece) for piece in pieces}) == 1


def test_shapes():
    shapes, later, classes = data.Shapes(480, 16), data.Shapes(5, 16, start=7), len(data.SHAPES)
    images, labels = np.stack([shapes.open(i) for i in range(480)]), np.array(shapes.labels)
    assert images.shape == (480, 16, 16, 3) and images.dtype == np.uint8 and len(set(map(bytes, images))) == 480
    assert classes >= 10 and set(np.bincount(labels)) == {480 // classes} and list(later.labels) == list(labels[7:12])
    assert all(np.array_equal(later.open(i), images[7 + i]) for i in range(5))
    light = images.mean(axis=3)
    means = np.stack([light[:360][labels[:360] == c].mean(axis=0) for c in range(classes)])
    guesses = ((light[360:, None] - means) ** 2).sum(axis=(2, 3)).argmin(axis=1)
    assert (guesses == labels[360:]).mean() > 0.5  # the label is that of what is drawn; colours say nothing:
    for values in images.mean(axis=(1, 2)) - light.mean(axis=(1, 2))[:, None], images[:, 0, 0], images[:, -1, 0]:
        apart = np.stack([values[labels == c].mean(axis=0) for c in range(classes)]) - values.mean(axis=0)
        assert (np.abs(apart) < 4 * values.std(axis=0) / (480 / classes) ** 0.5).all()


@pytest.mark.parametrize("s", [-0.9, -0.3, 0, 0.45, 1])
def test_rand_augment_operations(s):
    m, f, noise = abs(s), 1 + 0.9 * s, np.random.default_rng(0).integers(60, 200, (9, 9, 3), dtype=np.uint8)
    photo = np.asarray(Image.fromarray(noise).resize((36, 40)))
    p = photo.astype(float)
    gray, smooth, equal = np.round(p @ [0.299, 0.587, 0.114])[..., None], p.copy(), p.copy()
    smooth[1:-1, 1:-1] = (sum(p[i : i + 38, j : j + 34] for i, j in np.ndindex(3, 3)) + 4 * p[1:-1, 1:-1]) / 13
    for c in range(3):
        count = np.bincount(photo[..., c].ravel())
        step = (count.sum() - count[-1]) // 255
        equal[..., c] = ((step // 2 + count.cumsum() - count) // step)[photo[..., c]]
    values = {
        "equalize": equal, "invert": 255 - p, "posterize": p // 2 ** (4 + int(4 * m)) * 2 ** (4 + int(4 * m)),
        "solarize": np.where(p < 256 - int(256 * m), p, 255 - p), "colour": gray + f * (p - gray),
        "solarize_add": np.where(p < 128, p + int(110 * m), p), "brightness": f * p,
        "autocontrast": (p - p.min(axis=(0, 1))) * 255 / np.ptp(p, axis=(0, 1)),
        "contrast": gray.mean().round() + f * (p - gray.mean().round()), "sharpness": smooth + f * (p - smooth),
    }
    for name, expected in values.items():
        error = np.abs(np.asarray(data.RAND_AUGMENT[name](Image.fromarray(photo), m, s)) - expected.clip(0, 255)).max()
        assert error <= (0 if name in "equalize invert posterize solarize_add" else 2), name  # Pillow rounds on the way
    half = np.asarray(data.RAND_AUGMENT["translate_x"](Image.fromarray(photo), m, 7.5 / 16.2))[:, 3:25]  # bicubic:
    assert np.abs(half - (5 * (p[:, 10:32] + p[:, 11:33]) - p[:, 9:31] - p[:, 12:34]) / 8).max() <= 1
    y, x = np.mgrid[:20, :20]
    z = x - 9.5 + 1j * (y - 9.5)  # where a pixel comes from, as x + iy from the middle
    places = {"rotate": z * np.exp(1j * math.pi / 6 * s), "translate_x": z + 9 * s, "translate_y": z + 9j * s,
              "shear_x": z + 0.3 * s * (z.imag + 10), "shear_y": z + 0.3j * s * (z.real + 10)}
    ramps = Image.fromarray(np.stack([10 * x + 5, 10 * y + 5, 0 * x + 200], axis=-1).astype(np.uint8))
    for name, z in places.items():
        out, depth = np.asarray(data.RAND_AUGMENT[name](ramps, m, s)), 10 - np.maximum(np.abs(z.real), np.abs(z.imag))
        error = np.abs(out - np.stack([100 + 10 * z.real, 100 + 10 * z.imag, 0 * x + 200], axis=-1))
        assert (out[depth < -0.01] == 128).all() and error[depth > 2].max() < 2, name
    assert set(values) | set(places) == set(data.RAND_AUGMENT) and len(data.RAND_AUGMENT) == 15


def test_rand_augment_draws(monkeypatch):
    image, calls, rng = Image.linear_gradient("L").convert("RGB"), [], random.Random(0)
    a, b, c = ([data.rand_augment(image, r).tobytes() for _ in range(20)] for r in map(random.Random, (1, 1, 2)))
    assert a == b != c and image == Image.linear_gradient("L").convert("RGB")
    for name in data.RAND_AUGMENT:
        monkeypatch.setitem(data.RAND_AUGMENT, name, lambda im, m, s, name=name: calls.append((name, m, s)) or im)
    applied = [data.rand_augment(image, rng) and len(calls) for _ in range(8000)]
    assert np.bincount(np.diff(applied, prepend=0)) / 8000 == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    names, m, s = map(np.array, zip(*calls))
    assert (np.abs(s) == m).all() and (s > 0).mean() == pytest.approx(0.5, abs=0.02) and max(m) == 1
    assert np.percentile(m, [16, 50, 84]) == pytest.approx([0.85, 0.9, 0.95], abs=0.005)
    assert np.unique(names, return_counts=True)[1] / 8000 == pytest.approx([1 / 15] * 15, abs=0.01)
    data.rand_augment(image, rng, num_ops=500, magnitude=0, magnitude_std=1, probability=1)
    assert len(calls) == applied[-1] + 500 and min(m for _, m, _ in calls) == 0


def test_random_erasing():
    images, seeded = torch.full((1500, 3, 24, 36), 100.0), torch.Generator().manual_seed  # noise never gets to 100
    few, again, out = (data.random_erasing(images, *p, generator=seeded(0)) for p in ([], [], [1]))
    assert few.equal(again) and (images == 100).all() and 0.21 < (few != 100).flatten(1).any(1).float().mean() < 0.29
    changed = (out != 100).numpy()
    rows, columns = changed.any(axis=(1, 3)), changed.any(axis=(1, 2))  # (B, H) and (B, W)
    assert (changed == rows[:, None, :, None] & columns[:, None, None, :]).all()  # alike in all channels, and filled
    assert {np.abs(np.diff(a, append=0, prepend=0)).sum(axis=1).max() for a in (rows, columns)} == {2}  # one each
    top, left, h, w = rows.argmax(axis=1), columns.argmax(axis=1), rows.sum(axis=1), columns.sum(axis=1)
    area, aspect = h * w / 864, np.log(h / w)[h * w < 0.15 * 864]  # small ones always fit: log-uniform
    assert 0.01 < min(area) < 0.03 and 0.31 < max(area) < 0.36 and area.mean() == pytest.approx(0.177, abs=0.015)
    assert [aspect.mean(), aspect.std()] == pytest.approx([0, -math.log(0.3) / 3**0.5], abs=0.05)
    for start, room in (top, 24 - h), (left, 36 - w):
        assert min(start) == max(start - room) == 0 and (start / room).mean() == pytest.approx(0.5, abs=0.03)
    noise = out[out != 100]
    assert noise.mean().abs() < 0.01 and noise.std().sub(1).abs() < 0.01 and len(noise.unique()) > 0.9 * len(noise)
    assert torch.equal(data.random_erasing(images, 1, area=(2, 3)), images)  # where nothing fits
    some = data.random_erasing(images[..., :24], 1, (0.5, 0.5), (0.1, 4))  # one in three fits: one of ten will do
    assert (some != 100).flatten(1).any(1).float().mean() > 0.95
    assert data.random_erasing(images.to("meta", torch.bfloat16)).dtype == torch.bfloat16  # has no values to wait for


@pytest.mark.parametrize("alphas, trials", [([], 1000), ([3, 0], 300), ([0, 1], 300), ([0, 0], 9)], ids=str)
def test_mixup_cutmix(alphas, trials):
    images, labels = torch.rand(4, 3, 12, 10) + torch.arange(4).view(4, 1, 1, 1), torch.tensor([4, 0, 1, 1])
    other, copy, shares, (mixup, cutmix) = images.flip(0), images.clone(), {True: [], False: []}, alphas or (0.8, 1)
    for seed in range(trials):
        out, targets = data.mixup_cutmix(images, labels, 5, *alphas, rng=random.Random(seed))
        pasted = (out == other)[0, 0]  # (12, 10)
        cut, sides = bool(((out == images)[0, 0] | pasted).all()), [pasted.any(dim=d).sum().item() for d in (0, 1)]
        share = 1 - math.prod(sides) / 120 if cut else float(((out - other) / (images - other)).median())
        shares[cut].append(share)
        for i, c, y, x in np.ndindex(4, 3, 12, 10) if seed < 8 else ():
            keep = float(not pasted[y, x]) if cut else share
            assert abs(out[i, c, y, x] - keep * images[i, c, y, x] - (1 - keep) * other[i, c, y, x]) < 1e-5
            mixed = share * (labels[i] == y) + (1 - share) * (labels[3 - i] == y)
            assert y >= 5 or abs(targets[i, y] - 0.1 / 5 - 0.9 * mixed) < 1e-5
    assert out.equal(data.mixup_cutmix(images, labels, 5, *alphas, rng=random.Random(seed))[0]) and images.equal(copy)
    assert len(shares[True]) / trials == pytest.approx(0.5 if mixup and cutmix else float(mixup == 0), abs=0.04)
    if mixup:  # Beta(a, a) has mean 1/2 and variance 1 / (8 a + 4)
        assert [np.mean(shares[False]), np.var(shares[False])] == pytest.approx([0.5, 1 / (8 * mixup + 4)], abs=0.02)
    if cutmix:  # a box around a uniform centre is cut off by the border
        assert np.mean(shares[True]) == pytest.approx(1 - (1 / 2 - 1 / 5 + 1 / 48), abs=0.05)
    assert data.mixup_cutmix(images.to("meta", torch.bfloat16), labels.to("meta"), 5)[0].dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------------------------
# train.py

# 6 steps an epoch of a network that a laptop runs in a blink
TINY = "--img_size 32 --batch_size 8 --epochs 3 --warmup_epochs 1 --workers 0 --log_every 2 --amp off".split()
TRAIN = ["train.py", "--num_images", "48", "--decoder_depth", "1", *TINY]


def launch(*command, processes=1, **kwargs):
    """Start a script as a user would; output comes back as text."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    return subprocess.Popen([*launcher, *map(str, command)], cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def call(module, *flags):
    """The same inside this process: fast, and the only way to damage something at the right moment."""
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        module.main(module.parse_args([str(flag) for flag in flags]))
    finally:
        signal.signal(signal.SIGTERM, handlers[0])
        signal.signal(signal.SIGINT, handlers[1])


def refused(capsys, module, *flags, code=2):
    """The call ends with this code and one line; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call(module, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == code and len(lines) == 1, lines
    return lines[0]


def result(out):
    """Everything that a run leaves, less how fast it was and the flags that may differ."""
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(log) == len(checkpoint["log"])
    for line in log:
        assert line.pop("images_per_s") > 0
    state = {key: checkpoint[key] for key in ("model", "optimizer", "step")}
    for name in "encoder.pt", "best.pt":
        if (out / name).exists():
            state[name] = torch.load(out / name, weights_only=True)
    return state, log


def assert_same(a, b, **tolerance):
    """Nested dicts, lists and tensors: equal to the bit, or within a tolerance."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], **tolerance)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y, **tolerance)
    elif tolerance and isinstance(a, float | torch.Tensor):
        torch.testing.assert_close(a, b, **tolerance)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("unbroken")
    printed, _ = finish(launch(*TRAIN, "--out", out))
    (out / "printed.txt").write_text(printed)
    return out


def test_a_run_writes_what_it_promises(unbroken):
    _, log = result(unbroken)
    assert [line["epoch"] for line in log] == [1, 2, 3]
    assert {"pixel_loss", "feature_loss", "lr", "momentum"} <= log[0].keys()
    assert log[2]["pixel_loss"] < log[0]["pixel_loss"]
    assert json.loads((unbroken / "config.json").read_text())["batch_size"] == 8
    encoder = torch.load(unbroken / "encoder.pt", weights_only=True)
    ViT(img_size=32, patch_size=8, **SIZES["nano"]).load_state_dict(encoder, strict=True)
    with Image.open(unbroken / "epoch_0003.png") as picture:  # two images a row, in 5 columns of 32 pixels at 4x
        assert picture.size == (2 * 5 * (128 + 4), 4 * (128 + 4) + 24)


def test_curves_are_drawn(unbroken):
    log = [dict(epoch=1, loss=1.0, top1=10.0), dict(epoch=2, loss=math.nan, top1=20.0), dict(epoch=3, loss=0.5)]
    assert train.draw_curves(log).size == (2 * 440, 300)
    with Image.open(unbroken / "curves.png") as picture:
        assert picture.size == (2 * 440, 300)


def test_pretraining_from_a_file(unbroken, tmp_path, capsys):
    """The encoder and the teacher both begin as the file's encoder."""
    flags = [*TRAIN[1:], "--init", unbroken / "encoder.pt"]
    model, said = train.build_model(train.parse_args([str(flag) for flag in flags]), print), capsys.readouterr().out
    assert "left out: nothing; new: nothing" in said
    for part in model.encoder, model.teacher:
        assert_same(part.state_dict(), torch.load(unbroken / "encoder.pt", weights_only=True))
    call(train, *flags, "--out", tmp_path, "--epochs", 1)
    assert "--patch_size" in refused(capsys, train, *flags, "--patch_size", 4)
    assert "--init" in refused(capsys, train, *TRAIN[1:], "--out", tmp_path)


def test_warmup_keeps_its_share_of_the_run(capsys):
    assert train.parse_args(["--recipe", "cifar10", "--epochs", "2"]).warmup_epochs == pytest.approx(2 * 10 / 300)
    args = train.parse_args(["--recipe", "cifar10", "--epochs", "2", "--warmup_epochs", "1.5"])
    assert (args.epochs, args.warmup_epochs, args.model) == (2, 1.5, "small")
    args = finetune.parse_args(["--recipe", "cifar10", "--scratch", "--epochs", "10"])
    assert args.warmup_epochs == pytest.approx(10 * 5 / 100)


def test_schedules():
    args = train.parse_args(["--recipe", "imagenet"])
    for epoch in (0, 1, 20, 39, 40, 77, 100, 199, 200, 399, 400, 799):
        # 1,281,167 images in batches of 4096: 312 steps an epoch
        lr, feature_weight, momentum = train.schedules(312 * epoch, 312 * 800, epoch, args)
        cosine = 1e-4 + (2.4e-3 - 1e-4) * (1 + math.cos(math.pi * (epoch - 40) / 760)) / 2
        expected = 2.4e-3 * epoch / 40 if epoch < 40 else cosine
        assert math.isclose(lr, expected, abs_tol=1e-12)
        assert math.isclose(feature_weight, min(1, 4 * (epoch + 1) / 800))
        if epoch <= 100:
            assert math.isclose(momentum, 0.999 + 0.0009 * epoch / 100)
        else:
            assert math.isclose(momentum, 0.9999 + 0.00009 * min(1, (epoch - 100) / 300))
    assert train.parse_args(["--recipe", "imagenet_large"]).momentum[2] == 0.9999
    small = train.parse_args(["--recipe", "imagenet", "--batch_size", "64"])  # a peak below min_lr
    assert [train.schedules(step, 100, 0, small)[0] for step in (5, 50, 100)] == [1.5e-4 / 4] * 3


def test_a_short_run_has_a_faster_teacher():
    """It averages over at most 1/240, 1/24 and 1/2.4 of the steps, at the start, at 1/8 and from 1/2 of them."""
    args = train.parse_args(["--recipe", "imagenet"])
    momenta = [train.schedules(step, 2400, 0, args)[2] for step in (0, 150, 300, 750, 1200, 2399)]
    assert momenta == pytest.approx([0.9, 0.945, 0.99, 0.9945, 0.999, 0.999])
    assert train.schedules(0, 12, 0, args)[2] == 0  # 1/240 of 12 steps is less than one
    args.momentum = (0.8, 0.9, 0.95)  # lower than that already
    assert [train.schedules(step, 2400, 0, args)[2] for step in (0, 300, 1200)] == pytest.approx([0.8, 0.9, 0.95])


@pytest.mark.parametrize("flags, processes", [
    (["--workers", 2], 1), (["--accum_steps", 4], 1), ([], 2), (["--accum_steps", 2, "--workers", 1], 2)], ids=str)
def test_workers_accumulation_and_processes_change_nothing(unbroken, tmp_path, flags, processes):
    printed, _ = finish(launch(*TRAIN, "--out", tmp_path, *flags, processes=processes))
    first = re.search("first step.*\n", (unbroken / "printed.txt").read_text())[0]
    assert first in printed
    state, log = result(tmp_path)
    expected, expected_log = result(unbroken)
    if processes == 1 and "--accum_steps" not in flags:
        assert_same((state, log), (expected, expected_log))
    else:
        assert_same(log, expected_log, rtol=1e-5, atol=1e-6)
        assert_same(state["model"], expected["model"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("flags", [["--inject", 0, 0], ["--feature_target", 0]], ids=str)
def test_two_processes_train_the_ablations(tmp_path, flags):
    """DistributedDataParallel would stop at a parameter without a gradient."""
    flags = ["--epochs", 1, *flags, "--out"]
    call(train, *TRAIN[1:], *flags, tmp_path / "one")
    finish(launch(*TRAIN, *flags, tmp_path / "two", processes=2))
    assert_same(result(tmp_path / "two")[1], result(tmp_path / "one")[1], rtol=1e-5, atol=1e-6)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_killed_run_ends_as_if_nothing_had_happened(unbroken, tmp_path):
    process = launch(*TRAIN, "--out", tmp_path)
    wait_for(tmp_path / "checkpoint.pt", process)
    process.kill()
    finish(process, -signal.SIGKILL)
    out, _ = finish(launch(*TRAIN, "--out", tmp_path, "--workers", 1))
    assert "going on from" in out
    assert_same(result(tmp_path), result(unbroken))


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)], ids=str)
def test_a_signal_saves_and_ends_all_processes(unbroken, tmp_path, number, processes):
    command = [*TRAIN, "--out", tmp_path / "stopped"]
    if processes > 1:  # torchrun may take a second to pass the signal on: a longer run
        command += ["--epochs", 30]
        call(train, *TRAIN[1:], "--epochs", 30, "--out", tmp_path / "unbroken")
    process = launch(*command, processes=processes, start_new_session=True)
    wait_for(tmp_path / "stopped" / "checkpoint.pt", process)
    os.killpg(process.pid, number) if processes == 1 else process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert f"stopped by {number.name}" in err
    assert process.returncode == 128 + number if processes == 1 else process.returncode != 0
    step = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["step"]
    assert 6 <= step < (18 if processes == 1 else 180)
    finish(launch(*command, processes=processes))
    if processes == 1:
        assert_same(result(tmp_path / "stopped"), result(unbroken))
    else:
        assert_same(result(tmp_path / "stopped")[1], result(tmp_path / "unbroken")[1], rtol=1e-3, atol=1e-4)


@pytest.fixture
def finished(unbroken, tmp_path):
    """A copy of the finished run, to be harmed."""
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    return out


def test_a_finished_run_stays_finished(finished, capsys):
    before = (finished / "checkpoint.pt").read_bytes()
    call(train, *TRAIN[1:], "--out", finished)
    assert "finished" in capsys.readouterr().out and (finished / "checkpoint.pt").read_bytes() == before
    call(train, *TRAIN[1:], "--out", finished, "--fresh", "--epochs", 1)
    assert torch.load(finished / "checkpoint.pt", weights_only=True)["step"] == 6


def test_settings_that_may_change_are_those_of_the_new_call(finished, capsys):
    changed = ["--epochs", 4, "--amp", "fp16", "--weight_decay", 0.5, "--betas", 0.5, 0.6]
    call(train, *TRAIN[1:], "--out", finished, *changed)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("changed:"))
    assert "--epochs 4 (was 3)" in said and "--amp fp16 (was off)" in said and said.count(" (was ") == 5  # and --out
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    groups = checkpoint["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0] and tuple(groups[0]["betas"]) == (0.5, 0.6)
    assert checkpoint["step"] == 24 and checkpoint["scaler"]["scale"] > 0


def test_processes_must_share_the_output_folder(tmp_path):
    """Rank 0 finds a finished epoch, rank 1 nothing: they would wait for each other for ever."""
    finish(launch(*TRAIN, "--epochs", 1, "--out", tmp_path / "run0"))
    code = f"""if True:
        import os, runpy, sys
        sys.path.insert(0, {HERE!r})
        sys.argv = {[*TRAIN, "--out"]} + [{str(tmp_path / "run")!r} + os.environ["RANK"]]
        runpy.run_path("train.py", run_name="__main__")"""
    (tmp_path / "start.py").write_text(code)
    process = launch(tmp_path / "start.py", processes=2)
    _, err = process.communicate(timeout=60)
    assert process.returncode and "different steps [0, 6]" in err


def test_a_checkpoint_of_another_run_is_refused(finished, capsys):
    line = refused(capsys, train, *TRAIN[1:], "--out", finished, "--decoder_dim", 32, "--inject", 0, 0)
    assert "--decoder_dim 64" in line and "--inject (1, -1)" in line
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"config": {}}, finished / "checkpoint.pt")
    assert "--model None" in refused(capsys, train, *TRAIN[1:], "--out", finished)
    torch.save(checkpoint, finished / "checkpoint.pt")
    line = refused(capsys, train, *TRAIN[1:], "--out", finished, "--seed", 1, "--mask", "block", "--weighted_loss", 0)
    assert "--seed 0" in line and "--mask random" in line and "--weighted_loss 1" in line
    assert "6 steps an epoch" in refused(capsys, train, *TRAIN[1:], "--out", finished, "--batch_size", 16)


@pytest.mark.parametrize("damage", ["cut", "zero", "noise", "code"])
def test_a_damaged_or_hostile_checkpoint_is_named_and_kept(finished, capsys, damage):
    path, flag = finished / "checkpoint.pt", finished / "it_ran"
    if damage == "code":
        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(flag),)
        torch.save({"model": Hostile()}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[: len(whole) // 2], "zero": b"", "noise": os.urandom(1000)}[damage])
    before = path.read_bytes()
    assert str(path) in refused(capsys, train, *TRAIN[1:], "--out", finished)
    assert path.read_bytes() == before and not flag.exists()


def test_a_full_disk_keeps_the_last_checkpoint(finished, capsys):
    """A limit on the size of files stands for the full disk."""
    before = (finished / "checkpoint.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        line = refused(capsys, train, *TRAIN[1:], "--out", finished, "--epochs", 4, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "could not save" in line and (finished / "checkpoint.pt").read_bytes() == before
    assert not list(finished.glob("*.tmp"))


def test_weights_that_are_not_finite_are_never_saved(finished, capsys):
    before = (finished / "checkpoint.pt").read_bytes()
    line = refused(capsys, train, *TRAIN[1:], "--out", finished, "--epochs", 6, "--base_lr", 1e29, code=1)
    assert "finite" in line and "learning rate" in line and (finished / "checkpoint.pt").read_bytes() == before


def test_broken_images_are_named_and_replaced(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    shapes = data.Shapes(120, 40)
    for index in range(120):
        shapes.open(index).save(folder / f"{index:03}.png")
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:300])
    flags = ["--data", folder, "--recipe", "shapes", *TINY, "--batch_size", 40, "--epochs", 2]
    call(train, *flags, "--out", tmp_path / "a")
    err = capsys.readouterr().err
    assert err.count("007.png") == 1
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["broken"] for line in log] == [1, 1]
    (folder / "011.png").write_text("not an image")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call(train, *flags, "--out", tmp_path / "b")
    assert ended.value.code == 1 and "2 of 120 images can't be read" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--recipe", "nothing"], "--recipe"),
    (["--epochs", "many"], "--epochs"),
    (["--nonsense"], "--nonsense"),
    (["--data", "no/such/folder"], "no/such/folder"),
    (["--data", ".ci"], "no images found"),
    (["--img_size", 30], "divisible by patch_size 8"),
    (["--decoder_dim", 30], "30 is not divisible by 4"),
    (["--model", "huge"], "--model: "),
    (["--mask", "stripes"], "--mask: "),
    (["--mask_ratio", 1.5], "--mask_ratio: 1.5 must be"),
    (["--mask_ratio", 0], "--mask_ratio 0"),
    (["--inject", 1, 9], "1 to 4"),
    (["--accum_steps", 3], "--accum_steps 3"),
    (["--mask_ratio", "nan"], "--mask_ratio: nan must be"),
    (["--momentum", 0.9, 0.99, 2], "--momentum: 2 must be"),
    (["--warmup_epochs", 5], "--warmup_epochs 5"),
    (["--data", ""], "--data is empty"),
    (["--num", 48], "--num"),
    (["--batch_size", 0], "--batch_size: 0 must be"),
    (["--patch_size", 0], "--patch_size: 0 must be"),
    (["--picture_every", 0], "--picture_every: 0 must be"),
    (["--workers", -1], "--workers: -1 must be"),
    (["--batch_size", 64], "--batch_size 64"),
    (["--out", "/proc/nothing"], "--out /proc/nothing"),
    pytest.param(["--device", "cuda"], "--device cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="")),
], ids=str)
def test_bad_calls(tmp_path, capsys, flags, words):
    out = [] if "--out" in flags else ["--out", tmp_path / "out"]
    assert words in refused(capsys, train, *TRAIN[1:], *out, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(tmp_path, amp):
    call(train, *TRAIN[1:], "--out", tmp_path, "--amp", amp, "--epochs", 2, "--num_images", 24)
    _, log = result(tmp_path)
    assert log[1]["pixel_loss"] < log[0]["pixel_loss"]
    assert all(p.dtype == torch.float32 for p in torch.load(tmp_path / "encoder.pt", weights_only=True).values())


def test_compiled_forward_is_the_same():
    model, images, mask = small_model()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        a, b = model(images, mask), compiled(images, mask)
        torch.testing.assert_close((a.pixel_loss, a.feature_loss), (b.pixel_loss, b.feature_loss))
        torch.testing.assert_close(a.pixels, b.pixels)
    grads = []
    for network in (model, compiled):
        model.zero_grad()
        out = network(images, mask)
        (out.pixel_loss + out.feature_loss).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads)


def test_benchmark_counts_what_a_step_does(tmp_path, capsys):
    call(train, *TRAIN[1:], "--out", tmp_path / "out", "--benchmark")
    table = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines()[1:])
    D, d, N, V = 128, 64, 16, 6  # of 16 patches of 8 x 8, 10 are masked

    def block(tokens, width, context=0, depth=1):  # products of one image: q, k, v, proj and MLP; scores and values
        cross = 2 * tokens * width**2 + 2 * context * D * width + 2 * tokens * context * width if context else 0
        return depth * (12 * tokens * width**2 + 2 * tokens**2 * width + cross)

    teacher = N * 192 * D + block(1 + N, D, depth=4)
    student = V * 192 * D + block(1 + V, D, depth=4)
    for width, out in (d, 192), (D, D):
        student += (1 + V) * D * width + block(1 + N, width, 1 + V) + (N - V) * width * out
    gflop = 2 * (teacher + 3 * student - V * 192 * D) / 1e9  # no gradient is wanted for the images
    assert float(table["GFLOP an image"]) == pytest.approx(gflop, rel=1e-3)
    parts = ("  forward and losses", "  backward", "  optimizer and teacher update")
    assert all(name in table for name in ("images/s", "peak memory a process, GiB", "images/s a loading worker"))
    assert sum(float(table[name]) for name in parts) == pytest.approx(float(table["ms a step"]), rel=0.01)
    assert float(table["hours of 3 x 48 images"]) == pytest.approx(3 * 48 / float(table["images/s"]) / 3600, rel=0.01)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# finetune.py

TUNE = [*TINY, "--labels_per_class", "4", "--num_val", "60"]


def small_vit(**changes):
    torch.manual_seed(0)
    return ViT(**dict(img_size=32, patch_size=8, **SIZES["nano"]) | changes)


def test_published_recipes():
    args = finetune.parse_args(["--scratch", "--recipe", "imagenet"])
    assert (args.epochs, args.warmup_epochs, args.batch_size, args.lr, args.layer_decay) == (100, 20, 2048, 5e-3, 0.6)
    args = finetune.parse_args(["--scratch", "--recipe", "imagenet_large"])
    assert (args.epochs, args.warmup_epochs, args.batch_size, args.lr, args.layer_decay) == (50, 5, 1024, 1.5e-3, 0.75)
    assert (args.drop_path, args.mixup, args.cutmix, args.smoothing, args.rand_augment) == (0.1, 0.8, 1.0, 0.1, 9)
    assert (args.erasing, args.model_ema) == (0.25, 0.9998)
    args = finetune.parse_args(["--scratch", "--recipe", "imagenet_large", "--linear"])
    assert (args.depth, args.epochs, args.base_lr, args.batch_size, args.warmup_epochs) == (18, 50, 0.07, 16384, 10)


def test_lars():
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3))
    optimizer = finetune.LARS([weight, bias], lr=0.5)
    w, b, mu_w, mu_b = weight.detach().clone(), bias.detach().clone(), torch.zeros(3, 4), torch.zeros(3)
    for _ in range(3):
        weight.grad, bias.grad = torch.randn(3, 4), torch.randn(3)
        scaled = weight.grad * 0.001 * math.sqrt((w ** 2).sum()) / math.sqrt((weight.grad ** 2).sum())
        mu_w, mu_b = 0.9 * mu_w + scaled, 0.9 * mu_b + bias.grad
        w, b = w - 0.5 * mu_w, b - 0.5 * mu_b
        optimizer.step()
        torch.testing.assert_close((weight.data, bias.data), (w, b))


def test_knn():
    g = torch.Generator().manual_seed(0)
    train_x, val_x = torch.randn(40, 6, generator=g), torch.randn(25, 6, generator=g)
    train_y, val_y = torch.randint(7, (40,), generator=g), torch.randint(7, (25,), generator=g)
    mean, std = train_x.mean(0), train_x.std(0)
    right1 = right5 = 0
    for x, y in zip(val_x, val_y):
        x, known = (x - mean) / std, (train_x - mean) / std
        cosines = [(float(x @ k / x.norm() / k.norm()), int(label)) for k, label in zip(known, train_y)]
        cosines = sorted(cosines)[::-1][:9]
        votes = [sum(math.exp(c / 0.07) for c, label in cosines if label == n) for n in range(7)]
        ranking = sorted(range(7), key=lambda n: -votes[n])
        right1 += ranking[0] == y
        right5 += int(y) in ranking[:5]
    counts = finetune.knn(train_x, train_y, val_x, val_y, 7, 9, torch.device("cpu")).tolist()
    assert counts[0] == right1 and abs(counts[1] - right5) <= 1 and counts[2] == 25  # classes without a vote tie


def test_linear_probe_trains_the_head_alone():
    probe = finetune.LinearProbe(small_vit(), 2, 5)
    assert len(probe.features.encoder.blocks) == 2
    images = torch.rand(6, 3, 32, 32)
    probe(images).sum().backward()
    assert [name for name, p in probe.named_parameters() if p.grad is not None] == ["head.weight", "head.bias"]
    tokens = small_vit().encode(patchify(images, 8), taps=(2,))[1][2][:, 1:]
    features = torch.stack([layer_norm(sum(t) / 16) for t in tokens])                 # no learned scale
    features = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-6).sqrt()
    expected = features @ probe.head.weight.T + probe.head.bias
    torch.testing.assert_close(probe.train()(images), expected, rtol=0, atol=1e-4)


def weights_files(tmp_path):
    """Every kind of file that --init takes, with the encoder it should give and a word of what is said."""
    model = BootMAE(img_size=32, patch_size=8, **SIZES["nano"], decoder_dim=64)
    for p in model.teacher.parameters():
        p.data += 1
    encoder, teacher = model.encoder.state_dict(), model.teacher.state_dict()
    torch.save({"model": model.state_dict(), "optimizer": {}, "step": 1}, tmp_path / "checkpoint.pt")
    torch.save(encoder, tmp_path / "encoder.pt")
    classifier = small_vit(num_classes=12).state_dict()
    torch.save(classifier, tmp_path / "best.pt")
    mae = encoder | {"mask_token": torch.zeros(1, 1, 64), "decoder_embed.weight": torch.zeros(64, 128),
                     "decoder_pos_embed": torch.zeros(1, 17, 64)}
    torch.save({"model": mae}, tmp_path / "mae.pth")
    torch.save(encoder | {"head.weight": torch.zeros(1000, 128), "head.bias": torch.zeros(1000)}, tmp_path / "timm.pth")
    theirs = official_checkpoint(128, 4, 4, 64, 8, (4, 4))
    theirs = {key: value.float() for key, value in theirs.items()}
    average = {key: value + 1 for key, value in theirs.items()}
    namespace = argparse.Namespace(model="pretrain_base", epochs=800)
    torch.save({"model": theirs, "model_ema": average, "epoch": 799, "args": namespace}, tmp_path / "theirs.pth")
    kept = ("patch_embed", "cls_token", "pos_embed", "blocks")
    tuned = {key: value for key, value in theirs.items() if key.startswith(kept)}
    tuned |= {key: classifier[key] for key in ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")}
    torch.save({"model": tuned, "args": namespace}, tmp_path / "theirs_tuned.pth")
    return [("checkpoint.pt", False, encoder, "left out: norm.bias"), ("checkpoint.pt", True, teacher, "left"),
            ("encoder.pt", False, encoder, "new: fc_norm.bias"), ("best.pt", False, classifier, "new: nothing"),
            ("mae.pth", False, encoder, "mask_token"), ("timm.pth", False, encoder, "head.weight"),
            ("theirs.pth", False, theirs, "new: fc_norm.bias"), ("theirs.pth", True, average, "new: fc_norm.bias"),
            ("theirs_tuned.pth", False, theirs | tuned, "new: nothing")]


def test_weights_of_every_origin(tmp_path, capsys):
    for name, teacher, expected, words in weights_files(tmp_path):
        path = str(tmp_path / name)
        state, said = read_weights(path, teacher), []
        assert sizes_of(state, path).items() >= SIZES["nano"].items()
        model = load_vit(path, num_classes=12, teacher=teacher, report=said.append)
        assert name in said[0] and words in said[0]
        for key in ("cls_token", "patch_embed.proj.weight", "blocks.3.attn.qkv.weight", "blocks.0.mlp.fc2.bias"):
            assert torch.equal(model.state_dict()[key], expected[key]), (name, key)
        larger = small_vit(img_size=48, num_classes=12)
        load_matching(larger, state, path)
        assert torch.equal(larger.pos_embed, resize_positions(state["pos_embed"], (4, 4), (6, 6)))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({"model": BootMAE(**SMALL).state_dict()}, tmp_path / "odd.pt")
    scaled = torch.load(tmp_path / "encoder.pt", weights_only=True)
    torch.save(scaled | {"blocks.0.ls1.gamma": torch.ones(128)}, tmp_path / "scaled.pt")  # layer scale: another network
    for name, words in (("other.pt", "fits no ViT"), ("odd.pt", "3 blocks of width 24"), ("none.pt", "there is no"),
                        ("scaled.pt", "blocks.0.ls1.gamma")):
        assert words in refused(capsys, finetune, "--init", tmp_path / name, *TUNE, "--out", tmp_path / "out")
    assert "holds no teacher" in refused(capsys, finetune, "--init", tmp_path / "encoder.pt", "--teacher", *TUNE)
    assert "--patch_size" in refused(capsys, finetune, "--init", tmp_path / "encoder.pt", *TUNE, "--patch_size", 8)
    theirs = torch.load(tmp_path / "theirs.pth", weights_only=False)
    torch.save({"model": theirs["model"]}, tmp_path / "alone.pth")
    assert "no model_ema" in refused(capsys, finetune, "--init", tmp_path / "alone.pth", "--teacher", *TUNE)
    assert "fine-tune it first" in refused(capsys, finetune, "--init", tmp_path / "encoder.pt", "--eval", *TUNE)


def test_load_vit(tmp_path):
    path, said = tmp_path / "x.pt", []
    classifier = small_vit(num_classes=7)
    torch.save(classifier.state_dict(), path)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_vit(path)(images), classifier(images))              # the file's head
    assert load_vit(path, num_classes=5)(images).abs().max() < 0.1              # a new one
    assert load_vit(path, num_classes=0)(images).shape == (2, 128)              # none
    larger = load_vit(path, img_size=48, drop_path=0.2, report=said.append)
    assert larger.grid == (6, 6) and not larger.training and larger.blocks[3].drop_path == pytest.approx(0.2)
    assert "positions interpolated from 4 x 4 to 6 x 6" in said[0]
    torch.save({"module": small_vit(in_chans=1, num_classes=3).state_dict()}, path)
    assert load_vit(path)(torch.rand(2, 1, 32, 32)).shape == (2, 3)
    torch.save(small_vit(img_size=(32, 16)).state_dict(), path)
    with pytest.raises(ValueError, match="give the image size"):
        load_vit(path)
    assert load_vit(path, img_size=(32, 16)).grid == (4, 2)


EVERYTHING = ["--drop_path", 0.2, "--mixup", 0.8, "--cutmix", 1, "--rand_augment", 9, "--erasing", 0.25]


@pytest.fixture(scope="module")
def tuned(unbroken, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    finish(launch("finetune.py", "--init", unbroken / "encoder.pt", "--out", out, *TUNE, *EVERYTHING))
    return out


def test_fine_tuning_writes_what_it_promises(tuned):
    log = [json.loads(line) for line in (tuned / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3] and {"top1", "top5", "top1_ema"} <= log[0].keys()
    small_vit(num_classes=12).load_state_dict(torch.load(tuned / "best.pt", weights_only=True), strict=True)
    assert Image.open(tuned / "predictions.png").size == (8 * 152, 4 * 188)


def test_another_start_is_another_run(tuned, unbroken, tmp_path, capsys):
    """Else a finished run's figures would be taken for those of the new weights or seed."""
    flags = ["--out", tuned, *TUNE, *EVERYTHING]
    shutil.copy(unbroken / "encoder.pt", tmp_path / "encoder.pt")
    assert "--init" in refused(capsys, finetune, "--init", tmp_path / "encoder.pt", *flags)
    assert "--seed 0" in refused(capsys, finetune, "--init", unbroken / "encoder.pt", *flags, "--seed", 1)


def test_killed_fine_tuning_ends_as_if_nothing_had_happened(unbroken, tuned, tmp_path):
    command = ["finetune.py", "--init", unbroken / "encoder.pt", "--out", tmp_path, *TUNE, *EVERYTHING]
    process = launch(*command)
    wait_for(tmp_path / "checkpoint.pt", process)
    process.kill()
    finish(process, -signal.SIGKILL)
    finish(launch(*command))
    assert_same(result(tmp_path), result(tuned))


def test_model_and_average_are_each_evaluated(tuned, tmp_path, capsys):
    checkpoint = torch.load(tuned / "checkpoint.pt", weights_only=True)
    assert not torch.equal(checkpoint["model"]["head.weight"], checkpoint["average"]["head.weight"])
    last = checkpoint["log"][-1]
    for name, keys in ("model", ("top1", "top5")), ("average", ("top1_ema", "top5_ema")):
        torch.save(checkpoint[name], tmp_path / f"{name}.pt")
        call(finetune, "--init", tmp_path / f"{name}.pt", *TUNE, "--eval")
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (found["top1"], found["top5"]) == tuple(last[key] for key in keys)


@pytest.mark.parametrize("mode", ["--eval", "--knn"])
def test_two_processes_count_every_image_once(tuned, mode):
    """1,003 images do not divide: padding would count some twice."""
    command = ["finetune.py", "--init", tuned / "best.pt", *TUNE, "--num_val", 1003, mode]
    one, two = (finish(launch(*command, processes=n))[0].splitlines()[-1] for n in (1, 2))
    assert json.loads(one)["images"] == 1003 and one == two


class Levels:
    """Images of one gray level each, the level being the image's number; three can't be opened."""

    labels, broken, size = np.arange(23) % 9, (3, 12, 13), 8

    def __len__(self):
        return 23

    def name(self, index):
        return f"level {index}"

    def open(self, index):
        if index in self.broken:
            raise OSError
        return Image.new("RGB", (8, 8), (index, index, index))


def test_evaluate_counts(capsys):
    logits = torch.randn(23, 9, generator=torch.Generator().manual_seed(0))
    places = [sorted(range(9), key=lambda n: -row[n]).index(y) for row, y in zip(logits.tolist(), Levels.labels)]
    places = [place for i, place in enumerate(places) if i not in Levels.broken]

    class Table(torch.nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign = sign

        def forward(self, images):
            return self.sign * logits[((images[:, 0, 0, 0] + 1) * 127.5).round().long()]

    run = train.Run(finetune.parse_args(["--scratch", *TUNE, "--img_size", "8"]))
    samples = finetune.eval_samples(Levels(), run.args)
    assert finetune.evaluate([Table(1), Table(-1)], samples, run) == [
        dict(images=20, top1=5 * places.count(0), top5=5 * sum(p < 5 for p in places)),
        dict(images=20, top1=5 * places.count(8), top5=5 * sum(p > 3 for p in places)),
    ]
    warnings = capsys.readouterr().err
    assert warnings.count("can't read") == 3 and "'level 12'" in warnings
    assert finetune.evaluate([Table(1)], samples, run)[0]["images"] == 20 and not capsys.readouterr().err  # named once


def test_a_contact_sheet_writes_letters_without_their_accents():
    """Pillow's own font has none, and would draw boxes."""
    pictures = [finetune.contact_sheet([(torch.zeros(3, 8, 8, dtype=torch.uint8), [name], "black")])
                for name in ("Müller é", "Mu\u0308ller e\u0301", "Muller e")]
    assert pictures[0] == pictures[1] == pictures[2]


def test_linear_probe_runs_and_resumes(unbroken, tmp_path, capsys):
    flags = ["--init", unbroken / "encoder.pt", "--out", tmp_path, *TUNE, "--linear", "--warmup_epochs", 0,
             "--base_lr", 50]
    call(finetune, *flags)
    log = result(tmp_path)[1]
    assert len(log) == 3 and log[2]["loss"] < log[0]["loss"]
    call(finetune, *flags, "--epochs", 4)
    assert "going on" in capsys.readouterr().out and len(result(tmp_path)[1]) == 4


def test_weights_that_are_not_finite_never_become_the_best(unbroken, tmp_path, capsys):
    weights = torch.load(unbroken / "encoder.pt", weights_only=True)
    weights["cls_token"].fill_(math.nan)
    torch.save(weights, tmp_path / "nan.pt")
    # seldom looked at, so that it is the end of the epoch that finds them
    flags = ["--init", tmp_path / "nan.pt", "--out", tmp_path / "out", *TUNE, "--log_every", 1000]
    assert "finite" in refused(capsys, finetune, *flags, code=1)
    assert not (tmp_path / "out" / "best.pt").exists()


def test_a_model_average_can_begin_later(unbroken, tmp_path):
    flags = ["--init", unbroken / "encoder.pt", "--out", tmp_path, *TUNE]
    call(finetune, *flags, "--epochs", 1, "--model_ema", 0)
    call(finetune, *flags, "--epochs", 2)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "top1_ema" not in log[0] and "top1_ema" in log[1]


def test_labels_per_class_is_a_fixed_subset():
    args = finetune.parse_args(["--scratch", *TUNE])
    train_set, val_set = finetune.open_images(args)
    again, _ = finetune.open_images(args)
    assert sorted(train_set.labels) == sorted(list(range(12)) * 4) and np.array_equal(train_set.indices, again.indices)
    assert not {train_set.name(i) for i in range(48)} & {val_set.name(i) for i in range(60)}
    args.seed = 1
    assert not np.array_equal(finetune.open_images(args)[0].indices, train_set.indices)


def class_folders(root, sets):
    for name, labels in sets.items():
        for label in labels:
            (root / name / label).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (40, 40), "red").save(root / name / label / f"{index}.png")
    return root


def test_bad_data_is_named(tmp_path, capsys, monkeypatch):
    flags = ["--scratch", "--recipe", "shapes", *TUNE, "--labels_per_class", 0, "--batch_size", 2]
    flags += ["--out", tmp_path / "out"]
    a = class_folders(tmp_path / "a", {"train": ["cat", "dog"]})
    assert "no val/" in refused(capsys, finetune, "--data", a, *flags)
    b = class_folders(tmp_path / "b", {"train": ["cat", "dog"], "val": ["cat", "cow"]})
    assert "cow" in refused(capsys, finetune, "--data", b, *flags)
    c = class_folders(tmp_path / "c", {"train": ["cat", "dog"], "val": ["cat"]})
    Image.new("RGB", (40, 40)).save(c / "train" / "stray.png")
    assert "stray.png" in refused(capsys, finetune, "--data", c, *flags)
    assert "--init" in refused(capsys, finetune, *TUNE[2:], "--recipe", "cifar10")
    assert "--batch_size" in refused(capsys, finetune, "--scratch", *TUNE, "--batch_size", 64)
    assert "--scratch" in refused(capsys, finetune, "--scratch", "--init", "x", *TUNE)
    assert "give one" in refused(capsys, finetune, "--scratch", *TUNE, "--knn", "--linear")
    assert "--depth 9" in refused(capsys, finetune, "--scratch", *TUNE, "--knn", "--depth", 9)
    assert not (tmp_path / "out").exists()
    d = class_folders(tmp_path / "d", {"train": ["cat", "dog"], "test": ["cat", "dog"]})
    call(finetune, "--data", d, *flags, "--epochs", 1)
    weights = tmp_path / "out" / "best.pt"
    assert "a head for 2 classes, and 12" in refused(capsys, finetune, "--eval", "--init", weights, *TUNE)

    # Evaluation needs no train/, has the classifier's image size, and does not take one class for another.
    flags = ["--recipe", "shapes", "--eval", "--init", weights, "--workers", 0]
    e = class_folders(tmp_path / "e", {"val": ["cat", "dog"]})
    (e / "val" / "dog" / "0.png").write_text("not an image")
    capsys.readouterr()
    sizes, view = set(), finetune.eval_view
    monkeypatch.setattr(finetune, "eval_view",
                        lambda image, rng, args: sizes.add(args.img_size) or view(image, rng, args))
    call(finetune, "--data", e, *flags)
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["images"] == 5 and "0.png" in said.err
    assert sizes == {32}  # the recipe's is 64
    f = class_folders(tmp_path / "f", {"val": ["ape", "bee"]})
    assert "ape" in refused(capsys, finetune, "--data", f, *flags)
    (tmp_path / "out" / "classes.json").write_text("[")
    assert "classes.json is damaged" in refused(capsys, finetune, "--data", f, *flags)


def test_a_recipes_batch_shrinks_to_the_data():
    run = train.Run(finetune.parse_args(["--scratch", "--recipe", "cifar10", "--accum_steps", "2"]))
    finetune.fit_batch(512, run)
    assert (run.args.batch_size, run.args.lr) == (512, 1e-3)
    finetune.fit_batch(72, run)  # an eighth is 9, and 8 can be cut into two
    assert run.args.batch_size == 8 and run.args.lr == pytest.approx(1e-3 * 8 / 512)
    run = train.Run(finetune.parse_args(["--scratch", "--recipe", "cifar10", "--batch_size", "512"]))
    with pytest.raises(ValueError, match="--batch_size 512 is more than the 72"):
        finetune.fit_batch(72, run)


@pytest.mark.parametrize("mode", ["--eval", "--knn"])
def test_no_batch_size_matters_without_training(tuned, capsys, mode):
    flags = ["--init", tuned / "best.pt", *TUNE, mode]
    call(finetune, *flags)
    call(finetune, *flags, "--batch_size", 7, "--accum_steps", 3)
    *_, one, _, two = capsys.readouterr().out.splitlines()
    assert one == two and json.loads(one)["images"] == 60


def test_a_large_seed(tmp_path):
    call(finetune, "--scratch", *TUNE, *EVERYTHING, "--epochs", 1, "--seed", 2**40, "--out", tmp_path)
    assert len(result(tmp_path)[1]) == 1


def test_predictions(tmp_path, capsys):
    """Classes and crop are those of the files beside the weights."""
    model = small_vit(num_classes=4)
    model.head.weight.data *= 1000
    (tmp_path / "run").mkdir()
    torch.save(model.state_dict(), tmp_path / "run" / "best.pt")
    (tmp_path / "run" / "classes.json").write_text(json.dumps(["ape", "bee", "cat, black", "dog"]))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"crop_ratio": 0.5}))
    (tmp_path / "images" / "sub").mkdir(parents=True)
    photo = Image.effect_noise((40, 40), 60).resize((40, 40), BICUBIC)
    colours = Image.merge("RGB", [photo, photo.rotate(90), photo.rotate(180)])
    exif = Image.Exif()
    exif[0x0112] = 6
    for image, name in (photo, "gray.png"), (colours.convert("CMYK"), "sub/cmyk.jpg"), (colours, "turned.jpg"):
        image.save(tmp_path / "images" / name, quality=95, **{"exif": exif} if "turned" in name else {})
    (tmp_path / "images" / "broken.png").write_text("no image")
    call(finetune, "--predict", tmp_path / "images", "--init", tmp_path / "run" / "best.pt", "--out", tmp_path / "out",
         "--workers", 0, "--amp", "off")
    said = capsys.readouterr()
    assert "3 of 4 images" in said.out and said.err.count("broken.png") == 1
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == "file class probability second probability_2 third probability_3".split()
    assert [row[0] for row in rows] == ["gray.png", "sub/cmyk.jpg", "turned.jpg"]
    for row in rows:
        image = ImageOps.exif_transpose(Image.open(tmp_path / "images" / row[0])).convert("RGB")
        middle = image.resize((32, 32), BICUBIC, box=(10, 10, 30, 30))
        logits = model.eval()(torch.from_numpy(np.array(middle)).permute(2, 0, 1)[None] / 127.5 - 1)
        best = sorted(zip(logits.softmax(dim=1)[0].tolist(), ["ape", "bee", "cat, black", "dog"]), reverse=True)[:3]
        assert row[1::2] == [name for _, name in best]
        assert [float(value) for value in row[2::2]] == pytest.approx([value for value, _ in best], abs=2e-3)
    with Image.open(tmp_path / "out" / "predictions.png") as picture:
        assert picture.size == (8 * 152, 188)


# ----------------------------------------------------------------------------------------------------------------------
# The training loops, against plain ones: 9 images in batches of 4, so 2 steps an epoch and an image left over, for
# 3 epochs, the first of them warm-up. Settings are far from the defaults, so that one that does not arrive shows.
# Both sides do the same arithmetic in the same order, so weights are equal to the bit.

LOOP = """--img_size 32 --batch_size 4 --epochs 3 --warmup_epochs 1 --min_lr 0.001 --weight_decay 4 --betas 0.8 0.95
          --crop_scale 0.3 0.7 --seed 3 --workers 0 --device cpu --save_every 3 --amp off""".split()


def plain_order(epoch):
    seed = random.Random(f"3 order {epoch}").getrandbits(63)
    return torch.randperm(9, generator=torch.Generator().manual_seed(seed)).tolist()


def plain_batches():
    """Step, epoch, and for each image of the batch its number and the generator of all that is random about it."""
    for step in range(6):
        epoch, place = divmod(step, 2)
        indices = plain_order(epoch)[4 * place : 4 * place + 4]
        yield step, epoch, [(index, random.Random(f"3 {epoch} {index}")) for index in indices]


def plain_lr(step, peak):
    """From 0 to the peak over 2 steps, then a cosine to 0.001 at what would be step 6."""
    return peak * step / 2 if step < 2 else 0.001 + (peak - 0.001) * (1 + math.cos(math.pi * (step - 2) / 4)) / 2


def plain_optimizer(model, scale):
    """AdamW with a group for each parameter; scale(name) is what its learning rate is multiplied by."""
    groups = []
    for name, p in model.named_parameters():
        if not name.startswith("teacher"):
            spared = "norm" in name or name.endswith(("bias", "cls_token"))
            groups.append(dict(params=[p], weight_decay=0 if spared else 4, scale=scale(name)))
    return torch.optim.AdamW(groups, betas=(0.8, 0.95), fused=True)


def plain_step(optimizer, loss, lr):
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def plain_average(average, model, momentum):
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - momentum)


@pytest.mark.parametrize("mask, inject, weighted, momentum", [("block", (1, -1), 1, 0.5), ("random", (3, 0), 0, 0.8)])
def test_pretraining_takes_the_steps_of_a_plain_loop(tmp_path, mask, inject, weighted, momentum):
    flags = """--num_images 9 --decoder_dim 32 --decoder_depth 1 --mask_ratio 0.7 --base_lr 0.64
               --feature_ramp 0.5""".split()
    flags += ["--mask", mask, "--inject", *inject, "--weighted_loss", weighted, "--momentum", 0, 0, momentum]
    call(train, *LOOP, *flags, "--out", tmp_path)

    torch.manual_seed(3)
    sizes = dict(**SIZES["nano"], decoder_dim=32, decoder_depth=1)
    model = BootMAE(32, 8, **sizes, inject=inject, weighted_loss=bool(weighted))
    optimizer, shapes, losses = plain_optimizer(model, lambda name: 1), data.Shapes(9, 32), []
    for step, epoch, batch in plain_batches():
        images, masks = [], []
        for index, rng in batch:
            image = data.random_resized_crop(shapes.open(index), 32, rng, (0.3, 0.7))
            images.append(data.to_tensor(data.flip(image, rng)))
            generator = torch.Generator().manual_seed(rng.getrandbits(63))
            masks.append(block_mask(1, (4, 4), 11, generator) if mask == "block" else random_mask(1, 16, 11, generator))
        out = model(data.scale_pixels(torch.stack(images)), torch.cat(masks))
        loss = out.pixel_loss + min(1, (epoch + 1) / 1.5) * out.feature_loss
        losses.append((out.pixel_loss.item(), out.feature_loss.item()))
        plain_step(optimizer, loss, plain_lr(step, 0.64 * 4 / 256))
        # 0 until 1/8 of training, then linear until 1/2: to 0.5, or instead of 0.8 to the most for 6 steps, 1 - 2.4 / 6
        rise = min(1, max(0, step / 6 - 1 / 8) / (3 / 8))
        plain_average(model.teacher, model.encoder, rise * min(momentum, 0.6))
    assert_same(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"], model.state_dict())
    assert_same(torch.load(tmp_path / "encoder.pt", weights_only=True), model.encoder.state_dict())
    for line, first, second in zip(result(tmp_path)[1], losses[::2], losses[1::2], strict=True):
        assert [line["pixel_loss"], line["feature_loss"]] == pytest.approx(np.mean([first, second], axis=0), rel=1e-6)


@pytest.mark.parametrize("peak", ["--lr 0.01", "--lr 0 --base_lr 0.64"])
def test_fine_tuning_takes_the_steps_of_a_plain_loop(tmp_path, peak):
    shapes, files = data.Shapes(9, 40), []  # image i is of class i % 3, and a folder's images come class by class
    for label in range(3):
        (tmp_path / "train" / str(label)).mkdir(parents=True)
        for index in range(label, 9, 3):
            files.append(tmp_path / "train" / str(label) / f"{index}.png")
            shapes.open(index).save(files[-1])
    (tmp_path / "val").symlink_to("train")
    torch.manual_seed(0)
    model = ViT(32, 8, **SIZES["nano"], num_classes=3, drop_path=0.3)
    model.head.weight.data *= 1000  # as it would be later in training: else hardly any gradient gets past it
    torch.save(model.state_dict(), tmp_path / "start.pt")
    flags = """--recipe shapes --labels_per_class 0 --layer_decay 0.5 --drop_path 0.3 --mixup 0.8 --cutmix 1
               --smoothing 0.2 --rand_augment 9 --erasing 0.5 --model_ema 0.6""".split()
    call(finetune, "--data", tmp_path, "--init", tmp_path / "start.pt", *LOOP, *flags, *peak.split(), "--out", tmp_path)

    def scale(name):  # the embeddings are layer 0, the blocks 1 to 4, norm and head 5
        layer = 5 if name.startswith(("fc_norm", "head")) else 0
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else layer
        return 0.5 ** (5 - layer)

    average, optimizer, losses = copy.deepcopy(model), plain_optimizer(model, scale), []
    for step, _, batch in plain_batches():
        views = []
        for index, rng in batch:
            with data.Image.open(files[index]) as image:
                image = data.flip(data.random_resized_crop(image, 32, rng, (0.3, 0.7)), rng)
            views.append(data.to_tensor(data.rand_augment(image, rng, magnitude=9)))
        torch.manual_seed(random.Random(f"3 noise {step} 0").getrandbits(63))  # of erasing and drop path
        images = data.random_erasing(data.scale_pixels(torch.stack(views)), 0.5)
        labels, rng = torch.tensor([index // 3 for index, _ in batch]), random.Random(f"3 mix {step} 0 0")
        images, targets = data.mixup_cutmix(images, labels, 3, 0.8, 1, 0.2, rng)
        loss = -(targets * model(images).log_softmax(dim=1)).sum(dim=1).mean()
        losses.append(loss.item())
        plain_step(optimizer, loss, plain_lr(step, 0.01))
        plain_average(average, model, 0.6)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert_same([checkpoint["model"], checkpoint["average"]], [model.state_dict(), average.state_dict()])
    means = [(first + second) / 2 for first, second in zip(losses[::2], losses[1::2])]
    assert [line["loss"] for line in checkpoint["log"]] == pytest.approx(means, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Stops and kills at chosen moments, inside this process


def stop_at(monkeypatch, *steps):
    """Let a SIGTERM arrive in these steps, counted from 0 over all calls; --accum_steps must be 1."""
    count, add = itertools.count(), train.Meter.add

    def add_and_stop(meter, *losses):
        add(meter, *losses)
        if next(count) in steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Meter, "add", add_and_stop)


@pytest.mark.parametrize("save_every", [1, 2])
def test_stops_at_the_ends_of_epochs_lose_and_repeat_nothing(tmp_path, capsys, monkeypatch, save_every):
    """One step is an epoch here, and each is stopped in, the last one as well."""
    flags = [*TRAIN[1:], "--num_images", 8, "--save_every", save_every, "--out"]
    call(train, *flags, tmp_path / "unbroken")
    stop_at(monkeypatch, 0, 1, 2)
    for step in 1, 2, 3:
        line = refused(capsys, train, *flags, tmp_path / "stopped", code=128 + signal.SIGTERM)
        assert f"SIGTERM after step {step}" in line
    call(train, *flags, tmp_path / "stopped")
    assert "finished" in capsys.readouterr().out
    assert_same(result(tmp_path / "stopped"), result(tmp_path / "unbroken"))
    assert [line["epoch"] for line in result(tmp_path / "stopped")[1]] == [1, 2, 3]


@pytest.mark.parametrize("step", [5, 8, 17])
def test_a_stop_in_fine_tuning_changes_nothing(unbroken, tuned, tmp_path, capsys, monkeypatch, step):
    """At the end of an epoch, within one, and at the very end, when best.pt must be there."""
    stop_at(monkeypatch, step)
    flags = ["--init", unbroken / "encoder.pt", "--out", tmp_path, *TUNE, *EVERYTHING]
    refused(capsys, finetune, *flags, code=128 + signal.SIGTERM)
    assert step < 5 or (tmp_path / "best.pt").exists()
    call(finetune, *flags)
    assert_same(result(tmp_path), result(tuned))


@pytest.mark.parametrize("name", ["log.jsonl", "curves.png", "encoder.pt", "checkpoint.pt"])
def test_a_kill_before_any_file_of_the_last_epoch(unbroken, tmp_path, monkeypatch, name):
    """checkpoint.pt is the last to be written, so a resumed run writes all others that were missed."""
    flags, replace = [*TRAIN[1:], "--out", tmp_path], os.replace

    def replace_or_die(source, target):
        if target.endswith(name) and (tmp_path / "epoch_0003.png").exists():
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    with pytest.raises(KeyboardInterrupt):
        call(train, *flags)
    monkeypatch.undo()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 12
    call(train, *flags)
    assert_same(result(tmp_path), result(unbroken))


def test_weight_decay_may_change_from_call_to_call(unbroken, tmp_path):
    """None and some make the same groups of parameters, so an optimizer's state fits the other's."""
    for epochs, decay in (1, 0.05), (2, 0), (3, 0.3):
        call(finetune, "--init", unbroken / "encoder.pt", "--out", tmp_path, *TUNE, "--epochs", epochs,
             "--weight_decay", decay)
        checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert {group["weight_decay"] for group in checkpoint["optimizer"]["param_groups"]} == {0.0, decay}
    assert [line["epoch"] for line in checkpoint["log"]] == [1, 2, 3]


def test_other_images_are_refused_on_resume(tmp_path, capsys, monkeypatch):
    """Even if there are as many; the same folder by another path is no other one."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(8):
            data.Shapes(8, 40).open(index).save(tmp_path / name / f"{index}.png")
    flags = ["--recipe", "shapes", *TINY, "--out", tmp_path / "out", "--data"]
    call(train, *flags, tmp_path / "a", "--epochs", 1)
    assert "--data" in refused(capsys, train, *flags, tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    call(train, *flags, "../a")
    assert "going on from" in capsys.readouterr().out and len(result(tmp_path / "out")[1]) == 3


def overflow_at(monkeypatch, wanted):
    """Gradients become infinite in the steps that wanted(step) says; returns the weights after each step."""
    steps, forward, update, weights = itertools.count(), BootMAE.forward, BootMAE.update_teacher, []

    def forward_and_spoil(model, images, mask):
        out = forward(model, images, mask)
        if out.pixel_loss.requires_grad and wanted(next(steps)):
            out.pixel_loss.register_hook(lambda grad: grad * math.inf)
        return out

    def update_and_look(model, momentum):
        weights.append(model.encoder.patch_embed.proj.weight.detach().clone())
        update(model, momentum)

    monkeypatch.setattr(BootMAE, "forward", forward_and_spoil)
    monkeypatch.setattr(BootMAE, "update_teacher", update_and_look)
    return weights


def test_an_overflow_in_fp16_skips_one_step(tmp_path, monkeypatch):
    weights = overflow_at(monkeypatch, lambda step: step == 4)
    call(train, *TRAIN[1:], "--out", tmp_path, "--amp", "fp16", "--epochs", 2)
    still = [step for step in range(1, 12) if torch.equal(weights[step], weights[step - 1])]
    assert still == [4]


def test_a_run_in_fp16_that_never_takes_a_step_ends(tmp_path, capsys, monkeypatch):
    weights = overflow_at(monkeypatch, lambda step: True)
    line = refused(capsys, train, *TRAIN[1:], "--out", tmp_path, "--amp", "fp16", "--num_images", 96,
                   "--batch_size", 2, code=1)
    assert "never finite in fp16" in line and all(torch.equal(weights[0], later) for later in weights)
    assert 36 <= len(weights) <= 40  # the scale falls from 2**16 to below 2**-20


class NoWaiting(TorchDispatchMode):
    """Raises at what would wait for a GPU: a number or a shape that depends on a tensor's values."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not by_mask and not name.startswith(self.names), func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("module", [train, finetune])
def test_the_loop_waits_for_no_gpu_between_looks(unbroken, tmp_path, monkeypatch, module):
    """Watched are steps 2 to 5 of 6, except for loading and two checks that are only made on the CPU."""
    steps, watch = [], contextlib.ExitStack()

    def stop_asked(run):
        steps.append(run)
        if len(steps) == 1:
            watch.enter_context(NoWaiting())
        if len(steps) == 5:
            watch.close()
        return False

    def unwatched(function):
        def call_unwatched(*args):
            with _disable_current_modes():
                return function(*args)

        return call_unwatched

    monkeypatch.setattr(train.Run, "stop_asked", stop_asked)
    monkeypatch.setattr(data.Samples, "__getitem__", unwatched(data.Samples.__getitem__))
    monkeypatch.setattr(BootMAE, "split", unwatched(BootMAE.split))                          # of the mask
    monkeypatch.setattr(data.F, "one_hot", unwatched(torch.nn.functional.one_hot))           # of the labels
    flags = TRAIN[1:] if module is train else ["--init", unbroken / "encoder.pt", *TUNE, *EVERYTHING]
    with watch:
        call(module, *flags, "--out", tmp_path, "--epochs", 1, "--log_every", 1000)
    assert len(steps) == 6


def test_a_folder_that_grew_is_refused_on_resume(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for index in range(9):
        data.Shapes(9, 40).open(index).save(tmp_path / "a" / f"{index}.png")
    flags = ["--recipe", "shapes", *TINY, "--out", tmp_path / "out", "--data", tmp_path / "a"]
    call(train, *flags, "--epochs", 1)
    shutil.copy(tmp_path / "a" / "0.png", tmp_path / "a" / "9.png")  # still one step an epoch
    assert "9 images" in refused(capsys, train, *flags)


def test_prediction_needs_a_readable_image(tmp_path, capsys):
    (tmp_path / "x.png").write_text("no image")
    torch.save(small_vit(num_classes=4).state_dict(), tmp_path / "best.pt")
    with pytest.raises(SystemExit):
        call(finetune, "--predict", tmp_path, "--init", tmp_path / "best.pt", "--out", tmp_path / "out", "--workers", 0)
    assert "no image could be read" in capsys.readouterr().err


@pytest.mark.parametrize("module", [train, finetune])
def test_help_names_flags_and_defaults(capsys, module):
    with pytest.raises(SystemExit) as ended:
        module.parse_args(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and re.search(r"--seed SEED\s.*\(default: 0\)", said) and "(default: False)" not in said


def test_validation_without_a_readable_image_is_named(unbroken, tmp_path, capsys):
    folder = class_folders(tmp_path / "a", {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    for path in (folder / "val").glob("*/*"):
        path.write_text("no image")
    flags = ["--data", folder, "--init", unbroken / "encoder.pt", "--recipe", "shapes", "--out", tmp_path / "out"]
    flags += ["--labels_per_class", 0, "--batch_size", 2, "--epochs", 1, "--workers", 0]
    for mode in [], ["--knn"]:
        with pytest.raises(SystemExit) as ended:
            call(finetune, *flags, *mode)
        assert ended.value.code == 1 and "no image could be read of 6" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["model", "optimizer", "samples"])
def test_a_checkpoint_without_a_part_is_named(finished, capsys, part):
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    del checkpoint[part]
    torch.save(checkpoint, finished / "checkpoint.pt")
    assert "checkpoint.pt" in refused(capsys, train, *TRAIN[1:], "--out", finished)


def test_other_tensors_in_a_checkpoint_are_named(finished, capsys):
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    checkpoint["model"]["renamed"] = checkpoint["model"].pop("encoder.cls_token")
    torch.save(checkpoint, finished / "checkpoint.pt")
    assert "other tensors" in refused(capsys, train, *TRAIN[1:], "--out", finished)


def test_empty_names_and_too_few_images_are_refused(tmp_path, capsys):
    assert "--predict is empty" in refused(capsys, finetune, *TUNE, "--scratch", "--predict", "")
    assert "--init is empty" in refused(capsys, finetune, *TUNE, "--init", "")
    folder = class_folders(tmp_path / "a", {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    flags = ["--data", folder, "--scratch", "--recipe", "photos", "--accum_steps", 7, "--workers", 0]
    assert "6 training images are fewer" in refused(capsys, finetune, *flags, "--out", tmp_path / "out")


def test_positions_of_an_oblong_grid_are_kept():
    """2 x 8 patches are as many as 4 x 4, and must not be taken for them."""
    model, state = small_vit(img_size=(16, 64)), small_vit(img_size=(16, 64)).state_dict()
    load_matching(model, state, "file")
    assert torch.equal(model.pos_embed, state["pos_embed"])


def test_neighbours_of_a_random_network_see_no_drop_path(tmp_path, capsys):
    flags = ["--scratch", *TUNE, "--knn", "--drop_path", 0.9]
    call(finetune, *flags)
    first = capsys.readouterr().out.splitlines()[-1]
    call(finetune, *flags, "--drop_path", 0)
    assert capsys.readouterr().out.splitlines()[-1] == first


def test_a_signal_during_the_all_reduce_is_not_lost(monkeypatch):
    """Processes only act on what all of them have seen, so this one counts at the next step."""
    run = train.Run(train.parse_args([]))
    run.world_size = 2
    signals = [signal.SIGTERM, 0]
    monkeypatch.setattr(run, "signal", 0)
    monkeypatch.setattr(train.dist, "all_reduce", lambda flag, op: setattr(run, "signal", signals.pop(0) or run.signal))
    assert not run.stop_asked() and run.stop_asked() and run.signal == signal.SIGTERM


def test_a_resumed_run_takes_back_lines_that_its_checkpoint_does_not_know(finished, monkeypatch):
    """A kill between log.jsonl and checkpoint.pt leaves such a line; here a stop follows before the epoch's end."""
    before = (finished / "log.jsonl").read_text()
    (finished / "log.jsonl").write_text(before + '{"epoch": 4}\n')
    stop_at(monkeypatch, 0)
    with pytest.raises(SystemExit):
        call(train, *TRAIN[1:], "--out", finished, "--epochs", 4)
    assert (finished / "log.jsonl").read_text() == before


def test_losses_that_are_never_finite_end_the_run_at_the_next_look():
    run = train.Run(train.parse_args([]))
    meter = train.Meter(run, "loss")
    meter.add(torch.tensor(2.0))
    meter.add(torch.tensor(math.nan))
    assert meter.look() == {"loss": 2.0}
    meter.add(torch.tensor(math.inf))
    with pytest.raises(SystemExit) as ended:
        meter.look()
    assert ended.value.code == 1


def test_only_a_better_model_becomes_the_best(tmp_path, monkeypatch):
    """The average is worse in the first epoch and better in the second; the third is worse than both."""
    run = train.Run(finetune.parse_args(["--scratch", *TUNE, "--out", str(tmp_path)]))
    model, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    scores = iter([(50, 40), (45, 60), (55, 59)])
    monkeypatch.setattr(finetune, "evaluate", lambda *_: [dict(top1=t, top5=90) for t in next(scores)])
    monkeypatch.setattr(finetune, "draw_predictions", lambda *_: Image.new("RGB", (1, 1)))
    for expected in model, average, average:
        with torch.no_grad():
            best = {key: value.clone() for key, value in expected.state_dict().items()}
        if len(run.log) == 2:  # were it saved again, it would be with other weights
            average.weight.data += 1
        run.log.append(finetune.evaluate_and_keep_the_best(model, average, None, run))
        assert_same(torch.load(tmp_path / "best.pt", weights_only=True), best)


def test_official_files_of_deepspeed():
    theirs = official_checkpoint()
    assert_same(from_official({"module": theirs}), from_official({"model": theirs}))
