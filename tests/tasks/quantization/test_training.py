import hashlib
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tasks.calibration.checkpoints import load_model, save_model
from tasks.calibration.tokens import load_tokens
from tasks.distillation import Training
from tasks.distillation.losses import forward_kl
from tasks.quantization import Gptq, Grid, RoundToNearest
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.checkpoint_format import QuantizedWeight, read_weights
from tasks.quantization.fake import make_trainable_
from tasks.quantization.training import QuantizationTraining, train_quantized

BRIEF = Training(
    max_steps=6, batch_size=2, learning_rate=1e-3, precision="float32", save_every_steps=2, evaluate_every_steps=6
)
TINY = BRIEF.model_copy(update={"max_steps": 2, "learning_rate": 1e-30})
"""Steps that move no float32, whose neighbours are further apart."""
METHODS = {
    "w3 g16": RoundToNearest(weights=Grid(bits=3, group_size=16), embeddings=Grid(bits=4, group_size=16)),
    "w4 g16 asymmetric": Gptq(weights=Grid(bits=4, group_size=16, symmetric=False, range="mse")),
    "w3 g32 real zero points": RoundToNearest(
        weights=Grid(bits=3, group_size=32, symmetric=False, zero_point="real"), embeddings=None
    ),
    "some float": RoundToNearest(weights=Grid(bits=3), ignore=("model.layers.0.*",)),
}
CASES = [
    ("w3 g16", "scales"),
    ("w3 g16", "all"),
    ("w4 g16 asymmetric", "all"),
    ("w3 g32 real zero points", "scales"),
    ("w3 g32 real zero points", "all"),
    ("some float", "scales"),
]
cases = pytest.mark.parametrize(("method", "train"), CASES)
modes = pytest.mark.parametrize("train", ["scales", "all"])


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint, tiny_data, tmp_path_factory):
    made = {}

    def quantized(method, source=tiny_checkpoint):
        key = repr(method), source
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized")
            quantize_checkpoint(checkpoint=source, data=tiny_data, method=method, out=made[key])
        return made[key]

    return quantized


@pytest.fixture
def run(tiny_checkpoint, tiny_data, tmp_path):
    def run(checkpoint, wanted=None, name="trained", **arguments):
        out = tmp_path / f"{name}.out"
        out.mkdir()
        arguments = {"teacher": tiny_checkpoint, "data": tiny_data, "seed": 0, "work_dir": tmp_path / name} | arguments
        return train_quantized(
            checkpoint=checkpoint, options=wanted or QuantizationTraining(training=BRIEF), out=out, **arguments
        ), out

    return run


def digest(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@cases
def test_a_step_of_nothing_changes_nothing(quantized, run, method, train):
    before = quantized(METHODS[method])
    summary, after = run(before, QuantizationTraining(train=train, training=TINY))
    if METHODS[method].embeddings:
        assert digest(after) == digest(before)
    else:  # a float32 zero, such as the padding token's embedding, moves by any step
        old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
        assert old.keys() == new.keys()
        assert all(torch.equal(new[name], old[name]) for name in old.keys() - {"model.embed_tokens.weight"})
    assert summary.num_integers_changed == 0
    assert summary.perplexity_after == pytest.approx(summary.perplexity_before, rel=1e-5)


@cases
def test_the_exported_checkpoint_computes_what_was_trained(quantized, run, monkeypatch, tiny_checkpoint, method, train):
    check_export(quantized, run, monkeypatch, tiny_checkpoint, METHODS[method], train)


@modes
@pytest.mark.parametrize("family", ["phi3", "gemma3_text", "opt", "gpt_neox"])
def test_other_families_are_exported_as_they_were_trained(
    quantized, run, monkeypatch, family_checkpoint, family, train
):
    check_export(quantized, run, monkeypatch, family_checkpoint(family), METHODS["w3 g16"], train)


def test_capped_logits_are_refused(quantized, run, family_checkpoint):
    source = family_checkpoint("gemma2")
    with pytest.raises(ValueError, match=r"LM head times the last hidden state; gemma2 differs by .*cap"):
        run(quantized(METHODS["w3 g16"], source), teacher=source)


def check_export(quantized, run, monkeypatch, source, method, train):
    """Logits of the fake-quantized model at the end of training, and of the checkpoint in stock transformers."""
    students = []

    def spy(model, *arguments, **options):
        students.append(model)
        return make_trainable_(model, *arguments, **options)

    monkeypatch.setattr("tasks.quantization.fake.make_trainable_", spy)
    before = quantized(method, source)
    summary, after = run(before, QuantizationTraining(train=train, training=BRIEF), teacher=source)
    (student,) = students
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = student(ids).logits
        actual = AutoModelForCausalLM.from_pretrained(after)(ids).logits
        untrained = load_model(before)(ids).logits
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (actual - untrained).abs().max() > 1e-2 * expected.abs().max()

    old, new, state, num_changed = read_weights(before), read_weights(after), student.state_dict(), 0
    assert old.keys() == new.keys()
    for name, weight in new.items():
        if not isinstance(weight, QuantizedWeight):
            assert np.array_equal(weight, state[name].numpy()), name
            assert not np.array_equal(weight, old[name]), name
            continue
        layer = student.get_submodule(name.removesuffix(".weight"))
        assert np.array_equal(weight.integers, layer.quantized.stored().integers), name
        np.testing.assert_allclose(weight.dequantize(), layer.weight.detach().numpy(), rtol=1e-6, atol=1e-6)
        assert (weight.bits, weight.group_size) == (old[name].bits, old[name].group_size)
        assert not np.array_equal(weight.scale, old[name].scale), name
        num_changed += np.count_nonzero(weight.integers != old[name].integers)
        if weight.zero_point is not None and not weight.has_real_zero_point:
            assert np.array_equal(weight.zero_point, old[name].zero_point)
    assert summary.num_integers_changed == num_changed
    assert (num_changed > 0) == (train == "all")
    assert (after / "config.json").read_bytes() == (before / "config.json").read_bytes()


@modes
def test_training_brings_the_distributions_nearer_to_the_teacher(quantized, run, tiny_checkpoint, tiny_data, train):
    before = quantized(METHODS["w3 g16"])
    training = BRIEF.model_copy(update={"max_steps": 16, "batch_size": 8})
    _, after = run(before, QuantizationTraining(train=train, training=training))
    ids = torch.from_numpy(load_tokens(tiny_data, "calibration")).long()
    with torch.no_grad():
        teacher, old, new = (load_model(path)(ids).logits for path in (tiny_checkpoint, before, after))
    assert forward_kl(teacher, new).mean() < 0.95 * forward_kl(teacher, old).mean()


def test_only_scales_and_floats_are_trained_and_saved(quantized, run, tiny_checkpoint, tmp_path):
    model = load_model(tiny_checkpoint)
    before = quantized(METHODS["w3 g16"])
    scales, _ = run(before, name="scales")
    everything, _ = run(before, QuantizationTraining(train="all", training=BRIEF), name="all")
    num_norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    num_scales = (model.num_parameters() - num_norms) // 16
    assert scales.num_trained == num_scales + num_norms
    assert everything.num_trained == num_scales + model.num_parameters()
    assert scales.num_parameters == everything.num_parameters == model.num_parameters()
    state = load_file(tmp_path / "scales" / "checkpoint-4" / "student.safetensors")
    assert sum(tensor.numel() for tensor in state.values()) == scales.num_trained


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(quantized, run, tmp_path):
    before, wanted = quantized(METHODS["w3 g16"]), QuantizationTraining(train="all", training=BRIEF)
    _, whole = run(before, wanted, "whole")

    def stop(step, _total, _figures):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(before, wanted, "part", report=stop)
    shutil.rmtree(tmp_path / "part.out")
    summary, resumed = run(before, wanted, "part")
    assert summary.resumed_from_step == 4
    assert digest(resumed) == digest(whole)


@modes
def test_zeros_of_a_pruned_model_stay_zero(quantized, run, tiny_checkpoint, tmp_path, train):
    pruned = load_model(tiny_checkpoint)
    with torch.no_grad():
        for block in pruned.model.layers:
            weight = block.mlp.up_proj.weight
            weight.masked_fill_(weight.abs() < weight.abs().median(), 0)
    save_model(pruned, tiny_checkpoint, tmp_path / "pruned")
    before = quantized(Gptq(weights=Grid(bits=3, group_size=16, symmetric=False)), tmp_path / "pruned")
    summary, after = run(before, QuantizationTraining(train=train, training=BRIEF), teacher=tmp_path / "pruned")
    zeros = {n: v.numpy() == 0 for n, v in pruned.state_dict().items() if n.endswith("up_proj.weight")}
    trained = read_weights(after)
    assert all((trained[name].dequantize()[mask] == 0).all() for name, mask in zeros.items())
    if train == "all":
        assert summary.num_zeros_kept >= sum(int(mask.sum()) for mask in zeros.values())


def test_an_untied_head_is_trained_apart_from_the_embedding(quantized, run, tiny_checkpoint, tmp_path):
    model = load_model(tiny_checkpoint)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    save_model(model, tiny_checkpoint, tmp_path / "untied")
    before = quantized(RoundToNearest(weights=Grid(bits=3)), tmp_path / "untied")
    _, after = run(before, teacher=tmp_path / "untied")
    trained = read_weights(after)
    assert not np.array_equal(trained["lm_head.weight"].scale, trained["model.embed_tokens.weight"].scale)


def test_biases_of_quantized_layers_are_kept_and_trained(quantized, run, tiny_checkpoint, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    old = load_model(tiny_checkpoint).config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = Qwen2Config(**{name: getattr(old, name) for name in names}, num_hidden_layers=2, tie_word_embeddings=True)
    save_model(Qwen2ForCausalLM(config), tiny_checkpoint, tmp_path / "qwen2")
    before = quantized(RoundToNearest(weights=Grid(bits=3)), tmp_path / "qwen2")
    _, after = run(before, teacher=tmp_path / "qwen2")
    name = "model.layers.1.self_attn.q_proj.bias"
    assert not np.array_equal(read_weights(after)[name], read_weights(before)[name])


def test_bfloat16_products_and_recomputed_blocks_train_too(quantized, run):
    training = BRIEF.model_copy(update={"precision": "bfloat16", "gradient_checkpointing": True})
    summary, _ = run(quantized(METHODS["w3 g16"]), QuantizationTraining(training=training))
    assert summary.precision == "bfloat16"
    assert summary.perplexity_after != summary.perplexity_before


def test_a_loss_that_is_no_number_ends_training(quantized, run, tiny_checkpoint, tmp_path):
    broken = load_model(tiny_checkpoint)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    save_model(broken, tiny_checkpoint, tmp_path / "broken")
    with pytest.raises(ValueError, match=r"loss is nan at step 1 .*learning_rate"):
        run(quantized(METHODS["w3 g16"]), teacher=tmp_path / "broken")


def test_a_float_checkpoint_and_a_quantized_teacher_are_refused(quantized, run, tiny_checkpoint):
    with pytest.raises(ValueError, match=f"{tiny_checkpoint} is float. Quantize it first"):
        run(tiny_checkpoint)
    before = quantized(METHODS["w3 g16"])
    with pytest.raises(ValueError, match=f"teacher of a quantized model must be float; {before} is quantized"):
        run(before, name="again", teacher=before)


def test_a_teacher_of_another_vocabulary_is_refused(quantized, run, tiny_checkpoint, tmp_path):
    larger = load_model(tiny_checkpoint)
    larger.resize_token_embeddings(520)
    save_model(larger, tiny_checkpoint, tmp_path / "larger")
    before = quantized(METHODS["w3 g16"])
    with pytest.raises(ValueError, match="got 520 and 512 words"):
        run(before, teacher=tmp_path / "larger")
    with pytest.raises(ValueError, match=r"its model\.embed_tokens is \[520, 64\], that of .* \[512, 64\]"):
        run(before, QuantizationTraining(train="all", training=BRIEF), name="all", teacher=tmp_path / "larger")


def test_options_are_those_of_training_with_their_own_mixture():
    options = QuantizationTraining.model_validate({"training": {"max_steps": 3}})
    assert (options.ce_weight, options.train, options.training) == (0.0, "scales", Training(max_steps=3))
    with pytest.raises(ValidationError, match="'scales' or 'all'"):
        QuantizationTraining(train="norms")
