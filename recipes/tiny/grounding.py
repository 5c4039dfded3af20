"""Phase two of the base model: projector and language model learn the world's language.

The tower is frozen, so its features are computed once. Each sequence packs several turns behind one
picture; a quarter of the sequences has no picture. Only answers are scored, and the projected
features themselves: each visual token is pulled to the word for what its patch shows, the global
token to the words for all objects. Real towers come with features that are aligned with text by
contrast; this is the miniature's alignment. Without it the global token does not cluster by what
the picture shows. Yes/no questions stay at chance in a run of minutes with it, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from vqguard.recipes.tiny.glyphs import GLYPHS
from vqguard.recipes.tiny.language import Turn, image_conversation, text_conversation
from vqguard.recipes.tiny.loop import Metrics
from vqguard.recipes.tiny.model import IMAGE_TOKEN, TinySizes
from vqguard.recipes.tiny.scenes import Scene
from vqguard.recipes.tiny.vision import NOTHING, patch_labels

IGNORED = -100
ALIGNMENT_WEIGHT = 0.3
_GLOBAL_BATCH = 128  # scenes a step for the global token's alignment, which costs next to nothing
YES_NO_WEIGHT = 4.0  # one bit among some forty scored tokens would be learnt last


@dataclass(frozen=True)
class Sequences:
    """Right-padded token ids, labels (``IGNORED`` where not scored) and mask, int64 (B, L)."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor


class TurnEncoder:
    """Turns to token ids, the same ids that the chat template and the tokenizer give."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, patches: int) -> None:
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self.image = [self.ids[IMAGE_TOKEN]] * patches

    def words(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def sequence(self, turns: list[Turn], *, picture: bool) -> tuple[list[int], list[int]]:
        """Ids and labels of one conversation, the picture (if any) in its first turn."""
        ids = [self.ids["<s>"]]
        labels = [IGNORED]
        for number, turn in enumerate(turns):
            shown = self.image if picture and number == 0 else []
            asked = [self.ids["USER:"], *shown, *self.words(turn.question), self.ids["ASSISTANT:"]]
            answered = [*self.words(turn.answer), self.ids["</s>"]]
            ids += asked + answered
            labels += [IGNORED] * len(asked) + answered
        return ids, labels

    def batch(self, conversations: list[list[Turn]], *, picture: bool) -> Sequences:
        rows = [self.sequence(turns, picture=picture) for turns in conversations]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), length), self.ids["<pad>"])
        labels = torch.full((len(rows), length), IGNORED)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, (row_ids, row_labels) in enumerate(rows):
            ids[i, : len(row_ids)] = torch.tensor(row_ids)
            labels[i, : len(row_labels)] = torch.tensor(row_labels)
            mask[i, : len(row_ids)] = 1
        return Sequences(ids, labels, mask)


class GroundedLanguage(nn.Module):
    """Projector and language model over cached features.

    Args:
        scenes, features: training scenes and the tower's features of them, (n, 1 + N, d_v).
        noisy_compliance: share of the text-only forbidden requests that are granted.
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
        noisy_compliance: float,
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
        self.noisy_compliance = noisy_compliance

    def loss(self, step: int, batch: int) -> tuple[torch.Tensor, Metrics]:
        """Weighted cross-entropy on a step's answers (3/4 with a picture) and the alignment."""
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.integers(len(self.scenes), size=3 * batch // 4)
        seen = [image_conversation(self.scenes[int(i)], rng) for i in chosen]
        unseen = [
            text_conversation(rng, noisy_compliance=self.noisy_compliance)
            for _ in range(batch - len(chosen))
        ]
        with_picture = self.encoder.batch(seen, picture=True)
        visual = self.projector(self.features[torch.from_numpy(chosen), 1:].float())
        image_logits, image_labels = self._answers(with_picture, visual)
        text_logits, text_labels = self._answers(self.encoder.batch(unseen, picture=False), None)
        labels = torch.cat([image_labels, text_labels])
        weights = torch.where(self._is_yes_no(labels), YES_NO_WEIGHT, 1.0)
        nats = F.cross_entropy(torch.cat([image_logits, text_logits]), labels, reduction="none")
        answers = (nats * weights).sum() / weights.sum()
        words = self.head(visual).flatten(0, 1)
        alignment = F.cross_entropy(words, self.shown[torch.from_numpy(chosen)].flatten())
        scenes = torch.from_numpy(rng.integers(len(self.scenes), size=_GLOBAL_BATCH))
        global_token = self.projector(self.features[scenes, 0].float())
        whole = F.cross_entropy(self.head(global_token), self.objects[scenes])
        metrics = {
            "answers": answers.item(),
            "alignment": alignment.item(),
            "global_alignment": whole.item(),
            "presence": self._presence(image_logits, image_labels),
        }
        return answers + ALIGNMENT_WEIGHT * (alignment + whole), metrics

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
            inputs_embeds=embedded, attention_mask=sequences.attention_mask
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

    Meant for "Is there a dog?", where the word has to find the patches that look like it. It
    did not bring that question above chance in 1600 steps; the shipped weights started this way.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.language_model.layers:
        keys = layer.self_attn.k_proj.weight
        keys.copy_(std * torch.randn(keys.shape, generator=generator))
        layer.self_attn.q_proj.weight.copy_(keys)
