"""An independent reader of the pictures of the `digits` model.

The judge never sees a prompt. It is trained on real digits that the diffusion model was not trained on
(`load_bitmaps("judge")`) and shares only the drawing of real digits and the palette with the training.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.svm import SVC

from training.digits_data import (
    IMAGE_SIZE,
    INKS,
    MARGIN,
    PAPERS,
    Colour,
    Pictures,
    load_bitmaps,
    sample_pictures,
)

CELLS = 8  # the classifier reads 8x8 cells, the resolution of the data set
JUDGE_PICTURES = 6000  # about seven distorted drawings of each of the judge's 798 bitmaps
FULL_INK = 0.75  # share of the strongest contrast from which a pixel counts as pure ink
MIN_SPAN = 40.0  # RGB distance: less contrast than this is not stretched into a digit


class Colours(NamedTuple):
    """Names of the palette colours nearest to a picture's ink and paper."""

    ink: str
    paper: str


@dataclass(frozen=True)
class InkMap:
    """`strength` is [H, W] in 0..1 (0 paper, 1 ink); `ink` and `paper` are RGB in 0..255."""

    strength: np.ndarray
    ink: np.ndarray
    paper: np.ndarray


def ink_map(image: Image.Image) -> InkMap:
    """Separates ink from paper without knowing either: the paper is what most of the border shows."""
    rgb = np.asarray(image.convert("RGB"), dtype=np.float64)
    border = np.concatenate([rgb[:2].reshape(-1, 3), rgb[-2:].reshape(-1, 3), rgb[:, 0], rgb[:, -1]])
    paper = np.median(border, axis=0)
    distance = np.linalg.norm(rgb - paper, axis=-1)
    strength = np.clip(distance / max(float(np.quantile(distance, 0.98)), MIN_SPAN), 0, 1)
    pure = rgb[strength >= FULL_INK]
    return InkMap(strength, np.median(pure, axis=0) if len(pure) else paper, paper)


def colours(image: Image.Image) -> Colours:
    """Returns the names of a picture's ink and paper; a blank picture has ink of its paper's colour."""
    found = ink_map(image)
    return Colours(_nearest(found.ink, INKS), _nearest(found.paper, PAPERS))


class DigitJudge:
    """Reads which digit a picture shows; training it takes a few seconds."""

    def __init__(self) -> None:
        pictures = sample_pictures(load_bitmaps("judge"), JUDGE_PICTURES, seed=1)
        features = np.stack([_features(image) for image in to_images(pictures)])
        self._classifier = SVC(C=10.0, gamma="scale").fit(
            features, [label.digit for label in pictures.labels]
        )

    def read(self, image: Image.Image) -> int:
        """Returns the digit, 0 to 9, that a picture looks most like."""
        return int(self._classifier.predict(_features(image)[None])[0])


def to_images(pictures: Pictures) -> list[Image.Image]:
    """Rounds drawn pictures to 8-bit RGB images."""
    pixels = ((pictures.pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in pixels]


def _features(image: Image.Image) -> np.ndarray:
    """Returns the ink of 8x8 cells, [64] in 0..1, of the middle of a picture, where a digit is drawn."""
    strength = ink_map(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)).strength
    middle = Image.fromarray(strength[MARGIN - 1 : 1 - MARGIN, MARGIN - 1 : 1 - MARGIN].astype(np.float32))
    return np.asarray(middle.resize((CELLS, CELLS), Image.Resampling.BOX)).ravel()


def _nearest(rgb: np.ndarray, palette: dict[str, Colour]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(rgb - palette[name])))
