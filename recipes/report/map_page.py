"""The page of the images about which two safety maps say different things."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from vqguard.files import replace_text
from vqguard.images import open_image
from vqguard.names import printable
from vqguard.recipes.judging.map_changes import MapDiff, described
from vqguard.recipes.report.templates import rendered

TEMPLATE = "map_page.html.j2"
_THUMBNAIL = 192  # pixels


def write_map_page(diff: MapDiff, path: Path) -> None:
    """An HTML page of the images that flip, each with its picture inside the page.

    Raises:
        ImageError: an image that can no longer be opened.
        OSError: the page cannot be written.
    """
    rows = [
        {
            "picture": _thumbnail(flip.path),
            "image": printable(str(flip.path)),
            "before": printable(described(flip.before)),
            "after": printable(described(flip.after)),
        }
        for flip in diff.flips
    ]
    replace_text(path, rendered(TEMPLATE, rows=rows, images=diff.images))


def _thumbnail(path: Path) -> str:
    image = open_image(path)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
