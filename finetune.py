"""Classify images with a pretrained encoder: fine-tuning, probe, k-NN, evaluation, prediction.

    python finetune.py                                     built-in images, train.py's encoder
    python finetune.py --data photos --recipe photos       a few thousand photos of your own
    torchrun --nproc_per_node=8 finetune.py --data imagenet --init output/imagenet/encoder.pt
    ... --linear                                           linear probe of the frozen encoder
    ... --knn                                              nearest neighbours, no training at all
    ... --eval --init output/imagenet_finetune/best.pt     top-1 and top-5 of a classifier
    python finetune.py --predict DIR --init output/imagenet_finetune/best.pt
    python finetune.py --features DIR --init output/imagenet/encoder.pt

--data holds train/ and val/ (or test/), each with a folder for each class. --init takes this
project's encoder.pt, checkpoint.pt and best.pt (but no probe's), the authors' files, MAE's, and
timm's ViT state dicts; the network has the sizes found there.
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

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

import data
import train
from model import SIZES, ViT, load_vit, patchify, read_file, standardize

# A recipe has a value for every setting of the method, and each has a flag of the same name.
RECIPES = {"imagenet": dict(  # as published, for ViT-B
    model="base", img_size=224, patch_size=16, branch_init=1.0, depth=0, epochs=100,
    warmup_epochs=20, batch_size=2048, lr=5e-3, base_lr=0.0, min_lr=1e-6, weight_decay=0.05,
    betas=[0.9, 0.999], layer_decay=0.6, drop_path=0.1, crop_scale=[0.08, 1.0], rand_augment=9.0,
    erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1, model_ema=0.9998, labels_per_class=0,
    crop_ratio=0.875)}
RECIPES["imagenet_large"] = RECIPES["imagenet"] | dict(
    model="large", batch_size=1024, epochs=50, lr=1.5e-3, warmup_epochs=5, layer_decay=0.75)
RECIPES["cifar10"] = RECIPES["imagenet"] | dict(
    model="small", img_size=32, patch_size=4, branch_init=0.0, batch_size=512, lr=1e-3,
    warmup_epochs=5, layer_decay=0.75, model_ema=0.999, crop_scale=[0.4, 1.0], crop_ratio=1.0)
# Few images and a small network: no augmentation but crop and flip
NO_AUGMENTATION = dict(drop_path=0.0, mixup=0.0, cutmix=0.0, rand_augment=0.0, erasing=0.0)
RECIPES["photos"] = RECIPES["cifar10"] | NO_AUGMENTATION | dict(
    model="tiny", img_size=96, patch_size=12, batch_size=32, epochs=40, warmup_epochs=4,
    model_ema=0.99)
RECIPES["shapes"] = RECIPES["photos"] | dict(
    model="nano", img_size=64, patch_size=8, lr=2e-3, crop_scale=[0.6, 1.0], labels_per_class=20)

# The linear probe of the paper, which LARS trains
PROBE = NO_AUGMENTATION | dict(lr=0.0, base_lr=0.1, min_lr=0.0, warmup_epochs=10, epochs=90,
                     batch_size=16384, weight_decay=0.0, smoothing=0.0, model_ema=0.0)
PROBES = {name: RECIPES[name] | PROBE | own for name, own in {
    "imagenet": dict(depth=9),
    "imagenet_large": dict(depth=18, epochs=50, base_lr=0.07),
    "cifar10": dict(depth=9, batch_size=2048),
    "photos": dict(batch_size=64, epochs=30, base_lr=40.0, warmup_epochs=3),
    "shapes": dict(batch_size=64, epochs=60, base_lr=160.0, warmup_epochs=5),
}.items()}


def main(args: argparse.Namespace) -> None:
    """Fine-tuning, and the linear probe, whose loop is the same; other modes return early."""
    run = train.Run(args)
    if args.mode in ("predict", "features"):
        return describe_folder(run)
    with train.one_line_errors():  # wrong flags or data end here, before anything is written
        source, held_out = open_images(args, run)
        num_classes = len(source.classes)
        model = build_model(run, num_classes).to(run.device)
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
    if args.mode == "linear":
        optimizer = LARS(model.head.parameters(), weight_decay=args.weight_decay)
    else:
        groups = layer_groups(model, args.weight_decay, args.layer_decay)
        optimizer = torch.optim.AdamW(groups, betas=args.betas, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype is torch.float16)
    meter = train.Meter(run, "loss")
    saved = dict(model=model, optimizer=optimizer, scaler=scaler, meter=meter)
    if args.model_ema:
        saved["average"] = copy.deepcopy(model).requires_grad_(False)
    average = saved.get("average")

    fingerprint = f"{source.fingerprint} to train, {held_out.fingerprint} to validate"
    start = run.start(saved, total_steps, fingerprint)
    # A step starts from rank 0's BatchNorm statistics; until the next, the processes' may differ.
    network = run.wrap(model, broadcast_buffers=args.mode == "linear")
    batches = run.batches(samples, start)

    model.train()
    for step in run.steps(start, total_steps):
        warmup = args.warmup_epochs / args.epochs
        lr = train.cosine_lr(step / total_steps, warmup, peak_lr, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        torch.manual_seed(data.seed_from(args.seed, "noise", step, run.rank))  # drop path, erasing

        # Forward and backward, in parts that fit into memory
        for part in range(args.accum_steps):
            images, labels = next(batches)              # uint8 (b, 3, H, W), int64 (b,)
            images, labels = to_device(images, run), labels.to(run.device, non_blocking=True)
            rng = random.Random(f"{args.seed} mix {step} {part} {run.rank}")
            if args.erasing:
                images = data.random_erasing(images, rng, args.erasing)
            images, targets = data.mixup_cutmix(        # targets: float (b, num_classes)
                images, labels, num_classes, rng, args.mixup, args.cutmix, args.smoothing)
            # DDP sums the gradients of all processes once a step, in the last part.
            network.require_backward_grad_sync = part == args.accum_steps - 1
            with run.autocast():
                logits = network(images)                # (b, num_classes)
            loss = F.cross_entropy(logits.float(), targets)
            scaler.scale(loss / args.accum_steps).backward()
            meter.add(loss)

        # The model takes a step, and its average follows.
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if average is not None:
            slow, fast = list(average.parameters()), list(model.parameters())
            with torch.no_grad():
                torch._foreach_lerp_(slow, fast, 1 - args.model_ema)

        done, stop = step + 1, run.stop_asked()
        epoch, rest = divmod(done, steps_per_epoch)
        if rest == 0 or stop or done % args.log_every == 0:
            # Reading the loss makes the CPU wait for the GPU, so it is not done in every step.
            losses = meter.means()
            run.check_finite(model, scaler, losses)
            run.progress.set_postfix(losses, refresh=False)
        if rest == 0:
            values = losses | dict(images_per_s=run.images_per_s(done), lr=lr)
            if done == total_steps or epoch % args.eval_every == 0:
                values |= evaluate_and_keep_the_best(model, average, val, run)
            run.log_epoch(epoch, values, done)
            meter.sums.zero_()
        if stop or done == total_steps or rest == 0 and epoch % args.save_every == 0:
            run.save_checkpoint(saved, done)
        if stop:
            run.stop(done)
    if (best := best_top1(run.log)) >= 0:
        run.print(f"best top-1 {best:.2f} %; {args.out} holds best.pt, checkpoint.pt, log.jsonl, "
                  "curves.png and predictions.png")


def train_view(image: Image.Image, rng: random.Random, args: argparse.Namespace) -> tuple:
    """One augmented view: (uint8 (3, H, W),)."""
    image = data.flip(data.random_resized_crop(image, args.img_size, rng, args.crop_scale), rng)
    if args.rand_augment:
        image = data.rand_augment(image, rng, magnitude=args.rand_augment)
    return (data.to_tensor(image),)


def eval_view(image: Image.Image, rng: random.Random, args: argparse.Namespace) -> tuple:
    """The middle of an image: (uint8 (3, H, W),)."""
    return (data.to_tensor(data.center_crop(image, args.img_size, args.crop_ratio)),)


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
        no_decay = p.ndim == 1 or name == "cls_token"
        new = dict(params=[], weight_decay=0.0 if no_decay else weight_decay,
                   lr_scale=layer_decay ** (last - layer))
        groups.setdefault((layer, no_decay), new)["params"].append(p)
    return list(groups.values())


# --------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(models: list[nn.Module], samples: data.Samples,
             run: train.Run) -> list[dict[str, float]]:
    """`accuracy` of each model. The models share one pass, because loading may take longest."""
    counts = torch.zeros(len(models), 3, dtype=torch.int64, device=run.device)
    models = nn.ModuleList(models).eval()
    for outputs, labels in outputs_of(models, samples, run):
        for logits, count in zip(outputs, counts):                           # (b, num_classes)
            count += count_correct(logits, labels)
    models.train()
    return [accuracy(count, run) for count in counts]


def eval_samples(source, args: argparse.Namespace) -> data.Samples:
    """The middles of a source's images; an image that can't be read has label -1."""
    return data.Samples(source, functools.partial(eval_view, args=args), replace=False)


@torch.no_grad()
def outputs_of(models, samples: data.Samples,
               run: train.Run) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The models' outputs (b, ...), and labels (b,), for batches of this process's share.

    Each process takes every world_size-th image. Nothing is padded, so each image counts once.
    """
    mine = range(run.rank, len(samples), run.world_size)
    loader = run.loader(samples, torch.utils.data.BatchSampler(mine, 128, drop_last=False))
    for images, labels in tqdm(loader, leave=False, disable=None if run.is_main else True):
        images = to_device(images, run)
        with run.autocast():
            outputs = [model(images) for model in models]
        yield outputs, labels.to(run.device, non_blocking=True)


def to_device(images: Tensor, run: train.Run) -> Tensor:
    return data.scale_pixels(images.to(run.device, non_blocking=True))


def count_correct(scores: Tensor, labels: Tensor) -> Tensor:
    """Counts (3,): images whose label has the highest score, one of the best five, and all of them.

    scores (b, num_classes), labels (b,) int64; -1, of an unreadable image, counts nowhere.
    """
    ranking = scores.topk(min(5, scores.shape[1]), dim=1).indices            # (b, up to 5)
    right = ranking == labels[:, None]
    return torch.stack([right[:, 0].sum(), right.sum(), (labels >= 0).sum()])


def accuracy(counts: Tensor, run: train.Run) -> dict[str, float]:
    """Sum `count_correct` over all processes: number of images, top1 and top5 in per cent."""
    top1, top5, images = run.all_reduce_sum(counts).tolist()
    if not images:
        train.fail("no validation image could be read")
    return dict(images=images, top1=100 * top1 / images, top5=100 * top5 / images)


def best_top1(log: list[dict]) -> float:
    return max((line.get(key, -1.0) for line in log for key in ("top1", "top1_ema")), default=-1.0)


def evaluate_and_keep_the_best(model: nn.Module, average: nn.Module | None, val: data.Samples,
                               run: train.Run) -> dict[str, float]:
    """Evaluate the model and its average; the better is best.pt if it beats all before."""
    models = [model] if average is None else [model, average]
    scores = evaluate(models, val, run)
    best = max(scores, key=lambda score: score["top1"])
    if best["top1"] > best_top1(run.log):
        better = models[scores.index(best)]
        run.save_weights(better, "best.pt", classes=val.source.classes,
                         img_size=run.args.img_size, crop_ratio=run.args.crop_ratio,
                         num_heads=run.args.sizes["num_heads"])
        run.save(draw_predictions(better, val, run), "predictions.png")
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


def classify_by_neighbours(model: Features, known: data.Samples, val: data.Samples,
                           run: train.Run) -> dict[str, float]:
    """`accuracy` of a vote of the k nearest training images, each worth exp(cosine / 0.07).

    Features are first standardised with the training images' mean and deviation, as by the probe's
    BatchNorm. Each process takes its share of the validation images, on its device: ImageNet needs
    64 billion dot products.
    """
    num_classes, k = len(known.source.classes), run.args.neighbours
    known, known_labels = (x.to(run.device) for x in extract(model, known, run))     # (n, D), (n,)
    asked, labels = (x[run.rank :: run.world_size].to(run.device)
                     for x in extract(model, val, run))
    std, mean = torch.std_mean(known, dim=0)
    known, asked = (F.normalize((x - mean) / (std + 1e-6), dim=1) for x in (known, asked))
    counts = torch.zeros(3, dtype=torch.int64, device=run.device)
    for some, wanted in zip(asked.split(128), labels.split(128)):
        similarity, nearest = (some @ known.T).topk(min(k, len(known)), dim=1)       # (b, k) each
        votes = torch.zeros(len(some), num_classes, device=run.device)               # (b, classes)
        votes.scatter_add_(1, known_labels[nearest], (similarity / 0.07).exp())
        counts += count_correct(votes, wanted)
    return accuracy(counts, run)


def extract(model: nn.Module, samples: data.Samples, run: train.Run) -> tuple[Tensor, Tensor]:
    """Outputs (n, D), float32, and labels (n,) of all readable images, on the CPU."""
    batches = []
    for (output,), labels in outputs_of([model.eval()], samples, run):
        output, labels = output.float().cpu(), labels.cpu()
        batches.append((output[labels >= 0], labels[labels >= 0]))
    outputs, labels = map(torch.cat, zip(*run.gather(batches)))
    if not len(labels):
        train.fail("no image could be read")
    return outputs, labels


# --------------------------------------------------------------------------------------------------
# Prediction, and features for other programs


def describe_folder(run: train.Run) -> None:
    """Run a network over all images in a folder.

    --predict writes predictions.csv and a picture of some of them. --features writes features.npz
    with `features`, float32 (n, D), each standardised, and `files`, their n relative paths.
    """
    args = run.args
    folder = args.predict or args.features
    with train.one_line_errors():
        source = data.ImageFolder(folder)
        run.check_out(folder)
        source.labels = np.arange(len(source))  # image numbers, to match outputs with files
        model = build_model(run).to(run.device)
    run.claim_out()
    outputs, indices = extract(model, eval_samples(source, args), run)       # (n, D), (n,)
    indices, order = indices.sort()
    files = [os.path.relpath(source.name(index), folder) for index in indices.tolist()]
    if args.features:
        table = io.BytesIO()
        np.savez(table, features=outputs[order].numpy(), files=np.array(files))
        run.save(table.getvalue(), "features.npz")
        return run.print(f"{len(files)} of {len(source)} images described, centre crops of "
                         f"{args.crop_ratio:g}; {args.out} holds features.npz")

    values, labels = outputs[order].softmax(dim=1).topk(min(3, outputs.shape[1]))    # (n, 3) each
    table = io.StringIO()
    writer = csv.writer(table)
    header = "file class probability second probability_2 third probability_3".split()
    writer.writerow(header[: 1 + 2 * labels.shape[1]])
    for file, *row in zip(files, labels.tolist(), values.tolist()):
        pairs = ((args.classes[label], f"{value:.4f}") for label, value in zip(*row))
        writer.writerow([file, *itertools.chain(*pairs)])
    run.save(table.getvalue().encode(errors="surrogateescape"), "predictions.csv")
    tiles = []
    for n in sorted(random.Random(0).sample(range(len(files)), min(32, len(files)))):
        view, = eval_view(source.open(indices[n]), None, args)
        answer = f"{values[n, 0]:.0%} {args.classes[labels[n, 0]]}"
        tiles.append((view, [answer, os.path.basename(files[n])], "black"))
    run.save(contact_sheet(tiles), "predictions.png")
    run.print(f"{len(files)} of {len(source)} images classified; {args.out} holds predictions.csv "
              "and predictions.png")


@torch.no_grad()
def draw_predictions(model: nn.Module, samples: data.Samples, run: train.Run) -> Image.Image:
    """32 validation images with the model's answers: green where right, red where wrong."""
    classes = samples.source.classes
    order = random.Random(0).sample(range(len(samples)), len(samples))
    readable = (sample for sample in map(samples.__getitem__, order) if sample[1] >= 0)
    images, labels = zip(*itertools.islice(readable, 32))
    with run.autocast():
        logits = model.eval()(to_device(torch.stack(images), run))
    values, answers = logits.float().softmax(dim=1).max(dim=1)
    model.train()
    tiles = []
    for image, label, value, answer in zip(images, labels, values.tolist(), answers.tolist()):
        lines = [f"{value:.0%} {classes[answer]}"]
        if answer != label:
            lines.append(f"is {classes[label]}")
        tiles.append((image, lines, "green" if answer == label else "red"))
    return contact_sheet(tiles)


def contact_sheet(tiles: list[tuple[Tensor, list[str], str]]) -> Image.Image:
    """A picture of tiles, eight a row: image uint8 (3, H, W), up to two lines of text, colour.

    The frame and the first line have the colour.
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
            line = "".join(filter(str.isprintable, line))[:24]  # Pillow can't measure a line break
            while draw.textlength(line, font_size=14) > width - 4:  # not into the next tile
                line = line[:-1]
            draw.text((x, y + side + 5 + 17 * row), line, "black" if row else colour, font_size=14)
    return picture


# --------------------------------------------------------------------------------------------------
# Images and model from the flags


def open_images(args: argparse.Namespace, run: train.Run):
    """Training and validation images, as sources of `data.Samples`; --eval uses only the latter."""
    if args.data:
        folder, *others = (os.path.join(args.data, name) for name in ("train", "val", "test"))
        held_out = next(filter(os.path.isdir, others), None)
        if held_out is None or args.mode != "eval" and not os.path.isdir(folder):
            raise ValueError(f"--data {args.data}: needs train/CLASS/ and val/CLASS/ (or test/), "
                             f"and has no {'train' if held_out else 'val'}/")
        if args.mode == "eval":  # the classes are the classifier's, if it says which
            source = val = data.ImageFolder(held_out, read_file(args.init).get("classes"))
        else:
            run.check_out(folder, held_out)
            source = data.ImageFolder(folder)
            val = data.ImageFolder(held_out, source.classes)
        if len(source.classes) < 2 or min(source.labels.min(), val.labels.min()) < 0:
            raise ValueError(f"--data {args.data}: needs two classes or more, and all images in "
                             "folders of classes, as in train/CLASS/")
        if absent := [name for n, name in enumerate(source.classes) if n not in val.labels]:
            run.print(f"warning: no validation image of: {', '.join(map(repr, absent[:8]))}")
    else:  # validation images have numbers that pretraining never sees
        size = args.img_size or 64
        source = data.Shapes(max(2400, args.labels_per_class * len(data.SHAPES)), size)
        val = data.Shapes(args.num_val, size, start=999_996)  # a multiple of 12
    if args.labels_per_class:
        rng, chosen = random.Random(f"{args.seed} labels"), []
        for label in range(len(source.classes)):
            indices = np.flatnonzero(source.labels == label).tolist()
            chosen += rng.sample(indices, min(args.labels_per_class, len(indices)))
        source = data.Subset(source, sorted(chosen))
    if args.mode in ("finetune", "linear"):
        if args.batch_size > len(source):
            raise ValueError(f"--batch_size {args.batch_size} is more than the {len(source)} "
                             "training images there are: give a smaller one, or --recipe photos")
        run.check_batch()
        if args.mode == "linear" and args.batch_size == run.world_size * args.accum_steps:
            raise ValueError(f"--batch_size {args.batch_size} leaves each process and "
                             "--accum_steps part one image, and the probe's BatchNorm needs two")
    return source, val


def build_model(run: train.Run, num_classes: int | None = None) -> nn.Module:
    """The network that the flags ask for; args gets the sizes that were found in --init.

    num_classes: how many the data has; None takes the file's. ValueError if --init does not fit.
    """
    args = run.args
    torch.manual_seed(args.seed)  # the same weights in every process
    classifies = args.mode in ("eval", "predict")
    new_head = None if classifies else num_classes if args.mode == "finetune" else 0
    drop_path = args.drop_path if args.mode == "finetune" else 0.0  # a frozen encoder drops nothing
    if args.scratch:
        sizes = SIZES[args.model] | dict(img_size=args.img_size, patch_size=args.patch_size)
        sizes["num_heads"] = args.num_heads or sizes["num_heads"]
        model = ViT(**sizes, num_classes=new_head, drop_path=drop_path,
                    branch_init=args.branch_init)
    elif os.path.exists(args.init):
        model = load_vit(args.init, args.img_size, new_head, drop_path, args.teacher,
                         args.num_heads, args.init_pixels, run.print)
    elif run.resumes and args.mode in ("finetune", "linear"):  # the checkpoint has all weights
        model = ViT(**read_file(run.checkpoint)["settings"]["sizes"], num_classes=new_head,
                    drop_path=drop_path)
    else:
        raise ValueError(f"--init: there is no {args.init}; run train.py, name a file, or take "
                         "--scratch for random weights")
    (rows, columns), channels = model.grid, model.sizes["in_chans"]
    if rows != columns or channels != 3:
        raise ValueError(f"{args.init} is for {rows} x {columns} patches of {channels} channels; "
                         "this takes square images in RGB (--img_size makes them square)")
    args.img_size = args.img_size or rows * model.patch_size
    args.sizes = model.sizes | dict(img_size=args.img_size)
    depth = args.depth or len(model.blocks)
    if depth > len(model.blocks):
        raise ValueError(f"--depth {depth}: this network has blocks 1 to {len(model.blocks)}; "
                         "0 takes the last")
    if args.mode == "linear":
        return LinearProbe(model, depth, num_classes)
    if args.mode in ("eval", "predict", "features"):
        content = read_file(args.init)
        usual = content.get("crop_ratio", RECIPES[args.recipe]["crop_ratio"])
        args.crop_ratio = args.crop_ratio or usual
    if args.mode in ("knn", "features"):
        return Features(model, depth)
    if classifies:
        found = getattr(model.head, "out_features", 0)
        if found == 0:
            raise ValueError(f"--{args.mode}: {args.init} is no classifier; give the best.pt that "
                             "fine-tuning wrote")
        if num_classes not in (None, found):
            raise ValueError(f"--eval: {args.init} has a head for {found} classes, and --data has "
                             f"{num_classes}")
        args.classes = content.get("classes") or [str(label) for label in range(found)]
    return model


# --------------------------------------------------------------------------------------------------
# Flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    integer, real = train.integer, train.real
    parser = train.make_parser(__doc__)
    add = parser.add_argument
    add("--data", help="folder with train/ and val/ or test/ (drawn shapes)")
    add("--recipe", choices=RECIPES, help="without it, imagenet with --data, else shapes")
    add_start = parser.add_mutually_exclusive_group().add_argument
    add_start("--init", help="file with weights (output/RECIPE/encoder.pt)")
    add_start("--scratch", action="store_true", help="random weights instead of --init")
    add("--teacher", action="store_true", help="--init: the teacher's weights, not the student's")
    add_mode = parser.add_mutually_exclusive_group().add_argument
    add_mode("--linear", action="store_true", help="train a linear layer on the frozen encoder")
    add_mode("--knn", action="store_true", help="classify by nearest neighbours; no training")
    add_mode("--eval", action="store_true", help="only evaluate the classifier in --init")
    add_mode("--predict", metavar="DIR",
             help="classify all images in a folder with the classifier in --init")
    add_mode("--features", metavar="DIR",
             help="write the features of all images in a folder to features.npz")
    add("--neighbours", type=integer(1), default=20, help="--knn: how many")
    add("--model", choices=SIZES, help="--scratch: size of the network; otherwise the file's")
    add("--patch_size", type=integer(1), help="--scratch: side of a patch; otherwise the file's")
    add("--img_size", type=integer(1), help="side of the square input; without it, the file's")
    add("--branch_init", type=real(0), help="--scratch: initial scale of residual branches")
    add("--depth", type=integer(0),
        help="--linear, --knn, --features: use the output of this block, from 1 (0: the last)")
    add_rate = parser.add_mutually_exclusive_group().add_argument
    add_rate("--lr", type=real(0), help="peak learning rate, whatever the --batch_size")
    add_rate("--base_lr", type=real(0), help="learning rate for 256 images, in place of --lr")
    add("--layer_decay", type=real(0.001, 1), help="learning rate of a block, over the next one's")
    add("--drop_path", type=real(0, 0.99), help="chance to skip a branch, in the last block")
    add("--rand_augment", type=real(0, 10), help="magnitude (0: off)")
    add("--erasing", type=real(0, 1), help="probability of random erasing")
    add("--mixup", type=real(0), help="alpha of mixup (0: off)")
    add("--cutmix", type=real(0), help="alpha of CutMix (0: off)")
    add("--smoothing", type=real(0, 1), help="label smoothing")
    add("--model_ema", type=real(0, 0.9999999), help="momentum of the averaged model (0: none)")
    add("--labels_per_class", type=integer(0), help="training images of each class (0: all)")
    add("--crop_ratio", type=real(0.05, 1),
        help="evaluation: the centre crop's share of the short side; without it, the classifier's")
    add("--num_val", type=integer(1), default=1200, help="how many built-in validation images")
    add("--eval_every", type=integer(1), default=1, help="epochs between evaluations")
    given = parser.parse_args(argv)
    if given.predict or given.features:
        given.recipe = given.recipe or "imagenet"  # for its crop, if the file has none
    args = train.fill_in(given, PROBES if given.linear else RECIPES)

    modes = "linear", "knn", "eval", "predict", "features"
    args.mode = next((mode for mode in modes if getattr(args, mode)), "finetune")
    if given.lr is not None or given.base_lr is not None:  # not the recipe's kind of rate beside it
        args.lr, args.base_lr = given.lr or 0.0, given.base_lr or 0.0
    if args.scratch and (args.teacher or args.mode in ("eval", "predict", "features")):
        train.fail("--scratch starts from random weights: leave out --teacher, --eval, --predict "
                   "and --features")
    if not args.scratch:
        args.init = args.init or os.path.join("output", args.recipe, "encoder.pt")
        if given.model or given.patch_size or given.branch_init is not None:
            train.fail("--model, --patch_size and --branch_init are for --scratch: with --init the "
                       f"file decides ({args.init})")
        args.model = args.patch_size = args.branch_init = None
        args.img_size = given.img_size
    if args.mode in ("eval", "predict", "features"):
        args.crop_ratio = given.crop_ratio  # None: what the classifier was trained with
    if given.depth is not None and args.mode not in ("linear", "knn", "features"):
        train.fail(f"--depth {args.depth}: only --linear, --knn and --features cut the encoder")
    if args.mode == "linear" and args.model_ema:
        train.fail("--model_ema: a linear probe has no moving average; leave it out")
    name = args.recipe + ("_scratch" if args.scratch else "")
    if args.mode in ("predict", "features"):  # named after the folder of --init
        name = os.path.basename(os.path.dirname(os.path.abspath(args.init)))
    args.out = args.out or os.path.join("output", f"{name}_{args.mode}")
    return args


if __name__ == "__main__":
    train.launch(main, parse_args())
