"""Images: folders of any kind, the built-in shapes, and augmentation.

Images stay uint8 until they are on the device. Everything random about a sample depends on (seed,
epoch, index) alone, so the numbers of workers and processes do not change the samples (mixup and
erasing work on batches). Needs only torch, numpy and pillow.
"""
import contextlib
import errno
import hashlib
import math
import os
import random
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from PIL.ExifTags import Base as Tag  # of TIFF, too
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# Folders

EXTENSIONS = tuple(".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())


def _digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


class ImageFolder:
    """Every image below `root`, in sorted order. The folders directly below `root` are its classes.

    classes: their names, sorted, or those given, so that a validation set numbers them alike.
    labels: int64 (number of images,), -1 for an image directly in `root`.
    fingerprint: a str that changes with the images' names, classes or sizes (of up to 1,000 of
    them), but not with `root`.
    Raises ValueError without an image, or if `classes` lacks a class; OSError if reading fails.
    """

    def __init__(self, root: str, classes: list[str] | None = None):
        self.root = os.fspath(root)
        paths = sorted(_walk(self.root))
        if not paths:
            raise ValueError(f"no images found in {self.root!r}: looked for {' '.join(EXTENSIONS)}")
        tops = [os.path.dirname(path).split(os.sep)[0] for path in paths]  # "" directly in `root`
        names = set(tops) - {""}
        self.classes = sorted(names) if classes is None else classes
        if unknown := " ".join(sorted(names - set(self.classes))[:5]):
            raise ValueError(f"{self.root!r} has classes that the training set lacks: {unknown}")
        number = {name: label for label, name in enumerate(self.classes)} | {"": -1}
        self.labels = np.array([number[top] for top in tops])
        # One bytes object, not a list of str: workers share the memory of the main process until
        # someone writes to it, and each str that is read has its reference count written.
        encoded = [os.fsencode(path) for path in paths]
        self.paths, self.ends = b"".join(encoded), np.cumsum([len(path) for path in encoded])
        some = map(self.name, range(0, len(paths), 1 + len(paths) // 1000))
        sizes = [os.path.exists(path) and os.path.getsize(path) for path in some]
        digest = _digest(paths, sizes, self.classes)
        self.fingerprint = f"{len(paths)} images of {len(self.classes)} classes, {digest}"

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.path.join(self.root, os.fsdecode(self.paths[start : self.ends[index]]))

    def open(self, index: int) -> Image.Image:
        """The image, of which only the header is read: the crop decides how much is decoded."""
        return Image.open(self.name(index))


def _walk(root: str, below: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of the image files below `root`, relative to it. Follows links, but not in circles."""
    real = os.path.realpath(os.path.join(root, below))
    if real in above:
        return
    for entry in os.scandir(real):
        path = os.path.join(below, entry.name)
        if entry.name.startswith("."):
            continue
        # is_dir() costs no call to the disk for a plain file. isdir() takes a link to itself for no
        # folder, where is_dir() would raise.
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _walk(root, path, (*above, real))
        elif entry.name.lower().endswith(EXTENSIONS):
            yield path


class Subset:
    """Some images of a source, by number."""

    def __init__(self, source, indices: list[int]):
        self.source, self.indices, self.classes = source, np.array(indices), source.classes
        self.labels = source.labels[self.indices]
        self.fingerprint = f"{len(indices)} of {source.fingerprint}, {_digest(indices)}"

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def open(self, index: int) -> Image.Image:
        return self.source.open(self.indices[index])


# --------------------------------------------------------------------------------------------------
# Views: any image to RGB, cropped and resized in one step


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit RGB. Transparent parts become white.

    Of images with more than 8 bits, the minimum .. maximum (of all colours together) becomes
    0 .. 255, because files don't say how many of their bits are in use; pixels that are not finite
    become the minimum. These are grey images of Pillow's modes I and F, and PNG and TIFF files of
    16-bit colours. ValueError without a finite range, or if Pillow can't read such colours in full.
    A TIFF's fourth band is opacity only if the file says so.
    """
    undeclared = image.format == "TIFF" and Tag.ExtraSamples not in image.tag_v2
    pixels = _deep_pixels(image)
    if pixels is not None:
        stretched = _stretch(pixels)
        if image.mode == "RGBA":
            stretched.putalpha(image.getchannel("A"))
        image = stretched
    if image.has_transparency_data and not undeclared:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_pixels(image: Image.Image) -> np.ndarray | None:
    """Pixels of more than 8 bits, as floats (H, W) or (H, W, 3); None of other images."""
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, dtype=np.float64)
        unsigned = image.format == "TIFF" and image.tag_v2.get(Tag.SampleFormat, (1,)) == (1,)
        # Pillow reads unsigned numbers of 32 bits as signed ones
        return pixels % 2**32 if image.mode == "I" and unsigned else pixels
    if image.format not in ("PNG", "TIFF") or "RGB" not in image.mode or not image.filename:
        return None

    tags = getattr(image, "tag_v2", {})  # a TIFF's
    if tags.get(Tag.BitsPerSample, (8,))[0] == 16:
        if tags.get(Tag.PlanarConfiguration) == 2 or tags.get(Tag.ExtraSamples) == (1,):
            raise ValueError("16-bit colours in separate planes, or multiplied by the opacity")
    # Pillow keeps the upper byte of 16-bit colours; in the other byte order, this is the lower one.
    tiles = image.tile or Image.open(image.filename).tile  # a decoded image has none left
    args = [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in tiles]
    bands, _, order = args[0][0].partition(";16")  # of "RGB;16B"; B, L, or N for the machine's, L
    if not order:
        return None
    # Pillow knows no "LA;16L", but as "RGBA", all four bytes of a pixel can be had.
    other = "RGBA" if bands == "LA" else f"{bands};16{'L' if order == 'B' else 'B'}"
    lower = Image.open(image.filename)
    lower.tile = [tile._replace(args=(other, *rest)) for tile, (_, *rest) in zip(tiles, args)]
    lower = np.asarray(lower)[..., slice(1, 2) if bands == "LA" else slice(3)]
    return np.asarray(image)[..., :3] * np.float32(256) + lower


def _stretch(pixels: np.ndarray) -> Image.Image:
    finite = np.isfinite(pixels)
    low = pixels.min(where=finite, initial=np.inf)
    high = pixels.max(where=finite, initial=-np.inf)
    if not low < high:
        raise ValueError("all pixels have the same value, or none is finite")
    levels = (np.where(finite, pixels, low) - low) / (high - low) * 255
    return Image.fromarray(levels.round().astype(np.uint8))


def crop_resize(
    image: Image.Image, box: tuple[float, float, float, float], size: int
) -> Image.Image:
    """Crop `box` (left, top, right, bottom) and resize it, bicubic, to RGB of (size, size).

    A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as the crop keeps twice the
    pixels wanted each way, which is faster and hardly differs. `image` keeps its size, so that
    another view can be taken from it. An EXIF rotation comes last, where it is cheapest: `box` is
    in the frame of the file.
    """
    scale = min(box[2] - box[0], box[3] - box[1]) / size / 2
    if scale >= 2 and image.format in ("JPEG", "MPO") and image.filename:
        full_width, image = image.width, Image.open(image.filename)  # `draft` shrinks for good
        if drafted := image.draft(None, [math.ceil(side / scale) for side in image.size]):
            box = tuple(edge * drafted[1][2] / full_width for edge in box)
    view = to_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
    view.info.clear()  # of EXIF, take only the orientation: other tags may be damaged
    with contextlib.suppress(Exception):  # no EXIF, or one that makes no sense
        view.getexif()[Tag.Orientation] = image.getexif()[Tag.Orientation]
        view = ImageOps.exif_transpose(view)
    return view


def random_resized_crop(
    image: Image.Image, size: int, rng: random.Random, scale: tuple[float, float] = (0.2, 1.0)
) -> Image.Image:
    """Inception crop to (size, size): area a fraction in `scale`, log-uniform aspect, any place."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            break
    else:  # a very long image: its middle, as wide as the aspect allows
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    return crop_resize(image, (left, top, left + w, top + h), size)


def center_crop(image: Image.Image, size: int, ratio: float = 0.875) -> Image.Image:
    """The evaluation view: short side to size / ratio (256 for 224), then the middle square."""
    side = min(image.size) * size / round(size / ratio)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return crop_resize(image, (left, top, left + side, top + side), size)


def flip(image: Image.Image, rng: random.Random) -> Image.Image:
    """Mirrored left to right with probability 1/2."""
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def scale_pixels(images: Tensor) -> Tensor:
    """uint8 0 .. 255 to float32 -1 .. 1. Call it on the device: uint8 is a quarter to move."""
    return images.float().div_(127.5).sub_(1)


# --------------------------------------------------------------------------------------------------
# Fine-tuning augmentation: RandAugment per image, then random erasing and mixup or CutMix per batch

FILL = (128, 128, 128)                 # the mean colour, for what a rotation or shift lays bare
RESAMPLE = Image.Resampling.BICUBIC    # as for the crop


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Output (x, y) shows input (a x + b y + c, d x + e y + f), for a matrix (a, b, c, d, e, f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, RESAMPLE, fillcolor=FILL)


# Operations take an RGB image, their severity m (magnitude / 10, 0 to 1), and s: m or -m at random.
RAND_AUGMENT = {
    "autocontrast": lambda im, m, s: ImageOps.autocontrast(im),
    "equalize": lambda im, m, s: ImageOps.equalize(im),
    "invert": lambda im, m, s: ImageOps.invert(im),
    "rotate": lambda im, m, s: im.rotate(30 * s, RESAMPLE, fillcolor=FILL),
    # not ImageOps.posterize: new Pillow's raises for 0 bits, which m = 1 asks for (a black image)
    "posterize": lambda im, m, s: im.point(lambda v: v & ~(255 >> 4 - int(4 * m))),
    "solarize": lambda im, m, s: ImageOps.solarize(im, 256 - int(256 * m)),
    "solarize_add": lambda im, m, s: im.point(lambda v: v + int(110 * m) if v < 128 else v),
    "colour": lambda im, m, s: ImageEnhance.Color(im).enhance(1 + 0.9 * s),
    "contrast": lambda im, m, s: ImageEnhance.Contrast(im).enhance(1 + 0.9 * s),
    "brightness": lambda im, m, s: ImageEnhance.Brightness(im).enhance(1 + 0.9 * s),
    "sharpness": lambda im, m, s: ImageEnhance.Sharpness(im).enhance(1 + 0.9 * s),
    "shear_x": lambda im, m, s: _affine(im, 1, 0.3 * s, 0, 0, 1, 0),
    "shear_y": lambda im, m, s: _affine(im, 1, 0, 0, 0.3 * s, 1, 0),
    "translate_x": lambda im, m, s: _affine(im, 1, 0, 0.45 * s * im.width, 0, 1, 0),
    "translate_y": lambda im, m, s: _affine(im, 1, 0, 0, 0, 1, 0.45 * s * im.height),
}


def rand_augment(image: Image.Image, rng: random.Random, magnitude: float = 9) -> Image.Image:
    """Distort an 8-bit RGB image by RandAugment (Cubuk et al. 2019, arXiv:1909.13719).

    Two operations are drawn uniformly, with replacement. Each is applied with probability 1/2, at a
    magnitude that varies normally by 0.5 within 0 .. 10. The input stays as it is.
    """
    for _ in range(2):
        operation = rng.choice(list(RAND_AUGMENT.values()))
        if rng.random() < 0.5:
            m = min(max(rng.gauss(magnitude, 0.5), 0), 10) / 10
            image = operation(image, m, rng.choice((m, -m)))
    return image


def random_erasing(images: Tensor, rng: random.Random, probability: float = 0.25) -> Tensor:
    """Fill a rectangle of some images with normal noise (Zhong et al. 2017, arXiv:1708.04896).

    Its area is 2 % to a third of the image, uniform, its height / width 0.3 to 1 / 0.3,
    log-uniform. One that does not fit is drawn again, ten times at most. Comes after normalisation,
    so that the noise looks like the data, and before `mixup_cutmix`, so that labels are mixed by
    the pixels as they were before any noise.

    Takes float (B, 3, H, W) on any device, without waiting for it; returns a copy. Rectangles come
    from `rng`, noise from torch's default generator.
    """
    images = images.clone()
    H, W = images.shape[-2:]
    for image in images:
        tries = 10 if rng.random() < probability else 0
        for _ in range(tries):
            area = H * W * rng.uniform(0.02, 1 / 3)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < H and width < W:
                top, left = rng.randint(0, H - height), rng.randint(0, W - width)
                image[:, top : top + height, left : left + width].normal_()
                break
    return images


def mixup_cutmix(
    images: Tensor, labels: Tensor, num_classes: int, rng: random.Random, mixup: float = 0.8,
    cutmix: float = 1.0, smoothing: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Mix each image i, and its label, with image B - 1 - i; comes after `random_erasing`.

    The whole batch gets, with equal probability, mixup (Zhang et al. 2017, arXiv:1710.09412), which
    blends two images, or CutMix (Yun et al. 2019, arXiv:1905.04899), which pastes a box of one into
    the other. The share that an image keeps is drawn from Beta(a, a), a being `mixup` or `cutmix`,
    where 0 turns that one off; a box cut off by the border gives the share it really leaves.

    Takes float images (B, 3, H, W) and int64 labels (B,) on any device, without waiting for it, and
    leaves them as they are. Returns images and float32 targets (B, num_classes): labels mixed
    likewise, with `smoothing` spread over all classes.
    """
    share = 1.0
    if cutmix > 0 and (mixup == 0 or rng.random() < 0.5):
        H, W = images.shape[-2:]
        side = math.sqrt(1 - rng.betavariate(cutmix, cutmix))
        height, width = int(H * side), int(W * side)
        top, left = rng.randrange(H) - height // 2, rng.randrange(W) - width // 2  # uniform centre
        box = ..., slice(max(top, 0), top + height), slice(max(left, 0), left + width)
        partners, images = images.flip(0), images.clone()
        images[box] = partners[box]
        share = 1 - images[0, 0][box].numel() / (H * W)
    elif mixup > 0:
        share = rng.betavariate(mixup, mixup)
        images = share * images + (1 - share) * images.flip(0)

    targets = F.one_hot(labels, num_classes).float()                  # (B, num_classes)
    targets = (1 - smoothing) * targets + smoothing / num_classes
    return images, share * targets + (1 - share) * targets.flip(0)


# --------------------------------------------------------------------------------------------------
# Samples and batches


def seed_from(*parts) -> int:
    """A 63-bit seed from numbers and words. Their sum would not tell (1, 2) from (2, 1)."""
    return random.Random(" ".join(map(str, parts))).getrandbits(63)


# Errors of one file; others, such as EIO or EMFILE, are of the system. Pillow's have no number.
FILE_ERRORS = {None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EINVAL}


class Samples(torch.utils.data.Dataset):
    """Sample number `key` = epoch * len(source) + index: (*transform(image, rng), label).

    source: an `ImageFolder`, `Shapes`, or `Subset` of one.
    transform: from the opened image and a random.Random of (seed, epoch, index) alone to a tuple.

    A file that can't be read is named on stderr, once in each process, and replaced by another, the
    same one in every run; with replace=False by a grey image labelled -1, which evaluation leaves
    out. Raises OSError if ten in a row can't be read. Errors of the memory or the disk are raised
    as they are.
    """

    def __init__(
        self, source, transform: Callable[[Image.Image, random.Random], tuple], seed: int = 0,
        replace: bool = True,
    ):
        self.source, self.transform, self.seed, self.replace = source, transform, seed, replace
        self.named = set()  # indices of unreadable files

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int) -> tuple:
        epoch, wanted = divmod(key, len(self))
        index = wanted
        for attempt in range(10):
            rng = random.Random(f"{self.seed} {epoch} {wanted + attempt * len(self)}")
            try:
                image, label = self.source.open(index), int(self.source.labels[index])
                return *self.transform(image, rng), label
            except Exception as error:  # Pillow has a dozen kinds
                number = getattr(error, "errno", None)
                if isinstance(error, MemoryError) or number not in FILE_ERRORS:
                    raise
                name = self.source.name(index)
                reason = f"{type(error).__name__}: {error}".replace(repr(name), "")
                unreadable = f"{name!r} ({' '.join(reason.split()).rstrip(' :')})"
            if index not in self.named:
                self.named.add(index)
                instead = "another image takes its place" if self.replace else "it is left out"
                with contextlib.suppress(OSError):  # stderr may be closed
                    sys.stderr.write(f"warning: can't read {unreadable}; {instead}\n")
            if not self.replace:
                return *self.transform(Image.new("RGB", (64, 64), "gray"), rng), -1
            index = rng.randrange(len(self))
        raise OSError(f"ten images in a row can't be read, the last one {unreadable}")


class Batches(torch.utils.data.Sampler):
    """Keys of `Samples` in this process's batches, from step `start` to the end of training.

    One stream over all epochs: workers never run dry at the end of an epoch, and a run can go on
    from any optimizer step, which torch's DistributedSampler can't. Each epoch is a permutation,
    cut into global batches of `batch_size`; the rest is dropped. A global batch is cut into
    accum_steps, and each of those is dealt out to the processes.
    """

    def __init__(
        self, length: int, batch_size: int, epochs: int, seed: int = 0, start: int = 0,
        accum_steps: int = 1, rank: int = 0, world_size: int = 1,
    ):
        self.length, self.batch_size, self.epochs = length, batch_size, epochs
        self.seed, self.start, self.accum_steps = seed, start, accum_steps
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = length // batch_size

    def __len__(self) -> int:
        return (self.epochs * self.steps_per_epoch - self.start) * self.accum_steps

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in range(self.start // self.steps_per_epoch, self.epochs):
            generator = torch.Generator().manual_seed(seed_from(self.seed, "order", epoch))
            order = torch.randperm(self.length, generator=generator)
            keys = order + epoch * self.length
            done = max(0, self.start - epoch * self.steps_per_epoch)  # batches of this epoch
            for batch in keys.split(self.batch_size)[done : self.steps_per_epoch]:
                for part in batch.chunk(self.accum_steps):
                    yield part[self.rank :: self.world_size].tolist()


# --------------------------------------------------------------------------------------------------
# Built-in images


def _arc(start: float, stop: float, radius: float = 1.0, centre: complex = 0.0) -> np.ndarray:
    """48 points of a circle, from one angle to another in turns; complex (48,)."""
    return centre + radius * np.exp(2j * np.pi * np.linspace(start, stop, 48))


def _regular(corners: int) -> np.ndarray:
    """The corners of a regular polygon in the unit circle; complex (corners,)."""
    return np.exp(2j * np.pi * np.arange(corners) / corners)


# Outlines are complex points x + iy in the unit circle: one complex product scales and turns them.
OUTLINES = {
    "circle": _arc(0, 1),
    "ring": np.r_[_arc(0, 1), _arc(1, 0, radius=0.55)],  # out and back, along a seam of no width
    "square": _regular(4),
    "triangle": _regular(3),
    "star": _regular(10) * np.tile([1, 0.42], 5),
    "cross": np.outer(_regular(4), [0.94 - 0.3j, 0.94 + 0.3j, 0.3 + 0.3j]).ravel(),
    "heart": -np.r_[1, _arc(1/8, 5/8, 0.555, -0.19 + 0.4j), _arc(3/8, 7/8, 0.555, -0.19 - 0.4j)],
    "moon": np.r_[_arc(0.14, 0.86), _arc(0.79, 0.21, radius=0.8, centre=0.43)],
    "arrow": np.r_[1, 0.1 + 0.8j, 0.1 + 0.3j, -0.95 + 0.3j, -0.95 - 0.3j, 0.1 - 0.3j, 0.1 - 0.8j],
    "drop": np.r_[1, _arc(0.176, 0.824, radius=0.62, centre=-0.38)],
    "dome": _arc(-0.25, 0.25),
    "corner": np.r_[-0.6 - 0.8j, 0.6 - 0.8j, 0.6 - 0.3j, -0.1 - 0.3j, -0.1 + 0.8j, -0.6 + 0.8j],
}
SHAPES = tuple(OUTLINES)


def _ramp(rng: random.Random, x: np.ndarray, y: np.ndarray, light: float, hue: float) -> np.ndarray:
    """A colour of this lightness and hue (in turns) that grows darker downwards, at a slight angle.

    x is (1, W) and y is (H, 1), both -1 .. 1; returns float32 (H, W, 3) within 0 .. 1. The slope is
    steep enough to show within an eighth of the image.
    """
    angle = rng.uniform(-0.35, 0.35)
    sin, cos = math.sin(angle), math.cos(angle)
    along = (x * sin + y * cos) / (abs(sin) + cos)    # (H, W)
    middle = [light + 0.16 * math.cos(2 * math.pi * (hue + channel / 3)) for channel in range(3)]
    swing = [rng.uniform(0.1, 0.14) for _ in range(3)]
    return np.float32(middle) - along[..., None] * np.float32(swing)


class Shapes:
    """Images of one big shape each: a drawn dataset with nothing to download.

    Image i is drawn from the number start + i alone, so ranges of numbers without overlap make
    training and test sets. The class is the shape; colour, place, size and angle do not tell it.

    The hidden part of an image can be inferred from the rest, as pretraining requires. There is no
    noise, no small detail and no flat colour (a patch without slope, once normalised, is nothing
    but rounding error). A shape is lighter than its background. The light comes from above, so a
    mirrored image is as likely as the image.
    """

    classes = SHAPES

    def __init__(self, length: int, size: int = 64, start: int = 0):
        self.size, self.numbers = size, range(start, start + length)
        self.labels = np.array(self.numbers) % len(SHAPES)
        self.fingerprint = f"{length} shapes of {size} pixels, from number {start}"

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return f"shape {self.numbers[index]}"

    def open(self, index: int) -> Image.Image:
        """Draw image `index`: RGB, size x size pixels. Raises IndexError outside the dataset."""
        size, number = self.size, self.numbers[index]
        rng = random.Random(f"shapes {number}")

        # Lengths are in a frame of -1 .. 1 across the image. The shape keeps clear of its edges.
        radius = rng.uniform(0.56, 0.84)
        x, y = rng.uniform(-1, 1) * (0.95 - radius), rng.uniform(-1, 1) * (0.95 - radius)
        angle = rng.uniform(-0.4, 0.4) - math.pi / 2  # outlines point along x; upright is -y
        turned = radius * complex(math.cos(angle), math.sin(angle))
        outline = OUTLINES[SHAPES[number % len(SHAPES)]] * turned + complex(x, y)

        # Drawn at four times the size and reduced, the edges come out smooth.
        canvas = Image.new("L", (4 * size, 4 * size))
        corners = (outline + 1 + 1j) * 2 * size
        ImageDraw.Draw(canvas).polygon(corners.view(float).tolist(), fill=255)
        mask = canvas.reduce(4)
        shadow = Image.new("L", (size, size))
        shadow.paste(mask, (0, round(size / 16)))
        shadow = shadow.filter(ImageFilter.BoxBlur(size / 24))

        # Hues differ as well as lightness, so that the outline shows all the way round.
        hue = rng.random()
        axis = np.linspace(-1, 1, size, dtype=np.float32)
        u, v = axis[None, :], axis[:, None]  # (1, W) and (H, 1)
        image = _ramp(rng, u, v, 0.34, hue)
        fill = _ramp(rng, (u - x) / radius, (v - y) / radius, 0.66, hue + rng.uniform(0.35, 0.65))
        image *= 1 - np.asarray(shadow)[..., None] * np.float32(0.5 / 255)
        image += (fill - image) * (np.asarray(mask)[..., None] * np.float32(1 / 255))
        return Image.fromarray((image * 255 + 0.5).astype(np.uint8))
