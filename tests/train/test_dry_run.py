"""A dry run shows what the run would be, and trains nothing."""

import re
from pathlib import Path

import pytest
import torch

from tests.tiny import hybrid
from tests.train.runs import command, launch, run_plain, same, weights_of, write_setting
from train.config import UsageError
from train.dry_run import _hold, marked
from train.world import World
from vlm.cost import PARTS
from vlm.data.collate import collate
from vlm.data.index import build_index
from vlm.data.processor import IGNORED, Processor
from vlm.data.sources import open_sources


def figure(text: str, name: str) -> float:
    """The number behind a name at the start of a line."""
    (found,) = re.findall(rf"^ *{re.escape(name)} +([\d.e+,-]+)", text, re.MULTILINE)
    return float(found.replace(",", ""))


def test_it_shows_plan_cost_memory_and_a_sample(setting, tmp_path, capsys):
    run = run_plain(setting, tmp_path / "run", dry_run=True)
    text = capsys.readouterr().out
    assert figure(text, "samples") == 16 and figure(text, "steps") == 3
    assert "6 steps of 6 samples" in text
    assert figure(text, "decoder linear") > 0 and figure(text, "AdamW moments") > 0
    first = text[text.index("the first sample") :]
    assert "data.jsonl:" in first.splitlines()[0]
    learnt = [line for line in first.splitlines() if line.startswith("> ")]
    assert learnt and learnt[0].startswith("> answer answer")
    assert "  <|im_start|>user" in first.splitlines()
    assert "nothing was trained" in text.splitlines()[-1]
    assert not run.exists()


def test_the_run_itself_may_follow_in_the_same_directory(setting, plain_run, tmp_path):
    run = run_plain(setting, tmp_path / "run", dry_run=True)
    run_plain(setting, run)
    assert same(weights_of(run, 6), weights_of(plain_run, 6))


def test_memory_that_will_not_do_is_told_before_the_first_step(setting, tmp_path, monkeypatch):
    """The costliest micro-batch runs beside what gradients and optimiser will take."""
    held = []

    def runs_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("train.dry_run._hold", lambda size, _world: held.append(size))
    monkeypatch.setattr("train.dry_run._forward_and_backward", runs_out)
    with pytest.raises(UsageError, match=r"costliest micro-batch \(\d+ tokens, \d+ patches\)"):
        run_plain(setting, tmp_path / "run")
    trained = sum(p.numel() for p in hybrid().parameters())
    assert held[0] == 12 * trained  # moments and gradients in float32


def test_a_host_that_has_less_is_told_so_too(setting, tmp_path, monkeypatch):
    """Gradients and moments of a test's model take 12 bytes for each of its weights."""
    needed = 12 * sum(p.numel() for p in hybrid().parameters())
    monkeypatch.setattr("train.dry_run.free_memory", lambda _world: needed)
    run_plain(setting, tmp_path / "run", dry_run=True)
    monkeypatch.setattr("train.dry_run.free_memory", lambda _world: needed - 1)
    with pytest.raises(UsageError, match=r"rank 0 runs out .* memory are free\)$") as error:
        run_plain(setting, tmp_path / "run", dry_run=True)
    assert "\n" not in str(error.value)


def test_a_device_holds_the_block():
    world = World(0, 1, torch.device("meta"), launched=False)  # stands for any but a CPU
    assert _hold(1000, world).nbytes == 1000


@pytest.mark.parametrize("frozen", [{"freeze_aligner"}, {"freeze_llm"}])
def test_the_cost_of_a_step_is_the_plans(setting, tmp_path, capsys, frozen):
    """FLOPs of average samples, six a step; without the language model text alone is left out."""
    run_plain(setting, tmp_path / "run", dry_run=True, **dict.fromkeys(frozen, True))
    text = capsys.readouterr().out
    processor = Processor.from_pretrained(setting["model"])
    index, _ = build_index(open_sources(setting["dataset"]), processor)
    costs = index.costs(processor.config, set(PARTS) - {name[7:] for name in frozen})
    if "freeze_llm" in frozen:
        costs[index.patches == 0] = 0
    table = text[text.index("FLOPs of a step") :]
    found = float(re.search(r"^  all +([\d.e-]+) TF", table, re.MULTILINE)[1])
    assert found == pytest.approx(6 * costs.mean() / 1e12, rel=1e-3)


def test_a_stream_has_no_plan_but_a_sample(setting, tmp_path, capsys):
    run_plain(setting, tmp_path / "run", dry_run=True, streaming=True)
    text = capsys.readouterr().out
    assert "plan of an epoch" not in text and "> answer" in text and "AdamW moments" in text


def test_two_ranks_say_it_once(setting, tmp_path):
    done = launch(command(setting, tmp_path / "run", 2, dry_run=True))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("nothing was trained") == done.stdout.count("plan of an epoch") == 1


def test_marks_are_where_targets_are(setting):
    processor = Processor.from_pretrained(setting["model"])
    index, _ = build_index(open_sources(setting["dataset"]), processor)
    examples = [processor.encode(index.sample(number)) for number in (3, 5)]
    text = marked(collate(examples, processor.config), processor)
    learnt = "\n".join(line[2:] for line in text.split("\n") if line.startswith("> "))
    ids = examples[0].targets[examples[0].targets != IGNORED].tolist()
    assert learnt == processor.tokenizer.decode(ids, skip_special_tokens=False)
    merged = [t * h * w // 4 for t, h, w in examples[0].grid_thw]
    assert [int(n) for n in re.findall(r"<\|image_pad\|> x (\d+)", text)] == merged


def test_it_changes_nothing_beside_a_run(tmp_path, capsys):
    """What a run clears away, writes and puts aside at its start is told, or left for it."""
    setting = write_setting(tmp_path / "setting")
    run = run_plain(setting, tmp_path / "run", save_steps=3)
    (run / "checkpoint-6" / "trainer.json").unlink()
    (run / "checkpoint-9.partial").mkdir()
    (run / "log.jsonl").open("a").write('{"event": "train", "step": 9}\n{"torn')
    (run / "ledger.jsonl").write_text('{"torn')
    source = Path(setting["dataset"][0])
    source.with_name("more.jsonl").write_text('{"messages": 1}\n')
    before = contents(run)
    data = [str(source.with_name("more.jsonl")), *setting["dataset"]]
    options = {"dry_run": True, "max_bad_fraction": 0.5}
    with pytest.raises(UsageError, match="the data differs"):
        run_plain(setting | {"dataset": data}, run, **options)
    run_plain(setting, run, **options)
    told = "checkpoint-6 cannot be resumed (trainer.json is missing); the run goes on from checkp"
    assert told in capsys.readouterr().out
    assert contents(run) == before


def contents(folder: Path) -> dict[Path, object]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_directory_that_cannot_be_made(setting, tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/run"):
        with pytest.raises(UsageError, match="cannot be written"):
            run_plain(setting, tmp_path / place, dry_run=True)
