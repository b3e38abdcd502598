import subprocess
import sys

import pytest

import gesso
from gesso import api


def test_the_root_names_what_the_api_has():
    assert gesso.__all__ == api.__all__ == sorted(api.__all__)
    assert all(getattr(gesso, name) is getattr(api, name) for name in api.__all__)
    assert set(dir(gesso)) == {*api.__all__, "__version__"}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="import_data"):
        _ = gesso.importdata


def test_importing_the_root_is_light():
    code = "import sys, gesso; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_by_name():
    config = gesso.recipe("debug:tiny")
    assert isinstance(config, gesso.RunConfig) and config.training.batch_size == 8
    with pytest.raises(gesso.GessoError, match="debug:tiny"):
        gesso.recipe("debug:tny")
