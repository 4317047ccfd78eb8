import pytest

from tests.train.engines import run_several, two_rank_configs
from tests.train.runs import damage, run_plain, run_ranks, write_setting


@pytest.fixture(scope="session")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("setting"))


@pytest.fixture(scope="session")
def plain_run(setting, tmp_path_factory):
    """Six uninterrupted steps on one process."""
    return run_plain(setting, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="session")
def two_rank_run(setting, tmp_path_factory):
    """The same six steps on two ranks, with a data worker each and checkpoints on the way."""
    out = tmp_path_factory.mktemp("ranks") / "run"
    return run_ranks(setting, out, 2, save_steps=2, dataloader_num_workers=1)


@pytest.fixture(scope="session")
def two_ranks(setting, tmp_path_factory):
    """The folder of several runs on two ranks, for test_engines.py and its neighbours."""
    folder = tmp_path_factory.mktemp("several")
    write_setting(folder / "damaged")
    damage(folder / "damaged" / "6-0.png")
    run_several(two_rank_configs(setting, folder), 2)
    return folder
