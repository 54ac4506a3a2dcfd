"""From rows to prompts: every rule, and every error with the option and the values it names."""

import json
import weakref
from types import SimpleNamespace

import pytest

from dynamo_lightning.data.prompts import load_prompts, prompt_id
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.policy import embedded

ROWS = [{"prompt": "1+1=", "answer": "2", "level": 1}, {"prompt": "1+2=", "answer": "3", "level": 2}]


@pytest.fixture
def load(tmp_path, tokenizer):
    """Write rows to a file and load them."""

    def load_rows(rows, max_prompt_length=100, tokenizer=tokenizer, file="sums.jsonl", **settings):
        path = tmp_path / file
        text = rows if isinstance(rows, str | bytes) else "\n".join(json.dumps(row) for row in rows)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_prompts(PromptSource(str(path), **settings), tokenizer, max_prompt_length)

    return load_rows


def test_rows_become_prompts_in_order(load, tokenizer):
    prompts = load(ROWS)
    assert (prompts.num_rows, prompts.num_merged, prompts.num_too_long, prompts.source) == (2, 0, 0, "sums")
    first, second = prompts.prompts
    assert (first.question, first.answer, first.source, first.count) == ("1+1=", "2", "sums", 1)
    assert first.text == "<user>1+1=\n<assistant>"
    assert first.columns == {"level": 1}
    assert second.question == "1+2="
    assert first.prompt_id == prompt_id("sums", "1+1=", "2")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", "\n".join(json.dumps(row) for row in ROWS)),
        ("a.jsonl", "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS) + "\n"),
        ("a.csv", "prompt,answer,level\n1+1=,2,1\n1+2=,3,2\n"),
    ],
)
def test_json_lists_json_lines_and_csv_are_read_alike(load, file, text):
    prompts = load(text, file=file).prompts
    assert [(prompt.question, prompt.answer) for prompt in prompts] == [("1+1=", "2"), ("1+2=", "3")]


def test_text_is_read_as_it_is_written(load):
    # `datasets` makes timestamps of such dates, and 1.5 of "1.50" beside a number.
    rows = [{"prompt": "a", "answer": "2020-01-01"}, {"prompt": "b", "answer": "1.50"}, {"prompt": "c", "answer": 7}]
    assert [prompt.answer for prompt in load(rows).prompts] == ["2020-01-01", "1.50", "7"]
    assert [p.answer for p in load("prompt,answer\na,007\nb,1.50\n", file="a.csv").prompts] == ["007", "1.50"]


def test_parquet_with_messages_and_nested_answers(tmp_path, tokenizer, monkeypatch):
    import datasets
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": [{"role": "user", "content": "2*3="}], "reward_model": {"ground_truth": "6", "style": "rule"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = PromptSource(str(tmp_path / "a.parquet"), answer_column="reward_model.ground_truth")
    (prompt,) = load_prompts(source, tokenizer, 100).prompts
    assert (prompt.question, prompt.answer, prompt.text) == ("2*3=", "6", "<user>2*3=\n<assistant>")
    assert prompt.columns == {"reward_model": {"style": "rule"}}


def parquet_builder(*args):
    """What `datasets` knows of a hub data set of Parquet files before it is downloaded."""
    return SimpleNamespace(config=SimpleNamespace(data_files={"train": ["hf://datasets/owner/sums/a.parquet"]}))


def test_a_hub_data_set_is_asked_for_by_id_subset_and_split(monkeypatch, tokenizer):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", parquet_builder)
    source = PromptSource("owner/sums-v1.5", subset="main", split="train[:2]")
    prompts = load_prompts(source, tokenizer, 100)
    assert asked == [(("owner/sums-v1.5", "main"), {"split": "train[:2]"})]
    assert prompts.source == "sums-v1.5"
    assert [prompt.columns for prompt in prompts.prompts] == [{"level": 1}, {"level": 2}]


@pytest.mark.parametrize("function", ["load_dataset_builder", "load_dataset"])
@pytest.mark.parametrize("kind", [FileNotFoundError, ConnectionError, ValueError])
def test_an_error_of_the_hub_becomes_one_line(monkeypatch, tokenizer, kind, function):
    import datasets

    def load_dataset(*args, **kwargs):
        raise kind("no luck\nmany more lines")

    monkeypatch.setattr(datasets, function, load_dataset)
    if function == "load_dataset":
        monkeypatch.setattr(datasets, "load_dataset_builder", parquet_builder)
    expected = FileNotFoundError if kind is FileNotFoundError else ValueError
    with pytest.raises(expected, match=r"data\.train\.path: cannot (find|read) 'owner/sums': no luck$"):
        load_prompts(PromptSource("owner/sums"), tokenizer, 100)


def test_chat_template_gets_messages_system_prompt_and_arguments(load, tokenizer):
    messages = [
        {"role": "system", "content": "old", "name": None},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "1+1="},
    ]
    rows = [{"prompt": messages, "answer": "2"}]
    (prompt,) = load(rows).prompts
    assert prompt.text == "<system>old\n<user>hi\n<assistant>yes?\n<user>1+1=\n<assistant>"
    assert prompt.question == "1+1="
    (prompt,) = load(rows, system_prompt="new", chat_template_kwargs={"no_thinking": True}).prompts
    assert prompt.text == "<system>new\n<user>hi\n<assistant>yes?\n<user>1+1=\n<assistant>!"
    (prompt,) = load(ROWS[:1], system_prompt="new").prompts
    assert prompt.text == "<system>new\n<user>1+1=\n<assistant>"


def test_only_a_template_of_ones_own_gets_special_tokens(load, base_tokenizer, tokenizer):
    (chat,) = load(ROWS[:1]).prompts
    assert chat.token_ids == tuple(tokenizer.convert_tokens_to_ids(list("<user>1+1=\n<assistant>")))
    (plain,) = load(ROWS[:1], template="Q: {prompt}", tokenizer=base_tokenizer).prompts
    assert plain.token_ids == (tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(list("Q: 1+1=")))


def test_template_replaces_its_two_places_and_no_other_braces(load):
    template = r"{system_prompt} {prompt} in \boxed{} {x}"
    rows = [{"prompt": r"{system_prompt} \frac{1}{2}", "answer": "2"}]
    (prompt,) = load(rows, template=template, system_prompt="Say {prompt}").prompts
    assert prompt.text == r"Say {prompt} {system_prompt} \frac{1}{2} in \boxed{} {x}"
    (prompt,) = load([{"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}], template="Q: {prompt}").prompts
    assert prompt.text == "Q: 1+1="


def test_repeated_rows_are_merged_and_counted(load):
    other_column = {**ROWS[0], "level": 9}
    prompts = load([*ROWS, other_column, ROWS[0]])
    assert [(prompt.question, prompt.count) for prompt in prompts.prompts] == [("1+1=", 3), ("1+2=", 1)]
    assert (prompts.num_rows, prompts.num_merged) == (4, 2)
    assert prompts.prompts[0].columns == {"level": 1}


def test_prompts_that_are_too_long_are_left_out_and_counted(load):
    rows = [{"prompt": "1" * 30, "answer": "2"}, *ROWS]
    prompts = load(rows, max_prompt_length=25)
    assert [prompt.question for prompt in prompts.prompts] == ["1+1=", "1+2="]
    assert prompts.num_too_long == 1


def test_max_prompts_takes_the_first_different_prompts(load):
    prompts = load([ROWS[0], ROWS[0], ROWS[1], {"prompt": "x", "answer": "y"}], max_prompts=2)
    assert [(prompt.question, prompt.count) for prompt in prompts.prompts] == [("1+1=", 2), ("1+2=", 1)]


def test_prompt_ids_depend_on_source_prompt_and_answer_but_not_on_position_or_template(load):
    first, second = load(ROWS).prompts
    reversed_rows = load([{"prompt": "new", "answer": "0"}, *ROWS[::-1]], template="{prompt}").prompts
    assert [prompt.prompt_id for prompt in reversed_rows[1:]] == [second.prompt_id, first.prompt_id]
    assert load(ROWS, name="other").prompts[0].prompt_id != first.prompt_id
    assert load([{"prompt": "1+1=", "answer": "10"}]).prompts[0].prompt_id != first.prompt_id
    assert load([{"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}]).prompts[0].prompt_id != (
        first.prompt_id
    )
    # Pinned: another value here would orphan the statistics of every saved run.
    assert prompt_id("sums", "1+1=", "2") == 759230831405896778
    assert all(0 <= prompt_id("s", str(i), "a") < 2**63 for i in range(1000))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("2", "2"),
        (" x ", " x "),
        (2, "2"),
        (27.0, "27"),
        (2.5, "2.5"),
        (["2"], "2"),
        ([2], "2"),
        (10**25, "1" + "0" * 25),
    ],
)
def test_answers_become_text(load, answer, expected):
    assert load([{"prompt": "a", "answer": answer}]).prompts[0].answer == expected


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "has no answer"),
        ("", "has no answer"),
        ("  ", "has no answer"),
        ([""], "has no answer"),
        (float("nan"), "has no answer"),
        (["1", ["2"]], r"has the answer \['1', \['2'\]\], expected"),
        (["1", ""], "has no answer"),
        ([], r"has the answer \[\]"),
        ({"x": 1}, r"has the answer {'x': 1}"),
        (True, "has the answer True"),
        (float("inf"), "has the answer inf"),
    ],
)
def test_an_unusable_answer_is_refused_with_its_row(load, answer, message):
    where = r"^data\.train\.answer_column='answer': line 2 of '.*sums.jsonl' "
    with pytest.raises(ValueError, match=where + message):
        load([ROWS[0], {"prompt": "a", "answer": answer}])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "has no prompt"),
        ("", "has no prompt"),
        ([], "has no prompt"),
        (5, "has a int, expected a string or a list"),
        (["hi"], "has a list, expected"),
        ([{"content": "hi"}], "without a role"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content is not text"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "end with the role 'assistant'"),
    ],
)
def test_an_unusable_prompt_is_refused_with_its_row(load, prompt, message):
    with pytest.raises(ValueError, match=r"^data\.train\.prompt_column='prompt': line 2 of .*" + message):
        load([ROWS[0], {"prompt": prompt, "answer": "a"}])


def test_one_prompt_with_two_answers_is_refused(load):
    with pytest.raises(ValueError, match=r"lines 1 and 3 of .* different answers, '2' and '3'"):
        load([*ROWS, {"prompt": "1+1=", "answer": "3"}])


def test_prompts_with_conflicting_answers_are_dropped_and_counted(load):
    conflicting = [{"prompt": "1+1=", "answer": "3"}, ROWS[0], ROWS[1]]
    prompts = load([*ROWS, *conflicting], conflicting_answers="drop")
    assert [(prompt.question, prompt.count, prompt.row) for prompt in prompts.prompts] == [("1+2=", 2, 1)]
    assert (prompts.num_rows, prompts.num_merged, prompts.num_conflicting) == (5, 1, 3)
    with pytest.raises(ValueError, match=r"data\.train\.path: every prompt of .* has conflicting answers"):
        load(conflicting[:2], conflicting_answers="drop")


def test_a_pattern_takes_the_answer_out_of_a_solution(load):
    rows = [{"prompt": "a", "answer": "1 + 1 = <<1+1=2>>2 #### is\n#### 1,234 "}, {"prompt": "b", "answer": "#### 5"}]
    assert [prompt.answer for prompt in load(rows, answer_pattern="#### (.+)").prompts] == ["1,234", "5"]
    rows = [{"prompt": "a", "answer": r"\boxed{1} and so \boxed{\frac{1}{2}}."}]
    assert load(rows, answer_pattern="boxed").prompts[0].answer == r"\frac{1}{2}"
    with pytest.raises(ValueError, match=r"answer_column='answer': line 2 of .* answer_pattern='boxed' finds in 'no'"):
        load([*rows, {"prompt": "b", "answer": "no"}], answer_pattern="boxed")


def test_a_pattern_takes_the_problem_out_of_its_instructions(load):
    content = 'Solve it. End with "Answer:".\n\nWhat is 1+1?\n\nRemember the line.'
    pattern = r'(?s)"Answer:"\.\n\n(.*)\n\nRemember'
    rows = [{"prompt": [{"role": "user", "content": content}], "answer": "2"}, {"prompt": content + " ", "answer": "2"}]
    for prompt in load(rows, prompt_pattern=pattern).prompts:
        assert prompt.question == "What is 1+1?"
        assert prompt.text == "<user>What is 1+1?\n<assistant>"
    with pytest.raises(
        ValueError, match=r"prompt_column='prompt': line 1 of .* prompt_pattern=.* does not match: '1\+1='"
    ):
        load(ROWS, prompt_pattern=pattern)


def test_two_million_repeated_rows_are_never_held(load, monkeypatch):
    from dynamo_lightning.data import prompts as module

    alive = weakref.WeakSet()

    class Row(dict):
        __slots__ = ("__weakref__",)
        __hash__ = object.__hash__

    def read_rows(*args):
        for index in range(10_000):
            row = Row(prompt=f"{index % 7}+1=", answer=str(index % 7 + 1))
            alive.add(row)
            yield row
            assert len(alive) <= 9

    monkeypatch.setattr(module, "read_rows", read_rows)
    prompts = load(ROWS)
    assert (len(prompts.prompts), prompts.num_rows, prompts.num_merged) == (7, 10_000, 9_993)


def test_wrong_columns_are_refused_with_those_there_are(load):
    rows = [{"prompt": "a", "reward_model": {"ground_truth": "1", "style": "x"}}]
    listed = "its columns: prompt, reward_model.ground_truth, reward_model.style"
    with pytest.raises(ValueError, match=rf"data\.train\.answer_column: .* nothing in 'answer'; {listed}"):
        load(rows)
    with pytest.raises(ValueError, match=rf"answer_column: .* nothing in 'reward_model.truth'; {listed}"):
        load(rows, answer_column="reward_model.truth")
    with pytest.raises(ValueError, match=r"data\.train\.prompt_column: .* nothing in 'question'"):
        load(rows, prompt_column="question", answer_column="reward_model.ground_truth")


def test_a_column_whose_name_has_a_dot_is_found(load):
    rows = [{"the.prompt": "a", "answer": "1"}]
    assert load(rows, prompt_column="the.prompt").prompts[0].columns == {}


def test_columns_that_rewards_take_anyway_are_not_handed_over_twice(load):
    rows = [{"problem": "a", "final": "1", "prompt": "x", "response": "y", "answer": "z", "level": 3}]
    (prompt,) = load(rows, prompt_column="problem", answer_column="final").prompts
    assert prompt.columns == {"level": 3}


def test_all_prompts_too_long_is_an_error(load):
    with pytest.raises(ValueError, match=r"all 2 prompts .* data\.max_prompt_length=5 tokens, the shortest has 22"):
        load(ROWS, max_prompt_length=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "Q:"}, r"data\.train\.template='Q:' has no {prompt} and is none of plain, qwen2\.5-math"),
        ({"answer_pattern": "#### "}, r"data\.train\.answer_pattern='#### ' has no group"),
        ({"prompt_pattern": "("}, r"data\.train\.prompt_pattern='\(' is no regular expression"),
        ({"template": "{prompt}", "system_prompt": "s"}, r"data\.train\.system_prompt='s': give .* or neither"),
        ({"template": "{system_prompt}{prompt}"}, r"data\.train\.system_prompt=None: give .* or neither"),
        ({"template": "{prompt}", "chat_template_kwargs": {"a": 1}}, r"chat_template_kwargs={'a': 1} needs"),
        ({"chat_template_kwargs": {"tokenize": True}}, r"chat_template_kwargs may not set tokenize"),
        ({"max_prompts": 0}, r"data\.train\.max_prompts=0 must be at least 1"),
        ({"subset": "main"}, r"data\.train\.subset='main'.* the file .* has none"),
        ({"split": "test"}, r"data\.train\.split='test'.* the file .* has none"),
    ],
)
def test_contradictory_settings_are_refused(load, settings, message):
    with pytest.raises(ValueError, match=message):
        load(ROWS, **settings)


def test_a_tokenizer_without_chat_template_needs_a_template(load, base_tokenizer):
    with pytest.raises(ValueError, match=r"data\.train\.template is null.* has none: give a text with {prompt} in it"):
        load(ROWS, tokenizer=base_tokenizer)


def test_a_template_with_one_place_refuses_a_conversation(load):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match=r"has a place for one message, but line 1 of .* has 2"):
        load([{"prompt": messages, "answer": "1"}], template="{prompt}")


def test_a_refusal_of_the_chat_template_names_the_row(load, make_tokenizer):
    tokenizer = make_tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}")
    with pytest.raises(ValueError, match=r"chat template refuses line 1 of .*: no system"):
        load(ROWS, tokenizer=tokenizer, system_prompt="s")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.jsonl", "", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "prompt,answer\n", "has no rows"),
        ("a.jsonl", json.dumps(ROWS[0]) + "\n{broken", r"line 2: Expecting"),
        ("a.json", "[{broken", "cannot read .*: Expecting"),
        ("a.jsonl", "5", r"line 1 is a int, not an object"),
        ("a.csv", "prompt,answer\na,b,c\n", r"line 2 has more cells than the header, 3 and 2"),
        ("a.jsonl", b'{"prompt": "a", "answer": "1"}\n{"prompt": "caf\xe9"}', r"line 2 is not UTF-8, byte 0xe9"),
        ("a.csv", b"prompt,answer\na,1\ncaf\xe9,2\n", r"line 3 is not UTF-8, byte 0xe9"),
        ("a.txt", "hello", r"is none of \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
    ],
)
def test_unreadable_files_are_refused(load, file, text, message):
    with pytest.raises(ValueError, match=r"^data\.train\.path: .*" + message):
        load(text, file=file)


def test_a_missing_file_is_named_with_its_option(tokenizer):
    for path in ("no_such.jsonl", "./no_such_folder", "/no/such.csv"):
        with pytest.raises(FileNotFoundError, match=r"^data\.validate\.path: there is no file '.*no"):
            load_prompts(PromptSource(path), tokenizer, 100, option="data.validate")


def test_embedded_files_are_found_by_name_and_listed_if_not(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(embedded, "ASSETS", tmp_path)
    (tmp_path / "arithmetic").mkdir()
    (tmp_path / "arithmetic" / "train.jsonl").write_text(json.dumps(ROWS[0]))
    assert embedded.local_path("owner/name") == "owner/name"
    assert embedded.local_path("embedded:arithmetic") == str(tmp_path / "arithmetic")
    prompts = load_prompts(PromptSource("embedded:arithmetic/train.jsonl"), tokenizer, 100)
    assert (len(prompts.prompts), prompts.source) == (1, "train")
    for wrong in ("embedded:arithmetic/test.jsonl", "embedded:", "embedded:../secrets"):
        with pytest.raises(FileNotFoundError, match=r"embedded files: embedded:arithmetic/train\.jsonl"):
            load_prompts(PromptSource(wrong), tokenizer, 100)
