import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tasks.distillation.losses import IGNORE, distillation_loss, forward_kl, next_tokens


def inputs(tokens=7, vocab_size=11, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    student_hidden = torch.randn(tokens, 5, dtype=dtype, requires_grad=True)
    student_head = torch.randn(vocab_size, 5, dtype=dtype, requires_grad=True)
    teacher_hidden, teacher_head = torch.randn(tokens, 6, dtype=dtype), torch.randn(vocab_size, 6, dtype=dtype)
    targets = torch.randint(0, vocab_size, (tokens,))
    return [student_hidden, student_head, teacher_hidden, teacher_head, targets]


def naive(student_hidden, student_head, teacher_hidden, teacher_head, targets, ce_weight, temperature):
    """The definition written as loops over tokens: sum of a * CE + (1 - a) * T^2 * KL(teacher || student)."""
    total = torch.zeros((), dtype=student_hidden.dtype)
    for n in range(len(targets)):
        if targets[n] == IGNORE:
            continue
        z = student_head @ student_hidden[n]
        v = teacher_head @ teacher_hidden[n]
        p = torch.exp(z / temperature) / torch.exp(z / temperature).sum()
        q = torch.exp(v / temperature) / torch.exp(v / temperature).sum()
        cross_entropy = -torch.log((torch.exp(z) / torch.exp(z).sum())[targets[n]])
        total = total + ce_weight * cross_entropy
        total = total + (1 - ce_weight) * temperature**2 * (q * torch.log(q / p)).sum()
    return total


def test_a_coin_one_can_check_by_eye():
    # teacher 1/2, 1/2; student 3/4, 1/4: KL = ln(2/3)/2 + ln(2)/2
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    expected = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert forward_kl(teacher, student).item() == pytest.approx(expected)
    one = torch.ones(1, 1)
    sums = distillation_loss(
        one, student[:, None], one, teacher[:, None], torch.tensor([1]), ce_weight=0.25, temperature=1.0
    )
    assert sums.forward_kl.item() == pytest.approx(expected)
    assert sums.cross_entropy.item() == pytest.approx(math.log(4))
    assert sums.loss.item() == pytest.approx(0.25 * math.log(4) + 0.75 * expected)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_loss_and_gradients_are_those_of_the_definition(ce_weight, temperature, chunk_size):
    tensors = inputs()
    tensors[4][2] = IGNORE
    expected = naive(*tensors, ce_weight, temperature)
    expected_grads = torch.autograd.grad(expected, tensors[:2])
    actual = distillation_loss(*tensors, ce_weight=ce_weight, temperature=temperature, chunk_size=chunk_size).loss
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual * 3, tensors[:2]), tuple(3 * g for g in expected_grads))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(temperature):
    hidden, head, _, _, targets = inputs(dtype=torch.float32)
    sums = distillation_loss(
        hidden, head, hidden.detach(), head.detach(), targets, ce_weight=0.0, temperature=temperature
    )
    assert sums.loss.item() == 0
    for grad in torch.autograd.grad(sums.loss, [hidden, head]):
        assert grad.abs().max() == 0
    assert forward_kl(torch.randn(3, 9), torch.randn(3, 9)).min() > 0


def test_a_hot_teacher_is_matched_in_its_logits():
    # Hinton et al., eq. 4: for zero-mean logits T^2 * dKL/dz tends to (z - v) / V as T grows
    tensors = inputs(tokens=1, vocab_size=8)
    head = torch.eye(8, dtype=torch.float64)
    z, v = (x - x.mean() for x in torch.randn(2, 8, dtype=torch.float64))
    z = z[None].requires_grad_()
    loss = distillation_loss(z, head, v[None], head, tensors[4] % 8, ce_weight=0.0, temperature=1e4).loss
    (grad,) = torch.autograd.grad(loss, [z])
    torch.testing.assert_close(grad, (z.detach() - v) / 8, rtol=1e-3, atol=1e-6)  # first order in 1/T


def test_masked_tokens_count_for_nothing():
    tensors = inputs()
    tensors[4][[0, 3]] = IGNORE
    sums = distillation_loss(*tensors, ce_weight=0.5, temperature=2.0, chunk_size=2)
    hidden_grad, _ = torch.autograd.grad(sums.loss, tensors[:2])
    assert (hidden_grad[[0, 3]] == 0).all()
    assert (hidden_grad[[1, 2, 4, 5, 6]] != 0).all()
    valid = tensors[4] != IGNORE
    some = [tensors[0][valid], tensors[1], tensors[2][valid], tensors[3], tensors[4][valid]]
    assert torch.equal(distillation_loss(*some, ce_weight=0.5, temperature=2.0, chunk_size=2).loss, sums.loss)


def test_nothing_valid_is_a_loss_of_zero():
    tensors = inputs()
    loss = distillation_loss(*tensors[:4], torch.full((7,), IGNORE), ce_weight=0.5, temperature=1.0).loss
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, tensors[:2]))


def test_each_position_predicts_the_next_token():
    assert next_tokens(torch.tensor([[5, 6, IGNORE, 8]])).tolist() == [[6, IGNORE, 8, IGNORE]]


def test_cross_entropy_alone_is_torchs_and_needs_no_teacher():
    hidden, head, _, _, targets = inputs()
    sums = distillation_loss(hidden, head, None, None, targets, ce_weight=1.0, temperature=5.0, chunk_size=4)
    expected = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    torch.testing.assert_close(sums.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(sums.loss, head), torch.autograd.grad(expected, head))


class _LargestTensor(TorchDispatchMode):
    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.num_elements = max(self.num_elements, value.untyped_storage().nbytes() // value.element_size())
        return result


def test_logits_of_more_than_one_chunk_never_exist():
    tensors = inputs(tokens=512, vocab_size=1000, dtype=torch.float32)
    with _LargestTensor() as chunked:
        distillation_loss(*tensors, ce_weight=0.5, temperature=2.0, chunk_size=16).loss.backward()
    assert chunked.num_elements <= 16 * 1000
    with _LargestTensor() as at_once:
        logits, teacher_logits = tensors[0] @ tensors[1].T, tensors[2] @ tensors[3].T
        (F.cross_entropy(logits, tensors[4]) + forward_kl(teacher_logits, logits).mean()).backward()
    assert at_once.num_elements == 512 * 1000


def test_autocast_rounds_the_products_and_nothing_else():
    tensors = inputs(tokens=64, vocab_size=50, dtype=torch.float32)
    exact = distillation_loss(*tensors, ce_weight=0.5, temperature=2.0).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = distillation_loss(*tensors, ce_weight=0.5, temperature=2.0).loss
    assert rounded.dtype == torch.float32
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0)  # bfloat16 has 8 bits, about 0.4 %
    grads = zip(torch.autograd.grad(rounded, tensors[:2]), torch.autograd.grad(exact, tensors[:2]), strict=True)
    for actual, expected in grads:
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() < 0.02 * expected.norm()


def test_other_vocabularies_are_refused():
    tensors = inputs()
    tensors[3] = tensors[3][:-1]
    with pytest.raises(ValueError, match="got 10 and 11 words"):
        distillation_loss(*tensors, ce_weight=0.5, temperature=1.0)
    with pytest.raises(ValueError, match=r"ce_weight 0\.5"):
        distillation_loss(*tensors[:2], None, None, tensors[4], ce_weight=0.5, temperature=1.0)


def test_a_second_backward_pass_is_refused():
    loss = distillation_loss(*inputs(), ce_weight=0.5, temperature=1.0).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
