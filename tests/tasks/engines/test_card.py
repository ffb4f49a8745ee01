import pytest
from huggingface_hub import ModelCard

from tasks.engines import OnnxRuntime
from tasks.engines.card import weights_words
from tasks.engines.compiling import compile_engine, load_bundle


def test_a_card_is_among_the_hashed_files_of_a_bundle(tiny_checkpoint, tmp_path):
    engine = OnnxRuntime(precision="float32")
    compile_engine(checkpoint=tiny_checkpoint, data=None, engine=engine, threads=1, out=tmp_path)
    card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "slimline"
    assert "onnx" in card.data.tags
    assert "weights: float" in card.text
    assert "Compared with PyTorch on the same checkpoint" in card.text
    session, _ = load_bundle(tmp_path, threads=1)
    session.close()
    (tmp_path / "README.md").write_text("changed")
    with pytest.raises(ValueError, match=r"README\.md of the engine bundle"):
        load_bundle(tmp_path, threads=1)


@pytest.mark.parametrize(
    ("group", "tag", "words"),
    [
        ({"num_bits": 8, "type": "int", "group_size": None}, "8-bit", "8 bits, per channel (2 layers)"),
        ({"num_bits": 4, "type": "int", "group_size": 64}, "4-bit", "4 bits, groups of 64 (2 layers)"),
        ({"num_bits": 8, "type": "float"}, "8-bit", "8 bits float, per channel (2 layers)"),
    ],
)
def test_stored_weights_are_told_in_words(group, tag, words):
    config = {"quantization_config": {"config_groups": {"group_0": {"weights": group, "targets": ["a", "b"]}}}}
    assert weights_words(config) == (tag, words)
    assert weights_words({}) == ("", "float")


@pytest.mark.parametrize("target", ["Linear", r"re:model\.layers.*"])
def test_layers_that_are_not_named_are_not_counted(target):
    group = {"weights": {"num_bits": 4, "group_size": 128}, "targets": [target]}
    config = {"quantization_config": {"config_groups": {"group_0": group}}}
    assert weights_words(config) == ("4-bit", "4 bits, groups of 128")
