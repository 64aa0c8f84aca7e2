"""One picture file -> one aligned picture: modes, orientation, large and broken files, filtered shrinking."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from faces_on_disk import picture
from numpy.typing import NDArray
from PIL import Image

from common.faces import decode
from common.faces.align import TEMPLATE_112_PX, landmark_maps
from common.faces.decode import Job, Recipe, decode_aligned, decode_job

IDENTITY = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def reason_of(folder: Path, name: str, alignment: str = "resize", points: NDArray[np.float32] | None = None) -> str:
    recipe = Recipe(alignment=alignment, image_size=32, box_margin=0.0)
    done = decode_job(Job(root=folder, paths=(name,), points=points, recipe=recipe))
    assert len(done.pictures) == (not done.reasons[0])
    return done.reasons[0]


def test_the_identity_map_copies_and_a_shift_shifts() -> None:
    """Pixel (x + 3, y + 5) of the picture is pixel (x, y) of the output: half a pixel of error would show here."""
    image = picture(1, 112, 112)
    pixels = np.asarray(image)
    np.testing.assert_array_equal(decode_aligned(encoded(image), IDENTITY, 112), pixels)
    shifted = decode_aligned(encoded(image), np.array([[1.0, 0.0, -3.0], [0.0, 1.0, -5.0]]), 112)
    np.testing.assert_array_equal(shifted[:107, :109], pixels[5:, 3:])
    assert not shifted[107:].any(), "what lies outside the picture is black"


def test_a_quarter_turn_turns() -> None:
    """(x, y) -> (111 - y, x): exactly numpy's rotation, so the general path samples at pixel centres."""
    image = picture(2, 112, 112)
    turned = decode_aligned(encoded(image), np.array([[0.0, -1.0, 111.0], [1.0, 0.0, 0.0]]), 112)
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image), k=-1))


@pytest.mark.parametrize("scale", [0.4, 1.0, 1.7, 3.3, 9.0])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_face_seen_at_any_size_and_angle_comes_out_the_same(scale: float, kind: str) -> None:
    """Five bright discs at the landmarks: after alignment their centres of mass are on the template to 0.2 px.

    Scales above 2 make the JPEG decoder shrink and the filter path work: their offsets are what is tested.
    """
    turn = 0.3
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    side = int(200 * scale)
    points = (TEMPLATE_112_PX - 56) @ rotation.T * scale + side / 2
    y, x = np.mgrid[:side, :side]
    canvas = np.zeros((side, side), dtype=np.float64)
    for cx, cy in points:
        canvas += np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * (3.0 * scale) ** 2))
    image = Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8)).convert("RGB")
    payload = encoded(image, kind, **({"quality": 95} if kind == "JPEG" else {}))
    out = decode_aligned(payload, landmark_maps(points[None], 112)[0], 112)[..., 0].astype(np.float64)
    out[out < 16] = 0  # JPEG's ringing
    yy, xx = np.mgrid[:112, :112]
    for cx, cy in TEMPLATE_112_PX:
        near = out * ((xx - cx) ** 2 + (yy - cy) ** 2 < 9**2)
        found = np.array([(near * xx).sum(), (near * yy).sum()]) / near.sum()
        np.testing.assert_allclose(found, [cx, cy], atol=0.2)


@pytest.mark.parametrize("turn", [0.0, 0.5])
def test_shrinking_is_filtered(turn: float) -> None:
    """A fine chequerboard of mean 127.5 shrunk five-fold must be flat grey; sampling without a filter shows moire."""
    board = (np.indices((600, 600)).sum(axis=0) % 2 * 255).astype(np.uint8)
    linear = 0.19 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    affine = np.column_stack([linear, np.array([50.0, 50.0]) - linear @ np.array([300.0, 300.0])])
    out = decode_aligned(encoded(Image.fromarray(board)), affine, 100)[20:80, 20:80]
    assert out.std() < 6
    assert abs(float(out.mean()) - 127.5) < 3


def test_modes_become_rgb() -> None:
    grey = picture(3, 64, 64).convert("L")
    expected = np.stack([np.asarray(grey)] * 3, axis=-1)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    clear = grey.convert("RGBA")
    clear.putalpha(7)
    for payload in (encoded(grey), encoded(deep), encoded(clear), encoded(grey.convert("LA")), encoded(grey, "BMP")):
        np.testing.assert_array_equal(decode_aligned(payload, None, 64), expected)
    for image, kind in ((grey.convert("P"), "PNG"), (grey.convert("CMYK"), "JPEG"), (grey, "WEBP")):
        found = decode_aligned(encoded(image, kind), None, 64)
        assert np.abs(found.astype(int) - expected).mean() < 8, (image.mode, kind)
    palette = grey.convert("P")
    decode_aligned(encoded(palette, transparency=bytes(range(256))), None, 64)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(64, 90), (640, 900)])
def test_the_orientation_flag_is_obeyed(orientation: int, size: tuple[int, int]) -> None:
    """Orientation o means: apply this to see the picture upright. Written turned, it must come out upright."""
    undo = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    upright = picture(4, *size)
    stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    kept = decode_aligned(encoded(stored, "JPEG", quality=95, exif=exif), None, 64)
    plain = decode_aligned(encoded(upright, "JPEG", quality=95), None, 64)
    assert np.abs(kept.astype(int) - plain.astype(int)).mean() < 2


def test_reasons_for_files_that_are_no_pictures(tmp_path: Path) -> None:
    whole = encoded(picture(5), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "ok.jpg").write_bytes(whole)
    assert reason_of(tmp_path, "cut.jpg").startswith("unreadable: ")
    assert reason_of(tmp_path, "empty.jpg") == "empty file"
    assert reason_of(tmp_path, "text.jpg") == "unreadable: not a JPEG, PNG, WebP or BMP picture"
    assert reason_of(tmp_path, "folder.jpg") == "not a file"
    assert reason_of(tmp_path, "pipe.jpg") == "not a file"
    assert reason_of(tmp_path, "none.jpg") == "missing"
    assert reason_of(tmp_path, "ok.jpg") == ""


def test_random_damage_never_stops_the_job(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = []
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        for number in range(40):
            payload = bytearray(encoded(picture(number, 40, 40), kind))
            for place in rng.integers(0, len(payload), 12):
                payload[place] = rng.integers(256)
            names.append(f"{kind}{number}")
            (tmp_path / names[-1]).write_bytes(payload[: rng.integers(1, len(payload) + 1)])
    recipe = Recipe(alignment="resize", image_size=32, box_margin=0.0)
    done = decode_job(Job(root=tmp_path, paths=tuple(names), points=None, recipe=recipe))
    assert len(done.reasons) == len(names)
    assert len(done.pictures) == sum(not reason for reason in done.reasons) < len(names)
    assert not any("\n" in reason for reason in done.reasons)


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 x 20,000 zeros are 50 kB as a PNG and 1.2 GB decoded; PIL itself refuses only above 179 million."""
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("1", (8_000, 8_000)).save(tmp_path / "large.png")
    assert reason_of(tmp_path, "bomb.png").startswith("too many pixels")
    assert reason_of(tmp_path, "large.png") == "too many pixels: 8000 x 8000"
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 100)
    assert reason_of(tmp_path, "large.png").startswith("file too large")


def test_only_picture_formats_that_start_no_program_are_opened(tmp_path: Path) -> None:
    picture(6, 30, 30).save(tmp_path / "a.eps")
    picture(6, 30, 30).save(tmp_path / "a.tga")
    assert reason_of(tmp_path, "a.eps").startswith("unreadable: not a JPEG")
    assert reason_of(tmp_path, "a.tga").startswith("unreadable: not a JPEG")


def test_a_face_that_is_absent_or_elsewhere_is_left_out(tmp_path: Path) -> None:
    picture(7).save(tmp_path / "a.png")
    away = (TEMPLATE_112_PX + 1000).astype(np.float32)[None]
    nowhere = np.full((1, 5, 2), np.nan, dtype=np.float32)
    assert reason_of(tmp_path, "a.png", "landmarks", away) == "face outside the picture"
    assert reason_of(tmp_path, "a.png", "landmarks", nowhere) == "no landmarks or box"
    assert reason_of(tmp_path, "a.png", "box", np.array([[0, 0, 0, 0]], dtype=np.float32)) == "no landmarks or box"
    assert reason_of(tmp_path, "a.png", "landmarks", TEMPLATE_112_PX.astype(np.float32)[None]) == ""
