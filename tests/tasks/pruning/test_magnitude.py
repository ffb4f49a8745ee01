import pytest
import torch
from pydantic import ValidationError

from tasks.pruning import Magnitude
from tasks.pruning.sparsity import SemiStructured, Unstructured


def test_threshold_removes_what_is_smaller_in_size():
    keep = Magnitude(threshold=0.2).keep(torch.tensor([[0.1, -0.1, 0.2, -0.3]]), "layer")
    assert keep.tolist() == [[False, False, True, True]]


def test_weights_are_compared_within_the_layer():
    weight = torch.tensor([[1.0, -2.0], [0.1, 0.2]])
    assert Magnitude().keep(weight, "layer").tolist() == [[True, True], [False, False]]


def test_n_to_m_compares_within_its_groups():
    keep = Magnitude(sparsity=SemiStructured(n=1, m=2)).keep(torch.tensor([[5.0, 6.0, -0.2, 0.1]]), "layer")
    assert keep.tolist() == [[False, True, True, False]]


def test_two_rules_are_refused():
    with pytest.raises(ValidationError, match="either `sparsity` or `threshold`"):
        Magnitude(sparsity=Unstructured(), threshold=0.1)
