"""`python -m vlm.cost`: bad input is one sentence, and the largest that is good still counts."""

import re

import pytest

from tests.model.full_size import EIGHT_BILLION
from tests.model.test_cost_command import DESCRIBED, TINY
from vlm.cost import PARTS, sample_flops
from vlm.cost.__main__ import main
from vlm.cost.memory import decoder_layer
from vlm.cost.report import Setup, make_report
from vlm.cost.samples import LARGEST, CostError, one_sample, read_samples
from vlm.data.limits import Limits

GOOD = '{"length": 40, "targets": 3}\n'
BAD_LINES = {
    "{length": "is not of the form",
    "[1]": "is not of the form",
    '{"length": 40}': "has no 'targets'",
    '{"length": 4.5, "targets": 3}': "must be integers",
    '{"length": true, "targets": 3}': "must be integers",
    '{"length": 40, "targets": 3, "grids": [[1, 4]]}': "[time, height, width]",
    '{"length": 40, "targets": 3, "grids": [[1, 4, 5]]}': "multiples of 2",
    '{"length": 40, "targets": 3, "grids": [[0, 4, 4]]}': "above 0",
    '{"length": 40, "targets": 3, "grids": [[1, 16, 16]]}': "64 visual tokens",
    '{"length": 0, "targets": 0}': "0 tokens",
    '{"length": 4, "targets": -1}': "-1 targets",
    '{"length": 1000001, "targets": 3}': "more than 1,000,000 tokens",
    "[" * 100_000: "is nested too deeply",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(line, tmp_path):
    path = tmp_path / "sizes.jsonl"
    path.write_text(GOOD + line + "\n")
    with pytest.raises(CostError, match=re.escape(BAD_LINES[line])) as caught:
        read_samples(path, TINY.vision)
    assert str(caught.value).startswith(f"{path}:2")


MISTAKES = {
    "": "give --lengths FILE",
    "--tokens 9": "give --lengths FILE",
    "--tokens 0 --targets 0": "'0' is not an integer above 0",
    "--tokens 9 --targets 10": "9 tokens cannot hold",
    "--tokens 900 --targets 10 --images 448": "'448' is not HEIGHTxWIDTH",
    "--tokens 9 --targets 1 --images 448x448": "256 visual tokens",
    "--tokens 9000 --targets 1 --images 10x9000": "--images: 9000 x 10",
    "--tokens 9 --targets 1 --lengths x": "leave --tokens and the like out",
    "--lengths none.jsonl": "none.jsonl cannot be read",
    "--tokens 9 --targets 1 --device h100 --peak_tflops 9": "not both",
    "--tokens 9 --targets 1 --device h100 --dtype float32": "give --peak_tflops instead",
    "--tokens 9 --targets 1 --device v100": "invalid choice: 'v100'",
    "--tokens 9 --targets 1 --mfu 50": "more than the whole peak",
    "--tokens 9 --targets 1 --mfu nan": "'nan' is not a number above 0",
    "--tokens 9 --targets 1 --gpus -1": "'-1' is not an integer above 0",
    "--tokens 9 --targets 1 --recompute some": "invalid choice: 'some'",
    "--tokens 9 --targets 1 --json none/x.json": "none/x.json cannot be written",
    "--tokens 999999999999999999 --targets 1": "'999999999999999999' is more than 1,000,000",
    f"--tokens {'9' * 5000} --targets 1": "is more than 1,000,000",
    f"--tokens 9 --targets {'9' * 5000}": "is more than 1,000,000",
    "--tokens 9 --targets -1": "argument --targets",
    "--tokens 9 --targets 1 --gpus 1000001": "'1000001' is more than 1,000,000",
    f"--tokens 9 --targets 1 --images {'9' * 400}x{'9' * 400}": "is more than 1,000,000 pixels",
    "--tokens 9 --targets 1 --mfu 1e-320": "'1e-320' is not from 1e-06 to 1,000,000",
    "--tokens 9 --targets 1 --frobnicate": "unrecognized arguments: --frobnicate",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_one_sentence(flags, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--model", model, "--stage", "2", *flags.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and MISTAKES[flags] in line


def test_the_largest_figures_stay_numbers(tmp_path):
    """Of an 8B model; beyond int64 they would be negative."""
    samples = one_sample(LARGEST, LARGEST, [], EIGHT_BILLION.vision, Limits())
    setup = Setup(2, 1, "none", per_device_train_batch_size=LARGEST)
    report = make_report(EIGHT_BILLION, samples, setup)
    flops = sample_flops(EIGHT_BILLION, LARGEST, [], LARGEST, PARTS)
    assert report["samples"]["FLOPs"] == flops > 0
    layer = decoder_layer(EIGHT_BILLION.text, 1, True, "none", 2)
    kept = report["memory"]["activations"]["decoder"]
    assert kept == pytest.approx(
        EIGHT_BILLION.text.num_hidden_layers * layer * LARGEST**2, rel=0.01
    )
    assert min(report["memory"]["activations"].values()) >= 0


def test_a_model_that_is_none_is_named(tmp_path, capsys):
    assert main(["--model", str(tmp_path / "none"), "--stage", "2", *DESCRIBED]) == 2
    assert f"{tmp_path}/none does not exist" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert main(["--model", str(tmp_path), "--stage", "2", *DESCRIBED]) == 2
    assert "qwen3_moe" in capsys.readouterr().err
