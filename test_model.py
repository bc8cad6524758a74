"""Tests: against plain loops written from the paper's definitions, or of properties that must hold.

    python -m pytest -q
    BOOTMAE_OFFICIAL=path/to/checkout python -m pytest -q     compares with the authors' code, too
"""
import argparse
import contextlib
import copy
import csv
import errno
import functools
import importlib
import itertools
import json
import math
import os
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
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import data
import finetune
import train
from masking import block_mask, random_mask
from model import (
    SIZES, Attention, BootMAE, ViT, load_vit, loss_weight, patchify, read_file,
    resize_positions,
)

HERE = os.path.dirname(os.path.abspath(__file__))
os.environ |= dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONPATH=HERE)
torch.set_num_threads(1)  # a GPU, or more threads, would add in another order

near = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-6)
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------
# Naive versions: one sample, one token, one head at a time, in float64, for these sizes

SMALL = dict(img_size=(8, 12), patch_size=4, embed_dim=24, depth=3, num_heads=3)
P, GRID, DEPTH, HEADS = 4, (2, 3), 3, 3


def linear(w, prefix, x):
    return w[prefix + ".weight"] @ x + w[prefix + ".bias"]


def layer_norm(x, weight=1.0, bias=0.0):
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weight + bias


def norm(w, prefix, tokens):
    return [layer_norm(t, w[prefix + ".weight"], w[prefix + ".bias"]) for t in tokens]


def attend(queries, keys, values):
    """Lists of vectors; softmax(q k / sqrt(width)) v, head by head."""
    width = len(queries[0]) // HEADS
    out = []
    for q in queries:
        parts = []
        for h in range(HEADS):
            part = slice(h * width, (h + 1) * width)
            scores = [math.exp(float(q[part] @ k[part]) / math.sqrt(width)) for k in keys]
            parts.append(sum(s / sum(scores) * v[part] for s, v in zip(scores, values)))
        out.append(torch.cat(parts))
    return out


def self_attention(w, prefix, tokens):
    thirds = [linear(w, prefix + ".qkv", t).chunk(3) for t in tokens]
    mixed = attend(*([t[i] for t in thirds] for i in range(3)))
    return [linear(w, prefix + ".proj", t) for t in mixed]


def cross_attention(w, prefix, tokens, context):
    queries = [linear(w, prefix + ".q", t) for t in tokens]
    halves = [linear(w, prefix + ".kv", t).chunk(2) for t in context]
    mixed = attend(queries, [h[0] for h in halves], [h[1] for h in halves])
    return [linear(w, prefix + ".proj", t) for t in mixed]


def mlp(w, prefix, tokens):
    hidden = [linear(w, prefix + ".fc1", t) for t in tokens]
    hidden = [0.5 * t * (1 + torch.erf(t / math.sqrt(2))) for t in hidden]
    return [linear(w, prefix + ".fc2", t) for t in hidden]


def add(tokens, branch):
    return [a + b for a, b in zip(tokens, branch)]


def naive_positions(dim):
    """A vector for each patch: [sin r, cos r, sin c, cos c]."""
    omega = [10000 ** (-k / (dim // 4)) for k in range(dim // 4)]
    table = []
    for r, c in np.ndindex(GRID):
        values = [f(place * o) for place in (r, c) for f in (math.sin, math.cos) for o in omega]
        table.append(torch.tensor(values, dtype=torch.float64))
    return table


def naive_patches(image):
    """(3, H, W) to a list of vectors (3*p*p), channel first, row by row."""
    patches = []
    for top in range(0, image.shape[1], P):
        for left in range(0, image.shape[2], P):
            values = [image[c, top + y, left + x] for c, y, x in np.ndindex(3, P, P)]
            patches.append(torch.stack(values))
    return patches


def naive_encoder(w, prefix, patches, numbers):
    """Outputs of all blocks, each a list of 1 + len(numbers) vectors."""
    weight, bias = w[prefix + "patch_embed.proj.weight"], w[prefix + "patch_embed.proj.bias"]
    positions = naive_positions(len(weight))
    x = [w[prefix + "cls_token"][0, 0]]
    x += [weight.flatten(1) @ patches[n] + bias + positions[n] for n in numbers]
    outputs = []
    for i in range(DEPTH):
        name = f"{prefix}blocks.{i}."
        x = add(x, self_attention(w, name + "attn", norm(w, name + "norm1", x)))
        x = add(x, mlp(w, name + "mlp", norm(w, name + "norm2", x)))
        outputs.append(x)
    return outputs


def naive_decoder(w, prefix, latent, context, visible, depth):
    """Predictions for all N patches, in image order."""
    projected = [linear(w, prefix + "embed", t) for t in latent]
    x = [projected[0]]
    for n, position in enumerate(naive_positions(len(projected[0]))):
        hole = w[prefix + "mask_token"][0, 0] + position
        x.append(projected[1 + visible.index(n)] if n in visible else hole)
    for i in range(depth):
        name = f"{prefix}blocks.{i}."
        x = add(x, self_attention(w, name + "attn", norm(w, name + "norm1", x)))
        if context is not None:
            queries = norm(w, name + "norm_query", x)
            keys = norm(w, name + "norm_context", context)
            x = add(x, cross_attention(w, name + "cross_attn", queries, keys))
        x = add(x, mlp(w, name + "mlp", norm(w, name + "norm2", x)))
    return [linear(w, prefix + "head", t) for t in norm(w, prefix + "norm", x)[1:]]


def naive_weight(mask, rows, columns):
    """w = m * avg3(m) + m, for one list of 0 and 1."""
    weight = []
    for r, c in np.ndindex(rows, columns):
        around = 0
        for y, x in itertools.product((r - 1, r, r + 1), (c - 1, c, c + 1)):
            if 0 <= y < rows and 0 <= x < columns:
                around += mask[y * columns + x]
        m = mask[r * columns + c]
        weight.append(m * around / 9 + m)
    return weight


def naive_normalize(patch):
    channels = []
    for channel in patch.view(3, P * P):
        mean = sum(channel) / (P * P)
        variance = sum((v - mean) ** 2 for v in channel) / (P * P)
        channels.append((channel - mean) / torch.sqrt(variance + 1e-5))
    return torch.cat(channels)


def naive_bootmae(w, images, mask, depth, inject, feature_target, weighted_loss):
    """Both losses and all predictions, from a state_dict in float64."""
    all_pixels, all_features, pixel_errors, feature_errors = [], [], [], []
    for image, row in zip(images, mask.int().tolist()):
        patches = naive_patches(image)
        visible = [n for n, hidden in enumerate(row) if not hidden]
        outputs = naive_encoder(w, "encoder.", patches, visible)
        latent = norm(w, "encoder.norm", outputs[-1])
        shallow, deep = (outputs[i - 1 if i > 0 else i] if i else None for i in inject)
        weight = naive_weight(row, *GRID) if weighted_loss else row
        pixels = naive_decoder(w, "regressor.", latent, shallow, visible, depth)
        for m, pixel, patch_ in zip(weight, pixels, patches):
            pixel_errors.append((m * (pixel - naive_normalize(patch_)) ** 2).mean())
        all_pixels.append(torch.stack(pixels))
        if feature_target:
            features = naive_decoder(w, "predictor.", latent, deep, visible, depth)
            target = naive_encoder(w, "teacher.", patches, range(len(patches)))[-1][1:]
            for m, feature, taught in zip(weight, features, target):
                error = (layer_norm(feature) - layer_norm(taught)) ** 2
                feature_errors.append((m * error).mean())
            all_features.append(torch.stack(features))
    ratio = mask.double().mean()
    pixel_loss = torch.stack(pixel_errors).mean() / ratio
    if not feature_target:
        return pixel_loss, torch.tensor(0.0), torch.stack(all_pixels), None
    feature_loss = torch.stack(feature_errors).mean() / ratio
    return pixel_loss, feature_loss, torch.stack(all_pixels), torch.stack(all_features)


def shaken(module):
    """With every parameter that is trained away from its initial value."""
    for p in module.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return module


def small_model(**changes):
    """A model in float64 with a teacher unlike the encoder, two images, and a mask of 4 patches."""
    torch.manual_seed(0)
    model = shaken(BootMAE(**dict(SMALL, decoder_dim=20) | changes).double())
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64) * 2 - 1
    return model, images, random_mask(2, 6, 4, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("depth, inject, feature_target, weighted", [
    (2, (1, -1), True, True), (2, (2, 1), True, True), (2, (0, 0), True, True),
    (1, (-1, -1), True, False), (2, (0, 0), False, True),
])
def test_forward_matches_the_definition(depth, inject, feature_target, weighted):
    flags = dict(inject=inject, feature_target=feature_target, weighted_loss=weighted)
    model, images, mask = small_model(decoder_depth=depth, **flags)
    if feature_target:
        for p in model.teacher.parameters():
            p.data += 0.1 * torch.randn_like(p)
    out = model(images, mask)
    pixel_loss, feature_loss, pixels, features = naive_bootmae(
        model.state_dict(), images, mask, depth, **flags)
    assert torch.equal(out.masked, mask.nonzero()[:, 1].view(2, 4))  # in ascending order
    near(out.pixels, pixels.take_along_dim(out.masked[:, :, None], 1))  # positions are float32
    torch.testing.assert_close(out.pixel_loss.double(), pixel_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.feature_loss.double(), feature_loss.double(), rtol=1e-5, atol=0)
    if feature_target:
        features = features.take_along_dim(out.masked[:, :, None], 1)
    near(out.features, features)


# --------------------------------------------------------------------------------------------------
# The training loops, against plain ones: 9 images in batches of 4, so 2 steps an epoch and an image
# left over, for 3 epochs, the first of them warm-up. Settings are far from the defaults, so that
# one that does not arrive shows. Both sides do the same arithmetic in the same order, so weights
# are equal to the bit.

LOOP = """--img_size 32 --batch_size 4 --epochs 3 --warmup_epochs 1 --min_lr 0.001 --weight_decay 4
          --betas 0.8 0.95 --crop_scale 0.3 0.7 --seed 3 --workers 0 --save_every 3
          --amp off""".split()


def plain_batches():
    """Step, epoch, and for each image its number and the generator of all its randomness."""
    for step in range(6):
        epoch, place = divmod(step, 2)
        seed = random.Random(f"3 order {epoch}").getrandbits(63)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed)).tolist()
        indices = order[4 * place : 4 * place + 4]
        yield step, epoch, [(index, random.Random(f"3 {epoch} {index}")) for index in indices]


def plain_optimizer(model, scale):
    """AdamW with a group for each parameter; scale(name) multiplies its learning rate."""
    groups = []
    for name, p in model.named_parameters():
        if not name.startswith("teacher"):
            spared = "norm" in name or name.endswith(("bias", "cls_token"))
            groups.append(dict(params=[p], weight_decay=0 if spared else 4, scale=scale(name)))
    return torch.optim.AdamW(groups, betas=(0.8, 0.95), fused=True)


def plain_rate(step, peak):
    """From 0 to the peak over 2 steps, then on a cosine to 0.001 at what would be step 6."""
    if step < 2:
        return peak * step / 2
    return 0.001 + (peak - 0.001) * (1 + math.cos(math.pi * (step - 2) / 4)) / 2


def plain_step(step, optimizer, loss, average, model, momentum):
    """`average` follows `model`."""
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = plain_rate(step, 0.01) * group["scale"]
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for old, new in zip(average.parameters(), model.parameters(), strict=True):
            old.lerp_(new, 1 - momentum)


@pytest.mark.parametrize("mask, kind, patches, inject, weighted, momentum, scale", [
    ("block", block_mask, (4, 4), (1, -1), 1, 0.5, 1.0),
    ("random", random_mask, 16, (3, 0), 0, None, 0.3)])
def test_pretraining_takes_the_steps_of_a_plain_loop(
        tmp_path, mask, kind, patches, inject, weighted, momentum, scale):
    flags = """--recipe shapes --num_images 9 --decoder_dim 32 --decoder_depth 1 --mask_ratio 0.7
               --base_lr 0.64 --feature_ramp 0.5""".split()  # so the peak is 0.01
    flags += ["--mask", mask, "--inject", *inject, "--weighted_loss", weighted]
    flags += ["--branch_init", scale]
    if momentum:
        flags += ["--momentum", 0, 0, momentum]
    call(train, *LOOP, *flags, "--out", tmp_path)

    torch.manual_seed(3)
    model = BootMAE(32, 8, **SIZES["nano"], decoder_dim=32, decoder_depth=1, inject=inject,
                    weighted_loss=bool(weighted))
    for vit in model.encoder, model.teacher:  # their residual branches, and no decoder's
        for block in vit.blocks:
            block.attn.proj.weight.data *= scale
            block.mlp.fc2.weight.data *= scale
    optimizer, shapes, losses = plain_optimizer(model, lambda name: 1), data.Shapes(9, 32), []
    for step, epoch, batch in plain_batches():
        images, masks = [], []
        for index, rng in batch:
            image = data.random_resized_crop(shapes.open(index), 32, rng, (0.3, 0.7))
            images.append(data.to_tensor(data.flip(image, rng)))
            generator = torch.Generator().manual_seed(rng.getrandbits(63))
            masks.append(kind(1, patches, 11, generator))
        out = model(data.scale_pixels(torch.stack(images)), torch.cat(masks))
        loss = out.pixel_loss + min(1, (epoch + 1) / 1.5) * out.feature_loss
        losses.append([out.pixel_loss.item(), out.feature_loss.item()])
        # 0 until 1/8 of training, then linear until 1/2: to what is given, or to an average over
        # 100,000 / 249,600 of 6 steps; in so short a run the first two averages are of one step.
        rise = min(1, max(0, step / 6 - 1 / 8) / (3 / 8))
        momentum_now = rise * (momentum or 1 - 2.496 / 6)
        plain_step(step, optimizer, loss, model.teacher, model.encoder, momentum_now)
    assert_same(load(tmp_path / "checkpoint.pt")["model"], model.state_dict())
    assert_same(load(tmp_path / "encoder.pt"), model.encoder.state_dict())
    log = [[line["pixel_loss"], line["feature_loss"]] for line in read_log(tmp_path)]
    assert np.array(log) == pytest.approx(np.reshape(losses, (3, 2, 2)).mean(axis=1), rel=1e-6)


@pytest.mark.parametrize("peak", ["--lr 0.01", "--base_lr 0.64"])
def test_fine_tuning_takes_the_steps_of_a_plain_loop(tmp_path, peak):
    class_folders(tmp_path, train="a b c", val="a b c")
    files, model = sorted(tmp_path.glob("train/*/*")), small_vit(num_classes=3, drop_path=0.3)
    model.head.weight.data *= 1000  # as later in training: else hardly any gradient gets past it
    torch.save(model.state_dict(), tmp_path / "start.pt")
    flags = """--recipe shapes --labels_per_class 0 --layer_decay 0.5 --drop_path 0.3 --mixup 0.4
               --cutmix 2 --smoothing 0.2 --rand_augment 4 --erasing 0.5 --model_ema 0.6""".split()
    flags += ["--data", tmp_path, "--init", tmp_path / "start.pt", "--out", tmp_path]
    call(finetune, *LOOP, *flags, *peak.split())

    def scale(name):  # the embeddings are layer 0, the blocks 1 to 4, norm and head 5
        layer = 5 if name.startswith(("fc_norm", "head")) else 0
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else layer
        return 0.5 ** (5 - layer)

    average, optimizer, losses = copy.deepcopy(model), plain_optimizer(model, scale), []
    for step, _, batch in plain_batches():
        views = []
        for index, rng in batch:
            image = data.random_resized_crop(Image.open(files[index]), 32, rng, (0.3, 0.7))
            image = data.rand_augment(data.flip(image, rng), rng, magnitude=4)
            views.append(data.to_tensor(image))
        noise = random.Random(f"3 noise {step} 0").getrandbits(63)  # of erasing and drop path
        torch.manual_seed(noise)
        rng = random.Random(f"3 mix {step} 0 0")
        images = data.random_erasing(data.scale_pixels(torch.stack(views)), rng, 0.5)
        labels = torch.tensor([index // 3 for index, _ in batch])
        images, targets = data.mixup_cutmix(images, labels, 3, rng, 0.4, 2, 0.2)
        loss = -(targets * model(images).log_softmax(dim=1)).sum(dim=1).mean()
        losses.append(loss.item())
        plain_step(step, optimizer, loss, average, model, 0.6)
    checkpoint = load(tmp_path / "checkpoint.pt")
    assert_same(checkpoint["model"], model.state_dict())
    assert_same(checkpoint["average"], average.state_dict())
    log = [line["loss"] for line in checkpoint["log"]]
    assert log == pytest.approx(np.reshape(losses, (3, 2)).mean(axis=1), rel=1e-6)


def test_the_probe_takes_the_steps_of_a_plain_loop(tmp_path):
    """Of the blocks up to the second; the encoder stays as it is, and drops no path."""
    class_folders(tmp_path, train="a b c", val="a b c")
    files = sorted(tmp_path.glob("train/*/*"))
    torch.save(small_vit().state_dict(), tmp_path / "start.pt")
    flags = """--recipe shapes --linear --labels_per_class 0 --depth 2 --drop_path 0.5
               --smoothing 0.2 --base_lr 640""".split()  # so the peak is 10
    flags += ["--data", tmp_path, "--init", tmp_path / "start.pt", "--out", tmp_path]
    call(finetune, *LOOP, *flags)

    torch.manual_seed(3)
    encoder, head = load_vit(tmp_path / "start.pt", 32, 0), torch.nn.Linear(128, 3)
    torch.nn.init.trunc_normal_(head.weight, std=0.01)
    w, b = head.weight.detach().requires_grad_(), torch.zeros(3, requires_grad=True)
    losses, mean, variance, speed_w, speed_b = [], torch.zeros(128), torch.ones(128), 0, 0
    for step, _, batch in plain_batches():
        views = []
        for index, rng in batch:
            image = data.random_resized_crop(Image.open(files[index]), 32, rng, (0.3, 0.7))
            views.append(data.to_tensor(data.flip(image, rng)))
        x = plain_features(encoder, data.scale_pixels(torch.stack(views)), 2)
        mean, variance = 0.9 * mean + 0.1 * x.mean(0), 0.9 * variance + 0.1 * x.var(0)
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt()
        targets = 0.8 * torch.eye(3)[torch.tensor([index // 3 for index, _ in batch])] + 0.2 / 3
        loss = -(targets * (x @ w.T + b).log_softmax(dim=1)).sum(dim=1).mean()
        losses.append(loss.item())
        grad_w, grad_b = torch.autograd.grad(loss, (w, b))
        with torch.no_grad():
            grad_w += 4 * w  # weight decay, and not of the biases
            trust = 0.001 * w.square().sum().sqrt() / grad_w.square().sum().sqrt()
            speed_w = 0.9 * speed_w + trust * grad_w
            speed_b = 0.9 * speed_b + grad_b
            w -= plain_rate(step, 10) * speed_w
            b -= plain_rate(step, 10) * speed_b
    checkpoint = load(tmp_path / "checkpoint.pt")
    found = [checkpoint["model"][name] for name in (
        "head.weight", "head.bias", "norm.running_mean", "norm.running_var")]
    near(found, [w.detach(), b.detach(), mean, variance], rtol=1e-3, atol=1e-5)
    log = [line["loss"] for line in checkpoint["log"]]
    assert log == pytest.approx(np.reshape(losses, (3, 2)).mean(axis=1), rel=1e-4)
    images, labels = plain_middles(tmp_path / "val", 32, 1)
    x = (plain_features(encoder, images, 2) - mean) / (variance + 1e-6).sqrt()
    top1, _ = plain_accuracy(x @ w.detach().T + b.detach(), labels)
    assert checkpoint["log"][-1]["top1"] == pytest.approx(top1)


@pytest.mark.parametrize("module", [train, finetune])
def test_gradients_of_parts_are_those_of_the_batch(tmp_path, monkeypatch, module):
    """AdamW would hide a wrong scale of all gradients. In fp16, where the loss is scaled, too."""
    def take_no_step(optimizer):
        scale = getattr(optimizer, "grad_scale", None)  # what a fused AdamW divides by
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found.append([p.grad / (1 if scale is None else scale) for p in parameters])

    monkeypatch.setattr(torch.optim.AdamW, "step", take_no_step)
    flags, found = TRAIN if module is train else ["--scratch", *TUNE], []
    flags = [*flags, "--branch_init", 1]
    for parts, amp in (1, "off"), (4, "off"), (2, "fp16"):
        call(module, *flags, "--epochs", 1, "--accum_steps", parts, "--amp", amp,
             "--out", tmp_path / f"{parts}")
    torch.testing.assert_close(found[0], found[6], rtol=1e-4, atol=1e-6)
    whole, half = (torch.cat([grad.flatten() for grad in found[n]]) for n in (0, 12))
    assert (half - whole).norm() < 0.02 * whole.norm()


class NoWaiting(TorchDispatchMode):
    """Raises at what would wait for a GPU: a number or a shape that depends on values."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, by_mask = func.overloadpacket.__name__, False
        if name in ("index", "index_put_"):
            by_mask = any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not by_mask and not name.startswith(self.names), func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("module", [train, finetune])
def test_the_loop_waits_for_no_gpu_between_looks(unbroken, tmp_path, monkeypatch, module):
    """Steps 2 to 5 of 6 are watched, but not loading and two checks that are made on the CPU.

    In all of them batches travel as bytes, and a mask is checked where the loader leaves it.
    """
    steps, moved, watch, move = [], [], contextlib.ExitStack(), torch.Tensor.to
    split = _disable_current_modes()(BootMAE.split)

    def stop_asked(run):
        steps.append(run)
        if len(steps) == 1:
            watch.enter_context(NoWaiting())
        if len(steps) == 5:
            watch.close()
        return False

    def watch_to(x, *args, **options):
        if args and isinstance(args[0], torch.device) and not x.is_floating_point():
            moved.append(x)
            assert options.get("non_blocking")
        return move(x, *args, **options)

    def watch_split(model, images, mask):
        assert all(mask is not x for x in moved)
        return split(model, images, mask)

    monkeypatch.setattr(train.Run, "stop_asked", stop_asked)
    for owner, name in (data.Samples, "__getitem__"), (data.F, "one_hot"):
        monkeypatch.setattr(owner, name, _disable_current_modes()(getattr(owner, name)))
    monkeypatch.setattr(BootMAE, "split", watch_split)
    monkeypatch.setattr(torch.Tensor, "to", watch_to)
    flags = TRAIN if module is train else ["--init", unbroken / "encoder.pt", *TUNE, *AUGMENTED]
    with watch:
        call(module, *flags, "--out", tmp_path, "--epochs", 1, "--log_every", 1000)
    images = [x for x in moved if x.ndim == 4 and len(x) == 8]
    assert len(steps) == 6 <= len(images) and {x.dtype for x in images} == {torch.uint8}


# --------------------------------------------------------------------------------------------------
# The authors' code, which BOOTMAE_OFFICIAL names


def split_biases(weights):
    """As the authors store them: q's and v's apart, none for k."""
    theirs = dict(weights)
    for key in weights:
        attention, dot, layer = key.removesuffix(".bias").rpartition(".")
        if key.endswith(".bias") and layer in ("q", "kv", "qkv"):
            parts = dict(zip(layer, theirs.pop(key).chunk(len(layer))))
            theirs |= {f"{attention}.{name}_bias": parts[name] for name in parts if name != "k"}
    return theirs


def to_official(encoder, regressor, predictor):
    """State dicts of the parts of a BootMAE, as one in the authors' layout."""
    words = dict(embed="down", norm="decode_norm", blocks="decode_blocks", head="lm_head",
                 pos_embed="de_pos_embed", norm_query="norm3", norm_context="norm4",
                 cross_attn="c_attn")
    theirs = dict(encoder)
    for decoder, suffix in (regressor, ""), (predictor, "_1"):
        for key, value in decoder.items():
            part, *rest = (words.get(word, word) for word in key.split("."))
            theirs[".".join([part + suffix, *rest])] = value
    theirs.pop("de_pos_embed_1", None)  # one table serves encoder and predictor
    # Their pixel head is a transposed convolution, with a bias for each channel, not each pixel.
    pixels, p = theirs.pop("lm_head.weight"), round((len(theirs["lm_head.bias"]) / 3) ** 0.5)
    theirs["lm_head.proj.weight"] = pixels.T.unflatten(1, (3, p, p))
    theirs["lm_head.proj.bias"] = theirs.pop("lm_head.bias").view(3, p * p)[:, 0]
    return split_biases(theirs)


@pytest.fixture
def official(monkeypatch):
    """Imports a module of the authors' code, from BOOTMAE_OFFICIAL, without timm or a GPU.

    Stand-ins take the place of old packages, and of their data sets and optimizers, which are not
    run here.
    """
    if not os.environ.get("BOOTMAE_OFFICIAL"):
        pytest.skip("BOOTMAE_OFFICIAL names no checkout of https://github.com/LightDXY/BootMAE")
    anything = MagicMock(register_model=lambda factory: factory, to_2tuple=lambda n: (n, n),
                         trunc_normal_=torch.nn.init.trunc_normal_, inf=math.inf)
    names = """timm timm.models timm.models.layers timm.models.registry timm.utils torch._six
               torchvision torchvision.utils tensorboardX datasets optim_factory""".split()
    monkeypatch.syspath_prepend(os.path.abspath(os.environ["BOOTMAE_OFFICIAL"]))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda.amp, "autocast", contextlib.nullcontext)
    monkeypatch.setattr(random, "randint", lambda low, high: low)  # their mask is not rolled

    def load(name):
        with patch.dict("sys.modules", dict.fromkeys(names, anything)):  # forgets them afterwards
            return importlib.import_module(name)

    return load


def official_vit(module, monkeypatch, class_name, factory, **sizes):
    """What their ViT-B `factory` builds, but with other `sizes`; float64."""
    build = getattr(module, class_name)
    monkeypatch.setattr(module, class_name, lambda **settings: build(**settings | sizes))
    return getattr(module, factory)().double()


def grads_of(module):
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def assert_same_gradients(ours, theirs):
    """Both by their names; to 1e-6 of each tensor's largest."""
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert grad.abs().max() > 0, name
        near(ours[name], grad, atol=1e-6 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("weighted", [True, False])
def test_official_pretraining(official, monkeypatch, weighted):
    """One step of their train_one_epoch: ViT-B's 12 blocks and heads, but 96 and 64 wide."""
    torch.manual_seed(0)
    ours = shaken(BootMAE(32, 4, 96, 12, 12, decoder_dim=64, weighted_loss=weighted).double())
    # Features, and below pixels, are so alike that the norms' eps count.
    ours.predictor.head.weight.data *= 0.01
    ours.predictor.head.bias.data *= 0.01
    bias = ours.regressor.head.bias.data.view(3, 16)
    bias.copy_(bias[:, :1].clone())  # theirs is one for each channel
    script, module = official("run_pretraining"), official("models.modeling_pretrain_bootmae")
    theirs = official_vit(module, monkeypatch, "VisionTransformerForMaskedImageModeling",
                          "bootmae_base", img_size=32, patch_size=4, embed_dim=96, decode_dim=64)
    tables = ours.encoder.pos_embed, ours.regressor.pos_embed
    near(tables, (theirs.pos_embed.data, theirs.de_pos_embed.data))
    parts = ours.encoder, ours.regressor, ours.predictor
    theirs.load_state_dict(to_official(*(part.state_dict() for part in parts)))
    average = copy.deepcopy(theirs)
    average.load_state_dict(split_biases(ours.teacher.state_dict()), strict=False)
    images = torch.rand(3, 3, 32, 32).double() * 2 - 1
    images *= torch.tensor([1, 0.1, 0.01]).view(3, 1, 1, 1)
    mask = block_mask(3, (8, 8), 48)

    seen = []
    theirs.register_forward_hook(lambda module, args, out: seen.append(out))
    theirs.__dict__["module"] = theirs  # as of DistributedDataParallel
    scaler = MagicMock(side_effect=lambda loss, *args, **named: loss.backward() or 0.0)
    scaler.state_dict.return_value = {"scale": 1.0}
    args = SimpleNamespace(feature_weight=1, epochs=8, window_size=(8, 8), patch_size=(4, 4),
                           mask_num=48, weight_mask=weighted, model_ema_decay=0.999)
    losses = script.train_one_epoch(  # epoch 0 of 8: the feature loss counts half
        theirs, [((images, mask), None)], MagicMock(), torch.device("cpu"), 0, scaler, rank=1,
        start_steps=0, update_freq=1, args=args, model_ema=MagicMock(ema=average))

    out = ours(images, mask)
    (out.pixel_loss + 0.5 * out.feature_loss).backward()
    assert torch.equal(out.masked, mask.nonzero()[:, 1].view(3, 48))
    near(out.pixels, patchify(seen[0][0], 4)[mask].view(3, 48, 48), atol=1e-8)
    near(out.features, seen[0][1][mask].view(3, 48, 96), atol=1e-8)
    assert float(out.pixel_loss) == pytest.approx(losses["Rloss"], rel=1e-6)
    assert float(out.feature_loss) == pytest.approx(losses["Ploss"], rel=1e-6)
    grads = to_official(*map(grads_of, parts))
    grads["lm_head.proj.bias"] = ours.regressor.head.bias.grad.view(3, 16).sum(dim=1)
    assert_same_gradients(grads, grads_of(theirs))


def test_official_fine_tuning(official, monkeypatch):
    """ViT-B's blocks and heads but 96 wide; the grid is 14 x 14, as their positions always are."""
    torch.manual_seed(0)
    ours = shaken(ViT(56, 4, 96, 12, 12, num_classes=7).double())
    module = official("models.modeling_finetune_bootmae")
    theirs = official_vit(module, monkeypatch, "VisionTransformer", "bootmae_base_patch16_224",
                          img_size=56, patch_size=4, embed_dim=96, num_classes=7)
    theirs.load_state_dict(split_biases(ours.state_dict()))
    images, labels = torch.rand(3, 3, 56, 56).double() * 2 - 1, torch.tensor([0, 3, 6])
    logits = ours(images), theirs(images)
    for answers in logits:
        F.cross_entropy(answers, labels).backward()
    near(*logits, atol=1e-8)
    assert_same_gradients(split_biases(grads_of(ours)), grads_of(theirs))


# --------------------------------------------------------------------------------------------------
# model.py


def test_resized_positions_keep_cls_and_smooth_maps():
    ramp = torch.arange(48.0).view(1, 48, 1).repeat(1, 1, 4)
    table = torch.cat([torch.full((1, 1, 4), 7.0), ramp], dim=1)
    resized = resize_positions(table, (6, 8), (12, 4))
    expected = F.interpolate(ramp.view(6, 8, 4).permute(2, 0, 1)[None], (12, 4), mode="bicubic")
    near(resized, torch.cat([table[:, :1], expected.flatten(2).mT], dim=1), atol=1e-4)
    assert resize_positions(table, (6, 8), (6, 8)) is table


@pytest.mark.parametrize("changes", [{}, {"inject": (0, 0)}, {"feature_target": False}], ids=str)
def test_each_loss_trains_its_decoder_and_all_of_the_encoder(changes):
    """A parameter that no loss trains would stop DistributedDataParallel."""
    model, images, mask = small_model(**changes)
    losses, decoders = model(images, mask)[:2], (model.regressor, model.predictor)
    for loss, decoder in zip(losses, decoders if model.teacher else decoders[:1]):
        model.zero_grad()
        loss.backward(retain_graph=True)
        trained = {*model.encoder.parameters(), *decoder.parameters()}
        assert trained == {p for p in model.parameters() if p.grad is not None}
        assert all(p.grad.abs().max() > 0 for p in trained)


def test_weights_start_xavier_uniform_and_tokens_small():
    """q, k and v each are a matrix of their own; the teacher starts as the encoder."""
    torch.manual_seed(0)
    model = BootMAE(32, 8, embed_dim=64, depth=2, num_heads=4, decoder_dim=32, decoder_depth=2)
    for name, module in model.named_modules():
        if hasattr(module, "weight") and "norm" not in name:
            fused = {"qkv": 3, "kv": 2}.get(name.split(".")[-1], 1)
            for matrix in module.weight.flatten(1).chunk(fused):
                bound = math.sqrt(6 / sum(matrix.shape))
                assert 0.95 * bound < matrix.abs().max() <= bound, name
            assert module.bias.abs().max() == 0, name
    assert_same(model.teacher.state_dict(), model.encoder.state_dict())
    for decoder in model.regressor, model.predictor:
        assert 0.014 < decoder.mask_token.std() < 0.026
    assert 0 < model.encoder.cls_token.abs().max() < 1e-4
    head = ViT(32, 8, embed_dim=64, depth=1, num_heads=4, num_classes=100).head
    assert 1.9e-5 < head.weight.std() < 2.1e-5 and head.bias.abs().max() == 0


def test_sizes_are_those_of_timm_and_need_no_memory():
    with torch.device("meta"):
        models = [BootMAE(**SIZES[name]) for name in ("tiny", "small", "base", "large")]
    assert all(x.is_meta for model in models for x in model.state_dict().values())
    millions = [sum(p.numel() for p in model.encoder.parameters()) / 1e6 for model in models]
    assert millions == pytest.approx([5.5, 21.6, 85.6, 303.1], abs=0.1)  # less the positions


def test_drop_path():
    """A sample's branch is dropped or scaled up by 1 / keep; rates rise from block to block."""
    model = ViT(img_size=8, patch_size=4, embed_dim=8, depth=4, num_heads=2, drop_path=0.3)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    block = model.blocks[3].train()
    kept = block.drop(torch.ones(4000, 2, 8))
    assert torch.equal(kept, kept[:, :1, :1].expand(-1, 2, 8))
    near(kept.unique(), torch.tensor([0, 1 / 0.7]))
    assert abs(kept.mean() - 1) < 0.05


def test_classifier_and_feature_maps_match_the_definition():
    torch.manual_seed(0)
    vit = shaken(ViT(**SMALL, num_classes=5, drop_path=0.3).double()).eval()
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    w, maps = vit.state_dict(), vit.feature_maps(images, (3, 1))
    outputs = naive_encoder(w, "", naive_patches(images[1].detach()), range(6))
    for number, fmap in zip((3, 1), maps):
        near(fmap[1], torch.stack(outputs[number - 1][1:]).T.view(24, 2, 3))
    mean = norm(w, "fc_norm", [sum(outputs[2][1:]) / 6])[0]
    near(vit(images)[1], linear(w, "head", mean))
    maps[0].sum().backward()
    assert images.grad.abs().amax(dim=1).min() > 0
    larger = torch.rand(1, 3, 24, 8, dtype=torch.float64)
    assert vit.feature_maps(larger, (2,))[0].shape == (1, 24, 6, 2)
    with pytest.raises(ValueError, match="1 to 3"):
        vit.feature_maps(images, (0,))


def test_exported_networks_take_any_batch():
    class Network(ViT):
        def forward(self, images):
            return super().forward(images), self.feature_maps(images, (1, 3))[0]

    network, images = Network(**SMALL).eval(), torch.rand(5, 3, 8, 12)
    batch = {"images": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(network, (images[:2],), dynamic_shapes=batch).module()
    near(exported(images), network(images))


def test_compiled_forward_and_gradients_are_the_same():
    model, images, mask = small_model(decoder_depth=1)
    torch._dynamo.reset()
    results, backend = [], CompileCounterWithBackend("aot_eager")
    for network in model, torch.compile(model, backend=backend):
        model.zero_grad()
        out = network(images, mask)
        (out.pixel_loss + out.feature_loss).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([out.pixels, out.pixel_loss, out.feature_loss, *grads])
    torch.testing.assert_close(*results)
    assert backend.frame_count == 1  # one graph of all but the check of the mask
    vit = ViT(**SMALL, num_classes=5, drop_path=0.3)
    torch.compile(vit, backend="eager", fullgraph=True)(torch.rand(2, 3, 8, 12))


def run_small(size=(8, 12), mask=None):
    return small_model()[0](torch.zeros(2, 3, *size, dtype=torch.float64), mask)


def rows_hiding(*counts):
    return torch.arange(6) < torch.tensor(counts)[:, None]


@pytest.mark.parametrize("call, message", [
    (lambda: ViT(embed_dim=30, num_heads=3), "embed_dim 30 is not divisible by 4"),
    (lambda: ViT(embed_dim=32, num_heads=3), "not divisible by num_heads 3"),
    (lambda: run_small((8, 8), rows_hiding(3, 3)), r"images are \(8, 8\)"),
    (lambda: run_small(mask=rows_hiding(3, 3)[:, :5]), r"mask is .*\(2, 5\)"),
    (lambda: run_small(mask=rows_hiding(3, 3).float()), "must be torch.bool"),
    (lambda: run_small(mask=rows_hiding(3, 4)), "3 to 4 of 6"),
    (lambda: run_small(mask=rows_hiding(6, 6)), "6 to 6 of 6"),
    (lambda: ViT(**SMALL)(torch.zeros(1, 3, 20, 20)), "img_size="),
    (lambda: load_vit("x.pt", pixels="0..1"), "signed or imagenet"),
    (lambda: random_mask(2, 6, 7), "cannot mask 7 of 6"),
    (lambda: block_mask(2, (2, 3), -1), "cannot mask -1 of 6"),
    (lambda: loss_weight(torch.zeros(2, 5, dtype=torch.bool), (2, 3)), "2 x 3 grid needs"),
])
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------
# model.py: files of weights


def small_vit(**changes):
    torch.manual_seed(0)
    return ViT(**dict(img_size=32, patch_size=8, **SIZES["nano"]) | changes)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a file of every origin that --init takes, and the weights that are in them."""
    folder = tmp_path_factory.mktemp("files")
    model = BootMAE(img_size=32, patch_size=8, **SIZES["nano"], decoder_dim=64)
    model.teacher.load_state_dict(small_vit().state_dict())  # of another seed
    encoder, classifier = model.encoder.state_dict(), small_vit(num_classes=12).state_dict()
    for n in range(4):
        classifier[f"blocks.{n}.attn.qkv.bias"][:128] = 1  # q's
    parts = model.encoder, model.regressor, model.predictor
    official = {"model": to_official(*(part.state_dict() for part in parts)),
                "model_ema": split_biases(model.teacher.state_dict())}
    about = {"args": argparse.Namespace(model="pretrain_base", epochs=800), "epoch": 799}
    decoder = {"mask_token": torch.zeros(1, 1, 64), "decoder_embed.weight": torch.zeros(64, 128)}
    head = {"head.weight": torch.zeros(12, 128), "head.bias": torch.zeros(12)}  # on the CLS token
    wrapped = {f"module._orig_mod.{key}": x for key, x in encoder.items()}
    for name, content in {
        "checkpoint.pt": {"model": model.state_dict(), "optimizer": {}, "step": 1},
        "encoder.pt": encoder, "lightning.ckpt": {"state_dict": wrapped, "epoch": 3},
        "best.pt": {"model": classifier, "classes": list("abcdefghijkl"), "crop_ratio": 1.0},
        "mae.pth": {"model": encoder | decoder}, "timm.pth": encoder | head,
        "two_norms.pth": classifier | {"norm.weight": torch.ones(128)},
        "theirs.pth": official | about, "theirs_alone.pth": {"model": official["model"]},
        "theirs_tuned.pth": {"module": split_biases(classifier)} | about,
        "empty.pt": {}, "numbers.pt": {3: torch.zeros(3)},
        "gray.pt": small_vit(in_chans=1).state_dict(),
    }.items():
        torch.save(content, folder / name)
    weights = {"encoder": encoder, "teacher": model.teacher.state_dict(), "classifier": classifier}
    return folder, weights


@pytest.mark.parametrize("name, part, words", [
    ("checkpoint.pt", "encoder", "left out: norm; new: fc_norm, head; 4 heads"),
    ("checkpoint.pt", "teacher", "left out: norm; new: fc_norm, head; 4 heads"),
    ("theirs.pth", "encoder", "lm_head, lm_head_1, mask_token, mask_token_1, norm; new: fc_norm"),
    ("theirs.pth", "teacher", "left out: norm; new: fc_norm"),
    ("encoder.pt", "encoder", "new: fc_norm, head"), ("lightning.ckpt", "encoder", "new: fc_norm"),
    ("mae.pth", "encoder", "decoder_embed, mask_token, norm; new: fc_norm, head; 4 heads; taken"),
    ("timm.pth", "encoder", "out: head, norm; new: fc_norm, head"),
    ("two_norms.pth", "encoder", "out: head, norm; new: head"),
    ("best.pt", "classifier", "left out: nothing; new: nothing; 4 heads"),
    ("theirs_tuned.pth", "classifier", "left out: nothing; new: nothing; 4 heads"),
])
def test_weights_of_every_origin(files, name, part, words):
    folder, weights = files
    said = []
    model = load_vit(folder / name, None, 12, teacher=part == "teacher", report=said.append)
    assert name in said[0] and words in said[0]
    sure = name in ("checkpoint.pt", "best.pt") or "theirs" in name
    assert ("--init_pixels imagenet" not in said[0]) == sure
    wanted = weights["classifier" if name == "two_norms.pth" else part]
    for key, value in model.state_dict().items():
        if part == "classifier" or key.startswith("blocks"):
            assert torch.equal(value, wanted[key]), key


FOREIGN = """patch_embed.proj.0.weight dist_token reg_token blocks.0.attn.q_proj.weight
             blocks.0.gamma_1 blocks.1.attn.relative_position_bias_table norm_pre.weight
             blocks.0.mlp.fc1_g.weight blocks.3.attn.q_norm.weight attn_pool.q.weight""".split()


@pytest.mark.parametrize("key, value, words", [  # ones of this shape; None takes a tensor out
    *[(key, (128,), f"it has {key}, which a plain ViT lacks") for key in FOREIGN],
    ("patch_embed.proj.weight", (128, 192), "no patch_embed.proj.weight of 4 dimensions"),
    ("patch_embed.proj.weight", (128, 3, 8, 4), "mismatch for patch_embed.proj.weight"),
    ("pos_embed", (1, 16, 128), "pos_embed has 16 positions, a square: none for CLS"),
    ("pos_embed", (1, 18, 128), "has 18 positions, not one for CLS and a square; if its images"),
    ("cls_token", None, "no cls_token"),
    ("features.encoder.cls_token", (1, 1, 128), "is of a linear probe"),
    ("blocks.2.norm1.bias", None, 'Missing key(s) in state_dict: "blocks.2.norm1.bias"'),
    ("blocks.1.mlp.fc1.weight", (256, 128), "size mismatch for blocks.1.mlp.fc1.weight"),
    ("blocks.5.norm1.bias", (128,), "has 6 blocks of width 128"),
    ("norm.bias", torch.full((128,), math.inf), "norm.bias has values that are not finite"),
    ("vit.embeddings.patch_embeddings.projection.bias", (128,), "transformers'"),
])
def test_other_networks_are_refused_with_the_reason(files, tmp_path, key, value, words):
    state = dict(files[1]["encoder"])
    state.pop(key, None)
    if value is not None:
        state[key] = value if torch.is_tensor(value) else torch.ones(value)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt.*{re.escape(words)}"):
        load_vit(tmp_path / "x.pt")


def test_load_vit_takes_head_and_sizes_from_the_file_or_the_caller(tmp_path):
    """No tensor tells the number of heads: it is known for the SIZES. None is 3 blocks deep."""
    path, said, images = tmp_path / "x.pt", [], torch.rand(2, 3, 32, 32)
    torch.save((classifier := small_vit(num_classes=7)).state_dict(), path)
    assert torch.equal(load_vit(path)(images), classifier(images))              # the file's head
    assert load_vit(path, num_classes=5)(images).shape == (2, 5)                # a new one
    assert load_vit(path, num_classes=0)(images).shape == (2, 128)              # none
    assert not load_vit(path, drop_path=0.2).training
    shallow = shaken(small_vit(num_heads=8, depth=3))
    torch.save(shallow.state_dict(), path)
    with pytest.raises(ValueError, match="3 blocks of width 128.*give --num_heads"):
        load_vit(path)
    assert torch.equal(load_vit(path, num_heads=8, report=said.append)(images), shallow(images))
    assert "; 8 heads" in said[0]
    settings = {"num_heads": None, "sizes": {"num_heads": 8}}  # of a fine-tuned encoder of 8
    torch.save({"model": shallow.state_dict(), "settings": settings}, path)
    assert load_vit(path).blocks[0].attn.num_heads == 8


def test_imagenet_pixels_are_folded_into_the_patch_embedding(tmp_path):
    """The network, given pixels of ImageNet's mean and deviation, is the file's, given -1 .. 1."""
    torch.manual_seed(0)
    vit, pixels, said = shaken(small_vit()).eval(), torch.rand(2, 3, 32, 32), []
    torch.save(vit.state_dict(), tmp_path / "x.pt")
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    loaded = load_vit(tmp_path / "x.pt", pixels="imagenet", report=said.append)
    assert "ImageNet's mean and deviation folded" in said[0]
    near(loaded(2 * pixels - 1), vit((pixels - mean) / std), atol=1e-5)


def test_grids_that_are_not_square(tmp_path):
    """2 x 8 patches are as many as 4 x 4; sin-cos positions tell which, learned ones do not."""
    path, said = tmp_path / "x.pt", []
    for size in (32, 16), (16, 64), (24, 40):  # the last has 16 positions, a square
        vit = small_vit(img_size=size)
        torch.save(vit.state_dict(), path)
        loaded = load_vit(path)
        assert loaded.grid == vit.grid and torch.equal(loaded.pos_embed, vit.pos_embed)
    load_vit(path, img_size=32, report=said.append)
    assert "positions interpolated from 3 x 5 to 4 x 4" in said[0]
    state = small_vit().state_dict() | {"pos_embed": torch.randn(1, 13, 128)}
    torch.save(state, path)
    assert torch.equal(load_vit(path, img_size=(16, 48)).pos_embed, state["pos_embed"])
    with pytest.raises(ValueError, match="img_size"):
        load_vit(path)


def test_safetensors_need_their_package(files, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    reader = SimpleNamespace(load_file=lambda path: files[1]["encoder"])
    monkeypatch.setitem(sys.modules, "safetensors.torch", reader)
    assert_same(load_vit(path).state_dict(), files[1]["encoder"])
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    with pytest.raises(ValueError, match="x.safetensors .*ModuleNotFoundError.*safetensors"):
        read_file(path)


# --------------------------------------------------------------------------------------------------
# masking.py


def naive_blocks(rows, columns, count, uniform):
    """A set of patches (row, column): rectangles of 16 to 60 of 196 patches, as far as 120."""
    unit, hidden = rows * columns / 196, set()
    target = min(round(120 * unit), count)
    for _ in range(1000):
        area, aspect = (16 + 44 * uniform()) * unit, 0.3 ** (2 * uniform() - 1)
        h, w = max(round((area * aspect) ** 0.5), 1), max(round((area / aspect) ** 0.5), 1)
        if h <= rows and w <= columns:
            top, left = int(uniform() * (rows - h + 1)), int(uniform() * (columns - w + 1))
            block = {(top + y, left + x) for y, x in np.ndindex(h, w)}
            hidden |= block if len(hidden | block) <= target else set()
        if len(hidden) == target:
            break
    return hidden


@pytest.mark.parametrize("grid", [(14, 14), (3, 5), (7, 20), (1, 9), (2, 2)], ids=str)
def test_masks_have_exact_counts_and_block_masks_are_blocks_filled_up(grid):
    n = grid[0] * grid[1]
    for seed, count in itertools.product(range(5), {0, 1, n // 2, round(n * 120 / 196), n - 1, n}):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        masks = block_mask(3, grid, count, generators[0])
        for mask in masks, random_mask(3, n, count, generators[0]):
            assert mask.dtype == torch.bool and mask.sum(dim=1).tolist() == [count] * 3
        uniform = random.Random(int(torch.randint(2**62, (), generator=generators[1]))).random
        for mask in masks.view(3, *grid).numpy():
            assert naive_blocks(*grid, count, uniform) <= set(zip(*mask.nonzero()))
        expected = torch.tensor([naive_weight(row, *grid) for row in masks.int().tolist()])
        near(loss_weight(masks, grid), expected)


def test_random_masks_all_differ_and_reach_every_patch():
    masks = random_mask(200, 64, 48)
    assert len(masks.unique(dim=0)) == 200
    assert (masks.float().mean(dim=0) - 48 / 64).abs().max() < 0.2


# --------------------------------------------------------------------------------------------------
# data.py: sources


def save_at(path, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (40, 40), "red")).save(path)


def test_a_folders_images_and_classes(tmp_path):
    names = ["b/2.jpg", "b/10.PNG", "a/x.jpg/deep/1.webp", "a/z.tif", "ü ☃/é.gif", "top.bmp"]
    others = ["a/.hidden.png", "a/.ipynb_checkpoints/1.png", ".thumbnails/1.png", "none/1.pdf"]
    for name in names + others:
        save_at(tmp_path / name)
    folder = data.ImageFolder(tmp_path)
    assert [os.path.relpath(folder.name(i), tmp_path) for i in range(6)] == sorted(names)
    assert folder.classes == ["a", "b", "ü ☃"]
    assert folder.labels.tolist() == [0, 0, 1, 1, -1, 2] and len(folder) == 6
    given = data.ImageFolder(tmp_path, ["ü ☃", "more", "b", "a"])
    assert given.labels.tolist() == [3, 3, 2, 2, -1, 0]
    assert folder.fingerprint.startswith("6 images of 3 classes, ")


def test_fingerprints_tell_images_and_classes_but_not_where_they_are(tmp_path):
    """A moved image, a renamed class and image, one more, larger files; the same ones elsewhere."""
    names = ["a/1.png a/2.png b/3.png", "a/1.png b/2.png b/3.png", "c/1.png c/2.png b/3.png",
             "a/1.png a/2.png b/4.png", "a/1.png a/2.png b/3.png b/4.png"]
    folders = []
    for number, line in enumerate([*names, names[0], names[0]]):
        side = 400 if number == 5 else 40
        for name in line.split():
            save_at(tmp_path / str(number) / name, Image.new("RGB", (side, side)))
        folders.append(data.ImageFolder(tmp_path / str(number)))
    sources = [*folders[:6], data.ImageFolder(tmp_path / "0", ["b", "a"])]
    sources += [data.Shapes(9, 16), data.Shapes(9, 16, start=9), data.Shapes(9, 8)]
    sources += [data.Subset(folders[n], chosen) for n, chosen in ((0, [0]), (0, [1]), (1, [0]))]
    assert len({source.fingerprint for source in sources}) == len(sources)
    assert folders[6].fingerprint == folders[0].fingerprint


def test_a_folder_with_loops_odd_bytes_and_a_long_path(tmp_path):
    save_at(tmp_path / "a" / "x.png")
    os.link(tmp_path / "a" / "x.png", os.fsencode(tmp_path) + b"/\xff\xfe.png")  # no valid UTF-8
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    os.symlink("self", tmp_path / "a" / "self")
    long = "/".join(["b" * 250] * 8)
    save_at(tmp_path / long / "x.png")
    folder = data.ImageFolder(tmp_path)
    found = [os.fsencode(os.path.relpath(folder.name(i), tmp_path)) for i in range(len(folder))]
    assert found == [b"a/x.png", f"{long}/x.png".encode(), b"\xff\xfe.png"]
    assert folder.open(2).size == (40, 40)
    assert len(ForkingPickler.dumps(folder)) < 2 * len(long)  # other paths take no more for it


def test_shapes_are_of_many_classes_in_turn_and_all_differ():
    shapes, later = data.Shapes(480, 16), data.Shapes(5, 16, start=7)
    images, labels = np.stack([shapes.open(i) for i in range(480)]), shapes.labels
    assert images.shape == (480, 16, 16, 3) and len(set(map(bytes, images))) == 480
    assert len(data.SHAPES) >= 10
    assert labels.tolist() == [i % len(data.SHAPES) for i in range(480)]
    assert later.labels.tolist() == labels[7:12].tolist()
    assert all(np.array_equal(later.open(i), images[7 + i]) for i in range(5))

    light, classes = images.mean(axis=3), range(len(data.SHAPES))
    means = np.stack([light[:360][labels[:360] == c].mean(axis=0) for c in classes])
    distances = ((light[360:, None] - means) ** 2).sum(axis=(2, 3))
    assert (distances.argmin(axis=1) == labels[360:]).mean() > 0.5
    red = (images[..., 0] - light).mean(axis=(1, 2))  # tells nothing
    assert np.std([red[labels == c].mean() for c in classes]) < 0.4 * red.std()


# --------------------------------------------------------------------------------------------------
# data.py: views. Test images have four quarters, each of one colour.

T, BICUBIC = Image.Transpose, Image.Resampling.BICUBIC
TURNS = [None, T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_90,
         T.TRANSVERSE, T.ROTATE_270]  # what EXIF's orientations 1 to 8 undo
COLOURS = np.uint8([[250, 20, 30], [40, 200, 10], [20, 60, 220], [0, 0, 0]])
LEVELS = np.uint8([0, 255, 77, 180])
CUT, VEIL = np.uint8([0, 255, 255, 255]), np.uint8([0, 128, 255, 255])  # opacity of the quarters


def quarters(values):
    """64 x 48 pixels, uint8 or another dtype; values are (4,) or (4, channels)."""
    pixels = values.reshape(2, 2, *values.shape[1:])
    return pixels.repeat(24, axis=0).repeat(32, axis=1)


def picture(values):
    return Image.fromarray(quarters(values))


def middles(image):
    """The colours in the middles of the quarters, (4, 3)."""
    rows, columns = image.height // 4, image.width // 4
    return np.asarray(image, dtype=float)[rows :: 2 * rows, columns :: 2 * columns].reshape(4, -1)


def png_16(pixels):
    """By hand, because Pillow writes no 16-bit colours; pixels are uint16 (H, W, bands)."""
    H, W, bands = pixels.shape
    header = struct.pack(">IIBB3x", W, H, 16, {2: 4, 3: 2, 4: 6}[bands])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND":
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


def tiff(pixels, order="<", deflate=False, **extra):
    """Likewise. Header and tags fill 200 bytes, the bits of each band 8, then come the pixels."""
    (H, W, bands), bits = pixels.shape, 8 * pixels.itemsize
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    content = zlib.compress(content) if deflate else content
    tags = {256: W, 257: H, 258: 200 if bands > 1 else bits, 259: 8 if deflate else 1,
            262: 2 if bands > 1 else 1, 273: 208, 277: bands, 278: H, 279: len(content)}
    tags |= {int(tag[1:]): value for tag, value in extra.items()}
    head = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    for tag, value in tags.items():
        head += struct.pack(order + "HHII", tag, *((3, bands) if tag == 258 else (4, 1)), value)
    return head.ljust(200, b"\0") + struct.pack(order + "4H", *[bits] * 4) + content


RGB, PALETTE = picture(COLOURS), picture(COLOURS).quantize(4)
RGBA_PIXELS = quarters(np.c_[COLOURS, VEIL])
RGBA = Image.fromarray(RGBA_PIXELS)
DEEP = LEVELS * np.uint16(16)  # 12 of 16 bits in use
DEEP_RGB, STRETCHED = COLOURS * np.uint16(16), COLOURS * (255 / COLOURS.max())
DEEP_RGBA = quarters(np.c_[DEEP_RGB, VEIL * np.uint16(257)])
# A name, an image or what is in the file, the colours that its quarters must have, and the opacity
# of these, below which is white. A TIFF's tag 338 says what a fourth band is (2: opacity).
KINDS = {
    "rgb.png": (RGB, COLOURS), "rgb_cut.png": (RGB, COLOURS, CUT),
    "rgba.png": (RGBA, COLOURS, VEIL), "rgba.tif": (RGBA, COLOURS, VEIL),
    "p.gif": (PALETTE, COLOURS), "p_cut.png": (PALETTE, COLOURS, CUT),
    "cmyk.jpg": (RGB.convert("CMYK"), COLOURS),
    "la.png": (picture(np.c_[LEVELS, VEIL]), LEVELS, VEIL),
    "1.png": (picture(LEVELS).point(lambda v: 255 * (v > 99), "1"), 255 * (LEVELS > 99)),
    "16.png": (picture(DEEP), LEVELS), "16_cut.png": (picture(DEEP), LEVELS),
    "16.tif": (picture(DEEP), LEVELS), "16b.tif": (picture(DEEP.astype(">u2")), LEVELS),
    "f.tif": (picture(LEVELS / np.float32(9) - 7), LEVELS),
    "signed.tif": (picture((np.int32(LEVELS) - 128) * 2**24), LEVELS),
    "unsigned.tif": (tiff(quarters(LEVELS[:, None] * np.uint32(2**24))), LEVELS),
    "a fourth band of no kind.tif": (tiff(RGBA_PIXELS, t338=0), COLOURS),
    "a fourth band without a word.tif": (tiff(RGBA_PIXELS), COLOURS),
    "multiplied.tif": (tiff(quarters(np.uint8(np.c_[COLOURS * (VEIL[:, None] / 255), VEIL])),
                            t338=1), COLOURS, VEIL),
    "rgb_16.png": (png_16(quarters(DEEP_RGB)), STRETCHED),
    "rgba_16.png": (png_16(DEEP_RGBA), STRETCHED, VEIL),
    "la_16.png": (png_16(quarters(np.c_[DEEP, VEIL * np.uint16(257)])), LEVELS, VEIL),
    "little.tif": (tiff(quarters(DEEP_RGB)), STRETCHED),
    "deflate.tif": (tiff(quarters(DEEP_RGB), ">", deflate=True), STRETCHED),
    "rgba_16.tif": (tiff(DEEP_RGBA, ">", t338=2), STRETCHED, VEIL),
    "undeclared_16.tif": (tiff(DEEP_RGBA), STRETCHED),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_becomes_rgb(tmp_path, name):
    """Also in a second view of the same image, which is decoded by then."""
    content, colours, opacity = (*KINDS[name], CUT | 255)[:3]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        cut = {"transparency": content.getpixel((0, 0))} if "cut" in name else {}
        content.save(tmp_path / name, quality=95, **cut)
    image = Image.open(tmp_path / name)
    expected = 255 + (colours.reshape(4, -1) - 255.0) * opacity[:, None] / 255
    for _ in range(2):
        out = data.crop_resize(image, (0, 0, *image.size), 32)
        assert out.mode == "RGB" and out.size == (32, 32)
        assert np.abs(middles(out) - expected).max() <= (4 if name.endswith("jpg") else 1)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("extra", [{"t284": 2}, {"t338": 1}], ids=["planes", "multiplied"])
def test_colours_of_16_bits_that_pillow_misreads_are_refused(tmp_path, extra, deflate):
    (tmp_path / "x.tif").write_bytes(tiff(DEEP_RGBA, "<", deflate, **extra))
    with pytest.raises(ValueError, match="separate planes, or multiplied by the opacity"):
        data.to_rgb(Image.open(tmp_path / "x.tif"))


def test_pixels_that_are_not_finite_become_the_minimum_of_the_others():
    pixels = np.float32([[3, np.nan, np.inf], [-np.inf, 5, 4]])
    levels = np.asarray(data.to_rgb(Image.fromarray(pixels)))[..., 0]
    assert levels.tolist() == [[0, 0, 0], [0, 255, 128]]
    for pixels in np.uint16([[7, 7]]), np.float32([[3, np.nan]]), np.float32([[np.nan, np.inf]]):
        with pytest.raises(ValueError, match="same value, or none is finite"):
            data.to_rgb(Image.fromarray(pixels))


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation, turn", list(enumerate(TURNS, start=1)))
def test_every_view_is_upright(tmp_path, orientation, turn, kind):
    exif, turned = Image.Exif(), RGB if turn is None else RGB.transpose(turn)
    exif[0x0112] = orientation
    turned.save(tmp_path / f"x.{kind}", exif=exif, lossless=True, quality=95)
    for crop in (
        lambda image: data.crop_resize(image, (0, 0, *image.size), 32),
        lambda image: data.center_crop(image, 32, 1),
        # The whole of 4 : 3 is as wide as a crop gets, and nothing else of this area fits.
        lambda image: data.random_resized_crop(image, 32, random.Random(0), (1, 1)),
    ):
        out = crop(Image.open(tmp_path / f"x.{kind}"))
        assert out.size == (32, 32)
        assert np.abs(middles(out) - COLOURS).max() <= (4 if kind == "jpg" else 1)


TEXT = struct.pack(  # where a number should be: an XResolution of "72 ", after an orientation of 3
    "<2sHIHHHIIHHI4sI", b"II", 42, 8, 2, 0x0112, 3, 1, 3, 0x011A, 2, 4, b"72 ", 0)


@pytest.mark.parametrize("image, exif", [(RGB, b"garbage"), (RGB.transpose(T.ROTATE_180), TEXT)])
def test_odd_exif_does_no_harm(tmp_path, image, exif):
    image.save(tmp_path / "x.png", exif=exif)
    out = data.center_crop(Image.open(tmp_path / "x.png"), 32, 1)
    assert np.abs(middles(out) - COLOURS).max() <= 1


@pytest.mark.parametrize("box, shrink", [
    ((0, 0, 1101, 807), 8), ((301, 100, 1101, 807), 8), ((5, 7, 400, 407), 4),
    ((100.5, 50.25, 700, 790), 4), ((0, 0, 230, 200), 2), ((40, 40, 160, 150), 1),
], ids=str)
def test_large_jpegs_are_decoded_small(tmp_path, box, shrink):
    """To at least twice the pixels wanted; the opened image stays as it is, for another view."""
    noise = np.random.default_rng(0).integers(0, 256, (75, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((1101, 807), BICUBIC).save(tmp_path / "x.jpg", quality=92)
    opened, draft = Image.open(tmp_path / "x.jpg"), JpegImageFile.draft
    with patch.object(JpegImageFile, "draft", autospec=True, side_effect=draft) as drafted:
        view = data.crop_resize(opened, box, 40)
    width = drafted.call_args.args[0].width if drafted.called else 1101
    assert round(1101 / width) == shrink and opened.size == (1101, 807)
    expected = Image.open(tmp_path / "x.jpg").convert("RGB").resize((40, 40), BICUBIC, box)
    error = np.abs(np.subtract(view, expected, dtype=int))
    assert error.mean() < 2 if shrink > 1 else not error.any()


def test_flip_mirrors_half_of_the_images():
    rng, mirrored = random.Random(0), RGB.transpose(T.FLIP_LEFT_RIGHT)
    flips = [data.flip(RGB, rng) for _ in range(100)]
    assert 30 < flips.count(mirrored) < 70 and flips.count(RGB) + flips.count(mirrored) == 100


@pytest.mark.parametrize("W, H, scale, middle", [
    (60, 40, (), (3, 0, 56, 40)), (60, 40, (0.08, 0.4), None), (1, 1, (0.08, 1), (0, 0, 1, 1)),
    (1, 500, (0.08, 1), (0, 249, 1, 250)), (1200, 3, (0.08, 1), (598, 0, 602, 3)),
])
def test_random_crops_match_the_definition(W, H, scale, middle):
    """Where none of ten fits, it is the middle, as wide as 4 / 3 allows."""
    image, boxes = Image.new("RGB", (W, H)), set()
    for seed in range(200):
        rng, box = random.Random(seed), middle
        with patch.object(data, "crop_resize") as crop:
            data.random_resized_crop(image, 32, random.Random(seed), *([scale] if scale else []))
        for _ in range(10):
            area, aspect = W * H * rng.uniform(*scale or (0.2, 1)), (4 / 3) ** rng.uniform(-1, 1)
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < w <= W and 0 < h <= H:
                left, top = rng.randint(0, W - w), rng.randint(0, H - h)
                box = left, top, left + w, top + h
                break
        crop.assert_called_once_with(image, box, 32)
        boxes.add(box)
    assert middle is None or middle in boxes


# --------------------------------------------------------------------------------------------------
# data.py: augmentation for fine-tuning

NOISE = np.random.default_rng(0).integers(60, 200, (9, 9, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE).resize((36, 40))
GRAY = (128, 128, 128)


def moved(matrix):
    """An affine matrix in which v is the number."""
    return lambda image, v: image.transform(
        image.size, Image.AFFINE, [v if x == "v" else int(x) for x in matrix], BICUBIC,
        fillcolor=GRAY)


OPERATIONS = {  # as Pillow does it, and the number for m = 0.9 and s = -0.9, and for m = s = 0.45
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), None, None),
    "equalize": (lambda image, _: ImageOps.equalize(image), None, None),
    "invert": (lambda image, _: ImageOps.invert(image), None, None),
    "rotate": (lambda image, v: image.rotate(v, BICUBIC, fillcolor=GRAY), -27, 13.5),
    "posterize": (ImageOps.posterize, 1, 3), "solarize": (ImageOps.solarize, 26, 141),
    "solarize_add": (lambda image, v: image.point(lambda p: p + v * (p < 128)), 99, 49),
    "colour": (lambda image, v: ImageEnhance.Color(image).enhance(v), 0.19, 1.405),
    "contrast": (lambda image, v: ImageEnhance.Contrast(image).enhance(v), 0.19, 1.405),
    "brightness": (lambda image, v: ImageEnhance.Brightness(image).enhance(v), 0.19, 1.405),
    "sharpness": (lambda image, v: ImageEnhance.Sharpness(image).enhance(v), 0.19, 1.405),
    "shear_x": (moved("1v0010"), -0.27, 0.135), "shear_y": (moved("100v10"), -0.27, 0.135),
    "translate_x": (moved("10v010"), -14.58, 7.29), "translate_y": (moved("10001v"), -16.2, 8.1),
}


def test_operations_of_rand_augment():
    assert data.RAND_AUGMENT.keys() == OPERATIONS.keys()
    for name, (operation, *numbers) in OPERATIONS.items():
        for s, number in zip((-0.9, 0.45), numbers):
            out = data.RAND_AUGMENT[name](PHOTO, abs(s), s)
            expected = operation(PHOTO, number)
            assert np.abs(np.subtract(out, expected, dtype=int)).max() <= 1, name
    assert not np.any(data.RAND_AUGMENT["posterize"](PHOTO, 1, 1))  # 0 bits, which Pillow refuses


@pytest.mark.parametrize("magnitude", [0.2, 5, 9.9])
def test_rand_augment_draws_operations_magnitudes_and_signs(monkeypatch, magnitude):
    calls, expected = [], []
    for name in data.RAND_AUGMENT:
        monkeypatch.setitem(data.RAND_AUGMENT, name, lambda *args, name=name: calls.append(
            (name, *args[1:])))
    for seed in range(200):
        data.rand_augment(PHOTO, random.Random(seed), magnitude)
        rng = random.Random(seed)
        for _ in range(2):
            name = rng.choice(list(OPERATIONS))
            if rng.random() < 0.5:
                m = np.clip(rng.gauss(magnitude, 0.5), 0, 10) / 10
                expected.append((name, m, rng.choice((m, -m))))
    assert calls == expected


@pytest.mark.parametrize("H, W", [(36, 24), (8, 60)])
def test_random_erasing_matches_the_definition(H, W):
    """Also where most rectangles do not fit, so that some images stay as they are."""
    images, expected = torch.full((300, 3, H, W), 100.0), torch.zeros(300, 3, H, W).bool()
    torch.manual_seed(0)
    out, rng = data.random_erasing(images, random.Random(0)), random.Random(0)
    for erased in expected:
        for _ in range(10 if rng.random() < 0.25 else 0):
            area, ratio = H * W * rng.uniform(0.02, 1 / 3), 0.3 * (0.3 ** -2) ** rng.random()
            h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if h < H and w < W:
                top, left = rng.randint(0, H - h), rng.randint(0, W - w)
                erased[:, top : top + h, left : left + w] = True
                break
    assert torch.equal(out != 100, expected) and (images == 100).all()  # noise never gets to 100
    noise = out[expected]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert len(noise.unique()) > 0.9 * len(noise)  # not one value for a rectangle


@pytest.mark.parametrize("alphas", [(), (3, 0), (0, 1), (0, 0)], ids=str)
def test_mixup_and_cutmix_match_the_definition(alphas):
    labels, (mixup, cutmix) = torch.tensor([4, 0, 1, 1]), alphas or (0.8, 1)
    one_hot = torch.eye(5)[labels]
    for seed in range(100):
        images, rng = torch.rand(4, 3, 12, 10), random.Random(seed)
        before, kept = images.clone(), torch.ones(12, 10)  # the share that each pixel keeps
        out, targets = data.mixup_cutmix(images, labels, 5, random.Random(seed), *alphas)
        if cutmix and (not mixup or rng.random() < 0.5):
            side = math.sqrt(1 - rng.betavariate(cutmix, cutmix))
            h, w = int(12 * side), int(10 * side)
            top, left = rng.randrange(12) - h // 2, rng.randrange(10) - w // 2
            for y, x in np.ndindex(12, 10):
                kept[y, x] = not (top <= y < top + h and left <= x < left + w)
        elif mixup:
            kept *= rng.betavariate(mixup, mixup)
        assert_same(images, before)
        near(out, kept * images + (1 - kept) * images.flip(0))
        expected = kept.mean() * one_hot + (1 - kept.mean()) * one_hot.flip(0)
        near(targets, 0.9 * expected + 0.1 / 5)  # smoothed


# --------------------------------------------------------------------------------------------------
# data.py: samples and batches


def view_and_draw(image, rng):
    view = data.flip(data.random_resized_crop(image, 8, rng), rng)
    return data.to_tensor(view), rng.random()


def test_a_broken_image_is_named_once_and_replaced_by_another_one_each_epoch(
        tmp_path, monkeypatch, capsys):
    """Images 0 to 9 are of levels 40 (class 0) and 200 (class 1); 0, 1, 5 and 6 can't be read."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # Pillow refuses twice as many
    for number in range(10):
        path = tmp_path / "ab"[number // 5] / f"{number}.png"
        save_at(path, Image.new("L", (9, 9), 40 if number < 5 else 200))
    Image.effect_noise((64, 64), 50).save(tmp_path / "a" / "0.png", "jpeg")
    os.truncate(tmp_path / "a" / "0.png", 1500)
    Image.new("L", (200, 100)).save(tmp_path / "a" / "1.png")
    (tmp_path / "b" / "5.png").write_bytes(b"")
    (tmp_path / "b" / "6.png").write_text("text")
    folder = data.ImageFolder(tmp_path)
    samples, again = (data.Samples(folder, view_and_draw) for _ in range(2))
    labels = [set() for _ in range(10)]
    for key in range(200):
        sample = samples[key]
        pixels, _, label = sample
        assert pixels.unique().tolist() == [[40, 200][label]]
        labels[key % 10].add(label)
        if key == 99:
            warnings = sorted(capsys.readouterr().err.splitlines())
        assert_same(sample, again[key])  # the same one in every run
    assert labels == [{0, 1}] * 2 + [{0}] * 3 + [{0, 1}] * 2 + [{1}] * 3
    reasons = ["truncated", "20000 pixels", "cannot identify", "cannot identify"]
    for i, line, reason in zip((0, 1, 5, 6), warnings[::2], reasons, strict=True):
        assert line.startswith(f"warning: can't read {folder.name(i)!r} (") and reason in line
        assert line.count(folder.name(i)) == 1
    assert warnings[::2] == warnings[1::2]  # of `samples` and of `again`
    assert not capsys.readouterr().err


@pytest.mark.parametrize("in_a_worker", [False, True])
def test_photos_of_200_megapixels_are_opened_without_a_warning(
        tmp_path, monkeypatch, recwarn, in_a_worker):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(signal, "signal", install := MagicMock())
    train._start_worker(0) if in_a_worker else train.launch(print, None)
    ignored = {(signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_IGN)}
    assert not in_a_worker or {one.args for one in install.mock_calls} == ignored
    Image.new("1", (16_000, 12_500)).save(tmp_path / "large.png")
    with data.ImageFolder(tmp_path).open(0) as image:
        assert image.width == 16_000
    assert not list(recwarn)


def test_errors_that_are_not_of_a_file_are_raised(capsys):
    shapes, broken = data.Shapes(3, 8), PermissionError(errno.EACCES, "no")
    for error in MemoryError(), OSError(errno.EMFILE, "no"), OSError(errno.EIO, "no"):
        with patch.object(data.Shapes, "open", side_effect=error), pytest.raises(type(error)) as it:
            data.Samples(shapes, view_and_draw)[0]
        assert it.value is error
    with patch.object(data.Shapes, "open", side_effect=broken):
        assert data.Samples(shapes, view_and_draw, replace=False)[0][2] == -1
    assert "'shape 0' (PermissionError: [Errno 13] no); it is left out" in capsys.readouterr().err
    with pytest.raises(OSError, match="TypeError"):  # of the transform
        data.Samples(shapes, lambda image, rng: image + 1)[0]


# --------------------------------------------------------------------------------------------------
# Runs of the scripts. 6 steps an epoch of a network that a laptop runs in a blink.

TINY = """--recipe shapes --img_size 32 --batch_size 8 --epochs 3 --warmup_epochs 1 --workers 0
          --log_every 2 --amp off""".split()
TRAIN = [*TINY, "--num_images", 48]
TUNE = [*TINY, "--labels_per_class", 4, "--num_val", 60]
FOLDERS = [*TINY, "--batch_size", 2, "--epochs", 1, "--labels_per_class", 0]
AUGMENTED = "--drop_path 0.2 --mixup 0.8 --cutmix 1 --rand_augment 9 --erasing 0.25".split()
TORCHRUN = "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"


def launch(*command, stdout=subprocess.PIPE, **options):
    """Start a script as a user would; output comes back as text."""
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(
        command, cwd=HERE, text=True, stdout=stdout, stderr=subprocess.PIPE, **options)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def call(module, *flags):
    """The same inside this process: fast, and with things patched. It must not change signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        module.main(module.parse_args([str(flag) for flag in flags]))
        assert all(signal.getsignal(number) == old for number, old in handlers.items())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refused(capsys, module, *flags, code=1):
    """The call ends with this code and one line, warnings aside; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call(module, *flags)
    *warnings, line = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == code and all(w.startswith("warning: ") for w in warnings), warnings
    return line


def load(path):
    return torch.load(path, weights_only=True)


def load_weights(path):
    """With or without other things beside them."""
    return load(path).get("model", load(path))


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def read_table(path):
    return list(csv.reader(path.read_text().splitlines()))


def result(out):
    """Everything that a run leaves, less how fast it was and the flags that may differ."""
    checkpoint, log = load(out / "checkpoint.pt"), read_log(out)
    assert len(log) == len(checkpoint["log"])
    for line in log:
        assert line.pop("images_per_s") > 0
    state = {key: checkpoint[key] for key in ("model", "optimizer", "scaler", "step")}
    for name in "encoder.pt", "best.pt":
        if (out / name).exists():
            state[name] = load_weights(out / name)
    return state, log


def stop_at(monkeypatch, *steps):
    """Let a SIGTERM arrive in these steps, counted from 0 over all calls."""
    count, add = itertools.count(), train.Meter.add

    def add_and_stop(meter, *losses):
        add(meter, *losses)
        if next(count) in steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Meter, "add", add_and_stop)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of pretraining that nothing happened to."""
    out = tmp_path_factory.mktemp("unbroken")
    call(train, *TRAIN, "--out", out)
    return out


@pytest.fixture
def finished(unbroken, tmp_path):
    """A copy of that run, to be harmed."""
    return shutil.copytree(unbroken, tmp_path / "run")


@pytest.fixture(scope="module")
def tuned(unbroken, tmp_path_factory):
    """A run of fine-tuning that nothing happened to."""
    out = tmp_path_factory.mktemp("tuned")
    call(finetune, "--init", unbroken / "encoder.pt", "--out", out, *TUNE, *AUGMENTED)
    return out


def class_folders(root, **sets):
    """Three oblong images in root/SET/CLASS for each class of a set, as in train="cat dog"."""
    for place, (name, labels) in enumerate(sets.items()):
        for number, label in enumerate(labels.split()):
            for index in range(3):
                # One shape for each class, in all sets; no two images are the same.
                image = data.Shapes(72, 40).open(number + 12 * index + 36 * place)
                save_at(root / name / label / f"{index}.png", image.resize((60, 40)))
    return root


PHOTO_FILES = [f"{label}/{index}.png" for label in "abcdefghijkl" for index in range(3)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """PHOTO_FILES to train, others to validate, and one more of each that is broken."""
    classes = "a b c d e f g h i j k l"
    root = class_folders(tmp_path_factory.mktemp("photos"), train=classes, val=classes)
    for name in "train", "val":
        (root / name / "d" / "broken.png").write_text("no image")
    return root


# --------------------------------------------------------------------------------------------------
# train.py


def test_schedules():
    """The teacher's momentum as published, and what the plain loops leave out."""
    args = train.parse_args(["--recipe", "imagenet"])
    for epoch in (0, 20, 77, 100, 199, 200, 399, 400, 799):
        # 1,281,167 images in batches of 4096: 312 steps an epoch
        momentum = train.schedules(312 * epoch, 312 * 800, args)[2]
        early, late = min(1, epoch / 100), min(1, max(0, epoch - 100) / 300)
        assert 1 - momentum == pytest.approx(1e-3 - 9e-4 * early - 9e-5 * late)
    # A run of 1/100 of the steps has averages over 1/100 of theirs.
    momenta = [train.schedules(step, 2496, args)[2] for step in (0, 156, 312, 780, 1248, 2495)]
    assert momenta == pytest.approx([0.9, 0.945, 0.99, 0.9945, 0.999, 0.999])
    args = train.parse_args(["--recipe", "imagenet", "--batch_size", "64"])
    rates = [train.schedules(step, 100, args)[0] for step in (5, 50, 100)]
    assert rates == [1.5e-4 / 4] * 3  # a peak below --min_lr stays
    args = train.parse_args(["--recipe", "cifar10", "--epochs", "2"])
    assert args.warmup_epochs == pytest.approx(2 * 10 / 300)  # keeps its share of the run


def test_runs_write_what_they_promise(unbroken, tuned):
    log = read_log(unbroken) + read_log(tuned)
    assert [line["epoch"] for line in log] == [1, 2, 3] * 2
    assert {"lr", "momentum", "feature_weight"} < log[0].keys() and "lr" in log[3]
    assert json.loads((unbroken / "config.json").read_text())["batch_size"] == 8
    best = load(tuned / "best.pt")
    del best["model"]
    assert best == dict(classes=data.SHAPES, img_size=32, crop_ratio=1.0, num_heads=4)


def test_images_per_s_counts_training_alone(tmp_path, capsys, monkeypatch):
    """By a clock on which a step of 8 images takes one second, and a picture a thousand."""
    now, add, draw = [0], train.Meter.add, train.draw_reconstructions
    monkeypatch.setattr(train.Meter, "add", lambda *args: now.append(now[-1] + 1) or add(*args))
    monkeypatch.setattr(train, "draw_reconstructions",
                        lambda *args: now.append(now[-1] + 1000) or draw(*args))
    monkeypatch.setattr(train.time, "time", lambda: now[-1])
    stop_at(monkeypatch, 8)  # in epoch 2; when the run goes on, earlier steps do not count
    flags = [*TRAIN, "--out", tmp_path, "--picture_every", 1]
    refused(capsys, train, *flags, code=128 + signal.SIGTERM)
    call(train, *flags)
    assert [line["images_per_s"] for line in read_log(tmp_path)] == [8, 8, 8]


def test_a_collapse_of_the_teacher_is_seen(tmp_path, capsys, monkeypatch):
    """From the second of three epochs on, its tokens are made the same everywhere."""
    near(train.effective_rank(torch.eye(8)[:5] * 3), 5.0, atol=1e-4)
    count, follow = itertools.count(), BootMAE.update_teacher

    def collapse(model, momentum):
        follow(model, momentum)
        if next(count) >= 6:
            model.teacher.pos_embed.zero_()
            model.teacher.patch_embed.proj.weight.data.zero_()

    monkeypatch.setattr(BootMAE, "update_teacher", collapse)
    call(train, *TRAIN, "--out", tmp_path, "--picture_every", 1)
    first, *others = (line["teacher_rank"] for line in read_log(tmp_path))
    assert first > 2 and others == pytest.approx([1, 1], abs=0.1)
    assert capsys.readouterr().out.count("warning: teacher_rank is 1.0") == 2  # then and at the end


def assert_nearly_same_run(out, expected):
    """Sums in another order differ in the last bits, and then more and more."""
    (state, log), (expected_state, expected_log) = result(out), result(expected)
    torch.testing.assert_close(log, expected_log, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["model"], expected_state["model"], rtol=1e-2, atol=1e-3)


@pytest.fixture(scope="module")
def two_processes(unbroken, tuned, tmp_path_factory):
    """One start of two, for all that can be asked of them: what they said, and what each has seen.

    As on two machines of one process each, both are local rank 0.
    """
    out = tmp_path_factory.mktemp("two")
    shutil.copytree(unbroken, out / "rank0")  # a finished run, which rank 1 does not find
    class_folders(out, images="a b")
    (out / "images" / "b" / "0.png").write_text("no image")  # is rank 1's
    best, start = ["--init", tuned / "best.pt"], ["--init", unbroken / "encoder.pt"]
    uneven = [*TUNE, *best, "--num_val", 1003]
    calls = dict(
        pretrain=["train", *TRAIN, "--accum_steps", 2, "--workers", 1, "--out", out],
        eval=["finetune", *uneven, "--eval"], knn=["finetune", *uneven, "--knn"],
        tune=["finetune", *TUNE, *start, "--epochs", 2, "--accum_steps", 2, "--out", out / "tune"],
        linear=["finetune", *TUNE, *start, "--epochs", 1, "--linear", "--out", out / "linear"],
        predict=["finetune", *best, "--workers", 0, "--predict", out / "images",
                 "--out", out / "predict"],
        apart=["train", *TRAIN, "--out", out / "rank"])
    calls = {name: list(map(str, flags)) for name, flags in calls.items()}
    (out / "start.py").write_text(f"""if True:
        import json, os, torch
        import finetune, train
        from model import BootMAE, ViT
        from torch import is_grad_enabled as grad_enabled

        rank = os.environ["RANK"]
        os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = "0", "1"
        if rank == "1":
            os.replace = None  # only rank 0 writes files
        torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, inputs: look(module, *inputs))

        def look(module, images, *others):
            if isinstance(module, torch.nn.parallel.DistributedDataParallel):
                seen["synced"].append(module.require_backward_grad_sync)
                seen["buffers"].add(module.broadcast_buffers)
                seen["seeds"].append(torch.initial_seed())
            elif isinstance(module, (BootMAE, ViT, finetune.LinearProbe)) and grad_enabled():
                seen["images"] += len(images)
                if isinstance(module, finetune.LinearProbe):
                    seen["statistics"].append(module.norm.running_mean.tolist())

        def main(args):
            global seen
            all_seen = dict()
            for name, (script, *flags) in {calls}.items():
                seen = all_seen[name] = dict(
                    images=0, synced=[], seeds=[], buffers=set(), statistics=[])
                if name == "apart":
                    with open({str(out)!r} + f"/seen{{rank}}.json", "w") as file:
                        json.dump(all_seen, file, default=list)
                    flags[-1] += rank
                module = dict(train=train, finetune=finetune)[script]
                module.main(module.parse_args(flags))

        train.launch(main, None)""")
    process = launch(*TORCHRUN, out / "start.py")
    said, err = process.communicate(timeout=120)
    assert process.returncode and (out / "seen1.json").exists(), err
    seen = [json.loads((out / f"seen{rank}.json").read_text()) for rank in (0, 1)]
    return SimpleNamespace(out=out, said=said, err=err, seen=seen)


def test_two_processes_with_parts_of_a_batch_change_nothing(unbroken, two_processes, tmp_path):
    """Each has half of the images and noise of its own, and gradients travel once a step.

    Of the probe they share BatchNorm's statistics.
    """
    assert_nearly_same_run(two_processes.out, unbroken)
    flags = ["--init", unbroken / "encoder.pt", "--epochs", 2, "--out", tmp_path]
    call(finetune, *TUNE, *flags)
    assert_nearly_same_run(two_processes.out / "tune", tmp_path)
    zero, one = two_processes.seen
    for name, steps in ("pretrain", 18), ("tune", 12):
        assert [rank[name]["images"] for rank in two_processes.seen] == [4 * steps] * 2
        assert zero[name]["synced"] == one[name]["synced"] == [False, True] * steps
        assert zero[name]["buffers"] == [False]  # positions never change
    assert not set(zero["tune"]["seeds"]) & set(one["tune"]["seeds"])
    zero, one = (rank["linear"]["statistics"] for rank in two_processes.seen)
    assert len(zero) == 6 and zero[5] != zero[0]
    near(torch.tensor(zero), torch.tensor(one))


@pytest.mark.parametrize("mode", ["--eval", "--knn"])
def test_two_processes_count_every_image_once(tuned, two_processes, capsys, mode):
    """1,003 images do not divide: padding would count some twice."""
    call(finetune, "--init", tuned / "best.pt", *TUNE, "--num_val", 1003, mode)
    line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(line)["images"] == 1003 and line in two_processes.said.splitlines()


def test_two_processes_predict_every_image_and_must_share_the_output_folder(two_processes):
    """Rank 0 finds a finished run, rank 1 nothing: they would wait for each other for ever."""
    _, *rows = read_table(two_processes.out / "predict" / "predictions.csv")
    assert [row[0] for row in rows] == "a/0.png a/1.png a/2.png b/1.png b/2.png".split()
    assert two_processes.err.count("b/0.png") == 1
    assert re.search(r"disagree on steps done and images: \[\(0, .*\(18", two_processes.err)


def test_fresh_forgets_the_old_run_at_once(finished, monkeypatch, capsys):
    """Its checkpoint, log and pictures, and what a kill left, but not its weights.

    Not where torchrun restarts a run, nor where the run would start from these weights.
    """
    flags = [*TRAIN, "--out", finished, "--fresh"]
    before = (finished / "checkpoint.pt").read_bytes()
    with patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT="1"):
        call(train, *flags)
    assert "this run is finished" in capsys.readouterr().out
    start = ["--init", finished / "encoder.pt"]
    assert "would be overwritten" in refused(capsys, train, *flags, *start)
    assert (finished / "checkpoint.pt").read_bytes() == before
    for name in "epoch_0099.png", "checkpoint.pt.1.tmp", "notes.txt":
        (finished / name).touch()
    monkeypatch.setattr(train.Run, "save_checkpoint", lambda *_: None)
    stop_at(monkeypatch, 0)
    said = refused(capsys, train, *flags, code=143)
    left = "notes.txt .lock config.json encoder.pt log.jsonl".split()
    assert "without --fresh" in said and sorted(os.listdir(finished)) == sorted(left)
    assert not read_log(finished)


@pytest.mark.parametrize("damage", ["cut", "code", "tensors", "settings", "step"])
def test_a_damaged_or_hostile_checkpoint_is_named_and_kept(finished, capsys, damage):
    path, flag = finished / "checkpoint.pt", finished / "it_ran"
    checkpoint = load(path)

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(flag),)

    if damage == "code":
        checkpoint["model"] = Hostile()
    if damage == "tensors":
        checkpoint["model"]["renamed"] = checkpoint["model"].pop("encoder.cls_token")
    checkpoint.pop(damage, None)  # in two cases, a part is missing
    torch.save(checkpoint, path)
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    before = path.read_bytes()
    assert str(path) in refused(capsys, train, *TRAIN, "--out", finished)
    assert path.read_bytes() == before and not flag.exists()


def test_a_full_disk_keeps_the_last_checkpoint(finished, capsys):
    """A limit on the size of files stands for the full disk."""
    before = (finished / "checkpoint.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        line = refused(capsys, train, *TRAIN, "--out", finished, "--epochs", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "could not save" in line and (finished / "checkpoint.pt").read_bytes() == before
    assert not list(finished.glob("*.tmp"))


@pytest.mark.parametrize("module", [train, finetune])
def test_weights_that_are_not_finite_are_never_saved(unbroken, tmp_path, capsys, module):
    """Losses are not looked at, so that it is the end of the epoch that finds them."""
    weights = load(unbroken / "encoder.pt")
    weights["cls_token"].fill_(1e38)  # loads, but the first norm overflows
    torch.save(weights, tmp_path / "nan.pt")
    flags = [*(TRAIN if module is train else TUNE), "--init", tmp_path / "nan.pt"]
    flags += ["--log_every", 1000, "--out", tmp_path / "out"]
    line = refused(capsys, module, *flags)
    assert "weights, losses or gradients are not finite" in line and "learning rate" in line
    assert not {"checkpoint.pt", "encoder.pt", "best.pt"} & set(os.listdir(tmp_path / "out"))


def test_losses_that_are_never_finite_end_the_run(capsys):
    """In fp16 the scale decides: each step that is not taken, as gradients overflow, halves it."""
    run = train.Run(train.parse_args([]))
    meter, Scaler = train.Meter(run, "loss"), functools.partial(torch.amp.GradScaler, "cpu")
    for value in 2.0, math.nan, math.inf:
        meter.add(torch.tensor(value))
    assert meter.means() == {"loss": 2.0}
    meter.sums.zero_()
    meter.add(torch.tensor(math.nan))
    run.check_finite(small_vit(), Scaler(), meter.means())
    (broken := small_vit()).cls_token.data.fill_(math.nan)
    for scaler in Scaler(enabled=False), Scaler(init_scale=2**-21):
        with pytest.raises(SystemExit, match="1"):
            run.check_finite(small_vit(), scaler, meter.means())
        assert "are not finite" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):  # of weights, too
        run.check_finite(broken, Scaler(), {"loss": 1.0})


def test_ten_unreadable_images_in_a_row_end_the_run_in_one_line(tmp_path, capsys):
    """Exceptions of a loading worker arrive with a traceback in their text."""
    folder = class_folders(tmp_path / "a", train="cat dog", val="cat dog")
    for path in folder.glob("train/*/*"):
        path.write_text("no image")
    flags = [*FOLDERS, "--scratch", "--data", folder, "--workers", 1, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit, match="1"):
        train.launch(finetune.main, finetune.parse_args(list(map(str, flags))))
    *_, line = capsys.readouterr().err.splitlines()
    words = r"ten images in a row can't be read, the last one '.*/\d+.png' \(Unid.*\)"
    assert re.search(f": {words}$", line)


@pytest.mark.parametrize("module, flags, words", [(train, *call) for call in [
    ("--recipe nothing", "--recipe"), (f"--seed {2**63}", "--seed:"), ("--num 48", "--num"),
    ("--data no/such/folder", "no/such/folder"), ("--data .", "no images found"),
    ("--img_size 30", "divisible by patch_size 8"), ("--data=", "--data is empty"),
    ("--init none.pt", "can't read"), ("--mask_ratio nan", "--mask_ratio: nan must"),
    ("--mask_ratio 0", "--mask_ratio 0"), ("--momentum 0.9 0.99 2", "--momentum: 2 must be"),
    ("--inject 1 9", "1 to 4"), ("--accum_steps 3", "--accum_steps 3"),
    ("--warmup_epochs 5", "--warmup_epochs 5"), ("--base_lr inf", "--base_lr: inf must be"),
    ("--batch_size 64", "--batch_size 64"), ("--recipe imagenet", "--recipe photos, which suits"),
    ("--device cuda", "--device cuda"), ("--out /proc/nothing", "--out /proc/nothing"),
]] + [(finetune, *call) for call in [
    ("--init empty.pt", "fits no ViT"), ("--init numbers.pt", "holds no state_dict"),
    ("--init none.pt", "there is no"), ("--init encoder.pt --teacher", "holds no teacher"),
    ("", "output/shapes/encoder.pt"), ("--init theirs_alone.pth --teacher", "no model_ema"),
    ("--init encoder.pt --eval", "is no classifier"), ("--scratch --init x", "--init: not allowed"),
    ("--scratch --knn --depth 9", "--depth 9"), ("--scratch --linear --accum_steps 8", "needs two"),
    ("--scratch --batch_size 64", "64 is"), ("--init encoder.pt --patch_size 8", "--patch_size"),
    ("--init encoder.pt --branch_init 0", "--branch_init are for --scratch"),
    ("--init gray.pt --init_pixels imagenet", "gray.pt has 1 channels"),
    ("--init best.pt --init_pixels imagenet", "leave --init_pixels imagenet out"),
    ("--init encoder.pt --num_heads 3", "encoder.pt embed_dim 128 is not divisible by num_heads 3"),
    ("--scratch --knn --linear", "--linear: not allowed"), ("--predict=", "--predict is empty"),
    ("--scratch --lr 0.1 --base_lr 0.1", "--base_lr: not allowed"),
]])
def test_bad_calls(files, tmp_path, capsys, monkeypatch, module, flags, words):
    monkeypatch.chdir(files[0])
    flags = [*(TRAIN if module is train else TUNE), "--out", tmp_path / "out", *flags.split()]
    assert words in refused(capsys, module, *flags)
    assert not (tmp_path / "out").exists()


def test_benchmark_counts_what_a_step_does(tmp_path, capsys):
    call(train, *TRAIN, "--out", tmp_path / "out", "--benchmark")
    table = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines()[1:])
    D, d, N, V = 128, 64, 16, 6  # of 16 patches of 8 x 8, 10 are masked

    def block(tokens, width, context=0):
        """Products of one image: q, k, v, proj and MLP; scores and values."""
        own = 12 * tokens * width**2 + 2 * tokens**2 * width
        queries, keys = 2 * tokens * width**2, 2 * context * D * width
        return own + (queries + keys + 2 * tokens * context * width if context else 0)

    teacher = N * 192 * D + 4 * block(1 + N, D)
    student = V * 192 * D + 4 * block(1 + V, D)
    for width, out in (d, 192), (D, D):
        student += (1 + V) * D * width + block(1 + N, width, 1 + V) + (N - V) * width * out
    no_gradient = V * 192 * D  # is wanted for the images
    gflop = 2 * (teacher + 3 * student - no_gradient) / 1e9
    assert float(table["GFLOP an image"]) == pytest.approx(gflop, rel=1e-3)
    hours = 3 * 48 / float(table["images/s"]) / 3600
    assert float(table["hours of 3 x 48 images"]) == pytest.approx(hours, rel=0.01)
    assert not (tmp_path / "out").exists()


def test_a_second_run_in_the_same_folder_is_refused(finished, capsys):
    """The lock goes with the process that holds it, whatever ends it."""
    hold = f"""if True:
        import fcntl
        file = open({str(finished / ".lock")!r}, "w")
        fcntl.lockf(file, fcntl.LOCK_EX)
        print("held", flush=True)
        input()"""
    with subprocess.Popen([sys.executable, "-c", hold], stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert "is in use by another run" in refused(capsys, train, *TRAIN, "--out", finished)
        holder.kill()
    call(train, *TRAIN, "--out", finished)


def test_a_checkpoint_that_another_run_wrote_meanwhile_is_kept(unbroken, tmp_path, capsys):
    """While this one listed its images, and before it took the lock."""

    def write(run):
        shutil.copy(unbroken / "checkpoint.pt", tmp_path)

    with patch.object(train.Run, "check_batch", write):
        assert "another run has written" in refused(capsys, train, *TRAIN, "--out", tmp_path)
    call(train, *TRAIN, "--out", tmp_path)
    assert "this run is finished" in capsys.readouterr().out


def test_streams_that_are_missing_are_replaced(monkeypatch):
    for name in "stdout", "stderr":
        monkeypatch.setattr(sys, name, None)
    train.launch(lambda args: print("said"), None)


@pytest.mark.parametrize("module, mode", [(train, []), (finetune, []), (finetune, ["--linear"])])
def test_moved_images_and_a_lost_start_are_not_missed(unbroken, tmp_path, capsys, module, mode):
    """Names are compared, not the path. Other classes would have the numbers of the old ones."""
    folder = class_folders(tmp_path / "a", train="cat dog", val="cat dog")
    start = shutil.copy(unbroken / "encoder.pt", tmp_path / "start.pt")
    flags = [*TINY, *mode, "--batch_size", 4, "--init", start, "--out", tmp_path / "out", "--data"]
    call(module, *flags, folder, "--epochs", 1)
    start.unlink()
    if not mode:  # k-NN would take random weights
        assert "there is no" in refused(capsys, finetune, *flags, folder, "--knn")
    folder = folder.rename(tmp_path / "b")
    call(module, *flags, folder, "--epochs", 2)
    assert "going on from" in capsys.readouterr().out
    assert len(read_log(tmp_path / "out")) == 2
    for name in "train", "val":
        (folder / name / "cat").rename(folder / name / "eel")
    assert "trained with images" in refused(capsys, module, *flags, folder)


def test_pictures_among_the_images_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(class_folders(tmp_path, photos="a b c") / "photos")
    for out in ".", "output/x", tmp_path / "photos":
        assert "lies inside" in refused(capsys, train, *TINY, "--data", ".", "--out", out)
    assert sorted(os.listdir(".")) == ["a", "b", "c"]


@pytest.mark.parametrize("left", [
    "WORLD_SIZE=2", "LOCAL_RANK=0 RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=two MASTER_ADDR=x"])
def test_a_part_of_torchruns_environment_is_refused(tmp_path, capsys, monkeypatch, left):
    for setting in left.split():
        monkeypatch.setenv(*setting.split("="))
    line = refused(capsys, train, *TRAIN, "--out", tmp_path / "out")
    assert "start with torchrun" in line and left.split("=")[0] in line


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "--accum_steps"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "--accum_steps"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "fewer --workers"),
    (RuntimeError("unable to open shared memory object </torch_1> in read-write"), "--ipc=host"),
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found in cpp"), "--compile needs"),
    (RuntimeError("Cannot find a working triton installation."), "--compile needs"),
    (OSError("Caught OSError in DataLoader worker process 0.\n  File x\nOSError: [Errno 5] I/O"),
     "test: [Errno 5] I/O"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_the_machine_lacks_is_said_in_one_line(capsys, monkeypatch, error, words):
    monkeypatch.setattr(sys, "argv", ["test"])
    with pytest.raises(SystemExit, match="1"):
        train.launch(MagicMock(side_effect=error), None)
    line, = capsys.readouterr().err.splitlines()
    assert words in line
    monkeypatch.setenv("LOCAL_RANK", "1")  # which says only what may have hit it alone
    with pytest.raises(SystemExit, match="1"):
        train.fail("once")
    assert not capsys.readouterr().err


def test_a_closed_or_narrow_stdout_does_not_end_a_run(tmp_path):
    """`| head` closes it; in many containers it has no letters but ASCII's."""
    read, write = os.pipe()
    os.close(read)
    folder = class_folders(tmp_path / "a", train="äpfel 梨", val="äpfel")
    flags = [*FOLDERS, "--scratch", "--data", folder, "--out", tmp_path / "out"]
    ascii_only = os.environ | dict(PYTHONIOENCODING="ascii")
    process = launch("finetune.py", *flags, stdout=write, env=ascii_only)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (tmp_path / "out" / "best.pt").exists() and "Traceback" not in err


def test_machines_without_affinity_run_on_the_cpu(monkeypatch):
    """As macOS is."""
    monkeypatch.delattr(os, "sched_getaffinity")
    assert train.Run(train.parse_args([])).workers == 1


def test_weights_and_pixels_of_a_file_arrive_in_pretraining(unbroken, tmp_path, capsys):
    """ImageNet's pixels change the patch embedding. A rate of 0 leaves weights as they were."""
    flags = [*TRAIN, "--init", unbroken / "encoder.pt", "--epochs", 1, "--base_lr", 0, "--momentum",
             1, 1, 1, "--init_pixels", "imagenet", "--num_heads", 2, "--out", tmp_path]
    assert "--patch_size" in refused(capsys, train, *flags, "--patch_size", 4)
    call(train, *flags)
    assert load_vit(tmp_path / "checkpoint.pt").blocks[0].attn.num_heads == 2
    expected = load_vit(unbroken / "encoder.pt", pixels="imagenet").state_dict()
    found = load(tmp_path / "checkpoint.pt")["model"]
    for part in "encoder.", "teacher.":
        assert_same({key: found[part + key] for key in expected}, expected)


# --------------------------------------------------------------------------------------------------
# finetune.py


@pytest.mark.parametrize("sets, words", [
    (dict(train="cat dog"), "no val/"), (dict(val="cat dog"), "no train/"),
    (dict(train="cat dog", val="cat cow"), "cow"),
    (dict(train="cat dog .", val="cat"), "needs two classes"),
    (dict(train="cat", val="cat"), "needs two classes"),
], ids=str)
def test_folders_that_make_no_data_set_are_refused(tmp_path, capsys, sets, words):
    flags = ["--data", class_folders(tmp_path / "a", **sets), "--out", tmp_path / "out"]
    assert words in refused(capsys, finetune, *FOLDERS, "--scratch", *flags)
    assert not (tmp_path / "out").exists()


def test_evaluation_needs_no_training_images_and_takes_no_class_for_another(tmp_path, capsys):
    """It has the classifier's image size, 32, not the recipe's."""
    folder, run = class_folders(tmp_path / "a", train="cat dog", test="cat"), tmp_path / "run"
    (folder / "test" / "cat" / "0.png").write_text("no image")
    flags = [*FOLDERS, "--scratch", "--data", folder, "--crop_ratio", 0.5, "--out"]
    assert "lies inside" in refused(capsys, finetune, *flags, folder / "test")
    call(finetune, *flags, run)
    assert "no validation image of: 'dog'" in capsys.readouterr().out
    assert Image.open(run / "predictions.png").getpixel((2 * 152 + 6, 6)) == (255, 255, 255)
    flags = ["--recipe", "shapes", "--workers", 0, "--eval", "--init", run / "best.pt"]
    with patch.object(data, "center_crop", wraps=data.center_crop) as crop:
        call(finetune, *flags, "--data", class_folders(tmp_path / "b", val="cat dog"))
    assert {one.args[2] for one in crop.mock_calls} == {0.5}  # as in training
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1])["images"] == 6 and "interpolated" not in said
    assert "a head for 2 classes, and --data has 12" in refused(capsys, finetune, *flags)
    flags += ["--data", class_folders(tmp_path / "c", val="ape bee")]
    assert "lacks: ape bee" in refused(capsys, finetune, *flags)


@pytest.mark.parametrize("mode", ["finetune", "knn", "predict"])
def test_a_folder_without_a_readable_image_is_named(files, tmp_path, capsys, mode):
    folder = class_folders(tmp_path / "a", train="cat dog", val="cat dog")
    for path in (folder / "val").glob("*/*"):
        path.write_text("no image")
    flags = ["--data", folder, "--init", files[0] / "best.pt", "--out", tmp_path / "out"]
    flags += dict(finetune=[], knn=["--knn"], predict=["--predict", folder / "val"])[mode]
    line = refused(capsys, finetune, *FOLDERS, *flags)
    assert "image could be read" in line


def test_labels_per_class_is_a_fixed_subset():
    args = finetune.parse_args(["--scratch", *map(str, TUNE)])
    known, val = finetune.open_images(args, run := train.Run(args))
    numbers = known.indices.tolist()
    assert known.labels.tolist() == [n % 12 for n in numbers]
    assert sorted(known.labels) == sorted(list(range(12)) * 4)
    assert known.open(7) == data.Shapes(2400, 32).open(numbers[7])
    assert min(val.numbers) >= 2400
    for args.seed in 0, 1:
        again = finetune.open_images(args, run)[0].indices.tolist()
        assert (numbers == again) == (args.seed == 0)


def test_settings_that_may_change_are_those_of_the_new_call(unbroken, tmp_path):
    for changed in "--epochs 1", "--epochs 2 --lr 0.004 --min_lr 0.001 --amp fp16 --accum_steps 2":
        call(finetune, "--init", unbroken / "encoder.pt", "--out", tmp_path, *TUNE,
             *changed.split())
    checkpoint = load(tmp_path / "checkpoint.pt")
    assert checkpoint["step"] == 12 and checkpoint["scaler"]["scale"] > 0
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 2
    last = 0.001 + 0.003 * (1 + math.cos(math.pi * (11 / 12 - 1 / 2) / (1 / 2))) / 2
    assert checkpoint["log"][-1]["lr"] == pytest.approx(last)


def test_only_a_better_model_becomes_the_best(monkeypatch):
    """The average is worse in epoch 1 and better in epoch 2; both are worse again in epoch 3."""
    run, kept = train.Run(finetune.parse_args(["--scratch"])), []
    run.args.sizes, scores = dict(num_heads=1), iter([(50, 40), (45, 60), (55, 59)])
    run.save = MagicMock()
    run.save_weights = lambda model, *_, **more: kept.append(model)
    monkeypatch.setattr(finetune, "draw_predictions", lambda model, *_: kept.append(model))
    monkeypatch.setattr(finetune, "evaluate",
                        lambda *_: [dict(top1=top1, top5=90) for top1 in next(scores)])
    val = data.Samples(data.Shapes(12, 16), None)
    for _ in range(3):
        run.log.append(finetune.evaluate_and_keep_the_best("model", "average", val, run))
    assert kept == ["model", "model", "average", "average"]


def test_text_of_a_tile_has_no_line_break_and_ends_before_the_next_tile():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    names = "a b", "a\n b", "W" * 30
    a, b, long = (finetune.contact_sheet([(image, [name], "black")]) for name in names)
    assert a == b and (np.asarray(long)[:, 156:] == 255).all()


EXTRACT = finetune.extract  # several processes give another order than that of the names


@pytest.mark.parametrize("depth", [0, 2])
def test_features_of_a_folder(unbroken, photos, tmp_path, monkeypatch, depth):
    monkeypatch.setattr(finetune, "extract", lambda *args: [x.flip(0) for x in EXTRACT(*args)])
    flags = ["--init", unbroken / "encoder.pt", "--features", photos / "val", "--depth", depth]
    flags += ["--crop_ratio", 0.5, "--workers", 0, "--amp", "off", "--out", tmp_path]
    call(finetune, *flags)
    with np.load(tmp_path / "features.npz") as table:
        files, features = table["files"].tolist(), table["features"]
    assert files == PHOTO_FILES
    images, _ = plain_middles(photos / "val", 32, 0.5)
    expected = plain_features(load_vit(unbroken / "encoder.pt"), images, depth or 4)
    near(torch.tensor(features), expected, atol=1e-4)


def test_predictions(photos, tmp_path, capsys, monkeypatch):
    """Classes and crop are those in the file of the classifier; the size is not."""
    monkeypatch.setattr(finetune, "extract", lambda *args: [x.flip(0) for x in EXTRACT(*args)])
    names, start, out = ["ape", "bee", "cat, black", "dog"], tmp_path / "best.pt", tmp_path / "out"
    model = small_vit(num_classes=4)
    model.head.weight.data *= 1000
    torch.save(dict(model=model.state_dict(), classes=names, crop_ratio=0.5), start)
    flags = ["--predict", photos / "val", "--init", start, "--img_size", 48, "--workers", 0,
             "--amp", "off", "--out"]
    with patch.object(finetune, "outputs_of", None):  # it is said before anything is classified
        assert "/proc" in refused(capsys, finetune, *flags, "/proc/x")
    call(finetune, *flags, out)
    said = capsys.readouterr()
    assert "36 of 37 images" in said.out and said.err.count("broken.png") == 1
    header, *rows = read_table(out / "predictions.csv")
    assert header == "file class probability second probability_2 third probability_3".split()
    assert [row[0] for row in rows] == PHOTO_FILES
    images, _ = plain_middles(photos / "val", 48, 0.5)
    values, classes = load_vit(start, img_size=48)(images).softmax(dim=1).topk(3)
    assert [row[1::2] for row in rows] == [[names[n] for n in best] for best in classes.tolist()]
    near(torch.tensor([[float(x) for x in row[2::2]] for row in rows]), values, atol=2e-3)
    assert Image.open(out / "predictions.png").size == (8 * 152, 4 * 188)
    torch.save(small_vit(num_classes=2).state_dict(), start)  # without names of classes
    odd = class_folders(tmp_path, odd="a") / "odd"
    (odd / "a" / "0.png").rename(odd / "a" / os.fsdecode(b"\xff.png"))
    assert "lies inside" in refused(capsys, finetune, "--predict", odd, *flags[2:], odd / "x")
    call(finetune, "--predict", odd, *flags[2:], out)
    header, *rows = (line.split(b",") for line in (out / "predictions.csv").read_bytes().split())
    assert len(header) == 5 and rows[2][0] == b"a/\xff.png"
    assert {row[1] for row in rows} <= {b"0", b"1"}


# --------------------------------------------------------------------------------------------------
# What arrives: recipes, flags, precision, pictures and files, seen in what a run leaves


PRETRAINING = dict(
    model="base", img_size=224, patch_size=16, decoder_dim=512, decoder_depth=2, inject=[1, -1],
    feature_target=1, weighted_loss=1, mask="block", mask_ratio=0.75, crop_scale=[0.2, 1],
    epochs=800, warmup_epochs=40, batch_size=4096, base_lr=1.5e-4, min_lr=1e-4, weight_decay=0.05,
    betas=[0.9, 0.95], feature_ramp=0.25, branch_init=1)
FINE_TUNING = dict(
    model="base", img_size=224, patch_size=16, epochs=100, warmup_epochs=20, batch_size=2048,
    lr=5e-3, base_lr=0, min_lr=1e-6, layer_decay=0.6, drop_path=0.1, betas=[0.9, 0.999],
    weight_decay=0.05, mixup=0.8, cutmix=1, smoothing=0.1, rand_augment=9, erasing=0.25,
    crop_scale=[0.08, 1], model_ema=0.9998, crop_ratio=0.875, labels_per_class=0,
    branch_init=1)
PLAIN = dict(drop_path=0, mixup=0, cutmix=0, rand_augment=0, erasing=0)
PROBE = FINE_TUNING | PLAIN | dict(
    epochs=90, warmup_epochs=10, batch_size=16384, lr=0, base_lr=0.1, min_lr=0, weight_decay=0,
    smoothing=0, model_ema=0, depth=9)
del PROBE["layer_decay"], PROBE["betas"]  # LARS has neither
CIFAR10 = dict(model="small", img_size=32, patch_size=4, branch_init=0)
PHOTOS = dict(model="tiny", img_size=96, patch_size=12, branch_init=0)
SHAPES = dict(model="nano", img_size=64, patch_size=8, branch_init=0)
SHORT = dict(decoder_dim=64, decoder_depth=1, mask="random", feature_ramp=1, min_lr=0)
CIFAR10_TUNING = FINE_TUNING | CIFAR10 | dict(
    batch_size=512, lr=1e-3, warmup_epochs=5, layer_decay=0.75, model_ema=0.999,
    crop_scale=[0.4, 1], crop_ratio=1)
PHOTOS_TUNING = CIFAR10_TUNING | PLAIN | PHOTOS | dict(
    batch_size=32, epochs=40, warmup_epochs=4, model_ema=0.99)
SHAPES_TUNING = PHOTOS_TUNING | SHAPES | dict(lr=2e-3, crop_scale=[0.6, 1], labels_per_class=20)
SHORT_PROBE = dict(batch_size=64, depth=0, crop_ratio=1)
SETTINGS = {  # the first two of each are published, the others are for short runs
    train: {
        "imagenet": PRETRAINING,
        "imagenet_large": PRETRAINING | dict(
            model="large", min_lr=1e-5, momentum=[0.999, 0.9999, 0.9999]),
        "cifar10": PRETRAINING | CIFAR10 | dict(
            decoder_dim=192, epochs=300, warmup_epochs=10, batch_size=512, base_lr=5e-4, min_lr=0),
        "photos": PRETRAINING | PHOTOS | SHORT | dict(
            epochs=60, warmup_epochs=2, batch_size=32, base_lr=5e-3),
        "shapes": PRETRAINING | SHAPES | SHORT | dict(
            mask_ratio=0.6, crop_scale=[0.6, 1], epochs=15, warmup_epochs=1, batch_size=16,
            base_lr=16e-3)},
    finetune: {
        "imagenet": FINE_TUNING,
        "imagenet_large": FINE_TUNING | dict(
            model="large", epochs=50, warmup_epochs=5, batch_size=1024, lr=1.5e-3,
            layer_decay=0.75),
        "cifar10": CIFAR10_TUNING, "photos": PHOTOS_TUNING, "shapes": SHAPES_TUNING,
        "imagenet --linear": PROBE,
        "imagenet_large --linear": PROBE | dict(model="large", epochs=50, base_lr=0.07, depth=18),
        "cifar10 --linear": PROBE | CIFAR10 | dict(
            batch_size=2048, crop_scale=[0.4, 1], crop_ratio=1),
        "photos --linear": PROBE | PHOTOS | SHORT_PROBE | dict(
            crop_scale=[0.4, 1], epochs=30, base_lr=40, warmup_epochs=3),
        "shapes --linear": PROBE | SHAPES | SHORT_PROBE | dict(
            crop_scale=[0.6, 1], epochs=60, base_lr=160, warmup_epochs=5, labels_per_class=20)},
}


def test_rates_and_folders_are_not_the_recipes_where_flags_say_otherwise(monkeypatch, tmp_path):
    for flags, rates in {"--lr 0": (0, 0), "--base_lr 3": (0, 3), "": (0, 160)}.items():
        args = finetune.parse_args(["--linear", *flags.split()])
        assert (args.lr, args.base_lr) == rates
    monkeypatch.chdir(tmp_path)
    for start, out in ("runs/x/best.pt", "x_predict"), ("mae.pth", f"{tmp_path.name}_predict"):
        args = finetune.parse_args(["--predict", "photos", "--init", start])
        assert args.out == os.path.join("output", out)


@pytest.mark.parametrize("module", [train, finetune])
def test_recipes(module):
    assert {flags.split()[0] for flags in SETTINGS[module]} == set(module.RECIPES)
    for flags, expected in SETTINGS[module].items():
        start = ["--scratch"] if module is finetune else []
        args = module.parse_args([*start, "--recipe", *flags.split()])
        assert {name: getattr(args, name) for name in expected} == expected, flags
    assert module.parse_args([*start, "--data", "x"]).recipe == "imagenet"


def test_flags_that_are_named_exist(capsys):
    """In the help and in README, where some are torchrun's, Docker's or the system's."""
    with open(os.path.join(HERE, "README.md")) as file:
        named, known = set(re.findall(r"--[a-z_]+", file.read())), set()
    for module in train, finetune:
        with pytest.raises(SystemExit):
            module.parse_args(["--help"])
        usage, text = capsys.readouterr().out.split("\n\n", 1)
        known |= set(re.findall(r"--[a-z_]+", usage))
        named |= set(re.findall(r"--[a-z_]+", text))
    others = "nproc_per_node nnodes rdzv_backend rdzv_endpoint max_restarts ipc shutdown help"
    assert len(known) > 50 and named <= known | {f"--{name}" for name in others.split()}


@pytest.fixture
def watched(monkeypatch):
    """Calls of a compiled network, for numbers on the bar, and for loaders."""
    loader = MagicMock(side_effect=torch.utils.data.DataLoader)
    seen = SimpleNamespace(bar=MagicMock(), net=MagicMock(), loader=loader)

    def compiled(model):
        seen.net.side_effect = model
        return seen.net

    monkeypatch.setattr(train.tqdm, "set_postfix", seen.bar)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.utils.data, "DataLoader", loader)
    return seen


@pytest.mark.filterwarnings("ignore:This DataLoader")  # may have more workers than there are cores
def test_flags_of_pretraining_arrive(tmp_path, watched):
    """8 of 21 images in batches of 4: 2 steps an epoch. The loops above show the other flags."""
    flags = """--recipe shapes --model tiny --img_size 48 --patch_size 12 --decoder_dim 32
               --decoder_depth 3 --inject 0 2 --num_images 8 --batch_size 4 --epochs 3 --log_every 1
               --picture_every 2 --workers 2 --compile --amp off --out""".split()
    class_folders(tmp_path, images="a b c d e f g")
    call(train, *flags, tmp_path / "out", "--data", tmp_path / "images")
    checkpoint, pictures = load(tmp_path / "out" / "checkpoint.pt"), tmp_path.glob("out/epoch*")
    found = {name: tuple(x.shape) for name, x in checkpoint["model"].items()}
    assert {path.name for path in pictures} == {"epoch_0002.png", "epoch_0003.png"}
    assert checkpoint["step"] == watched.net.call_count == watched.bar.call_count == 6
    assert watched.loader.call_args.kwargs["num_workers"] == 2
    assert found["encoder.blocks.11.norm1.weight"] == (192,)
    assert found["encoder.pos_embed"] == (1, 1 + 4 * 4, 192)
    assert found["encoder.patch_embed.proj.weight"] == (192, 3, 12, 12)
    for decoder, width in ("regressor", 32), ("predictor", 192):
        blocks = {key.split(".")[2] for key in found if key.startswith(decoder + ".blocks")}
        injected = f"{decoder}.blocks.0.cross_attn.q.weight" in found
        assert found[decoder + ".mask_token"] == (1, 1, width)
        assert blocks == {"0", "1", "2"} and injected == (decoder == "predictor")


def test_pretraining_without_a_feature_target(tmp_path):
    call(train, *TRAIN, "--num_images", 8, "--epochs", 1, "--feature_target", 0, "--out", tmp_path)
    parts = {key.split(".")[0] for key in load(tmp_path / "checkpoint.pt")["model"]}
    assert parts == {"encoder", "regressor"} and read_log(tmp_path)[0]["feature_loss"] == 0
    assert Image.open(tmp_path / "epoch_0001.png").width == 2 * 4 * (128 + 4)


def test_flags_of_fine_tuning_arrive(tmp_path, watched):
    """2 images of each of 12 classes in batches of 8: 3 steps an epoch."""
    flags = """--scratch --recipe shapes --model tiny --img_size 48 --patch_size 12 --num_val 30
               --labels_per_class 2 --batch_size 8 --epochs 3 --eval_every 2 --log_every 1
               --workers 0 --compile --amp off --out""".split()
    call(finetune, *flags, tmp_path)
    log, best = read_log(tmp_path), load_weights(tmp_path / "best.pt")
    assert ["top1" in line for line in log] == [False, True, True]
    assert log[2]["top1"] * 30 / 100 == pytest.approx(round(log[2]["top1"] * 30 / 100))
    assert watched.net.call_count == watched.bar.call_count == 9
    assert watched.loader.call_args.kwargs["num_workers"] == 0
    assert best["blocks.11.norm1.weight"].shape == (192,) and best["pos_embed"].shape[1] == 17
    assert best["patch_embed.proj.weight"].shape == (192, 3, 12, 12)


def test_fine_tuning_starts_from_the_teacher_at_another_size(unbroken, tmp_path):
    """And with 2 heads, not 4. A learning rate of 0 leaves the weights as they were loaded."""
    flags = ["--teacher", "--img_size", 48, "--num_heads", 2, "--lr", 0, "--epochs", 1]
    call(finetune, *TUNE, "--init", unbroken / "checkpoint.pt", *flags, "--out", tmp_path)
    pretrained = load_weights(unbroken / "checkpoint.pt")
    best = load_vit(tmp_path / "best.pt")
    for key, x in best.state_dict().items():
        if key.startswith(("blocks", "cls_token", "patch_embed")):
            assert torch.equal(x, pretrained[f"teacher.{key}"]), key
    positions = resize_positions(pretrained["teacher.pos_embed"], (4, 4), (6, 6))
    assert torch.equal(best.pos_embed, positions) and best.blocks[0].attn.num_heads == 2


def plain_middles(folder, size, ratio):
    """The middles of a folder's images, float (n, 3, size, size) in -1 .. 1, and their classes."""
    images, labels = [], []
    for label, path in enumerate(sorted(folder.iterdir())):
        for file in sorted(path.glob("[0-9]*")):
            image = Image.open(file)
            side = ratio * min(image.size)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            box = left, top, left + side, top + side
            images.append(np.asarray(image.resize((size, size), BICUBIC, box=box)))
            labels.append(label)
    return torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(labels)


def plain_features(vit, images, depth):
    """The mean patch token after block `depth`, without its mean and deviation."""
    with torch.no_grad():
        tokens = vit.encode(patchify(images, 8), taps=(depth,))[1][depth][:, 1:]
        return torch.stack([layer_norm(x) for x in tokens.mean(dim=1)])


def plain_accuracy(scores, labels):
    """top1 and top5 of scores (n, classes), from the places of the labels in the rankings."""
    places = [sorted(row, reverse=True).index(row[label])
              for row, label in zip(scores.tolist(), labels.tolist())]
    return [100 * sum(place < n for place in places) / len(places) for n in (1, 5)]


@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_are_those_of_a_plain_computation(unbroken, photos, capsys, k):
    flags = [*TINY, "--data", photos, "--init", unbroken / "encoder.pt", "--labels_per_class", 0]
    flags += ["--drop_path", 0.9]  # which a frozen encoder must not do
    call(finetune, *flags, "--knn", "--depth", 2, "--neighbours", k, "--crop_ratio", 0.5)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    vit, scores = load_vit(unbroken / "encoder.pt"), []
    (known, known_labels), (asked, labels) = (
        plain_middles(photos / name, 32, 0.5) for name in ("train", "val"))
    known, asked = plain_features(vit, known, 2), plain_features(vit, asked, 2)
    mean, std = known.mean(0), known.std(0)
    for x in (asked - mean) / std:
        cosines, votes = F.cosine_similarity(x, (known - mean) / std), torch.zeros(12)
        for nearest in cosines.argsort()[-k:]:
            votes[known_labels[nearest]] += math.exp(cosines[nearest] / 0.07)
        scores.append(votes - 1e-6 * torch.arange(12))  # of equal votes, the first class's counts
    top1, top5 = plain_accuracy(torch.stack(scores), labels)
    assert said["images"] == 36 and said["top1"] == pytest.approx(top1) and 0 < top1 < 100
    assert top1 < top5


@pytest.mark.parametrize("amp, dtype", [
    ("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", torch.float32)])
def test_precision_of_activations_losses_and_weights(
        unbroken, photos, tmp_path, monkeypatch, amp, dtype):
    """The teacher is used without gradients, and also for pictures, which may be in float32."""
    seen, linear, cross_entropy = set(), torch.nn.Linear.forward, F.cross_entropy

    def look(layer, x):
        x = linear(layer, x)
        seen.add(("trains" if x.requires_grad else "evaluates", x.dtype))
        return x

    def look_and_compare(logits, targets):
        loss = cross_entropy(logits, targets)
        seen.add(("loss", loss.dtype))
        return loss

    monkeypatch.setattr(torch.nn.Linear, "forward", look)
    monkeypatch.setattr(F, "cross_entropy", look_and_compare)
    call(train, *TRAIN, "--amp", amp, "--num_images", 8, "--epochs", 1, "--out", tmp_path / "a")
    expected = {("trains", dtype), ("evaluates", dtype)}
    assert seen | {("evaluates", torch.float32)} == expected | {("evaluates", torch.float32)}
    seen.clear()
    flags = [*TUNE, "--amp", amp, "--epochs", 1, "--labels_per_class", 2, "--num_val", 12]
    call(finetune, *flags, "--init", unbroken / "encoder.pt", "--out", tmp_path / "b")
    assert seen == expected | {("loss", torch.float32)}
    flags += ["--init", tmp_path / "b" / "best.pt", "--out", tmp_path / "c"]
    for mode in ["--knn"], ["--eval"], ["--predict", photos / "val" / "a"]:
        seen.clear()
        call(finetune, *flags, *mode)
        assert seen == {("evaluates", dtype)}, mode
    for out in tmp_path / "a", tmp_path / "b":
        assert {x.dtype for x in load(out / "checkpoint.pt")["model"].values()} == {torch.float32}


def test_attention_in_bf16_is_nearly_that_in_float32():
    torch.manual_seed(0)
    attention, x = Attention(64, 4), 3 * torch.randn(2, 9, 64)
    with torch.no_grad():
        expected = attention(x)
        error = attention.bfloat16()(x.bfloat16()).float() - expected
    assert error.std() < 0.02 * expected.std()


def test_psnr_and_picture_of_known_predictions(tmp_path, monkeypatch):
    """They are half of the target: half of the way from a patch's mean to its pixels, of 0 .. 1."""
    forward, errors = BootMAE.forward, []

    def know(model, images, mask):
        truth = patchify(images, 8)[mask].view(len(images), -1, 3, 64)
        mean, variance = truth.mean(3, keepdim=True), truth.var(3, correction=0, keepdim=True)
        errors.append((truth - mean).div(2).square().mean().item())
        half = 0.5 * (truth - mean) / (variance + 1e-5).sqrt()
        return forward(model, images, mask)._replace(pixels=half.flatten(2))

    monkeypatch.setattr(BootMAE, "forward", know)
    call(train, *TRAIN, "--epochs", 1, "--out", tmp_path)
    picture = np.asarray(Image.open(tmp_path / "epoch_0001.png"), dtype=float)
    for row, column in np.ndindex(4, 2):  # of two images a row, a pixel of which is 4 x 4
        tiles = picture[132 * row + 24 :: 4, 5 * 132 * column :: 4]
        original, _, nothing, half = (tiles[:32, 33 * place :][:, :32] for place in range(4))
        assert np.abs(half - (original + nothing) / 2).max() <= 1
        means = (tile.reshape(4, 8, 4, 8, 3).mean(axis=(1, 3)) for tile in (original, nothing))
        assert np.abs(np.subtract(*means)).max() <= 1 and (original != nothing).any()
    line = read_log(tmp_path)[0]
    assert line["psnr_nothing"] == pytest.approx(-10 * math.log10(errors[-1]), abs=1e-3)
    assert line["psnr"] == pytest.approx(line["psnr_nothing"] + 10 * math.log10(4), abs=1e-3)


def test_curves_follow_the_log(unbroken):
    """The blue line at the three epochs of both panels: values that fall go down."""
    pixels, log = np.asarray(Image.open(unbroken / "curves.png")), read_log(unbroken)
    blue = (pixels == (31, 111, 180)).all(axis=2)
    for panel, name in enumerate(["pixel_loss", "feature_loss"]):
        heights = [np.flatnonzero(blue[:, panel * 440 + x]).mean() for x in (64, 240, 416)]
        values = [line[name] for line in log]
        assert np.corrcoef(values, heights)[0, 1] < -0.999  # the origin of a picture is its top
    lines = [dict(epoch=1, loss=1.0, top1=10.0), dict(epoch=2, loss=math.nan), dict(epoch=3)]
    assert train.draw_curves(lines).size == (2 * 440, 300)  # what is missing is left out


def test_accuracies_and_tiles_are_those_of_a_plain_computation(tuned, capsys):
    """Of the last model and of its average. Tiles are green where the best model is right."""
    model, shapes = small_vit(num_classes=12).eval(), data.Shapes(60, 32, start=999_996)
    images = torch.stack([data.to_tensor(shapes.open(index)) for index in range(60)])
    images, checkpoint = data.scale_pixels(images), load(tuned / "checkpoint.pt")
    found = []
    for name in "model", "average":
        model.load_state_dict(checkpoint[name])
        found += plain_accuracy(model(images), shapes.labels)
    last = checkpoint["log"][-1]
    assert found == pytest.approx([last[n] for n in ("top1", "top5", "top1_ema", "top5_ema")])
    assert found[:2] != found[2:]
    model.load_state_dict(load_weights(tuned / "best.pt"))
    call(finetune, *TUNE, "--init", tuned / "best.pt", "--eval")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    best = plain_accuracy(model(images), shapes.labels)
    assert said == pytest.approx(dict(images=60, top1=best[0], top5=best[1]))
    right = (model(images).argmax(dim=1).numpy() == shapes.labels).tolist()
    picture, order = Image.open(tuned / "predictions.png"), random.Random(0).sample(range(60), 60)
    for place, index in enumerate(order[:32]):
        x, y = place % 8 * 152 + 8, place // 8 * 188 + 8
        colour = (0, 128, 0) if right[index] else (255, 0, 0)
        assert picture.getpixel((x - 2, y - 2)) == colour
        tile = picture.crop((x, y, x + 136, y + 136))
        assert tile == shapes.open(index).resize((136, 136), BICUBIC)
    assert any(right) and not all(right)


@pytest.mark.parametrize("module, files", [
    (train, {"encoder.pt", "epoch_0003.png"}), (finetune, {"best.pt", "predictions.png"})])
def test_files_are_on_the_disk_before_they_take_their_names(tmp_path, monkeypatch, module, files):
    """checkpoint.pt is the last: a run that goes on from it has all the others."""
    fsync, replace, synced, names = os.fsync, os.replace, {}, []

    def watch_fsync(number):
        fsync(number)
        synced[os.fstat(number).st_ino] = os.fstat(number).st_size

    def watch_replace(source, target):
        assert synced[os.stat(source).st_ino] == os.stat(source).st_size, target
        names.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    flags = [*TRAIN, "--num_images", 8] if module is train else ["--scratch", *TUNE]
    call(module, *flags, "--save_every", 2, "--out", tmp_path)
    assert files | {"log.jsonl", "curves.png"} < set(names) and names[-1] == "checkpoint.pt"
    assert names.count("checkpoint.pt") == 2  # after epochs 2 and 3


def test_settings_that_must_match_are_refused(unbroken, tuned, tmp_path, capsys):
    """All of a recipe but what may change; and of --init and --data, what they hold."""
    may_change = {"epochs", "warmup_epochs", "lr", "base_lr", "min_lr"}
    others = {"seed", "images", "init_pixels", "num_heads"}
    for module, out, more in (train, unbroken, "num_images"), (finetune, tuned, "teacher"):
        must_match = {*module.RECIPES["shapes"], *others, more} - may_change
        settings = load(out / "checkpoint.pt")["settings"].keys()
        assert must_match <= settings and not settings & {"workers", "device", "log_every"}
    class_folders(tmp_path, images="a b c")
    weights, start = load(unbroken / "encoder.pt"), tmp_path / "encoder.pt"
    torch.save(weights | {"cls_token": 2 * weights["cls_token"]}, start)
    pretrain = [train, *TRAIN, "--out", unbroken]
    for module, *flags in (
        [*pretrain, "--init", start], [*pretrain, "--data", tmp_path / "images"],
        [finetune, *TUNE, *AUGMENTED, "--out", tuned, "--init", start],
        [finetune, *TUNE, *AUGMENTED, "--out", tuned, "--scratch"],
    ):
        assert "was trained with" in refused(capsys, module, *flags), flags
    words = "trained with batch_size 8 (now 4), inject [1, -1] (now [0, 0]): give the same"
    assert words in refused(capsys, *pretrain, "--batch_size", 4, "--inject", 0, 0)


# --------------------------------------------------------------------------------------------------
# Stops and kills


@pytest.mark.parametrize("module, number", [
    (train, signal.SIGTERM), (train, signal.SIGINT), (finetune, signal.SIGKILL)])
def test_a_run_that_a_signal_ends_goes_on_to_the_same_result(
        unbroken, tuned, tmp_path, capsys, module, number):
    """With loading workers, which get the signal as well, as Ctrl-C's; `unbroken` has none."""
    flags = TRAIN if module is train else ["--init", unbroken / "encoder.pt", *TUNE, *AUGMENTED]
    flags = [*flags, "--workers", 2, "--out", tmp_path]
    expected = unbroken if module is train else tuned
    process = launch(f"{module.__name__}.py", *flags, start_new_session=True)
    wait_for(tmp_path / "checkpoint.pt", process)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    killed = number == signal.SIGKILL
    assert process.returncode == (-number if killed else 128 + number)
    assert f"stopped by {number.name}" in err or killed
    assert 6 <= load(tmp_path / "checkpoint.pt")["step"] < 18
    call(module, *flags)
    assert "going on from" in capsys.readouterr().out
    assert_same(result(tmp_path), result(expected))


def start_two(out, each_step, *options):
    """Start train.py in two processes, with a line of code more after each step's losses."""
    (out / "start.py").write_text(f"""if True:
        import itertools, os, time, train
        count, add = itertools.count(), train.Meter.add

        def add_and_more(meter, *losses):
            add(meter, *losses)
            step, run = next(count), meter.run
            {each_step}

        train.Meter.add = add_and_more
        train.launch(train.main, train.parse_args())""")
    return launch(*TORCHRUN, *options, out / "start.py", *TRAIN, "--out", out / "run")


def test_two_processes_save_at_a_signal_and_start_again_after_a_death(unbroken, tmp_path):
    """The first start is stopped within an epoch, where both wait for torchrun's signal.

    In the second, rank 1 dies in its first attempt, and --max_restarts starts both once more.
    """
    process = start_two(tmp_path, "while step >= 8 and not run.signal: time.sleep(0.01)")
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode and "stopped by SIGTERM" in err
    assert 6 <= load(tmp_path / "run" / "checkpoint.pt")["step"] <= 9
    first = "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
    die = f"if step == 6 and {first}: os.kill(os.getpid(), 9 * run.rank)"
    process = start_two(tmp_path, die, "--max_restarts=1")
    said, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert said.count("going on from") == 2
    assert_nearly_same_run(tmp_path / "run", unbroken)


def test_processes_end_together_and_only_a_second_ctrl_c_kills(monkeypatch):
    """torchrun ends all when one ends, with signals of its own, and rank 0 may still be saving."""
    run, install = train.Run(train.parse_args([])), MagicMock()
    monkeypatch.setattr(signal, "signal", install)
    for number in signal.SIGTERM, signal.SIGINT:
        run._on_signal(number, None)
        assert run.signal == number
    install.assert_called_once_with(signal.SIGINT, signal.SIG_DFL)
    run.world_size = 2
    monkeypatch.setattr(train.dist, "all_reduce", MagicMock(side_effect=InterruptedError("waits")))
    with pytest.raises(InterruptedError, match="waits"):
        run.stop(3)


def test_a_signal_during_the_all_reduce_is_not_lost(monkeypatch):
    """Processes only act on what all of them have seen, so this one counts at the next step."""
    run = train.Run(train.parse_args([]))
    run.world_size, run.device = 2, torch.device("meta")  # where reading a number fails
    monkeypatch.setattr(train.dist, "all_reduce",
                        lambda flag, op: setattr(run, "signal", signal.SIGTERM))
    assert not run.stop_asked()
    assert run.stop_asked() and run.signal == signal.SIGTERM


@pytest.mark.parametrize("module, flags, steps", [
    (train, [*TRAIN, "--num_images", 8, "--save_every", 2], [0, 1, 2]),
    (train, [*TRAIN, "--num_images", 16, "--amp", "fp16"], [0, 1, 5]),
    (finetune, ["--scratch", *TUNE, *AUGMENTED, "--seed", 2**40, "--amp", "fp16"], [5, 8, 17]),
], ids=["save_every 2", "train", "finetune"])
def test_stops_repeat_nothing(tmp_path, capsys, monkeypatch, module, flags, steps):
    """At the end of an epoch, within one, and at the very end, when best.pt must be there."""
    init = functools.partialmethod(torch.amp.GradScaler.__init__, init_scale=2.0**24)
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", init)  # first steps in fp16 overflow
    call(module, *flags, "--out", tmp_path / "unbroken")
    flags = [*flags, "--out", tmp_path / "stopped"]
    stop_at(monkeypatch, *steps)
    for step in steps:
        line = refused(capsys, module, *flags, code=128 + signal.SIGTERM)
        assert f"SIGTERM after step {step + 1}" in line
    assert (tmp_path / "stopped" / "best.pt").exists() == (module is finetune)
    call(module, *flags)
    assert "finished" in capsys.readouterr().out
    state, log = result(tmp_path / "stopped")
    assert_same((state, log), result(tmp_path / "unbroken"))
    assert "fp16" not in flags or 2 < state["scaler"]["scale"] < 2**24


def test_a_kill_before_the_last_checkpoint(unbroken, tmp_path, capsys, monkeypatch):
    """The log has a line of the third epoch by then, which the run that goes on must lose."""
    flags, save = [*TRAIN, "--out", tmp_path], train.Run.save_checkpoint

    def save_or_die(run, saved, step):
        if step == 18:
            raise KeyboardInterrupt
        save(run, saved, step)

    with patch.object(train.Run, "save_checkpoint", save_or_die), pytest.raises(KeyboardInterrupt):
        call(train, *flags)
    assert len(read_log(tmp_path)) == 3
    stop_at(monkeypatch, 0)  # soon after the resumption
    refused(capsys, train, *flags, code=128 + signal.SIGTERM)
    assert len(read_log(tmp_path)) == 2
    call(train, *flags)
    assert_same(result(tmp_path), result(unbroken))
