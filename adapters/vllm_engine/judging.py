"""Process 0's half of the guard: pictures in, codes and what is to be done about them out."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqguard.adapters.runtime.blanking import blanked_tokens
from vqguard.adapters.runtime.guard_link import Call, link_of
from vqguard.adapters.runtime.quantise import Quantised
from vqguard.adapters.runtime.refusing_generate import require_no_raise
from vqguard.adapters.vllm_engine.marks import Marks
from vqguard.adapters.vllm_engine.vision_alone import load_vision
from vqguard.errors import SeamError
from vqguard.safety_map import Verdict
from vqguard.scopes.modes import evaluating

NOTHING = -1
"""In place of a code: a vector of zeros, where features of later layers are blanked."""
TAG = 16
"""Bytes by which codes that this process made are known."""


@dataclass(frozen=True)
class Action:
    """What is said about a picture before the language model has its say."""

    tokens: tuple[int, ...] = ()
    refuses: bool = False
    """Whether that is all of the answer."""


@dataclass(frozen=True)
class Seen:
    """One picture after the guard."""

    codes: Tensor
    """(N, 1 + levels) int32: the patch code of each visual token and those of deep-stack levels."""
    action: int
    """Which of the judge's actions it asks for."""
    verdict: Verdict | None = None
    """None for a picture that is made up."""


class PictureJudge:
    """The tower, the projector and the guard of a folder."""

    def __init__(self, folder: Path, device: str) -> None:
        """Raises as `load_vision` does."""
        self.folder = folder
        self._model = load_vision(folder, device)
        self._device = torch.device(device)
        self._modules = list(self._model.modules())  # nobody changes it
        self._link = link_of(self._model)
        (self._seam,) = (seam for seam in self._link.seams if seam.modality == "image")
        texts = self._link.texts.ids
        refusal = Action(self._link.refusal_ids, refuses=True)
        said = [Action(ids, refuses) for ids in texts.values() for refuses in (True, False)]
        self.actions: tuple[Action, ...] = (Action(), refusal, *dict.fromkeys(said))
        vocabulary = int(self._model.config.get_text_config().vocab_size)
        self._secret = secrets.token_bytes(32)
        self.marks = Marks(self._secret, vocabulary, len(self.actions))

    @torch.no_grad()
    def warm_up(self) -> None:
        """Have the searches prepared, so that the first request does not wait for it."""
        guard = self._link.guard
        levels: list[Any] = [guard.patch, guard.judging, *guard.deep]
        for level in levels:
            level.replace(level.get_parameter("codebook.weight")[:64])

    @property
    def levels(self) -> int:
        """How many deep-stack levels each visual token has codes of."""
        return self._link.guard.config.deepstack_levels

    def look(self, inputs: Mapping[str, Any], pictures: int) -> list[Seen]:
        """Judge and quantise the pictures of a request, as the guarded model's `generate` does.

        Raises as `look_at` does, and FlaggedImageError for a picture whose policy is to raise.
        """
        seen = self.look_at(inputs, pictures)
        require_no_raise([picture.verdict for picture in seen if picture.verdict is not None])
        return seen

    @torch.no_grad()
    def look_at(self, inputs: Mapping[str, Any], pictures: int) -> list[Seen]:
        """Judge and quantise pictures, of one request or of several.

        Args:
            inputs: what the model's processor made of them.
            pictures: how many they are.

        Raises:
            NonFiniteError: for NaN or infinite pixels or features.
            SeamError: where a picture is not one unit with one verdict.
        """
        given = {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        call = Call(self._link, checked=True, generating=True, arguments=given)
        with evaluating(self._modules):
            self._link.prepare(self._model, call, inner_only=False)
        (result,) = (result for _, result in call.seen)
        guarded = result.guarded
        judged = self._link.guard.judge_codes(*guarded.judged)
        if len(judged) != pictures:
            raise SeamError(
                f"expected a verdict on each of {pictures} pictures, got {len(judged)}: this "
                "family's tiles are judged one by one; serve the folder with `vqguard serve`"
            )
        verdicts = self._link.located(self._seam, judged, guarded.layouts)
        return [self._seen(result, i, verdict) for i, verdict in enumerate(verdicts)]

    def tag(self, codes: Tensor) -> Tensor:
        """(16,) uint8 by which this process knows codes that it made, and knows them unchanged."""
        data = codes.contiguous().numpy().tobytes()
        shape = repr((tuple(codes.shape), codes.dtype)).encode()
        made = blake2b(shape + data, key=self._secret, digest_size=TAG).digest()
        return torch.frombuffer(bytearray(made), dtype=torch.uint8)

    def _seen(self, result: Quantised, index: int, verdict: Verdict) -> Seen:
        action = self._action(verdict)
        guarded = result.guarded
        columns = [guarded.codes[index], *(level[index] for level in guarded.deep_codes)]
        codes = torch.stack(columns, dim=1).to("cpu", torch.int32)
        refuses = self.actions[action].refuses
        if refuses or verdict.action == "blank":
            places = None if refuses else blanked_tokens(self._link, self._seam, result, index)
            where = slice(None) if places is None else places.cpu()
            codes[where] = torch.tensor([0, *[NOTHING] * self.levels], dtype=torch.int32)
        return Seen(codes, action, verdict)

    def _action(self, verdict: Verdict) -> int:
        safety_map = self._link.guard.safety_map
        if safety_map is None or verdict.action not in ("refuse", "warn"):
            return 0
        texts, acting = self._link.texts, safety_map.judging.acting(verdict)
        warning = texts.warning(safety_map, acting)
        if verdict.action == "warn" and warning is not None:
            return self.actions.index(Action(warning))
        own = texts.refusal(safety_map, acting)
        return self.actions.index(Action(own or self._link.refusal_ids, refuses=True))

    def together(self, actions: Sequence[int]) -> Action:
        """What is said where a request shows several pictures: a refusal before any warning."""
        asked = [self.actions[action] for action in actions if action]
        return next((action for action in asked if action.refuses), asked[0] if asked else Action())


_JUDGES: dict[tuple[Path, str], PictureJudge] = {}
_LOCK = threading.Lock()


def judge_of(folder: Path, device: str) -> PictureJudge:
    """The judge of a folder, loaded when it is first asked for. Raises as `load_vision` does."""
    with _LOCK:
        key = (folder.resolve(), device)
        if key not in _JUDGES:
            _JUDGES[key] = PictureJudge(folder, device)
        return _JUDGES[key]
