import os

import pytest

from hf_sft_variants.files import atomic_write, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(KeyError), atomic_write(tmp_path / "file") as partial:
        partial.write_text("half")
        raise KeyError
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    (tmp_path / "null").symlink_to(os.devnull)
    write_text(tmp_path / "null", "lost")
    assert not os.path.isfile(os.devnull)
