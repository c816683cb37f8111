import os

import pytest

from hf_sft_variants.files import atomic_write, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(KeyError), atomic_write(tmp_path / "file") as partial:
        partial.write_text("half")
        raise KeyError
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]
