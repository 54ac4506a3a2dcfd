import subprocess
import sys

import pytest

from dynamo_lightning.errors import UserError
from dynamo_lightning.runs.folder import (
    RunFolder,
    check_name,
    claim,
    claim_exactly,
    mark_checkpoints,
    newest_config,
    next_resume_config,
    run_name,
    run_of_checkpoint,
)

RUN = {"kind": "run", "name": "a"}


CLAIMING = """
import sys
from pathlib import Path
from dynamo_lightning.runs.folder import claim
print("ready", flush=True)
sys.stdin.readline()
print(*[claim(Path(sys.argv[1]), "version_", {"kind": "run", "name": "a"}).name for _ in range(8)])
"""


def test_runs_started_at_once_get_folders_of_their_own(tmp_path):
    # Fresh processes: a fork of this one would inherit locks that its other threads hold, and wait for them forever.
    command = [sys.executable, "-c", CLAIMING, str(tmp_path / "runs")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    names = [name for process in processes for name in process.communicate(timeout=60)[0].split()]
    assert sorted(names) == sorted(f"version_{number}" for number in range(32))


def test_a_checkpoint_belongs_to_the_run_above_it(tmp_path):
    run = claim(tmp_path / "runs/a", "version_", RUN)
    assert run_of_checkpoint(str(run / "checkpoints/last.ckpt")) == run
    assert run_of_checkpoint(str(tmp_path / "checkpoints/last.ckpt")) is None
    link = tmp_path / "best.ckpt"
    (run / "checkpoints").mkdir()
    (run / "checkpoints/x.ckpt").touch()
    link.symlink_to(run / "checkpoints/x.ckpt")
    assert run_of_checkpoint(str(link)) == run


def test_checkpoints_elsewhere_know_their_run(tmp_path):
    run = claim(tmp_path / "runs/a", "version_", RUN)
    mark_checkpoints(tmp_path / "kept", run)
    assert run_of_checkpoint(str(tmp_path / "kept/last.ckpt")) == run
    mark_checkpoints(run / "checkpoints", run)
    assert not (run / "checkpoints").exists(), "a folder inside needs no record"


def test_a_users_own_config_makes_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text("name: mine\n")
    assert run_name(tmp_path) is None
    (tmp_path / "config.yaml").write_text("# dynamo_lightning==0.1.0\nname: mine\n")
    assert run_name(tmp_path) is None, "printed by --print_config"


def test_a_run_of_version_0_1_is_known_by_its_config(tmp_path):
    old = tmp_path / "version_3"
    old.mkdir()
    (old / "config.yaml").write_text("# dynamo_lightning==0.1.0\nname: 'old one'\ntrainer:\n  name: x\n")
    assert run_name(old) == "old one"


def test_configs_of_resumes_are_numbered(tmp_path):
    assert newest_config(tmp_path) == tmp_path / "config.yaml"
    assert next_resume_config(tmp_path).name == "config.resume-1.yaml"
    for number in (1, 2, 10):
        (tmp_path / f"config.resume-{number}.yaml").touch()
    assert newest_config(tmp_path).name == "config.resume-10.yaml"
    assert next_resume_config(tmp_path).name == "config.resume-11.yaml"


def test_a_folder_that_was_not_written_into_is_removed_and_one_that_was_is_kept(tmp_path):
    empty = RunFolder(claim(tmp_path, "version_", RUN), "new")
    used = RunFolder(claim(tmp_path, "version_", RUN), "new")
    (used.path / "config.yaml").touch()
    for folder in (empty, used):
        folder.lock()
        folder.release()
    assert not empty.path.exists()
    assert (used.path / "config.yaml").exists()


def test_a_run_is_resumed_by_one_process_at_a_time(tmp_path):
    run = claim(tmp_path, "version_", RUN)
    first, second = RunFolder(run, "resumed", run), RunFolder(run, "resumed", run)
    first.lock()
    with pytest.raises(UserError, match=r"ckpt_path: another process is writing into .*version_0.* --name"):
        second.lock()
    first.release()
    second.lock()


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../../x"])
def test_a_name_that_leads_out_of_the_log_folder_is_refused(name):
    with pytest.raises(UserError, match="name="):
        check_name(name)


def test_a_log_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"trainer\.logger: the log folder .*runs/a cannot be written.*save_dir"):
        claim(tmp_path / "runs/a", "version_", RUN)
    with pytest.raises(FileExistsError):
        claim_exactly(tmp_path / "runs", RUN)
