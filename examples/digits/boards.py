"""Boards of handwritten digits: the scans, the pictures, and what can be asked about them.

The scans are scikit-learn's `load_digits` (1,797 real ones, 8 x 8, from the UCI repository),
split once: some of them no part of the demo ever trains on, the donors included. A board is a
grid of cells, each blank or with a digit; a cell is 28 x 28 pixels, one visual token.

No answer hangs on the order in which the cells are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

CELL = 28
"""Side of a cell in pixels: 2 x 2 patches of 14, which the merger joins into one token."""
SHAPES = ((2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (3, 3))
"""Rows and columns of a board."""
HELD_OUT = 400
"""Scans kept out of all training."""
SPLIT_SEED = 2


@dataclass(frozen=True)
class Scans:
    """A part of the scans. `pixels` (n, 8, 8) float32 in 0..1, `labels` and `numbers` (n,):
    the digit, and the place in scikit-learn's data set."""

    pixels: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray

    def of_digit(self, digit: int) -> np.ndarray:
        """Rows of the scans that show `digit`."""
        return np.flatnonzero(self.labels == digit)


@cache
def load_scans() -> tuple[Scans, Scans]:
    """(training, held out), always the same split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    parts = order[HELD_OUT:], order[:HELD_OUT]
    pixels = (data.images / 16).astype(np.float32)
    training, held_out = (Scans(pixels[part], data.target[part], part) for part in parts)
    return training, held_out


@dataclass(frozen=True)
class Board:
    """Cells row by row; None is a blank one."""

    rows: int
    columns: int
    cells: tuple[int | None, ...]

    @property
    def digits(self) -> list[int]:
        return [cell for cell in self.cells if cell is not None]

    def text(self, lines: bool) -> str:
        """The board as characters, a dot for a blank cell, on one line or on one per row."""
        characters = ["." if cell is None else str(cell) for cell in self.cells]
        starts = range(0, len(characters), self.columns)
        rows = ["".join(characters[start : start + self.columns]) for start in starts]
        return ("\n" if lines else "").join(rows)


def draw_board(rng: np.random.Generator, digits: int | None) -> Board:
    """A board of random shape with that many digits, or nearly full where None."""
    rows, columns = SHAPES[rng.integers(len(SHAPES))]
    size = rows * columns
    count = size - int(rng.integers(3)) if digits is None else digits
    cells: list[int | None] = [None] * size
    for place in rng.permutation(size)[:count]:
        cells[place] = int(rng.integers(10))
    return Board(rows, columns, tuple(cells))


def render(
    board: Board, scans: Scans, rng: np.random.Generator, inverted: bool
) -> tuple[np.ndarray, list[int]]:
    """A picture of the board: dark ink on light paper, or light on dark where `inverted`.

    Each digit is a random scan of it, turned by up to 12 degrees, sheared and shifted a little.

    Returns:
        (rows * 28, columns * 28, 3) uint8, and the numbers of the scans in it.
    """
    filled = [place for place, cell in enumerate(board.cells) if cell is not None]
    chosen = [int(rng.choice(scans.of_digit(board.cells[place]))) for place in filled]
    coverage = np.zeros((board.rows, board.columns, CELL, CELL), np.float32)
    for place, glyph in zip(filled, _jittered(scans.pixels[chosen], rng), strict=True):
        coverage[place // board.columns, place % board.columns] = glyph
    coverage = coverage.transpose(0, 2, 1, 3).reshape(board.rows * CELL, board.columns * CELL, 1)
    ink, paper = rng.uniform(0, 100, 3), rng.uniform(165, 255) + rng.uniform(-25, 25, 3)
    if inverted:
        ink, paper = paper, ink
    picture = paper + (ink - paper) * coverage
    picture += rng.normal(0, rng.uniform(1, 8), (*picture.shape[:2], 1))
    return picture.round().clip(0, 255).astype(np.uint8), scans.numbers[chosen].tolist()


def _jittered(scans: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n, 8, 8) -> (n, CELL, CELL), each scan scaled to 21-26 pixels and moved a little."""
    n = len(scans)
    angle = rng.uniform(-1, 1, n) * np.pi / 15
    shear, zoom = rng.uniform(-0.15, 0.15, n), CELL / rng.uniform(21, 26, n)
    shift = rng.uniform(-1, 1, (2, n)) * 2 / CELL
    cos, sin = np.cos(angle), np.sin(angle)
    # where each output pixel looks in the scan, in coordinates -1..1
    affine = zoom * np.stack([cos, shear * cos - sin, sin, shear * sin + cos])
    theta = np.stack([affine[0], affine[1], shift[0], affine[2], affine[3], shift[1]], axis=1)
    theta = torch.from_numpy(theta.reshape(n, 2, 3)).float()
    grid = F.affine_grid(theta, [n, 1, CELL, CELL], align_corners=False)
    glyphs = F.grid_sample(torch.from_numpy(scans)[:, None], grid, align_corners=False)
    return glyphs[:, 0].numpy()


WORDINGS = {
    "largest": ("What is the largest digit?", "Which digit is the largest?"),
    "smallest": ("What is the smallest digit?", "Which digit is the smallest?"),
    "count": ("How many digits are there?", "Count the digits."),
    "above": ("How many digits are above {k}?", "How many digits are larger than {k}?"),
    "sorted": ("List the digits in order.", "Sort the digits."),
}
KINDS = tuple(WORDINGS)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def ask(kind: str, digits: Sequence[int], rng: np.random.Generator) -> Question:
    """A question of that kind, in one of its wordings, about the digits of one or two boards."""
    wording = WORDINGS[kind][rng.integers(len(WORDINGS[kind]))]
    k = int(rng.integers(1, 9))
    answers = {
        "largest": str(max(digits)),
        "smallest": str(min(digits)),
        "count": str(len(digits)),
        "above": str(sum(digit > k for digit in digits)),
        "sorted": " ".join(map(str, sorted(digits))),
    }
    return Question(kind, wording.format(k=k), answers[kind])


def ask_several(digits: Sequence[int], count: int, rng: np.random.Generator) -> list[Question]:
    """`count` questions; a kind comes back only after every other."""
    rounds = -(-count // len(KINDS))
    order = [KINDS[i] for _ in range(rounds) for i in rng.permutation(len(KINDS))]
    return [ask(kind, digits, rng) for kind in order[:count]]
