import pytest

from tests.unit.rlmed.studio.run_folders import client_of, write_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with two finished runs, `day/a` and `day/b`, which differ in their seed."""
    top = tmp_path_factory.mktemp("runs")
    write_run(top / "day" / "a")
    write_run(top / "day" / "b", seed=7)
    return top


@pytest.fixture(scope="module")
def client(folders, tmp_path_factory):
    """A browser at a studio without a token over `folders`."""
    return client_of(folders, cache=tmp_path_factory.mktemp("cache"))
