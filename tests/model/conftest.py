"""A fixture of these tests."""

import json

import pytest

from tests.tiny import hybrid_config


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A directory without weights: none are needed."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(hybrid_config()))
    return str(folder)
