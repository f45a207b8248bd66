"""The training step of an RQ-VAE, against a plain reimplementation of the published one in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semids.quantizers import _rqvae_layers
from semids.quantizers._ranks import Ranks
from semids.quantizers._rqvae_layers import Layer, SquaredError, squared_distances, sum_by_code
from semids.quantizers._rqvae_model import Objective, RqvaeModel
from semids.quantizers._sinkhorn import sinkhorn_codes
from tests.published_rqvae import PublishedRqvae, copy_weights, published_sinkhorn

WIDTHS, SIZES = (20, 16, 8), (11, 7, 5)


def pair(epsilons: tuple[float, ...], *, beta: float = 0.25) -> tuple[RqvaeModel, PublishedRqvae]:
    """Return our network and the published one with the same weights, both in float64."""
    generator = torch.Generator().manual_seed(3)
    model = RqvaeModel(
        WIDTHS, SIZES, Objective(epsilons, sk_iters=30, beta=beta, quant_loss_weight=0.7), generator=generator
    ).double()
    published = PublishedRqvae(WIDTHS, SIZES, epsilons, iterations=30, beta=beta).double()
    with torch.no_grad():
        for book, other in zip(model.codebooks, published.books, strict=True):
            book.copy_(torch.randn(book.shape, generator=generator))
            other.weight.copy_(book)
    copy_weights(model, published)
    return model, published


@pytest.mark.parametrize("epsilons", [(0.0, 0.0, 0.0), (0.0, 0.01, 0.05), (0.1, 0.003, 0.0)])
def test_losses_codes_and_gradients_are_the_published_ones(epsilons: tuple[float, ...]) -> None:
    model, published = pair(epsilons)
    rows = torch.randn((64, WIDTHS[0]), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = model(rows, len(rows))
    reconstruction, quantization, codes = published(rows)
    assert torch.equal(ours.codes, codes)
    assert ours.reconstruction.item() == pytest.approx(reconstruction.item(), rel=1e-12)
    assert ours.quantization.item() == pytest.approx(quantization.item(), rel=1e-12)
    ours.total.backward()
    (reconstruction + 0.7 * quantization).backward()
    gradients = [value.grad for value in (*published.encoder.parameters(), *published.decoder.parameters())]
    gradients += [book.weight.grad for book in published.books]
    found = [*model.encoder.parameters(), *model.decoder.parameters(), *model.codebooks]
    for value, expected in zip(found, gradients, strict=True):
        assert value.grad is not None
        torch.testing.assert_close(value.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("positive", [True, False])
def test_a_layer_is_the_linear_one_and_so_are_its_gradients(positive: bool) -> None:
    """Against PyTorch's own, in float64."""
    layer = Layer(9, 5, positive=positive)
    rows = torch.randn((33, 9), requires_grad=True)
    weights = torch.randn((33, 5))
    (layer(rows) * weights).sum().backward()
    expected = layer.weight.detach().double().requires_grad_(), layer.bias.detach().double().requires_grad_()
    wide = rows.detach().double().requires_grad_()
    output = torch.nn.functional.linear(wide, *expected)
    ((output.relu() if positive else output) * weights).sum().backward()
    for found, oracle in zip((rows, layer.weight, layer.bias), (wide, *expected), strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad.double(), oracle.grad, rtol=1e-4, atol=1e-5)


def test_parts_of_a_batch_add_up_to_its_loss_and_gradients() -> None:
    """What ranks rely on: each has a part of the batch, some have none."""
    whole, _ = pair((0.0, 0.0, 0.0))
    parts, _ = pair((0.0, 0.0, 0.0))
    rows = torch.randn((30, WIDTHS[0]), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = whole(rows, len(rows)).total
    loss.backward()
    split = [parts(part, len(rows)).total for part in (rows[:19], rows[19:], rows[30:])]
    sum(split).backward()
    assert sum(part.item() for part in split) == pytest.approx(loss.item(), rel=1e-12)
    for value, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad)


def test_standardised_losses_do_not_depend_on_the_scale_of_vectors() -> None:
    small, large = pair((0.0, 0.0, 0.0))[0], pair((0.0, 0.0, 0.0))[0]
    rows = torch.randn((30, WIDTHS[0]), dtype=torch.float64)
    small.scale.fill_(1.0)
    large.scale.fill_(1e-3)
    assert small(rows, 30).total.item() == pytest.approx(large(1e3 * rows, 30).total.item(), rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    epsilon=st.sampled_from([0.003, 0.01, 0.05, 0.1, 1.0]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_float32_scaling_vectors_give_the_codes_of_the_float64_plan(seed: int, epsilon: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = spread * torch.randn((200, 6), generator=generator) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.1])
    book = rows[:24] + 0.1 * spread * torch.randn((24, 6), generator=generator)
    distances = squared_distances(rows, book)
    plan = published_sinkhorn(distances, epsilon, 50)
    codes = sinkhorn_codes(distances.clone(), epsilon, 50, Ranks())
    best, chosen = plan.max(dim=1).values, plan.gather(1, codes[:, None])[:, 0]
    # Equal but for ties that float32 cannot tell apart.
    assert ((best - chosen) <= 2e-3 * best).all()
    assert (codes == plan.argmax(dim=1)).float().mean() >= 0.98


def test_a_codeword_far_from_all_rows_gets_its_share() -> None:
    """Guard: the iteration in the logarithm; without it the far codeword has no mass, and all codes are NaN's."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((120, 4), generator=generator)
    book = torch.cat([torch.randn((5, 4), generator=generator), torch.full((1, 4), 400.0)])
    codes = sinkhorn_codes(squared_distances(rows, book), 0.003, 200, Ranks())
    loads = np.bincount(codes.numpy(), minlength=6)
    assert loads[5] >= 15  # of 20


def test_equal_distances_are_no_trouble() -> None:
    assert sinkhorn_codes(torch.zeros((8, 3)), 0.01, 5, Ranks()).shape == (8,)


def test_more_iterations_bring_the_loads_closer_together() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((4000, 3), generator=generator)
    distances = squared_distances(rows, 0.2 * torch.randn((20, 3), generator=generator) + 1)
    few, many = (
        np.bincount(sinkhorn_codes(distances.clone(), 0.01, iterations, Ranks()).numpy(), minlength=20).max()
        for iterations in (1, 200)
    )
    assert many <= 1.4 * 200  # seen: 257
    assert few >= 2 * many


def test_the_squared_error_of_a_large_batch_keeps_its_digits() -> None:
    """Guard: sums row by row. One float32 sum of so many numbers is 0.1 % too small on the CPU."""
    values = torch.randn((16_384, 1024), generator=torch.Generator().manual_seed(0))
    error: torch.Tensor = SquaredError.apply(values, torch.zeros(()))
    assert error.item() == pytest.approx(float(values.double().square().sum()), rel=1e-5)


def test_the_gradient_of_a_codebook_is_the_sum_over_its_rows() -> None:
    """As products give it on CUDA, and as additions do on the CPU."""
    generator = torch.Generator().manual_seed(0)
    rows, codes = torch.randn((50, 3), generator=generator), torch.randint(0, 6, (50,), generator=generator)
    expected = torch.stack([rows[codes == code].sum(dim=0) for code in range(7)])
    assert not expected[6].any()
    for kind in ("cpu", "cuda"):
        torch.testing.assert_close(sum_by_code(rows, codes, 7, kind), expected)


def test_mixed_precision_trains_float32_weights_almost_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn((200, WIDTHS[0]), generator=torch.Generator().manual_seed(1))
    exact, mixed = (pair((0.0, 0.05, 0.0))[0].float() for _ in range(2))
    losses = exact(rows, len(rows))
    losses.total.backward()
    monkeypatch.setattr(_rqvae_layers, "MIXED_ON", frozenset({"cpu"}))
    found = mixed(rows, len(rows))
    found.total.backward()
    assert found.total.item() == pytest.approx(losses.total.item(), rel=0.01)
    assert found.reconstruction.item() != losses.reconstruction.item()
    assert (found.codes == losses.codes).float().mean() > 0.95
    for value, other in zip(mixed.parameters(), exact.parameters(), strict=True):
        assert value.grad is not None
        assert value.grad.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(value.grad.ravel(), other.grad.ravel(), dim=0) > 0.98
