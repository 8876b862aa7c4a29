"""From stored bytes to the pixels a classifier sees: decode, resize, crop. No torch, no files.

Pillow is the reference decoder. Like torchvision it ignores EXIF rotation, takes the first frame of an
animation, and converts colour modes with `Image.convert`. Grey images of 16 bits keep their upper 8 bits,
as torchvision's `to_dtype(uint8, scale=True)` and Pillow's reading of 16-bit RGB do; `Image.convert` would
clip them to white.
"""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.columns import Pixels
from pipeline.config.schema import Transform

MAX_PIXELS = 100_000_000
"""Larger images are refused before their pixels are decoded or resized (decompression bombs)."""

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

_JPEG_COLOURS = {"RGB": "RGB", "L": "GRAY"}
"""What simplejpeg calls Pillow's modes; CMYK is left to Pillow, whose conversion differs."""


def decode(
    content: bytes, shape: tuple[int, ...] | None, transform: Transform, decoder: str = "pillow"
) -> Pixels:
    """Pixels of one image, ready for normalisation.

    Args:
        content: an encoded image file, or raw uint8 pixels if `shape` is given.
        shape: (H, W) or (H, W, channels) of raw pixels; None for encoded images.
        transform: target size and channels.
        decoder: "pillow", or "simplejpeg" for the JPEG files it decodes to the same pixels.

    Returns:
        (crop, crop, channels) uint8.

    Raises:
        Exception: whatever Pillow raises on bytes that are no readable image.
        ValueError: an empty file, an image over `MAX_PIXELS`, or one smaller than the crop.
    """
    side, channels = transform.crop, transform.channels
    if shape is not None:
        if shape[:2] == (side, side) and transform.resize in (None, side) and _channels(shape) == channels:
            return np.frombuffer(content, np.uint8).reshape(side, side, channels)
        image = Image.fromarray(np.frombuffer(content, np.uint8).reshape(_squeezed(shape)))
        return _fit(image, transform)
    if not content:
        raise ValueError("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = Image.open(io.BytesIO(content))
        except UnidentifiedImageError:
            raise ValueError("not an image of a format that Pillow knows") from None
        with opened as image:
            _check_size(*image.size)
            fast = decoder == "simplejpeg" and image.format == "JPEG" and image.mode in _JPEG_COLOURS
            return _fit(_fast_jpeg(content, image) if fast else image, transform)


def _fast_jpeg(content: bytes, image: Image.Image) -> Image.Image:
    """The same image through simplejpeg; Pillow's own where that finds fault with the file."""
    import simplejpeg

    try:
        pixels = simplejpeg.decode_jpeg(content, _JPEG_COLOURS[image.mode])
    except ValueError:
        return image
    return Image.fromarray(pixels.reshape(_squeezed(pixels.shape)))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The upper byte of 16-bit grey values; other images as they are.

    Raises:
        ValueError: pixels of 32 bits or floating point, whose range a file does not tell.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"pixels of mode {image.mode} (32 bits), which have no agreed range")
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))


def _channels(shape: tuple[int, ...]) -> int:
    return shape[2] if len(shape) == 3 else 1


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if len(shape) == 3 and shape[2] == 1 else shape


def _fit(image: Image.Image, transform: Transform) -> Pixels:
    """Convert, resize the shorter side, and cut out the centre (torchvision's rounding)."""
    image = _eight_bits(image).convert("L" if transform.channels == 1 else "RGB")
    side = transform.crop
    if transform.resize is not None and transform.resize != min(image.size):
        short, long = transform.resize, int(transform.resize * max(image.size) / min(image.size))
        size = (short, long) if image.width <= image.height else (long, short)
        _check_size(*size)
        image = image.resize(size, _FILTERS[transform.interpolation])
    if min(image.size) < side:
        raise ValueError(f"{image.width} x {image.height} pixels is smaller than the {side} pixel crop")
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)))
    return pixels.reshape(side, side, transform.channels)


def jigsaw(pixels: Pixels, grid: int, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """An image and its jigsaw puzzle: the same tiles in another order (Yu et al., CVPR 2023, sec. 3.3).

    Both are cropped to a multiple of `grid`, so that no border tells them apart, and the identity
    permutation is never drawn.

    Args:
        pixels: (H, W, channels) uint8.
        grid: tiles per side, at least 2.
        rng: source of the permutation.

    Returns:
        The cropped image and its jigsaw, each (grid * (H // grid), grid * (W // grid), channels) uint8.
    """
    height, width = pixels.shape[0] // grid, pixels.shape[1] // grid
    whole = pixels[: height * grid, : width * grid]
    tiles = (
        whole.reshape(grid, height, grid, width, -1).swapaxes(1, 2).reshape(grid * grid, height, width, -1)
    )
    order = rng.permutation(grid * grid)
    while np.array_equal(order, np.arange(grid * grid)):
        order = rng.permutation(grid * grid)
    shuffled = tiles[order].reshape(grid, grid, height, width, -1).swapaxes(1, 2)
    return whole, np.ascontiguousarray(shuffled.reshape(whole.shape))
