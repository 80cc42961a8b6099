"""The embedded images: scikit-learn's bundled digits, 1,797 grey images of 8 × 8 pixels, ten classes "0" to "9".

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI machine learning repository (the test
set). The 17 levels of ink become grey values from 0 to 255, white on black.
"""

import io
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fedtri.data.pool import Source


def load() -> Source:
    """The digits, each as the bytes of a PNG file, and their labels."""
    from sklearn.datasets import load_digits  # 1 s to import, which only a run should pay

    found: Any = load_digits()
    grey = np.round(found.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    table = pa.table({"image": [_png(image) for image in grey], "label": found.target})
    return Source("digits", 'data "digits"', table, names={"label": {n: str(n) for n in range(10)}})


def _png(grey: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    return file.getvalue()
