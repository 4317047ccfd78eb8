"""The index: image headers a second on one core, and samples a second from a warm cache.

    python -m bench.index                     # 4,000 images, 200,000 texts

Images are generated JPEG and PNG files of several sizes in a temporary directory, in the page
cache; every sample has one. Texts are short dialogues. All of it runs in one process. Seconds per
million are extrapolated from the sizes given.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from bench.common import (
    GOLDEN_MODEL,
    ROUNDS,
    arguments,
    interleaved,
    print_table,
    seconds,
    summary,
    write_result,
)
from vlm.data.image import header_size
from vlm.data.index import build_index
from vlm.data.processor import Processor
from vlm.data.sources import open_sources

SIZES = ((480, 640), (1080, 1920), (768, 1024), (900, 506))
KINDS = (".jpg", ".png")
MILLION = 10**6
TARGET = 5000
"""Headers a second on a core."""


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


def measure(folder: Path, images: int, texts: int) -> dict[str, object]:
    processor = Processor.from_pretrained(GOLDEN_MODEL)
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
    cold = {"images": seconds(with_images), "texts": seconds(text_alone)}
    works = {"headers": headers, "warm": text_alone}
    taken = interleaved(
        ROUNDS, {name: lambda work=work: seconds(work) for name, work in works.items()}
    )
    return {
        "image_headers_per_second": summary((images / s for s in taken["headers"]), 0),
        "image_samples_per_second": round(images / cold["images"]),
        "text_samples_per_second": round(texts / cold["texts"]),
        "warm_cache_samples_per_second": summary((texts / s for s in taken["warm"]), 0),
        "warm_cache_seconds_per_million": summary((s * MILLION / texts for s in taken["warm"]), 2),
        "images": images,
        "texts": texts,
    }


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments("index", __doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--texts", type=int, default=200_000)
    options = parser.parse_args(given)
    if options.quick:
        options.images, options.texts = 40, 200
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.images, options.texts)
    print_table([{"index": name, "": value} for name, value in figures.items()])
    write_result(
        "index",
        options,
        what="image headers and samples that one core measures in a second, and samples that it "
        "takes from the cache",
        target={"image headers": f">= {TARGET:,} a second and core"},
        figures=figures,
        spread=f"least and most of {ROUNDS} interleaved rounds; a cold index is made once",
        refuted_by="python -m bench.index on an idle machine: fewer headers a second",
        packages=("pillow",),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
