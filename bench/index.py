"""The index: image headers a second on one core, and samples a second from a warm cache.

    python -m bench.index                     # 4,000 images, 200,000 texts

Images are generated JPEG and PNG files of several sizes in a temporary directory, in the page
cache; every sample has one. Texts are short dialogues. All of it runs in one process. Writes
`bench/results/index.json`; seconds per million are extrapolated from the sizes given.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from vlm.checkpoint import write_json
from vlm.data.image import header_size
from vlm.data.index import build_index
from vlm.data.processor import Processor
from vlm.data.sources import open_sources

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "golden" / "model"
SIZES = ((480, 640), (1080, 1920), (768, 1024), (900, 506))
KINDS = (".jpg", ".png")
MILLION = 10**6


def write_images(folder: Path, count: int) -> list[Path]:
    """Of each size and kind in turn. JPEG files carry EXIF, as those of cameras do."""
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = []
    for height, width in SIZES:
        for kind in KINDS:
            path = folder / f"original{kind}"
            image = Image.effect_noise((width, height), 40).convert("RGB")
            image.save(path, **({"exif": exif} if kind == ".jpg" else {}))
            contents.append((kind, path.read_bytes()))
    paths = []
    for number in range(count):
        kind, content = contents[number % len(contents)]
        paths.append(folder / f"{number}{kind}")
        paths[-1].write_bytes(content)
    return paths


def write_rows(path: Path, images: list[Path | None]) -> Path:
    """A sample each."""
    with path.open("w") as file:
        for number, image in enumerate(images):
            question = ("<image>" if image else "") + f"what is number {number}?"
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "it is one of many, as you can see " * 4},
            ]
            row = {"messages": turns, "images": [image.name] if image else []}
            file.write(json.dumps(row) + "\n")
    return path


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(folder: Path, images: int, texts: int) -> dict[str, object]:
    processor = Processor.from_pretrained(MODEL)
    paths = write_images(folder, images)

    def headers() -> None:
        for path in paths:
            header_size(path)

    def index(file: Path) -> Callable[[], object]:
        sources = open_sources([str(file)])
        return lambda: build_index(sources, processor, cache_dir=folder / "cache")

    headers()  # into the page cache
    with_images = index(write_rows(folder / "images.jsonl", paths))
    text_alone = index(write_rows(folder / "texts.jsonl", [None] * texts))
    cold, warm = seconds(text_alone), seconds(text_alone)
    return {
        "image_headers_per_second": round(images / min(seconds(headers) for _ in range(3))),
        "image_samples_per_second": round(images / seconds(with_images)),
        "text_samples_per_second": round(texts / cold),
        "warm_cache_samples_per_second": round(texts / warm),
        "warm_cache_seconds_per_million": round(warm * MILLION / texts, 2),
        "images": images,
        "texts": texts,
        "processor": platform.processor() or platform.machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--texts", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "index.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.images, options.texts)
    options.out.parent.mkdir(exist_ok=True)
    write_json(options.out, figures)
    print("\n".join(f"{name:34}{value:>12}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
