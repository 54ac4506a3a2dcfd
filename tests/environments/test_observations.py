"""Observations as tokens: only what is new is tokenised."""

import pytest

from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.loading import load_tokenizer
from dynamo_lightning.rollout.observations import observation_tokens

CHAT = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def tokenizer(tiny_policy):
    return load_tokenizer(tiny_policy)


def told(tokenizer, observation, last_token):
    return tokenizer.decode(observation_tokens(tokenizer, observation, last_token, "the environment X"))


def test_a_text_is_read_as_it_is(tokenizer):
    assert told(tokenizer, "1+1=", tokenizer.eos_token_id) == "1+1="


def test_messages_are_what_the_template_writes_between_two_responses(tokenizer):
    tokenizer.chat_template = CHAT
    messages = [{"role": "user", "content": "8+1"}]
    eos = tokenizer.eos_token
    assert told(tokenizer, messages, tokenizer("9").input_ids[0]) == f"{eos} user 8+1{eos} assistant "
    assert told(tokenizer, messages, tokenizer.eos_token_id) == f" user 8+1{eos} assistant ", "said already"


def test_responses_and_observations_together_are_the_template_s_own_conversation(tokenizer):
    tokenizer.chat_template = CHAT
    opening, said = [{"role": "user", "content": "1+1"}], [{"role": "assistant", "content": "3"}]
    asked = [{"role": "user", "content": "8+1"}]
    prompt = tokenizer.apply_chat_template(opening, tokenize=False, add_generation_prompt=True)
    response = [*tokenizer("3").input_ids, tokenizer.eos_token_id]
    tokens = [*tokenizer(prompt).input_ids, *response, *observation_tokens(tokenizer, asked, response[-1], "X")]
    whole = tokenizer.apply_chat_template([*opening, *said, *asked], tokenize=False, add_generation_prompt=True)
    assert tokens == list(tokenizer(whole).input_ids)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no') }}", "chat template refuses: no"),
        ("{{ messages[-1].content }}", "leaves out earlier responses"),
    ],
)
def test_a_template_that_cannot_go_on_is_one_line(tokenizer, template, words):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=rf"the environment X returned messages.*{words}"):
        told(tokenizer, [{"role": "user", "content": "8+1"}], 0)
