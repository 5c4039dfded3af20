"""Tests of a user's own, in a folder: what the report measures where no embedded world knows it.

`questions.json`   LLaVA's JSON, one question an entry; `task` names the metric it counts for
`attacks.json`     the same; the answer is the opening that an attack on the picture aims at
`screening/`       one folder of images a category; those called `neutral…` must not be flagged
`text.txt`         a text for the language model's perplexity

Each may be missing. Image names start from the folder itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from vqguard.bounded import read_text
from vqguard.errors import DataError, InputError
from vqguard.images import open_image
from vqguard.names import printable
from vqguard.recipes.data.image_roots import FolderRoot
from vqguard.recipes.data.labelled_images import CategoryTable, category_files, category_names
from vqguard.recipes.data.llava_json import read_entries, sample_of
from vqguard.recipes.data.media.named import Looking, Media
from vqguard.recipes.data.samples import IMAGE_MARK, AttackCase, Question, Sample

MAX_TEXT = 64 * 2**20
"""Bytes of the text."""
QUESTIONS, ATTACKS, SCREENING, TEXT = "questions.json", "attacks.json", "screening", "text.txt"


def bare(question: str) -> str:
    """A question without the mark of its picture, which the prompt puts in front again."""
    return question.replace(IMAGE_MARK, "").strip()


def screening_images(folder: Path, category: str) -> Iterator[Image.Image]:
    """The images of a category in a folder of categories, RGB.

    Raises:
        ImageError: an unusable one.
        InputError: there is none.
    """
    table, skipped = CategoryTable(folder), list[str]()
    for path in category_files(folder / category, skipped):
        image = open_image(path)
        table.add(category, read=1)
        yield image
    table.add(category, skipped=len(skipped))
    table.finish(skipped)


class HeldOutSet:
    """The tests in a folder, checked when it is opened.

    Args:
        folder: as the module says.
        follow_links: as of `image_roots.FolderRoot`.

    Raises:
        InputError: no such folder, or nothing in it.
        DataError: an entry that does not fit, with its place.
    """

    def __init__(self, folder: Path, *, follow_links: bool = False) -> None:
        self.folder = folder
        self._media = Media(FolderRoot(folder, follow_links=follow_links))
        if not any((folder / name).exists() for name in (QUESTIONS, ATTACKS, SCREENING, TEXT)):
            raise InputError(
                f"{folder}: expected a folder with {QUESTIONS}, {ATTACKS}, {SCREENING}/ or {TEXT}, "
                "found none of them. Check evaluation.held_out."
            )
        self._questions = self._read(QUESTIONS, task=True)
        self._attacks = self._read(ATTACKS, task=False)
        screening = folder / SCREENING
        self.categories: tuple[str, ...] = (
            tuple(category_names(screening)) if screening.is_dir() else ()
        )

    @property
    def name(self) -> str:
        """What records call it."""
        return printable(self.folder.resolve().name)

    def questions(self, each: int) -> dict[str, list[Question]]:
        """The questions by task, at most `each` of one."""
        questions: dict[str, list[Question]] = {}
        for task, sample in self._questions:
            mine = questions.setdefault(task, [])
            if len(mine) < each:
                (asked, expected), *_ = sample.turns
                mine.append(Question(self._picture(sample), bare(asked), expected))
        return questions

    def attack_cases(self, count: int) -> list[AttackCase]:
        """The first `count` attacks."""
        cases = []
        for _, sample in self._attacks[:count]:
            (request, opening), *_ = sample.turns
            picture = self._picture(sample)
            if picture is None:
                raise DataError(f"{self.folder / ATTACKS} (id {sample.id}): has no 'image'.")
            cases.append(AttackCase(picture, bare(request), opening))
        return cases

    def benign_cases(self, count: int) -> list[AttackCase]:
        """Requests to be answered: it has none."""
        return []

    def _picture(self, sample: Sample) -> Image.Image | None:
        if sample.videos:
            raise DataError(f"{self.folder} (id {sample.id}): tests take pictures, not videos.")
        if len(sample.images) > 1:
            raise DataError(
                f"{self.folder} (id {sample.id}): expected at most one 'image' in a test, got "
                f"{len(sample.images)}."
            )
        return sample.images[0]() if sample.images else None

    def images(self, category: str) -> Iterator[Image.Image]:
        """As `screening_images`."""
        return screening_images(self.folder / SCREENING, category)

    @property
    def text(self) -> str | None:
        """The text, if there is one."""
        path = self.folder / TEXT
        return read_text(path, MAX_TEXT, DataError) if path.exists() else None

    def _read(self, name: str, *, task: bool) -> list[tuple[str, Sample]]:
        path = self.folder / name
        if not path.is_file():
            return []
        kept = []
        look = Looking(self._media, decode=False)
        for number, entry in enumerate(read_entries(path)):
            where = f"{path}, entry {number}"
            sample = sample_of(entry, self._media, where, str(number), look=look)
            named = entry.get("task", "") if task else ""
            if not isinstance(named, str) or (task and not named):
                raise DataError(f"{where}: expected 'task', the name of a metric; got {named!r}.")
            kept.append((named, sample))
        return kept
