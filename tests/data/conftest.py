"""A character tokenizer, built here: nothing is downloaded."""

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if no_thinking %}!{% endif %}{% endif %}"
)


def build_tokenizer(chat_template):
    """One token per printable ASCII character, `<bos>` in front of everything that is not a chat."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<eos>": 1, "<bos>": 2, "\n": 3}
    for code in range(32, 127):
        vocabulary[chr(code)] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", bos_token="<bos>", pad_token="<eos>"
    )
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def make_tokenizer():
    """Build a tokenizer with a given chat template."""
    return build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer with a chat template."""
    return build_tokenizer(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def base_tokenizer():
    """A tokenizer without one."""
    return build_tokenizer(None)
