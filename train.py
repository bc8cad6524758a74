"""Pretrain BootMAE.

    python train.py                                           built-in images, no GPU, a few minutes
    python train.py --data imagenet/train --accum_steps 16    one GPU
    torchrun --nproc_per_node=8 train.py --data imagenet/train --accum_steps 2

Run the same command again and it goes on where it was. `--batch_size` counts the images of one optimizer step over all
processes and accumulation steps, so a recipe means the same on any number of GPUs.
"""
import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from types import SimpleNamespace

# ----------------------------------------------------------------------------------------------------------------------
# Recipes: each value can be overridden by the flag of the same name.

IMAGENET = dict(
    model="base", img_size=224, patch_size=16, decoder_dim=512, decoder_depth=2,
    mask="block", mask_ratio=0.75, inject=(1, -1), feature_target=1, weighted_loss=1,
    epochs=800, batch_size=4096, base_lr=1.5e-4, min_lr=1e-4, warmup_epochs=40, weight_decay=0.05, betas=(0.9, 0.95),
    feature_ramp=0.25, momentum=(0.999, 0.9999, 0.99999), crop_scale=(0.2, 1.0), num_images=0,
)
RECIPES = {
    "shapes": IMAGENET | dict(
        model="nano", img_size=64, patch_size=8, decoder_dim=64, decoder_depth=1, mask="random", mask_ratio=0.6,
        epochs=15, batch_size=16, base_lr=16e-3, min_lr=0.0, warmup_epochs=1, crop_scale=(0.6, 1.0), num_images=2400,
        momentum=(0.9, 0.97, 0.99), feature_ramp=1.0,  # in so few steps the teacher has to follow fast, and learns late
    ),
    "imagenet": IMAGENET,
    "imagenet_large": IMAGENET | dict(model="large", min_lr=1e-5, momentum=(0.999, 0.9999, 0.9999)),
    "cifar10": IMAGENET | dict(
        model="small", img_size=32, patch_size=4, decoder_dim=192,
        epochs=300, batch_size=512, base_lr=5e-4, min_lr=0.0, warmup_epochs=10, momentum=(0.99, 0.996, 0.999),
    ),
}
HELP = dict(
    model="size of the encoder: nano, tiny, small, base or large (model.py's SIZES)",
    img_size="side of the square input", patch_size="side of a patch",
    decoder_dim="width of the pixel regressor", decoder_depth="blocks in each decoder",
    mask="block-wise or random masks: block, random", mask_ratio="fraction of the patches that is masked",
    inject="encoder blocks injected into regressor and predictor: -1 is the last, 0 is none",
    feature_target="0: no teacher and no feature predictor", weighted_loss="0: masked patches all weigh the same",
    epochs="length of the run", batch_size="images a step, over all processes and --accum_steps",
    base_lr="learning rate for 256 images; it scales with --batch_size",
    min_lr="learning rate at the end, or the peak if that is lower",
    warmup_epochs="linear warm-up from 0", weight_decay="not on biases, norms and CLS token", betas="of AdamW",
    feature_ramp="fraction of training over which the weight of feature_loss rises to 1",
    momentum="of the teacher at the start, at 1/8 and from 1/2 of training", crop_scale="area of a random crop",
    num_images="how many built-in images, or the most to use of a folder (0: all)",
)
FIXED = (  # what a resumed run may not change
    "model", "img_size", "patch_size", "decoder_dim", "decoder_depth", "mask", "mask_ratio", "inject", "feature_target",
    "weighted_loss", "seed",
)

RANGES = dict(  # of all flags that are numbers, here and in finetune.py; NaN is in none
    img_size=(1, 1e5), patch_size=(1, 1e4), decoder_dim=(4, 1e5), decoder_depth=(1, 100), mask_ratio=(0, 1),
    feature_target=(0, 1), weighted_loss=(0, 1), feature_ramp=(0, 1), momentum=(0, 1), crop_scale=(1e-6, 1),
    crop_ratio=(0.05, 1), epochs=(1, 1e9), warmup_epochs=(0, 1e9), batch_size=(1, 1e9), accum_steps=(1, 1e9),
    lr=(0, 1e30), base_lr=(0, 1e30), min_lr=(0, 1e30), weight_decay=(0, 1e9), betas=(0, 0.9999999),
    layer_decay=(1e-3, 1), drop_path=(0, 0.99),
    mixup=(0, 1e3), cutmix=(0, 1e3), smoothing=(0, 1), rand_augment=(0, 10), erasing=(0, 1),
    model_ema=(0, 0.9999999), labels_per_class=(0, 1e9), num_images=(0, 1e9), num_val=(1, 1e9), neighbours=(1, 1e9),
    depth=(0, 1e3), save_every=(1, 1e9), log_every=(1, 1e9), picture_every=(1, 1e9), eval_every=(1, 1e9),
    workers=(0, 1e3), seed=(0, 2**40),
)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        fail(message)


def fail(message: str, code: int = 2, everywhere: bool = False):
    """End with a line on stderr. Code 2: a call that can't work, 1: something went wrong. One process of each machine
    speaks for all, unless `everywhere`: what happens to one alone."""
    if everywhere or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def add_recipe_flags(parser: argparse.ArgumentParser, recipes: dict[str, dict], helps: dict[str, str]) -> None:
    for name, value in recipes["imagenet"].items():
        first, count = (value[0], len(value)) if isinstance(value, tuple) else (value, None)
        parser.add_argument(f"--{name}", type=type(first), nargs=count, help=f"{helps[name]} (for ImageNet: {value})")


def apply_recipe(args: argparse.Namespace, recipes: dict[str, dict]) -> argparse.Namespace:
    """Fill in the recipe's value wherever no flag was given."""
    for name, value in recipes[args.recipe].items():
        given = getattr(args, name)
        setattr(args, name, value if given is None else tuple(given) if isinstance(value, tuple) else given)
    return args


def check_ranges(args: argparse.Namespace) -> argparse.Namespace:
    """Exit, naming the flag, if a number is out of its range."""
    for name, value in vars(args).items():
        low, high = RANGES.get(name, (None, None))
        for number in value if isinstance(value, tuple) else (value,):
            if low is not None and number is not None and not low <= number <= high:
                fail(f"--{name} {number}: must be {low:g} to {high:g}")
    if args.warmup_epochs > args.epochs:
        fail(f"--warmup_epochs {args.warmup_epochs} is more than --epochs {args.epochs}: give fewer")
    if args.crop_scale[0] > args.crop_scale[1]:
        fail(f"--crop_scale {args.crop_scale[0]} {args.crop_scale[1]}: the smaller one comes first")
    if args.data == "":
        fail("--data is empty: name a folder, or leave it out for the built-in images")
    return args


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", help="folder for everything that is written (default: below output/)")
    parser.add_argument("--fresh", action="store_true", help="start over, even where there is a checkpoint")
    parser.add_argument("--accum_steps", type=int, default=1, help="cut a batch into this many, to save memory")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, crops and masks")
    parser.add_argument("--workers", type=int, help="processes that load images, for each process that trains "
                        "(default: with a GPU the cores there are for each, at most 16; else 1)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: off on a CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--save_every", type=int, default=1, help="epochs between checkpoints")
    parser.add_argument("--log_every", type=int, default=20, help="steps between looks at the losses")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of images, nested or flat (default: built-in images)")
    parser.add_argument("--recipe", choices=RECIPES, help="default: imagenet with --data, else shapes")
    parser.add_argument("--benchmark", action="store_true", help="time steps and loading, print a table, train nothing")
    parser.add_argument("--picture_every", type=int, default=5, help="epochs between pictures")
    add_common_flags(parser)
    add_recipe_flags(parser, RECIPES, HELP)
    args = parser.parse_args(argv)
    args.recipe = args.recipe or ("imagenet" if args.data else "shapes")
    args.out = args.out or os.path.join("output", args.recipe)
    return check_ranges(apply_recipe(args, RECIPES))


if __name__ == "__main__":
    args = parse_args()  # before torch is imported, so that --help and a typo answer at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.rendezvous import rendezvous  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
from masking import block_mask, random_mask  # noqa: E402
from model import SIZES, BootMAE, patchify, unpatchify  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
# Set-up, shared with finetune.py: processes, precision, loading, saving, stopping


def setup(args: argparse.Namespace) -> SimpleNamespace:
    """Read torchrun's environment, check the flags that every run has, choose device and precision.

    Returns rank, world_size, local_rank, device, dtype (of autocast; None: off) and is_main.
    """
    env = SimpleNamespace(
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
    )
    env.is_main = env.rank == 0
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device can be used here; --device cpu runs without one")
    cuda = torch.cuda.is_available() and args.device != "cpu"
    if cuda and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        fail(f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of this machine")
    if args.batch_size % (env.world_size * args.accum_steps):
        fail(f"--batch_size {args.batch_size} is not divisible by {env.world_size} processes x --accum_steps "
             f"{args.accum_steps}")
    if args.workers is None:  # on a CPU the model needs the cores itself
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = min(16, len(os.sched_getaffinity(0)) // local) if cuda else 1

    env.device = torch.device("cuda", env.local_rank) if cuda else torch.device("cpu")
    amp = args.amp
    if amp == "auto":
        amp = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if cuda else "off"
    env.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if cuda:
        torch.cuda.set_device(env.device)
        torch.set_float32_matmul_precision("high")
    return env


def start_processes(env: SimpleNamespace) -> None:
    """Join the other processes that torchrun started; gloo beside nccl carries the flags that live on the CPU."""
    if env.world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if env.device.type == "cuda" else "gloo"
        store, rank, world_size = next(rendezvous("env://"))
        # After `torchrun --max_restarts` brought a killed process back (on one machine: others count restarts for
        # themselves), the store still has the addresses of the dead.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def check_agreement(step: int, args: argparse.Namespace, env: SimpleNamespace) -> None:
    """Processes that found different checkpoints would wait for one another for ever."""
    if env.world_size > 1:
        steps = [None] * env.world_size
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            fail(f"--out {args.out}: processes found checkpoints of different steps {sorted(set(steps))}; it must be a "
                 "folder that all machines share")


def total(x: Tensor, env: SimpleNamespace) -> Tensor:
    """Sum of a tensor over the processes; the same on each."""
    if env.world_size > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def make_loader(samples: data.Samples, batches, args: argparse.Namespace, env: SimpleNamespace):
    return torch.utils.data.DataLoader(
        samples, batch_sampler=batches, num_workers=args.workers, pin_memory=env.device.type == "cuda",
        worker_init_fn=_ignore_signals,
    )


def _ignore_signals(worker: int) -> None:
    """A Ctrl-C reaches the workers too, but it is the training process that decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


class StopRequest:
    """Turns SIGTERM (a cluster's preemption) and SIGINT (Ctrl-C) into a flag; a second one ends the process at once."""

    def __init__(self, env: SimpleNamespace):
        self.env, self.signal = env, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember)

    def remember(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> int:
        """The signal that any process has received, else 0. All must ask together. On the CPU: no GPU sync."""
        if self.env.world_size > 1:
            flag = torch.tensor(self.signal)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.signal = int(flag)
        return self.signal


def save(content, path: str) -> None:
    """Write a file whole or not at all: beside it, flushed to disk, renamed. Bytes, or whatever torch.save takes."""
    try:
        with open(path + ".tmp", "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:  # torch's writer hides a full disk in a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        fail(f"could not save {path} ({error.__context__ or error}); what was saved before is whole", code=1)


def save_log(log: list[dict], out: str) -> None:
    save("".join(json.dumps(line) + "\n" for line in log).encode(), os.path.join(out, "log.jsonl"))


def save_picture(picture: Image.Image, path: str) -> None:
    file = io.BytesIO()
    picture.save(file, "png")
    save(file.getvalue(), path)


def load(path: str) -> dict:
    """Read a file of tensors and plain values. A file that holds anything else, code for one, is refused unread."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the authors' files hold their arguments
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except OSError as error:
        fail(f"can't read {path}: {error.strerror or error}")
    except Exception as error:  # torch.load has a kind for each way in which a file can be bad
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        fail(f"{path} is damaged or not a plain file of tensors, and was left as it is ({reason})")


def cosine_lr(progress: float, warmup: float, peak: float, end: float) -> float:
    """Learning rate at `progress` (0 .. 1 of training): linear from 0 to `peak` at `warmup`, then cosine to `end`.

    `end` does not grow with the batch as `peak` does; where a small batch puts the peak below it, the peak stays.
    """
    if progress < warmup:
        return peak * progress / warmup
    end = min(end, peak)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: matrices and mask tokens decay; biases, norms and the CLS token do not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim == 1 or name.endswith("cls_token")]
    decayed = [p for name, p in named if not (p.ndim == 1 or name.endswith("cls_token"))]
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]


def read_checkpoint(path: str, config: dict, fixed: tuple[str, ...], steps_per_epoch: int) -> dict:
    """Load a checkpoint to go on from, after making sure that it belongs to this run: `fixed` names what must agree.

    Other settings may change, as the length of the run; each that did is printed.
    """
    checkpoint = load(path)
    if not {"config", "step", "steps_per_epoch", "log"} <= checkpoint.keys():
        fail(f"{path} is no checkpoint of a run; another --out leaves it alone, --fresh replaces it")
    before = checkpoint["config"]
    before = {name: before.get(name) for name in config if before.get(name) != config[name]}
    if wrong := [f"--{name} {value}" for name, value in before.items() if name in fixed]:
        fail(f"{path} was trained with {', '.join(wrong)}: give the same, or another --out, or --fresh to start over")
    if checkpoint["steps_per_epoch"] != steps_per_epoch:
        fail(f"{path} had {checkpoint['steps_per_epoch']} steps an epoch, not {steps_per_epoch}: give the same "
             "data and --batch_size, or another --out, or --fresh to start over")
    if before and int(os.environ.get("RANK", 0)) == 0:
        print("changed:", ", ".join(f"--{name} {config[name]} (was {value})" for name, value in before.items()))
    return checkpoint


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Take over the moments, but not the settings: those are this call's."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings):
        group |= own


def check_weights(model: torch.nn.Module, what: str, path: str) -> None:
    """End the run rather than save weights that are not finite over good ones."""
    norms = torch.stack(torch._foreach_norm(list(model.parameters())))
    if not norms.isfinite().all():
        fail(f"weights are no longer finite: {what}; nothing was saved over {path}. {CURE}", code=1)


CURE = "A lower learning rate, a longer warm-up or --amp bf16 may help"


def wrap(model: torch.nn.Module, args: argparse.Namespace, env: SimpleNamespace) -> torch.nn.Module:
    """The model as it is called in training: distributed, compiled, or neither. Its parameters stay `model`'s own."""
    if env.world_size > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for broadcast_buffers
            # No device_ids: with them it moves the mask to the GPU, and BootMAE.split waits for the GPU to check it.
            model = torch.nn.parallel.DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True
            )
    return torch.compile(model) if args.compile else model


def make_out(args: argparse.Namespace, config: dict) -> None:
    """Create the output folder; only called when nothing else can be wrong with the call."""
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror}")
    save(json.dumps(config, indent=1).encode(), os.path.join(args.out, "config.json"))
    print(json.dumps(config))


def run(main: Callable, args: argparse.Namespace) -> None:
    """Call main(args), and leave in a way that can't hang."""
    code = 1
    try:
        try:
            main(args)
            code = 0
        except torch.OutOfMemoryError:
            cure = f"--accum_steps {2 * args.accum_steps} halves the images held at a time"
            fail(f"out of GPU memory: {cure}", code=1, everywhere=True)
    except SystemExit as end:
        code = end.code
        raise
    except Exception as error:
        traceback.print_exc()
        if "Connection" in str(error):  # its own message, or torchrun's, says why
            print("another process has ended, so this one can't go on", file=sys.stderr)
        raise SystemExit(code) from None
    finally:
        # DistributedDataParallel's destructor holds Python's lock while it waits for a gloo thread that may want it
        # (torch 2.13), and a peer that has failed may be waited for in vain. So processes leave without destructors.
        if dist.is_initialized():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def name_broken(broken: Tensor, samples: data.Samples) -> int:
    """Warn of each unreadable file in a batch, once a run; returns how many samples of the batch it cost."""
    found = broken[broken >= 0].tolist()
    for index in set(found) - samples.broken:
        name = samples.source.name(index)
        tqdm.write(f"warning: can't read {name!r}", file=sys.stderr)
    samples.broken.update(found)
    return len(found)


def check_broken(count: float, samples: data.Samples) -> None:
    """End the run if `count` samples of this epoch, over all processes, are more than 1 % of the images."""
    if count > 0.01 * len(samples):
        examples = ", ".join(repr(samples.source.name(index)) for index in sorted(samples.broken)[:3])
        fail(f"{count:.0f} of {len(samples)} images can't be read, more than 1 %, for example {examples}", code=1)


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


def pretrain_mask(batch: int, generator: torch.Generator, args: argparse.Namespace, grid: tuple[int, int]) -> Tensor:
    """Masks of the kind and ratio that the flags ask for: bool (batch, N)."""
    num_patches = math.prod(grid)
    if args.mask == "block":
        return block_mask(batch, grid, round(args.mask_ratio * num_patches), generator)
    return random_mask(batch, num_patches, round(args.mask_ratio * num_patches), generator)


def pretrain_sample(image: Image.Image, rng: random.Random, args: argparse.Namespace, grid: tuple[int, int]) -> tuple:
    """One image's view and mask: uint8 (3, H, W), bool (N,)."""
    image = data.flip(data.random_resized_crop(image, args.img_size, rng, args.crop_scale), rng)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    return data.to_tensor(image), pretrain_mask(1, generator, args, grid)[0]


def schedules(progress: float, epoch: int, args: argparse.Namespace) -> tuple[float, float, float]:
    """Learning rate, weight of feature_loss (lambda) and teacher momentum at `progress` (0 .. 1 of training)."""
    lr = cosine_lr(progress, args.warmup_epochs / args.epochs, args.base_lr * args.batch_size / 256, args.min_lr)
    feature_weight = min(1.0, (epoch + 1) / (args.feature_ramp * args.epochs)) if args.feature_ramp else 1.0
    momentum = float(np.interp(progress, (0, 1 / 8, 1 / 2), args.momentum))
    return lr, feature_weight, momentum


@torch.no_grad()
def draw_progress(model: BootMAE, images: Tensor, mask: Tensor, path: str) -> None:
    """Save a PNG that shows of each image: original, masked, reconstruction, teacher features as colours.

    images: float (B, 3, H, W) in [-1, 1]; mask: bool (B, N). Predicted patches get the true patch's mean and standard
    deviation back; visible ones are pasted in. The colours are the first three principal components over all images of
    what the teacher says, less what it says on average at that place: it knows places best.
    """
    model.eval()
    out = model(images, mask)
    model.train()
    p, grid = model.patch_size, model.grid
    patches, hidden = patchify(images, p), mask.to(images.device)[:, :, None]                # (B, N, 3*p*p), (B, N, 1)
    variance, mean = torch.var_mean(patches.unflatten(2, (3, -1)), dim=3, correction=0, keepdim=True)
    filled = (out.pixels.unflatten(2, (3, -1)) * (variance + 1e-5).sqrt() + mean).flatten(2)
    columns = [patches, patches.masked_fill(hidden, 0.5), torch.where(hidden, filled, patches)]
    columns = [unpatchify(column, p, grid).clamp(-1, 1) for column in columns]               # (B, 3, H, W) each
    titles = ["original", "masked", "reconstruction"]
    if model.teacher is not None:
        features = model.teacher.encode(patches)[0][:, 1:].float()                           # (B, N, D)
        features = (features - features.mean(dim=0)).flatten(0, 1)                           # (B*N, D)
        _, axes = torch.linalg.eigh(features.T @ features)                                   # eigenvalues rise
        axes = axes[:, -3:].flip(1)                                                          # (D, 3)
        colours = features @ (axes * axes.sum(dim=0).sign())                                 # (B*N, 3), sign fixed
        colours = (colours / (2 * colours.std(dim=0) + 1e-6)).clamp(-1, 1)
        maps = colours.unflatten(0, (len(images), *grid)).permute(0, 3, 1, 2)                # (B, 3, rows, columns)
        columns.append(torch.nn.functional.interpolate(maps, images.shape[2:]))
        titles.append("teacher features")

    zoom = max(1, 128 // images.shape[3])
    table = torch.stack(columns, dim=1).add(1).mul(127.5).round().byte().cpu()               # (B, 4, 3, H, W)
    table = torch.nn.functional.pad(table, (1, 1, 1, 1), value=255)
    if len(images) % 2 == 0:  # two images a row
        table, titles = table.unflatten(0, (-1, 2)).flatten(1, 2), titles * 2                # (B/2, 8, 3, H, W)
    table = table.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()                 # (B/2*H, 8*W, 3)
    table = Image.fromarray(table).resize((table.shape[1] * zoom, table.shape[0] * zoom), Image.Resampling.NEAREST)
    picture = Image.new("RGB", (table.width, table.height + 16), "white")
    picture.paste(table, (0, 16))
    for column, title in enumerate(titles):
        ImageDraw.Draw(picture).text((column * table.width // len(titles) + 4, 2), title, fill="black")
    save_picture(picture, path)


def benchmark(model: BootMAE, network: torch.nn.Module, optimizer, scaler, samples: data.Samples, args, env) -> None:
    """Time training steps on random images, and the loading of real ones; print where the time goes.

    GPU times are by events, CPU times by the clock; each figure is the median of ten steps, after three to warm up.
    """
    cuda, batch = env.device.type == "cuda", args.batch_size // (env.world_size * args.accum_steps)
    images = torch.rand(batch, 3, args.img_size, args.img_size, device=env.device) * 2 - 1
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
        return [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in itertools.pairwise(marks)]

    times = []
    for _ in range(13):
        with torch.autocast(env.device.type, env.dtype, enabled=env.dtype is not None):
            marks = [clock()]
            with torch.no_grad():
                if model.teacher is not None:
                    model.teacher.encode(patchify(images, args.patch_size))  # once more, on its own, to see its share
            marks.append(clock())
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
    teacher, forward, backward, update = np.median(times[3:], axis=0)
    step = forward + backward + update

    tokens, width = batch * (1 + math.prod(model.grid)), SIZES[args.model]["embed_dim"]  # of the teacher's MLP
    a = torch.randn(tokens, width, device=env.device, dtype=env.dtype)
    b = torch.randn(width, 4 * width, device=env.device, dtype=env.dtype)
    marks = [clock()]
    for _ in range(23):
        a @ b
        marks.append(clock())
    matmul = 2 * a.numel() * 4 * width / np.median(milliseconds(marks)[3:]) / 1e9         # TFLOP/s

    twin = copy.deepcopy(model).to("meta")  # counts the operations of one image without doing them
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = twin(images[:1].to("meta"), mask[:1])
        (out.pixel_loss + out.feature_loss).backward()
    gflop = counter.get_total_flops() / 1e9
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else resident

    name = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    torch.set_num_threads(1)  # as a worker has it
    began, loaded = time.time(), 0
    while time.time() - began < 2:
        samples[loaded]
        loaded += 1
    loading = loaded / (time.time() - began)

    if env.is_main:
        speed = 1e3 * batch * env.world_size / step
        achieved = gflop * batch / step
        print(f"{args.recipe} ({args.model}), batch {batch} a process, {env.world_size} x {name}, "
              f"{env.dtype or torch.float32}{', compiled' if args.compile else ''}")
        for label, value in (
            ("images/s", f"{speed:.4g}"),
            (f"hours of {args.epochs} x {len(samples)} images", f"{args.epochs * len(samples) / speed / 3600:.3g}"),
            ("ms a step", f"{step:.4g}"),
            ("  teacher forward", f"{teacher:.4g}"),
            ("  student forward and losses", f"{forward - teacher:.4g}"),
            ("  backward", f"{backward:.4g}"),
            ("  optimizer and teacher update", f"{update:.4g}"),
            ("GFLOP an image", f"{gflop:.4g}"),
            ("TFLOP/s a process", f"{achieved:.4g}"),
            ("  share of a matrix product's", f"{100 * achieved / matmul:.3g} % of {matmul:.4g}"),
            ("peak memory a process, GiB", f"{peak:.3g}"),
            ("images/s a loading worker", f"{loading:.4g}"),
            ("  workers a process to keep up", f"{math.ceil(speed / env.world_size / loading)}"),
        ):
            print(f"{label:34}{value}")


def main(args: argparse.Namespace) -> None:
    # ---- checks, before anything is written or any process waits for another
    env = setup(args)
    torch.manual_seed(args.seed)  # the same weights in every process
    try:
        if args.model not in SIZES:
            raise ValueError(f"--model {args.model}: choose one of {', '.join(SIZES)}")
        if args.mask not in ("block", "random"):
            raise ValueError(f"--mask {args.mask}: choose block or random")
        model = BootMAE(
            args.img_size, args.patch_size, **SIZES[args.model], decoder_dim=args.decoder_dim,
            decoder_depth=args.decoder_depth, inject=args.inject, feature_target=bool(args.feature_target),
            weighted_loss=bool(args.weighted_loss),
        )
        num_patches = math.prod(model.grid)
        if not 0.5 / num_patches < args.mask_ratio < 1 - 0.5 / num_patches:
            raise ValueError(f"--mask_ratio {args.mask_ratio}: of {num_patches} patches at least one must be masked "
                             "and one visible")
        if not args.data and not args.num_images and not args.benchmark:
            raise ValueError("--num_images 0: give --data DIR, or say how many built-in images to draw")
        source = data.ImageFolder(args.data) if args.data else data.Shapes(args.num_images or 100, args.img_size)
        if args.data and 0 < args.num_images < len(source):
            source = data.Subset(source, random.Random(args.seed).sample(range(len(source)), args.num_images))
        if len(source) < args.batch_size and not args.benchmark:
            raise ValueError(f"--batch_size {args.batch_size} is more than the {len(source)} images there are")
    except OSError as error:
        fail(f"--data: can't read {error.filename}: {error.strerror}")
    except ValueError as error:
        fail(str(error))

    # ---- data
    samples = data.Samples(source, functools.partial(pretrain_sample, args=args, grid=model.grid), args.seed)
    steps_per_epoch = len(source) // args.batch_size
    total_steps = args.epochs * steps_per_epoch

    # ---- model and optimizer
    model.to(env.device)
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), betas=args.betas, fused=True)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype is torch.float16)

    if args.benchmark:
        start_processes(env)
        return benchmark(model, wrap(model, args, env), optimizer, scaler, samples, args, env)

    # ---- resume
    checkpoint_path = os.path.join(args.out, "checkpoint.pt")
    config = {name: value for name, value in vars(args).items() if name not in ("fresh", "workers", "benchmark")}
    # Sums over this epoch so far: pixel_loss, feature_loss, steps with finite losses, broken samples
    step, log, sums = 0, [], torch.zeros(4, dtype=torch.float64, device=env.device)
    if os.path.exists(checkpoint_path) and not args.fresh:
        checkpoint = read_checkpoint(checkpoint_path, config, FIXED, steps_per_epoch)
        model.load_state_dict(checkpoint["model"])
        load_optimizer(optimizer, checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty unless that was fp16
            scaler.load_state_dict(checkpoint["scaler"])
        step, log = checkpoint["step"], checkpoint["log"]
        if env.is_main:
            sums += checkpoint["sums"].to(env.device)
            print(f"going on from {checkpoint_path}, epoch {step // steps_per_epoch} of {args.epochs}, step {step}")
            if step >= total_steps:
                print("this run is finished; --fresh starts it over, more --epochs make it longer")
        del checkpoint  # gigabytes in every process

    # ---- processes
    start_processes(env)
    check_agreement(step, args, env)
    if env.is_main:
        print(f"{args.recipe}: {len(source)} images, {total_steps} steps, {env.world_size} x {env.device.type}, "
              f"{env.dtype or torch.float32}")
        if step < total_steps:
            make_out(args, config)
    network = wrap(model, args, env)
    batches = data.Batches(len(source), args.batch_size, args.epochs, args.seed, step, args.accum_steps, env.rank,
                           env.world_size)
    stream = iter(make_loader(samples, batches, args, env)) if step < total_steps else None
    stop = StopRequest(env)
    recent = torch.zeros((), device=env.device)  # steps with finite losses since the last look
    gallery = [samples[index] for index in range(min(8, len(source)))]
    gallery_images = data.scale_pixels(torch.stack([sample[0] for sample in gallery])).to(env.device)
    gallery_mask = torch.stack([sample[1] for sample in gallery])

    def save_checkpoint() -> None:
        """Rank 0 writes; all must call. Weights that are not finite are never saved over good ones."""
        reduced = total(sums, env)
        check_weights(model, f"step {step}, lr {lr:.2e}", checkpoint_path)
        if env.is_main:
            save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step,
                      steps_per_epoch=steps_per_epoch, sums=reduced.cpu(), log=log, config=config), checkpoint_path)
            save(model.encoder.state_dict(), os.path.join(args.out, "encoder.pt"))

    # ---- training
    model.train()
    while step < total_steps:
        epoch, began, began_step = step // steps_per_epoch, time.time(), step
        bar = tqdm(range(step % steps_per_epoch, steps_per_epoch), desc=f"epoch {epoch + 1}/{args.epochs}", leave=False,
                   initial=step % steps_per_epoch, total=steps_per_epoch, disable=None if env.is_main else True)
        for _ in bar:
            lr, feature_weight, momentum = schedules(step / total_steps, epoch, args)
            for group in optimizer.param_groups:
                group["lr"] = lr

            row = torch.zeros_like(sums)
            for part in range(args.accum_steps):
                images, mask, _, broken = next(stream)
                if count := name_broken(broken, samples):
                    sums[3] += count
                images = data.scale_pixels(images.to(env.device, non_blocking=True))
                last = part == args.accum_steps - 1  # gradients travel between processes only then
                with contextlib.nullcontext() if last or env.world_size == 1 else network.no_sync():
                    with torch.autocast(env.device.type, env.dtype, enabled=env.dtype is not None):
                        out = network(images, mask)
                        loss = out.pixel_loss + feature_weight * out.feature_loss
                    scaler.scale(loss / args.accum_steps).backward()
                row[:2] += torch.stack([out.pixel_loss, out.feature_loss]).detach() / args.accum_steps
                del out, loss  # and with them what the decoders made, before the next part makes it anew
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            model.update_teacher(momentum)

            # Losses are summed on the device and looked at seldom. One that overflowed is left out of the mean.
            row[2] = row.isfinite().all()
            sums += row.nan_to_num(0, 0, 0) * row[2]
            recent += row[2]
            step += 1
            if step == 1 or step % args.log_every == 0:
                pixel_loss, feature_loss, finite, broken_count = total(sums, env).tolist()
                if step > 1 and total(recent, env).item() == 0:
                    fail(f"no finite loss in the last {args.log_every} steps, up to {step}: pixel_loss "
                         f"{row[0].item()}, feature_loss {row[1].item()}, lr {lr:.2e}; nothing was saved over "
                         f"{checkpoint_path}. {CURE}", code=1)
                recent.zero_()
                check_broken(broken_count, samples)
                pixel_loss, feature_loss = pixel_loss / max(finite, 1), feature_loss / max(finite, 1)
                if step == 1 and env.is_main:
                    tqdm.write(f"first step  pixel_loss {pixel_loss:.4g}  feature_loss {feature_loss:.4g}")
                bar.set_postfix_str(f"pixel {pixel_loss:.4f} feature {feature_loss:.4f} lr {lr:.1e}")
            if stop.agreed():
                bar.close()
                save_checkpoint()
                fail(f"stopped by {signal.Signals(stop.signal).name} after step {step}; {checkpoint_path} holds it, "
                     "the same command goes on", code=128 + stop.signal)

        # ---- end of an epoch
        pixel_loss, feature_loss, finite, broken_count = total(sums, env).tolist()
        speed = (step - began_step) * args.batch_size / (time.time() - began)
        check_broken(broken_count, samples)
        check_weights(model, f"step {step}, lr {lr:.2e}", checkpoint_path)
        bar.close()
        log.append(dict(
            epoch=epoch + 1, pixel_loss=pixel_loss / max(finite, 1), feature_loss=feature_loss / max(finite, 1), lr=lr,
            momentum=momentum, feature_weight=feature_weight, images_per_s=speed, broken=int(broken_count),
        ))
        sums.zero_()
        finished = step == total_steps
        if finished or (epoch + 1) % args.save_every == 0:
            save_checkpoint()
        if env.is_main:
            save_log(log, args.out)
            print("  ".join(f"{name} {value:.5g}" for name, value in log[-1].items()), flush=True)
            if finished or (epoch + 1) % args.picture_every == 0:
                draw_progress(model, gallery_images, gallery_mask, os.path.join(args.out, f"epoch_{epoch + 1:04d}.png"))
    if env.is_main:
        print(f"done: {args.out} holds encoder.pt, checkpoint.pt, log.jsonl and pictures")


if __name__ == "__main__":
    run(main, args)
