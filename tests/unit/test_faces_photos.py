"""A photograph of any kind is opened upright as RGB, or refused in one line that says why."""

import io
import struct
import zlib

import numpy as np
import pytest
from faces_on_disk import picture
from PIL import Image

from common.errors import DataError
from common.faces.photos import open_photo

PIXELS = np.asarray(picture(5, 60, 40))


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_file_and_its_bytes_are_one_photograph(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(PIXELS), "PNG"))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        np.testing.assert_array_equal(open_photo(source), PIXELS)


@pytest.mark.parametrize(
    ("flag", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_the_cameras_flag_turns_it(flag, upright):
    exif = Image.Exif()
    exif[0x0112] = flag
    np.testing.assert_array_equal(open_photo(saved(Image.fromarray(PIXELS), "PNG", exif=exif)), upright(PIXELS))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_any_mode_is_three_channels(mode):
    image = Image.fromarray(PIXELS)
    image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    opened = open_photo(saved(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert opened.shape == (40, 60, 3)
    assert opened.dtype == np.uint8
    if mode == "I;16":
        np.testing.assert_array_equal(opened[..., 1], PIXELS[..., 0])


@pytest.mark.parametrize("kind", ["WEBP", "JPEG", "BMP", "GIF", "HEIF"])
def test_kinds_of_files(kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    options = {"lossless": True} if kind == "WEBP" else {}
    opened = open_photo(saved(Image.fromarray(PIXELS), kind, **options))
    assert opened.shape == PIXELS.shape
    assert np.abs(opened.astype(int) - PIXELS).mean() < 12


def bomb():
    """A PNG of a few hundred bytes that claims 30,000 x 30,000 pixels."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def cut_short():
    return saved(Image.fromarray(PIXELS), "PNG")[:300]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bomb(), "too many pixels"),
        (b"", "not a JPEG, PNG, WebP or BMP picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG, PNG, WebP or BMP picture"),
        (b"plain text", "not a JPEG, PNG, WebP or BMP picture"),
        (cut_short(), "unreadable"),
        (saved(Image.new("RGB", (50, 50)), "PNG"), "no contrast"),
        (saved(picture(1, 5, 90), "PNG"), "too small: 5 x 90 px"),
    ],
)
def test_what_is_no_photograph_is_refused_in_one_line(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    for source, named in ((content, "the picture: "), (tmp_path / "a.jpg", f"{tmp_path / 'a.jpg'}: ")):
        with pytest.raises(DataError, match=r"^[^\n]+$") as caught:
            open_photo(source)
        line = str(caught.value)
        assert line.startswith(named)
        assert line.endswith("; give another picture.")
        assert reason in line or (not content and "empty file" in line)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(DataError, match=r"nobody\.jpg: missing; "):
        open_photo(tmp_path / "nobody.jpg")
    with pytest.raises(DataError, match="not a file"):
        open_photo(tmp_path)
