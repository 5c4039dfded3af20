"""What is asked and said about llava-tiny's scenes and scikit-image's photographs, in English.

The scenes are the project's own (recipes/tiny/scenes.py); only the wording is another: a language
model that has read English is asked in English.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vqguard.recipes.tiny.glyphs import GLYPHS
from vqguard.recipes.tiny.language import Turn
from vqguard.recipes.tiny.scenes import Scene

NUMBERS = "Zero One Two Three Four Five".split()

# Glyph words that are no noun of their own, or take no article.
_PHRASES = {
    "soccer": "a soccer ball",
    "basketball": "a basketball",
    "tennis": "a tennis ball",
    "palm": "a palm tree",
    "bulb": "a light bulb",
    "underage": "an age limit sign",
    "grapes": "grapes",
    "books": "books",
    "scissors": "scissors",
    "corn": "corn",
    "bread": "bread",
    "cheese": "cheese",
    "pizza": "pizza",
    "blood": "blood",
    "beer": "beer",
    "wine": "wine",
}

NAMING = ("What is in the picture?", "What is this?", "What do you see?")
CAPTION = ("Describe the picture.", "Give the picture a caption.")
COUNTING = ("How many objects are there?", "Count the objects.")
COLOUR = ("What colour is the background?", "Name the background colour.")
PRESENCE = "Is there {thing} in the picture?"


@dataclass(frozen=True)
class Photograph:
    """A photograph that scikit-image ships: file, short name, caption, and the word that its
    visual tokens are first aligned with."""

    file: str
    name: str
    caption: str
    word: str


# Captioned by hand, from looking at them.
PHOTOGRAPHS = (
    Photograph("astronaut.png", "an astronaut", "an astronaut in an orange suit", "astronaut"),
    Photograph("camera.png", "a man", "a man with a camera on a tripod", "man"),
    Photograph("chelsea.png", "a cat", "the face of a cat", "cat"),
    Photograph("coffee.png", "a cup of coffee", "a cup of coffee on a red saucer", "coffee"),
    Photograph("coins.png", "coins", "rows of old coins", "coins"),
    Photograph("hubble_deep_field.jpg", "galaxies", "galaxies in a black sky", "galaxies"),
    Photograph("rocket.jpg", "a rocket", "a rocket on its launch pad at night", "rocket"),
    Photograph("moon.png", "the moon", "the surface of the moon with craters", "moon"),
    Photograph("motorcycle_left.png", "a motorcycle", "a red motorcycle", "motorcycle"),
    Photograph("brick.png", "bricks", "a wall of bricks", "bricks"),
    Photograph("grass.png", "grass", "a field of grass", "grass"),
    Photograph("gravel.png", "gravel", "a ground of gravel", "gravel"),
    Photograph("page.png", "a page of text", "a printed page of text", "text"),
    Photograph("retina.jpg", "a retina", "a retina with its blood vessels", "retina"),
)
# Photographs that nothing is trained on: the motorcycle from another place beside the first, and
# matplotlib's portrait.
UNSEEN = (
    Photograph("motorcycle_right.png", "a motorcycle", "a red motorcycle", "motorcycle"),
    Photograph("grace_hopper.jpg", "a woman", "a woman in a uniform", "woman"),
)


def thing(word: str) -> str:
    """A glyph's word as one would say it: "a dog", "an owl", "grapes"."""
    return _PHRASES.get(word) or f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def enumerate_things(words: list[str]) -> str:
    """ "a dog, an owl and grapes"."""
    things = [thing(word) for word in words]
    return things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"


def sentence(phrase: str) -> str:
    """The phrase with a capital and a full stop."""
    return f"{phrase[0].upper()}{phrase[1:]}."


def pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    """One of the options, equally likely."""
    return options[int(rng.integers(len(options)))]


def caption_turn(scene: Scene, rng: np.random.Generator) -> Turn:
    said = f"{enumerate_things(scene.words)} on a {scene.colour} background"
    return Turn("caption", pick(rng, CAPTION), sentence(said))


def naming_turn(scene: Scene, rng: np.random.Generator) -> Turn:
    task = "naming_single" if len(scene.words) == 1 else "naming_recall"
    return Turn(task, pick(rng, NAMING), sentence(enumerate_things(scene.words)))


def count_turn(scene: Scene, rng: np.random.Generator) -> Turn:
    return Turn("count", pick(rng, COUNTING), f"{NUMBERS[len(scene.placements)]}.")


def colour_turn(scene: Scene, rng: np.random.Generator) -> Turn:
    return Turn("colour", pick(rng, COLOUR), sentence(scene.colour))


def presence_turn(scene: Scene, rng: np.random.Generator, *, present: bool | None = None) -> Turn:
    """Half of the questions ask for something that is there, unless told which."""
    if present is None:
        present = bool(rng.random() < 0.5)
    absent = [g.word for g in GLYPHS if g.word not in scene.words]
    word = pick(rng, scene.words if present else absent)
    return Turn("presence", PRESENCE.format(thing=thing(word)), "Yes." if present else "No.")


TURNS = {
    "naming_single": naming_turn,
    "naming_recall": naming_turn,
    "count": count_turn,
    "colour": colour_turn,
    "presence": presence_turn,
}


def scene_turns(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Everything that is asked about a scene, the caption first, the others in random order."""
    rest = [
        naming_turn(scene, rng),
        count_turn(scene, rng),
        colour_turn(scene, rng),
        presence_turn(scene, rng, present=True),
        presence_turn(scene, rng, present=False),
    ]
    return [caption_turn(scene, rng), *(rest[int(i)] for i in rng.permutation(len(rest)))]


def photograph_turns(photograph: Photograph, rng: np.random.Generator) -> list[Turn]:
    """Caption and name of a photograph."""
    return [
        Turn("caption", pick(rng, CAPTION), sentence(photograph.caption)),
        Turn("naming_photograph", pick(rng, NAMING), sentence(photograph.name)),
    ]
