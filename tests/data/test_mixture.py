"""Several data sets in one stream: each prompt as often as its weight says, and no prompt twice in a batch."""

import json
from collections import Counter

import pytest

from dynamo_lightning.data.mixture import Mixture
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.data.stream import PromptStream
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.errors import UserError
from dynamo_lightning.types import GroupPlan, Prompt, PromptBatch


def make_stream(sizes, weights, per_batch=3, seed=0, drop_last=False):
    prompts = [Prompt(i, "q", "q", (1,), "a") for i in range(sum(sizes))]

    def make_batch(iteration, chosen):
        return PromptBatch(iteration, [GroupPlan(prompt, 2) for prompt in chosen])

    return PromptStream(prompts, per_batch, seed, make_batch, drop_last, Mixture(sizes, weights))


def epoch(stream, stop=None):
    batches = []
    for batch in stream:
        batches.append([prompt.prompt_id for prompt in batch.prompts])
        if len(batches) == stop:
            break
    return batches


def counts(batches):
    return Counter(prompt for batch in batches for prompt in batch)


def test_equal_weights_give_the_order_of_one_data_set():
    assert epoch(make_stream([4, 6], [1.0, 1.0])) == epoch(make_stream([10], [1.0]))


def test_a_whole_weight_is_so_many_times_in_an_epoch():
    stream = make_stream([4, 6], [1.0, 3.0])
    for _ in range(3):
        batches = epoch(stream)
        assert counts(batches) == {**dict.fromkeys(range(4), 1), **dict.fromkeys(range(4, 10), 3)}
        assert all(len(set(batch)) == len(batch) for batch in batches)
        assert len(batches) == len(stream)


def test_a_fraction_is_a_share_drawn_anew_in_each_epoch_that_comes_to_the_weight():
    stream = make_stream([40, 10], [0.25, 1.5], per_batch=7)
    total, num_epochs = Counter(), 400
    for _ in range(num_epochs):
        found = counts(epoch(stream))
        assert sum(n for prompt, n in found.items() if prompt < 40) == 10
        assert sum(n for prompt, n in found.items() if prompt >= 40) == 15
        assert all(found[prompt] in (1, 2) for prompt in range(40, 50))
        total += found
    for prompt in range(50):  # four standard deviations of a mean of 400 draws
        assert total[prompt] / num_epochs == pytest.approx(0.25 if prompt < 40 else 1.5, abs=0.1)


@pytest.mark.parametrize("stop", [1, 4, 6, 9])
def test_a_mixture_is_the_same_after_a_resume(stop):
    whole = make_stream([4, 6], [0.5, 2.0])
    expected = [batch for _ in range(4) for batch in epoch(whole)]
    first, seen = make_stream([4, 6], [0.5, 2.0]), []
    while len(seen) < stop:
        seen += epoch(first, stop - len(seen))
    second = make_stream([4, 6], [0.5, 2.0])
    second.load_state_dict(first.state_dict())
    while len(seen) < len(expected):
        seen += epoch(second)
    assert seen == expected


def test_a_short_batch_ends_each_pass_or_is_dropped():
    assert [len(batch) for batch in epoch(make_stream([4], [2.0]))] == [3, 1, 3, 1]
    assert [len(batch) for batch in epoch(make_stream([4], [2.0], drop_last=True))] == [3, 3]


def test_a_weight_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match=r"data\.train\[1\]\.weight=0\.01 leaves none of its 6 prompts"):
        Mixture([4, 6], [1.0, 0.01])


def write(path, prompts):
    path.write_text("".join(json.dumps({"prompt": f"{p}+1=", "answer": str(p + 1)}) + "\n" for p in prompts))
    return str(path)


def make_data(tiny_policy, train, **settings):
    data = RolloutDataModule(
        train=train, tokenizer_name=tiny_policy, template="{prompt}", prompts_per_batch=4, **settings
    )
    data.setup("fit")
    return data


def test_a_data_module_mixes_a_list_of_data_sets(tiny_policy, tmp_path):
    few, many = write(tmp_path / "few.jsonl", range(3)), write(tmp_path / "many.jsonl", range(100, 110))
    data = make_data(tiny_policy, [PromptSource(few, weight=2.0), PromptSource(many, weight=0.5)])
    found = Counter(prompt.source for batch in data.train_dataloader() for prompt in batch.prompts)
    assert found == {"few": 6, "many": 5}
    assert data.longest_training_prompt() == 6
    alone = make_data(tiny_policy, PromptSource(few)).train_dataloader()
    listed = make_data(tiny_policy, [PromptSource(few)]).train_dataloader()
    assert epoch(alone) == epoch(listed)


def test_one_name_twice_and_a_bad_weight_are_refused(tiny_policy, tmp_path):
    few = write(tmp_path / "few.jsonl", range(3))
    with pytest.raises(UserError, match=r"data\.train: two data sets have one name, \['few', 'few'\]"):
        make_data(tiny_policy, [PromptSource(few), PromptSource(few)])
    with pytest.raises(UserError, match=r"data\.train\[1\]\.weight=0 must be above 0"):
        make_data(tiny_policy, [PromptSource(few), PromptSource(few, name="other", weight=0)])


def test_the_two_parts_of_a_file_have_no_problem_in_common(tiny_policy, tmp_path):
    path = write(tmp_path / "sums.jsonl", [*range(200), *range(50)])
    again = write(tmp_path / "again.jsonl", reversed(range(200)))

    def questions(source):
        return {
            prompt.question for batch in make_data(tiny_policy, source).train_dataloader() for prompt in batch.prompts
        }

    train = questions(PromptSource(path, held_out=0.25))
    held_out = questions(PromptSource(path, held_out=0.25, part="held_out"))
    assert not train & held_out and len(train | held_out) == 200
    assert len(held_out) == pytest.approx(50, abs=25)
    assert questions(PromptSource(again, held_out=0.25, part="held_out")) == held_out, "whatever the file and order"
    assert questions(PromptSource(path, held_out=0.1, part="held_out")) <= held_out
    with pytest.raises(UserError, match=r"data\.train\.held_out=1\.0 must be from 0 to below 1"):
        questions(PromptSource(path, held_out=1.0))
    with pytest.raises(UserError, match=r"data\.train\.part: held_out needs data\.train\.held_out"):
        questions(PromptSource(path, part="held_out"))
    with pytest.raises(UserError, match=r"none of the 1 problems .* is in this part"):
        questions(PromptSource(write(tmp_path / "one.jsonl", [3]), held_out=1e-9, part="held_out"))
