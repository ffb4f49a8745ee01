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
        **{"ffn_dim" if family == "opt" else "intermediate_size": 48},
        pad_token_id=0,
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
    assert getattr(config, row.intermediate_size_option) == 48
    assert model.get_submodule(f"{row.block(0)}.{row.mlp_output}").in_features == 48
    num_outputs = sum(model.get_submodule(f"{row.block(0)}.{name}").out_features for name in row.mlp_inputs)
    assert num_outputs == 48 * (2 if row.gated else 1)
    tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    assert tables == {row.embedding} | ({row.positions} if row.positions else set())
    for norm in (row.final_norm, f"{row.block(1)}.{row.attention_norm}", f"{row.block(1)}.{row.mlp_norm}"):
        assert model.get_submodule(norm).weight.shape == (32,)
    for option in row.per_layer_options:
        assert len(getattr(config, option)) == 2


def test_an_unknown_family_is_told_which_there_are():
    with pytest.raises(ValueError, match=r"\(llama, mistral, qwen2, qwen3, .*\); got 'mamba'"):
        architecture("mamba")
    with pytest.raises(
        ValueError, match=r"got 'gpt2': its linear layers are transformers' Conv1D.*compile it as it is"
    ):
        architecture("gpt2")


def test_norms_multiply_with_their_weight_plus_the_offset():
    """Where a row is wrong, folding scales into a norm would change the model."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    for family, row in ARCHITECTURES.items():
        sizes = {"vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = AutoConfig.for_model(family, **sizes, pad_token_id=0)
        norm = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).get_submodule(f"{row.block(0)}.{row.attention_norm}")
        with torch.no_grad():
            norm.weight.fill_(-row.gain_offset)
            assert not norm(torch.randn(3, 32)).any()


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
