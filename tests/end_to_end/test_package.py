"""The package as a user gets it: an sdist, a wheel made from it, installed in an environment of its own, and run."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from dynamo_lightning import __version__

ROOT = Path(__file__).parents[2]


def run(*command, cwd, **variables):
    # No PYTHONPATH: only what is installed can be imported.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from an sdist of the files that git knows; nothing is downloaded."""
    if not (ROOT / ".git").exists():
        pytest.skip("packages are built from a checkout")
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(dist)!r})", cwd=source)
    (sdist,) = dist.glob("dynamo_lightning-*.tar.gz")
    run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", dist,
        sdist, cwd=dist,
    )  # fmt: skip
    (built,) = dist.glob("dynamo_lightning-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Interpreter of a new environment with the wheel and the dependencies of this one, without the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # As a plain path: `.pth` files in that folder, such as the one of an editable install, are not read.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_has_every_file_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {"dynamo_lightning": "dynamo_lightning", "callbacks": "dynamo_lightning/callbacks"}
    expected = {
        f"{home}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, home in sources.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    configs = (path for path in (ROOT / "configs").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected |= {f"dynamo_lightning/configs/{path.relative_to(ROOT / 'configs').as_posix()}" for path in configs}
    assets = (path for path in (ROOT / "dynamo_lightning/assets").rglob("*") if path.is_file())
    expected |= {path.relative_to(ROOT).as_posix() for path in assets if "__pycache__" not in path.parts}
    expected.add("dynamo_lightning/py.typed")
    assert not expected - names
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/", "docs/", "callbacks/"))}


def test_the_installed_package_is_the_wheel_s_and_its_commands_answer(python, tmp_path):
    code = "import dynamo_lightning as d, importlib.metadata as m; print(d.__file__, m.version('dynamo-lightning'))"
    where, version = run(python, "-c", code, cwd=tmp_path).split()
    assert Path(where).is_relative_to(python.parents[1])
    assert version == __version__
    assert "warm_start" in run(python.parent / "dynamo_lightning", "--help", cwd=tmp_path)


def test_the_installed_package_trains_from_any_folder(python, tmp_path):
    run(
        python, "-m", "dynamo_lightning", "fit", "--config", "quickstart.yaml", "--trainer.max_epochs", "1",
        "--data.train.max_prompts", "8", "--trainer.limit_val_batches", "0",
        "--data.prompts_per_batch", "4", "--model.scoring.num_workers", "1",
        cwd=tmp_path,
    )  # fmt: skip
    run_folder = tmp_path / "runs/quickstart/version_0"
    assert len((run_folder / "metrics.csv").read_text().splitlines()) == 3
    assert (run_folder / "checkpoints/last.ckpt").exists()
