"""The text side of an adapter: prompts, rows, captions, and the runs that the checks make."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.seams import Seam
from vqguard.errors import InputError, SeamError


class TextSide:
    """What every family's adapter knows of the text. Stateless: every method is given the model."""

    placeholders: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "image": ("image_token_id", "image_token_index"),
        "video": ("video_token_id", "video_token_index"),
    }
    """Names in the config of the tokens that images and videos take the place of."""

    @abstractmethod
    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        """Every place where visual features enter the language model."""

    @abstractmethod
    def language_model(self, model: nn.Module) -> nn.Module:
        """Where visual features enter the language model, and a caption's last state is read."""

    def prompt_ids(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """The prompt's token ids (B, T) among the arguments of `generate` or `forward`."""
        ids = arguments.get("inputs")
        return ids if ids is not None else arguments.get("input_ids")

    def answer_prompt(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
        """What `generate` returns in front of its answer (B, T).

        The prompt's ids, or the decoder's start where an encoder reads the prompt.
        """
        if not getattr(cast(Any, model).config, "is_encoder_decoder", False):
            return self.prompt_ids(arguments)
        start = self.started(model, arguments, "decoder_start_token_id")
        given = arguments.get("decoder_input_ids")
        if given is None or start is None:
            return given if start is None else start
        # As `generate` does it: what does not begin with the start token gets one.
        missing = bool((given[:, :1] != start).all())
        return torch.cat([start, given], dim=1) if missing else cast(Tensor, given)

    def started(self, model: nn.Module, arguments: Mapping[str, Any], name: str) -> Tensor | None:
        """(B, 1): the token that `generate` starts from without a prompt."""
        config = self.generation_config(model)
        token = getattr(config, name, None)
        token = config.bos_token_id if token is None else token
        ids = self.prompt_ids(arguments)
        names = [name for seam in self.seams(model) for name in seam.pixels]
        pixels = [arguments[n] for n in names if arguments.get(n) is not None]
        if token is None or (ids is None and not pixels):
            return None
        like = ids if ids is not None else pixels[0]
        return torch.full((len(like), 1), int(token), dtype=torch.long, device=like.device)

    def generation_config(self, model: nn.Module) -> Any:
        """The config whose end token and lengths `generate` goes by."""
        return cast(Any, model).generation_config

    def user_typed_images(self, model: nn.Module) -> Tensor | None:
        """Token ids that *are* image content and that a user could type; None in most families."""
        return None

    def rows(
        self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any], counts: list[int]
    ) -> list[int]:
        """The batch row of each unit: they fill the placeholders of their kind in order.

        Families without placeholders have as many units in every row.

        Raises:
            InputError: when placeholders and units do not fit.
        """
        if seam.joins not in ("replace", "add"):
            rows = next(len(arguments[n]) for n in seam.pixels if arguments.get(n) is not None)
            return evenly(len(counts), rows, seam.modality)
        ids = self.prompt_ids(arguments)
        if ids is None:
            raise InputError("expected input_ids beside the pixels; use the model's processor")
        slots = self.slots(model, seam, ids).sum(-1).tolist()
        return fill_placeholders(slots, self.positions(model, counts), seam.modality)

    def positions(self, model: nn.Module, counts: list[int]) -> list[int]:
        """How many placeholders each unit takes, from how many tokens it has."""
        return counts

    def slots(self, model: nn.Module, seam: Seam, ids: Tensor) -> Tensor:
        """(B, T) bool: the positions that the seam's features take."""
        config = cast(Any, model).config
        for name in self.placeholders[seam.modality]:
            token = getattr(config, name, None)
            if token is not None:
                return cast(Tensor, ids == token)
        raise SeamError(f"{type(config).__name__} names no placeholder token of a {seam.modality}")

    def language_entries(self, model: nn.Module) -> list[nn.Module]:
        """The modules whose arguments are what enters the language model."""
        return [self.language_model(model)]

    def text_only(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The same prompt with words in the place of pictures; None where it cannot be."""
        ids = inputs.get("input_ids")
        seams = self.seams(model)
        if ids is None or any(seam.joins not in ("replace", "add") for seam in seams):
            return None
        for seam in seams:
            ids = torch.where(self.slots(model, seam, ids), 3, ids)
        words: dict[str, Any] = {"input_ids": ids}
        for name, value in inputs.items():
            if name.endswith("token_type_ids"):
                words[name] = torch.zeros_like(value)
            elif name in ("attention_mask", "decoder_input_ids"):
                words[name] = value
        return words

    # -- runs, as the probe and the conformance kit make them

    def redraw(self, name: str, pixels: Any, generator: torch.Generator) -> Any:
        """Other pixels of the same form, for the argument `name`."""
        if isinstance(pixels, (list, tuple)):
            return type(pixels)(self.redraw(name, picture, generator) for picture in pixels)
        noise = torch.randn(pixels.shape, generator=generator).to(pixels)
        # Zeros are padding, and are marked and counted as such.
        return noise * (pixels != 0)

    def logits(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """What `forward` answers for `inputs`, labels and all being absent."""
        return cast(Tensor, model(**inputs).logits)

    def decode(self, model: nn.Module, inputs: Mapping[str, Any], new_tokens: int) -> list[Tensor]:
        """Greedy tokens and the scores behind them."""
        output = cast(Any, model).generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return [output.sequences, *output.logits]

    @torch.no_grad()
    def caption_hidden(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """H_caption (B, d_h): the language model's last hidden states, mean over the caption.

        The mean says what the caption names; the state at its last token, a full stop, is nearly
        the same for all captions (docs/decisions, 0002). `input_ids` and `attention_mask` (B, T),
        padded on either side; the mask defaults to ones. No gradient: the language model is
        frozen where this is a target (stage 1). Captions hold no image tokens.

        Raises:
            InputError: for an empty caption.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise InputError(
                f"expected attention_mask of shape {tuple(input_ids.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        empty = (mask.sum(-1) == 0).nonzero().flatten().tolist()
        if empty or input_ids.shape[-1] == 0:
            raise InputError(f"expected at least one token a caption, rows {empty} have none")
        hidden = self.text_states(self.language_model(model), input_ids, mask)
        weights = mask.to(hidden.dtype).unsqueeze(-1)
        return (hidden * weights).sum(1) / weights.sum(1)

    def text_states(self, language: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T, d_h) last hidden states of text alone."""
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        output = language(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return cast(Tensor, output.last_hidden_state)


def fill_placeholders(slots: list[int], counts: list[int], kind: str) -> list[int]:
    """The row of each image: images of `counts` tokens fill the rows' `slots` in order.

    Raises:
        InputError: when a row's placeholders do not hold a whole number of images: the verdict of
            an image that is spread over two rows could not be acted upon.
    """
    rows: list[int] = []
    row, free = 0, slots[0] if slots else 0
    for image, count in enumerate(counts):
        while free == 0 and row + 1 < len(slots):
            row += 1
            free = slots[row]
        if count > free:
            raise InputError(
                f"{kind} {image} has {count} tokens but row {row} of the prompt has {free} "
                f"{kind} placeholders left (placeholders by row: {slots}, {kind} sizes: "
                f"{counts}); build the prompt with the model's processor"
            )
        rows.append(row)
        free -= count
    if sum(counts) != sum(slots):
        raise InputError(
            f"the prompt has {sum(slots)} {kind} placeholders (by row: {slots}) but the {kind}s "
            f"fill {sum(counts)} ({counts}); build the prompt with the model's processor"
        )
    return rows


def evenly(units: int, rows: int, kind: str) -> list[int]:
    """The row of each unit where every row has as many, in order.

    Raises:
        InputError: when they cannot be shared out.
    """
    if rows < 1 or units % rows:
        raise InputError(
            f"{units} {kind}s cannot belong to {rows} rows of the batch evenly; pass as many for "
            "each row, as the model's processor does"
        )
    return [unit // (units // rows) for unit in range(units)]
