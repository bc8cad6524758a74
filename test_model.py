"""Tests: each against plain loops written from the paper's definitions, or against a property that must hold.

    python -m pytest -q
"""
import copy
import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
from masking import block_mask, loss_weight, random_mask
from model import (
    SIZES,
    Attention,
    BootMAE,
    ViT,
    from_official,
    init_weights,
    normalize_patches,
    patchify,
    resize_positions,
    sincos_positions,
    unpatchify,
)

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
            patches.append(torch.stack([image[ch, top + y, left + x] for ch in range(3) for y in range(p) for x in range(p)]))
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
        pixel_errors += [(weight[n] * (pixels[n] - naive_normalize(patches[n], p)) ** 2).mean() for n in range(len(row))]
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
    {}, {"inject": (0, 0)}, {"inject": (2, 1)}, {"inject": (-1, -1)}, {"feature_target": False}, {"weighted_loss": False},
    {"inject": (0, 0), "feature_target": False}, {"decoder_depth": 1},
], ids=str)
def test_forward_matches_the_definition(changes):
    model, images, mask = small_model(**changes)
    out = model(images, mask)
    settings = SMALL | changes
    pixel_loss, feature_loss, pixels, features = naive_bootmae(
        model.state_dict(), images, mask, 4, (2, 3), 3, 3, settings["decoder_depth"], settings.get("inject", (1, -1)),
        settings.get("feature_target", True), settings.get("weighted_loss", True))
    torch.testing.assert_close(out.pixels, pixels, rtol=0, atol=1e-6)  # positions are stored in float32
    torch.testing.assert_close(out.pixel_loss.double(), pixel_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.feature_loss.double(), feature_loss.double(), rtol=1e-5, atol=0)
    if features is None:
        assert out.features is None
    else:
        torch.testing.assert_close(out.features, features, rtol=0, atol=1e-6)


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
        handle = getattr(model, decoder).norm.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
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


def test_initial_weights():
    torch.manual_seed(0)
    attention = Attention(64, 4)
    attention.apply(init_weights)
    bound = math.sqrt(6 / (64 + 64))  # Xavier's, for q, k and v each as a 64 x 64 matrix
    for matrix in attention.qkv.weight.chunk(3):
        assert 0.95 * bound < matrix.abs().max() <= bound
    assert attention.qkv.bias.abs().max() == 0
    encoder = ViT(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=4)
    bound = math.sqrt(6 / (3 * 64 + 64))
    assert 0.95 * bound < encoder.patch_embed.proj.weight.abs().max() <= bound
    assert 0 < encoder.cls_token.abs().max() < 1e-4
    token = BootMAE(embed_dim=64, depth=1, num_heads=4, decoder_dim=4096, decoder_depth=1).regressor.mask_token
    assert 0.018 < token.std() < 0.022


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
        weights |= {"q_bias": rand(inner), "v_bias": rand(inner), "proj.weight": rand(width, inner), "proj.bias": rand(width)}
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

    theirs = {"patch_embed.proj.weight": rand(dim, 3, p, p), "patch_embed.proj.bias": rand(dim), "cls_token": rand(1, 1, dim),
              "pos_embed": table(dim), "de_pos_embed": table(width), "norm.weight": 1 + rand(dim), "norm.bias": rand(dim)}
    for i in range(depth):
        theirs |= block(f"blocks.{i}.", dim)
    for suffix, d in ("", width), ("_1", dim):
        theirs |= {f"down{suffix}.weight": rand(d, dim), f"down{suffix}.bias": rand(d), f"mask_token{suffix}": rand(1, 1, d),
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
                    key = key.removeprefix(f"{name}{suffix}.").replace("norm3", "norm_query").replace("norm4", "norm_context")
                    w[prefix + ours + key.replace("c_attn", "cross_attn")] = value
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


# ----------------------------------------------------------------------------------------------------------------------
# masking.py


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_masks_have_exact_counts(grid):
    num_patches = grid[0] * grid[1]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        for num_masked in {0, 1, num_patches // 2, round(0.75 * num_patches), num_patches - 1, num_patches}:
            for mask in (random_mask(8, num_patches, num_masked, generator), block_mask(8, grid, num_masked, generator)):
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
