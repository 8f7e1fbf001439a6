"""Measures the `digits` model: how many of its pictures show the digit and the colours that were asked for.

    python -m training.measure_digits

An independent judge (tests/digit_judge.py) reads 100 pictures of prompts that name both colours, and 100 of
prompts that name none and so ask for black on white.
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tests.digit_judge import DigitJudge, colours, to_images
from training.digits_data import DEFAULT_PAIR, IMAGE_SIZE, PAIRS, WORDS, Label, load_bitmaps, sample_pictures

PICTURES_A_DIGIT = 10
BATCH = 25


@dataclass(frozen=True)
class Request:
    """One prompt and what a right picture of it shows."""

    prompt: str
    label: Label


def requests_with_colours() -> list[Request]:
    """Asks for every digit ten times; the stride walks through all legible colour pairs."""
    labels = [
        Label(digit, *PAIRS[(digit * PICTURES_A_DIGIT + i) * 7 % len(PAIRS)])
        for digit in range(10)
        for i in range(PICTURES_A_DIGIT)
    ]
    return [Request(f"a {label.ink} {WORDS[label.digit]} on {label.paper}", label) for label in labels]


def requests_without_colours() -> list[Request]:
    """Asks for every digit ten times as "a seven", "seven" and "7" in turn."""
    return [
        Request((f"a {WORDS[digit]}", WORDS[digit], str(digit))[i % 3], Label(digit, *DEFAULT_PAIR))
        for digit in range(10)
        for i in range(PICTURES_A_DIGIT)
    ]


def generate(
    pipe: DiffusionPipeline, requests: list[Request], steps: int, guidance: float
) -> list[Image.Image]:
    """Draws one picture a request; request `i` has seed `i`."""
    images: list[Image.Image] = []
    for first in range(0, len(requests), BATCH):
        chunk = requests[first : first + BATCH]
        images += pipe(
            [request.prompt for request in chunk],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(first + i) for i in range(len(chunk))],
        ).images
    return images


def print_score(name: str, judge: DigitJudge, requests: list[Request], images: list[Image.Image]) -> None:
    """Prints how many pictures show the digit and the colours asked for, and what the others show."""
    wrong_digits: Counter[str] = Counter()
    wrong_colours: Counter[str] = Counter()
    for request, image in zip(requests, images, strict=True):
        label, digit, found = request.label, judge.read(image), colours(image)
        if digit != label.digit:
            wrong_digits[f"{label.digit} read as {digit}"] += 1
        if found != (label.ink, label.paper):
            wrong_colours[f"{label.ink} on {label.paper} seen as {found.ink} on {found.paper}"] += 1
    count = len(requests)
    print(f"{name}: digit right {count - wrong_digits.total()} of {count} {dict(wrong_digits)}")
    print(f"{name}: colours right {count - wrong_colours.total()} of {count} {dict(wrong_colours)}")


def contact_sheet(images: list[Image.Image], columns: int, zoom: int = 2) -> Image.Image:
    """Arranges pictures of 32x32 in rows, enlarged without smoothing."""
    cell = IMAGE_SIZE + 2
    sheet = Image.new("RGB", (columns * cell, -(-len(images) // columns) * cell), (255, 0, 255))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * cell + 1, i // columns * cell + 1))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)


def main() -> None:
    """Loads the model, draws the pictures and prints the scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("blaze/assets/digits"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="also write all pictures as one PNG")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    judge = DigitJudge()
    real = sample_pictures(load_bitmaps("model"), 1000, seed=2)
    right = sum(
        judge.read(image) == label.digit for image, label in zip(to_images(real), real.labels, strict=True)
    )
    print(f"judge on real digits it was not trained on: {right} of 1000")

    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.float32, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for name, requests in (("colours", requests_with_colours()), ("no colours", requests_without_colours())):
        started = time.monotonic()
        images = generate(pipe, requests, args.steps, args.guidance)
        print(f"{name}: {len(images)} pictures in {time.monotonic() - started:.1f} s")
        print_score(name, judge, requests, images)
        pictures += images
    if args.sheet:
        contact_sheet(pictures, columns=20).save(args.sheet)


if __name__ == "__main__":
    main()
