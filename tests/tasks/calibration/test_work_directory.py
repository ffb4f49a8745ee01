import hashlib

import pytest

from tasks.calibration.work_directory import claim, digests


def test_a_work_directory_is_for_one_set_of_arguments(tmp_path):
    claim(tmp_path / "work", {"seed": 1, "bits": 4})
    claim(tmp_path / "work", {"seed": 1, "bits": 4})
    with pytest.raises(ValueError, match=r"one with other bits\. Delete it"):
        claim(tmp_path / "work", {"seed": 1, "bits": 3})


def test_digests_are_of_the_files_directly_in_a_directory(tmp_path):
    (tmp_path / "b").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "sub").mkdir()
    assert digests(tmp_path) == {
        name: hashlib.sha256(text).hexdigest() for name, text in (("a", b"one"), ("b", b"two"))
    }
