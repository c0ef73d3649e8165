"""Tables whose rows have images: prepared as evaluation/tables.py does, the images as files beside.

In .jsonl, .json, .csv and .tsv an image is a path, seen from the table's folder; in .parquet and tables of the Hugging
Face hub it may be a struct of its bytes. A prepared row has {"file": "images/DIGEST.png", "width": 640, "height": 480}
in its place.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mergeline.evaluation.splits import blame
from mergeline.evaluation.tables import Row, prepare_table
from mergeline.merging.errors import UserError, did_you_mean
from mergeline.merging.files import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

# Nothing that would start a program (EPS), and nothing rare.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_MOST_PIXELS = 1 << 26  # of an image: 200 MB in memory
_MOST_BYTES = 1 << 28  # of its file


def prepare_images(source: str, out: Path, column: str) -> None:
    """Read a table into the folder `out`, as `prepare_table` does; `column` has the images, each of which is decoded.

    Further columns of images are left out.

    Raises:
        UserError: as of `prepare_table`; a row has no image, or one that is not there, lies outside of the table's
            folder, does not open, or is too large.
    """
    root = None if "://" in source else Path(source)

    def with_file(row: Row, where: str, place: Path) -> Row:
        if row.get(column) is None:
            known = sorted(key for key, value in row.items() if value is not None)
            raise UserError(f"{where} has no '{column}'{did_you_mean(column, known)}")
        data = _bytes(row[column], root, where)
        image, kind = decoded(data, where)
        name = f"images/{hashlib.sha256(data).hexdigest()}.{kind.lower()}"
        (place / "images").mkdir(exist_ok=True)
        if not (place / name).exists():
            write_bytes(place / name, data)
        others = {key: value for key, value in row.items() if not _is_image(value)}
        return {**others, column: {"file": name, "width": image.width, "height": image.height}}

    prepare_table(source, out, change=with_file)


def open_image(path: Path) -> Image:
    """An image of a prepared table, in RGB (raises UserError)."""
    with blame(str(path), OSError):
        data = path.read_bytes()
    return decoded(data, str(path))[0]


def _is_image(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("bytes"), bytes)


def _bytes(value: Any, root: Path | None, where: str) -> bytes:
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        if isinstance(value.get("bytes"), bytes):
            return bytes(value["bytes"])
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: the image is no path, and no struct of bytes; name the column of images")
    if root is None:
        raise UserError(
            f"{where}: the image '{value}' is not in the table itself; download both into a folder"
        )
    parts = PurePosixPath(value)
    if parts.is_absolute() or ".." in parts.parts:
        raise UserError(f"{where}: the image '{value}' must be a path below {root}")
    file = root / parts
    if not file.is_file():
        raise UserError(f"{where}: there is no image {file}")
    with blame(f"{where}: {file}", OSError):
        if file.stat().st_size > _MOST_BYTES:
            raise UserError(f"{where}: {file} has more than {_MOST_BYTES >> 20} MiB; make the image smaller")
        return file.read_bytes()


def decoded(data: bytes, where: str) -> tuple[Image, str]:
    """The image, in RGB and upright, and the format of its file."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise Image.DecompressionBombError
                kind = str(image.format)
                return ImageOps.exif_transpose(image).convert("RGB"), kind
    except bombs:
        raise UserError(
            f"{where}: the image has more than {_MOST_PIXELS >> 20} Mi pixels; make it smaller"
        ) from None
    except UnidentifiedImageError:
        raise UserError(f"{where}: the image does not open as {', '.join(_FORMATS)}") from None
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise UserError(f"{where}: the image does not open ({' '.join(str(error).split())[:200]})") from None
