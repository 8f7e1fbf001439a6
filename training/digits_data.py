"""Pictures, prompts and vocabulary of the `digits` model: what its training and its judge share.

The pictures come from the UCI hand-written digits in the copy that scikit-learn ships: 1,797 bitmaps of 8x8
cells, each holding 0 to 16 (how many of its 4x4 scanned pixels were inked). They are redrawn as 32x32 RGB
images, one ink on one paper. `load_bitmaps` gives the diffusion model and the judge disjoint bitmaps.
"""

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

IMAGE_SIZE = 32
MARGIN = 3  # pixels of paper around an undistorted digit, so that the border shows the paper colour
MAX_TOKENS = 16

Colour = tuple[int, int, int]
INKS: dict[str, Colour] = {
    "black": (20, 20, 20),
    "white": (240, 240, 240),
    "red": (215, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 215, 50),
    "orange": (240, 135, 25),
    "purple": (140, 45, 170),
}
PAPERS: dict[str, Colour] = {
    "white": (240, 240, 240),
    "black": (20, 20, 20),
    "yellow": (245, 225, 110),
    "pink": (250, 170, 195),
    "grey": (155, 155, 155),
}
# Pairs nearer than this in RGB (same names, white on pink) could hardly be read: they are never drawn.
MIN_CONTRAST = 100.0
PAIRS = [
    (ink, paper)
    for ink, ink_rgb in INKS.items()
    for paper, paper_rgb in PAPERS.items()
    if np.linalg.norm(np.subtract(ink_rgb, paper_rgb)) >= MIN_CONTRAST
]
DEFAULT_PAIR = ("black", "white")

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOUNS = ("digit", "number", "numeral", "figure")
# Openings and adjectives change nothing in the picture: with them in training, they also harm nothing.
OPENINGS = ("draw", "please draw", "show me", "make", "write", "generate", "a picture of", "an image of")
ADJECTIVES = ("handwritten", "nice", "neat", "clear")
GRAMMAR = ("a", "an", "the", "on", "in", "ink", "paper", "background")


@dataclass(frozen=True)
class Label:
    """What a picture shows: a digit of 0 to 9 and the names of its ink and its paper."""

    digit: int
    ink: str
    paper: str


@dataclass(frozen=True)
class Bitmaps:
    """Digits as scanned: `cells` is [N, 8, 8] float in 0..1, `digits` is [N] integers of 0 to 9."""

    cells: torch.Tensor
    digits: torch.Tensor


@dataclass(frozen=True)
class Pictures:
    """Digits as drawn: `pixels` is [N, 3, 32, 32] float in -1..1, `labels` has N entries."""

    pixels: torch.Tensor
    labels: list[Label]


def load_bitmaps(role: Literal["model", "judge"]) -> Bitmaps:
    """Returns the share of one side: bitmap `i` is the model's if `i % 9 < 5`, else the judge's.

    This gives the model 1,000 bitmaps and the judge 797, every digit about equally often on both sides.
    """
    data = load_digits()
    mine = (np.arange(len(data.target)) % 9 < 5) == (role == "model")
    return Bitmaps(
        cells=torch.from_numpy(data.images[mine]).float() / 16,
        digits=torch.from_numpy(data.target[mine]).long(),
    )


def ink_masks(cells: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Redraws bitmaps [N, 8, 8] as ink coverage [N, 32, 32] in 0..1 with smooth, antialiased strokes.

    A generator adds small distortions (rotation, size, slant, place, stroke width); None adds none.
    """
    n = len(cells)

    def spread(limit: float) -> torch.Tensor:
        if generator is None:
            return torch.zeros(n)
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, slant, size = spread(0.14), spread(0.12), 1 + spread(0.07)
    zoom = IMAGE_SIZE / (IMAGE_SIZE - 2 * MARGIN) / size
    rows = [
        torch.stack([zoom * angle.cos(), zoom * (slant - angle.sin()), spread(0.06)], -1),
        torch.stack([zoom * angle.sin(), zoom * angle.cos(), spread(0.06)], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [n, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    density = F.grid_sample(cells[:, None], grid, mode="bicubic", align_corners=False)[:, 0]
    # A cell is 3.25 pixels wide, so this slope turns the edge of a stroke into a ramp of about one pixel.
    edge = 0.42 + spread(0.06)[:, None, None]
    return ((density - edge) * 3 + 0.5).clamp(0, 1)


def draw(bitmaps: Bitmaps, labels: list[Label], generator: torch.Generator | None = None) -> Pictures:
    """Draws bitmap `i` in the colours of `labels[i]`; see `ink_masks` for the generator."""
    mask = ink_masks(bitmaps.cells, generator)[:, None]
    ink = torch.tensor([INKS[label.ink] for label in labels])[:, :, None, None]
    paper = torch.tensor([PAPERS[label.paper] for label in labels])[:, :, None, None]
    return Pictures(pixels=(mask * ink + (1 - mask) * paper) / 127.5 - 1, labels=labels)


def sample_pictures(bitmaps: Bitmaps, count: int, seed: int) -> Pictures:
    """Draws `count` distorted bitmaps in random legible colours, one in six of them black on white.

    Black on white is what prompts without colours ask for, so it deserves more than its 36th part.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(bitmaps.digits), (count,), generator=generator)
    chosen = Bitmaps(bitmaps.cells[rows], bitmaps.digits[rows])
    choices = PAIRS + [DEFAULT_PAIR] * (len(PAIRS) // 6)
    pairs = torch.randint(len(choices), (count,), generator=generator).tolist()
    labels = [Label(digit, *choices[pair]) for digit, pair in zip(chosen.digits.tolist(), pairs, strict=True)]
    return draw(chosen, labels, generator)


def sample_prompt(label: Label, rng: random.Random) -> str:
    """Words a prompt for one picture.

    A colour may be left out only where it is the default: black ink (white ink on black paper) and white
    paper (black paper under white ink). So a prompt without colours always asks for black on white.
    """
    names_ink = label.ink != ("white" if label.paper == "black" else "black") or rng.random() < 0.5
    names_paper = label.paper != ("black" if label.ink == "white" else "white") or rng.random() < 0.5
    names_paper |= label.paper == "black" and not names_ink  # else it would read as black on white
    ink_follows = names_ink and rng.random() < 0.2

    subject = [rng.choice(ADJECTIVES)] if rng.random() < 0.15 else []
    subject += [label.ink] if names_ink and not ink_follows else []
    subject += [rng.choice(NOUNS)] if rng.random() < 0.2 else []
    subject += [rng.choice((WORDS[label.digit], WORDS[label.digit], str(label.digit)))]
    article = "an" if subject[0] in ("orange", "eight", "8") else "a"
    words = [*rng.choice(([], [], [article], [article], ["the"])), *subject]
    if rng.random() < 0.15:
        words.insert(0, rng.choice(OPENINGS))
    if ink_follows:
        words += rng.choice((["in", label.ink], ["in", label.ink, "ink"]))
    if names_paper:
        words.append(rng.choice(("on {}", "on {}", "on {} paper", "on a {} background")).format(label.paper))
    return " ".join(words)


def build_tokenizer() -> CLIPTokenizer:
    """Builds a byte-level BPE tokenizer that gives every word of the prompts one token.

    Other text falls back to bytes, so every prompt can be encoded. A word's merges are appended after it was
    split by the merges so far: later merges rank lower and never undo an earlier word.
    """
    alphabet = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    phrases = " ".join((*WORDS, *OPENINGS, *NOUNS, *ADJECTIVES, *GRAMMAR, *INKS, *PAPERS))
    for word in dict.fromkeys(phrases.split()):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merge(pieces, merges[-1])
    tokens = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
