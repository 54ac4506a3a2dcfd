"""Where rows come from: files, compressed or many, wrapped lists, folders, saved data sets and hub files, all alike."""

import gzip
import json
import os
from types import SimpleNamespace

import pytest

from dynamo_lightning.data import hub
from dynamo_lightning.data.rows import Place, read_rows
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.errors import MissingFileError, UserError

LONG = "12345678901234567890123"
ROWS = [{"prompt": "a", "answer": 12345678901234567890123}, {"prompt": "b", "answer": "1.50"},
        {"prompt": "c", "answer": "2020-01-01"}, {"prompt": "d", "answer": "NA"}]  # fmt: skip
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in ROWS)
ANSWERS = [LONG, "1.50", "2020-01-01", "NA"]


def read(path, split="train", subset=None):
    return list(read_rows(str(path), subset, split, "data.train"))


def answers(path, split="train"):
    return [str(row["answer"]) for row in read(path, split)]


def write(path, content):
    content = content if isinstance(content, bytes) else content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", LINES),
        ("a.json.gz", json.dumps(ROWS)),
        ("a.csv.gz", TABLE),
        ("a.tsv", TABLE.replace(",", "\t")),
        ("a.tsv.gz", TABLE.replace(",", "\t")),
        ("a.JSONL", LINES),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", json.dumps({"version": {"x": [1]}, "rows": ROWS}, indent=2)),
        ("a.jsonl", json.dumps({"data": ROWS})),
        ("a.json", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_every_format_is_read_as_it_is_written(tmp_path, name, content, in_folder):
    path = write(tmp_path / "folder" / name, content)
    if in_folder and name == "a.JSONL":
        pytest.skip("datasets finds no files of such a name in a folder")
    assert answers(path.parent if in_folder else path) == ANSWERS


def test_a_row_with_a_list_of_messages_is_no_wrapped_list(tmp_path):
    row = {"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}
    assert read(write(tmp_path / "a.json", json.dumps(row))) == [row]
    assert read(write(tmp_path / "b.json", json.dumps(row, indent=1))) == [row]


def test_rows_know_their_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", "\n" + LINES)
    assert [row.place for row in read(path)] == [Place(str(path), line) for line in (2, 3, 4, 5)]
    path = write(tmp_path / "a.json", json.dumps({"data": ROWS}, indent=1))
    assert [row.place.number for row in read(path)] == [3, 7, 11, 15]
    path = write(tmp_path / "a.csv", 'prompt,answer\n"two\nlines",1\n\nb,2\n')
    assert [row.place.number for row in read(path)] == [2, 5]


def test_a_pattern_names_many_files_and_the_folder_their_data_set(tmp_path):
    write(tmp_path / "sums" / "b.jsonl", '{"prompt": "b", "answer": "2"}')
    write(tmp_path / "sums" / "a.csv", "prompt,answer\na,1\n")
    pattern = str(tmp_path / "sums" / "*")
    assert answers(pattern) == ["1", "2"]
    assert PromptSource(pattern).label == "sums"
    assert [PromptSource(p).label for p in ("x/train.jsonl.gz", "*.csv", "own/name-v1.5", "x/**/*.json", "d/")] == [
        "train", "data", "name-v1.5", "x", "d",
    ]  # fmt: skip
    with pytest.raises(MissingFileError, match=r"^data\.train\.path: no file matches '.*\*\.tsv'"):
        read(tmp_path / "*.tsv")
    write(tmp_path / "sums" / "c.txt", "x")
    with pytest.raises(UserError, match=r"c\.txt' is none of \.jsonl"):
        read(pattern)


def test_a_folder_has_the_splits_that_its_files_name(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    write(tmp_path / "test.jsonl", '{"prompt": "t", "answer": "1.0"}')
    assert answers(tmp_path, "train") == ANSWERS
    assert answers(tmp_path, "test") == ["1.0"]
    assert answers(tmp_path, "train[1:3]") == ANSWERS[1:3]
    with pytest.raises(UserError, match="split 'dev' is none of train, test"):
        read(tmp_path, "dev")


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train[:2]", "ab"), ("train[2:]", "cd"), ("train[:-1]", "abc"), ("train[-1:]", "d"), ("train[:50%]", "ab"),
     ("train[-25%:]", "d"), ("train[1:-1]", "bc"), ("train[:99]", "abcd")],
)  # fmt: skip
def test_a_file_can_be_sliced(tmp_path, split, expected):
    path = write(tmp_path / "a.jsonl", LINES)
    assert "".join(row["prompt"] for row in read(path, split)) == expected


def test_an_empty_slice_and_no_slice_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES)
    with pytest.raises(UserError, match=r"has no rows in data\.train\.split='train\[9:\]'"):
        read(path, "train[9:]")
    with pytest.raises(UserError, match=r"data\.train\.split='train\[x\]' is no split"):
        read(path, "train[x]")


def test_saved_data_sets_are_read(tmp_path):
    import datasets

    data = datasets.Dataset.from_list([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}])
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "dev": data.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert answers(tmp_path / "one") == ["1", "2"]
    assert answers(tmp_path / "two", "dev[:1]") == ["2"]
    assert str(read(tmp_path / "one")[1].place).startswith("row 2 of ")
    with pytest.raises(UserError, match=r"data\.train\.split='test': .* has the splits train, dev"):
        read(tmp_path / "two", "test")


def test_json_of_the_hub_is_downloaded_and_read_by_the_same_reader(tmp_path, monkeypatch):
    import datasets

    cached = write(tmp_path / "0a1b2c", LINES)  # the cache names files by their hash
    remote = "hf://datasets/owner/sums@main/train.jsonl"
    asked = []

    def builder(*args):
        asked.append(args)
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": [remote]}))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(hub, "download", lambda names: [cached for name in names if name == remote])
    rows = read("owner/sums", "train[:3]", "main")
    assert [str(row["answer"]) for row in rows] == ANSWERS[:3]
    assert str(rows[0].place) == f"line 1 of '{remote}'"
    assert asked == [("owner/sums", "main")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", LINES + '{"prompt": "x"\n' + LINES, r"a\.jsonl\.gz', line 5: Expecting ',' delimiter"),
        ("a.json", '[\n{"prompt": "a"},\n{broken}]', r"line 3: Expecting property name"),
        ("a.json", '{"data": [{"a": 1}]}\n5', "line 2"),
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', "several lists of rows, train, test"),
        ("a.json", "[" * 100_000, "nested too deeply|Expecting"),
        ("a.csv", "prompt,answer,answer\na,b,c\n", "line 1: the header names 'answer' more than once"),
        ("a.csv", 'prompt,answer\na,1\n"b,2\nc,3\n', "line 3: unexpected end of data"),
        ("a.jsonl", "1" * 5000, "line 1: Exceeds the limit"),
        ("a.tsv", b"prompt\tanswer\na\t\xff\n", "line 2 is not UTF-8, byte 0xff: convert the file to UTF-8"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"data.train.path: cannot read {str(path)!r}, ")
    assert "\n" not in str(error.value)


def test_a_damaged_gz_is_refused(tmp_path):
    whole = gzip.compress(LINES.encode() * 1000)
    path = tmp_path / "a.jsonl.gz"
    for content in (whole[: len(whole) // 2], b"no gzip"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz', the compressed file is damaged"):
            read(path)
    path.write_bytes(whole[:200] + b"xxxxxxxx" + whole[208:])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz', "):  # by what it became
        read(path)


def test_long_cells_are_read(tmp_path):
    assert len(read(write(tmp_path / "a.csv", "prompt,answer\n" + "x" * 200_000 + ",1\n"))[0]["prompt"]) == 200_000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_one_line(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES)
    path.chmod(0)
    with pytest.raises(UserError, match=r"no permission for .*a\.jsonl"):
        read(path)


def test_a_cache_without_permission_is_one_line_with_the_remedy(monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "/cache/x.lock")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(UserError, match=r"data\.train\.path: .* no permission for /cache/x\.lock; .*HF_HOME"):
        read("owner/sums")


@pytest.mark.parametrize("path", ["no/such/folder", "./nothing", "nothing/", "~/no_such", "/no/such"])
def test_a_path_is_not_looked_for_on_the_hub(path):
    with pytest.raises(MissingFileError, match=r"^data\.train\.path: there is no file"):
        read(path)
