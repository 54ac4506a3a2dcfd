"""The named templates, spelled out: what a policy reads decides what it answers."""

import pytest

from dynamo_lightning.data.templates import TEMPLATES, resolve_template

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain", "What is 1+1?\n\n" + INSTRUCTION + "\n\n"),
        (
            "qwen2.5-math",
            "<|im_start|>system\n" + INSTRUCTION + "<|im_end|>\n"
            "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen3",
            "<|im_start|>user\nWhat is 1+1?\n" + INSTRUCTION + "<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen3-no-thinking",
            "<|im_start|>user\nWhat is 1+1?\n" + INSTRUCTION + "<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n\n</think>\n\n",
        ),
        (
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\nWhat is 1+1?\n\n" + INSTRUCTION + "<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_templates_spelled_out(name, text):
    assert resolve_template(name).replace("{prompt}", "What is 1+1?") == text


def test_every_template_has_one_place_for_the_problem():
    assert all(text.count("{prompt}") == 1 for text in TEMPLATES.values())


def test_a_text_of_ones_own_stays_and_an_unknown_name_is_refused():
    assert resolve_template("Q: {prompt}") == "Q: {prompt}"
    assert resolve_template(None) is None
    with pytest.raises(ValueError, match=r"is none of plain, qwen2\.5-math, qwen3, qwen3-no-thinking, llama3"):
        resolve_template("qwen4")
