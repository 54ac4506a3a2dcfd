"""The names that users import from the package itself."""

import subprocess
import sys

import pytest

import dynamo_lightning


def test_every_public_name_can_be_imported():
    for name in dynamo_lightning.__all__:
        assert getattr(dynamo_lightning, name) is not None
    assert set(dynamo_lightning.__all__) <= set(dir(dynamo_lightning))
    from dynamo_lightning import PolicyModule, module

    assert PolicyModule is module.PolicyModule


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, dynamo_lightning; print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'dynamo_lightning' has no attribute 'PolicyModul'"):
        _ = dynamo_lightning.PolicyModul
