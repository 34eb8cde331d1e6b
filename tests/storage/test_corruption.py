"""A few of the damaged and hostile files that `corruption.py` makes by the thousand."""

import pytest

from corruption import (
    MODEL_DAMAGE,
    STATE_DAMAGE,
    crafted_model,
    crafted_state,
    make_files,
    read_good,
    try_file,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    paths = make_files(tmp_path_factory.mktemp("good"))
    return {path: read_good(path) for path in paths}


@pytest.mark.parametrize("which", [0, 1], ids=["model", "state"])
def test_damage_is_refused_in_one_line(files, which):
    path, good = list(files.items())[which]
    for kind in (MODEL_DAMAGE, STATE_DAMAGE)[which]:
        for seed in range(3):
            assert try_file(path, good, kind, seed)[0] in ("refused", "identical"), (kind, seed)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(("which", "kind"), [(0, crafted_model), (1, crafted_state)], ids=["model", "state"])
def test_files_that_a_person_made_do_not_crash(files, which, kind):
    path, good = list(files.items())[which]
    for seed in range(20):
        end, said = try_file(path, good, kind, seed)
        assert end != "crashed", (seed, said)
