"""Clipping, loss scaling and averages against their formulas; what is not finite changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pydantic")

from var_train.configuration import Optimiser
from var_train.updates import Average, adamw, loss_scaler, mixed_precision, update

CPU = torch.device("cpu")
PRECISIONS = ("fp32", "bf16", "fp16")


def settings(**changes: object) -> Optimiser:
    return Optimiser.model_validate({"iterations": 10} | changes)


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3))


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_decay_is_for_matrices_and_rates_wait_for_the_schedule():
    model = small_model()
    model[0].weight.requires_grad_(False)
    optimizer = adamw(model, settings(betas=(0.8, 0.99)))
    decayed, plain = optimizer.param_groups
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.99)}
    assert [p is model[3].weight for p in decayed["params"]] == [True]
    assert sum(p.numel() for p in plain["params"]) == 7 + 7 + 7 + 3
    assert (decayed["decayed"], plain["decayed"]) == (True, False)


@pytest.mark.parametrize("clip", [0.25, 1e6])
def test_the_whole_gradient_is_clipped_to_the_norm(clip):
    model = small_model()
    before = weights_of(model)
    model(torch.randn(4, 5)).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    by_hand = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # weights change by the gradient itself
    norm = update(model, optimizer, loss_scaler(settings(), CPU), clip)
    assert norm == pytest.approx(by_hand, rel=1e-6)  # as it was before clipping
    assert norm > 0.25
    factor = min(1.0, clip / (by_hand + 1e-6))
    for p, old, g in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p, old - factor * g, rtol=1e-6, atol=1e-7)
        assert p.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_that_is_no_number_changes_nothing(bad, precision):
    model = small_model()
    optimizer = adamw(model, settings())
    scaler = loss_scaler(settings(precision=precision), CPU)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    scaler.scale(model(torch.randn(4, 5)).square().sum()).backward()
    update(model, optimizer, scaler, 2.0)
    before, moments = weights_of(model), [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]

    scaler.scale(model(torch.randn(4, 5)).square().sum()).backward()
    model[3].bias.grad[1] = bad  # a single number of all
    norm = update(model, optimizer, scaler, 2.0)
    assert not math.isfinite(norm)
    assert_equal(weights_of(model), before)
    assert_equal([optimizer.state[p]["exp_avg"] for p in model.parameters()], moments)
    assert {optimizer.state[p]["step"].item() for p in model.parameters()} == {1.0}
    assert all(p.grad is None for p in model.parameters())

    scaler.scale(model(torch.randn(4, 5)).square().sum()).backward()
    assert math.isfinite(update(model, optimizer, scaler, 2.0))
    assert not any(torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True))


def test_an_overflow_in_fp16_halves_the_scale_and_other_updates_are_those_of_unscaled_losses():
    model, twin = small_model(), small_model()
    twin.load_state_dict(model.state_dict())
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=1.0) for m in (model, twin))
    scaler = loss_scaler(settings(precision="fp16"), CPU)
    before, scale = weights_of(model), scaler.get_scale()
    x = torch.randn(4, 5)

    scaler.scale(model(x).square().sum() * 1e36).backward()  # finite, but not times the scale
    assert not all(p.grad.isfinite().all() for p in model.parameters())
    update(model, optimizer, scaler, 1.0)
    assert_equal(weights_of(model), before)
    assert scaler.get_scale() == scale / 2

    for m, of_m, scaling in ((model, optimizer, scaler), (twin, plain, loss_scaler(settings(), CPU))):
        scaling.scale(m(x).square().sum()).backward()
        norm = update(m, of_m, scaling, 1.0)
        assert math.isfinite(norm)
    assert scaler.get_scale() == scale / 2
    assert_equal(weights_of(model), weights_of(twin))  # bit for bit, as the scale is a power of two


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_fp16_needs_a_scale(precision):
    scaler = loss_scaler(settings(precision=precision), CPU)
    assert scaler.is_enabled() is (precision == "fp16")
    loss = torch.tensor(3.0)
    assert scaler.scale(loss).item() == (3.0 * 65536 if precision == "fp16" else 3.0)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_and_convolutions_run_in_the_precision_and_weights_stay_float32(precision, dtype):
    linear, convolution, norm = nn.Linear(4, 4), nn.Conv2d(3, 4, 3), nn.LayerNorm(4)
    with mixed_precision(settings(precision=precision), CPU):
        y = linear(torch.randn(2, 4))
        assert y.dtype == dtype
        assert convolution(torch.randn(1, 3, 8, 8)).dtype == dtype
        assert norm(y.float()).dtype == torch.float32
    y.float().square().sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    assert linear(torch.randn(2, 4)).dtype == torch.float32  # outside


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_follows_its_formula(decay):
    model = small_model()
    model[0].weight.requires_grad_(False)  # part of the model all the same
    average = Average(model, decay)
    by_hand = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert average.weights.keys() == by_hand.keys()
    for t in range(12):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update(t)
        d = min(decay, (1 + t) / (10 + t))  # 0.1, 2/11, 0.25 … so that the first weights are soon forgotten
        for name, p in model.named_parameters():
            by_hand[name] = d * by_hand[name] + (1 - d) * p.detach()
    for name, tensor in average.weights.items():
        torch.testing.assert_close(tensor, by_hand[name], rtol=1e-5, atol=1e-6)  # 12 roundings of float32
        assert not torch.equal(tensor, dict(model.named_parameters())[name])


@pytest.mark.parametrize("ended", ["well", "with an error"])
def test_averaged_weights_are_in_place_within_the_context_alone(ended):
    model = small_model()
    average = Average(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    before, averaged = weights_of(model), [tensor.clone() for tensor in average.weights.values()]
    places = [p.data_ptr() for p in model.parameters()]
    try:
        with average.in_place():
            assert_equal(weights_of(model), averaged)
            assert [p.data_ptr() for p in model.parameters()] == places  # what an optimiser knows stays valid
            if ended == "with an error":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert_equal(weights_of(model), before)
    assert_equal(list(average.weights.values()), averaged)


def test_without_a_decay_there_is_no_average():
    model = small_model()
    average = Average(model, 0.0)
    before = weights_of(model)
    average.update(0)
    with average.in_place():
        assert_equal(weights_of(model), before)
    assert average.weights == {}
