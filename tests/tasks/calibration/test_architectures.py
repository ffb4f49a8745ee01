import pytest

from tasks.calibration.architectures import ARCHITECTURES, architecture, matching


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_row_names_the_parts_of_the_real_model(family):
    import torch
    from torch import nn
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    row = architecture(config.model_type)
    assert len(model.get_submodule(row.blocks)) == getattr(config, row.num_layers_option) == 2
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears == {*row.all_linears(2), row.lm_head}
    assert isinstance(model.get_submodule(row.embedding), nn.Embedding)
    assert model.get_submodule(f"{row.block(0)}.{row.mlp_output}").in_features == config.intermediate_size
    for name in row.mlp_inputs:
        assert model.get_submodule(f"{row.block(0)}.{name}").out_features == config.intermediate_size
    for norm in (row.final_norm, f"{row.block(1)}.{row.attention_norm}", f"{row.block(1)}.{row.mlp_norm}"):
        assert model.get_submodule(norm).weight.shape == (32,)
    for option in row.per_layer_options:
        assert len(getattr(config, option)) == 2


def test_an_unknown_family_is_told_which_there_are():
    with pytest.raises(ValueError, match=r"\(llama, mistral, qwen2, qwen3\); got 'gpt2'"):
        architecture("gpt2")


def test_patterns_match_whole_names_in_order():
    layers = architecture("llama").all_linears(11)
    assert matching(layers, ["*.down_proj", "model.layers.1.mlp.*"])[:4] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    with pytest.raises(ValueError, match=r"'layers\.1' matches none"):
        matching(layers, ["layers.1"])
