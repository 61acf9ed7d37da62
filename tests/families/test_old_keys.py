"""The config of transformers 4 says the same as that of transformers 5."""

import pytest

from jaxserve.checkpoint.open import open_checkpoint
from tests.families import golden as goldens


@pytest.mark.parametrize("name", goldens.NAMES)
def test_old_keys(name, tmp_path):
    golden = goldens.load(name)
    with open_checkpoint(golden.folder) as new, open_checkpoint(goldens.with_old_keys(golden, tmp_path)) as old:
        assert old.config == new.config
