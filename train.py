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
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from masking import block_mask, random_mask
from model import SIZES, BootMAE, load_vit, patchify, read_file, standardize, unpatchify

# A recipe has a value for every setting of the method, and each has a flag of the same name.
RECIPES = {"imagenet": dict(  # as published, for ViT-B
    model="base", img_size=224, patch_size=16, branch_init=1.0, decoder_dim=512, decoder_depth=2,
    inject=[1, -1], feature_target=1, weighted_loss=1, mask="block", mask_ratio=0.75,
    crop_scale=[0.2, 1.0], epochs=800, warmup_epochs=40, batch_size=4096, base_lr=1.5e-4,
    min_lr=1e-4, weight_decay=0.05, betas=[0.9, 0.95], feature_ramp=0.25, momentum=None)}
RECIPES["imagenet_large"] = RECIPES["imagenet"] | dict(
    model="large", min_lr=1e-5, momentum=[0.999, 0.9999, 0.9999])
RECIPES["cifar10"] = RECIPES["imagenet"] | dict(
    model="small", img_size=32, patch_size=4, branch_init=0.0, decoder_dim=192, epochs=300,
    warmup_epochs=10, batch_size=512, base_lr=5e-4, min_lr=0.0)
# In a few thousand steps, residual branches must start small for twelve blocks to learn, single
# patches are easier to predict than large holes, and the teacher is worth imitating late, so that
# lambda rises over the whole run (feature_ramp). One decoder block is as good as two, and faster.
RECIPES["photos"] = RECIPES["imagenet"] | dict(
    model="tiny", img_size=96, patch_size=12, branch_init=0.0, decoder_dim=64, decoder_depth=1,
    mask="random", feature_ramp=1.0, epochs=60, warmup_epochs=2, batch_size=32, base_lr=5e-3,
    min_lr=0.0)
RECIPES["shapes"] = RECIPES["photos"] | dict(
    model="nano", img_size=64, patch_size=8, mask_ratio=0.6, crop_scale=[0.6, 1.0], epochs=15,
    warmup_epochs=1, batch_size=16, base_lr=16e-3)


def main(args: argparse.Namespace) -> None:
    run = Run(args)
    device = run.device
    with one_line_errors():  # wrong flags or data end the run here, before anything is written
        source = open_images(args, run)
        model = build_model(args, run).to(device)
    view = functools.partial(view_and_mask, args=args, grid=model.grid)
    samples = data.Samples(source, view, args.seed)
    steps_per_epoch = len(source) // args.batch_size
    total_steps = args.epochs * steps_per_epoch

    groups = decay_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=args.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype is torch.float16)
    if args.benchmark:
        return benchmark(model, optimizer, scaler, samples, run)

    meter = Meter(run, "pixel_loss", "feature_loss")
    saved = dict(model=model, optimizer=optimizer, scaler=scaler, meter=meter)
    start = run.start(saved, total_steps, source.fingerprint)
    network = run.wrap(model)
    batches = run.batches(samples, start)
    # Each picture shows the same eight images, crops and masks.
    gallery = [samples[i] for i in random.Random(0).sample(range(len(source)), min(8, len(source)))]

    for step in run.steps(start, total_steps):
        lr, feature_weight, momentum = schedules(step, total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Forward and backward, in parts that fit into memory
        for part in range(args.accum_steps):
            images, mask, _ = next(batches)                      # uint8 (b, 3, H, W), bool (b, N)
            images = data.scale_pixels(images.to(device, non_blocking=True))  # float (b, 3, H, W)
            # DDP sums the gradients of all processes once a step, in the last part.
            network.require_backward_grad_sync = part == args.accum_steps - 1
            with run.autocast():
                # The mask stays on the CPU, so validating it needs no GPU sync.
                out = network(images, mask)
                loss = out.pixel_loss + feature_weight * out.feature_loss
            scaler.scale(loss / args.accum_steps).backward()
            meter.add(out.pixel_loss, out.feature_loss)

        # One optimizer step; then the teacher moves towards the encoder.
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.update_teacher(momentum)

        done, stop = step + 1, run.stop_asked()
        epoch, rest = divmod(done, steps_per_epoch)
        if rest == 0 or stop or done % args.log_every == 0:
            # Reading the losses makes the CPU wait for the GPU, so it is not done in every step.
            losses = meter.means()
            run.check_finite(model, scaler, losses)
            run.progress.set_postfix(losses, refresh=False)
        if rest == 0:
            values = losses | dict(images_per_s=run.images_per_s(done), lr=lr, momentum=momentum,
                                   feature_weight=feature_weight)
            if done == total_steps or epoch % args.picture_every == 0:
                picture, quality = draw_reconstructions(model, gallery, run)
                run.save(picture, f"epoch_{epoch:04d}.png")
                values |= quality
                warn_of_collapse(quality.get("teacher_rank", math.inf), run, done == total_steps)
            run.log_epoch(epoch, values, done)
            meter.sums.zero_()
        if stop or done == total_steps or rest == 0 and epoch % args.save_every == 0:
            run.save_weights(model.encoder, "encoder.pt")
            run.save_checkpoint(saved, done)
        if stop:
            run.stop(done)
    if args.num_heads:
        run.print(f"note: encoder.pt can't tell its number of heads: give --num_heads "
                  f"{args.num_heads} wherever it is used")
    run.print(f"done: {args.out} holds encoder.pt, checkpoint.pt, log.jsonl, curves.png and "
              "pictures")


def schedules(step: int, total_steps: int,
              args: argparse.Namespace) -> tuple[float, float, float]:
    """Learning rate, weight of feature_loss (lambda) and teacher momentum; steps count from 0."""
    progress, peak = step / total_steps, args.base_lr * args.batch_size / 256
    lr = cosine_lr(progress, args.warmup_epochs / args.epochs, peak, args.min_lr)
    # Lambda rises with each epoch, as in the authors' code; the others change with each step.
    epoch = step * args.epochs // total_steps
    feature_weight = min(1.0, (epoch + 1) / max(1e-9, args.feature_ramp * args.epochs))
    # A teacher of momentum m averages over about 1 / (1 - m) steps. Without --momentum these are
    # 0.4, 4 and 40 % of the run: m is 0.999, 0.9999 and 0.99999 in the published 249,600 steps.
    spans = [max(1.0, share * total_steps / 249_600) for share in (1e3, 1e4, 1e5)]
    momenta = args.momentum or [1 - 1 / span for span in spans]
    return lr, feature_weight, float(np.interp(progress, (0, 1 / 8, 1 / 2), momenta))


def view_and_mask(image: Image.Image, rng: random.Random, args: argparse.Namespace,
                  grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A random crop of an image, perhaps mirrored, uint8 (3, H, W), and its mask, bool (N,)."""
    image = data.flip(data.random_resized_crop(image, args.img_size, rng, args.crop_scale), rng)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    num_masked = round(args.mask_ratio * math.prod(grid))
    if args.mask == "block":
        mask = block_mask(1, grid, num_masked, generator)
    else:
        mask = random_mask(1, math.prod(grid), num_masked, generator)
    return data.to_tensor(image), mask[0]


# --------------------------------------------------------------------------------------------------
# Images, model and optimizer from the flags


def open_images(args: argparse.Namespace, run: "Run"):
    """The images to train on, a source of `data.Samples`. ValueError if they are too few."""
    if args.data:
        run.check_out(args.data)
        source = data.ImageFolder(args.data)
    else:
        source = data.Shapes(args.num_images or 2400, args.img_size)
    if 0 < args.num_images < len(source):
        chosen = random.Random(args.seed).sample(range(len(source)), args.num_images)
        source = data.Subset(source, chosen)
    # ImageNet's recipes learn nothing with a few steps an epoch.
    least = args.batch_size * (10 if args.recipe.startswith("imagenet") else 1)
    if len(source) < least and not args.benchmark:
        raise ValueError(
            f"--batch_size {args.batch_size} makes too few steps of the {len(source)} images there "
            "are: give a smaller one, or --recipe photos, which suits a folder of a few thousand")
    run.check_batch()
    return source


def build_model(args: argparse.Namespace, run: "Run") -> BootMAE:
    """The model that the flags ask for, the same in every process. ValueError if sizes misfit."""
    torch.manual_seed(args.seed)
    sizes = dict(SIZES[args.model])
    sizes["num_heads"] = args.num_heads or sizes["num_heads"]
    model = BootMAE(
        args.img_size, args.patch_size, **sizes, decoder_dim=args.decoder_dim,
        decoder_depth=args.decoder_depth, inject=args.inject, branch_init=args.branch_init,
        feature_target=bool(args.feature_target), weighted_loss=bool(args.weighted_loss))
    num_patches = math.prod(model.grid)
    if not 0 < round(args.mask_ratio * num_patches) < num_patches:
        raise ValueError(f"--mask_ratio {args.mask_ratio}: of {num_patches} patches at least one "
                         "must be masked and one visible")
    if args.init and not run.resumes:
        vit = load_vit(args.init, args.img_size, num_classes=0, num_heads=args.num_heads,
                       pixels=args.init_pixels, report=run.print)
        for name, wanted in model.encoder.sizes.items():
            if vit.sizes[name] != wanted:
                raise ValueError(f"--init {args.init} has {name} {vit.sizes[name]}, and the flags "
                                 f"ask for {wanted}: choose --model, --patch_size, --num_heads to "
                                 "match")
        model.encoder.load_state_dict(vit.state_dict())
        if model.teacher is not None:
            model.teacher.load_state_dict(vit.state_dict())
    return model


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: matrices and mask tokens decay; biases, norms and the CLS token do not."""
    decay, no_decay = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (no_decay if p.ndim == 1 or name.endswith("cls_token") else decay).append(p)
    return [dict(params=decay, weight_decay=weight_decay), dict(params=no_decay, weight_decay=0.0)]


# --------------------------------------------------------------------------------------------------
# The picture


@torch.no_grad()
def draw_reconstructions(model: BootMAE, gallery: list[tuple],
                         run: "Run") -> tuple[Image.Image, dict[str, float]]:
    """A picture of the model's predictions for some samples, and figures of their quality.

    "no prediction" fills a masked patch with its true mean, and "prediction" adds the predicted
    pattern, scaled by the true deviation; psnr_nothing and psnr compare the two with the original.
    "teacher features" are three principal components, after the mean over the images is subtracted
    at each place. teacher_rank is the `effective_rank` of the features.
    """
    images, masks, _ = torch.utils.data.default_collate(gallery)
    images = data.scale_pixels(images).to(run.device)                          # (B, 3, H, W)
    out = model(images, masks)

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
    quality = dict(psnr=psnr(predicted), psnr_nothing=psnr(nothing))
    if model.teacher is not None:
        # On the CPU: the GPU's eigensolver needs memory of its own, of which none may be left.
        features = standardize(model.teacher.encode(patches)[0][:, 1:]).cpu()  # (B, N, D)
        quality["teacher_rank"] = effective_rank(features.flatten(0, 1))
        features = (features - features.mean(dim=0)).flatten(0, 1)             # (B*N, D)
        _, axes = torch.linalg.eigh(features.T @ features)                     # eigenvalues rise
        axes = axes[:, -3:].flip(1)                                            # (D, 3)
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
    return picture, quality


def effective_rank(features: Tensor) -> float:
    """exp(entropy) of the spectrum of features (n, D): how many directions they fill, 1 to D."""
    share = torch.linalg.eigvalsh(features.T @ features).clamp(min=0)          # (D,)
    share = share / share.sum()
    return torch.special.entr(share).sum().exp().item()


def warn_of_collapse(rank: float, run: "Run", at_the_end: bool) -> None:
    """Warn when teacher_rank falls below half of its highest value, or is below 5 at the end."""
    ranks = [line["teacher_rank"] for line in run.log if "teacher_rank" in line] or [0.0]
    if rank < max(ranks) / 2 <= ranks[-1] or at_the_end and rank < 5:
        run.print(f"warning: teacher_rank is {rank:.1f}, at its best {max(*ranks, rank):.1f}: a "
                  "sign of collapse; more steps, --branch_init 0 and --mask random help")


def draw_curves(log: list[dict]) -> Image.Image:
    """Curves over the epochs, a panel each: the losses, and top-1 of a classifier."""
    curves = {}
    for name in "pixel_loss", "feature_loss", "loss", "top1", "top1_ema":
        points = [(line["epoch"], line[name]) for line in log
                  if math.isfinite(line.get(name, math.nan))]
        if any(value for _, value in points):  # not the feature_loss of a run without a teacher
            curves[name] = points
    w, h, left, top, last = 352, 216, 64, 40, max(2, log[-1]["epoch"])  # axes, margins, epochs
    picture = Image.new("RGB", (440 * max(1, len(curves)), 300), "white")
    draw = ImageDraw.Draw(picture)
    text = functools.partial(draw.text, fill="black", font_size=14)
    for place, (name, points) in enumerate(curves.items()):
        x0, values = 440 * place + left, [value for _, value in points]
        high, span = max(values), max(values) - min(values) or 1.0
        text((x0, 10), f"{name}  {values[-1]:.4g}", font_size=18)
        for tick in range(5):
            y = top + h * tick / 4
            draw.line((x0, y, x0 + w, y), fill="lightgray")
            text((x0 - 6, y), f"{high - span * tick / 4:.3g}", anchor="rm")
        for epoch in sorted({1, (1 + last) // 2, last}):
            text((x0 + w * (epoch - 1) / (last - 1), top + h + 6), f"{epoch}", anchor="ma")
        text((x0 + w / 2, top + h + 22), "epoch", anchor="ma")
        dots = [(x0 + w * (epoch - 1) / (last - 1), top + h * (high - value) / span)
                for epoch, value in points]
        draw.line(dots, fill="#1f6fb4", width=3, joint="curve")
        draw.circle(dots[-1], 3, fill="#1f6fb4")
    return picture


# --------------------------------------------------------------------------------------------------
# --benchmark


def benchmark(model: BootMAE, optimizer, scaler, samples: data.Samples, run: "Run") -> None:
    """Time training steps on random images, and the loading of real ones; print where time goes.

    Each time is the least of four, which are means of three calls (thirty of loading) after two to
    warm up. With --accum_steps a "step" is one part of a batch and an update.
    """
    args, threads = run.args, torch.get_num_threads()
    network = run.wrap(model)
    batch = args.batch_size // (run.world_size * args.accum_steps)
    images = torch.rand(batch, 3, args.img_size, args.img_size, device=run.device) * 2 - 1
    mask = samples[0][1].expand(batch, -1)

    def forward() -> Tensor:
        with run.autocast():
            out = network(images, mask)
        return scaler.scale(out.pixel_loss + out.feature_loss)

    def update():
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.update_teacher(0.999)

    def milliseconds(work: Callable, number: int = 3, num_threads: int = threads) -> float:
        timer = Timer("work()", globals=dict(work=work), num_threads=num_threads)
        return 1e3 * min(timer.timeit(number).mean for _ in range(4))  # waits for the GPU

    forward_time = milliseconds(forward)
    backward_time = milliseconds(lambda: forward().backward()) - forward_time
    step = milliseconds(lambda: (forward().backward(), update()))

    twin = copy.deepcopy(model).to("meta")  # counts the operations of one image without doing them
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = twin(images[:1].to("meta"), mask[:1])
        (out.pixel_loss + out.feature_loss).backward()
    gflop = counter.get_total_flops() / 1e9

    keys = itertools.count()
    loading = 1e3 / milliseconds(lambda: samples[next(keys)], number=30, num_threads=1)

    speed = 1e3 * batch * run.world_size / step
    hours = args.epochs * len(samples) / speed / 3600
    cuda = run.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{threads} CPU threads"
    run.print(f"{args.recipe} ({args.model}), batch {batch} a process, {run.world_size} x {name}, "
              f"{run.dtype or torch.float32}{', compiled' if args.compile else ''}")
    for label, value in (
        ("images/s", f"{speed:.4g}"),
        (f"hours of {args.epochs} x {len(samples)} images", f"{hours:.3g}"),
        ("ms a step", f"{step:.4g}"),
        ("  forward and losses", f"{forward_time:.4g}"),
        ("  backward", f"{backward_time:.4g}"),
        ("  optimizer and teacher update", f"{step - forward_time - backward_time:.4g}"),
        ("GFLOP an image", f"{gflop:.4g}"),
        ("TFLOP/s a process", f"{gflop * batch / step:.4g}"),
        ("peak GPU memory a process, GiB", f"{torch.cuda.max_memory_allocated() / 2**30:.3g}"),
        ("images/s a loading worker", f"{loading:.4g}"),
        ("  workers a process to keep up", f"{math.ceil(speed / run.world_size / loading)}"),
    ):
        run.print(f"{label:34}{value}")


# --------------------------------------------------------------------------------------------------
# Flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    switch = dict(type=int, choices=(0, 1))
    add("--data", help="folder of images, at any depth; without it, built-in images")
    add("--recipe", choices=RECIPES, help="without it, imagenet with --data, else shapes")
    add("--init", help="start from the encoder in this file, of any known kind")
    add("--num_images", type=integer(0), default=0, help="how many (0: all; 2,400 if built in)")
    add("--model", choices=SIZES, help="size of the encoder")
    add("--img_size", type=integer(1), help="side of the square input")
    add("--patch_size", type=integer(1), help="side of a patch")
    add("--branch_init", type=real(0), help="initial scale of residual branches (short runs: 0)")
    add("--decoder_dim", type=integer(4), help="width of the pixel regressor")
    add("--decoder_depth", type=integer(1, 100), help="blocks in each decoder")
    add("--inject", type=int, nargs=2,
        help="encoder blocks injected into regressor and predictor: -1 is the last, 0 is none")
    add("--feature_target", **switch, help="0: no teacher and no feature predictor")
    add("--weighted_loss", **switch, help="0: masked patches all weigh the same")
    add("--mask", choices=("block", "random"), help="kind of masks")
    add("--mask_ratio", type=real(0, 1), help="fraction of the patches that is masked")
    add("--base_lr", type=real(0), help="learning rate for 256 images; scales with --batch_size")
    add("--feature_ramp", type=real(0, 1), help="share of the run in which lambda rises to 1")
    add("--momentum", type=real(0, 1), nargs=3,
        help="of the teacher at the start, at 1/8 and from 1/2 of the run; without it, averages "
             "over 0.4, 4 and 40 %% of the steps")
    add("--picture_every", type=integer(1), default=5, help="epochs between pictures")
    add("--benchmark", action="store_true", help="time steps and loading; train nothing")
    args = fill_in(parser.parse_args(argv), RECIPES)
    args.out = args.out or os.path.join("output", args.recipe)
    return args


# --------------------------------------------------------------------------------------------------
# What finetune.py needs as well: flags, learning rate, and the run around the loop


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of both scripts. None stands for what the recipe says."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="RECIPES, in the script, has the values of flags not given.")
    parser.error = lambda message: fail(message.removeprefix("argument "))  # in one line
    add = parser.add_argument
    add("--out", help="folder for all that is written; without it, one in output/")
    add("--fresh", action="store_true", help="start over: old checkpoint, log and pictures go")
    add("--init_pixels", choices=("signed", "imagenet"), default="signed",
        help="--init: the file expects pixels of -1 .. 1, or scaled by ImageNet's mean and "
             "deviation (MAE, DeiT, DINO)")
    add("--num_heads", type=integer(1), help="attention heads; without it, the file's or SIZES'")
    add("--crop_scale", type=real(1e-6, 1), nargs=2, help="area of a random crop, least and most")
    add("--epochs", type=integer(1), help="length of the run")
    add("--warmup_epochs", type=real(0), help="of linear warm-up; not given: the recipe's share")
    add("--batch_size", type=integer(1), help="images a step, over processes and --accum_steps")
    add("--accum_steps", type=integer(1), default=1, help="cut a batch into parts, to save memory")
    add("--min_lr", type=real(0), help="learning rate at the end, or the peak if that is lower")
    add("--weight_decay", type=real(0), help="not on biases, norms and CLS token")
    add("--betas", type=real(0, 0.9999999), nargs=2, help="of AdamW")
    add("--seed", type=integer(0, 2**63 - 1), default=0, help="of weights, order, crops and masks")
    add("--workers", type=integer(0),
        help="loading processes for each training process; without it, 1 on a CPU, and with GPUs "
             "the cores of the machine shared by its processes, at most 16")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU, if any")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="precision; auto: bf16 where the hardware has it, else fp16 on a GPU and off on a "
             "CPU; off: float32 (on a GPU, products in TF32)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--save_every", type=integer(1), default=1, help="epochs between checkpoints")
    add("--log_every", type=integer(1), default=20, help="steps between readings of the losses")
    return parser


def fill_in(given: argparse.Namespace, recipes: dict[str, dict]) -> argparse.Namespace:
    """All settings: what was given, and in place of None what the recipe says, if anything."""
    given.recipe = given.recipe or ("imagenet" if given.data else "shapes")
    recipe = recipes[given.recipe]
    args = argparse.Namespace(**{
        name: recipe.get(name) if value is None else value for name, value in vars(given).items()})
    if given.warmup_epochs is None:  # keeps its share of the run
        args.warmup_epochs = recipe["warmup_epochs"] * args.epochs / recipe["epochs"]
    if args.warmup_epochs > args.epochs:
        fail(f"--warmup_epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}: give "
             "fewer")
    for name, value in vars(args).items():
        if value == "":
            fail(f"--{name} is empty: name a file or folder, or leave it out")
    return args


def bounded(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number of this kind from `low` to `high`."""

    def parse_number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            limits = f"{low:g} to {high}" if high < math.inf else f"{low:g} or more"
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return value

    parse_number.__name__ = kind.__name__  # what argparse calls it when it complains
    return parse_number


integer, real = functools.partial(bounded, int), functools.partial(bounded, float)


def cosine_lr(progress: float, warmup: float, peak: float, end: float) -> float:
    """Learning rate at `progress` (0 .. 1): from 0 to `peak` at `warmup`, then cosine to `end`."""
    if progress < warmup:
        return peak * progress / warmup
    end = min(end, peak)  # a small batch lowers the peak, and not the end
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def fail(message: str, code: int = 1, everywhere: bool = False):
    """End with a line on stderr, of local rank 0 unless the error may hit a single process."""
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError, AttributeError):  # stderr may be closed
            # Not `print`, which writes the line break by itself, after another process's line.
            sys.stderr.write(f"{os.path.basename(sys.argv[0])}: {message}\n")
    sys.exit(code)


@contextlib.contextmanager
def one_line_errors():
    """Report a ValueError or OSError in one line: these are raised when flags or data are wrong."""
    try:
        yield
    except OSError as error:
        fail(f"can't read {error.filename}: {error.strerror}" if error.filename else str(error))
    except ValueError as error:
        fail(str(error))


# Settings that a resumed run may change; all others must match its checkpoint. Of data and init,
# not the path is compared, but what it holds.
MAY_CHANGE = set("""
    recipe data init out fresh workers device amp compile accum_steps save_every log_every
    picture_every eval_every epochs warmup_epochs base_lr lr min_lr""".split())


class Run:
    """Processes, device, precision, files and signals of a training run.

    A script's main() owns the loop and calls these methods; there are no callbacks. All processes
    must make the same calls in the same order, because many of them wait for the other processes.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.log, self.signal = args, [], 0
        names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"  # as torchrun sets them
        values = [os.environ.get(name, "") for name in names]
        if not any(values):
            values = 0, 0, 1, 1
        elif not all(map(str.isdigit, values)) or "MASTER_ADDR" not in os.environ:
            found = ", ".join(filter(os.environ.get, names))
            fail(f"the environment has {found}, but not all that torchrun sets: unset these, or "
                 "start with torchrun", everywhere=True)
        self.rank, local_rank, self.world_size, local_size = map(int, values)
        self.is_main = self.rank == 0
        self.restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun --max_restarts
        self.fresh = args.fresh and self.restarts == "0"  # a restarted run goes on
        self.checkpoint = os.path.join(args.out, "checkpoint.pt")
        self.resumes = os.path.exists(self.checkpoint) and not self.fresh

        cuda = torch.cuda.is_available() and args.device != "cpu"
        if args.device == "cuda" and not cuda:
            fail("--device cuda: no CUDA device can be used here; --device cpu runs without one")
        if cuda and local_size > (gpus := torch.cuda.device_count()):
            fail(f"--nproc_per_node is more than the {gpus} GPUs of this machine")
        self.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # without AVX-512 bf16, a CPU emulates it, which is slow
            fast = torch.cpu._is_avx512_bf16_supported()
        auto = "bf16" if fast else "fp16" if cuda else "off"
        amp = auto if args.amp == "auto" else args.amp
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]

        self.workers = args.workers
        if args.workers is None:  # on a CPU the model needs the cores itself
            cores = len(os.sched_getaffinity(0)) if cuda else 1
            self.workers = max(1, min(16, cores // local_size))

        if self.world_size > 1 and not dist.is_initialized():
            with one_line_errors():
                store, rank, world_size = next(dist.rendezvous("env://"))
            # After `torchrun --max_restarts` has restarted processes, the store still has the
            # addresses of the dead ones, so each restart gets its own prefix. This works on one
            # machine only: each machine counts its own restarts.
            store = dist.PrefixStore(self.restarts, store)
            # nccl carries CUDA tensors, gloo others, as the stop flag.
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store,
                                    rank=rank, world_size=world_size)

    def print(self, text: str) -> None:
        """Print on rank 0. A closed stdout never ends a run."""
        if self.is_main:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except OSError:  # what is left in its buffer goes nowhere, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    # ---- before the loop

    def check_batch(self) -> None:
        """Raise ValueError if a batch can't be split equally over processes and --accum_steps."""
        batch_size, accum_steps = self.args.batch_size, self.args.accum_steps
        if batch_size % (self.world_size * accum_steps):
            raise ValueError(f"--batch_size {batch_size} is not divisible by {self.world_size} "
                             f"processes x --accum_steps {accum_steps}")

    def check_out(self, *folders: str) -> None:
        """Raise ValueError if --out lies in a folder of images: its pictures would join them."""
        out = os.path.realpath(self.args.out)
        for folder in map(os.path.realpath, folders):
            if os.path.commonpath([out, folder]) == folder:
                raise ValueError(f"--out {self.args.out} lies inside {folder}, so its pictures "
                                 "would be taken for images: give --out another folder")

    def start(self, saved: dict, total_steps: int, images: str) -> int:
        """Take --out, and load its checkpoint, if any, into `saved`.

        images: the fingerprint of the data. Returns the number of steps that are done.
        """
        self.settings = {name: value for name, value in vars(self.args).items()
                         if name not in MAY_CHANGE} | dict(images=images)
        init = self.args.init
        if init and os.path.exists(init):
            written = [os.path.join(self.args.out, name) for name in ("encoder.pt", "best.pt")]
            written = map(os.path.realpath, [*written, self.checkpoint])
            if os.path.realpath(init) in written and not self.resumes:
                fail(f"--init {init} would be overwritten by this run: give another --out")
            with open(init, "rb") as file:
                digest = hashlib.file_digest(file, "sha1").hexdigest()
            self.settings["init"] = f"with weights {digest[:8]}"
        self.claim_out()
        if not self.fresh and self.resumes != os.path.exists(self.checkpoint):
            fail(f"another run has written {self.checkpoint} meanwhile: give the command again")
        step = self.load(saved) if self.resumes else 0
        seen = self.gather([(step, images)])
        if len(set(seen)) > 1:  # they would wait for one another for ever
            fail(f"processes disagree on steps done and images: {sorted(set(seen))}; --out must be "
                 "a folder that all machines share, and --data hold the same on each")

        self.print(f"{self.args.recipe}: {images}, {self.world_size} x {self.device.type}, "
                   f"{self.dtype or torch.float32}, {total_steps - step} of {total_steps} steps")
        if step >= total_steps:
            self.print("this run is finished; --fresh starts it over, more --epochs make it longer")
        self.save(json.dumps(vars(self.args), indent=1).encode(), "config.json")
        self.save_log()  # a killed run may have logged an epoch after its checkpoint
        self.began, self.began_step = time.time(), step
        return step

    def claim_out(self) -> None:
        """Create --out and lock it, so that no other run writes there.

        With --fresh, remove the old checkpoint, log and pictures, but not the old weights.
        """
        if not self.is_main:
            return
        try:
            os.makedirs(self.args.out, exist_ok=True)
            self.lock = open(os.path.join(self.args.out, ".lock"), "w")
        except OSError as error:
            fail(f"--out {self.args.out}: {error.strerror}")
        try:
            import fcntl
            # The kernel drops the lock when this process ends; its workers don't inherit it.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--out {self.args.out} is in use by another run: wait for it, or give another "
                 "--out (to start several processes, use torchrun)")
        except (ImportError, OSError):
            pass  # Windows has no fcntl, and some file systems have no locks
        old = glob.glob("*.tmp", root_dir=self.args.out)  # a kill left them
        if self.fresh:
            old += glob.glob("epoch_*.png", root_dir=self.args.out)
            old += ["checkpoint.pt", "log.jsonl", "curves.png", "predictions.png"]
        for name in old:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.args.out, name))

    def load(self, saved: dict) -> int:
        """Load the checkpoint into `saved`; returns its step. Ends if it is of another run."""
        with one_line_errors():
            checkpoint = read_file(self.checkpoint)
        try:
            was, now = checkpoint["settings"], self.settings
            if "init" not in now:  # that file is gone, and not needed
                was.pop("init", None)
            if changed := [name for name in was | now if was.get(name) != now.get(name)]:
                words = [f"{name} {was.get(name)} (now {now.get(name)})" for name in changed]
                fail(f"{self.checkpoint} was trained with {', '.join(words)}: give the same, or "
                     "another --out, or --fresh")
            for name, part in saved.items():
                if state := checkpoint[name]:  # the scaler's is empty unless the run was in fp16
                    part.load_state_dict(state)
            self.log, step = checkpoint["log"], checkpoint["step"]
        except (KeyError, RuntimeError, ValueError):
            fail(f"{self.checkpoint} fits no run of this version of the code; another --out leaves "
                 "it alone, --fresh replaces it")
        self.print(f"going on from {self.checkpoint}")
        return step

    def wrap(self, model: nn.Module, broadcast_buffers: bool = False) -> nn.Module:
        """`model` in DDP and torch.compile, if asked for; the wrapper shares its parameters."""
        if self.world_size > 1:
            # No device_ids: DDP would move the mask to the GPU, and BootMAE.split would wait.
            model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
            model.broadcast_buffers = broadcast_buffers  # torch 2.13 warns of it as an argument
        return torch.compile(model) if self.args.compile else model

    def loader(self, samples: data.Samples, batches) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            samples, batch_sampler=batches, num_workers=self.workers,
            pin_memory=self.device.type == "cuda", worker_init_fn=_start_worker)

    def batches(self, samples: data.Samples, start: int) -> Iterator[tuple]:
        """This process's batches of all epochs, from step `start` on."""
        args = self.args
        order = data.Batches(len(samples), args.batch_size, args.epochs, args.seed, start,
                             args.accum_steps, self.rank, self.world_size)
        return iter(self.loader(samples, order))

    # ---- in the loop

    def steps(self, start: int, total_steps: int) -> Iterator[int]:
        """Numbers of the steps to do, behind a progress bar. Signals wait until a step is done."""
        old = {signum: signal.signal(signum, self._on_signal)
               for signum in (signal.SIGTERM, signal.SIGINT)}
        self.progress = tqdm(range(start, total_steps), initial=start, total=total_steps,
                             leave=False, smoothing=0.02, disable=None if self.is_main else True)
        try:
            yield from self.progress
        finally:
            for signum, handler in old.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame) -> None:
        """SIGTERM (a cluster's preemption) or SIGINT (Ctrl-C) sets a flag; a second Ctrl-C kills.

        A second SIGTERM does not, because torchrun may send its own while rank 0 still saves.
        """
        self.signal = signum
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place; the same on each."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, mine: list) -> list:
        """Join the lists of all processes; every process gets the whole."""
        shares = [mine] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(shares, mine)
        return sum(shares, [])

    def stop_asked(self) -> bool:
        """Whether a process has received a signal. The flag is on the CPU; no GPU is waited for."""
        if self.world_size == 1:
            return self.signal > 0
        flag = torch.tensor(self.signal)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.signal = self.signal or int(flag)  # not back to 0: one may have arrived meanwhile
        return int(flag) > 0

    def check_finite(self, model: nn.Module, scaler: torch.amp.GradScaler, losses: dict) -> None:
        """End the run rather than save weights that are not finite over good ones."""
        norm = nn.utils.get_total_norm(model.parameters())
        if scaler.is_enabled():  # gradients that are not finite halve its scale; no step is taken
            wrong = scaler.get_scale() < 2**-20
        else:
            wrong = not all(map(math.isfinite, losses.values()))
        if wrong or not norm.isfinite():
            fail("weights, losses or gradients are not finite; nothing was saved over "
                 f"{self.checkpoint}. A lower learning rate, a longer warm-up or --amp bf16 may "
                 "help")

    def images_per_s(self, done: int) -> float:
        """Images a second since the last line of the log; call it before anything but training."""
        return (done - self.began_step) * self.args.batch_size / (time.time() - self.began)

    def log_epoch(self, epoch: int, values: dict, done: int) -> None:
        """Add a line to the log, print it, and start the clock of the next epoch."""
        self.log.append(dict(epoch=epoch) | values)
        self.print("  ".join(f"{name} {value:.5g}" for name, value in self.log[-1].items()))
        self.save_log()
        self.began, self.began_step = time.time(), done

    def stop(self, step: int):
        self.all_reduce_sum(torch.tensor(0))  # rank 0 saves first: torchrun ends all when one ends
        fail(f"stopped by {signal.Signals(self.signal).name} after step {step}; {self.checkpoint} "
             "holds it, the same command (without --fresh) goes on", code=128 + self.signal)

    # ---- files, written by rank 0

    def save(self, content, name: str) -> None:
        """Write bytes, a picture or what torch.save takes to a file in --out: all, or nothing."""
        if not self.is_main:
            return
        path = os.path.join(self.args.out, name)
        part = f"{path}.{os.getpid()}.tmp"
        try:
            with open(part, "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                elif isinstance(content, Image.Image):
                    content.save(file, "png")
                else:
                    torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch.save hides a full disk in a RuntimeError
            with contextlib.suppress(OSError):
                os.remove(part)
            reason = error.__context__ or error
            fail(f"could not save {path} ({reason}); what was saved before is whole")

    def save_weights(self, model: nn.Module, name: str, **more) -> None:
        """Save a state_dict, on the CPU, so that loading it needs no GPU; with `more`, a dict."""
        if self.is_main:
            state = {key: x.cpu() for key, x in model.state_dict().items()}
            self.save(dict(model=state, **more) if more else state, name)

    def save_log(self) -> None:
        self.save("".join(json.dumps(line) + "\n" for line in self.log).encode(), "log.jsonl")
        if self.log and self.is_main:
            self.save(draw_curves(self.log), "curves.png")

    def save_checkpoint(self, saved: dict, step: int) -> None:
        """Save checkpoint.pt. Call it last, when the other files of this step have been written."""
        state = {name: part.state_dict() for name, part in saved.items()}
        self.save(state | dict(step=step, log=self.log, settings=self.settings), "checkpoint.pt")


def _start_worker(number: int) -> None:
    """Make a loading worker ignore Ctrl-C and SIGTERM: the training process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class Meter(nn.Module):
    """Means of an epoch's losses over all processes. Sums are on the device: `add` never waits."""

    def __init__(self, run: Run, *names: str):
        super().__init__()
        self.run, self.names = run, names
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=run.device)
        self.register_buffer("sums", sums)  # of each loss, and how often they were added

    def add(self, *losses: Tensor) -> None:
        """Add scalars on the device. If one of them is not finite, none is added."""
        row = torch.stack([*losses, torch.ones_like(losses[0])]).detach()  # (names + 1,)
        self.sums += torch.where(row.isfinite().all(), row, 0)

    def means(self) -> dict[str, float]:
        """Means so far. All processes call it, also before saving, and then have the same sums."""
        *sums, count = self.run.all_reduce_sum(self.sums).div_(self.run.world_size).tolist()
        return {name: value / count if count else math.nan for name, value in zip(self.names, sums)}


MAX_PIXELS = 200_000_000  # of a photo: some phones take as many, and Pillow warns above 89 million

# A pattern in an error's text, and the line that a user gets instead of the traceback.
CURES = {
    "out of memory|can't allocate memory": "out of memory: twice the --accum_steps halves the "
                                           "images held at a time; fewer --workers help, too",
    r"DataLoader worker \(pid|shared memory": "a loading process lacks memory: try fewer "
                                              "--workers, and in Docker --ipc=host",
    r"C(\+\+)? compiler|working triton": "--compile needs a C++ compiler such as g++ (and on a GPU "
                                          "Triton): install it, or leave --compile out",
    "by peer": "another process has ended, so this one can't go on",  # whose own message says why
}


def launch(main: Callable, args: argparse.Namespace) -> None:
    """Call main(args). Distributed processes then exit at once, because a usual exit may hang."""
    code, Image.MAX_IMAGE_PIXELS = 1, MAX_PIXELS
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # names that it can't encode
    try:
        main(args)
        code = 0
    except SystemExit as end:
        code = end.code
        raise
    except KeyboardInterrupt:  # outside the loop
        code = 130
        fail("interrupted by Ctrl-C", code)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        for words, cure in CURES.items():
            if re.search(words, text):
                fail(cure, everywhere=words != "by peer")
        if isinstance(error, (OSError, MemoryError)):
            line = (str(error) or text).strip().splitlines()[-1]  # a worker's is the last of many
            fail(line.removeprefix("OSError: "), everywhere=True)
        with contextlib.suppress(OSError):  # stderr may be a closed pipe
            traceback.print_exc()
        raise SystemExit(code) from None
    finally:
        if workers := multiprocessing.active_children():  # they ignore the usual SIGTERM
            if hasattr(signal, "SIGCHLD"):  # torch's handler would report what is killed here
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for worker in workers:
                worker.kill()
        # Distributed processes exit without destructors. DistributedDataParallel's holds Python's
        # lock while it waits for a gloo thread that may need that lock (torch 2.13), and it may
        # wait forever for a dead process.
        if dist.is_initialized():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    launch(main, parse_args())
