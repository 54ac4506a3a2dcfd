r"""Prompt templates by name: what surrounds the problem for well-known families of models.

A name stands for a text with `{prompt}` in the problem's place. Texts rather than each tokenizer's chat template: base
models often have none or another one, and the evaluations that results are compared with spell theirs out. The first
token that some tokenizers put in front of everything (Llama 3's `<|begin_of_text|>`) is theirs to add.
"""

from __future__ import annotations

from dynamo_lightning.errors import UserError

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."

TEMPLATES = {
    "plain": f"{{prompt}}\n\n{INSTRUCTION}\n\n",
    "qwen2.5-math": (
        f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n{{prompt}}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen3": f"<|im_start|>user\n{{prompt}}\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n",
    "qwen3-no-thinking": (
        f"<|im_start|>user\n{{prompt}}\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    "llama3": (
        f"<|start_header_id|>user<|end_header_id|>\n\n{{prompt}}\n\n{INSTRUCTION}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}
"""`qwen2.5-math` is that family's own; Qwen3 thinks unless an empty thought is put before its answer."""


def resolve_template(template: str | None, option: str = "template") -> str | None:
    """Return the text that a name stands for; any text with `{prompt}`, and null, come back unchanged.

    Raises:
        UserError: If it is neither; the message names the option and lists the names.
    """
    if template is None or "{prompt}" in template:
        return template
    if template not in TEMPLATES:
        raise UserError(f"{option}={template!r} has no {{prompt}} and is none of {', '.join(TEMPLATES)}")
    return TEMPLATES[template]
