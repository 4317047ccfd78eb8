"""Settings of every test: one thread, no network, and no GPU test where there is no GPU."""

import atexit
import os
import shutil
import tempfile

# Set before torch is imported; child processes inherit them. The models are tiny: more threads
# only get in each other's way, and two ranks of one test use two cores as it is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRAFTVL_CACHE"] = tempfile.mkdtemp(prefix="graftvl-")

import pytest
import torch

atexit.register(shutil.rmtree, os.environ["GRAFTVL_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where torch sees none."""
    if torch.cuda.is_available():
        return
    reason = "needs an NVIDIA GPU, and torch.cuda.is_available() is False here"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def browser():
    """Debian's chromium, without a window."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert chromium, "install chromium, or name it by CHROMIUM"
    with sync_playwright() as driver:
        chrome = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield chrome
        chrome.close()
