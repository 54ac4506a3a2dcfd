"""The documentation as a site: it builds without a network, names options that exist, and its reference is complete."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def reference():
    path = ROOT / "docs_site" / "reference.py"
    if not path.exists():
        pytest.skip("the documentation does not come with an installed package")
    spec = importlib.util.spec_from_file_location("reference", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["reference"]


@pytest.fixture(scope="module")
def options(reference):
    return reference.options_of(reference.parser_of("fit"))


@pytest.fixture(scope="module")
def choices(reference):
    return reference.choices()


def test_the_reference_has_every_option_and_every_class(reference, options, choices):
    page, classes = reference.options_page(), reference.classes_page()
    assert len(options) > 100
    assert all(f"| `{option.name}` |" in page for option in options)
    assert set(choices) >= {
        "model.generator", "model.reward", "model.loss.advantage", "model.loss.modulation", "model.loss.surrogate",
        "model.loss.penalty", "data.rule", "data.estimator", "trainer.callbacks",
    }  # fmt: skip
    for group in choices.values():
        for name, cls in group.items():
            assert f"### {name}\n" in classes
            assert all(f"| `{parameter.name}` |" in classes for parameter in reference.parameters_of(cls))


def test_every_option_of_ours_is_explained(reference, options, choices):
    ours = [option for option in options if not option.name.startswith("trainer.")]
    of_classes = [
        (cls.__name__, parameter)
        for group in choices.values()
        for cls in group.values()
        for parameter in reference.parameters_of(cls)
        if cls.__module__.startswith("dynamo_lightning") and cls.__name__ != "IterationCheckpoint"  # Lightning's too
    ]
    assert [option.name for option in ours if not option.help] == []
    assert [f"{name}.{parameter.name}" for name, parameter in of_classes if not parameter.help] == []


def test_rows_of_the_reference_have_as_many_cells_as_their_header(reference):
    for page in (reference.options_page(), reference.classes_page()):
        tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("| option |")]
        rows = [row for table in tables for row in table]
        assert len(rows) > 50
        assert {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in rows} == {5}


def known_names(reference, options, choices):
    """Names of options, of their groups, and of arguments of classes that can be chosen or written."""
    names = {option.name for option in options}
    for option, group in choices.items():
        names |= {f"{option}.{parameter.name}" for cls in group.values() for parameter in reference.parameters_of(cls)}
    for option in options:
        for cls in reference.own_dataclasses(option.typehint):
            names |= {f"{option.name}.{parameter.name}" for parameter in reference.parameters_of(cls)}
    names |= {"optimizer.lr", "optimizer.weight_decay"}
    return names | {name[:end] for name in names for end in range(len(name)) if name[end] == "."}


@pytest.fixture(scope="module")
def known(reference, options, choices):
    return known_names(reference, options, choices)


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_options_that_a_page_names_exist(page, known):
    text = (ROOT / page if page == "README.md" else ROOT / "docs" / page).read_text()
    spans = re.findall(r"(?<!`)`(?:--)?((?:model|data|trainer|optimizer)\.[a-z_.]+[a-z_])(?:[=: ][^`]*)?`(?!`)", text)
    foreign = {"data.train_files", "data.prompt_key", "data.train_batch_size", "data.max_response_length"}  # verl's
    foreign |= {f"trainer.{name}" for name in ("n_gpus_per_node", "total_epochs", "test_freq", "save_freq")}
    foreign |= {"trainer.resume_mode", "trainer.experiment_name"}
    unknown = {span for span in spans if span not in known} - (foreign if page == "from_verl.md" else set())
    assert unknown == set()


def test_messages_and_metrics_of_the_troubleshooting_page_are_the_code_s_own():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    files = [path for folder in ("dynamo_lightning", "callbacks") for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text() for path in files)
    joined = re.sub(r'"\s*\n\s*f?"', "", code)  # texts that go on in the next line
    messages = re.findall(r'^\| "([^"]+)" \|', text, re.MULTILINE)
    assert len(messages) >= 5
    assert [part for message in messages for part in message.split(" … ") if part != "all" and part not in joined] == []
    metrics = re.findall(r"`((?:completions|sampling|stability)/\w+|frac_\w+|grad_norm)`", text)
    assert len(metrics) >= 4
    assert [name for name in metrics if f'"{name}"' not in code] == []
    phases = re.findall(r"`timing_s/(\w+)`", text)
    assert [name for name in phases if f'phase("{name}")' not in code] == []


def test_old_sides_of_differences_in_python_are_python_too():
    found = 0
    for page in PAGES:
        for body in re.findall(r"```diff\n(.*?)```", page.read_text(), re.DOTALL):
            old = "\n".join(line[1:] for line in body.splitlines() if line[:1] != "+")
            if "import" in old:
                compile(old, page.name, "exec")
                found += 1
    assert found >= 2


@pytest.mark.slow
def test_the_site_builds_without_a_network_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="make docs installs it")
    proxy = "http://127.0.0.1:9"
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {name: proxy for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert pages.keys() >= {
        "index.html",
        "first_run.html",
        "reference/options.html",
        "reference/classes.html",
        "api.html",
    }
    assert "model.sampling.max_response_length" in pages["reference/options.html"]
    assert "training_step" in pages["api.html"]
    for name, text in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*src=\"(https?:[^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]*rel=\"(?:stylesheet|preload)\"[^>]*href=\"(https?:[^\"]+)\"", text)
        assert loaded == [], name


def test_every_figure_of_the_pages_is_what_the_command_draws(tmp_path):
    folder = ROOT / "docs" / "figures"
    if not folder.exists():
        pytest.skip("the documentation does not come with an installed package")
    shown = {name for page in PAGES for name in re.findall(r"\]\(figures/(\w+)\.svg\)", page.read_text())}
    command = [sys.executable, "docs_site/figures.py", "--output_dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    drawn = {path.stem: path.read_text() for path in tmp_path.iterdir()}
    assert shown == drawn.keys() == {path.stem for path in folder.iterdir()}
    version = re.search("Matplotlib v[0-9.]+", drawn["allocation"])[0]
    for name, figure in drawn.items():
        kept = (folder / f"{name}.svg").read_text()
        if version in kept:  # another version draws other paths
            assert rounded(figure) == rounded(kept), name


def rounded(figure: str) -> str:
    """A figure without the decimals in which processors differ."""
    return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}", figure)
