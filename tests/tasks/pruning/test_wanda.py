import pytest
import torch

from tasks.calibration.statistics import InputNorm
from tasks.pruning import Wanda
from tasks.pruning.sparsity import Unstructured
from tasks.pruning.wanda import wanda_scores


def test_large_activation_saves_a_small_weight():
    weight = torch.tensor([[1.0, -0.1]])
    inputs = InputNorm(2)
    inputs.update(torch.tensor([[0.01, 5.0]]))
    Wanda(sparsity=Unstructured(sparsity=0.5)).prune_weight_("layer", weight, inputs)
    assert weight.tolist() == [[0.0, pytest.approx(-0.1)]]


def test_scores_match_the_definition():
    torch.manual_seed(0)
    weight, x = torch.randn(3, 8), torch.randn(16, 8)
    expected = [[abs(weight[i, j]) * sum(v**2 for v in x[:, j]) ** 0.5 for j in range(8)] for i in range(3)]
    torch.testing.assert_close(wanda_scores(weight, x.norm(dim=0)), torch.tensor(expected))


def test_weights_are_compared_within_a_row():
    weight = torch.tensor([[100.0, 200.0], [1.0, 2.0]])
    inputs = InputNorm(2)
    inputs.update(torch.ones(1, 2))
    Wanda().prune_weight_("layer", weight, inputs)
    assert weight.tolist() == [[0, 200], [0, 2]]
