"""serve/export.py: what it writes loads elsewhere, computes the same, and says where it is from."""

import copy
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from serve import export as exporter
from serve.conversation import NO_THOUGHT
from serve.export import main
from serve.export_files import GUARD
from tests.tiny import GOLDEN_MODEL, write_hybrid
from vlm.checkpoint import TensorReader, load_model

STRANGER = """
import io, json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
{preamble}
folder, trust = sys.argv[1], {trust}
model, info = AutoModelForImageTextToText.from_pretrained(
    folder, trust_remote_code=trust, output_loading_info=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
content = [{{"type": "image", "image": Image.new("RGB", (90, 70), "red")}},
           {{"type": "text", "text": "What?"}}]
messages = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=trust)
said = pipe(text=messages, max_new_tokens=5, do_sample=False, return_full_text=False)
print(json.dumps({{
    "class": type(model).__module__, "vlm": "vlm" in sys.modules,
    "strangers": sum(map(len, info.values())) if isinstance(info, dict) else 0,
    "new": ids[0, inputs["input_ids"].shape[1]:].tolist(),
    "text": said[0]["generated_text"],
    "decoded": processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True),
    "image": type(processor.image_processor).__name__,
    "video": type(processor.video_processor).__name__,
    "frames": [processor.video_processor.fps, processor.video_processor.max_frames],
}}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_hybrid(tmp_path_factory.mktemp("models") / "hybrid", tie=True)


@pytest.fixture(scope="module")
def exported(source):
    out = source.with_name("exported")
    assert main([str(source), "--out", str(out)]) == 0
    return out


def stranger(folder, preamble: str, trust: bool) -> dict:
    """What a process that knows nothing of this checkout makes of an export."""
    code = STRANGER.format(preamble=preamble, trust=trust)
    command = [sys.executable, "-c", code, str(folder)]
    result = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_transformers_loads_it_by_its_own_code(exported):
    seen = stranger(exported, "", True)
    assert seen["class"].startswith("transformers_modules.") and not seen["vlm"]
    assert seen["strangers"] == 0
    assert seen["image"] == "Qwen2VLImageProcessor" and seen["video"] == "Qwen2VLVideoProcessor"
    assert seen["frames"] == [2.0, 12]
    assert len(seen["new"]) == 5 and seen["text"] == seen["decoded"]


def test_after_import_vlm_hf_it_needs_no_trust_and_says_the_same(exported):
    trusted, known = (stranger(exported, *how) for how in (("", True), ("import vlm.hf", False)))
    assert known["class"] == "vlm.hf.modeling_graft_vl"
    assert known["new"] == trusted["new"] and known["text"] == trusted["text"]


def test_the_tensors_are_the_checkpoints_own(source, exported):
    theirs, ours = TensorReader(exported), TensorReader(source)
    assert theirs.names() == ours.names()
    assert all(torch.equal(theirs.get(name), ours.get(name)) for name in ours.names())
    assert "lm_head.weight" not in theirs.names()  # tied


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "1e300"])
def test_a_shard_size_that_is_none(source, tmp_path, capsys, size):
    with pytest.raises(SystemExit) as stopped:
        main([str(source), "--out", str(tmp_path / "out"), "--max_shard_gb", size])
    assert stopped.value.code == 2
    assert "--max_shard_gb must be above 0 and up to" in capsys.readouterr().err


def test_the_report_of_the_graft_travels_along(source, tmp_path):
    grafted = tmp_path / "grafted"
    shutil.copytree(source, grafted)
    report = json.dumps({"donors": {"vision": {"path": "a/vl"}, "llm": {"path": "a/qwen3"}}})
    (grafted / "graft_report.json").write_text(report)
    assert main([str(grafted), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "graft_report.json").read_text() == report


def test_shards_and_dtype(source, tmp_path):
    out = tmp_path / "small"
    flags = ["--max_shard_gb", "0.0005", "--dtype", "bfloat16"]
    assert main([str(source), "--out", str(out), *flags]) == 0
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    reader = TensorReader(out)
    assert {reader.get(name).dtype for name in reader.names()} == {torch.bfloat16}
    load_model(out)


def test_thinking_is_switched_by_the_template_as_qwen3_has_it(exported):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    asked = [{"role": "user", "content": "Why?"}]
    plain, off, on = (
        tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False, **given)
        for given in ({}, {"enable_thinking": False}, {"enable_thinking": True})
    )
    assert off == plain + NO_THOUGHT and on == plain


@pytest.fixture
def run(source, tmp_path):
    """A run's directory, as training leaves it, whose own start was another run's checkpoint."""
    first = make_run(tmp_path / "stage1", source, "models/graft", max_pixels=200704)
    return make_run(tmp_path / "stage2", source, first / "checkpoint-2" / "model", 401408)


def make_run(folder, source, model, max_pixels):
    shutil.copytree(source, folder / "checkpoint-2" / "model")
    config = {"model": str(model), "dataset": ["data/cats.jsonl"], "learning_rate": 1e-5}
    config |= {"freeze_vit": True, "freeze_aligner": False, "freeze_llm": True, "aligner_lr": 2e-3}
    config |= {"max_pixels": max_pixels, "fps_max_frames": 8}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    progress = {"step": 2, "updates": 2, "global_batch_size": 16, "samples": 1234}
    (folder / "checkpoint-2" / "trainer.json").write_text(json.dumps(progress))
    (folder / "latest").write_text("checkpoint-2\n")
    log = [{"event": "train", "step": n, "loss": 5.0 - n} for n in (1, 2, 3)]
    lines = "\n".join(map(json.dumps, log))
    (folder / "log.jsonl").write_text(lines + '\n{"event": "tra')
    return folder


def test_a_run_is_exported_with_its_limits_and_its_history(run, tmp_path):
    out = tmp_path / "mine"
    assert main([str(run), "--out", str(out), "--video_max_pixels", "25088"]) == 0
    image = json.loads((out / "preprocessor_config.json").read_text())
    both = json.loads((out / "processor_config.json").read_text())
    video = json.loads((out / "video_preprocessor_config.json").read_text())
    assert image["size"] == both["image_processor"]["size"]
    assert image["size"] == {"shortest_edge": 3136, "longest_edge": 401408}
    assert (video["size"]["longest_edge"], video["max_frames"], video["fps"]) == (25088, 8, 2.0)
    card = (out / "README.md").read_text()
    rows = [line for line in card.splitlines() if "`cats.jsonl`" in line]
    assert rows == [
        f"| {n} | aligner | `cats.jsonl` | 1,234 | 2 | 16 | 1e-05, aligner 0.002 | 3.5000 |"
        for n in (1, 2)
    ]
    assert "401,408" in card and str(tmp_path) not in card


def test_stock_vllm_gets_zero_biases_and_a_guard(tmp_path, capsys):
    source = write_hybrid(tmp_path / "wide", hidden_size=128)
    out = tmp_path / "stock"
    assert main([str(source), "--out", str(out), "--format", "vllm_stock"]) == 0
    assert "stock transformers drops" in capsys.readouterr().err
    assert (out / GUARD).exists() and not list(out.glob("*.py"))
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl" and config["text_config"]["qk_norm"] is True
    assert "auto_map" not in config
    reader = TensorReader(out)
    biases = [name for name in reader.names() if "self_attn" in name and name.endswith("bias")]
    assert len(biases) == 9 and not any(reader.get(name).any() for name in biases)
    video = json.loads((out / "video_preprocessor_config.json").read_text())
    assert video["do_sample_frames"] is False


def test_stock_vllm_cannot_hold_every_shape(source, tmp_path, capsys):
    out = tmp_path / "stock"
    assert main([str(source), "--out", str(out), "--format", "vllm_stock"]) == 2
    assert "4 heads of 32 are not the hidden size 48" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_that_is_not_the_sources_own_is_refused(
    source, tmp_path, monkeypatch, capsys, dtype
):
    honest = exporter.export_tensors
    damaged = "model.language_model.layers.1.self_attn.q_norm.weight"

    def damage(*arguments):
        for entry in honest(*arguments):
            if entry.name == damaged:
                entry = replace(entry, parts=(entry.parts[0].values() * 1.1,))
            yield entry

    monkeypatch.setattr(exporter, "export_tensors", damage)
    out = tmp_path / "bad"
    assert main([str(source), "--out", str(out), "--dtype", dtype]) == 2
    assert f"{damaged} is not what" in capsys.readouterr().err
    assert not out.exists()


def test_a_config_that_computes_otherwise_is_refused(source, tmp_path, monkeypatch, capsys):
    honest = exporter.export_config

    def damage(*arguments):
        config = copy.deepcopy(honest(*arguments))
        config["text_config"]["rope_parameters"]["rope_theta"] = 100.0
        return config

    monkeypatch.setattr(exporter, "export_config", damage)
    out = tmp_path / "bad"
    assert main([str(source), "--out", str(out)]) == 2
    assert "the logits differ" in capsys.readouterr().err
    assert not out.exists()


def test_another_template_is_refused(source, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(source, other)
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template.replace("You are a helpful", "Be a"))
    assert main([str(other), "--out", str(tmp_path / "out")]) == 2
    assert "chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("nowhere", "does not exist"),
        (GOLDEN_MODEL.parents[1], "neither config.json nor model/"),
        (GOLDEN_MODEL, "is a qwen2_5_vl model"),
    ],
)
def test_what_cannot_be_exported_is_named(folder, words, tmp_path, capsys):
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_an_existing_export_is_never_overwritten(source, exported, capsys):
    assert main([str(source), "--out", str(exported)]) == 2
    assert "exists" in capsys.readouterr().err


def test_generation_is_neutral_whatever_the_source_says(source, tmp_path):
    loud = tmp_path / "loud"
    shutil.copytree(source, loud)
    settings = {"repetition_penalty": 1.05, "do_sample": True, "temperature": 1e-6}
    (loud / "generation_config.json").write_text(json.dumps(settings))
    for folder in (source, loud):
        assert main([str(folder), "--out", str(tmp_path / f"of_{folder.name}")]) == 0
        written = json.loads((tmp_path / f"of_{folder.name}/generation_config.json").read_text())
        assert (
            set(written) == {"eos_token_id", "pad_token_id"} and len(written["eos_token_id"]) == 2
        )


def test_a_template_in_json_is_taken(source, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(source, other)
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").unlink()
    (other / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert main([str(other), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/chat_template.jinja").read_text().startswith(template.rstrip())


def test_a_batch_is_padded_so_that_each_row_is_answered_as_alone(exported):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import vlm.hf  # noqa: F401

    processor = AutoProcessor.from_pretrained(exported)
    model = AutoModelForImageTextToText.from_pretrained(exported).eval()
    asked = [[{"role": "user", "content": text}] for text in ("Why?", "And how many, in all?")]
    given = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    given |= {"return_tensors": "pt", "padding": True}

    def answers(conversations):
        inputs = processor.apply_chat_template(conversations, **given)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    assert answers(asked) == [*answers(asked[:1]), *answers(asked[1:])]


def test_what_transformers_saves_again_takes_its_code_along(exported, tmp_path):
    code = (
        "import sys, vlm.hf; from transformers import AutoModelForImageTextToText as M;"
        "M.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    saved = tmp_path / "saved"
    subprocess.run([sys.executable, "-c", code, exported, saved], check=True, capture_output=True)
    assert (saved / "modeling_graft_vl.py").exists()
    assert (saved / "configuration_graft_vl.py").exists()


def test_the_cards_own_example_runs(exported, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    shutil.copyfile("tests/golden/images/exif3.jpg", tmp_path / "cat.jpg")
    (tmp_path / "exported").symlink_to(exported)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_card_holds_the_scores_it_is_given(source, tmp_path, capsys):
    results = tmp_path / "results"
    assert main([str(source), "--out", str(tmp_path / "none"), "--results", str(results)]) == 2
    assert "holds no complete result.json" in capsys.readouterr().err
    for name, complete in (("mmmu", True), ("pope", False)):
        (results / name).mkdir(parents=True)
        score = {"benchmark": name, "metric": "accuracy", "score": 41.5, "n": 900, "notes": ["odd"]}
        score |= {"backend": "native", "backend_version": "evalscope 1.14.1", "complete": complete}
        (results / name / "result.json").write_text(json.dumps(score))
    assert main([str(source), "--out", str(tmp_path / "out"), "--results", str(results)]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "| mmmu | accuracy | 41.50 | 900 | native, evalscope 1.14.1 |" in card
    assert "- mmmu: odd" in card and "pope" not in card


def test_history_ends_where_it_was_removed(run, tmp_path):
    shutil.rmtree(tmp_path / "stage1" / "checkpoint-2")
    (tmp_path / "config.yaml").write_text("somebody: else's\n")
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("`cats.jsonl`") == 1


def test_limits_that_contradict_each_other(source, tmp_path, capsys):
    flags = ["--max_pixels", "100", "--out", str(tmp_path / "out")]
    assert main([str(source), *flags]) == 2
    assert "max_pixels 100 is below min_pixels 3136" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(source, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(source), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub; returns the calls it got."""
    calls = []

    class Hub:
        def create_repo(self, name, **options):
            if name.startswith("down/"):
                raise ConnectionError("no route")
            calls.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, **options):
            calls.append(options)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return calls


def test_push_makes_the_repository_and_uploads_the_folder(source, tmp_path, hub, capsys):
    out = tmp_path / "mine"
    assert main([str(source), "--out", str(out), "--push", "me/vlm", "--private"]) == 0
    assert "https://hub/me/vlm" in capsys.readouterr().out
    assert hub[0] == ("me/vlm", {"private": True, "exist_ok": True})
    assert hub[1]["repo_id"] == "me/vlm" and hub[1]["folder_path"] == out
    assert 'model="me/vlm"' in (out / "README.md").read_text()


def test_a_hub_that_is_down_leaves_the_export_and_says_how_to_go_on(source, tmp_path, hub, capsys):
    out = tmp_path / "mine"
    assert main([str(source), "--out", str(out), "--push", "down/vlm"]) == 2
    assert f"`hf upload down/vlm {out}` tries again" in capsys.readouterr().err
    assert out.is_dir()
