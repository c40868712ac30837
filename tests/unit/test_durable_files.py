"""Files that are whole or as they were."""

import pytest

from stormline.pipeline.durable_files import replace_file


def test_replace_file_when_the_disk_refuses_then_no_draft_is_left(tmp_path):
    (tmp_path / "taken").mkdir()

    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "taken", b"new")

    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
