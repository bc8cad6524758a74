"""Classify images with a pretrained encoder: fine-tuning, probe, k-NN, evaluation, prediction.

    python finetune.py                                     built-in images, train.py's encoder
    python finetune.py --data photos --recipe photos       a few thousand photos of your own
    torchrun --nproc_per_node=8 finetune.py --data imagenet --init output/imagenet/encoder.pt
    ... --linear                                           linear probe of the frozen encoder
    ... --knn                                              nearest neighbours, no training at all
    ... --eval --init output/imagenet_finetune/best.pt     top-1 and top-5 of a classifier
    python finetune.py --predict DIR --init output/imagenet_finetune/best.pt

--data holds train/ and val/ (or test/), each with a folder for each class. --init takes this
project's encoder.pt, checkpoint.pt and best.pt, the authors' files, MAE's, and timm's ViT state
dicts; the network has the sizes found there.
"""
import argparse
import copy
import csv
import functools
import io
import itertools
import json
import math
import os
import random
from collections.abc import Iterator
from unicodedata import combining, normalize

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

import data
from model import SIZES, ViT, load_vit, patchify, standardize
from train import (
    Meter, Parser, Run, add_run_flags, cosine_lr, fail, launch, number, one_line_errors,
    parse_recipe,
)

# --------------------------------------------------------------------------------------------------
# Settings: a flag beats the recipe, and that beats the defaults, which are for ViT-B on ImageNet

# PLAIN has no augmentation but crop and flip; SHORT is for a small network and few images.
PLAIN = dict(drop_path=0.0, mixup=0.0, cutmix=0.0, rand_augment=0.0, erasing=0.0)
SHORT = PLAIN | dict(model="nano", batch_size=32, epochs=40, warmup_epochs=4, layer_decay=0.75,
                     model_ema=0.99, crop_ratio=1.0)
RECIPES = {
    "imagenet": dict(model="base", img_size=224, patch_size=16, batch_size=2048, lr=5e-3,
                     crop_ratio=0.875),
    "imagenet_large": dict(model="large", img_size=224, patch_size=16, batch_size=1024, epochs=50,
                           lr=1.5e-3, warmup_epochs=5, layer_decay=0.75, crop_ratio=0.875),
    "cifar10": dict(model="small", img_size=32, patch_size=4, batch_size=512, lr=1e-3,
                    warmup_epochs=5, layer_decay=0.75, model_ema=0.999, crop_scale=(0.4, 1.0),
                    crop_ratio=1.0),
    "photos": SHORT | dict(img_size=96, patch_size=12, lr=1e-3, crop_scale=(0.4, 1.0)),
    "shapes": SHORT | dict(img_size=64, patch_size=8, lr=2e-3, crop_scale=(0.6, 1.0),
                           labels_per_class=20),
}
PROBE = PLAIN | dict(  # the linear probe of the paper, which LARS trains
    lr=0.0, base_lr=0.1, min_lr=0.0, warmup_epochs=10, epochs=90, batch_size=16384,
    weight_decay=0.0, smoothing=0.0, model_ema=0.0, layer_decay=1.0)
LINEAR = {name: RECIPES[name] | PROBE | own for name, own in {
    "imagenet": dict(depth=9),
    "imagenet_large": dict(depth=18, epochs=50, base_lr=0.07),
    "cifar10": dict(depth=9, batch_size=2048),
    "photos": dict(batch_size=64, epochs=30, base_lr=40.0, warmup_epochs=3),
    "shapes": dict(batch_size=64, epochs=60, base_lr=160.0, warmup_epochs=5),
}.items()}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    whole, count, amount, share = number(0, kind=int), number(1, kind=int), number(0), number(0, 1)
    add("--data", help="folder with train/ and val/ or test/; without it, built-in images")
    add("--recipe", choices=RECIPES, help="without it, imagenet with --data, else shapes")
    add_start = parser.add_mutually_exclusive_group().add_argument
    add_start("--init",
              help="file with weights; without it, output/RECIPE/encoder.pt, as train.py writes it")
    add_start("--scratch", action="store_true", help="random weights instead of --init")
    add("--teacher", action="store_true",
        help="--init: take the teacher's weights, not the student's")
    add_mode = parser.add_mutually_exclusive_group().add_argument
    add_mode("--linear", action="store_true", help="train a linear layer on the frozen encoder")
    add_mode("--knn", action="store_true", help="classify by nearest neighbours; no training")
    add_mode("--eval", action="store_true", help="only evaluate the classifier in --init")
    add_mode("--predict", metavar="DIR",
             help="classify all images in a folder with the classifier in --init")
    add("--neighbours", type=count, default=20, help="--knn: how many")
    add("--model", choices=SIZES, help="--scratch: size of the network; otherwise the file decides")
    add("--patch_size", type=count, help="--scratch: side of a patch; otherwise the file decides")
    add("--img_size", type=count, help="side of the square input; without it, as in the file")
    add("--depth", type=whole, default=0,
        help="--linear, --knn: use the output of this block, from 1 (0: the last)")
    add("--epochs", type=count, default=100, help="length of the run")
    add("--warmup_epochs", type=amount, default=20,
        help="linear warm-up from 0; its share of the run is kept where --epochs changes")
    add("--batch_size", type=count, help="images a step, over processes and --accum_steps")
    add_rate = parser.add_mutually_exclusive_group().add_argument
    add_rate("--lr", type=amount, help="peak learning rate")
    add_rate("--base_lr", type=amount, default=0.0,
             help="learning rate for 256 images; scales with --batch_size")
    add("--min_lr", type=amount, default=1e-6,
        help="learning rate at the end, or the peak if that is lower")
    add("--weight_decay", type=amount, default=0.05, help="not on biases, norms and CLS token")
    add("--betas", type=number(0, 0.9999999), nargs=2, default=(0.9, 0.999), help="of AdamW")
    add("--layer_decay", type=number(0.001, 1), default=0.6,
        help="the learning rate shrinks by this from a block to the one below")
    add("--drop_path", type=number(0, 0.99), default=0.1,
        help="chance to skip a branch, in the last block")
    add("--crop_scale", type=number(1e-6, 1), nargs=2, default=(0.08, 1.0),
        help="area of a random crop")
    add("--rand_augment", type=number(0, 10), default=9.0, help="magnitude (0: off)")
    add("--erasing", type=share, default=0.25, help="probability of random erasing")
    add("--mixup", type=amount, default=0.8, help="alpha of mixup (0: off)")
    add("--cutmix", type=amount, default=1.0, help="alpha of CutMix (0: off)")
    add("--smoothing", type=share, default=0.1, help="label smoothing")
    add("--model_ema", type=number(0, 0.9999999), default=0.9998,
        help="momentum of the averaged model (0: none)")
    add("--labels_per_class", type=whole, default=0,
        help="use so many training images of each class (0: all)")
    add("--crop_ratio", type=number(0.05, 1),
        help="evaluation: the centre crop's share of the short side")
    add("--num_val", type=count, default=1200, help="how many built-in validation images")
    add("--eval_every", type=count, default=1, help="epochs between evaluations")
    add_run_flags(parser)
    given = parser.parse_args(argv)
    args = parse_recipe(parser, LINEAR if given.linear else RECIPES, argv)

    if given.base_lr:
        args.lr = 0.0
    modes = ("linear", "knn", "eval", "predict")
    args.mode = next((mode for mode in modes if getattr(args, mode)), "finetune")
    if args.scratch and (args.teacher or args.mode in ("eval", "predict")):
        fail("--scratch starts from random weights: leave out --teacher, --eval and --predict")
    if not args.scratch:
        args.init = os.path.abspath(args.init or os.path.join("output", args.recipe, "encoder.pt"))
        if not os.path.exists(args.init):
            fail(f"--init: there is no {args.init}; run train.py, name a file, or take --scratch "
                 "for random weights")
        if given.model or given.patch_size:
            fail("--model and --patch_size are for --scratch: with --init the file decides "
                 f"({args.init})")
        args.img_size = given.img_size
        if args.mode in ("eval", "predict"):
            args.crop_ratio = given.crop_ratio  # None: what the classifier was trained with
    if given.depth and args.mode not in ("linear", "knn"):
        fail(f"--depth {given.depth}: only --linear and --knn cut the encoder")
    if args.linear and args.model_ema:
        fail("--model_ema: a linear probe has no moving average; leave it out")
    args.given = [name for name in ("batch_size", "lr") if getattr(given, name) is not None]
    if args.mode == "predict":  # beside the classifier's own folder
        args.out = args.out or os.path.dirname(args.init) + "_predict"
    name = f"{args.recipe}_{args.mode}{'_scratch' if args.scratch else ''}"
    args.out = args.out or os.path.join("output", name)
    return args


# --------------------------------------------------------------------------------------------------
# Views of an image


def train_view(image: Image.Image, rng: random.Random, args: argparse.Namespace) -> tuple:
    """One augmented view: (uint8 (3, H, W),)."""
    image = data.flip(data.random_resized_crop(image, args.img_size, rng, args.crop_scale), rng)
    if args.rand_augment:
        image = data.rand_augment(image, rng, magnitude=args.rand_augment)
    return (data.to_tensor(image),)


def eval_view(image: Image.Image, rng: random.Random, args: argparse.Namespace) -> tuple:
    """The middle of an image: (uint8 (3, H, W),)."""
    return (data.to_tensor(data.center_crop(image, args.img_size, args.crop_ratio)),)


# --------------------------------------------------------------------------------------------------
# Fine-tuning, and the linear probe, whose loop is the same


def main(args: argparse.Namespace) -> None:
    run = Run(args)
    if args.mode == "predict":
        return predict(run)
    with one_line_errors():  # wrong flags or data end the run here, before anything is written
        source, held_out = open_images(args)
        args.classes, num_classes = source.classes, len(source.classes)
        if absent := [name for n, name in enumerate(source.classes) if n not in held_out.labels]:
            run.print("warning: no validation image of:", *map(repr, absent[:8]))
        model = build_model(run, num_classes).to(run.device)
        if args.mode in ("finetune", "linear"):
            fit_batch(len(source), run)
    val = eval_samples(held_out, args)
    if args.mode == "eval":
        return run.print(json.dumps(evaluate([model], val, run)[0]))
    if args.mode == "knn":
        known = eval_samples(source, args)
        return run.print(json.dumps(classify_by_neighbours(model, known, val, run)))

    samples = data.Samples(source, functools.partial(train_view, args=args), args.seed)
    steps_per_epoch = len(source) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    peak_lr = args.lr or args.base_lr * args.batch_size / 256
    if args.linear:
        optimizer = LARS(model.head.parameters(), weight_decay=args.weight_decay)
    else:
        groups = layer_groups(model, args.weight_decay, args.layer_decay)
        optimizer = torch.optim.AdamW(groups, betas=args.betas, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype is torch.float16)
    meter = Meter(run, "loss")
    parts = dict(model=model, optimizer=optimizer, scaler=scaler, meter=meter, samples=samples)
    if args.model_ema:
        parts["average"] = copy.deepcopy(model).requires_grad_(False)
    average = parts.get("average")

    start = run.resume(parts, FIXED, steps_per_epoch)
    what = f"{args.recipe} {args.mode}: {len(source)} images of {num_classes} classes"
    run.begin(start, total_steps, what)
    network = run.wrap(model)
    order = data.Batches(len(source), args.batch_size, args.epochs, args.seed, start,
                         args.accum_steps, run.rank, run.world_size)
    batches = iter(run.loader(samples, order))

    model.train()
    for step in (bar := run.bar(start, total_steps)):
        lr = cosine_lr(step / total_steps, args.warmup_epochs / args.epochs, peak_lr, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        torch.manual_seed(data.seed_from(args.seed, "noise", step, run.rank))  # drop path, erasing

        # Forward and backward, in parts that fit into memory
        for part in range(args.accum_steps):
            images, labels = next(batches)              # uint8 (b, 3, H, W), int64 (b,)
            images, labels = to_device(images, run), labels.to(run.device, non_blocking=True)
            if args.erasing:
                images = data.random_erasing(images, args.erasing)
            rng = random.Random(f"{args.seed} mix {step} {part} {run.rank}")
            images, targets = data.mixup_cutmix(        # targets: float (b, num_classes)
                images, labels, num_classes, args.mixup, args.cutmix, args.smoothing, rng)
            network.require_backward_grad_sync = part == args.accum_steps - 1  # when DDP averages
            with run.autocast():
                logits = network(images)                # (b, num_classes)
            loss = F.cross_entropy(logits.float(), targets)
            scaler.scale(loss / args.accum_steps).backward()
            meter.add(loss)

        # The model takes a step, its average follows
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if args.linear:
            average_statistics(model.norm, run)
        if average is not None:
            slow, fast = list(average.parameters()), list(model.parameters())
            with torch.no_grad():
                torch._foreach_lerp_(slow, fast, 1 - args.model_ema)

        # Read the loss only every --log_every steps: reading it waits for the device
        done = step + 1
        if done % args.log_every == 0:
            bar.set_postfix(meter.look(), lr=lr, refresh=False)
            run.check_scale(scaler)
            run.report_broken(samples)
        epoch, rest = divmod(done, steps_per_epoch)
        if rest == 0:
            run.check_weights(model, done)
            values = meter.means() | run.speed(done) | dict(lr=lr)
            if done == total_steps or epoch % args.eval_every == 0:
                values |= evaluate_and_keep_the_best(model, average, val, run)
            run.log_epoch(done, epoch, values, samples)
            meter.reset()
        stop = run.stop_asked()
        if stop or done == total_steps or rest == 0 and epoch % args.save_every == 0:
            run.check_weights(model, done)
            run.save_checkpoint(parts, done, steps_per_epoch)
        if stop:
            run.stop(done)
    if (best := best_top1(run.log)) >= 0:
        run.print(f"best top-1 {best:.2f} %; {args.out} holds best.pt, checkpoint.pt, log.jsonl, "
                  "curves.png and predictions.png")


# A resumed run must not change these settings.
FIXED = ("data", "init", "teacher", "scratch", "linear", "depth", "model", "img_size", "patch_size",
         "labels_per_class", "seed")


def layer_groups(model: ViT, weight_decay: float, layer_decay: float) -> list[dict]:
    """Optimizer groups for layer-wise decay of the learning rate.

    The embeddings are layer 0, block i is layer i + 1, norm and head are the last, layer depth + 1.
    Each layer has layer_decay times the rate of the next. Biases, norms and CLS token do not decay.
    """
    last, groups = len(model.blocks) + 1, {}
    for name, p in model.named_parameters():
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = 0 if name.startswith(("cls_token", "patch_embed")) else last
        spared = p.ndim == 1 or name == "cls_token"
        new = dict(params=[], weight_decay=0.0 if spared else weight_decay,
                   lr_scale=layer_decay ** (last - layer))
        groups.setdefault((layer, spared), new)["params"].append(p)
    return list(groups.values())


# --------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(models: list[nn.Module], samples: data.Samples, run: Run) -> list[dict[str, float]]:
    """`accuracy` of each model. The models share one pass, because loading may take longest."""
    counts = torch.zeros(len(models), 3, dtype=torch.int64, device=run.device)
    models = nn.ModuleList(models).eval()
    for images, labels in eval_batches(samples, run):
        images, labels = to_device(images, run), labels.to(run.device, non_blocking=True)
        for model, count in zip(models, counts):
            with run.autocast():
                logits = model(images)                                       # (b, num_classes)
            count += count_correct(logits, labels)
    models.train()
    return [accuracy(count, run) for count in counts]


def eval_samples(source, args: argparse.Namespace) -> data.Samples:
    """The middles of a source's images; an image that can't be read has label -1."""
    return data.Samples(source, functools.partial(eval_view, args=args), replace=False)


def eval_batches(samples: data.Samples, run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of this process's share: images uint8 (b, 3, H, W), labels (b,).

    Each process takes every world_size-th image. Nothing is padded, so each image counts once.
    Unreadable images are left out; at the end their names are printed, if they were not before.
    """
    run.join()
    mine = range(run.rank, len(samples), run.world_size)
    loader = run.loader(samples, torch.utils.data.BatchSampler(mine, 128, drop_last=False))
    for images, labels in tqdm(loader, leave=False, disable=None if run.is_main else True):
        readable = labels >= 0
        yield images if readable.all() else images[readable], labels[readable]
    if run.report_broken(samples, most=1.0) == len(samples):
        fail(f"no image could be read of {len(samples)}, for example {samples.source.name(0)!r}",
             code=1)


def to_device(images: Tensor, run: Run) -> Tensor:
    return data.scale_pixels(images.to(run.device, non_blocking=True))


def count_correct(scores: Tensor, labels: Tensor) -> Tensor:
    """Counts (3,) of images: those whose label has the highest score, or one of the best five; all.

    scores (b, num_classes), labels (b,) int64.
    """
    ranking = scores.topk(min(5, scores.shape[1]), dim=1).indices            # (b, up to 5)
    right = ranking == labels[:, None]
    return torch.stack([right[:, 0].sum(), right.sum(), torch.ones_like(labels).sum()])


def accuracy(counts: Tensor, run: Run) -> dict[str, float]:
    """Sum `count_correct` over all processes: number of images, top1 and top5 in per cent."""
    top1, top5, images = run.all_reduce_sum(counts).tolist()
    return dict(images=images, top1=100 * top1 / images, top5=100 * top5 / images)


def best_top1(log: list[dict]) -> float:
    return max((line.get(key, -1.0) for line in log for key in ("top1", "top1_ema")), default=-1.0)


def evaluate_and_keep_the_best(
    model: nn.Module, average: nn.Module | None, val: data.Samples, run: Run
) -> dict[str, float]:
    """Evaluate the model and its average; the better is best.pt if it beats all before."""
    models = [model] if average is None else [model, average]
    scores = evaluate(models, val, run)
    best = max(scores, key=lambda score: score["top1"])
    if best["top1"] > best_top1(run.log):
        better = models[scores.index(best)]
        run.save(json.dumps(val.source.classes).encode(), "classes.json")
        run.save_weights(better, "best.pt")
        run.save_picture(draw_predictions(better, val, run), "predictions.png")
    if average is None:
        return scores[0]
    return scores[0] | dict(top1_ema=scores[1]["top1"], top5_ema=scores[1]["top5"])


# --------------------------------------------------------------------------------------------------
# Linear probe and k-NN


class Features(nn.Module):
    """The mean patch token after block `depth` of a frozen encoder, standardised."""

    def __init__(self, encoder: ViT, depth: int):
        super().__init__()
        encoder.blocks = encoder.blocks[:depth]
        self.encoder = encoder.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:                                     # (B, C, H, W)
        tokens, _ = self.encoder.encode(patchify(images, self.encoder.patch_size))   # (B, 1+N, D)
        return standardize(tokens[:, 1:].float().mean(dim=1))                        # (B, D)


class LinearProbe(nn.Module):
    """`Features`, then BatchNorm without affine parameters and a linear layer, which is trained."""

    def __init__(self, encoder: ViT, depth: int, num_classes: int):
        super().__init__()
        embed_dim = encoder.cls_token.shape[2]
        self.features = Features(encoder, depth)
        self.norm = nn.BatchNorm1d(embed_dim, affine=False, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.features(images)))


def average_statistics(norm: nn.BatchNorm1d, run: Run) -> None:
    """Share the running mean and variance: each process has seen its own part of the images."""
    if run.world_size > 1:
        for x in norm.running_mean, norm.running_var:
            x.copy_(run.all_reduce_sum(x) / run.world_size)


class LARS(torch.optim.Optimizer):
    """SGD with momentum that scales a matrix's step to its norm (You et al., arXiv 1708.03888)."""

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=0.001):
        settings = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust)
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.ndim > 1:  # biases take a plain step
                    update = update.add(p, alpha=group["weight_decay"])
                    ratio = group["trust"] * p.norm() / update.norm()
                    update = update * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1)
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(group["momentum"]).add_(update)
                p.sub_(velocity * group["lr"])


def classify_by_neighbours(
    model: Features, train: data.Samples, val: data.Samples, run: Run
) -> dict[str, float]:
    """`accuracy` of k-NN. Each process classifies its share of the validation images."""
    shares = gather([extract(model, train, run)], run)
    known = map(torch.cat, zip(*shares))                                      # (n, D) and (n,)
    num_classes, k = len(train.source.classes), run.args.neighbours
    return accuracy(knn(*known, *extract(model, val, run), num_classes, k, run.device), run)


@torch.no_grad()
def extract(model: Features, samples: data.Samples, run: Run) -> tuple[Tensor, Tensor]:
    """Features (n, D) and labels (n,), on the CPU, of the images of this process's share."""
    model.eval()  # no drop path
    embed_dim = model.encoder.cls_token.shape[2]
    # An empty batch, in case this process has no images
    batches = [(torch.zeros(0, embed_dim), torch.zeros(0, dtype=torch.int64))]
    for images, labels in eval_batches(samples, run):
        with run.autocast():
            batches.append((model(to_device(images, run)).cpu(), labels))
    return tuple(map(torch.cat, zip(*batches)))


def gather(mine: list, run: Run) -> list:
    """Join the lists of all processes; every process gets the whole."""
    shares = [mine] * run.world_size
    if run.world_size > 1:
        dist.all_gather_object(shares, mine)
    return sum(shares, [])


def knn(
    train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, num_classes: int, k: int,
    device: torch.device,
) -> Tensor:
    """`count_correct` of a vote of the k nearest training images, each worth exp(cosine / 0.07).

    Features (n, D) are first standardised with the training images' mean and deviation, as by the
    probe's BatchNorm. All tensors are moved to `device`: ImageNet takes 64 billion dot products.
    """
    train, val = train.to(device), val.to(device)
    train_labels, val_labels = train_labels.to(device), val_labels.to(device)
    std, mean = torch.std_mean(train, dim=0)
    train, val = (F.normalize((x - mean) / (std + 1e-6), dim=1) for x in (train, val))
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    for some, labels in zip(val.split(128), val_labels.split(128)):
        similarity, nearest = (some @ train.T).topk(min(k, len(train)), dim=1)       # (b, k) each
        votes = torch.zeros(len(some), num_classes, device=device)                   # (b, classes)
        votes.scatter_add_(1, train_labels[nearest], (similarity / 0.07).exp())
        counts += count_correct(votes, labels)
    return counts


# --------------------------------------------------------------------------------------------------
# Prediction


@torch.no_grad()
def predict(run: Run) -> None:
    """Classify every image below --predict; write predictions.csv and a picture of some of them."""
    args = run.args
    with one_line_errors():
        source = data.ImageFolder(args.predict)
        source.labels = np.arange(len(source))  # a batch then says which images it holds
        classes = read_beside(args.init, "classes.json", list)
        model = build_model(run, classes and len(classes)).to(run.device)
    run.make_out()
    if classes is None:
        run.print(f"note: no classes.json beside {args.init}, so classes are numbers")
        classes = [str(label) for label in range(model.head.out_features)]
    rows = []
    for images, indices in eval_batches(eval_samples(source, args), run):
        values, labels = chances(model, images, run).topk(min(3, len(classes)), dim=1)   # (b, 3)
        rows += zip(indices.tolist(), labels.tolist(), values.tolist())
    rows = gather(rows, run)

    table = io.StringIO()
    writer = csv.writer(table)
    header = "file class probability second probability_2 third probability_3".split()
    writer.writerow(header[: 1 + 2 * len(classes)])
    for index, labels, values in sorted(rows):
        answers = [(classes[label], f"{value:.4f}") for label, value in zip(labels, values)]
        file = os.path.relpath(source.name(index), args.predict)
        writer.writerow([file, *itertools.chain(*answers)])
    run.save(table.getvalue().encode(errors="surrogateescape"), "predictions.csv")
    tiles = []
    for index, labels, values in sorted(random.Random(0).sample(rows, min(32, len(rows)))):
        lines = [percentage(classes[labels[0]], values[0]), os.path.basename(source.name(index))]
        tiles.append((eval_view(source.open(index), None, args)[0], lines, "black"))
    run.save_picture(contact_sheet(tiles), "predictions.png")
    run.print(f"{len(rows)} of {len(source)} images classified; {args.out} holds predictions.csv "
              "and predictions.png")


@torch.no_grad()
def chances(model: nn.Module, images: Tensor, run: Run) -> Tensor:
    """Probabilities (b, num_classes) for uint8 images (b, 3, H, W)."""
    with run.autocast():
        return model.eval()(to_device(images, run)).float().softmax(dim=1)


def draw_predictions(model: nn.Module, samples: data.Samples, run: Run) -> Image.Image:
    """32 validation images with the model's answers: green where right, red where wrong."""
    classes = samples.source.classes
    order = random.Random(0).sample(range(len(samples)), len(samples))
    readable = (sample for sample in map(samples.__getitem__, order) if sample[1] >= 0)
    images, labels = zip(*itertools.islice(readable, 32))
    values, answers = chances(model, torch.stack(images), run).max(dim=1)
    model.train()
    tiles = []
    for image, label, value, answer in zip(images, labels, values.tolist(), answers.tolist()):
        lines = [percentage(classes[answer], value)]
        if answer != label:
            lines.append(f"is {classes[label]}")
        tiles.append((image, lines, "green" if answer == label else "red"))
    return contact_sheet(tiles)


def percentage(name: str, value: float) -> str:
    """A class and its probability, short enough for a tile: a long name loses its end."""
    return f"{name if len(name) <= 14 else name[:12] + '..'} {100 * value:.0f} %"


def contact_sheet(tiles: list[tuple[Tensor, list[str], str]]) -> Image.Image:
    """A picture of tiles, eight a row: image uint8 (3, H, W), up to two lines of text, colour.

    The frame and the first line have the colour. Text loses its accents, which Pillow's font lacks.
    """
    side, width, height = 136, 152, 188
    picture = Image.new("RGB", (8 * width, math.ceil(len(tiles) / 8) * height), "white")
    draw = ImageDraw.Draw(picture)
    for place, (image, lines, colour) in enumerate(tiles):
        x, y = place % 8 * width + 8, place // 8 * height + 8
        draw.rectangle((x - 4, y - 4, x + side + 3, y + side + 3), fill=colour)
        pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.paste(pixels.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        for row, line in enumerate(lines):
            letters = (c for c in normalize("NFKD", line) if c.isprintable() and not combining(c))
            line = "".join(letters)[:24]
            while draw.textlength(line, font_size=14) > width - 4:  # not into the next tile
                line = line[:-1]
            draw.text((x, y + side + 5 + 17 * row), line, "black" if row else colour, font_size=14)
    return picture


# --------------------------------------------------------------------------------------------------
# Data and model from the flags


def open_images(args: argparse.Namespace):
    """Training and validation images, as sources of `data.Samples`; --eval uses only the latter."""
    if args.data:
        folder, *others = (os.path.join(args.data, name) for name in ("train", "val", "test"))
        held_out = next(filter(os.path.isdir, others), None)
        if held_out is None or args.mode != "eval" and not os.path.isdir(folder):
            raise ValueError(f"--data {args.data}: needs train/CLASS/ and val/CLASS/ (or test/), "
                             f"and has no {'train' if held_out else 'val'}/")
        if args.mode == "eval":  # the classes are the classifier's, if it was trained here
            train = val = data.ImageFolder(held_out, read_beside(args.init, "classes.json", list))
        else:
            train = data.ImageFolder(folder)
            val = data.ImageFolder(held_out, train.classes)
        for source in train, val:
            if source.labels.min() < 0:
                raise ValueError(f"{source.name(int(source.labels.argmin()))!r} is in no class "
                                 "folder; classification needs train/CLASS/ and val/CLASS/")
    else:  # validation images have numbers that pretraining never sees
        size = args.img_size or 64
        train = data.Shapes(max(2400, args.labels_per_class * len(data.SHAPES)), size)
        val = data.Shapes(args.num_val, size, start=999_996)  # a multiple of 12
    if args.labels_per_class:
        rng, chosen = random.Random(f"{args.seed} labels"), []
        for label in range(len(train.classes)):
            indices = np.flatnonzero(train.labels == label).tolist()
            chosen += rng.sample(indices, min(args.labels_per_class, len(indices)))
        train = data.Subset(train, sorted(chosen))
    return train, val


def build_model(run: Run, num_classes: int | None) -> nn.Module:
    """The network that the flags ask for; args gets the sizes that were found in --init.

    num_classes: how many the data has; None takes the file's. ValueError if --init does not fit.
    """
    args = run.args
    torch.manual_seed(args.seed)  # the same weights in every process
    head = {"finetune": num_classes, "linear": 0, "knn": 0}.get(args.mode)  # None: the file's
    drop_path = args.drop_path if args.mode == "finetune" else 0.0  # a frozen encoder drops nothing
    if args.scratch:
        model = ViT(args.img_size, args.patch_size, **SIZES[args.model], num_classes=head,
                    drop_path=drop_path)
    else:
        model = load_vit(args.init, args.img_size, head, drop_path, args.teacher,
                         report=run.print)
        args.model, args.patch_size = None, model.patch_size
        args.img_size = model.grid[0] * model.patch_size
        config = read_beside(args.init, "config.json", dict) or {}
        recipe = config.get("recipe", args.recipe)
        if recipe != args.recipe and args.mode in ("finetune", "linear"):
            run.print(f"note: --init was trained with --recipe {recipe}, this is {args.recipe}")
        if args.crop_ratio is None:
            usual = RECIPES[args.recipe]["crop_ratio"]
            args.crop_ratio = config.get("crop_ratio", usual)
            if "crop_ratio" not in config:
                run.print(f"note: no config.json beside {args.init} gives it, so --crop_ratio is "
                          f"{usual}")
    if (channels := model.patch_embed.proj.in_channels) != 3:
        raise ValueError(f"{args.init} is for images of {channels} channels, not RGB")
    if args.mode in ("linear", "knn"):
        depth = args.depth or len(model.blocks)
        if depth > len(model.blocks):
            raise ValueError(f"--depth {depth}: this network has blocks 1 to {len(model.blocks)}; "
                             "0 takes the last")
        return LinearProbe(model, depth, num_classes) if args.linear else Features(model, depth)
    if args.mode in ("eval", "predict"):
        found = getattr(model.head, "out_features", 0)
        if found == 0:
            raise ValueError(f"--{args.mode}: {args.init} is no classifier; give the best.pt that "
                             "fine-tuning wrote")
        if num_classes not in (None, found):
            wanted = "classes.json beside it names" if args.mode == "predict" else "--data has"
            raise ValueError(f"--{args.mode}: {args.init} has a head for {found} classes, and "
                             f"{wanted} {num_classes}")
    return model


def fit_batch(images: int, run: Run) -> None:
    """If a recipe's batch exceeds a quarter of the images, take an eighth, and scale its --lr."""
    args, parts = run.args, run.world_size * run.args.accum_steps
    if "batch_size" in args.given and args.batch_size > images:
        raise ValueError(f"--batch_size {args.batch_size} is more than the {images} training "
                         "images there are")
    if "batch_size" not in args.given and 4 * args.batch_size > images:
        batch_size = max(images // 8 // parts, 2 if args.linear else 1) * parts
        if batch_size > images:
            raise ValueError(f"{images} training images are too few for {run.world_size} processes "
                             f"x --accum_steps {args.accum_steps}")
        if "lr" not in args.given:
            args.lr *= batch_size / args.batch_size
        run.print(f"batch of {batch_size} for {images} images, not {args.batch_size}"
                  f"{f'; peak learning rate {args.lr:.2g}' if args.lr else ''}")
        args.batch_size = batch_size
    run.split_batch()
    if args.linear and args.batch_size == parts:
        raise ValueError(f"--batch_size {parts} leaves each process and --accum_steps part one "
                         "image, and the probe's BatchNorm needs two")


def read_beside(path: str, name: str, kind: type):
    """The `kind` in the JSON file `name` beside `path`, or None if there is no such file."""
    path = os.path.join(os.path.dirname(path), name)
    if not os.path.exists(path):
        return None
    try:
        with open(path) as file:
            content = json.load(file)
    except ValueError:
        content = None
    if not isinstance(content, kind):
        raise ValueError(f"{path} is damaged; remove it to go on without")
    return content


if __name__ == "__main__":
    launch(main, parse_args())
