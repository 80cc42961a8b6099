"""Laws of images in a column: what every mode becomes, where images may lie, and one line for each that is broken."""

import io
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fedtri.data import images, load_pool
from fedtri.data.pool import Source
from fedtri.errors import FedtriError
from fedtri.tasks.images import pool
from tiny_images import save_images


def stored(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def kept(data: bytes) -> dict:
    return {"bytes": data, "path": None, "name": "x.csv, example 7"}


def filled(mode: str, value) -> Image.Image:
    return Image.new(mode, (2, 2), value)


def palette() -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


MODES = {
    "black and white": (stored(filled("1", 1)), (255, 255, 255)),
    "grey": (stored(filled("L", 77)), (77, 77, 77)),
    "grey, half clear": (stored(filled("LA", (100, 0))), (255, 255, 255)),
    "palette": (stored(palette()), (10, 20, 30)),
    "palette, clear": (stored(palette(), transparency=1), (255, 255, 255)),
    "colour": (stored(filled("RGB", (1, 2, 3))), (1, 2, 3)),
    "colour, one of them clear": (stored(filled("RGB", (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
    "colour, a fifth opaque": (stored(filled("RGBA", (0, 255, 0, 51))), (204, 255, 204)),
    "four inks": (stored(filled("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "16 bits": (stored(Image.fromarray(np.full((2, 2), 257 * 200, np.uint16))), (200, 200, 200)),
    "16 bits, the most": (stored(Image.fromarray(np.full((2, 2), 65535, np.uint16))), (255, 255, 255)),
    "32 bits": (stored(Image.fromarray(np.full((2, 2), 257 * 9, np.int32)), "TIFF"), (9, 9, 9)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    """Seen to fail with convert("RGB") alone: what is clear shows its hidden colour, 16 bits are cut at 255."""
    data, expected = MODES[mode]
    found = images.opened(kept(data))
    assert (found.mode, found.size, found.getpixel((0, 0))) == ("RGB", (2, 2), expected)


def test_a_photo_stands_upright():
    """Seen to fail without exif_transpose: the red row lies on the wrong side."""
    image = Image.new("RGB", (4, 2))
    image.paste((255, 0, 0), (0, 0, 4, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter, clockwise
    found = images.opened(kept(stored(image, exif=exif)))
    assert found.size == (2, 4)
    assert found.getpixel((1, 0)) == (255, 0, 0)


WHOLE = stored(Image.effect_noise((64, 64), 50))
BROKEN = {
    "cut short": (WHOLE[: len(WHOLE) // 2], ""),
    "a chunk spoiled": (WHOLE[:20] + b"\0" * 30 + WHOLE[50:], ""),
    "no image": (b"<html>404</html>", "it is no image in a format that Pillow knows"),
    "no known range": (stored(filled("F", 0.5), "TIFF"), "32-bit floating point has no known range"),
    "too large": (stored(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"), "32-bit integers beyond 16 bits"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_image_is_one_line_that_names_it(how):
    data, reason = BROKEN[how]
    with pytest.raises(FedtriError) as caught:
        images.opened(kept(data))
    said = str(caught.value)
    assert said.startswith(f"x.csv, example 7: cannot be read as an image: {reason}")
    assert "\n" not in said


def test_an_image_of_absurd_size_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(action="ignore"), pytest.raises(FedtriError, match="cannot be read as an image"):
        images.opened(kept(WHOLE))


def written(folder, where: str):
    """The same twelve red and blue images in every way they may be kept; returns the `data` setting."""
    files = save_images(folder / "pictures", 6)
    paths = sorted(str(path.relative_to(folder)) for path in files.glob("*/*.png"))
    labels = [path.split("/")[1] for path in paths]
    match where:
        case "folder":
            return files
        case "csv":
            rows = "".join(f"{path},{label}\n" for path, label in zip(paths, labels, strict=True))
            (folder / "list.csv").write_text(f"image,label\n{rows}")
            return folder / "list.csv"
        case "bytes":
            data = [(folder / path).read_bytes() for path in paths]
            parquet.write_table(pa.table({"image": data, "label": labels}), folder / "data.parquet")
        case "datasets":
            names = datasets.ClassLabel(names=["red", "blue"])
            features = datasets.Features({"image": datasets.Image(), "label": names})
            rows = {"image": [{"bytes": (folder / path).read_bytes(), "path": path} for path in paths]}
            table = datasets.Dataset.from_dict({**rows, "label": [names.str2int(name) for name in labels]}, features)
            table.to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


@pytest.mark.parametrize("where", ["folder", "csv", "bytes", "datasets"])
def test_images_may_lie_in_a_folder_a_list_or_a_parquet_file(where, tmp_path, monkeypatch):
    """Seen to fail with paths taken from the working directory, and with numbers for the classes of a Parquet file."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = load_pool(str(written(tmp_path, where)), pool)
    assert found.label_names == (("red", "blue") if where == "datasets" else ("blue", "red"))
    for image, label in zip(found.table["image"], found.labels, strict=True):
        red, _, blue = np.asarray(images.opened(image)).mean((0, 1))
        assert (red > blue) == (found.label_names[label] == "red")


def test_the_line_of_a_broken_image_stays_its_own_where_few_are_drawn(tmp_path):
    """Seen to fail with the number of the row after the draw."""
    data = [WHOLE] * 9 + [b"nonsense"]
    parquet.write_table(pa.table({"image": data, "label": ["a", "b"] * 5}), tmp_path / "d.parquet")
    found = load_pool(str(tmp_path / "d.parquet"), pool, limit=9, seed=2)
    with pytest.raises(FedtriError, match=r"d\.parquet, example 10: cannot be read"):
        [images.opened(image) for image in found.table["image"]]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([1, 2]), 'column "image" holds int64, expected images'),
        (pa.array([WHOLE, None]), 'column "image" holds no image in example 2'),
        (pa.array(["a.png", ""]), 'column "image" holds no image in example 2'),
        (pa.array([{"x": 1}, {"x": 2}]), 'column "image" holds struct<x: int64>, expected images'),
    ],
)
def test_a_column_without_images_is_one_line(column, said):
    with pytest.raises(FedtriError) as caught:
        images.images(Source("t", "t.parquet", pa.table({"image": column, "label": ["a", "b"]})))
    assert str(caught.value).startswith(f"t.parquet: {said}")


def test_the_digits_are_all_there():
    found = load_pool("digits", pool)
    assert found.label_names == tuple("0123456789")
    assert np.bincount(found.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    first = np.asarray(images.opened(found.table["image"][0]))
    assert first.shape == (8, 8, 3)
    assert first[0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 sixteenths of ink
    with pytest.raises(FedtriError, match="has its own columns"):
        load_pool("digits", pool, columns={"image": "image"})
