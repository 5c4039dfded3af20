"""Train the projector of the raw model, so that its language model can read the network's features.

    python -m examples.smol_llava.align runs/smol/raw --output runs/smol/base

The image network and the language model stay as they are. The network's features of every picture
are computed once. Then two phases, both on the projector alone:

1. words: each visual token is drawn to the word embedding of what is there, an object or the
   background's colour. The language model does not run, so thousands of pictures cost seconds.
2. answers: the frozen language model answers questions about a picture; its loss on the answers
   trains the projector through it. A sequence holds one picture and several questions that do not
   see each other, so that every answer has to come from the picture.

Both go on where they were stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.smol_llava.pictures import crops, picture_of, train_scenes
from examples.smol_llava.wording import PHOTOGRAPHS, Photograph, photograph_turns, scene_turns
from vqguard.recipes.image_batches import pixel_inputs
from vqguard.recipes.tiny.language import Turn
from vqguard.recipes.tiny.loop import Metrics, PhaseConfig, run_phase
from vqguard.recipes.tiny.scenes import CELL_SIZE, CELLS, GRID, IMAGE_SIZE, Scene
from vqguard.recipes.training.step import warn_of_slow_bf16

SIDE = 7  # visual tokens along an edge
ENCODED_AT_ONCE = 32
WORD_BATCH = 24
TURNS = 3  # questions about a picture in one step
FEATURES = "features.safetensors"


@dataclass(frozen=True)
class Pictured:
    """A picture's features (49, 1280), what it shows, and the word id of each visual token."""

    shows: Scene | Photograph
    words: torch.Tensor


def first_token(tokenizer: Any, word: str) -> int:
    """The id that the word begins with inside a sentence."""
    return int(tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0])


def scene_words(scene: Scene, ids: dict[str, int]) -> torch.Tensor:
    """(49,) the word id of what is at the middle of each visual token's field."""
    cells = [ids[scene.colour]] * CELLS
    for placement, word in zip(scene.placements, scene.words, strict=True):
        cells[placement.cell] = ids[word]
    middles = (np.arange(SIDE) + 0.5) * IMAGE_SIZE / SIDE // CELL_SIZE
    rows, columns = np.meshgrid(middles, middles, indexing="ij")
    return torch.tensor([cells[int(c)] for c in (rows * GRID + columns).flatten()])


class Questions:
    """Turns about a picture as token ids: what `processor` and its chat template write."""

    def __init__(self, processor: Any) -> None:
        self.tokenizer = processor.tokenizer
        image = processor.image_token * SIDE * SIDE
        self.opening: list[int] = self._ids(f"<|im_start|>user\n{image}\n")

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def turn(self, turn: Turn) -> tuple[list[int], list[int]]:
        """Ids and labels of a question and its answer; scored up to the end of the turn."""
        asked = self._ids(f"{turn.question}<|im_end|>\n<|im_start|>assistant\n")
        told, after = self._ids(f"{turn.answer}<|im_end|>"), self._ids("\n")
        return asked + told + after, [-100] * len(asked) + told + [-100] * len(after)

    def batch(self, rows: list[list[Turn]]) -> dict[str, torch.Tensor]:
        """Right-padded: ``ids``, ``labels`` (-100 where not scored) and ``positions`` (B, L), and
        ``mask`` (B, 1, L, L), additive: turns see the opening and themselves."""
        made = [self._row(turns) for turns in rows]
        length = max(len(row[0]) for row in made)
        fill = (self.tokenizer.pad_token_id, -100, 0, -2)
        ids, labels, positions, groups = (
            torch.tensor([row[k] + [fill[k]] * (length - len(row[k])) for row in made])
            for k in range(4)
        )
        seen = (groups[:, :, None] == groups[:, None, :]) | (groups[:, None, :] == -1)
        seen &= torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return {"ids": ids, "labels": labels, "positions": positions, "mask": mask[:, None]}

    def _row(self, turns: list[Turn]) -> tuple[list[int], list[int], list[int], list[int]]:
        start = len(self.opening)
        ids, labels = list(self.opening), [-100] * start
        positions, groups = list(range(start)), [-1] * start
        for number, turn in enumerate(turns):
            found, wanted = self.turn(turn)
            ids += found
            labels += wanted
            positions += range(start, start + len(found))
            groups += [number] * len(found)
        return ids, labels, positions, groups


class Alignment(nn.Module):
    """The projector in training; everything else is held outside of the module tree."""

    def __init__(
        self, model: Any, processor: Any, pictured: list[Pictured], features: torch.Tensor
    ) -> None:
        super().__init__()
        self.projector = model.model.multi_modal_projector
        self.pictured, self.features = pictured, features
        self.questions = Questions(processor)
        self.placeholder = processor.image_token_id
        # A tuple, so that the phases' checkpoints hold the projector alone.
        self.frozen = (model.model.language_model, model.lm_head)
        self.words = model.lm_head.weight.detach().float()

    def word_loss(self, step: int, seed: int) -> tuple[torch.Tensor, Metrics]:
        """Cross-entropy of each visual token against the vocabulary, and its squared distance to
        the word's embedding, which keeps it where the language model has met embeddings."""
        rng = np.random.default_rng([seed, 1, step])
        chosen = torch.from_numpy(rng.integers(len(self.pictured), size=WORD_BATCH))
        made = self.projector(self.features[chosen].float()).flatten(0, 1)
        wanted = torch.cat([self.pictured[int(i)].words for i in chosen])
        used, index = wanted.unique(return_inverse=True)
        nats = F.cross_entropy(made @ self.words[used].T, index)
        apart = F.mse_loss(made, self.words[wanted]) / self.words.var()
        right = ((made @ self.words[used].T).argmax(-1) == index).float().mean()
        return nats + apart, {"nats": nats.item(), "apart": apart.item(), "right": right.item()}

    def answer_loss(self, step: int, seed: int, batch: int) -> tuple[torch.Tensor, Metrics]:
        """Cross-entropy of the answers."""
        rng = np.random.default_rng([seed, 2, step])
        chosen = rng.integers(len(self.pictured), size=batch)
        rows = [turns_of(self.pictured[int(i)].shows, rng) for i in chosen]
        given = self.questions.batch(rows)
        language, head = self.frozen
        embedded = language.get_input_embeddings()(given["ids"])
        visual = self.projector(self.features[torch.from_numpy(chosen)].float())
        place = (given["ids"] == self.placeholder).unsqueeze(-1)
        hidden = language(
            inputs_embeds=embedded.masked_scatter(place, visual.to(embedded.dtype)),
            attention_mask=given["mask"].to(embedded.dtype),
            position_ids=given["positions"],
            use_cache=False,
        ).last_hidden_state
        scored = given["labels"][:, 1:] != -100
        logits = head(hidden[:, :-1][scored]).float()
        wanted = given["labels"][:, 1:][scored]
        loss = F.cross_entropy(logits, wanted)
        right = (logits.argmax(-1) == wanted).float().mean()
        return loss, {"right": right.item()}


def turns_of(shows: Scene | Photograph, rng: np.random.Generator) -> list[Turn]:
    """What is asked about a picture."""
    if isinstance(shows, Photograph):
        return photograph_turns(shows, rng)
    turns = scene_turns(shows, rng)
    return [turns[int(i)] for i in rng.permutation(len(turns))[:TURNS]]


@torch.no_grad()
def encode(model: Any, processor: Any, pictures: list[Image.Image]) -> torch.Tensor:
    """The image network's features, float16 (n, 49, 1280)."""
    rows = []
    for start in tqdm(range(0, len(pictures), ENCODED_AT_ONCE), desc="features", mininterval=5):
        batch = pictures[start : start + ENCODED_AT_ONCE]
        pixels = pixel_inputs(processor, batch, model.device)["pixel_values"]
        found = model.model.vision_tower(pixels).last_hidden_state
        rows.append(found.flatten(2).transpose(1, 2).half())
    return torch.cat(rows)


def kept_features(
    options: Any, model: Any, processor: Any, pictures: list[Image.Image]
) -> torch.Tensor:
    """The features of these pictures, from the disk where an earlier start has left them."""
    path = options.output / FEATURES
    made_of = f"{options.scenes} scenes, {options.crops} crops, seed {options.seed}"
    if path.is_file():
        with safe_open(path, framework="pt") as stored:
            if stored.metadata() != {"made_of": made_of}:
                sys.exit(f"{path} holds other pictures ({stored.metadata()}): remove it")
            return cast(torch.Tensor, stored.get_tensor("features"))
    features = encode(model, processor, pictures)
    beside = path.with_suffix(".tmp")
    save_file({"features": features.contiguous()}, beside, metadata={"made_of": made_of})
    beside.replace(path)
    return features


def gather(processor: Any, scenes: int, each: int, seed: int) -> tuple[list[Pictured], list[Any]]:
    """Training scenes and crops of photographs, with the words of their visual tokens."""
    tokenizer = processor.tokenizer
    pictured, pictures = [], []
    ids: dict[str, int] = {}
    for scene in train_scenes(seed, scenes):
        for word in (*scene.words, scene.colour):
            ids.setdefault(word, first_token(tokenizer, word))
        pictured.append(Pictured(scene, scene_words(scene, ids)))
        pictures.append(picture_of(scene))
    for one, piece in crops(PHOTOGRAPHS, seed, each):
        token = first_token(tokenizer, one.word)
        pictured.append(Pictured(one, torch.full((SIDE * SIDE,), token)))
        pictures.append(piece)
    return pictured, pictures


def align(options: Any) -> None:
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    model: Any = AutoModelForImageTextToText.from_pretrained(options.model, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(options.model)
    pictured, pictures = gather(processor, options.scenes, options.crops, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    features = kept_features(options, model, processor, pictures)
    print(
        f"features of {len(pictures)} pictures: {time.perf_counter() - started:.0f} s", flush=True
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = Alignment(model, processor, pictured, features)
    trained.projector.requires_grad_(True)

    words = PhaseConfig(options.word_steps, WORD_BATCH, 2e-3, checkpoint_every=50)
    run_phase(
        "words",
        trained,
        lambda step: trained.word_loss(step, options.seed),
        words,
        options.output,
        resume=True,
    )
    print(f"words: {time.perf_counter() - started:.0f} s", flush=True)
    if options.bf16:
        warn_of_slow_bf16()
        for part in trained.frozen:
            part.to(torch.bfloat16)
    answers = PhaseConfig(
        options.answer_steps, options.batch, options.learning_rate, checkpoint_every=10
    )
    run_phase(
        "answers",
        trained,
        lambda step: trained.answer_loss(step, options.seed, options.batch),
        answers,
        options.output,
        resume=True,
    )
    print(f"answers: {time.perf_counter() - started:.0f} s", flush=True)
    save(options, trained.projector, processor)


def save(options: Any, projector: nn.Module, processor: Any) -> None:
    """The raw model with the trained projector: its other weights are the packages' still."""
    model: Any = AutoModelForImageTextToText.from_pretrained(options.model, dtype="float32")
    model.model.multi_modal_projector.load_state_dict(projector.state_dict())
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="what build.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--crops", type=int, default=20, help="of each photograph")
    parser.add_argument("--word-steps", type=int, default=600)
    parser.add_argument("--answer-steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="the frozen language model in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    align(parser.parse_args())


if __name__ == "__main__":
    main()
