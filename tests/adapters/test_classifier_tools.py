"""Other people's attacks on `as_classifier`, and ours at the same budget of steps.

They pin old versions of what is here, so install them as they are:
`pip install --no-deps torchattacks pyautoattack foolbox eagerpy adversarial-robustness-toolbox` and
what their imports then miss (six, GitPython, scikit-learn, cloudpickle). `pyautoattack` is
AutoAttack by its authors.

Some return the clean picture where they have not crossed the decision. What is asked of them here
is the picture that they came to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vqguard.adapters import as_classifier
from vqguard.adapters.classifier import ClassifierView
from vqguard.redteam import PGD
from vqguard.redteam.attacks.apgd import APGD
from vqguard.redteam.attacks.square import Square

from .test_target_guarded import PROMPTS, guarded, images, make_processor

__all__ = ["guarded"]
pytestmark = pytest.mark.slow

COUNT, EPS, STEPS = 6, 16, 40


@dataclass
class View:
    """The classifier as our attacks see a victim: down on the negative logit of complying."""

    classifier: ClassifierView
    requests: int = COUNT

    def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        logits: Tensor = self.classifier(pixels)
        return -logits[:, 1]

    def succeeded(self, pixels: Tensor, request: Tensor) -> Tensor:
        return torch.zeros(len(pixels), dtype=torch.bool)  # so that all steps are used


@pytest.fixture
def classifier(guarded: Any) -> ClassifierView:
    return as_classifier(
        guarded, make_processor(), PROMPTS[0], opening="w11", gradient="straight_through"
    )


def score(classifier: ClassifierView, pixels: Tensor) -> float:
    """The mean logit of complying: what all of them raise."""
    with torch.no_grad():
        return float(classifier(pixels.float())[:, 1].mean())


def in_ball(pixels: Tensor) -> bool:
    return float((pixels.detach() - images(COUNT)).abs().max()) <= EPS / 255 + 1e-6


def ours(attack: Any, classifier: ClassifierView) -> float:
    result = attack(View(classifier), images(COUNT))
    return score(classifier, result.adversarial)


def test_pgd_is_at_least_as_strong_as_torchattacks_at_equal_steps(
    classifier: ClassifierView,
) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    labels = torch.zeros(COUNT, dtype=torch.int64)
    theirs = torchattacks.PGD(
        classifier, eps=EPS / 255, alpha=2 / 255, steps=STEPS, random_start=False
    )(images(COUNT), labels)
    assert in_ball(theirs)
    mine = ours(PGD(eps_255=EPS, steps=STEPS, step_255=2.0, decay="cosine"), classifier)
    assert mine >= score(classifier, theirs) - 1e-3


def apgd_of(package: str, classifier: ClassifierView, restarts: int) -> Tensor:
    """The picture of highest loss that another's APGD finds."""
    labels = torch.zeros(COUNT, dtype=torch.int64)
    if package == "torchattacks":
        tools = pytest.importorskip("torchattacks")
        attack = tools.APGD(
            classifier, norm="Linf", eps=EPS / 255, steps=STEPS, n_restarts=restarts, loss="ce"
        )
    else:
        tools = pytest.importorskip("pyautoattack.autopgd_base")
        attack = tools.APGDAttack(
            classifier,
            n_iter=STEPS,
            norm="Linf",
            eps=EPS / 255,
            n_restarts=restarts,
            loss="ce",
            device="cpu",
        )
        attack.init_hyperparam(images(COUNT))
    found: Any = attack.perturb(images(COUNT), labels, best_loss=True)
    best: Tensor = found[1] if isinstance(found, tuple) else found
    return best


def square_of(package: str, classifier: ClassifierView, queries: int) -> Tensor:
    """The picture that another's Square ends at; it stops where the decision is crossed."""
    labels = torch.zeros(COUNT, dtype=torch.int64)
    settings = {"norm": "Linf", "eps": EPS / 255, "n_queries": queries, "loss": "margin"}
    if package == "torchattacks":
        attack = pytest.importorskip("torchattacks").Square(classifier, **settings)
    else:
        attack = pytest.importorskip("pyautoattack.square").SquareAttack(
            classifier, device="cpu", **settings
        )
    attack.init_hyperparam(images(COUNT))
    torch.manual_seed(0)
    found: Tensor = attack.attack_single_run(images(COUNT), labels)[1]
    return found


PACKAGES = ["torchattacks", "pyautoattack"]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("gradient", ["plain", "straight_through"])
def test_apgd_is_at_least_as_strong_as_theirs_at_equal_steps(
    gradient: str, package: str, guarded: Any
) -> None:
    """One start decides much, and theirs are others: the best of four is compared."""
    restarts = 4
    classifier = as_classifier(
        guarded, make_processor(), PROMPTS[0], opening="w11", gradient=gradient
    )
    theirs = apgd_of(package, classifier, restarts)
    assert in_ball(theirs)
    before = score(classifier, images(COUNT))
    assert score(classifier, theirs) > before
    mine = ours(APGD(eps_255=EPS, steps=STEPS, restarts=restarts), classifier)
    # one random start may be luckier than another
    assert mine >= score(classifier, theirs) - 0.05 * (score(classifier, theirs) - before)


@pytest.mark.parametrize("package", PACKAGES)
def test_square_is_at_least_as_strong_as_theirs_at_equal_queries(
    package: str, classifier: ClassifierView
) -> None:
    theirs = square_of(package, classifier, 200)
    assert in_ball(theirs)
    assert crossing(classifier, theirs) > crossing(classifier, images(COUNT))
    mine = Square(eps_255=EPS, steps=200)(View(classifier), images(COUNT)).adversarial
    # two random searches: one may be luckier by a little
    assert crossing(classifier, mine) >= crossing(classifier, theirs) - 0.1 * scale(classifier)


def crossing(classifier: ClassifierView, pixels: Tensor) -> float:
    """The mean logit of complying up to the decision, where some stop."""
    with torch.no_grad():
        return float(classifier(pixels.float())[:, 1].clamp_max(0.0).mean())


def scale(classifier: ClassifierView) -> float:
    """How far the clean pictures are from the decision."""
    return abs(crossing(classifier, images(COUNT)))


def test_foolbox_runs_on_it(classifier: ClassifierView) -> None:
    foolbox = pytest.importorskip("foolbox")
    model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(steps=STEPS, rel_stepsize=1 / 8, random_start=False)
    labels = torch.zeros(COUNT, dtype=torch.int64)
    _, theirs, _ = attack(model, images(COUNT), labels, epsilons=EPS / 255)
    assert in_ball(theirs)
    assert score(classifier, theirs) > score(classifier, images(COUNT))
    mine = ours(PGD(eps_255=EPS, steps=STEPS, step_255=2.0, decay="cosine"), classifier)
    assert mine >= score(classifier, theirs) - 1e-3


def test_art_runs_on_it(classifier: ClassifierView) -> None:
    pytest.importorskip("art.attacks.evasion")
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    height, width = classifier.image_size
    wrapped = PyTorchClassifier(
        classifier,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=(3, height, width),
        nb_classes=2,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        wrapped, eps=EPS / 255, eps_step=2 / 255, max_iter=STEPS, verbose=False
    )
    theirs = torch.from_numpy(attack.generate(images(COUNT).numpy()))
    assert in_ball(theirs)
    assert score(classifier, theirs) > score(classifier, images(COUNT))
    mine = ours(PGD(eps_255=EPS, steps=STEPS, step_255=2.0, decay="cosine"), classifier)
    assert mine >= score(classifier, theirs) - 1e-3
