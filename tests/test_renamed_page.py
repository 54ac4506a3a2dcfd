"""The page docs/renamed.md has the names that the code knows, no more and no less."""

import importlib
import re
from pathlib import Path

from dynamo_lightning.engines.renamed import RENAMED

PAGE = Path(__file__).parents[1] / "docs" / "renamed.md"


def test_the_table_of_class_paths_is_the_code_s_own():
    rows = re.findall(r"^\| `(dynamo_lightning\.[\w.]+)` \| `([\w.]+)` \|$", PAGE.read_text(), re.MULTILINE)
    assert dict(rows) == RENAMED
    assert len(rows) == len(RENAMED)


def test_every_new_name_exists():
    for path in RENAMED.values():
        module, _, name = path.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), name), type)
