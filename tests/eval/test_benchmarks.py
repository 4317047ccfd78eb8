"""Every YAML in configs/eval/ is right about the libraries that it names."""

import json
import subprocess
from dataclasses import fields
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from PIL import Image

from eval import benchmarks
from eval.benchmarks import PROMPT_FIELDS, Benchmark, load, load_suite, names
from eval.result import EvalError

ROOT = Path(__file__).parents[2]
VLMEVALKIT_NAMES = Path(__file__).parent / "data" / "vlmevalkit_datasets.txt"
VLMEVALKIT_PYTHON = ROOT / ".venv-vlmevalkit" / "bin" / "python"
PRINT_NAMES = """
import json
from vlmeval.dataset import SUPPORTED_DATASETS
print(json.dumps(sorted(set(SUPPORTED_DATASETS))))
"""
ASKED_FOR = {
    *("mmmu", "mmmu_pro", "mmbench_en", "mmbench_cn", "mmstar", "mathvista", "mathverse", "ai2d"),
    *("scienceqa", "chartqa", "docvqa", "infovqa", "textvqa", "ocrbench", "realworldqa", "pope"),
    *("hallusionbench", "seedbench2_plus", "blink", "mmvet", "vqav2", "mvbench", "video_mme"),
}
SELDOM = {"native_metric", "temperature", "thinking", "dataset_args"}
ALWAYS_WRITTEN = {entry.name for entry in fields(Benchmark)} - SELDOM
ALL = {name: load(name) for name in names()}
NATIVE = [name for name, benchmark in ALL.items() if benchmark.native]
GOOD = {"name": "good", "title": "Good", "source": "a page", "licence": "MIT", "size": 1}
GOOD |= {"metric": "accuracy", "native": "mmmu"}
CHOICES = "{question} {choices}"


def write(folder: Path, name: str = "good", **changes) -> str:
    """A YAML of GOOD with some keys changed, or left out where None; its path."""
    content = {key: value for key, value in (GOOD | changes).items() if value is not None}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_the_benchmarks_asked_for_are_there_and_each_says_everything():
    assert set(ALL) >= ASKED_FOR
    for name in ALL:
        written = yaml.safe_load((benchmarks.CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        assert written.keys() >= ALWAYS_WRITTEN, name
        assert {key: getattr(ALL[name], key) for key in written} == written


def test_the_default_is_native_at_temperature_0_and_the_others_are_known():
    assert all(not benchmark.thinking for benchmark in ALL.values())
    assert {name for name in ALL if ALL[name].temperature} == {"mmmu_recipe"}
    only_vlmevalkit = {name for name in ALL if ALL[name].backends == ("vlmevalkit",)}
    assert only_vlmevalkit == {"textvqa", "mmvet", "video_mme", "mmmu_recipe"}
    for name in only_vlmevalkit - {"mmmu_recipe"}:
        assert "no native adapter" in ALL[name].differs


def test_the_recipes_own_setting():
    recipe = ALL["mmmu_recipe"]
    assert (recipe.vlmevalkit, recipe.temperature) == ("MMMU_DEV_VAL", 0.6)
    assert (recipe.max_tokens, recipe.judge) == (512, "none")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_token": 5}, "unknown key max_token; did you mean max_tokens?"),
        ({"max_tokens": "many"}, "max_tokens is 'many'; it must be int"),
        ({"max_tokens": 0}, "positive"),
        ({"subsets": "en"}, "it must be list[str] | None"),
        ({"judge": "maybe"}, "judge is 'maybe'"),
        ({"licence": None}, "required: licence"),
        ({"name": "other"}, "name and file must agree"),
        ({"native": None}, "neither native nor vlmevalkit"),
        ({"temperature": 0.6}, "`differs`"),
        ({"thinking": True}, "`differs`"),
        ({"native": None, "vlmevalkit": "MMVet"}, "`differs`"),
        ({"native": None, "vlmevalkit": "MMVet", "subsets": ["a"]}, "ignores subsets"),
        ({"dataset_args": {"prompt_template": "{question}"}}, "write prompt in place of"),
        ({"dataset_args": {"subset_list": ["Art"]}}, "write subsets in place of"),
        ({"prompt": CHOICES}, "the adapter mmmu ignores a prompt"),
        ({"prompt": CHOICES, "native": "ai2d", "vlmevalkit": "AI2D_TEST"}, "VLMEvalKit ignores"),
        ({"prompt": CHOICES, "native": None, "vlmevalkit": "MMVet"}, "VLMEvalKit ignores"),
        ({"prompt": "{question}", "native": "ai2d"}, "must hold {question}, {choices}"),
        ({"prompt": "{question} {hint}", "native": "pope"}, "may hold {question} and no other"),
        ({"prompt": r"{question} \boxed{}", "native": "pope"}, "may hold {question} and no other"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, changes, said):
    with pytest.raises(EvalError) as caught:
        load(write(tmp_path, **changes))
    message = str(caught.value)
    assert said in message
    assert "\n" not in message and len(message) < 500
    assert "good" in message


@pytest.mark.parametrize("text", ["name: [", "- name", "", "name: good\n\ttitle: x"])
def test_a_file_that_is_no_yaml_of_keys(tmp_path, text):
    path = tmp_path / "good.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EvalError, match=r"good\.yaml") as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


def test_a_mistyped_name():
    with pytest.raises(EvalError, match="did you mean mathvista"):
        load("mathvist")


def test_a_prompt_that_is_honoured_is_taken(tmp_path):
    assert load(write(tmp_path, native="ai2d", prompt=CHOICES)).prompt == CHOICES


def test_suites_name_benchmarks_that_exist():
    suites = sorted(benchmarks.CONFIGS.glob(f"{benchmarks.SUITE}*.yaml"))
    assert suites
    for suite in suites:
        assert set(load_suite(suite)) <= set(ALL)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("benchmarks: [mmmu, mmstarr]", "did you mean mmstar"),
        ("benchmarks: [mmmu, mmmu]", "mmmu twice"),
        ("benchmarks: mmmu", "nothing else"),
        ("benchmarks: []", "nothing else"),
        ("benchmarks: [mmmu]\nlimit: 3", "nothing else"),
        ("benchmarks: [", "cannot be read"),
    ],
)
def test_a_suite_that_cannot_be_used(tmp_path, text, said):
    path = tmp_path / "suite_mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EvalError, match=said):
        load_suite(path)


def test_every_vlmevalkit_name_is_in_the_generated_list():
    known = VLMEVALKIT_NAMES.read_text(encoding="utf-8").split()
    named = {name: benchmark.vlmevalkit for name, benchmark in ALL.items() if benchmark.vlmevalkit}
    assert {name: dataset for name, dataset in named.items() if dataset not in known} == {}


@pytest.mark.slow
def test_the_list_of_vlmevalkit_is_that_of_the_installed_one():
    """Renews the list where it is stale, and fails once so that somebody looks at the change."""
    if not VLMEVALKIT_PYTHON.exists():
        pytest.skip("VLMEvalKit has an environment of its own: make eval_vlmevalkit")
    command = [str(VLMEVALKIT_PYTHON), "-c", PRINT_NAMES]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])  # the lines before are its own chatter
    text = "".join(f"{name}\n" for name in found)
    if text != VLMEVALKIT_NAMES.read_text(encoding="utf-8"):
        VLMEVALKIT_NAMES.write_text(text, encoding="utf-8")
        pytest.fail(f"{VLMEVALKIT_NAMES} was not what is installed; renewed, see git diff")


@pytest.fixture(scope="module")
def evalscope():
    """The library, with our own adapter registered: its import takes seconds."""
    import evalscope

    from eval import custom  # noqa: F401 - registers our own adapter

    return evalscope


@pytest.fixture(scope="module")
def adapter(evalscope, tmp_path_factory):
    """Makes an adapter by its name in EvalScope, with its data in an empty folder."""
    from evalscope.api.registry import get_benchmark

    folder = tmp_path_factory.mktemp("data")

    def make(name: str, **arguments):
        config = evalscope.TaskConfig(
            model="m", datasets=[name], dataset_args={name: arguments}, dataset_dir=str(folder)
        )
        return get_benchmark(name, config)

    return make


@pytest.mark.parametrize("name", NATIVE)
def test_the_native_adapter_has_what_the_yaml_names(name, adapter, evalscope):
    benchmark = ALL[name]
    found = adapter(benchmark.native, **benchmark.dataset_args)
    meta = found._benchmark_meta
    assert all(hasattr(meta, key) for key in benchmark.dataset_args)  # others are dropped silently
    for key, value in benchmark.dataset_args.get("extra_params", {}).items():
        assert found.extra_params[key] == value
    if benchmark.native == "graftvl_custom":
        return  # the data is the user's
    assert meta.dataset_id == benchmark.hub_id
    of_library = Path(evalscope.__file__).parent / "benchmarks" / "_meta"
    statistics = json.loads((of_library / f"{benchmark.native}.json").read_text())["statistics"]
    counts = {entry["name"]: entry["sample_count"] for entry in statistics["subset_stats"]}
    asked = benchmark.subsets or meta.subset_list
    assert set(asked) <= set(counts)
    assert sum(counts[subset] for subset in asked) == benchmark.size
    if benchmark.subsets is None:
        assert set(asked) == set(counts), "by itself the adapter asks only some: name them all"


@pytest.mark.parametrize("name", NATIVE)
def test_the_metric_and_the_judge_are_those_of_the_adapter(name, adapter):
    from evalscope.constants import ScoringPolicy
    from evalscope.metrics.semantics.legacy_identity import migrate_legacy_identity

    benchmark = ALL[name]
    found = adapter(benchmark.native)
    meta = found._benchmark_meta
    reported = {
        migrate_legacy_identity(metric, meta.aggregation, benchmark_name=meta.name).name
        for metric in meta._metric_names()
    }
    if benchmark.native_metric:
        assert benchmark.native_metric in reported
    else:
        assert meta.primary_metric or len(reported) == 1, f"name one of {reported}"
    if found.scoring_policy is ScoringPolicy.JUDGE_ONLY:
        assert benchmark.judge == "required"
    elif found.scoring_policy is ScoringPolicy.JUDGE_DEFAULT:
        assert benchmark.judge == "optional"
    else:
        assert benchmark.judge != "required"


def png() -> dict:
    data = BytesIO()
    Image.new("RGB", (28, 28)).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def record(native: str) -> dict:
    """A row of the adapter's data, as small as it takes it."""
    letters = {"A": "one", "B": "two", "C": "three", "D": "four"}
    options = list(letters.values())
    common = dict.fromkeys(("image", "image_1", "decoded_image"), png())
    common |= dict.fromkeys(("question", "prompt"), "How many?")
    common |= {"id": "1", "answer": "A", "options": options, "choices": options}
    mmmu = {"options": str(options), "question_type": "multiple-choice", "subject": "Art"}
    mmmu |= dict.fromkeys(("subfield", "explanation", "img_type", "topic_difficulty"), "")
    plus = "data_id question_id question_image_subtype data_source data_type level subpart version"
    special = {
        "mmmu": mmmu,
        "mmmu_pro": mmmu,
        "mm_bench": letters,
        "math_vista": {"question_type": "multi_choice", "answer_type": "text", "metadata": {}}
        | {"answer": "one"},
        "math_verse": {"question_type": "multi-choice", "problem_version": "Vision Only"},
        "ai2d": {"answer": "0"},
        "science_qa": {"answer": 0},
        "chartqa": {"type": "human_test"},
        "hallusion_bench": {"gt_answer": "1"},
        "pope": {"answer": "yes"},
        "real_world_qa": {"image_path": "a.png"},
        "seed_bench_2_plus": {f"choice_{key}": value for key, value in letters.items()}
        | dict.fromkeys(plus.split(), "")
        | {"question_image_type": "chart"},
        "mvbench": {"video": "a.mp4", "candidates": options, "answer": "one"},
        "videomme_v2": {"video_id": "1", "url": "https://example.org/a.mp4"},
    }
    return common | special.get(native, {})


OF_LIBRARY = {ALL[name].native for name in NATIVE} - {"graftvl_custom"} | set(PROMPT_FIELDS)


@pytest.mark.parametrize("native", sorted(OF_LIBRARY))
def test_a_prompt_is_honoured_by_the_adapters_that_we_say_and_by_no_other(native, adapter):
    template = "MARK " + " ".join(f"{{{key}}}" for key in PROMPT_FIELDS.get(native, ["question"]))
    made = adapter(native, prompt_template=template)
    if native == "mvbench":
        made.current_subset_name = "action_antonym"
        video = Path(made._cache_output_path("action_antonym", "a.mp4"))
        video.parent.mkdir(parents=True)
        video.touch()
    sample = made.record_to_sample(record(native))
    parts = sample.input[0].content
    text = " ".join(part.text for part in parts if part.type == "text")
    assert "How many?" in text
    assert ("MARK" in text) == (native in PROMPT_FIELDS)
    if native in PROMPT_FIELDS:
        assert ("three" in text) == ("choices" in PROMPT_FIELDS[native])
