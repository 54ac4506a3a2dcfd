"""Special tokens that come once, prompts that end where a response begins, answers and characters that can be used."""

import json

import pytest

from dynamo_lightning.data.prompts import load_prompts, prompt_id
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.errors import UserError

ROW = {"prompt": "1+1=", "answer": "2"}


@pytest.fixture
def load(tmp_path, tokenizer):
    def load_rows(rows, tokenizer=tokenizer, **settings):
        path = tmp_path / "sums.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_prompts(PromptSource(str(path), **settings), tokenizer, 100).prompts

    return load_rows


def with_processor(tokenizer, single):
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single, special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    return tokenizer


def letters(tokenizer, text):
    return tuple(tokenizer.convert_tokens_to_ids(list(text)))


@pytest.mark.parametrize(
    ("single", "template", "bos"),
    [
        ("<bos> $A", "{prompt}", True),
        ("<bos> $A", "<bos>{prompt}", True),
        ("<bos> $A <eos>", "{prompt}", True),
        ("<bos> $A <eos>", "<bos>{prompt}", True),
        ("$A <eos>", "{prompt}", False),
        ("$A <eos>", "<bos>{prompt}", True),
        ("$A", "{prompt}", False),
        ("<bos> <bos> $A", "{prompt}", True),
    ],
)
def test_a_text_template_has_each_special_token_once(load, make_tokenizer, single, template, bos):
    tokenizer = with_processor(make_tokenizer(None), single)
    (prompt,) = load([ROW], tokenizer=tokenizer, template=template)
    assert prompt.token_ids == ((2,) if bos else ()) + letters(tokenizer, "1+1=")


@pytest.mark.parametrize("single", ["<bos> $A", "<bos> $A <eos>", "$A <eos>"])
@pytest.mark.parametrize("spelled", ["", "<bos>", "<bos><bos>"])
def test_a_chat_template_has_what_it_spells_once(load, make_tokenizer, single, spelled):
    template = spelled + "{{ messages[0].content }}{% if add_generation_prompt %}!{% endif %}"
    tokenizer = with_processor(make_tokenizer(template), single)
    (prompt,) = load([ROW], tokenizer=tokenizer)
    assert prompt.token_ids == ((2,) if spelled else ()) + letters(tokenizer, "1+1=!")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}",
            "ignores .* prompts lack '<assistant>'",
        ),
        ("{% for m in messages %}{{ m.content }}<eos>{% endfor %}", r"ends prompts with the end of sequence '<eos>'"),
        ("{% for m in messages %}{{ m.content }}<eos>\n{% endfor %}", r"ends prompts with the end of sequence '<eos>'"),
    ],
)
def test_a_chat_template_that_leaves_no_room_for_a_response_is_refused(load, make_tokenizer, template, message):
    with pytest.raises(UserError, match=rf"^data\.train\.template: .*{message}.*give data\.train\.template a text"):
        load([ROW], tokenizer=make_tokenizer(template))


def test_a_chat_template_that_needs_no_header_is_taken(load, make_tokenizer):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}<eos>{% endif %}{% endfor %}"
    )
    assert load([ROW], tokenizer=make_tokenizer(template))[0].text == "[INST] 1+1= [/INST]"


def test_several_answers_are_kept_and_one_keeps_its_id(load):
    several, single = load([{"prompt": "x", "answer": ["1/2", 0.5, "1/2"]}, {"prompt": "1+1=", "answer": ["2"]}])
    assert (several.answer, several.answers) == ("1/2", ("1/2", "0.5"))
    assert several.prompt_id == prompt_id("sums", "x", ["1/2", "0.5"])
    assert (single.answer, single.answers) == ("2", ())
    assert single.prompt_id == prompt_id("sums", "1+1=", "2") == 759230831405896778
    (solved,) = load([{"prompt": "x", "answer": ["so #### 1", "or #### 2"]}], answer_pattern="#### (.+)")
    assert solved.answers == ("1", "2")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a\ud800b", "answer": "1"},
            r"prompt_column='prompt': line 2 of .*jsonl' has half a surrogate",
        ),
        ({"prompt": "a", "answer": "\udc00"}, r"answer_column='answer': line 2 of .* \\udc00 at character 1"),
        ({"prompt": [{"role": "user", "content": "\ud83d"}], "answer": "1"}, r"line 2 of .* \\ud83d at character 1"),
    ],
)
def test_half_a_surrogate_pair_is_refused_with_its_line(load, row, message):
    with pytest.raises(UserError, match=message):
        load([ROW, row])


def test_every_prompt_knows_its_line(load, tmp_path):
    prompts = load([ROW, ROW, {"prompt": "1+2=", "answer": "3"}])
    assert [prompt.place for prompt in prompts] == [f"line {line} of '{tmp_path}/sums.jsonl'" for line in (1, 3)]
