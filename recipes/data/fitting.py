"""Whether a sample can be encoded, told for nearly all of them without opening a picture.

A text has at most so many tokens as bounds on its characters say, and a picture as many as the
processor says for its size. Where these do not decide, the sample is encoded as training would.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vqguard.files import text_sha256
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.data.image_roots import Size
from vqguard.recipes.data.media.video_inputs import video_inputs
from vqguard.recipes.data.records.forms import Span
from vqguard.recipes.data.samples import IMAGE_MARK, VIDEO_MARK, Sample
from vqguard.videos import Clip, ClipSize

_EXPANSION = 11
"""Bytes of UTF-8 that one byte may become in a normal form (Unicode FAQ, "Normalization": NFKC and
NFKD at most 11 times); a token has at least one."""
_SLACK = 16
"""Tokens that a tokenizer may add: its beginning, an end, a blank in front of a text."""
_WORDS = 3
"""Of so many words one at least is a token's own, or more than one token's."""
_HOUR = 3600.0
"""Seconds; some processors write the time of each frame, so a longer video has longer numbers."""
_PROBES: tuple[Size, ...] = ((336, 336), (640, 480), (480, 640), (1500, 400), (64, 48))


class Fitting:
    """The check of a run's samples before it trains, as `records.checked.CheckSample`.

    Args:
        processor: a transformers processor with a chat template and a fast tokenizer.
        stage1: stage 1's longest sequence in tokens, for samples with pictures.
        stage2: stage 2's, for all.
    """

    def __init__(self, processor: Any, stage1: int, stage2: int) -> None:
        self._encoders = [EncodedSamples([], processor, length) for length in (stage1, stage2)]
        self._template = self._encoders[0].template
        self._processor = processor
        self._image_token = str(getattr(processor, "image_token", None) or "")
        self._tokens = (self._image_token, str(getattr(processor, "video_token", None) or ""))
        self._clips: dict[ClipSize, int] = {}
        self._extra = self._overhead()
        self._known: dict[tuple[Size, ...], int] = {}
        self.identity = text_sha256(
            json.dumps(
                [
                    type(processor).__name__,
                    self._template.template,
                    len(processor.tokenizer),
                    processor.image_processor.to_dict(),
                    _settings(getattr(processor, "video_processor", None)),
                    stage1,
                    stage2,
                ],
                sort_keys=True,
                default=str,
            )
        )

    def __call__(self, sample: Sample) -> None:
        """Raise `DataError` for a sample that a stage could not encode."""
        encoders = self._encoders if sample.images or sample.videos else self._encoders[1:]
        shortest = min(encoders, key=lambda encoder: encoder.max_length)
        for epoch in range(len(sample.wordings)):
            worded = sample.in_epoch(epoch)
            if not self._surely(worded, shortest):
                shortest.example(worded)  # as training does

    def _surely(self, sample: Sample, encoder: EncodedSamples) -> bool:
        """Whether the first turn fits with its pictures, an answer's token among it."""
        text, spans = self._template.conversation(sample)
        images, videos = (text.count(token) if token else 0 for token in self._tokens)
        encoder.check_placeholders(sample, images, videos)
        if not self._has_label(text, spans[0]):
            return False
        _, end = spans[0]
        sizes = self._shown_first(sample)
        if sizes is None:
            return False
        room = encoder.max_length - self._picture_tokens(sizes[0]) - self._clip_tokens(sizes[1])
        if _most_tokens(text[:end]) <= room:
            return True
        return (
            len(self._processor.tokenizer(text[:end], verbose=False)["input_ids"]) + _SLACK <= room
        )

    def _shown_first(self, sample: Sample) -> tuple[Sequence[Size], Sequence[ClipSize]] | None:
        """The sizes of what the first turn shows; None where these are not known."""
        first, _ = sample.turns[0]
        images, videos = first.count(IMAGE_MARK), first.count(VIDEO_MARK) if sample.videos else 0
        for number, sizes, token in zip(
            (images, videos), (sample.sizes, sample.clip_sizes), self._tokens, strict=True
        ):
            if number and (len(sizes) < number or not token):
                return None
        return sample.sizes[:images], sample.clip_sizes[:videos]

    def _has_label(self, text: str, span: Span) -> bool:
        """Whether a token lies within an answer; the one at its start may begin before it."""
        start, end = span
        answer = text[start:end]
        if answer.endswith(self._template.special) or len(answer.split()) >= _WORDS:
            return True
        near = self._processor.tokenizer(
            text[: end + _SLACK], return_offsets_mapping=True, verbose=False
        )
        return any(start <= a < b <= end for a, b in near["offset_mapping"])

    def _picture_tokens(self, sizes: Sequence[Size]) -> int:
        """At most so many tokens stand for pictures of these sizes, in whichever way they lie."""
        if not sizes:
            return 0
        key = tuple(sizes)
        if key not in self._known:
            turned = tuple((height, width) for width, height in sizes)  # as EXIF may ask for
            self._known[key] = max(map(self._counted, (key, turned)))
        return self._known[key]

    def _clip_tokens(self, clips: Sequence[ClipSize]) -> int:
        """At most so many tokens stand for such videos, in whichever way they lie."""
        for clip in set(clips) - self._clips.keys():
            frames, width, height, _ = clip
            lying = {(height, width), (width, height)}
            self._clips[clip] = max(self._filmed(frames, *sides) for sides in lying)
        return sum(self._clips[clip] for clip in clips)

    def _filmed(self, frames: int, height: int, width: int) -> int:
        """The tokens that the processor writes for a blank video, an hour long."""
        blank = np.zeros((frames, height, width, 3), dtype=np.uint8)
        clip = Clip(blank, tuple(np.linspace(0, _HOUR, frames).tolist()), _HOUR)
        inputs = video_inputs([clip])
        return len(self._processor(text=[self._tokens[1]], **inputs)["input_ids"][0])

    def _counted(self, sizes: Sequence[Size]) -> int:
        if self._extra is None:
            return self._written(sizes)
        return sum(self._said(sizes)) + self._extra * len(sizes)

    def _said(self, sizes: Sequence[Size]) -> list[int]:
        """The processor's own counts; vLLM plans with them."""
        counts = self._processor._get_num_multimodal_tokens(
            image_sizes=[(height, width) for width, height in sizes]
        )
        return [int(count) for count in counts["num_image_tokens"]]

    def _overhead(self) -> int | None:
        """Tokens that the processor writes around a picture's; None where it gives no counts."""
        if not (self._image_token and hasattr(self._processor, "_get_num_multimodal_tokens")):
            return None
        try:
            said = [self._said([size])[0] for size in _PROBES]
            extra = [
                self._written([size]) - count for size, count in zip(_PROBES, said, strict=True)
            ]
        except Exception:  # a private method of a hundred processors
            return None
        return max(extra) if min(extra) >= 0 else None

    def _written(self, sizes: Sequence[Size]) -> int:
        """The tokens that the processor writes for blank pictures of these sizes."""
        blanks = [Image.new("RGB", size) for size in sizes]
        text = self._image_token * len(blanks)
        return len(self._processor(images=blanks, text=[text])["input_ids"][0])


def _most_tokens(text: str) -> int:
    """An upper bound on a text's tokens."""
    if text.isascii():
        return len(text) + _SLACK
    return _EXPANSION * len(text.encode()) + _SLACK


def _settings(part: Any) -> Any:
    return None if part is None else part.to_dict()
