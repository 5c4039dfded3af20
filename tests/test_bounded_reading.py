"""Files from outside are read by the functions that bound what they read, and by no others."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from .import_graph import read_files

HOMES = {
    "vqguard.bounded",
    "vqguard.text_files",
    "vqguard.images.opening",
    "vqguard.images.image_files",
}
FILES = {name: file for name, file in read_files().items() if name not in HOMES}
# calls that read all there is, or whatever a decoder wants, and who may make them
UNBOUNDED = {
    "json.load": set[str](),
    # what one process of ours tells the other
    "json.loads": {
        "vqguard.recipes.beside",
        "vqguard.recipes.data.media.ahead",
        "vqguard.recipes.data.media.ahead_program",
        "vqguard.recipes.data.unpacking",
        "vqguard.recipes.data.unpacking_program",
        "vqguard.recipes.screening.ray_workers",
    },
    "yaml.load": set[str](),
    "yaml.safe_load": {"vqguard.strict"},  # of what it has written itself
    "tarfile.open": {"vqguard.recipes.data.image_roots"},  # of a counted stream
    "zipfile.ZipFile": {"vqguard.recipes.data.image_roots"},  # the same
    "Image.open": {
        "vqguard.recipes.tiny.glyphs",  # of an installed package
        "vqguard.recipes.tiny.photographs",  # the same
        "vqguard.recipes.tiny.hard_scenes",  # of what it has just compressed
        "vqguard.redteam.corrupted",  # of what it has just compressed
    },
    "read_bytes": {"vqguard.recipes.tiny.openmoji"},  # of an installed package
    "read_text": {
        "vqguard.search.tuning",  # /proc
        "vqguard.recipes.evaluation.machine",  # /proc
        "vqguard.recipes.evaluation.overhead",  # /proc
        "vqguard.recipes.public_sizes",  # of this package
    },
}


def calls(source: str) -> Iterator[str]:
    """Names of `UNBOUNDED` that a file calls; a method by its last name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            owner = getattr(node.func.value, "id", "")
            yield from {name, f"{owner}.{name}"} & UNBOUNDED.keys()


@pytest.mark.parametrize("module", FILES)
def test_no_file_reads_without_a_bound(module: str) -> None:
    found = {name for name in calls(FILES[module].source) if module not in UNBOUNDED[name]}
    assert not found, "use vqguard.bounded, vqguard.text_files or vqguard.images"


def test_such_a_call_is_seen() -> None:
    source = "import json\njson.loads(path.read_text())\nread_text(path, 10, Error)\n"
    assert sorted(calls(source)) == ["json.loads", "read_text"]
