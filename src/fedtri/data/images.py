"""Finds the images in a column, and opens each of them as 8-bit RGB.

A column holds the bytes of image files, images as `datasets` keeps them (bytes or a path), or paths that start at the
data file's folder. An image is changed as follows: it is turned upright by its EXIF orientation; 16-bit grey is divided
by 257; transparent parts become white; Pillow converts any other mode (black and white, grey, palette, CMYK, YCbCr) to
RGB; of several frames the first is taken. Images without a known range are refused: 32-bit floating point, and 32-bit
integers above 16 bits.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from fedtri.data.pool import Source, column
from fedtri.errors import FedtriError

KEPT = pa.struct({"bytes": pa.binary(), "path": pa.string(), "name": pa.string()})
"""An image in a pool: the bytes of its file or else its path, and the name that errors give it."""
BROKEN = (OSError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for a damaged file. Tried: files of six formats, cut short or overwritten at many places."""


def images(source: Source, role: str = "image") -> pa.Array:
    """A role's column of images, each as `KEPT`. None of them is opened yet.

    Raises FedtriError if the column holds something else, or an example has no image.
    """
    name = column(source, role)
    values = source.table[name]
    text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    binary = pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)
    both = pa.types.is_struct(values.type) and {"bytes", "path"} <= {field.name for field in values.type}
    if not (text or binary or both):
        raise FedtriError(
            f'{source.where}: column "{name}" holds {values.type}, expected images: paths, files\' bytes, or '
            f"`datasets`' own; see columns.{role}"
        )
    folder = Path(source.where).parent if Path(source.where).is_file() else Path()
    rows = []
    for number, value in enumerate(values.to_pylist(), start=1):
        value = value if isinstance(value, dict) else {"bytes": value} if binary else {"path": value}
        data, path = value.get("bytes"), value.get("path")
        if not (data or path):
            raise FedtriError(
                f'{source.where}: column "{name}" holds no image in example {number}; fill the row in or remove it'
            )
        where = f"{source.where}, example {number}" + (f" ({path})" if path else "")
        rows.append({"bytes": data or None, "path": str(folder / path) if path and not data else None, "name": where})
    return pa.array(rows, KEPT)


def opened(image: Mapping[str, Any]) -> Image.Image:
    """One image of a pool, as RGB. Raises FedtriError that names the image if it cannot be read."""
    try:
        with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as found:
            return rgb(ImageOps.exif_transpose(found))
    except BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it is no image in a format that Pillow knows"
        raise FedtriError(
            f"{image['name']}: cannot be read as an image: {reason}; replace the file or remove the example"
        ) from None


def rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, by the rules above. Raises ValueError if its range is not known."""
    if image.mode == "F":
        raise ValueError("32-bit floating point has no known range, save it as 8-bit")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit integers beyond 16 bits have no known range, save it as 8-bit")
        return Image.fromarray(np.round(grey / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.convert("RGB")
