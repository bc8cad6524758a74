"""Pretrain BootMAE.

    python train.py                                           built-in images, no GPU, a few minutes
    python train.py --data photos --recipe photos             a few thousand photos of your own
    python train.py --data imagenet/train --accum_steps 16    one GPU
    torchrun --nproc_per_node=8 train.py --data imagenet/train --accum_steps 2

The same command resumes an interrupted run. --batch_size counts the images of one optimizer step
over all processes and accumulation steps, so a recipe means the same on any number of GPUs.
"""
import argparse
import contextlib
import copy
import functools
import io
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from masking import block_mask, random_mask
from model import (
    SIZES, BootMAE, load_vit, patchify, read_file, unpatchify,
)

# --------------------------------------------------------------------------------------------------
# Settings: a flag beats the recipe, and that beats the defaults, which are for ViT-B on ImageNet

RECIPES = {
    "imagenet": dict(),
    "imagenet_large": dict(model="large", min_lr=1e-5, momentum=(0.999, 0.9999, 0.9999)),
    "cifar10": dict(model="small", img_size=32, patch_size=4, decoder_dim=192, epochs=300,
                    warmup_epochs=10, batch_size=512, base_lr=5e-4, min_lr=0.0),
    # In a short run, large holes teach little, and the teacher is useful late, so lambda rises late
    "photos": dict(model="nano", img_size=96, patch_size=12, decoder_dim=64, decoder_depth=1,
                   mask="random", mask_ratio=0.7, crop_scale=(0.4, 1.0), feature_ramp=1.0,
                   epochs=60, warmup_epochs=2, batch_size=32, base_lr=5e-3, min_lr=0.0),
    "shapes": dict(model="nano", img_size=64, patch_size=8, decoder_dim=64, decoder_depth=1,
                   mask="random", mask_ratio=0.6, crop_scale=(0.6, 1.0), feature_ramp=1.0,
                   epochs=15, warmup_epochs=1, batch_size=16, base_lr=16e-3, min_lr=0.0),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    whole, count, amount, share = number(0, kind=int), number(1, kind=int), number(0), number(0, 1)
    switch = dict(type=int, choices=(0, 1), default=1)
    add("--data", help="folder of images, nested or flat; without it, built-in images")
    add("--recipe", choices=RECIPES, help="without it, imagenet with --data, else shapes")
    add("--init", help="start from the encoder in this file, of any kind that finetune.py takes")
    add("--num_images", type=whole, default=0, help="use so many; 0: all (built-in ones: 2,400)")
    add("--model", choices=SIZES, default="base", help="size of the encoder")
    add("--img_size", type=count, default=224, help="side of the square input")
    add("--patch_size", type=count, default=16, help="side of a patch")
    add("--decoder_dim", type=number(4, kind=int), default=512, help="width of the pixel regressor")
    add("--decoder_depth", type=number(1, 100, int), default=2, help="blocks in each decoder")
    add("--inject", type=int, nargs=2, default=(1, -1),
        help="encoder blocks injected into regressor and predictor: -1 is the last, 0 is none")
    add("--feature_target", **switch, help="0: no teacher and no feature predictor")
    add("--weighted_loss", **switch, help="0: masked patches all weigh the same")
    add("--mask", choices=("block", "random"), default="block", help="kind of masks")
    add("--mask_ratio", type=share, default=0.75, help="fraction of the patches that is masked")
    add("--crop_scale", type=number(1e-6, 1), nargs=2, default=(0.2, 1.0),
        help="smallest and largest area of a random crop, as a share of the image")
    add("--epochs", type=count, default=800, help="length of the run")
    add("--warmup_epochs", type=amount, default=40,
        help="linear warm-up from 0; its share of the run is kept where --epochs changes")
    add("--batch_size", type=count, default=4096,
        help="images a step, over processes and --accum_steps")
    add("--base_lr", type=amount, default=1.5e-4,
        help="learning rate for 256 images; scales with --batch_size")
    add("--min_lr", type=amount, default=1e-4,
        help="learning rate at the end, or the peak if that is lower")
    add("--weight_decay", type=amount, default=0.05, help="not on biases, norms and CLS token")
    add("--betas", type=number(0, 0.9999999), nargs=2, default=(0.9, 0.95), help="of AdamW")
    add("--feature_ramp", type=share, default=0.25,
        help="fraction of training over which the weight of feature_loss rises to 1")
    add("--momentum", type=share, nargs=3, default=(0.999, 0.9999, 0.99999),
        help="of the teacher at the start, at 1/8 and from 1/2; lowered in short runs")
    add("--picture_every", type=count, default=5, help="epochs between pictures")
    add("--benchmark", action="store_true",
        help="time steps and loading, print a table, train nothing")
    add_run_flags(parser)
    args = parse_recipe(parser, RECIPES, argv)
    args.out = args.out or os.path.join("output", args.recipe)
    args.init = args.init and os.path.abspath(args.init)
    return args


# --------------------------------------------------------------------------------------------------
# A sample: one view of an image, and the mask that hides most of it


def pretrain_mask(batch: int, generator: torch.Generator, args: argparse.Namespace,
                  grid: tuple[int, int]) -> Tensor:
    """Masks of the kind and ratio that the flags ask for: bool (batch, N)."""
    num_patches = math.prod(grid)
    num_masked = round(args.mask_ratio * num_patches)
    if args.mask == "block":
        return block_mask(batch, grid, num_masked, generator)
    return random_mask(batch, num_patches, num_masked, generator)


def pretrain_sample(image: Image.Image, rng: random.Random, args: argparse.Namespace,
                    grid: tuple[int, int]) -> tuple:
    """A random crop of an image, perhaps mirrored, uint8 (3, H, W), and its mask, bool (N,)."""
    image = data.flip(data.random_resized_crop(image, args.img_size, rng, args.crop_scale), rng)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    return data.to_tensor(image), pretrain_mask(1, generator, args, grid)[0]


# --------------------------------------------------------------------------------------------------
# Schedules


def schedules(step: int, total_steps: int, epoch: int,
              args: argparse.Namespace) -> tuple[float, float, float]:
    """Learning rate, weight of feature_loss (lambda) and teacher momentum of one step.

    A teacher of momentum m averages over about 1 / (1 - m) steps: as published, 0.4 %, 4 % and 40 %
    of a run of 250,000. In a shorter run each momentum is lowered until it averages over its share.
    """
    progress, peak = step / total_steps, args.base_lr * args.batch_size / 256
    lr = cosine_lr(progress, args.warmup_epochs / args.epochs, peak, args.min_lr)
    # Lambda rises with each epoch, as in the authors' code, the others with each step
    feature_weight = min(1.0, (epoch + 1) / max(1e-9, args.feature_ramp * args.epochs))
    # Each share is a little more than published, so that the published run stays as it is
    spans = [max(1.0, share * total_steps) for share in (1 / 240, 1 / 24, 1 / 2.4)]
    momenta = [min(m, 1 - 1 / span) for m, span in zip(args.momentum, spans)]
    return lr, feature_weight, float(np.interp(progress, (0, 1 / 8, 1 / 2), momenta))


# --------------------------------------------------------------------------------------------------
# Pretraining


def main(args: argparse.Namespace) -> None:
    run = Run(args)
    device = run.device
    with one_line_errors():  # wrong flags or data end the run here, before anything is written
        run.split_batch()
        source = open_images(args)
        model = build_model(args, run.print).to(device)
    view = functools.partial(pretrain_sample, args=args, grid=model.grid)
    samples = data.Samples(source, view, args.seed)
    steps_per_epoch = len(source) // args.batch_size
    total_steps = args.epochs * steps_per_epoch

    groups = decay_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=args.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype is torch.float16)
    if args.benchmark:
        return benchmark(model, optimizer, scaler, samples, run)

    meter = Meter(run, "pixel_loss", "feature_loss")
    parts = dict(model=model, optimizer=optimizer, scaler=scaler, meter=meter, samples=samples)
    start = run.resume(parts, FIXED, steps_per_epoch)
    run.begin(start, total_steps, f"{args.recipe}: {len(source)} images")
    network = run.wrap(model)
    order = data.Batches(len(source), args.batch_size, args.epochs, args.seed, start,
                         args.accum_steps, run.rank, run.world_size)
    batches = iter(run.loader(samples, order))
    # The same eight images, crops and masks in each picture
    gallery = [samples[i] for i in random.Random(0).sample(range(len(source)), min(8, len(source)))]

    model.train()
    for step in (bar := run.bar(start, total_steps)):
        epoch = step // steps_per_epoch
        lr, feature_weight, momentum = schedules(step, total_steps, epoch, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Forward and backward, in parts that fit into memory; DDP averages gradients in the last
        for part in range(args.accum_steps):
            images, mask, _ = next(batches)                      # uint8 (b, 3, H, W), bool (b, N)
            images = data.scale_pixels(images.to(device, non_blocking=True))  # float (b, 3, H, W)
            network.require_backward_grad_sync = part == args.accum_steps - 1
            with run.autocast():
                out = network(images, mask)  # the mask is on the CPU: checking it waits for no GPU
                loss = out.pixel_loss + feature_weight * out.feature_loss
            scaler.scale(loss / args.accum_steps).backward()
            meter.add(out.pixel_loss, out.feature_loss)

        # Encoder and decoders take a step, the teacher follows
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.update_teacher(momentum)

        # Read the losses only every --log_every steps: reading them waits for the device
        done = step + 1
        if done == 1 or done % args.log_every == 0:
            losses = meter.look()
            run.check_scale(scaler)
            run.report_broken(samples)
            bar.set_postfix(losses, lr=lr, refresh=False)
            if done == 1:
                run.print_values("first step", losses)
        if epoch_ends := done % steps_per_epoch == 0:
            run.check_weights(model, done)
            values = meter.means() | run.speed(done)
            values |= dict(lr=lr, momentum=momentum, feature_weight=feature_weight)
            if done == total_steps or (epoch + 1) % args.picture_every == 0:
                picture, quality = draw_reconstructions(model, gallery, run)
                run.save_picture(picture, f"epoch_{epoch + 1:04d}.png")
                values |= quality
            run.log_epoch(done, epoch + 1, values, samples)
            meter.reset()
        stop = run.stop_asked()
        if stop or done == total_steps or epoch_ends and (epoch + 1) % args.save_every == 0:
            run.check_weights(model, done)
            run.save_weights(model.encoder, "encoder.pt")
            run.save_checkpoint(parts, done, steps_per_epoch)
        if stop:
            run.stop(done)
    files = "encoder.pt, checkpoint.pt, log.jsonl, curves.png and pictures"
    run.print(f"done: {args.out} holds {files}")


# Settings that a resumed run must not change
FIXED = ("data", "num_images", "init", "model", "img_size", "patch_size", "decoder_dim",
         "decoder_depth", "mask", "mask_ratio", "inject", "feature_target", "weighted_loss", "seed")


def open_images(args: argparse.Namespace):
    """The images to train on, a source of `data.Samples`. ValueError if they don't fill a batch."""
    built_in = args.num_images or 2400
    source = data.ImageFolder(args.data) if args.data else data.Shapes(built_in, args.img_size)
    if 0 < args.num_images < len(source):
        chosen = random.Random(args.seed).sample(range(len(source)), args.num_images)
        source = data.Subset(source, chosen)
    # ImageNet's recipes are for hundreds of steps an epoch; in a few, they teach nothing
    least = args.batch_size * (10 if args.recipe.startswith("imagenet") else 1)
    if len(source) < least and not args.benchmark:
        raise ValueError(
            f"--batch_size {args.batch_size} is too large for the {len(source)} images there are: "
            "give a smaller one, or --recipe photos, which suits a folder of a few thousand")
    return source


def build_model(args: argparse.Namespace, report: Callable[[str], None]) -> BootMAE:
    """The model that the flags ask for, the same in every process. ValueError if sizes misfit."""
    torch.manual_seed(args.seed)
    model = BootMAE(
        args.img_size, args.patch_size, **SIZES[args.model],
        decoder_dim=args.decoder_dim, decoder_depth=args.decoder_depth, inject=args.inject,
        feature_target=bool(args.feature_target), weighted_loss=bool(args.weighted_loss))
    if args.init:
        heads = SIZES[args.model]["num_heads"]
        vit = load_vit(args.init, args.img_size, num_classes=0, num_heads=heads, report=report)
        found = vit.cls_token.shape[2], len(vit.blocks), vit.patch_size
        wanted = model.encoder.cls_token.shape[2], len(model.encoder.blocks), args.patch_size
        if found != wanted:
            raise ValueError(f"--init {args.init} has width, depth and patch size {found}, and the "
                             f"flags ask for {wanted}: choose --model and --patch_size to match")
        model.encoder.load_state_dict(vit.state_dict())
        if model.teacher is not None:
            model.teacher.load_state_dict(model.encoder.state_dict())
    num_patches = math.prod(model.grid)
    if not 0 < round(args.mask_ratio * num_patches) < num_patches:
        raise ValueError(f"--mask_ratio {args.mask_ratio}: of {num_patches} patches at least one "
                         "must be masked and one visible")
    return model


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: matrices and mask tokens decay; biases, norms and the CLS token do not."""
    groups = [dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0)]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim == 1 or name.endswith("cls_token")]["params"].append(p)
    return groups


# --------------------------------------------------------------------------------------------------
# The picture


@torch.no_grad()
def draw_reconstructions(model: BootMAE, gallery: list[tuple],
                         run: "Run") -> tuple[Image.Image, dict[str, float]]:
    """A picture of the model's predictions for some samples of `pretrain_sample`, and their PSNR.

    The target leaves out a patch's mean and contrast, so "prediction" has the true ones. "no
    prediction" shows the true mean alone, as a model that predicts zeros would. psnr and
    psnr_nothing compare the masked patches of the two with the original. "teacher features" are
    three principal components, after the mean over the images is subtracted at each place.
    """
    images, masks, _ = torch.utils.data.default_collate(gallery)
    images = data.scale_pixels(images).to(run.device)                          # (B, 3, H, W)
    model.eval()
    out = model(images, masks)
    model.train()

    p, grid, masked = model.patch_size, model.grid, out.masked[:, :, None]     # (B, M, 1)
    patches = patchify(images, p)                                              # (B, N, 3*p*p)
    truth = torch.take_along_dim(patches, masked, 1).unflatten(2, (3, -1))     # (B, M, 3, p*p)
    variance, mean = torch.var_mean(truth, dim=3, correction=0, keepdim=True)  # (B, M, 3, 1)
    nothing = mean.expand_as(truth)                                            # (B, M, 3, p*p)
    predicted = out.pixels.float().unflatten(2, (3, -1))                       # (B, M, 3, p*p)
    predicted = (predicted * (variance + 1e-5).sqrt() + mean).clamp(-1, 1)

    def shown(values: Tensor) -> Tensor:
        """The images (B, 3, H, W) with `values` (B, M, 3, p*p) in the masked places."""
        places = masked.expand(-1, -1, patches.shape[2])
        return unpatchify(patches.scatter(1, places, values.flatten(2)), p, grid)

    def psnr(values: Tensor) -> float:
        error = (values - truth).div(2).square().mean().item()  # pixels span 2
        return -10 * math.log10(error + 1e-10)

    columns = {"original": images, "masked": shown(torch.full_like(truth, 0.5)),
               "no prediction": shown(nothing), "prediction": shown(predicted)}
    if model.teacher is not None:
        features = model.teacher.encode(patches)[0][:, 1:].float()             # (B, N, D)
        features = (features - features.mean(dim=0)).flatten(0, 1)             # (B*N, D)
        # On the CPU: the GPU's solver wants memory of its own, of which none may be left
        _, axes = torch.linalg.eigh((features.T @ features).cpu())             # eigenvalues rise
        axes = axes[:, -3:].flip(1).to(run.device)                             # (D, 3)
        colours = features @ (axes * axes.sum(dim=0).sign())                   # (B*N, 3)
        colours = (colours / (2 * colours.std(dim=0) + 1e-6)).clamp(-1, 1)
        maps = colours.unflatten(0, (-1, *grid)).permute(0, 3, 1, 2)           # (B, 3, *grid)
        columns["teacher features"] = nn.functional.interpolate(maps, images.shape[2:])

    zoom = max(1, round(144 / images.shape[3]))
    side = zoom * images.shape[3] + 4
    height = math.ceil(len(images) / 2) * side + 24
    picture = Image.new("RGB", (2 * len(columns) * side, height), "white")
    for place, (title, column) in enumerate(2 * list(columns.items())):  # two images a row
        ImageDraw.Draw(picture).text((place * side + 2, 4), title, fill="black", font_size=15)
        pixels = column.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1)   # (B, H, W, 3)
        for row, tile in enumerate(pixels[place // len(columns) :: 2].cpu().numpy()):
            tile = ImageOps.scale(Image.fromarray(tile), zoom, Image.Resampling.NEAREST)
            picture.paste(tile, (place * side, row * side + 24))
    return picture, dict(psnr=psnr(predicted), psnr_nothing=psnr(nothing))


def draw_curves(log: list[dict]) -> Image.Image:
    """Curves over the epochs, one panel each: the losses, and top-1 of a classifier."""
    names = ("pixel_loss", "feature_loss", "loss", "top1", "top1_ema")
    curves = {}
    for name in names:
        points = [(line["epoch"], line[name]) for line in log if name in line]
        points = [(epoch, value) for epoch, value in points if math.isfinite(value)]
        if any(value for _, value in points):  # not the feature_loss of a run without a teacher
            curves[name] = points
    width, height, left, top = 440, 300, 64, 40  # of a panel, and its margins
    w, h = width - left - 24, height - top - 44  # of the axes
    picture = Image.new("RGB", (width * max(1, len(curves)), height), "white")
    draw = ImageDraw.Draw(picture)
    text = functools.partial(draw.text, fill="black", font_size=14)
    last = max(2, log[-1]["epoch"])
    stride = w / (last - 1)  # from one epoch to the next
    for place, (name, points) in enumerate(curves.items()):
        x0 = place * width + left
        low, high = min(value for _, value in points), max(value for _, value in points)
        room = 0.05 * (high - low) or 0.05 * abs(high)
        low, high = max(low - room, min(low, 0)), high + room  # no axis below 0 for values above
        text((x0, 10), f"{name}  {points[-1][1]:.4g}", font_size=18)
        for tick in range(5):
            y = top + h * tick / 4
            draw.line((x0, y, x0 + w, y), fill="lightgray")
            text((x0 - 6, y), f"{high - (high - low) * tick / 4:.3g}", anchor="rm")
        for epoch in sorted({1, (1 + last) // 2, last}):
            text((x0 + stride * (epoch - 1), top + h + 6), f"{epoch}", anchor="ma")
        text((x0 + w / 2, top + h + 22), "epoch", anchor="ma")
        dots = [(x0 + stride * (epoch - 1), top + h * (high - value) / (high - low))
                for epoch, value in points]
        draw.line(dots, fill="#1f6fb4", width=3, joint="curve")
        for x, y in dots if len(dots) < 40 else dots[-1:]:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill="#1f6fb4")
    return picture


# --------------------------------------------------------------------------------------------------
# --benchmark


def benchmark(model: BootMAE, optimizer, scaler, samples: data.Samples, run: "Run") -> None:
    """Time training steps on random images, and the loading of real ones; print where time goes.

    GPU times come from CUDA events, CPU times from the clock. Each is the median of ten steps,
    after three steps to warm up. With --accum_steps a "step" is one part of a batch and an update.
    """
    args, cuda = run.args, run.device.type == "cuda"
    run.join()
    network = run.wrap(model)
    batch = args.batch_size // (run.world_size * args.accum_steps)
    images = torch.rand(batch, 3, args.img_size, args.img_size, device=run.device) * 2 - 1
    mask = pretrain_mask(batch, torch.Generator().manual_seed(0), args, model.grid)

    def clock():
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(marks: list) -> list[float]:
        if cuda:
            torch.cuda.synchronize()
        return [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in zip(marks, marks[1:])]

    times = []
    for _ in range(13):
        marks = [clock()]
        with run.autocast():
            out = network(images, mask)
        marks.append(clock())
        scaler.scale(out.pixel_loss + out.feature_loss).backward()
        marks.append(clock())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.update_teacher(0.999)
        marks.append(clock())
        times.append(milliseconds(marks))
    forward, backward, update = np.median(times[3:], axis=0)
    step = forward + backward + update
    name = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if cuda else resident

    # The teacher's MLP has a matrix product of this size: what the device can do at best
    tokens, width = batch * (1 + math.prod(model.grid)), SIZES[args.model]["embed_dim"]
    a = torch.randn(tokens, width, device=run.device, dtype=run.dtype)
    b = torch.randn(width, 4 * width, device=run.device, dtype=run.dtype)
    marks = [clock()]
    for _ in range(23):
        a @ b
        marks.append(clock())
    matmul = 2 * a.numel() * 4 * width / np.median(milliseconds(marks)[3:]) / 1e9  # TFLOP/s

    twin = copy.deepcopy(model).to("meta")  # counts the operations of one image without doing them
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = twin(images[:1].to("meta"), mask[:1])
        (out.pixel_loss + out.feature_loss).backward()
    gflop = counter.get_total_flops() / 1e9

    torch.set_num_threads(1)  # as a worker has it
    began, loaded = time.time(), 0
    while time.time() - began < 2:
        samples[loaded]
        loaded += 1
    loading = loaded / (time.time() - began)

    speed = 1e3 * batch * run.world_size / step
    hours = args.epochs * len(samples) / speed / 3600
    achieved = gflop * batch / step
    run.print(f"{args.recipe} ({args.model}), batch {batch} a process, {run.world_size} x {name}, "
              f"{run.dtype or torch.float32}{', compiled' if args.compile else ''}")
    for label, value in (
        ("images/s", f"{speed:.4g}"),
        (f"hours of {args.epochs} x {len(samples)} images", f"{hours:.3g}"),
        ("ms a step", f"{step:.4g}"),
        ("  forward and losses", f"{forward:.4g}"),
        ("  backward", f"{backward:.4g}"),
        ("  optimizer and teacher update", f"{update:.4g}"),
        ("GFLOP an image", f"{gflop:.4g}"),
        ("TFLOP/s a process", f"{achieved:.4g}"),
        ("  share of a matrix product's", f"{100 * achieved / matmul:.3g} % of {matmul:.4g}"),
        ("peak memory a process, GiB", f"{peak / 2**30:.3g}"),
        ("images/s a loading worker", f"{loading:.4g}"),
        ("  workers a process to keep up", f"{math.ceil(speed / run.world_size / loading)}"),
    ):
        run.print(f"{label:34}{value}")


# --------------------------------------------------------------------------------------------------
# What a run needs around its loop. finetune.py imports it; nothing below depends on the model.


def cosine_lr(progress: float, warmup: float, peak: float, end: float) -> float:
    """Learning rate at `progress` (0 .. 1): from 0 to `peak` at `warmup`, then cosine to `end`."""
    if progress < warmup:
        return peak * progress / warmup
    end = min(end, peak)  # a small batch lowers the peak, and not the end
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def number(low: float, high: float = math.inf, kind: type = float) -> Callable[[str], float]:
    """An argparse type: a finite number of type `kind` from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            limits = f"{low:g} to {high}" if high < math.inf else f"{low:g} or more"
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it when it complains
    return parse


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong flag in one line, and shows defaults in its help."""

    class Formatter(argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str:
            silent = any(action.default is value for value in (None, False, argparse.SUPPRESS))
            return action.help + ("" if silent else " (default: %(default)s)")

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=Parser.Formatter, allow_abbrev=False,
            epilog="Defaults are those of --recipe imagenet, where they are shown; RECIPES, at the "
                   "top of the script, has them all.")

    def error(self, message: str):
        fail(message.removeprefix("argument "))


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `Run`."""
    add = parser.add_argument
    whole, count = number(0, kind=int), number(1, kind=int)
    add("--out",
        help="folder for all that is written; without it, one below output/, or for --predict "
             "beside the classifier's")
    add("--fresh", action="store_true", help="start over; a checkpoint in --out is removed")
    add("--accum_steps", type=count, default=1,
        help="cut a batch into so many parts, to save memory")
    add("--seed", type=number(0, 2**63 - 1, int), default=0,
        help="of weights, order, crops and masks")
    add("--workers", type=whole,
        help="loading processes for each training process; without it, 1 on a CPU, and with GPUs "
             "the number of cores per GPU, at most 16")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto",
        help="auto: a GPU if there is one")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="precision; auto: bf16 where the hardware has it, else fp16 on a GPU and off on a CPU")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--save_every", type=count, default=1, help="epochs between checkpoints")
    add("--log_every", type=count, default=20, help="steps between looks at the losses")


def parse_recipe(parser: argparse.ArgumentParser, recipes: dict[str, dict],
                 argv: list[str] | None) -> argparse.Namespace:
    """Parse flags, with the recipe's values as defaults. Warm-up keeps its share of --epochs."""
    args = parser.parse_args(argv)                                # once, to learn the recipe
    recipe = args.recipe or ("imagenet" if args.data else "shapes")
    parser.set_defaults(recipe=recipe, **recipes[recipe])
    epochs = parser.parse_args(argv).epochs                       # again, to learn the length
    warmup = parser.get_default("warmup_epochs") * epochs / parser.get_default("epochs")
    parser.set_defaults(warmup_epochs=warmup)
    args = parser.parse_args(argv)
    if args.warmup_epochs > args.epochs:
        fail(f"--warmup_epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}: give "
             "fewer")
    for flag in "data", "init", "out", "predict":
        if getattr(args, flag, None) == "":
            fail(f"--{flag} is empty: name a file or folder, or leave it out")
    args.data = args.data and os.path.abspath(args.data)
    return args


def fail(message: str, code: int = 2, everywhere: bool = False):
    """End with a line on stderr. Code 2: the call can't work. 1: something went wrong later.

    Only local rank 0 prints. Set `everywhere` for an error that hits a single process.
    """
    if everywhere or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def one_line_errors():
    """Report a ValueError or OSError in one line: these are raised when flags or data are wrong."""
    try:
        yield
    except OSError as error:
        fail(f"can't read {error.filename}: {error.strerror}")
    except ValueError as error:
        fail(str(error))


class Run:
    """Processes, device, precision, checkpoint, log and signals of a training run.

    The loop calls a Run; a Run never calls the loop. All processes must make the same calls in the
    same order, because many of the calls wait for the other processes.
    """

    cure = "A lower learning rate, a longer warm-up or --amp bf16 may help"

    def __init__(self, args: argparse.Namespace):
        self.args, self.log, self.signal = args, [], 0
        self.rank = int(os.environ.get("RANK", 0))  # torchrun sets these four
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun --max_restarts
        self.fresh = args.fresh and self.restarts == "0"  # a restarted run goes on
        self.kept = f"nothing was saved over {args.out}/checkpoint.pt"

        cuda = torch.cuda.is_available() and args.device != "cpu"
        if args.device == "cuda" and not cuda:
            fail("--device cuda: no CUDA device can be used here; --device cpu runs without one")
        if cuda and local_size > (gpus := torch.cuda.device_count()):
            fail(f"--nproc_per_node is more than the {gpus} GPUs of this machine")
        self.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")

        if cuda:
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # without AVX-512 bf16, a CPU emulates it, which is slow
            fast = torch.cpu._is_avx512_bf16_supported()
        auto = "bf16" if fast else "fp16" if cuda else "off"
        amp = auto if args.amp == "auto" else args.amp
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]

        self.workers = args.workers
        if args.workers is None:  # on a CPU the model needs the cores itself
            cores = len(os.sched_getaffinity(0)) // local_size
            self.workers = max(1, min(16, cores)) if cuda else 1

    @property
    def config(self) -> dict:
        """All settings but --fresh and --workers, as saved with the run."""
        return {name: tuple(value) if isinstance(value, list) else value
                for name, value in vars(self.args).items()
                if name not in ("fresh", "workers", "given")}

    def print(self, *words: str) -> None:
        if self.is_main:
            tqdm.write(" ".join(words))
            sys.stdout.flush()

    def print_values(self, title: str, values: dict) -> None:
        self.print("  ".join([title, *(f"{name} {value:.5g}" for name, value in values.items())]))

    # ---- before the loop, in this order

    def split_batch(self) -> None:
        """Raise ValueError if a batch can't be split equally over processes and --accum_steps."""
        batch_size, accum_steps = self.args.batch_size, self.args.accum_steps
        if batch_size % (self.world_size * accum_steps):
            raise ValueError(f"--batch_size {batch_size} is not divisible by {self.world_size} "
                             f"processes x --accum_steps {accum_steps}")

    def resume(self, parts: dict, fixed: tuple[str, ...], steps_per_epoch: int) -> int:
        """Load the checkpoint, if there is one, into `parts`; returns the number of steps done."""
        path = os.path.join(self.args.out, "checkpoint.pt")
        if self.fresh or not os.path.exists(path):
            return 0
        with one_line_errors():
            checkpoint = read_file(path)
        keys = {"config", "step", "steps_per_epoch", "log", "model", "optimizer", "samples"}
        instead = "another --out leaves it alone, --fresh replaces it"
        if not keys <= checkpoint.keys():
            fail(f"{path} is no checkpoint of a run; {instead}")
        self._check_unchanged(path, checkpoint, len(parts["samples"]), fixed, steps_per_epoch)
        try:
            for name, part in parts.items():
                state = checkpoint.get(name)
                if isinstance(part, torch.optim.Optimizer):  # its moments; settings are this call's
                    settings = part.param_groups
                    part.load_state_dict(state)
                    part.param_groups = settings
                elif state:  # the scaler's state is empty unless the run was in fp16
                    part.load_state_dict(state)
                elif isinstance(part, nn.Module):  # an average that is new starts as the model
                    part.load_state_dict(checkpoint["model"])
        except (RuntimeError, ValueError):
            fail(f"{path} has other tensors than this version of the code; {instead}")
        self.log, step = checkpoint["log"], checkpoint["step"]
        epochs = f"{step // steps_per_epoch} of {self.args.epochs}"
        self.print(f"going on from {path}, epoch {epochs}, step {step}")
        return step

    def _check_unchanged(self, path, checkpoint, images, fixed, steps_per_epoch) -> None:
        """End the run if the data or a setting in `fixed` has changed; print which others have."""
        was, now = checkpoint["config"], self.config
        changed = [name for name in now if was.get(name) != now[name]]
        differs = [f"--{name} {was.get(name)}" for name in changed if name in fixed]
        if "classes" in changed:
            differs.append("other classes")
        if (before := len(checkpoint["samples"]["broken"])) != images:
            differs.append(f"{before} images, not {images}")
        elif (steps := checkpoint["steps_per_epoch"]) != steps_per_epoch:
            differs.append(f"another --batch_size ({steps} steps an epoch, not {steps_per_epoch})")
        if differs:
            fail(f"{path} was trained with {', '.join(differs)}: give the same, or another --out, "
                 "or --fresh")
        if changed:
            words = [f"--{name} {now[name]} (was {was.get(name)})" for name in changed]
            self.print("changed:", ", ".join(words))

    def begin(self, start: int, total_steps: int, what: str) -> None:
        """Join the other processes, create --out, catch signals. Flags must have been checked."""
        self.join()
        if self.world_size > 1:  # at different steps they would wait for one another for ever
            steps = [None] * self.world_size
            dist.all_gather_object(steps, start)
            if len(set(steps)) > 1:
                fail(f"--out {self.args.out}: processes found checkpoints of different steps "
                     f"{sorted(set(steps))}; it must be a folder that all machines share")
        device = f"{self.world_size} x {self.device.type}, {self.dtype or torch.float32}"
        self.print(f"{what}, {total_steps} steps, {device}")
        if start >= total_steps:
            self.print("this run is finished; --fresh starts it over, more --epochs make it longer")
        else:
            self.make_out()
            if self.fresh and self.is_main:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self.args.out, "checkpoint.pt"))
            self.save(json.dumps(self.config, indent=1).encode(), "config.json")
            self.save_log()  # a kill may have left a line more than the checkpoint knows of
            settings = {name: value for name, value in self.config.items() if name != "classes"}
            self.print(json.dumps(settings))
        self.began, self.began_step = time.time(), start
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def join(self) -> None:
        """Meet the other processes: over nccl for CUDA tensors, over gloo for the flag to stop."""
        if self.world_size > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            store, rank, world_size = next(dist.rendezvous("env://"))
            # After `torchrun --max_restarts` has restarted processes, the store still has the
            # addresses of the dead ones, so each restart gets its own prefix. This works on one
            # machine only: each machine counts its own restarts.
            store = dist.PrefixStore(self.restarts, store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model`, wrapped in DDP and torch.compile if asked for. Training it trains `model`."""
        if self.world_size > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.13: of broadcast_buffers
                # No device_ids: DDP would move the mask to the GPU, and BootMAE.split would wait
                model = nn.parallel.DistributedDataParallel(
                    model, broadcast_buffers=False, gradient_as_bucket_view=True)
        return torch.compile(model) if self.args.compile else model

    def loader(self, samples: data.Samples, batches) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            samples, batch_sampler=batches, num_workers=self.workers,
            pin_memory=self.device.type == "cuda", worker_init_fn=_init_worker)

    # ---- in the loop

    def bar(self, start: int, total_steps: int) -> tqdm:
        """Numbers of the steps to do, as a progress bar of the whole run."""
        return tqdm(range(start, total_steps), initial=start, total=total_steps, leave=False,
                    smoothing=0.02, disable=None if self.is_main else True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum of a tensor over the processes; the same on each."""
        if self.world_size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def check_scale(self, scaler: torch.amp.GradScaler) -> None:
        """End a run in fp16 whose gradients are never finite: each such step halves the scale."""
        if scaler.is_enabled() and scaler.get_scale() < 2**-20:
            fail(f"gradients are never finite in fp16, so no step was taken of late. {self.cure}",
                 code=1)

    def check_weights(self, model: nn.Module, step: int) -> None:
        """End the run rather than save weights that are not finite over good ones."""
        if not nn.utils.get_total_norm(model.parameters()).isfinite():
            fail(f"weights are no longer finite at step {step}; {self.kept}. {self.cure}", code=1)

    def report_broken(self, samples: data.Samples, most: float = 0.01) -> int:
        """Name each unreadable file once, and count them. Above a share of `most`, the run ends."""
        known = samples.broken.clone()
        if self.world_size > 1:
            dist.all_reduce(known.view(torch.uint8), dist.ReduceOp.MAX)
        if self.is_main:
            for index in np.flatnonzero(known & ~samples.reported):
                tqdm.write(f"warning: can't read {samples.source.name(index)!r}", file=sys.stderr)
        samples.reported |= known
        broken = np.flatnonzero(known)
        if len(broken) > most * len(samples):
            examples = ", ".join(repr(samples.source.name(index)) for index in broken[:3])
            fail(f"{len(broken)} of {len(samples)} images can't be read, more than {100 * most:g} "
                 f"%, for example {examples}", code=1)
        return len(broken)

    def speed(self, done: int) -> dict[str, float]:
        """Images a second since the last line of the log; call it before anything but training."""
        images = (done - self.began_step) * self.args.batch_size
        return dict(images_per_s=images / (time.time() - self.began))

    def log_epoch(self, done: int, epoch: int, values: dict, samples: data.Samples) -> None:
        """Add a line to the log, print it, and start the clock of the next epoch."""
        values = values | dict(broken=self.report_broken(samples))
        self.log.append(dict(epoch=epoch) | values)
        self.print_values(f"epoch {epoch}", values)
        self.save_log()
        self.began, self.began_step = time.time(), done

    # ---- signals

    def _remember(self, number: int, frame) -> None:
        """SIGTERM (a cluster's preemption) or SIGINT (Ctrl-C) sets a flag; a second Ctrl-C kills.

        A second SIGTERM does not, because torchrun may send its own while rank 0 still saves.
        """
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def stop_asked(self) -> bool:
        """Whether a process has received a signal. The flag is on the CPU; no GPU is waited for."""
        if self.world_size == 1:
            return self.signal > 0
        flag = torch.tensor(self.signal)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.signal = self.signal or int(flag)  # not back to 0: one may have arrived meanwhile
        return int(flag) > 0

    def stop(self, step: int):
        if self.world_size > 1:  # wait for rank 0 to have saved: torchrun ends all when one ends
            dist.all_reduce(torch.tensor(0))
        same = "the same command, without --fresh," if self.args.fresh else "the same command"
        fail(f"stopped by {signal.Signals(self.signal).name} after step {step}; "
             f"{self.args.out}/checkpoint.pt holds it, {same} goes on",
             code=128 + self.signal)

    # ---- files, written by rank 0

    def make_out(self) -> None:
        try:
            if self.is_main:
                os.makedirs(self.args.out, exist_ok=True)
        except OSError as error:
            fail(f"--out {self.args.out}: {error.strerror}")

    def save(self, content, name: str) -> None:
        """Write bytes, or what torch.save takes, to a file in --out: all of it, or nothing."""
        if not self.is_main:
            return
        path = os.path.join(self.args.out, name)
        try:
            with open(path + ".tmp", "wb") as file:
                file.write(content) if isinstance(content, bytes) else torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".tmp", path)
        except (OSError, RuntimeError) as error:  # torch.save hides a full disk in a RuntimeError
            with contextlib.suppress(OSError):
                os.remove(path + ".tmp")
            reason = error.__context__ or error
            fail(f"could not save {path} ({reason}); what was saved before is whole", code=1)

    def save_weights(self, model: nn.Module, name: str) -> None:
        """Save a state_dict for others to load: on the CPU, so that they need no GPU."""
        if self.is_main:
            self.save({key: x.cpu() for key, x in model.state_dict().items()}, name)

    def save_picture(self, picture: Image.Image, name: str) -> None:
        file = io.BytesIO()
        picture.save(file, "png")
        self.save(file.getvalue(), name)

    def save_log(self) -> None:
        self.save("".join(json.dumps(line) + "\n" for line in self.log).encode(), "log.jsonl")
        if self.log and self.is_main:
            self.save_picture(draw_curves(self.log), "curves.png")

    def save_checkpoint(self, parts: dict, step: int, steps_per_epoch: int) -> None:
        """Save checkpoint.pt. Call it last, when the other files of this step have been written."""
        state = {name: part.state_dict() for name, part in parts.items()}  # Meter needs all ranks
        state |= dict(step=step, steps_per_epoch=steps_per_epoch, log=self.log, config=self.config)
        self.save(state, "checkpoint.pt")


def _init_worker(worker: int) -> None:
    """Make a loading worker ignore Ctrl-C and SIGTERM: the training process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Meter:
    """Means of an epoch's losses over all processes. Sums are on the device: `add` never waits."""

    def __init__(self, run: Run, *names: str):
        self.run, self.names = run, names
        self.sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=run.device)
        self.count, self.looked = 0, -1  # finite losses at the last `means`, and at the last `look`

    def add(self, *losses: Tensor) -> None:
        """Add scalars on the device. If one is not finite, as can happen in fp16, none is added."""
        row = torch.stack([*losses, torch.ones_like(losses[0])]).detach()  # (names + 1,)
        self.sums += torch.where(row.isfinite().all(), row, 0)

    def means(self) -> dict[str, float]:
        *sums, self.count = self.run.all_reduce_sum(self.sums).tolist()
        return {name: value / self.count if self.count else math.nan
                for name, value in zip(self.names, sums)}

    def look(self) -> dict[str, float]:
        """The means; ends the run if no loss was finite since the last look."""
        means = self.means()
        if self.count == self.looked:
            fail(f"no loss was finite in the last --log_every {self.run.args.log_every} steps; "
                 f"{self.run.kept}. {self.run.cure}", code=1)
        self.looked = self.count
        return means

    def reset(self) -> None:
        """Begin an epoch; call `means` before. Losses that no `look` has seen still count there."""
        self.sums.zero_()
        self.count, self.looked = 0, self.looked - self.count

    def state_dict(self) -> dict:
        return {"sums": self.run.all_reduce_sum(self.sums).cpu()}

    def load_state_dict(self, state: dict) -> None:
        if self.run.is_main:  # one process keeps the sums, because `means` adds those of all
            self.sums.copy_(state["sums"])


def launch(main: Callable, args: argparse.Namespace) -> None:
    """Call main(args). Distributed processes then exit at once, because a usual exit may hang."""
    code = 1
    try:
        main(args)
        code = 0
    except SystemExit as end:
        code = end.code
        raise
    except torch.OutOfMemoryError:
        fail(f"out of GPU memory: in training, --accum_steps {2 * args.accum_steps} halves the "
             "images held at a time", code=1, everywhere=True)
    except Exception as error:
        with contextlib.suppress(OSError):  # stderr may be a closed pipe
            if "by peer" in str(error):  # its own message, or torchrun's, says why
                fail("another process has ended, so this one can't go on", code=1)
            traceback.print_exc()
        raise SystemExit(code) from None
    finally:
        # Distributed processes exit without destructors. DistributedDataParallel's holds Python's
        # lock while it waits for a gloo thread that may need that lock (torch 2.13), and it may
        # wait forever for a dead process.
        if dist.is_initialized():
            for worker in multiprocessing.active_children():  # would live on for some seconds
                worker.kill()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    launch(main, parse_args())
