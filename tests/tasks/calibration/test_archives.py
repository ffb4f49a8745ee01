import zipfile

import pytest

from tasks.calibration.archives import extract, is_archive, read_member


@pytest.fixture
def archive(tmp_path):
    def write(*names: str):
        file = tmp_path / "model.zip"
        with zipfile.ZipFile(file, "w") as opened:
            for name in names:
                opened.writestr(name, f"content of {name}")
        return file

    return write


def test_files_lie_below_the_folder(archive, tmp_path):
    out = tmp_path / "out"
    assert extract(archive("config.json", "1_Pooling/config.json"), out) == out
    assert (out / "1_Pooling" / "config.json").read_text() == "content of 1_Pooling/config.json"


@pytest.mark.parametrize("name", ["../outside.json", "a/../../outside.json", "/etc/outside.json"])
def test_names_outside_are_refused_and_nothing_is_written(archive, tmp_path, name):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"must lie in it; .* has '.*outside.json'"):
        extract(archive("config.json", name), out)
    assert not out.exists()


def test_the_beginning_of_a_file_is_read_alone(archive):
    assert read_member(archive("config.json"), "config.json", 7) == b"content"
    with pytest.raises(ValueError, match=r"must have model.safetensors at its top"):
        read_member(archive("config.json"), "model.safetensors")


def test_a_zip_file_is_told_from_others(archive, tmp_path):
    assert is_archive(archive("config.json"))
    (tmp_path / "other").write_bytes(b"GGUF")
    assert not is_archive(tmp_path / "other")
    assert not is_archive(tmp_path)
