"""Samples to tensors: chat template, image tokens, labels masked to the answers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import Dataset

from vqguard.adapters.codes import VisualCodes
from vqguard.adapters.seams import stack_if_even
from vqguard.errors import DataError
from vqguard.recipes.data.chat import ChatTemplate
from vqguard.recipes.data.media.video_inputs import require_videos, video_inputs, video_token_id
from vqguard.recipes.data.samples import IMAGE_MARK, Sample

if TYPE_CHECKING:
    from vqguard.recipes.data.code_cache import CodeCache, KeptCodes
    from vqguard.recipes.data.feature_cache import FeatureCache

IGNORED = -100
ENCODER_TOKENS, ENCODER_SEMANTIC = "encoder_tokens", "encoder_semantic"
CODES = "visual_codes"
"""`VisualCodes`, in an item and in a batch."""
CAPTION_PICTURES, CAPTION_VIDEOS = "caption_pictures", "caption_videos"
CAPTION = ("caption_ids", "caption_mask", CAPTION_PICTURES, CAPTION_VIDEOS)
"""What a batch holds for stage 1's semantic loss; the model does not take it."""
Example = dict[str, Any]


class Whole(NamedTuple):
    """A sample that fits, before its text is cut."""

    sample: Sample
    """Without the turns whose pictures would be cut."""
    example: Example
    spans: list[tuple[int, int]]
    """From where to where each picture's tokens lie in `input_ids`."""


class EncodedSamples(Dataset[Example]):
    """Samples as a torch dataset, encoded when they are asked for.

    An item holds `input_ids`, `labels` (`IGNORED` outside the answers), `caption_ids` (a
    list for each turn with pictures or videos), `caption_pictures` and `caption_videos` (how many
    that turn shows) and, with those, whatever the processor gives (`pixel_values` …), or with a
    cache the vision encoder's outputs (`encoder_tokens`, `encoder_semantic`: a list, one a
    picture), or `visual_codes`.

    Args:
        samples: what to encode.
        processor: a transformers processor with a chat template and a fast tokenizer.
        max_length: longest sequence in tokens. The end of a longer one is cut; turns whose pictures
            would be cut are left out.
        cache: the vision encoder's outputs of these samples' pictures.
        codes: what a frozen guard makes of them; then nothing else of them is read.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Any,
        max_length: int,
        cache: FeatureCache | None = None,
        codes: CodeCache | None = None,
    ) -> None:
        self.template = ChatTemplate(processor)
        self.samples = samples
        self.processor = processor
        self.max_length = max_length
        self.cache = cache
        self.codes = codes
        self.image_id = image_token_id(processor)
        self.video_id = video_token_id(processor)
        self.epoch = 0
        """Which pass over the samples begins: it decides between a sample's wordings."""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        return self.example(self.samples[index].in_epoch(self.epoch))

    def example(self, sample: Sample) -> Example:
        """A sample's item.

        Raises:
            DataError: it does not fit into `max_length`, or does not go with the processor.
        """
        sample, example, _ = self.whole(sample)
        for name, value in example.items():
            if name in ("input_ids", "labels"):
                example[name] = value[: self.max_length]
            elif is_per_token(name):
                example[name] = value[:, : self.max_length]
        shown = sample.captions
        said = [self.template.as_text(answer) for _, answer in shown]
        texts = [self.processor.tokenizer(answer)["input_ids"] for answer in said]
        example["caption_ids"] = [ids[: self.max_length] for ids in texts]
        example[CAPTION_PICTURES] = [count for count, _ in shown]
        example[CAPTION_VIDEOS] = list(sample.caption_videos)
        if all(label == IGNORED for label in example["labels"]):
            raise DataError(
                f"sample {sample.id}: no answer token is left within {self.max_length} tokens. "
                "Raise max_length or shorten the sample."
            )
        return example

    def whole(self, sample: Sample) -> Whole:
        """The sample without the turns whose pictures would be cut, and its encoding.

        Raises:
            DataError: its first turn's pictures do not fit, or it does not go with the processor.
        """
        kept = self.codes[sample.id] if sample.images and self.codes is not None else None
        while kept is not None and len(sample.images) > kept.layout.pictures:
            sample = sample.without_last_turn()
        example, spans = self._encode(sample, kept)
        while self._shows(example["input_ids"][self.max_length :]):
            # A picture whose placeholders are cut has nowhere to go: its turn goes with it.
            if len(sample.turns) == 1:
                raise DataError(
                    f"sample {sample.id}: {_shown(sample)} do not fit into {self.max_length} "
                    "tokens. Raise max_length, or use smaller or fewer of them"
                    f"{', or fewer video_frames' if sample.videos else ''}."
                )
            sample = sample.without_last_turn()
            example, spans = self._encode(sample, kept)
        return Whole(sample, example, spans)

    def _shows(self, ids: list[int]) -> bool:
        """Whether a picture's or a video's tokens are among these."""
        return any(token is not None and token in ids for token in (self.image_id, self.video_id))

    def _encode(
        self, sample: Sample, codes: KeptCodes | None
    ) -> tuple[Example, list[tuple[int, int]]]:
        """The whole sample, whatever its length, and where its pictures' tokens are."""
        text, answers = self.template.conversation(sample)
        flat = self.processor.tokenizer(text, return_offsets_mapping=True, verbose=False)
        labels = [
            token if any(a <= start and end <= b and end > start for a, b in answers) else IGNORED
            for token, (start, end) in zip(flat["input_ids"], flat["offset_mapping"], strict=True)
        ]
        ids = list(flat["input_ids"])
        self.check_placeholders(sample, ids.count(self.image_id), ids.count(self.video_id))
        example: Example = {}
        spans: list[tuple[int, int]] = []
        if codes is not None:
            example = {CODES: codes.codes, **codes.others}
            for name in codes.per_token:
                row, _, _ = self._write_in(ids, labels, codes.written(name), text=0)
                example[name] = torch.tensor([row])
            ids, labels, spans = self._write_in(ids, labels, codes.written("input_ids"))
            if hasattr(self.processor, "qformer_tokenizer"):
                example.update(self._instruction(sample))
        elif sample.images and self.cache is not None:
            kept = self.cache[sample.id][: len(sample.images)]
            placeholders = [[self.image_id or 0] * picture.placeholders for picture in kept]
            ids, labels, spans = self._write_in(ids, labels, placeholders)
            example[ENCODER_TOKENS] = [features.tokens for features in kept]
            example[ENCODER_SEMANTIC] = [features.semantic for features in kept]
        elif sample.images or sample.videos:
            shown: dict[str, Any] = {}
            if sample.images:
                shown["images"] = [opener() for opener in sample.images]
            if sample.videos:
                shown |= video_inputs([opener() for opener in sample.videos])
            full = self.processor(text=[text], return_tensors="pt", **shown)
            full_ids = full.pop("input_ids")[0].tolist()
            ids, labels, spans = self._expand(ids, labels, full_ids, sample.id)
            full.pop("attention_mask", None)
            if "qformer_input_ids" in full:
                full.update(self._instruction(sample))
            example.update(full)
        example["input_ids"], example["labels"] = ids, labels
        return example, spans

    def check_placeholders(self, sample: Sample, images: int, videos: int) -> None:
        """Raise `DataError` unless so many image and video tokens in its text go with it."""
        if sample.videos:
            require_videos(self.processor, f"sample {sample.id}")
        if not sample.images and hasattr(self.processor, "qformer_tokenizer"):
            raise DataError(
                f"sample {sample.id}: has no picture, and this model answers about pictures only. "
                "Leave text-only samples out."
            )
        # Some processors put the only picture in front of the text by themselves.
        counts = [("image", len(sample.images), images), ("video", len(sample.videos), videos)]
        for kind, wanted, number in counts:
            if number == wanted or (number == 0 and wanted == 1 and kind == "image"):
                continue
            raise DataError(
                f"sample {sample.id}: expected {wanted} {kind} token(s) under the chat template of "
                f"{self.template.kind}, found {number}. The text may hold the model's own {kind} "
                f"token, or the model may take one {_NOUNS[kind]} a conversation."
            )

    def _instruction(self, sample: Sample) -> Example:
        """What a Q-Former reads: the first question. The answers are for it to find."""
        text = self.template.prompt(sample.turns[0][0].replace(IMAGE_MARK, ""), picture=False)
        read = self.processor.qformer_tokenizer([text], return_tensors="pt")
        return {f"qformer_{name}": read[name] for name in ("input_ids", "attention_mask")}

    def _write_in(
        self,
        ids: list[int],
        labels: list[int],
        pictures: Sequence[list[int]],
        text: int | None = None,
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Put what the processor writes for each picture in the place of its placeholder.

        Without a placeholder the only picture stands in front. With `text` that number stands for
        every token of the text.
        """
        left = iter(pictures)
        full: list[int] = []
        spread: list[int] = []
        spans: list[tuple[int, int]] = []

        def write() -> None:
            written = next(left)
            spans.append((len(full), len(full) + len(written)))
            full.extend(written)
            spread.extend([IGNORED] * len(written))

        if self.image_id not in ids:
            write()
        for token, label in zip(ids, labels, strict=True):
            if token == self.image_id:
                write()
            else:
                full.append(token if text is None else text)
                spread.append(label)
        return full, spread, spans

    def _expand(
        self, ids: list[int], labels: list[int], full: list[int], name: str
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Give every token of the processor's output its label; a picture's tokens have none.

        The texts between pictures are found in order, the last one at the end.
        """
        texts = _split(ids, {self.image_id, self.video_id})
        spread = [IGNORED] * len(full)
        spans: list[tuple[int, int]] = []
        place = read = 0
        for number, text in enumerate(texts):
            last = number == len(texts) - 1
            at = len(full) - len(text) if last else _find(full, text, place, exact=number == 0)
            if at < place or full[at : at + len(text)] != text:
                raise DataError(
                    f"sample {name}: the processor's tokens are not the tokenizer's with pictures "
                    f"put in (they part after token {place}), so the answers cannot be located."
                )
            spread[at : at + len(text)] = labels[read : read + len(text)]
            if number or last:
                spans.append((place, at))
            place = at + len(text)
            read += len(text) + 1
        return full, spread, spans


_NOUNS = {"image": "picture", "video": "video"}


def _shown(sample: Sample) -> str:
    kinds = [("pictures", sample.images), ("videos", sample.videos)]
    return "its " + " and ".join(kind for kind, openers in kinds if openers)


def image_token_id(processor: Any) -> int | None:
    """The id of a picture's placeholder in the text; None where the processor names none."""
    token = getattr(processor, "image_token_id", None)
    if token is None and getattr(processor, "image_token", None) is not None:
        token = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
    return None if token is None else int(token)


def pad_id(processor: Any) -> int:
    """The id that fills up shorter sequences: the end of text where there is no padding token."""
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id)


def _split(ids: list[int], separators: Collection[int | None]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _find(tokens: list[int], part: list[int], start: int, *, exact: bool) -> int:
    """Where `part` begins in `tokens`, at or after `start`; -1 if nowhere."""
    if exact:
        return start
    places = range(start, len(tokens) - len(part) + 1)
    return next((at for at in places if tokens[at : at + len(part)] == part), -1)


def is_per_token(name: str) -> bool:
    """Whether an input has a number for each token of the text; 0 says that it is text."""
    return name.endswith("token_type_ids")


@dataclass(frozen=True)
class Collator:
    """Pads a list of items on the right; what the image processor gives is put in one row.

    Pictures of all items follow one another, and so do the captions: `caption_ids` and
    `caption_mask` (G, T) for the G turns that show pictures or videos, `caption_pictures` and
    `caption_videos` (G,) for how many each shows. Other inputs are concatenated; where their shapes
    differ behind the first dimension (tiles, patches), zeros fill them up.
    """

    pad_token_id: int

    def __call__(self, items: Sequence[Example]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "input_ids": _pad([i["input_ids"] for i in items], self.pad_token_id),
            "labels": _pad([i["labels"] for i in items], IGNORED),
            "attention_mask": _pad([[1] * len(i["input_ids"]) for i in items], 0),
        }
        captions = [ids for item in items for ids in item["caption_ids"]]
        if captions:
            batch["caption_ids"] = _pad(captions, self.pad_token_id)
            batch["caption_mask"] = _pad([[1] * len(ids) for ids in captions], 0)
            for name in (CAPTION_PICTURES, CAPTION_VIDEOS):
                counts = [count for item in items for count in item[name]]
                batch[name] = torch.tensor(counts)
        tokens = [features for item in items for features in item.get(ENCODER_TOKENS, ())]
        if tokens:
            batch[ENCODER_TOKENS] = stack_if_even(tokens)
            kept = [features for item in items for features in item.get(ENCODER_SEMANTIC, ())]
            batch[ENCODER_SEMANTIC] = torch.stack(kept)
        codes = [item[CODES] for item in items if CODES in item]
        if codes:
            batch[CODES] = VisualCodes.joined(codes)
        taken = {"input_ids", "labels", *CAPTION, ENCODER_TOKENS, ENCODER_SEMANTIC, CODES}
        return {**batch, **joined_inputs(items, taken)}


def joined_inputs(
    items: Sequence[Example], taken: Collection[str], *, left: bool = False
) -> dict[str, torch.Tensor]:
    """What a processor gave for each item beside its text, in one batch.

    Pictures of all items follow one another; zeros fill up shapes that differ.

    Args:
        items: each with `input_ids`, a list.
        taken: names that are left out.
        left: the texts are padded on the left.
    """
    batch: dict[str, torch.Tensor] = {}
    for key in sorted({key for item in items for key in item}.difference(taken)):
        if is_per_token(key):
            rows = [i[key][0].tolist() if key in i else [0] * len(i["input_ids"]) for i in items]
            batch[key] = _pad(rows, 0, left=left)
        else:
            batch[key] = _join([item[key] for item in items if key in item])
    return batch


def _pad(rows: Sequence[Sequence[int]], filler: int, *, left: bool = False) -> torch.Tensor:
    length = max(len(row) for row in rows)
    padding = [[filler] * (length - len(row)) for row in rows]
    return torch.tensor(
        [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, padding, strict=True)]
    )


def _join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after the other along the first dimension, filled up with zeros along the others."""
    shapes = {tensor.shape[1:] for tensor in tensors}
    if len(shapes) == 1:
        return torch.cat(list(tensors))
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    joined = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), *largest)
    start = 0
    for tensor in tensors:
        place = (slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))
        joined[place] = tensor
        start += len(tensor)
    return joined
