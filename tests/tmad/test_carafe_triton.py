"""CARAFE's operator for GPUs against the formula and the form for CPUs; without a GPU in Triton's interpreter."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.tmad.test_carafe import rand, reassemble_twin
from tmad import carafe
from tmad.carafe import Carafe, reassemble
from tmad.config import CarafeConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton comes with the CUDA builds of PyTorch and with the dev packages")

LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The operator's module; on a CPU its kernels are interpreted."""
    if DEVICE == "cpu":
        from triton.language import bfloat16, float32
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        dot = InterpreterBuilder.create_dot

        def widened(operand: TensorHandle) -> TensorHandle:
            if operand.dtype != bfloat16:
                return operand
            return TensorHandle((operand.data.astype("uint32") << 16).view("float32"), float32)

        # Triton 3.7's interpreter multiplies the bit patterns of bfloat16 as if they were integers.
        monkeypatch.setattr(
            InterpreterBuilder, "create_dot", lambda self, a, b, *more: dot(self, widened(a), widened(b), *more)
        )
    return importlib.import_module("tmad.carafe_triton")


def scene(
    kernel: int, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64, channels: str = "first"
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, logits and the gradient that comes back."""
    batch, _, height, width = shape
    sizes = shape, (batch, 4 * kernel**2, height, width), (*shape[:2], 2 * height, 2 * width)
    features, logits, grad = (
        rand(*size, seed=seed).to(DEVICE, dtype).to(memory_format=LAYOUTS[channels]) for seed, size in enumerate(sizes)
    )
    return features.requires_grad_(), logits.requires_grad_(), grad


def eager(features: Tensor, logits: Tensor, kernel: int, form=reassemble) -> Tensor:
    """Softmax and reassembly one after the other, in the features' own precision."""
    batch, _, height, width = logits.shape
    return form(features, logits.reshape(batch, 4, kernel**2, height, width).softmax(2), kernel)


def results(function, features: Tensor, logits: Tensor, grad: Tensor, kernel: int) -> list[Tensor]:
    """Output and both gradients."""
    out = function(features, logits, kernel)
    return [out.detach(), *torch.autograd.grad(out, (features, logits), grad)]


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_operator_equals_the_formula_pixel_by_pixel_and_so_do_its_gradients(fused, kernel: int) -> None:
    inputs = scene(kernel, (2, 3, 3, 4))
    expected = results(lambda f, w, k: eager(f, w, k, reassemble_twin), *inputs, kernel)
    torch.testing.assert_close(results(fused.upsample, *inputs, kernel), expected)


@pytest.mark.parametrize(
    ("kernel", "dtype", "channels"),
    [
        (5, torch.float32, "last"),
        (5, torch.bfloat16, "first"),
        (3, torch.float32, "first"),
        (3, torch.bfloat16, "last"),
        (1, torch.bfloat16, "last"),
    ],
)
def test_it_equals_the_form_for_cpus_in_double_precision(fused, kernel: int, dtype: torch.dtype, channels: str) -> None:
    inputs = scene(kernel, (1, 5, 5, 7), dtype, channels)
    found = results(fused.upsample, *inputs, kernel)
    expected = results(eager, *map(exact, inputs), kernel)
    assert found[0].is_contiguous(memory_format=LAYOUTS[channels])
    # Weights and sums are rounded to bfloat16, by half a step, 2^-9, each; the interpreter cuts off instead.
    limit = 1e-6 if dtype == torch.float32 else 2**-8 if DEVICE == "cuda" else 2**-7
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == dtype
        assert (value.double() - wanted).norm() <= limit * wanted.norm()


def test_strips_and_blocks_of_channels_join_without_a_seam(fused, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = scene(3, (1, 20, 2, 2 * fused.PIXELS + 3), torch.float64)
    expected = results(eager, *inputs, 3)
    torch.testing.assert_close(results(fused.upsample, *inputs, 3), expected)
    monkeypatch.setattr(fused, "CHANNELS", (16, 16))
    torch.testing.assert_close(results(fused.upsample, *inputs, 3), expected)


def test_views_and_a_gradient_without_memory_of_its_own_are_read_by_their_strides(fused) -> None:
    features, logits, _ = scene(1, (1, 4, 3, 10))
    features, logits = features.detach()[..., ::2].requires_grad_(), logits.detach()[..., ::2].requires_grad_()
    grad = torch.ones((), dtype=torch.float64, device=DEVICE).expand(1, 4, 6, 10)
    inputs = features, logits, grad
    torch.testing.assert_close(results(fused.upsample, *inputs, 1), results(eager, *inputs, 1))


def test_each_input_gets_a_gradient_of_its_own_dtype(fused) -> None:
    features, logits, grad = scene(1, (1, 2, 2, 3), torch.float32)
    logits = logits.detach().bfloat16().requires_grad_()
    out, by_features, by_logits = results(fused.upsample, features, logits, grad, 1)
    assert [out.dtype, by_features.dtype, by_logits.dtype] == [torch.float32, torch.float32, torch.bfloat16]


def test_large_logits_do_not_overflow_and_a_nan_stays_visible(fused) -> None:
    features, logits, _ = scene(3, (1, 2, 2, 3), torch.float32)
    large = (logits + 300).detach()
    torch.testing.assert_close(fused.upsample(features, large, 3), eager(features, large, 3), rtol=1e-4, atol=1e-4)
    large[0, 0, 0, 0] = torch.nan
    broken = fused.upsample(features, large, 3).isnan()
    assert broken[0, :, 0, 0].all()
    assert broken.sum() == 2


def test_a_second_derivative_is_refused(fused) -> None:
    features, logits, grad = scene(1, (1, 2, 2, 2))
    out = fused.upsample(features, logits, 1)
    (first,) = torch.autograd.grad(out, features, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), grad)


def test_pytorch_finds_the_operators_registered_as_they_behave(fused) -> None:
    features, logits, grad = scene(1, (1, 2, 2, 3), torch.float32, "last")
    torch.library.opcheck(fused._carafe, (features, logits, 1))
    _, scales = fused._carafe(features, logits, 1)
    inputs = [tensor.detach() for tensor in (grad, features, logits, scales)]
    torch.library.opcheck(fused._carafe_backward, (*inputs, 1))


def test_a_compiled_layer_holds_it_in_one_graph(fused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carafe, "_is_fused", lambda device: True)
    layer = Carafe(3, CarafeConfig(kernel=1)).to(DEVICE)
    features = rand(1, 3, 2, 3, dtype=torch.float32).to(DEVICE).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features), layer(features))
    gradients = [torch.autograd.grad(form(features).square().sum(), features) for form in (compiled, layer)]
    torch.testing.assert_close(*gradients)
    torch._dynamo.reset()


def test_the_device_chooses_and_the_layer_computes_the_same_on_both_ways(
    fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not carafe._is_fused(torch.device("cpu"))
    assert carafe._is_fused(torch.device("cuda"))
    layer = Carafe(3, CarafeConfig(kernel=3)).to(DEVICE)
    torch.nn.init.normal_(layer.encode.weight, std=0.5)
    features = rand(1, 3, 3, 5, dtype=torch.float32).to(DEVICE)
    ways = []
    for answer in (False, True):
        monkeypatch.setattr(carafe, "_is_fused", lambda device, answer=answer: answer)
        ways.append(layer(features))
    torch.testing.assert_close(*ways)


def test_importing_the_package_needs_no_triton() -> None:
    code = "import sys, tmad, tmad.carafe, tmad.step; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
