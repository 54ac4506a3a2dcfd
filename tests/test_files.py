import pytest

from dynamo_lightning.files import folder_written_atomically, write_atomically


def test_a_file_is_written_with_its_folder_and_leaves_no_partial_one(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_atomically(path, "ä\n")
    write_atomically(path, "b\r\n")
    assert path.read_bytes() == b"b\r\n"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_folder_replaces_the_old_one_when_it_is_complete(tmp_path):
    path = tmp_path / "a"
    for content in ("old", "new"):
        with folder_written_atomically(path) as partial:
            (partial / content).write_text(content)
    assert [p.name for p in path.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_error_leaves_the_old_folder_and_no_partial_one(tmp_path):
    path = tmp_path / "a"
    with folder_written_atomically(path) as partial:
        (partial / "old").touch()
    with pytest.raises(RuntimeError), folder_written_atomically(path) as partial:
        (partial / "half").touch()
        raise RuntimeError("torn")
    assert [p.name for p in path.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
