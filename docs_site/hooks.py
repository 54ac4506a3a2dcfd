"""Pages of the site that are made when it is built: the configuration reference, the table of configs, the changelog.

MkDocs calls the functions below (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the generated pages, and the shipped configs as files to download."""
    from mkdocs.structure.files import File

    sys.path.insert(0, str(Path(__file__).parent))  # MkDocs loads this file by its path, and then restores `sys.path`
    from reference import classes_page, options_page

    made = {
        "reference/options.md": options_page(),
        "reference/classes.md": classes_page(),
        "configs.md": from_root((ROOT / "configs/README.md").read_text(encoding="utf-8")),
        "changelog.md": from_root((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")),
        "contributing.md": from_root((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")),
        "security.md": from_root((ROOT / "SECURITY.md").read_text(encoding="utf-8")),
    }
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        made[f"configs/{path.relative_to(ROOT / 'configs').as_posix()}"] = path.read_text(encoding="utf-8")
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def from_root(markdown: str) -> str:
    """Links of a page that lies in the repository's root, as they are in the site."""
    return re.sub(r"\]\((?:\.\./)?docs/", "](", markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of `docs/`: configs are files of the site, sources are named without a link."""
    markdown = re.sub(r"\]\(\.\./configs/README\.md\)", "](configs.md)", markdown)
    markdown = re.sub(r"\]\(\.\./configs/", "](configs/", markdown)
    markdown = re.sub(r"\]\(\.\./(CONTRIBUTING|CHANGELOG|SECURITY)\.md\)", lambda m: f"]({m[1].lower()}.md)", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./(?:dynamo_lightning|callbacks|benchmarks|studies)/[^)]*\)", r"\1", markdown)


def on_config(config: MkDocsConfig, **_: Any) -> MkDocsConfig:
    """Guides that the navigation does not name yet are put beside the others."""
    (guides,) = [part["Extend"] for part in config.nav or [] if "Extend" in part]
    named = set(_values(config.nav))
    for path in sorted((ROOT / "docs").glob("new_*.md")):
        if path.name not in named:
            guides.append(path.name)
    return config


def _values(nav: Any) -> list[str]:
    """Pages of a navigation, however deep."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in _values(part)]
