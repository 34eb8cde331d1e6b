"""A few of the damaged and hostile files that `corruption.py` makes by the thousand."""

import pytest

from corruption import MODEL_DAMAGE, STATE_DAMAGE, crafted, make_files, read_intact, try_file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    paths = make_files(tmp_path_factory.mktemp("intact"))
    return {path: read_intact(path) for path in paths}


@pytest.mark.parametrize("which", [0, 1], ids=["model", "state"])
def test_damaged_file_is_refused_in_one_line(files, which):
    path, intact = list(files.items())[which]
    for kind in (MODEL_DAMAGE, STATE_DAMAGE)[which]:
        for seed in range(3):
            assert try_file(path, intact, kind, seed)[0] in ("refused", "identical"), (kind, seed)


@pytest.mark.parametrize("which", [0, 1], ids=["model", "state"])
def test_crafted_file_does_not_crash(files, which):
    path, intact = list(files.items())[which]
    for seed in range(20):
        end, message = try_file(path, intact, crafted, seed)
        assert end != "crashed", (seed, message)
