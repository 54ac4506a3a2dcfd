"""Every command and every piece of Python in the documentation does what the page says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from dynamo_lightning.cli import SUBCOMMANDS, DynamoCLI, main, shipped_configs
from dynamo_lightning.runs.folder import CONFIG_HEADER
from dynamo_lightning.runs.report import report_parser

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCK = r"(?:<!-- needs: (?P<needs>[\w, -]+) -->\n+)?```(?P<language>\w*)\n(?P<body>.*?)```"


def blocks(page):
    """The code blocks of a page: what each needs beyond a CPU, its language and its text."""
    path = ROOT / page
    if not path.exists():
        pytest.skip("the documentation does not come with an installed package")
    found = [match.groupdict() for match in re.finditer(BLOCK, path.read_text(), re.DOTALL)]
    return [new_side(block) if block["language"] == "diff" else block for block in found]


def new_side(block):
    """The new side of a difference, as a block of its own: Python, or shell commands."""
    lines = [line[1:] for line in block["body"].splitlines() if line[:1] != "-"]
    language = "bash" if any(commands_in(line) for line in lines) else "python"
    return {**block, "language": language, "body": "\n".join(lines) + "\n"}


def saved_files():
    """Files that the pages tell their reader to save, by name."""
    pages = [(ROOT / page).read_text() for page in PAGES if (ROOT / page).exists()]
    save = r"[Ss]ave (?:this|it) as `(\w+\.\w+)`[^`]*\n```\w*\n(.*?)```"
    return {name: body for page in pages for name, body in re.findall(save, page, re.DOTALL)}


def commands_in(text):
    """The command lines of a block that start this program; continued lines are joined, comments left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r"(srun |torchrun .*-m |)(python -m )?dynamo_lightning\s", line)]


def documented():
    """(page, command, what it needs) for every command of the pages, and of the table of configs."""
    found = []
    for page in PAGES:
        for block in blocks(page) if (ROOT / page).exists() else []:
            if block["language"] in ("", "bash"):
                found += [(page, command, block["needs"] or "") for command in commands_in(block["body"])]
    table = shipped_configs() / "README.md"
    return found + [
        ("configs/README.md", command, "gpu") for command in re.findall(r"`(python -m dyn[^`]*)`", table.read_text())
    ]


@cache
def parser_of(subcommand):
    """A command line of this subcommand, its parser built once."""

    class Parsed(DynamoCLI):
        def before_instantiate_classes(self):
            pass

        def instantiate_classes(self):
            pass

        def _run_subcommand(self, subcommand):
            pass

        def _set_seed(self):
            pass

    from dynamo_lightning.cli import DynamoTrainer
    from dynamo_lightning.datamodule import RolloutDataModule
    from dynamo_lightning.module import PolicyModule

    needed = {"export": ["--ckpt_path=x", "--output_dir=y"], "warm_start": ["--config=warm_start.yaml"]}
    return Parsed(
        chosen=subcommand, model_class=PolicyModule, datamodule_class=RolloutDataModule, trainer_class=DynamoTrainer,
        auto_configure_optimizers=False, args=[subcommand, *needed.get(subcommand, [])],
        parser_kwargs={"prog": "python -m dynamo_lightning"},
    )  # fmt: skip


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the pages take for granted: a run called `qwen` and the classes that the guides write."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/qwen/version_0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"{CONFIG_HEADER}0\n{(shipped_configs() / 'qwen.yaml').read_text()}")
    for name, body in saved_files().items():
        (tmp_path / name).write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in saved_files():
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.parametrize(
    ("page", "command"),
    [
        # The configs of that table are parsed by default in tests/configs: all together they take a minute.
        pytest.param(page, command, marks=pytest.mark.slow if page == "configs/README.md" else ())
        for page, command in sorted({(page, command) for page, command, _ in documented()})
    ],
)
def test_every_documented_command_parses(page, command, workplace):
    if "wandb.yaml" in command:
        pytest.importorskip("wandb", reason="W&B is optional")
    command = command.replace("<name>", "qwen").replace("<checkpoint>", "x.ckpt")
    arguments = shlex.split(command[command.index("dynamo_lightning") :], comments=True)[1:]
    if arguments[0] in ("--help", "--version"):
        return  # run by the tests of these commands
    if arguments[0] == "report":
        assert report_parser().parse_args(arguments[1:]).run_folders
        return
    assert arguments[0] in SUBCOMMANDS
    arguments = [argument for argument in arguments if argument not in ("--help", "--print_config=comments")]
    cli = parser_of(arguments[0])
    cli.parse_arguments(cli.parser, arguments)
    assert cli.config[arguments[0]].model.model_name


def test_pages_have_commands_and_mark_what_they_need():
    found = documented()
    assert len(found) > 40
    assert {page for page, _, _ in found} >= {
        "README.md",
        "docs/new_loss.md",
        "docs/processes.md",
        "docs/benchmarks.md",
    }
    assert {needs for _, _, needs in found} <= {"", "gpu", "hub", "gpu, hub", "vllm", "minutes", "several nodes", "run"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "command"), sorted({(page, command) for page, command, needs in documented() if needs in ("", "minutes")})
)
def test_every_documented_command_that_a_cpu_can_run_runs(page, command, workplace):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(workplace), os.environ.get("PYTHONPATH", "")])}
    program = {"python": sys.executable}.get(command.split()[0])
    assert program, command
    subprocess.run(
        command.replace("python", program, 1),
        shell=True,
        check=True,
        env=environment,
        timeout=1500,
        capture_output=True,
    )


def python_blocks():
    return [
        # Whole trainings, beside the README's: half a minute for each.
        pytest.param(page, number, marks=pytest.mark.slow if page.startswith("docs/from_") else ())
        for page in PAGES
        if (ROOT / page).exists()
        for number, block in enumerate(blocks(page))
        if block["language"] == "python"
    ]


@pytest.mark.parametrize(("page", "number"), python_blocks())
def test_python_of_the_documentation_runs_from_a_file_as_printed(page, number, tmp_path):
    text = (ROOT / page).read_text()
    for name, body in re.findall(r"[Ss]ave (?:this|it) as `(\w+\.py)`[^`]*\n```python\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(body)  # as the page tells its reader
    (tmp_path / "snippet.py").write_text(blocks(page)[number]["body"])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "snippet.py"], cwd=tmp_path, capture_output=True, text=True, timeout=900, env=environment
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_report_of_a_folder_that_is_no_finished_run_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content, message in (
        (None, "summary.json does not exist"),
        ("{", "is not complete JSON"),
        ("{}", "is not complete"),
    ):
        shutil.rmtree("run", ignore_errors=True)
        Path("run").mkdir()
        if content is not None:
            Path("run/summary.json").write_text(content)
        with pytest.raises(SystemExit, match=f"^error: run/summary.json.*{message}|^error: .*{message}"):
            main(["report", "run"])
