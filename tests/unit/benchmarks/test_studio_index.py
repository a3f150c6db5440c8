import json

from benchmarks import studio_index


def test_all_pages_are_asked_for_and_written_down(tmp_path):
    studio_index.main(["--completions", "400", "--rounds", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "studio_index.json").read_text())
    assert found["completions"] == 400
    assert found["pages"].keys() == studio_index.FILTERS.keys()
