"""From stored bytes to the pixels a classifier sees: decode, resize, crop. No torch, no files.

Pillow is the reference decoder. Like torchvision it ignores EXIF rotation, takes the first frame of an
animation, and converts colour modes with `Image.convert`. Grey images of 16 bits keep their upper 8 bits,
as torchvision's `to_dtype(uint8, scale=True)` and Pillow's reading of 16-bit RGB do; `Image.convert` would
clip them to white.

Bytes are judged before they are decoded: only decoders of `FORMATS` are tried, whatever a file is called, and
an image is refused for its number of pixels, and for how often a progressive JPEG goes over them. Limits
count what a file says, never time, so that results do not depend on how busy a machine is.
"""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from pipeline.columns import Pixels
from pipeline.config.schema import Transform

MAX_PIXELS = 100_000_000
"""Larger images are refused before their pixels are decoded or resized (decompression bombs)."""

MAX_SCANNED = 2_000_000_000
"""Pixels times scans of a JPEG: a progressive one goes over all pixels in every scan. Ten or so are usual."""

_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm"),
    "ICO": (".ico",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2",),
}
_LIBRARIES = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
"""What an installed Pillow may lack, by its names."""


def _is_built(kind: str) -> bool:
    library = _LIBRARIES.get(kind)
    known = (*features.modules, *features.codecs)
    return library is None or (library in known and bool(features.check(library)))


FORMATS = tuple(filter(_is_built, _ENDINGS))
"""Pillow's names of the formats that are decoded; its other decoders, such as that for EPS, never run."""

EXTENSIONS = tuple(ending for kind in FORMATS for ending in _ENDINGS[kind])
"""Endings of their files; those with others are not images of a dataset. Case does not matter."""

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
        ValueError: no readable image, one over the limits, or one smaller than the crop; says why in words
            for people.
    """
    side, channels = transform.crop, transform.channels
    if shape is not None:
        if shape[:2] == (side, side) and transform.resize in (None, side) and _channels(shape) == channels:
            return np.frombuffer(content, np.uint8).reshape(side, side, channels)
        image = Image.fromarray(np.frombuffer(content, np.uint8).reshape(_squeezed(shape)))
        return fit(image, transform)
    if not content:
        raise ValueError("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _opened(content) as image:
            fast = decoder == "simplejpeg" and image.format == "JPEG" and image.mode in _JPEG_COLOURS
            return fit(_loaded(_fast_jpeg(content, image) if fast else image), transform)


def thumbnail(content: bytes, shape: tuple[int, ...] | None, side: int) -> bytes:
    """A small picture of an image, for people.

    Args:
        content: as in `decode`.
        shape: as in `decode`.
        side: most pixels of its longer side; smaller images keep their size.

    Returns:
        A JPEG file.

    Raises:
        ValueError: as `decode`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if shape is not None:
            image = Image.fromarray(np.frombuffer(content, np.uint8).reshape(_squeezed(shape)))
        else:
            image = _loaded(_opened(content))
        small = _eight_bits(image).convert("RGB")
        small.thumbnail((side, side))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=80)
    return file.getvalue()


def as_file(content: bytes, shape: tuple[int, ...] | None) -> tuple[bytes, str]:
    """An image as a file of its own: raw pixels as PNG, an encoded one as it is.

    Args:
        content: as in `decode`.
        shape: as in `decode`.

    Returns:
        The file, and the ending of its name.

    Raises:
        ValueError: not one of `FORMATS`, or beyond the limits.
    """
    if shape is None:
        with _opened(content) as image:
            return content, _ENDINGS[str(image.format).replace("MPO", "JPEG")][0]
    file = io.BytesIO()
    Image.fromarray(np.frombuffer(content, np.uint8).reshape(_squeezed(shape))).save(file, "PNG")
    return file.getvalue(), ".png"


def limits() -> dict[str, Any]:
    """What decides, besides the bytes of a file, whether it is decoded."""
    return {"pixels": MAX_PIXELS, "scanned": MAX_SCANNED, "formats": list(FORMATS)}


def _opened(content: bytes) -> Image.Image:
    """An image of which only the header was read.

    Raises:
        ValueError: not one of `FORMATS`, or beyond the limits.
    """
    if size := _webp_canvas(content):
        _check_size(*size)  # Pillow allocates it on opening
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ValueError(
            f"not a readable image: none of {known}, or damaged at its beginning, which is {content[:12]!r}"
        ) from None
    except Image.DecompressionBombError:
        raise ValueError(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:
        raise _damaged("image", error) from None
    _check_size(*image.size)
    if image.format in ("JPEG", "MPO"):
        _check_scans(content, *image.size)
    return image


def _loaded(image: Image.Image) -> Image.Image:
    """The image with its pixels decoded.

    Raises:
        ValueError: they cannot be.
    """
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise anything, MemoryError for sizes that a file makes up
        raise _damaged(f"{image.format} file", error) from None
    return image


def _damaged(what: str, error: Exception) -> ValueError:
    text = str(error) or type(error).__name__
    return ValueError(f"damaged or incomplete {what}: {text.splitlines()[0]}")


def _webp_canvas(content: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a WebP file; None for other files."""
    if len(content) < 30 or content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        return None
    if content[12:16] == b"VP8X":
        return int.from_bytes(content[24:27], "little") + 1, int.from_bytes(content[27:30], "little") + 1
    bits = int.from_bytes(content[21:25] if content[12:16] == b"VP8L" else content[26:30], "little")
    if content[12:16] == b"VP8L":
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return bits & 0x3FFF, bits >> 16 & 0x3FFF


def _check_scans(content: bytes, width: int, height: int) -> None:
    """Refuse a JPEG that goes over its pixels too often, by the markers that begin a scan."""
    scans = content.count(b"\xff\xda")
    if scans * width * height > MAX_SCANNED:
        raise ValueError(
            f"{scans:,} scans over {width} x {height} pixels, more than {MAX_SCANNED:,} pixels in all; save "
            "it as a baseline JPEG"
        )


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


def fit(image: Image.Image, transform: Transform) -> Pixels:
    """Convert, resize the shorter side, and cut out the centre (torchvision's rounding).

    Returns:
        (crop, crop, channels) uint8.

    Raises:
        ValueError: over the limits, smaller than the crop, or of a mode without an agreed range.
    """
    if not min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: it is empty")
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

    A side that `grid` does not divide is cropped for both, and both are brought back to the size that the
    network takes: no border tells them apart. The identity permutation is never drawn.

    Args:
        pixels: (H, W, channels) uint8.
        grid: tiles per side, at least 2.
        rng: source of the permutation.

    Returns:
        The image and its jigsaw, each (H, W, channels) uint8.
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
    puzzle = np.ascontiguousarray(shuffled.reshape(whole.shape))
    if whole.shape == pixels.shape:
        return whole, puzzle
    return _resized(whole, pixels.shape), _resized(puzzle, pixels.shape)


def _resized(pixels: Pixels, shape: tuple[int, ...]) -> Pixels:
    """Bilinear, (height, width, channels) of a shape."""
    channels = [
        Image.fromarray(pixels[:, :, channel]).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
        for channel in range(shape[2])
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)
