from dynamo_lightning.runs.config import readable_config

SAVED_BY_FIT = """\
# dynamo_lightning==0.1.0
name: old
trainer:
  logger:
  - class_path: lightning.pytorch.loggers.CSVLogger
    init_args:
      save_dir: runs
      name: old
      version: 0
      prefix: ''
model:
  verbose: 3
ckpt_path: runs/parent/version_0/checkpoints/last.ckpt
weights_only: null
"""


def test_a_config_saved_by_fit_is_read_by_every_subcommand():
    for subcommand, kept in {
        "fit": {"ckpt_path", "weights_only"},
        "validate": {"weights_only"},
        "test": {"weights_only"},
        "predict": {"weights_only"},
        "export": set(),
        "warm_start": set(),
    }.items():
        text = readable_config(SAVED_BY_FIT, subcommand)
        top = {line.split(":")[0] for line in text.splitlines() if line[0].isalpha()}
        assert top == {"name", "trainer", "model"} | kept, subcommand
        assert "  verbose: 3" in text, "an option of the same name inside a group"


def test_the_folder_that_0_1_baked_into_its_loggers_is_left_out():
    text = readable_config(SAVED_BY_FIT, "fit")
    assert "      name: null\n      version: null\n      prefix: ''" in text
    assert "\nname: old\n" in text


def test_blocks_of_other_subcommands_are_left_out_whole():
    text = "demonstrations:\n  path: x\n\n  template: y\n# a comment\noutput_dir: z\nname: n\n"
    assert readable_config(text, "fit") == "name: n\n"
    assert readable_config(text, "warm_start") == text


def test_an_evaluations_checkpoint_is_kept_for_evaluations_only():
    text = "# dynamo_lightning==0.1.0\nname: n\nckpt_path: x\nverbose: true\n"
    assert "ckpt_path: x" in readable_config(text, "test")
    assert "ckpt_path: x" in readable_config(text, "predict")
    assert "ckpt_path" not in readable_config(text, "fit")
    assert "ckpt_path" not in readable_config(text, "export")


def test_a_written_config_keeps_its_checkpoint():
    assert "ckpt_path: x" in readable_config("name: n\nckpt_path: x\n", "export")
