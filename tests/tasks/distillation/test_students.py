import copy
import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tasks.calibration.architectures import ARCHITECTURES, architecture
from tasks.calibration.checkpoints import load_model, save_model
from tasks.distillation.students import block_influence, evenly_spaced, keep_layers, most_influential


def test_even_spacing_includes_first_and_last():
    assert evenly_spaced(5, 3) == (0, 2, 4)
    assert evenly_spaced(4, 2) == (0, 3)
    assert evenly_spaced(30, 1) == (0,)
    assert evenly_spaced(6, 6) == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("num_kept", range(2, 31))
def test_even_spacing_has_gaps_that_differ_by_one_at_most(num_kept):
    kept = evenly_spaced(30, num_kept)
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert kept[0] == 0
    assert kept[-1] == 29
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


def test_the_most_influential_layers_stay_in_order():
    assert most_influential([0.1, 0.9, 0.3, 0.3, 0.2], 2) == (1, 2)
    assert most_influential([0.1, 0.9, 0.3, 0.3, 0.2], 4) == (1, 2, 3, 4)


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"1 to 4 of its teacher's 4 layers; got 6"):
        evenly_spaced(4, 6)


def test_block_influence_is_one_minus_the_mean_cosine(tiny_checkpoint):
    model = load_model(tiny_checkpoint)
    tokens = torch.randint(0, 512, (3, 16))
    inputs, outputs = {}, {}
    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(
            lambda _module, args, output, i=i: (inputs.update({i: args[0]}), outputs.update({i: output}))[0]
        )
    with torch.no_grad():
        model(tokens)
    expected = []
    for i in range(4):
        cosines = [
            F.cosine_similarity(inputs[i][b, s], outputs[i][b, s], dim=0).item() for b in range(3) for s in range(16)
        ]
        expected.append(1 - sum(cosines) / len(cosines))
    norm = model.model.norm
    assert block_influence(model, tokens, batch_size=2) == pytest.approx(expected, abs=1e-5)
    assert model.model.norm is norm


def test_a_block_that_adds_nothing_goes_first(tiny_checkpoint):
    model = load_model(tiny_checkpoint)
    with torch.no_grad():
        for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            linear.weight.zero_()
    influence = block_influence(model, torch.randint(0, 512, (2, 16)))
    assert influence[2] == pytest.approx(0, abs=1e-6)
    assert most_influential(influence, 3) == (0, 1, 3)


def test_the_student_is_the_teacher_without_the_other_layers(tiny_checkpoint, tmp_path):
    teacher = load_model(tiny_checkpoint)
    before = copy.deepcopy(teacher.state_dict())
    student = keep_layers(teacher, (0, 3))
    save_model(student, tiny_checkpoint, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 2
    assert loaded.num_parameters() < teacher.num_parameters()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    tokens = torch.randint(0, 512, (1, 9))
    prompt = loaded(tokens[:, :5], use_cache=True)  # layer_idx must be right for the cache
    cached = loaded(tokens[:, 5:], past_key_values=prompt.past_key_values).logits
    teacher.model.layers[1].forward = teacher.model.layers[2].forward = lambda hidden, *_args, **_kwargs: hidden
    expected = teacher(tokens, use_cache=False).logits[:, 5:]
    torch.testing.assert_close(cached, expected)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_students_of_every_family_load_and_compute_without_the_layer(family_checkpoint, tmp_path, family):
    teacher, row = load_model(family_checkpoint(family)), architecture(family)
    influence = block_influence(teacher, torch.randint(0, 512, (2, 16)))
    assert len(influence) == 3
    assert min(influence) > 1e-4
    save_model(keep_layers(teacher, (0, 2)), family_checkpoint(family), tmp_path)
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, 512, (1, 12))
    with torch.no_grad():
        prompt = student(tokens[:, :7], use_cache=True)
        cached = student(tokens[:, 7:], past_key_values=prompt.past_key_values).logits
        teacher.get_submodule(row.block(1)).forward = lambda hidden, *_args, **_kwargs: hidden
        torch.testing.assert_close(cached, teacher(tokens, use_cache=False).logits[:, 7:])


def test_kinds_of_layers_go_with_their_layers(tmp_path):
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=4,
        use_sliding_window=True,
    )
    student = keep_layers(Qwen2ForCausalLM(config), (0, 1, 3))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    tokens = torch.randint(0, 64, (1, 12))
    torch.testing.assert_close(loaded(tokens).logits, student.eval()(tokens).logits)
