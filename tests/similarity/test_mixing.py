"""Laws of the mixing weights, and numbers small enough for a hand."""

import math

import pytest
import torch

from fedtri.errors import FedtriError
from fedtri.similarity.mixing import predictive_share, row_stochastic, shrunk


def test_one_client_keeps_to_itself():
    torch.testing.assert_close(row_stochastic(torch.full((1, 1), 2.0), top_k=5), torch.ones(1, 1))


def test_rows_sum_to_one_by_hand():
    s = torch.tensor([[2.0, 1, 1], [0, 2, 1], [1, 1, 2]])
    torch.testing.assert_close(row_stochastic(s)[0], torch.tensor([0.5, 0.25, 0.25]))
    torch.testing.assert_close(row_stochastic(s, top_k=2)[1], torch.tensor([0, 2 / 3, 1 / 3]))
    warm = torch.tensor([math.e**2, 1, 1]) / (math.e**2 + 2)
    torch.testing.assert_close(row_stochastic(s, temperature=0.5)[0], warm)


@pytest.mark.parametrize("temperature", [None, 0.01, 10.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, 9999])
def test_weights_are_a_distribution_over_the_most_similar(temperature, top_k):
    """More clients than one block of rows; seen to fail with diagonal(0) in every block: some lose themselves."""
    m = 600
    s = torch.rand(m, m, generator=torch.Generator().manual_seed(0)) + 0.1
    w = row_stochastic(s, temperature=temperature, top_k=top_k)
    torch.testing.assert_close(w.sum(1), torch.ones(m))
    assert (w >= 0).all()
    if top_k in (1, 7):
        order = s.clone().fill_diagonal_(torch.inf)
        outside = order < order.topk(top_k).values[:, -1:]
        assert (w[outside] == 0).all()
    if top_k == 1:
        torch.testing.assert_close(w, torch.eye(m))


def test_weights_in_place_are_the_same_and_else_nothing_is_touched():
    s = torch.rand(9, 9)
    before = s.clone()
    w = row_stochastic(s, top_k=4)
    torch.testing.assert_close(s, before)
    assert row_stochastic(s, top_k=4, out=s) is s
    torch.testing.assert_close(s, w)


@pytest.mark.parametrize("option", [{"temperature": 0.0}, {"temperature": math.nan}, {"top_k": 0}])
def test_options_out_of_range_are_named(option):
    with pytest.raises(FedtriError, match=next(iter(option))):
        row_stochastic(torch.ones(2, 2), **option)


def test_shrunk_weights_lie_between_the_mean_and_the_weights():
    w = torch.tensor([[1.0, 0], [0.25, 0.75]])
    torch.testing.assert_close(shrunk(w, 0.0), torch.full((2, 2), 0.5))
    torch.testing.assert_close(shrunk(w, 1.0), w)
    torch.testing.assert_close(shrunk(w, 0.5)[0], torch.tensor([0.75, 0.25]))


def test_the_share_by_hand():
    """Clients at 0, 0, 4. The nearest other of the first two is right, the third has none that is: it tells nothing.

    x − m = (−2, −2, 4), s − m = (−2, −2, 0): λ = 8 / 8. With half of the weight on the wrong one s − m = (−1, …): the
    best λ is 2, which is cut to 1. With the wrong one alone it is below 0, the mean.
    """
    x = torch.tensor([[0.0], [0], [4]])
    even = [1.0, 1, 1]
    assert predictive_share([(torch.tensor([[1.0, 1, 0], [1, 1, 0], even]), x)]) == 1
    assert predictive_share([(torch.tensor([[1.0, 3, 1], [3, 1, 1], even]), x)]) == 1
    assert predictive_share([(torch.tensor([[1.0, 0, 1], [0, 1, 1], even]), x)]) == 0
    half = torch.tensor([[1.0, 1, 0], [0, 1, 1], even])  # one right, one wrong: Σ = 4 − 4
    assert predictive_share([(half, x)]) == 0


def test_who_has_no_others_falls_back_to_the_mean():
    assert predictive_share([]) == 0
    assert predictive_share([(torch.ones(1, 1), torch.ones(1, 3))]) == 0
    assert predictive_share([(torch.eye(3), torch.randn(3, 3))]) == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_count_where_clients_differ_and_not_where_they_are_alike(groups):
    """24 clients with noise around one core, or around two; weights by the cosine of the first half of the numbers.

    Seen to fail with weights found from the very numbers that they are to predict: noise predicts itself, 0.35 for one.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(groups, 400, generator=generator)
    x = centres[torch.arange(24) % groups] + 2 * torch.randn(24, 400, generator=generator)
    found, told = x[:, :200], x[:, 200:]
    unit = torch.nn.functional.normalize(found - found.mean(0))
    share = predictive_share([(row_stochastic((unit @ unit.T).clamp(min=0), top_k=4), told)])
    assert share < 0.1 if groups == 1 else share > 0.2
