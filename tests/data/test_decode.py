"""Every byte string becomes the pixels torchvision would make of it, or an error with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from pipeline.config.schema import Transform
from pipeline.data.decode import EXTENSIONS, FORMATS, decode, jigsaw

RNG = np.random.default_rng(0)
SMOOTH = (np.add.outer(np.arange(40), 2 * np.arange(60)) % 256).astype(np.uint8)
COLOUR = np.stack([SMOOTH, 255 - SMOOTH, SMOOTH // 2], axis=2)


def transform(crop: int = 40, channels: int = 3, **fields: Any) -> Transform:
    return Transform(crop=crop, mean=(0.5,) * channels, std=(0.5,) * channels, channels=channels, **fields)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def centre(pixels: np.ndarray, side: int = 40) -> np.ndarray:
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def test_an_empty_file_is_an_error():
    with pytest.raises(ValueError, match="empty file"):
        decode(b"", None, transform())


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_is_an_error_and_not_a_half_grey_image(kind):
    content = encoded(Image.fromarray(RNG.integers(256, size=(40, 60, 3), dtype=np.uint8)), kind)
    with pytest.raises(ValueError, match=f"damaged or incomplete {kind} file: .*truncated"):
        decode(content[: len(content) // 2], None, transform())


def test_what_is_no_image_is_an_error_that_shows_how_it_begins():
    with pytest.raises(ValueError, match=r"not a readable image: none of JPEG, PNG, .*b'<html>404 No'"):
        decode(b"<html>404 Not Found</html>" * 20, None, transform())


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "SGI", "XBM", "PDF", "DDS", "ICNS"])
def test_only_decoders_of_the_listed_formats_run_whatever_the_file_is_called(kind, monkeypatch):
    content = encoded(Image.new("1" if kind == "XBM" else "RGB", (64, 64)), kind)
    started: list[Any] = []
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *given, **options: started.append(given))
    monkeypatch.setattr("subprocess.Popen.__del__", lambda process: None)
    with pytest.raises(ValueError, match="not a readable image"):
        decode(content, None, transform())
    assert started == []


ENDLESS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n{} loop\n%%EOF\n"


def test_a_program_in_a_file_that_is_called_an_image_is_not_run():
    with pytest.raises(ValueError, match=r"not a readable image: .*b'%!PS-Adobe-3'"):
        decode(ENDLESS, None, transform())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(("JPEG", {}), ("PNG", {}), ("BMP", {}), ("GIF", {}), ("TIFF", {}), ("PPM", {})),
        *(
            ("WEBP", {"lossless": True}),
            ("AVIF", {}),
            ("JPEG2000", {}),
            ("MPO", {"append_images": [], "save_all": True}),
        ),
        ("ICO", {"sizes": [(40, 40)]}),
    ],
)
def test_every_listed_format_is_read(kind, options):
    if kind not in (*FORMATS, "MPO"):
        pytest.skip(f"this Pillow has no {kind}")
    image = Image.fromarray(COLOUR[:, :40])
    pixels = decode(encoded(image, kind, **options), None, transform())
    np.testing.assert_allclose(
        pixels, COLOUR[:, :40], atol=0 if kind in ("PNG", "BMP", "PPM", "ICO") else 100
    )


def test_the_endings_of_all_formats_that_this_pillow_reads_are_those_of_images():
    assert {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".ico", ".tif"} <= set(EXTENSIONS)
    for kind, ending in {"AVIF": ".avif", "JPEG2000": ".jp2", "WEBP": ".webp"}.items():
        assert (ending in EXTENSIONS) == (kind in FORMATS)


def test_a_colour_image_is_its_pixels():
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(COLOUR)), None, transform()), centre(COLOUR))


def test_a_grey_image_fills_three_channels():
    pixels = decode(encoded(Image.fromarray(SMOOTH)), None, transform())
    np.testing.assert_array_equal(pixels, np.repeat(centre(SMOOTH)[..., None], 3, axis=2))


def test_a_colour_image_fills_one_channel_with_its_luma():
    pixels = decode(encoded(Image.fromarray(COLOUR)), None, transform(channels=1))
    luma = centre(COLOUR) @ [0.299, 0.587, 0.114]
    assert pixels.shape == (40, 40, 1)
    np.testing.assert_allclose(pixels[..., 0], luma, atol=1)


def test_transparency_is_dropped():
    alpha = RNG.integers(256, size=(40, 60, 1), dtype=np.uint8)
    content = encoded(Image.fromarray(np.concatenate([COLOUR, alpha], axis=2)))
    np.testing.assert_array_equal(decode(content, None, transform()), centre(COLOUR))


@pytest.mark.parametrize("transparency", [3, bytes(range(256))], ids=["one colour", "every colour"])
def test_a_palette_is_looked_up_and_its_transparency_dropped(transparency):
    palette = RNG.integers(256, size=(256, 3), dtype=np.uint8)
    image = Image.fromarray(SMOOTH).copy()
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(palette.tobytes())
    pixels = decode(encoded(image, transparency=transparency), None, transform())
    np.testing.assert_array_equal(pixels, palette[centre(SMOOTH)])


def test_a_cmyk_jpeg_is_converted():
    cmyk = np.zeros((40, 40, 4), np.uint8)
    cmyk[:20, :, 0] = 255  # cyan above, white below
    pixels = decode(encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100), None, transform())
    np.testing.assert_allclose(pixels[10, 10], [0, 255, 255], atol=4)
    np.testing.assert_allclose(pixels[30, 10], [255, 255, 255], atol=4)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2")]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_values_of_16_bits_keep_their_upper_byte(kind, dtype, channels):
    values = np.linspace(0, 65535, 40 * 60).astype(np.uint16).reshape(40, 60)
    image = Image.fromarray(values.astype(dtype))
    pixels = decode(encoded(image, kind), None, transform(channels=channels))
    np.testing.assert_array_equal(pixels, np.repeat(centre(values >> 8)[..., None], channels, axis=2))


def png(values: np.ndarray) -> bytes:
    """A PNG of 16-bit RGB, which Pillow reads but does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width, _ = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def test_colours_of_16_bits_keep_their_upper_byte():
    values = RNG.integers(65536, size=(40, 40, 3), dtype=np.uint16)
    np.testing.assert_array_equal(decode(png(values), None, transform()), values >> 8)


def test_a_black_and_white_image_is_black_and_white():
    bits = RNG.random((40, 40)) < 0.5
    pixels = decode(encoded(Image.fromarray(bits)), None, transform(channels=1))
    np.testing.assert_array_equal(pixels[..., 0], np.where(bits, 255, 0))


def test_exif_rotation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    plain = encoded(Image.fromarray(COLOUR), "JPEG", quality=95)
    turned = encoded(Image.fromarray(COLOUR), "JPEG", quality=95, exif=exif)
    assert turned != plain
    np.testing.assert_array_equal(decode(turned, None, transform()), decode(plain, None, transform()))


def test_an_animation_is_its_first_frame():
    frames = [Image.fromarray(np.full((40, 40), value, np.uint8)) for value in (10, 200, 250)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert np.unique(decode(content, None, transform())).tolist() == [10]


@pytest.mark.parametrize("side", [10_001, 30_000, 2**31 - 1])
def test_a_file_that_declares_a_huge_image_is_refused_before_it_is_decoded(side):
    content = bytearray(encoded(Image.fromarray(SMOOTH)))
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with pytest.raises(ValueError, match=r"pixels, more than 100,000,000|more than 100,000,000 pixels"):
        decode(bytes(content), None, transform())


def webp(kind: bytes, body: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


@pytest.mark.parametrize(
    "content",
    [
        webp(b"VP8L", b"\x2f" + struct.pack("<I", 0x3FFF | 0x3FFF << 14) + bytes(9)),
        webp(b"VP8X", bytes(4) + b"\xff\x3f\0\xff\x3f\0" + bytes(4)),
        webp(b"VP8 ", b"\x30\x01\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(4)),
    ],
    ids=["lossless", "extended", "lossy"],
)
def test_a_few_bytes_that_promise_a_huge_canvas_are_refused_before_it_is_allocated(content, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match=r"163\d\d x 163\d\d pixels, more than 100,000,000"):
        decode(content, None, transform())


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_a_progressive_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(decoder):
    content = encoded(Image.new("L", (5000, 4000)), "JPEG", progressive=True)
    at = content.index(b"\xff\xda")
    scan = content[at : content.index(b"\xff", at + 2)]
    with pytest.raises(ValueError, match=r"1\d\d scans over 5000 x 4000 pixels, more than 2,000,000,000"):
        decode(content[:at] + scan * 100 + content[at:], None, transform(), decoder)
    few = decode(content, None, transform(), decoder)
    assert few.shape == (40, 40, 3)


def test_an_image_that_is_huge_only_after_resizing_is_refused():
    content = encoded(Image.fromarray(np.zeros((1, 5000), np.uint8)))
    with pytest.raises(ValueError, match=r"1280000 x 256 pixels, more than 100,000,000"):
        decode(content, None, transform(crop=224, resize=256))


@pytest.mark.parametrize("shape", [None, (40, 60)], ids=["encoded", "raw"])
def test_an_image_smaller_than_the_crop_is_refused(shape):
    content = encoded(Image.fromarray(SMOOTH)) if shape is None else SMOOTH.tobytes()
    with pytest.raises(ValueError, match="60 x 40 pixels is smaller than the 41 pixel crop"):
        decode(content, shape, transform(crop=41))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "resize", "crop"),
    [
        ((40, 60), 33, 28),
        ((61, 40), 33, 31),
        ((97, 31), 64, 63),
        ((31, 97), 50, 47),
        ((53, 53), 37, 32),
        ((37, 41), 37, 32),
        ((17, 300), 23, 23),
        ((59, 43), None, 42),
    ],
)
def test_resize_and_crop_give_the_bits_of_torchvision(size, resize, crop, channels, interpolation):
    pixels = RNG.integers(256, size=(*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("RGB" if channels == 3 else "L")
    wanted = image
    if resize is not None:
        wanted = Resize(resize, InterpolationMode(interpolation))(wanted)
    wanted = np.asarray(CenterCrop(crop)(wanted)).reshape(crop, crop, channels)
    settings = transform(crop, channels, resize=resize, interpolation=interpolation)
    np.testing.assert_array_equal(decode(encoded(image), None, settings), wanted)
    raw = np.asarray(image)
    np.testing.assert_array_equal(decode(raw.tobytes(), raw.shape, settings), wanted)


@pytest.mark.parametrize("shape", [(40, 40), (40, 40, 1), (40, 40, 3)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", [None, 40, 56])
def test_raw_pixels_are_what_a_png_of_them_is(shape, channels, resize):
    pixels = RNG.integers(256, size=shape, dtype=np.uint8)
    image = Image.fromarray(pixels.reshape(shape[:2]) if shape[2:] == (1,) else pixels)
    settings = transform(channels=channels, resize=resize)
    raw = decode(pixels.tobytes(), shape, settings)
    np.testing.assert_array_equal(raw, decode(encoded(image), None, settings))
    assert raw.shape == (40, 40, channels)


def tiles(pixels: np.ndarray, grid: int) -> list[bytes]:
    height, width = pixels.shape[0] // grid, pixels.shape[1] // grid
    return [
        pixels[row * height : (row + 1) * height, column * width : (column + 1) * width].tobytes()
        for row in range(grid)
        for column in range(grid)
    ]


@pytest.mark.parametrize("shape", [(28, 28, 1), (33, 28, 3), (9, 9, 3), (64, 50, 1)])
@pytest.mark.parametrize("grid", [2, 3, 4])
def test_a_jigsaw_has_the_tiles_of_the_image_in_another_order(shape, grid):
    pixels = RNG.integers(256, size=shape, dtype=np.uint8)
    cropped = pixels[: shape[0] // grid * grid, : shape[1] // grid * grid]
    whole, puzzle = jigsaw(cropped, grid, np.random.default_rng(1))
    np.testing.assert_array_equal(whole, cropped)
    pair = jigsaw(pixels, grid, np.random.default_rng(1))
    for found, before in zip(pair, (whole, puzzle), strict=True):
        assert found.shape == shape
        resized = Resize(shape[:2], InterpolationMode.BILINEAR)
        for channel in range(shape[2]):
            expected = before[:, :, channel]
            if expected.shape != shape[:2]:
                expected = np.asarray(resized(Image.fromarray(expected)))
            np.testing.assert_array_equal(found[:, :, channel], expected)
    assert tiles(puzzle, grid) != tiles(whole, grid)
    assert sorted(tiles(puzzle, grid)) == sorted(tiles(whole, grid))


def test_the_identity_is_never_drawn_and_every_other_order_is():
    pixels = np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    rng = np.random.default_rng(0)
    orders = {jigsaw(pixels, 2, rng)[1].tobytes() for _ in range(1000)}
    assert pixels.tobytes() not in orders
    assert len(orders) == 4 * 3 * 2 - 1


def test_a_size_that_the_grid_does_not_divide_leaves_no_constant_border():
    _, puzzle = jigsaw(RNG.integers(1, 256, size=(29, 31, 3), dtype=np.uint8), 3, np.random.default_rng(0))
    assert puzzle.shape == (29, 31, 3)
    assert puzzle.min() > 0


def test_a_jigsaw_depends_on_the_generator_alone():
    pixels = RNG.integers(256, size=(28, 28, 1), dtype=np.uint8)
    first, second, other = (jigsaw(pixels, 3, np.random.default_rng(seed))[1] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_a_jigsaw_leaves_the_image_as_it_was():
    pixels = RNG.integers(256, size=(28, 28, 1), dtype=np.uint8)
    pixels.setflags(write=False)
    _, puzzle = jigsaw(pixels, 3, np.random.default_rng(0))
    assert puzzle.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_an_agreed_range_are_an_error_and_no_black_image(tmp_path, dtype):
    path = tmp_path / "deep.tif"
    Image.fromarray(np.ones((30, 30), dtype)).save(path)
    with pytest.raises(ValueError, match="have no agreed range"):
        decode(path.read_bytes(), None, Transform(crop=28, mean=(0.5,), std=(0.5,), channels=1))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_simplejpeg_gives_the_pixels_of_pillow(mode, options):
    noise = Image.fromarray(RNG.integers(256, size=(50, 70, 3), dtype=np.uint8)).resize((300, 200))
    content = encoded(noise.convert(mode), "JPEG", **options)
    target = transform(crop=100, resize=120)
    np.testing.assert_array_equal(
        decode(content, None, target, "simplejpeg"), decode(content, None, target, "pillow")
    )


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_a_broken_jpeg_is_an_error_whatever_reads_it(decoder):
    content = encoded(Image.fromarray(RNG.integers(256, size=(40, 60, 3), dtype=np.uint8)), "JPEG")
    with pytest.raises(ValueError, match="truncated"):
        decode(content[: len(content) // 2], None, transform(), decoder)


def test_simplejpeg_leaves_other_formats_to_pillow():
    content = encoded(Image.fromarray(COLOUR))
    np.testing.assert_array_equal(decode(content, None, transform(), "simplejpeg"), centre(COLOUR))


@pytest.mark.parametrize("size", [(1, 60), (60, 1), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_simplejpeg_reads_images_of_one_pixel_as_pillow_does(size, mode):
    content = encoded(
        Image.fromarray(RNG.integers(256, size=(*size, 3), dtype=np.uint8)).convert(mode), "JPEG"
    )
    target = transform(crop=1)
    np.testing.assert_array_equal(
        decode(content, None, target, "simplejpeg"), decode(content, None, target, "pillow")
    )
