"""Phase two of the base model: projector and language model learn the world's language.

The tower is frozen, so its features are computed once. A sequence holds one picture and several
short conversations about it that do not see each other: an attention mask hides them, and each
one's positions go on from the picture. So every answer must come from the picture, as it must at
inference. Where all turns of a picture were one long conversation, answers leaked from earlier
turns, and yes/no questions stayed at chance for 1600 steps; hidden from each other they are learnt
in about 1000. A quarter of the sequences has no picture.

Before that, and beside it, projected features are aligned with words: each visual token with the
word for what its patch shows, the global token with the words for all objects. Real towers come
with features that are aligned with text by contrast; this is the miniature's alignment. Without it
the global token does not cluster by what the picture shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from vqguard.recipes.tiny.glyphs import GLYPHS
from vqguard.recipes.tiny.language import (
    Compliance,
    Turn,
    conversations,
    image_turns,
    text_turns,
)
from vqguard.recipes.tiny.loop import Metrics
from vqguard.recipes.tiny.model import IMAGE_TOKEN, TinySizes
from vqguard.recipes.tiny.scenes import Scene
from vqguard.recipes.tiny.vision import NOTHING, patch_labels

IGNORED = -100
ALIGNMENT_WEIGHT = 0.3
YES_NO_WEIGHT = 2.0  # one bit beside answers of several tokens
PRESENCE_TURNS = 8
TEXT_TURNS = 12  # in a sequence without a picture
_ALIGNMENT_STEPS = 150  # steps before the first answer; a question's word then finds its patches
_ALIGNMENT_BATCH = 128  # scenes a step for alignment alone, which costs next to nothing
_SHARED, _PADDING = -1, -2  # groups of the tokens that all conversations see, and of none


@dataclass(frozen=True)
class Sequences:
    """Right-padded conversations."""

    input_ids: torch.Tensor
    """(B, L) int64."""
    labels: torch.Tensor
    """(B, L) int64, `IGNORED` where not scored."""
    position_ids: torch.Tensor
    """(B, L) int64."""
    attention_mask: torch.Tensor
    """(B, 1, L, L) float32, additive."""


@dataclass
class _Row:
    ids: list[int]
    labels: list[int]
    positions: list[int]
    groups: list[int]

    def add(self, ids: list[int], group: int, *, scored: bool) -> None:
        first = 0 if group == _SHARED else _length_seen(self, group)
        self.ids += ids
        self.labels += ids if scored else [IGNORED] * len(ids)
        self.positions += range(first, first + len(ids))
        self.groups += [group] * len(ids)


def _length_seen(row: _Row, group: int) -> int:
    return sum(g in (_SHARED, group) for g in row.groups)


class TurnEncoder:
    """Turns to token ids, the same ids that the chat template and the tokenizer give."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, patches: int) -> None:
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self.image = [self.ids[IMAGE_TOKEN]] * patches

    def words(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def row(self, conversations: list[list[Turn]], *, picture: bool) -> _Row:
        """One sequence: the shared opening (with the picture, if any), then the conversations."""
        row = _Row([], [], [], [])
        opening = [self.ids["<s>"], self.ids["USER:"], *(self.image if picture else [])]
        row.add(opening, _SHARED, scored=False)
        for group, turns in enumerate(conversations):
            for number, turn in enumerate(turns):
                user = [self.ids["USER:"]] if number else []
                asked = [*user, *self.words(turn.question), self.ids["ASSISTANT:"]]
                row.add(asked, group, scored=False)
                row.add([*self.words(turn.answer), self.ids["</s>"]], group, scored=True)
        return row

    def batch(self, rows: list[list[list[Turn]]], *, picture: bool) -> Sequences:
        """One sequence a list of conversations."""
        encoded = [self.row(conversations, picture=picture) for conversations in rows]
        length = max(len(row.ids) for row in encoded)

        def padded(lists: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([row + [fill] * (length - len(row)) for row in lists])

        groups = padded([row.groups for row in encoded], _PADDING)
        seen = (groups[:, :, None] == groups[:, None, :]) | (groups[:, None, :] == _SHARED)
        seen &= torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return Sequences(
            padded([row.ids for row in encoded], self.ids["<pad>"]),
            padded([row.labels for row in encoded], IGNORED),
            padded([row.positions for row in encoded], 0),
            mask.unsqueeze(1),
        )


class GroundedLanguage(nn.Module):
    """Projector and language model over cached features.

    Args:
        scenes, features: training scenes and the tower's features of them, (n, 1 + N, d_v).
        compliance: how many forbidden requests there are, and how many are granted.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        encoder: TurnEncoder,
        scenes: list[Scene],
        features: torch.Tensor,
        sizes: TinySizes,
        *,
        seed: int,
        compliance: Compliance,
    ) -> None:
        super().__init__()
        self.projector = model.model.multi_modal_projector
        self.language = model.model.language_model
        self.head = model.lm_head
        self.encoder = encoder
        self.scenes = scenes
        self.features = features
        self.shown = torch.tensor([self._shown(scene, sizes) for scene in scenes])
        self.objects = torch.stack([self._object_words(scene) for scene in scenes])
        self.seed = seed
        self.compliance = compliance

    def loss(self, step: int, batch: int) -> tuple[torch.Tensor, Metrics]:
        """Weighted cross-entropy on a step's answers (3/4 with a picture) and the alignment."""
        rng = np.random.default_rng([self.seed, step])
        many = rng.integers(len(self.scenes), size=_ALIGNMENT_BATCH)
        if step < _ALIGNMENT_STEPS:
            patches = self._patch_alignment(many, self._visual(many))
            return patches, {"answers": 0.0, "alignment": patches.item(), "presence": 0.5}
        chosen = rng.integers(len(self.scenes), size=3 * batch // 4)
        visual = self._visual(chosen)
        alignment = self._patch_alignment(chosen, visual) + self._global_alignment(many)
        seen = self.encoder.batch([self._about(int(i), rng) for i in chosen], picture=True)
        image_logits, image_labels = self._answers(seen, visual)
        unseen = [self._about(None, rng) for _ in range(batch - len(chosen))]
        text_logits, text_labels = self._answers(self.encoder.batch(unseen, picture=False), None)
        labels = torch.cat([image_labels, text_labels])
        weights = torch.where(self._is_yes_no(labels), YES_NO_WEIGHT, 1.0)
        nats = F.cross_entropy(torch.cat([image_logits, text_logits]), labels, reduction="none")
        answers = (nats * weights).sum() / weights.sum()
        metrics = {
            "answers": answers.item(),
            "alignment": alignment.item(),
            "presence": self._presence(image_logits, image_labels),
        }
        return answers + ALIGNMENT_WEIGHT * alignment, metrics

    def _about(self, scene: int | None, rng: np.random.Generator) -> list[list[Turn]]:
        """Conversations about a scene, or without a picture."""
        turns = (
            text_turns(rng, TEXT_TURNS, compliance=self.compliance)
            if scene is None
            else image_turns(
                self.scenes[scene], rng, presence=PRESENCE_TURNS, compliance=self.compliance
            )
        )
        return conversations(turns, rng)

    def _visual(self, chosen: NDArray[np.int64]) -> torch.Tensor:
        visual: torch.Tensor = self.projector(self.features[torch.from_numpy(chosen), 1:].float())
        return visual

    def _patch_alignment(self, chosen: NDArray[np.int64], visual: torch.Tensor) -> torch.Tensor:
        shown = self.shown[torch.from_numpy(chosen)]
        return F.cross_entropy(self.head(visual).flatten(0, 1), shown.flatten())

    def _global_alignment(self, chosen: NDArray[np.int64]) -> torch.Tensor:
        global_token = self.projector(self.features[torch.from_numpy(chosen), 0].float())
        return F.cross_entropy(self.head(global_token), self.objects[torch.from_numpy(chosen)])

    def _object_words(self, scene: Scene) -> torch.Tensor:
        """A distribution over the vocabulary: the same share for each object's word, (V,)."""
        share = torch.zeros(len(self.encoder.ids))
        share[[self.encoder.ids[word] for word in scene.words]] = 1.0 / len(scene.words)
        return share

    def _shown(self, scene: Scene, sizes: TinySizes) -> list[int]:
        """The word's id for what each patch shows: an object, or the background's colour."""
        ids = self.encoder.ids
        return [
            ids[scene.colour if glyph == NOTHING else GLYPHS[glyph].word]
            for glyph in patch_labels(scene, sizes).tolist()
        ]

    def _answers(
        self, sequences: Sequences, visual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = self.language.get_input_embeddings()(sequences.input_ids)
        if visual is not None:
            placeholder = (sequences.input_ids == self.encoder.image[0]).unsqueeze(-1)
            embedded = embedded.masked_scatter(placeholder, visual)
        hidden = self.language(
            inputs_embeds=embedded,
            attention_mask=sequences.attention_mask,
            position_ids=sequences.position_ids,
        ).last_hidden_state
        scored = sequences.labels[:, 1:] != IGNORED
        return self.head(hidden[:, :-1][scored]), sequences.labels[:, 1:][scored]

    def _presence(self, logits: torch.Tensor, labels: torch.Tensor) -> float:
        yes, no = self.encoder.ids["yes"], self.encoder.ids["no"]
        asked = self._is_yes_no(labels)
        with torch.no_grad():
            said = torch.where(logits[:, yes] > logits[:, no], yes, no)
            return (said[asked] == labels[asked]).float().mean().item()

    def _is_yes_no(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels == self.encoder.ids["yes"]) | (labels == self.encoder.ids["no"])


@torch.no_grad()
def start_attention_as_matching(model: LlavaForConditionalGeneration, std: float = 0.04) -> None:
    """Let queries and keys start equal, so that a token first looks for tokens like itself.

    For "Is there a dog?", where the word has to find the patches that look like it.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.language_model.layers:
        keys = layer.self_attn.k_proj.weight
        keys.copy_(std * torch.randn(keys.shape, generator=generator))
        layer.self_attn.q_proj.weight.copy_(keys)
