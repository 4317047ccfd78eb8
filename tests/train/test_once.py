"""What a run does once, or first: index the data, decode an image, meet its costliest batch."""

from pathlib import Path

from PIL.ImageFile import ImageFile

from tests.train.runs import OPTIONS, ROOT, command, launch, run_plain
from vlm.batch import Batch
from vlm.data.index import build_index
from vlm.data.loader import StepDataset, make_plan
from vlm.data.pack import Budget
from vlm.data.plan import Position
from vlm.data.processor import Processor
from vlm.data.sources import open_sources
from vlm.model import VisionLanguageModel


def test_one_rank_alone_indexes_the_data(setting, tmp_path):
    script = ROOT / "tests" / "train" / "indexed.py"
    words = command(setting, tmp_path / "run", 2, script=script, max_steps=1)
    done = launch(words, NOTED=str(tmp_path / "noted"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "noted").read_text().split() == ["0"]


def test_an_image_is_not_decoded_to_be_measured_and_once_to_be_trained_on(setting, monkeypatch):
    decoded = []
    monkeypatch.setattr(ImageFile, "load", _noting(ImageFile.load, decoded))
    processor = Processor.from_pretrained(setting["model"])
    index, _ = build_index(open_sources(setting["dataset"]), processor)
    costs = index.costs(processor.config, {"vit", "aligner", "llm"})
    plan = make_plan(index, costs, len(index), 42, 1, Budget("packed", tokens=256, patches=400))
    assert decoded == []
    step = StepDataset(index, processor, plan, 0)[Position(0, 0)]
    assert step.samples == len(index)
    images = sorted(p.name for p in Path(setting["dataset"][0]).parent.glob("*.png"))
    assert sorted(decoded) == images


def _noting(load, decoded: list[str]):
    def note(image, *args):
        if getattr(image, "tile", None):  # what a file has until it is decoded
            decoded.append(Path(image.filename).name)
        return load(image, *args)

    return note


def test_the_first_batch_that_a_model_meets_fills_the_budgets_as_no_later_one(
    setting, tmp_path, monkeypatch
):
    filled = []
    forward = VisionLanguageModel.forward

    def note(model, batch: Batch):
        tokens = len(batch.input_ids) / OPTIONS["token_budget"]
        filled.append(tokens + len(batch.patches) / OPTIONS["patch_budget"])
        return forward(model, batch)

    monkeypatch.setattr(VisionLanguageModel, "forward", note)
    run_plain(setting, tmp_path / "run", seed=43)  # whose largest batch comes late
    assert filled[0] == max(filled) > filled[1]
