"""Classify images with a pretrained encoder: fine-tuning, linear probe, k-NN, evaluation.

    python finetune.py                                              built-in images, the encoder of `python train.py`
    torchrun --nproc_per_node=8 finetune.py --data imagenet --init output/imagenet/encoder.pt
    ... --linear                                                    linear probe of the frozen encoder
    ... --knn                                                       nearest neighbours, no training at all
    ... --eval --init output/imagenet_finetune/best.pt              top-1 and top-5 of a classifier

`--data` holds train/ and val/ (or test/), each with a folder for each class. `--init` takes this project's encoder.pt,
checkpoint.pt and best.pt, the authors' files, MAE's, and timm's ViT state dicts.
"""
import argparse
import contextlib
import copy
import functools
import json
import math
import os
import random
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

import data
from model import SIZES, ViT, from_official, patchify, resize_positions, standardize

# What the two loops share stands in train.py, where pretraining uses it first.
from train import (
    CURE,
    Parser,
    StopRequest,
    add_common_flags,
    add_recipe_flags,
    apply_recipe,
    check_agreement,
    check_broken,
    check_ranges,
    check_weights,
    cosine_lr,
    fail,
    load,
    load_optimizer,
    make_loader,
    make_out,
    name_broken,
    read_checkpoint,
    run,
    save,
    save_log,
    save_picture,
    setup,
    start_processes,
    total,
    wrap,
)

# ----------------------------------------------------------------------------------------------------------------------
# Recipes: each value can be overridden by the flag of the same name.

IMAGENET = dict(
    model="base", img_size=224, patch_size=16, depth=0, epochs=100, batch_size=2048, lr=5e-3, base_lr=0.0, min_lr=1e-6,
    warmup_epochs=20, weight_decay=0.05, betas=(0.9, 0.999), layer_decay=0.60, drop_path=0.1, mixup=0.8, cutmix=1.0,
    smoothing=0.1, rand_augment=9.0, erasing=0.25, crop_scale=(0.08, 1.0), crop_ratio=0.875, model_ema=0.9998,
    labels_per_class=0,
)
RECIPES = {
    "imagenet": IMAGENET,
    "imagenet_large": IMAGENET | dict(
        model="large", epochs=50, warmup_epochs=5, batch_size=1024, lr=1.5e-3, layer_decay=0.75,
    ),
    "cifar10": IMAGENET | dict(
        model="small", img_size=32, patch_size=4, batch_size=512, lr=1e-3, warmup_epochs=5, layer_decay=0.75,
        crop_scale=(0.4, 1.0), crop_ratio=1.0, model_ema=0.999,
    ),
    "shapes": IMAGENET | dict(
        model="nano", img_size=64, patch_size=8, epochs=40, batch_size=32, lr=2e-3, warmup_epochs=4, layer_decay=0.75,
        drop_path=0.0, mixup=0.0, cutmix=0.0, rand_augment=0.0, erasing=0.0, crop_scale=(0.6, 1.0), crop_ratio=1.0,
        model_ema=0.99, labels_per_class=20,
    ),
}
PROBE = dict(  # the linear probe of the paper: LARS, no weight decay, no augmentation but crop and flip
    lr=0.0, base_lr=0.1, min_lr=0.0, warmup_epochs=10, epochs=90, batch_size=16384, weight_decay=0.0, drop_path=0.0,
    mixup=0.0, cutmix=0.0, smoothing=0.0, rand_augment=0.0, erasing=0.0, model_ema=0.0, layer_decay=1.0,
)
LINEAR = {
    "imagenet": RECIPES["imagenet"] | PROBE | dict(depth=9),
    "imagenet_large": RECIPES["imagenet_large"] | PROBE | dict(depth=18, epochs=50, base_lr=0.07),
    "cifar10": RECIPES["cifar10"] | PROBE | dict(depth=9, batch_size=2048),
    "shapes": RECIPES["shapes"] | PROBE | dict(batch_size=64, epochs=60, base_lr=160.0, warmup_epochs=5),
}
HELP = dict(
    model="size of the encoder for --scratch: nano, tiny, small, base or large; otherwise the file decides",
    img_size="side of the square input", patch_size="side of a patch, for --scratch; otherwise the file decides",
    depth="--linear, --knn: use the output of this block, from 1 (0: the last)",
    epochs="length of the run", batch_size="images a step, over all processes and --accum_steps",
    lr="peak learning rate (0: take --base_lr)", base_lr="peak learning rate for 256 images; scales with --batch_size",
    min_lr="learning rate at the end, or the peak if that is lower", warmup_epochs="linear warm-up from 0",
    weight_decay="not on biases, norms and CLS token",
    betas="of AdamW", layer_decay="the learning rate shrinks by this from a block to the one below",
    drop_path="chance to skip a branch, in the last block", mixup="alpha of mixup (0: off)",
    cutmix="alpha of CutMix (0: off)", smoothing="label smoothing", rand_augment="magnitude (0: off)",
    erasing="probability of random erasing", crop_scale="area of a random crop",
    crop_ratio="evaluation: the centre crop's share of the short side",
    model_ema="momentum of the averaged model (0: none)",
    labels_per_class="use only so many training images of each class (0: all)",
)
FIXED = (  # what a resumed run may not change
    "model", "img_size", "patch_size", "depth", "linear", "scratch", "init", "teacher", "labels_per_class",
    "num_classes", "seed",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="finetune.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train/ and val/ or test/ (default: built-in images)")
    parser.add_argument("--recipe", choices=RECIPES, help="default: imagenet with --data, else shapes")
    parser.add_argument("--init", help="file with weights (default: output/RECIPE/encoder.pt, as train.py writes it)")
    parser.add_argument("--teacher", action="store_true", help="--init: take the teacher's weights, not the student's")
    parser.add_argument("--scratch", action="store_true", help="random weights instead of --init")
    parser.add_argument("--linear", action="store_true", help="train a linear layer on the frozen encoder")
    parser.add_argument("--knn", action="store_true", help="classify by nearest neighbours; no training")
    parser.add_argument("--neighbours", type=int, default=20, help="--knn: how many")
    parser.add_argument("--eval", action="store_true", help="only evaluate the classifier in --init")
    parser.add_argument("--eval_every", type=int, default=1, help="epochs between evaluations")
    parser.add_argument("--num_val", type=int, default=1200, help="how many built-in validation images")
    add_common_flags(parser)
    add_recipe_flags(parser, RECIPES, HELP)
    args = parser.parse_args(argv)
    if args.linear + args.knn + args.eval > 1:
        fail("--linear, --knn and --eval are different things to do: give one")
    if args.scratch and (args.init or args.teacher):
        fail("--scratch starts from random weights: leave out --init and --teacher, or --scratch")
    args.recipe = args.recipe or ("imagenet" if args.data else "shapes")
    args.mode = "linear" if args.linear else "knn" if args.knn else "eval" if args.eval else "finetune"
    if not args.init and not args.scratch:
        args.init = os.path.join("output", args.recipe, "encoder.pt")
        if not os.path.exists(args.init):
            fail(f"--init: there is no {args.init}; run train.py, name a file, or take --scratch for random weights")
    if args.eval and args.scratch:
        fail("--eval --scratch: random weights have nothing to evaluate; give --init FILE")
    args.out = args.out or os.path.join("output", f"{args.recipe}_{args.mode}{'_scratch' if args.scratch else ''}")
    args.asked_model, args.asked_patch_size, args.asked_depth = args.model, args.patch_size, args.depth
    args.asked_img_size = args.img_size
    args = check_ranges(apply_recipe(args, LINEAR if args.linear else RECIPES))
    if args.linear and args.model_ema:
        fail("--model_ema: a linear probe has no moving average; leave it out")
    if args.asked_depth and args.mode in ("finetune", "eval"):
        fail(f"--depth {args.asked_depth}: only --linear and --knn cut the encoder")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Weights in


def read_weights(path: str, teacher: bool = False) -> dict[str, Tensor]:
    """A ViT's state_dict from any file that `--init` takes (see the top); may hold keys of other parts as well.

    Exits with a line naming the file if it isn't one.
    """
    content = load(path)
    state = content.get("model", content) if isinstance(content, dict) else {}
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        fail(f"{path} holds no state_dict of a ViT")
    if any(key.endswith("q_bias") for key in state):  # the authors' layout
        if teacher and not content.get("model_ema"):
            fail(f"--teacher: {path} was saved without one (no model_ema)")
        try:
            state = from_official(content)
        except (ValueError, KeyError) as error:
            fail(f"{path} is not quite a file of the authors' code: {error}")
    part = "teacher." if teacher else "encoder."
    if any(key.startswith("encoder.") for key in state):
        if not any(key.startswith(part) for key in state):
            fail(f"--teacher: {path} was pretrained without one")
        state = {key.removeprefix(part): value for key, value in state.items() if key.startswith(part)}
    elif teacher:
        fail(f"--teacher: {path} holds one network; a checkpoint.pt of train.py or of the authors has a teacher")
    return state


def sizes_of(state: dict[str, Tensor], path: str) -> dict:
    """Sizes of the ViT that a state_dict belongs to; exits, naming the file, if it fits none.

    model (a name in SIZES), patch_size, in_chans, and img_size: the side, or None if the images were not square.
    """
    if any(key.startswith("features.encoder.") for key in state):
        fail(f"{path} is of a linear probe; --init takes the encoder that it was trained on")
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        fail(f"{path} fits no ViT: it has no {missing[0]}")
    try:
        embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        img_size = side * patch_size if state["pos_embed"].shape[1:] == (side**2 + 1, embed_dim) else None
        assert state["pos_embed"].ndim == 3
    except (ValueError, IndexError, AssertionError):
        fail(f"{path} fits no ViT: its tensors have other names or shapes")
    for name, size in SIZES.items():
        if (size["embed_dim"], size["depth"]) == (embed_dim, depth):
            return dict(model=name, patch_size=patch_size, in_chans=in_chans, img_size=img_size)
    fail(f"{path} has {depth} blocks of width {embed_dim}, which none of model.py's SIZES has: add a line for it")


def fill(model: ViT, state: dict[str, Tensor], path: str) -> str:
    """Copy what fits into `model`; returns a line on what was loaded, left out and new. Exits if a block is missing."""
    own = model.state_dict()
    state = dict(state)
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    if side * side + 1 == state["pos_embed"].shape[1] and (side, side) != model.grid:
        state["pos_embed"] = resize_positions(state["pos_embed"].float(), (side, side), model.grid)
    loaded = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    left_out, new = sorted(state.keys() - loaded.keys()), sorted(own.keys() - loaded.keys())
    lacking = [key for key in new if not key.startswith(("norm.", "fc_norm.", "head."))]
    if lacking:
        fail(f"{path} does not fit: {lacking[0]} is missing or has another shape")
    foreign = [key for key in left_out if key.startswith(("blocks.", "norm_pre.", "reg_token"))]
    if foreign:
        fail(f"{path} does not fit: it has {foreign[0]}, which this ViT lacks, so it would be another network")
    model.load_state_dict(loaded, strict=False)

    def names(keys: list[str]) -> str:
        return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "") if keys else "nothing"

    return f"{path}: {len(loaded)} tensors loaded; left out: {names(left_out)}; new: {names(new)}"


# ----------------------------------------------------------------------------------------------------------------------
# Data


def read_classes(path: str) -> list[str] | None:
    """Class names of the classifier in the file `path`, from the classes.json beside it, if there is one."""
    path = os.path.join(os.path.dirname(path), "classes.json")
    if not os.path.exists(path):
        return None
    try:
        with open(path) as file:
            return json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is damaged; remove it, and the folders of --data name the classes") from error


def get_data(args: argparse.Namespace):
    """Training and validation images, as sources of `data.Samples`; for --eval only the latter count.

    Raises ValueError if they can't be had.
    """
    if args.data:
        held_out = next((name for name in ("val", "test") if os.path.isdir(os.path.join(args.data, name))), None)
        if held_out is None:
            raise ValueError(f"--data {args.data}: needs train/CLASS/ and val/CLASS/ (or test/), and has no val/")
        held_out = os.path.join(args.data, held_out)
        if args.eval:  # the classes are those of the classifier, if it was trained here
            train = val = data.ImageFolder(held_out, read_classes(args.init))
        elif os.path.isdir(os.path.join(args.data, "train")):
            train = data.ImageFolder(os.path.join(args.data, "train"))
            val = data.ImageFolder(held_out, train.classes)
        else:
            raise ValueError(f"--data {args.data}: needs train/CLASS/ and val/CLASS/ (or test/), and has no train/")
        for source in train, val:
            if min(source.labels) < 0:
                raise ValueError(f"{source.name(int(source.labels.argmin()))!r} is in no class folder; classification "
                                 "needs train/CLASS/ and val/CLASS/")
    else:  # validation images have numbers that pretraining never sees
        train = data.Shapes(max(2400, args.labels_per_class * len(data.SHAPES)), args.img_size)
        val = data.Shapes(args.num_val, args.img_size, start=1_000_000 - 1_000_000 % len(data.SHAPES))
    if args.labels_per_class:
        rng = random.Random(f"{args.seed} labels")
        of_class = [[] for _ in train.classes]
        for index, label in enumerate(train.labels):
            of_class[label].append(index)
        chosen = [rng.sample(indices, min(args.labels_per_class, len(indices))) for indices in of_class]
        train = data.Subset(train, sorted(index for indices in chosen for index in indices))
    return train, val


def train_view(image: Image.Image, rng: random.Random, args: argparse.Namespace) -> tuple:
    image = data.flip(data.random_resized_crop(image, args.img_size, rng, args.crop_scale), rng)
    return (data.to_tensor(data.rand_augment(image, rng, magnitude=args.rand_augment) if args.rand_augment else image),)


def eval_view(image: Image.Image, rng: random.Random, args: argparse.Namespace) -> tuple:
    return (data.to_tensor(data.center_crop(image, args.img_size, args.crop_ratio)),)


def eval_loader(source, args: argparse.Namespace, env: SimpleNamespace):
    """Every image once over all processes: each takes every world_size-th, and nothing is padded."""
    samples = data.Samples(source, functools.partial(eval_view, args=args), args.seed)
    mine = range(env.rank, len(source), env.world_size)
    size = max(1, min(256, args.batch_size // (env.world_size * args.accum_steps)))
    return make_loader(samples, [list(mine[i : i + size]) for i in range(0, len(mine), size)], args, env)


def to_device(images: Tensor, env: SimpleNamespace) -> Tensor:
    return data.scale_pixels(images.to(env.device, non_blocking=True))


# ----------------------------------------------------------------------------------------------------------------------
# Linear probe, k-NN, evaluation


class Features(nn.Module):
    """Frozen encoder cut after block `depth`: the mean of its patch tokens, standardised. (B, C, H, W) -> (B, D)."""

    def __init__(self, encoder: ViT, depth: int):
        super().__init__()
        encoder.blocks = encoder.blocks[:depth]
        self.encoder = encoder.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        tokens, _ = self.encoder.encode(patchify(images, self.encoder.patch_size))    # (B, 1+N, D)
        return standardize(tokens[:, 1:].float().mean(dim=1))                         # (B, D)


class LinearProbe(nn.Module):
    """`Features`, then BatchNorm without affine parameters and a linear layer, the only thing trained."""

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


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on a matrix is scaled to the matrix's norm (You et al., 2017, arXiv 1708.03888)."""

    def __init__(self, params, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

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


def average_statistics(model: nn.Module, env: SimpleNamespace) -> None:
    """Give every process the same running statistics: each BatchNorm has seen its own share of the images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean = total(module.running_mean, env) / env.world_size
            module.running_var = total(module.running_var, env) / env.world_size


def readable(loader) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of each batch, without the files that can't be read: those are named."""
    for images, labels, broken in loader:
        if name_broken(broken, loader.dataset):
            images, labels = images[broken < 0], labels[broken < 0]
        yield images, labels


def tally(ranking: Tensor, labels: Tensor) -> Tensor:
    """How many of the rows of `ranking` (b, 5), best class first, are right, right among the five, and in all: (3,)."""
    right = ranking == labels[:, None]
    return torch.stack([right[:, 0].sum(), right.sum(), torch.ones_like(labels).sum()])


def per_cent(counts: Tensor, env: SimpleNamespace) -> dict[str, float]:
    """Images, top1 and top5 in per cent of all processes, from the counts of `tally` in each."""
    top1, top5, number = total(counts, env).tolist()
    return dict(images=number, top1=100 * top1 / max(number, 1), top5=100 * top5 / max(number, 1))


@torch.no_grad()
def evaluate(models: list[nn.Module], loader, env: SimpleNamespace) -> list[dict[str, float]]:
    """What `per_cent` says of each model, over all images. One pass for all models: loading may be what takes long."""
    counts = torch.zeros(len(models), 3, dtype=torch.int64, device=env.device)
    for model in models:
        model.eval()
    for images, labels in readable(loader):
        images, labels = to_device(images, env), labels.to(env.device, non_blocking=True)
        for model, count in zip(models, counts):
            with torch.autocast(env.device.type, env.dtype, enabled=env.dtype is not None):
                logits = model(images)                                                # (b, num_classes)
            count += tally(logits.topk(min(5, logits.shape[1]), dim=1).indices, labels)
    for model in models:
        model.train()
    return [per_cent(count, env) for count in counts]


@torch.no_grad()
def extract(model: nn.Module, source, args: argparse.Namespace, env: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Features (n, D) and labels (n,) of this process's share of the images, but for those that can't be read."""
    features, labels = [torch.zeros(0, model.encoder.cls_token.shape[2])], [torch.zeros(0, dtype=torch.int64)]
    loader = eval_loader(source, args, env)
    bar = tqdm(readable(loader), total=len(loader), disable=None if env.is_main else True, leave=False)
    for images, batch_labels in bar:
        with torch.autocast(env.device.type, env.dtype, enabled=env.dtype is not None):
            features.append(model(to_device(images, env)).cpu())
        labels.append(batch_labels)
    return torch.cat(features), torch.cat(labels)


def gather(mine: tuple[Tensor, ...], env: SimpleNamespace) -> tuple[Tensor, ...]:
    """Tensors on the CPU, whose rows are shared out over the processes, whole in every one."""
    if env.world_size == 1:
        return mine
    shares = [None] * env.world_size
    dist.all_gather_object(shares, mine)
    return tuple(torch.cat(parts) for parts in zip(*shares))


def knn(
    train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, num_classes: int, k: int, device: torch.device
) -> Tensor:
    """`tally` of a vote of the k nearest training images by cosine, weighted by exp(cosine / 0.07), for all of `val`.

    Features (n, D) are first standardised by the training images' mean and deviation, as the probe's BatchNorm does.
    They are on the CPU; the search, in ImageNet 64 billion products of vectors, is done on `device`.
    """
    train, train_labels, val, val_labels = (x.to(device) for x in (train, train_labels, val, val_labels))
    std, mean = torch.std_mean(train, dim=0)
    train, val = (F.normalize((x - mean) / (std + 1e-6), dim=1) for x in (train, val))
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    for some, labels in zip(val.split(128), val_labels.split(128)):
        similarity, nearest = (some @ train.T).topk(min(k, len(train)), dim=1)                       # (b, k)
        votes = torch.zeros(len(some), num_classes, device=device)                                   # (b, num_classes)
        votes.scatter_add_(1, train_labels[nearest], (similarity / 0.07).exp())
        counts += tally(votes.topk(min(5, num_classes), dim=1).indices, labels)
    return counts


@torch.no_grad()
def draw_predictions(model: nn.Module, source, args: argparse.Namespace, env: SimpleNamespace, path: str) -> None:
    """Save a PNG of 32 validation images over all classes with what the model says: green right, red wrong."""
    order = random.Random(0).sample(range(len(source)), min(32, len(source)))
    samples = data.Samples(source, functools.partial(eval_view, args=args), args.seed)
    images = torch.stack([samples[index][0] for index in order])
    model.eval()
    with torch.autocast(env.device.type, env.dtype, enabled=env.dtype is not None):
        chances = model(to_device(images, env)).float().softmax(dim=1).max(dim=1)
    model.train()
    side = 112
    picture = Image.new("RGB", (8 * (side + 8), math.ceil(len(order) / 8) * (side + 32)), "white")
    draw = ImageDraw.Draw(picture)
    for place, (index, image, chance, answer) in enumerate(zip(order, images, *(t.tolist() for t in chances))):
        x, y = place % 8 * (side + 8) + 4, place // 8 * (side + 32) + 4
        truth, colour = source.labels[index], "green" if answer == source.labels[index] else "red"
        draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), fill=colour)
        tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
        picture.paste(tile, (x, y))
        draw.text((x, y + side + 3), f"{source.classes[answer][:12]} {100 * chance:.0f} %", fill=colour)
        if answer != truth:
            draw.text((x, y + side + 14), f"is {source.classes[truth][:14]}", fill="black")
    save_picture(picture, path)


# ----------------------------------------------------------------------------------------------------------------------
# Fine-tuning


def layer_groups(model: ViT, weight_decay: float, layer_decay: float) -> list[dict]:
    """Optimizer groups for layer-wise decay: embeddings are layer 0, block i layer i + 1, the head depth + 1.

    A group's learning rate is scaled by layer_decay ** (depth + 1 - layer); biases, norms and CLS token do not decay.
    """
    last, groups = len(model.blocks) + 1, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer = 0 if name.startswith(("cls_token", "patch_embed")) else last
            layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else layer
            decay = 0.0 if p.ndim == 1 or name == "cls_token" else weight_decay
            group = groups.setdefault((layer, decay), dict(params=[], weight_decay=decay))
            group["params"].append(p)
            group["lr_scale"] = layer_decay ** (last - layer)
    return list(groups.values())


def main(args: argparse.Namespace) -> None:
    # ---- checks, before anything is written or any process waits for another
    env = setup(args)
    torch.manual_seed(args.seed)  # the same weights in every process
    try:
        state = None if args.scratch else read_weights(args.init, args.teacher)
        if state is not None:
            found = sizes_of(state, args.init)
            for name, asked in ("model", args.asked_model), ("patch_size", args.asked_patch_size):
                if asked not in (None, found[name]):
                    fail(f"--{name} {asked}: {args.init} has {name} {found[name]}")
            args.model, args.patch_size = found["model"], found["patch_size"]
            if args.eval and args.asked_img_size is None:
                args.img_size = found["img_size"] or args.img_size
        if args.model not in SIZES:
            raise ValueError(f"--model {args.model}: choose one of {', '.join(SIZES)}")
        train, val = get_data(args)
        num_classes = len(train.classes)
        depth = args.depth or SIZES[args.model]["depth"]
        if not 1 <= depth <= SIZES[args.model]["depth"]:
            raise ValueError(f"--depth {args.depth}: {args.model} has blocks 1 to {SIZES[args.model]['depth']}")
        if args.eval and ("head.weight" not in state or len(state["head.weight"]) != num_classes):
            what = f"a head for {len(state['head.weight'])} classes" if "head.weight" in state else "no head"
            raise ValueError(f"--eval: {args.init} has {what} and the data has {num_classes} classes")
        if args.mode in ("finetune", "linear") and len(train) < args.batch_size:
            raise ValueError(f"--batch_size {args.batch_size} is more than the {len(train)} training images there are")
        classify = args.mode in ("finetune", "eval")
        model = ViT(args.img_size, args.patch_size, **SIZES[args.model], num_classes=num_classes if classify else 0,
                    drop_path=args.drop_path)
    except OSError as error:
        fail(f"--data: can't read {error.filename}: {error.strerror}")
    except ValueError as error:
        fail(str(error))
    if state is not None:
        line = fill(model, state, args.init)
        if args.eval and "new: nothing" not in line:
            fail(f"--eval: {line}: not a whole classifier of this kind; fine-tune it instead")
        if env.is_main:
            print(line)
    del state

    # ---- what needs no training
    if args.mode in ("eval", "knn"):
        start_processes(env)
        if args.eval:
            result = evaluate([model.to(env.device)], eval_loader(val, args, env), env)[0]
        else:
            model = Features(model, depth).eval().to(env.device)
            known, asked = gather(extract(model, train, args, env), env), extract(model, val, args, env)
            result = per_cent(knn(*known, *asked, num_classes, args.neighbours, env.device), env)
        if env.is_main:
            print(json.dumps(result))
        return

    # ---- data, model and optimizer
    samples = data.Samples(train, functools.partial(train_view, args=args), args.seed)
    steps_per_epoch = len(train) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    if args.linear:
        model = LinearProbe(model, depth, num_classes).to(env.device)
        optimizer = LARS(model.head.parameters(), weight_decay=args.weight_decay)
    else:
        model.to(env.device)
        groups = layer_groups(model, args.weight_decay, args.layer_decay)
        optimizer = torch.optim.AdamW(groups, betas=args.betas, fused=True)
    ema = copy.deepcopy(model).requires_grad_(False) if args.model_ema else None
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype is torch.float16)

    # ---- resume
    checkpoint_path = os.path.join(args.out, "checkpoint.pt")
    config = {name: value for name, value in vars(args).items()
              if name not in ("fresh", "workers") and not name.startswith("asked_")}
    config["num_classes"] = num_classes
    # Sums over this epoch so far: loss, steps with a finite loss, broken samples
    step, log, best, sums = 0, [], -1.0, torch.zeros(3, dtype=torch.float64, device=env.device)
    if os.path.exists(checkpoint_path) and not args.fresh:
        checkpoint = read_checkpoint(checkpoint_path, config, FIXED, steps_per_epoch)
        model.load_state_dict(checkpoint["model"])
        load_optimizer(optimizer, checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty unless that was fp16
            scaler.load_state_dict(checkpoint["scaler"])
        if ema is not None:
            ema.load_state_dict(checkpoint["ema"] or checkpoint["model"])
        step, log, best = checkpoint["step"], checkpoint["log"], checkpoint["best"]
        if env.is_main:
            sums += checkpoint["sums"].to(env.device)
            print(f"going on from {checkpoint_path}, epoch {step // steps_per_epoch} of {args.epochs}, step {step}")
            if step >= total_steps:
                print("this run is finished; --fresh starts it over, more --epochs make it longer")
        del checkpoint

    # ---- processes
    start_processes(env)
    check_agreement(step, args, env)
    if env.is_main:
        print(f"{args.recipe} {args.mode}: {len(train)} images of {num_classes} classes, {total_steps} steps, "
              f"{env.world_size} x {env.device.type}, {env.dtype or torch.float32}")
        if step < total_steps:
            make_out(args, config)
            save(json.dumps(train.classes).encode(), os.path.join(args.out, "classes.json"))
    network = wrap(model, args, env)
    batches = data.Batches(len(train), args.batch_size, args.epochs, args.seed, step, args.accum_steps, env.rank,
                           env.world_size)
    stream = iter(make_loader(samples, batches, args, env)) if step < total_steps else None
    val_loader = eval_loader(val, args, env)
    stop = StopRequest(env)
    recent = torch.zeros((), device=env.device)  # steps with a finite loss since the last look
    peak = args.lr or args.base_lr * args.batch_size / 256

    def save_checkpoint() -> None:
        """Rank 0 writes; all must call. Weights that are not finite are never saved over good ones."""
        reduced = total(sums, env)
        check_weights(model, f"step {step}, lr {lr:.2e}", checkpoint_path)
        if env.is_main:
            save(dict(
                model=model.state_dict(), ema=ema and ema.state_dict(), optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(), step=step, steps_per_epoch=steps_per_epoch, sums=reduced.cpu(), log=log,
                best=best, config=config,
            ), checkpoint_path)

    # ---- training
    model.train()
    while step < total_steps:
        epoch, began, began_step = step // steps_per_epoch, time.time(), step
        bar = tqdm(range(step % steps_per_epoch, steps_per_epoch), desc=f"epoch {epoch + 1}/{args.epochs}", leave=False,
                   initial=step % steps_per_epoch, total=steps_per_epoch, disable=None if env.is_main else True)
        for _ in bar:
            lr = cosine_lr(step / total_steps, args.warmup_epochs / args.epochs, peak, args.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            torch.manual_seed((args.seed * total_steps + step) * env.world_size + env.rank)  # drop path and erasing

            row = torch.zeros_like(sums)
            for part in range(args.accum_steps):
                images, labels, broken = next(stream)
                if count := name_broken(broken, samples):
                    sums[2] += count
                images, labels = to_device(images, env), labels.to(env.device, non_blocking=True)
                if args.erasing:
                    images = data.random_erasing(images, args.erasing)
                rng = random.Random(f"{args.seed} mix {step} {part} {env.rank}")
                images, targets = data.mixup_cutmix(
                    images, labels, num_classes, args.mixup, args.cutmix, args.smoothing, rng
                )
                last = part == args.accum_steps - 1
                with contextlib.nullcontext() if last or env.world_size == 1 else network.no_sync():
                    with torch.autocast(env.device.type, env.dtype, enabled=env.dtype is not None):
                        logits = network(images)                                      # (b, num_classes)
                    loss = F.cross_entropy(logits.float(), targets) / args.accum_steps
                    scaler.scale(loss).backward()
                row[0] += loss.detach()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if ema is not None:
                with torch.no_grad():
                    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - args.model_ema)

            row[1] = row[0].isfinite()
            sums += row.nan_to_num(0, 0, 0) * row[1]
            recent += row[1]
            step += 1
            if step % args.log_every == 0:
                mean_loss, finite, broken_count = total(sums, env).tolist()
                if total(recent, env).item() == 0:
                    fail(f"no finite loss in the last {args.log_every} steps, up to step {step}: loss {row[0].item()}, "
                         f"lr {lr:.2e}; nothing was saved over {checkpoint_path}. {CURE}", code=1)
                recent.zero_()
                check_broken(broken_count, samples)
                bar.set_postfix_str(f"loss {mean_loss / max(finite, 1):.4f} lr {lr:.1e}")
            if stop.agreed():
                bar.close()
                save_checkpoint()
                fail(f"stopped by {signal.Signals(stop.signal).name} after step {step}; {checkpoint_path} holds it, "
                     "the same command goes on", code=128 + stop.signal)

        # ---- end of an epoch
        mean_loss, finite, broken_count = total(sums, env).tolist()
        check_broken(broken_count, samples)
        check_weights(model, f"step {step}, lr {lr:.2e}", checkpoint_path)
        speed = (step - began_step) * args.batch_size / (time.time() - began)
        bar.close()
        line = dict(epoch=epoch + 1, loss=mean_loss / max(finite, 1), lr=lr, images_per_s=speed,
                    broken=int(broken_count))
        finished = step == total_steps
        if finished or (epoch + 1) % args.eval_every == 0:
            average_statistics(model, env)
            result, *average = evaluate([model] if ema is None else [model, ema], val_loader, env)
            line |= result
            if average:
                line |= dict(top1_ema=average[0]["top1"], top5_ema=average[0]["top5"])
            if max(line["top1"], line.get("top1_ema", 0)) > best:
                best = max(line["top1"], line.get("top1_ema", 0))
                better = model if best == line["top1"] else ema
                if env.is_main:
                    save(better.state_dict(), os.path.join(args.out, "best.pt"))
                    draw_predictions(better, val, args, env, os.path.join(args.out, "predictions.png"))
        log.append(line)
        sums.zero_()
        if finished or (epoch + 1) % args.save_every == 0:
            save_checkpoint()
        if env.is_main:
            save_log(log, args.out)
            print("  ".join(f"{name} {value:.5g}" for name, value in line.items()), flush=True)
    if env.is_main:
        print(f"best top-1 {best:.2f} %; {args.out} holds best.pt, checkpoint.pt, log.jsonl and predictions.png")


if __name__ == "__main__":
    run(main, parse_args())
