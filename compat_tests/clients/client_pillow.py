"""Pillow: images travel to workers and back, and thumbnails are written by them."""

import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter

from compat_tests.clients.doors import Doors, worked, workload


def _images() -> list[Image.Image]:
    return [Image.linear_gradient("L").rotate(11 * turn).convert("RGB").resize((300, 200)) for turn in range(10)]


def blur(image: Image.Image) -> Image.Image:
    worked()
    return image.filter(ImageFilter.GaussianBlur(3))


def thumbnail(path: str) -> tuple[str, tuple[int, int]]:
    worked()
    with Image.open(path) as image:
        image.thumbnail((64, 64))
        image.save(path.replace(".png", ".thumbnail.png"))
        return Path(path).name, image.size


@workload
def filters(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        return [(image.mode, image.size, image.tobytes()) for image in executor.map(blur, _images())]


@workload
def thumbnails(doors: Doors) -> Any:
    with tempfile.TemporaryDirectory() as folder, doors.Pool() as pool:
        for number, image in enumerate(_images()):
            image.save(Path(folder, f"{number}.png"))
        made = sorted(pool.imap_unordered(thumbnail, map(str, sorted(Path(folder).glob("*.png")))))
        return made, [path.read_bytes() for path in sorted(Path(folder).glob("*.thumbnail.png"))]
