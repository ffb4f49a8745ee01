import pytest
import torch
from pydantic import ValidationError

from tasks.pruning.sparsity import SemiStructured, Unstructured


def test_the_lowest_of_every_row_go():
    keep = Unstructured(sparsity=0.5).keep(torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]]), "layer")
    assert keep.tolist() == [[True, False, True, False], [False, False, True, True]]


def test_fraction_is_rounded_not_cut():
    keep = Unstructured(sparsity=0.29).keep(torch.rand(1, 100), "layer")  # 0.29 * 100 is 28.999999999999996
    assert int((~keep).sum()) == 29


def test_ties_remove_no_more_than_asked():
    assert int((~Unstructured(sparsity=0.25).keep(torch.ones(1, 8), "layer")).sum()) == 2


def test_two_to_four_keeps_the_two_largest_of_every_four():
    scores = torch.rand(5, 16)
    keep = SemiStructured(n=2, m=4).keep(scores, "layer")
    for i in range(5):
        for j in range(0, 16, 4):
            order = sorted(range(4), key=lambda k: scores[i, j + k].item())
            assert [keep[i, j + k].item() for k in order] == [False, False, True, True]


def test_n_to_m_rejects_a_width_it_cannot_tile():
    with pytest.raises(ValueError, match="divisible by 4; got 6 in up_proj"):
        SemiStructured(n=2, m=4).keep(torch.rand(5, 6), "up_proj")


def test_n_must_be_less_than_m():
    with pytest.raises(ValidationError, match="got 4:4"):
        SemiStructured(n=4, m=4)
