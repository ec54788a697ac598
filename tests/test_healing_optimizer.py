"""Steps of healing: orthogonal ones for cores, Adam's for everything else."""

import pytest
import torch
from torch import nn

import mpocompress as mpo
from mpocompress.tuning.healing.optimizer import HealingOptimizer, orthogonal

RATE = 1e-2


def layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10)).to(dtype)
    return mpo.compress(net, include=["0"], bond_dim=6, sites=3).model


def with_gradients(model: nn.Module) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_of_cores_are_orthogonal_and_as_large_as_those_of_adam(dtype):
    model = layers(dtype)
    parameters = with_gradients(model)
    before = [parameter.detach().clone() for parameter in parameters]
    HealingOptimizer(model, parameters).step(RATE)
    cores = {id(core) for core in model[0].cores}
    for parameter, old in zip(parameters, before, strict=True):
        step = (parameter.detach() - old) / RATE
        assert float(step.flatten() @ parameter.grad.flatten()) < 0
        if id(parameter) not in cores:  # the first step of Adam
            torch.testing.assert_close(step, -parameter.grad.sign(), rtol=1e-3, atol=1e-3)
            continue
        left, out, in_, right = parameter.shape
        matrix = step.reshape(left * out, in_ * right)
        scale = 0.2 * max(matrix.shape) ** 0.5
        values = torch.linalg.svdvals(matrix) / scale
        assert float(values.min()) > 0.4
        assert float(values.max()) < 1.6


@pytest.mark.parametrize("shape", [(30, 200), (200, 30), (40, 40), (1, 7), (5, 1)])
def test_a_step_is_that_of_the_published_iteration(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = matrix / matrix.norm()
    for _ in range(5):
        gram = expected @ expected.T
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    torch.testing.assert_close(orthogonal(matrix), expected)
    torch.testing.assert_close(orthogonal(matrix.float()).double(), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1e12])
def test_steps_are_finite_for_gradients_of_all_sizes(scale):
    left = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    found = orthogonal(scale * (left @ left.T))  # of rank 3
    values = torch.linalg.svdvals(found)
    assert bool(values.isfinite().all())
    assert float(values[0]) < 1.3
    assert float(values[2]) > (0.6 if scale > 1e-12 else -1.0)
    assert float(values[3]) < 0.1


def test_what_was_not_reached_by_a_gradient_stays():
    model = layers()
    parameters = with_gradients(model)
    parameters[0].grad = None
    before = parameters[0].detach().clone()
    optimizer = HealingOptimizer(model, parameters)
    optimizer.step(RATE)
    assert torch.equal(parameters[0], before)
    moments = optimizer.moments()
    assert not moments[0]
    assert all(moments[1:])


@pytest.mark.parametrize("strided", [False, True])
def test_moments_that_are_restored_give_the_same_steps(strided):
    model = layers()
    if strided:
        for core in model[0].cores:
            core.data = core.data.transpose(1, 2).contiguous().transpose(1, 2)
    parameters = with_gradients(model)
    optimizer = HealingOptimizer(model, parameters)
    optimizer.step(RATE)
    kept = [parameter.detach().clone() for parameter in parameters]
    moments = [{k: v.clone() for k, v in found.items()} for found in optimizer.moments()]
    optimizer.step(RATE)
    expected = [parameter.detach().clone() for parameter in parameters]
    assert not torch.equal(expected[0], kept[0])
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    again = HealingOptimizer(model, parameters)
    again.restore(moments)
    again.step(RATE)
    for parameter, value in zip(parameters, expected, strict=True):
        assert torch.equal(parameter, value)


def test_dense_convolutions_are_not_taken_for_cores():
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    parameters = with_gradients(net)
    before = parameters[0].detach().clone()
    HealingOptimizer(net, parameters).step(RATE)
    step = (parameters[0].detach() - before) / RATE
    torch.testing.assert_close(step, -parameters[0].grad.sign(), rtol=1e-3, atol=1e-3)
