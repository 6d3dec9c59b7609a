"""One way to open a picture: what it holds, and what it refuses."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from vispec.cli import UserError
from vispec.pictures import OutsideFolder, UnreadableImage, picture_path, read_picture


def saved(image: Image.Image, format: str = "PNG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def palette(colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("P", (4, 4))
    image.putpalette(colour * 256)
    return image


def grey(value: float, dtype: type) -> Image.Image:
    return Image.fromarray(np.full((4, 4), value, dtype))


@pytest.mark.parametrize(
    ("file", "colour", "without_white"),
    [
        (saved(Image.new("RGBA", (4, 4), (0, 0, 0, 0))), (255, 255, 255), (0, 0, 0)),
        (saved(Image.new("RGBA", (4, 4), (9, 8, 7, 255))), (9, 8, 7), (9, 8, 7)),
        (saved(Image.new("LA", (4, 4), (0, 128))), (127, 127, 127), (0, 0, 0)),
        (saved(palette((10, 20, 30)), transparency=0), (255, 255, 255), (10, 20, 30)),
        (saved(palette((10, 20, 30))), (10, 20, 30), (10, 20, 30)),
        (saved(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255), (1, 2, 3)),
        (saved(Image.new("1", (4, 4), 1)), (255, 255, 255), (255, 255, 255)),
        (saved(grey(32768, np.uint16)), (128, 128, 128), (128, 128, 128)),
        (saved(grey(200, np.int32), "TIFF"), (200, 200, 200), (200, 200, 200)),
        (saved(grey(65535, np.int32), "TIFF"), (255, 255, 255), (255, 255, 255)),
        (saved(grey(0.5, np.float32), "TIFF"), (127, 127, 127), (127, 127, 127)),
        (saved(grey(32768, np.float32), "TIFF"), (127, 127, 127), (127, 127, 127)),
        (saved(grey(np.nan, np.float32), "TIFF"), (0, 0, 0), (0, 0, 0)),
        (saved(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "JPEG"), (255, 255, 255), (255, 255, 255)),
    ],
)
def test_colours_of_every_mode(file, colour, without_white):
    for on_white, expected in ((True, colour), (False, without_white)):
        file.seek(0)
        picture = read_picture(file, on_white)
        assert picture.mode == "RGB" and picture.getpixel((0, 0)) == expected


@pytest.mark.parametrize("note", [b"Exif\0\0II*\0", b"Exif\0\0garbage!", b"Exif\0\0"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_broken_note_on_the_orientation_is_ignored(note, format):
    assert read_picture(saved(Image.new("RGB", (60, 40)), format, exif=note)).size == (60, 40)


def test_photographs_are_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_picture(saved(Image.new("RGB", (60, 40)), "JPEG", exif=exif)).size == (40, 60)


def odd_dds() -> io.BytesIO:
    """A DDS file whose pixel format no decoder knows."""
    header = struct.pack("<4I", 124, 0x1007, 4, 4) + bytes(56) + struct.pack("<8I", 32, 0x4, 0x21212121, 0, 0, 0, 0, 0)
    return io.BytesIO(b"DDS " + header + bytes(200))


def cut(format: str) -> io.BytesIO:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    return io.BytesIO(saved(Image.fromarray(noise), format).getvalue()[:3000])


@pytest.mark.parametrize(
    "file",
    [io.BytesIO(b""), io.BytesIO(b"no picture"), odd_dds(), *map(cut, ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"))],
)
def test_what_cannot_be_read_has_one_line(file):
    with pytest.raises(UnreadableImage) as caught:
        read_picture(file)
    assert str(caught.value) and "\n" not in str(caught.value)


def test_places_that_hold_no_picture(tmp_path):
    for place, message in (("gone.png", "no such file"), ("", "IsADirectoryError"), ("a\0.png", "null")):
        with pytest.raises(UnreadableImage, match=message):
            read_picture(f"{tmp_path}/{place}")


def test_formats_that_start_programs_are_refused():
    with pytest.raises(UnreadableImage, match="no picture, or none of"):
        read_picture(saved(Image.new("RGB", (4, 4)), "EPS"))


def test_pictures_of_too_many_pixels_are_not_decoded(monkeypatch):
    file = saved(Image.new("1", (300, 200)))
    monkeypatch.setenv("VISPEC_MAX_PIXELS", "59999")
    with pytest.raises(UnreadableImage, match="300 x 200 pixels are more than 59999 .VISPEC_MAX_PIXELS"):
        read_picture(file)
    monkeypatch.setenv("VISPEC_MAX_PIXELS", "60000")
    assert read_picture(file).size == (300, 200)
    monkeypatch.setenv("VISPEC_MAX_PIXELS", "60k")  # no fault of the picture's, which would be left out
    with pytest.raises(UserError, match="VISPEC_MAX_PIXELS must be a whole number, found '60k'"):
        read_picture(file)


@pytest.mark.parametrize("name", ["../a.png", "b/../../a.png", "/etc/a.png"])
def test_names_that_lead_out_of_the_folder(tmp_path, name):
    with pytest.raises(OutsideFolder, match=f"{name} is outside of the data folder {tmp_path}"):
        picture_path(tmp_path, name)
    assert picture_path(tmp_path, name, allow_outside=True) == tmp_path / name


def test_a_link_inside_the_folder_may_lead_elsewhere(tmp_path):
    elsewhere, folder = tmp_path / "blob", tmp_path / "data"
    Image.new("RGB", (4, 4), (1, 2, 3)).save(elsewhere, "PNG")
    folder.mkdir()
    (folder / "a.png").symlink_to(elsewhere)
    assert read_picture(picture_path(folder, "a.png")).getpixel((0, 0)) == (1, 2, 3)
