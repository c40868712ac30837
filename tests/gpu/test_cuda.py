"""On a CUDA device: the kernel agrees with the torch scan, and an imported model with itself on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_sources import save_source

from stormline.models import ssd
from stormline.models.importing import import_model
from stormline.models.loading import load_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

# Of outputs, state and gradients of about unit size: the kernel multiplies in the inputs' dtype, torch in float32.
TOLERANCES = {torch.float32: 2e-2, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("length", [1, 64, 200])
def test_scan_when_by_the_kernel_then_output_state_and_gradients_are_those_of_torch(dtype, length):
    pytest.importorskip("mamba_ssm", reason="mamba-ssm is not there: pip install stormline[cuda]")
    torch.manual_seed(0)
    b, n_heads, head_dim, d_state = 2, 4, 64, 32
    shapes = {
        "x": (b, length, n_heads, head_dim),
        "B": (b, length, 1, d_state),
        "C": (b, length, 1, d_state),
        "initial_state": (b, n_heads, head_dim, d_state),
    }
    values = {name: torch.randn(shape, device="cuda", dtype=dtype) for name, shape in shapes.items()}
    values["initial_state"] = values["initial_state"].float()
    values["dt"] = torch.rand(b, length, n_heads, device="cuda", dtype=dtype) * 0.1
    values["A"] = -torch.rand(n_heads, device="cuda") - 0.5

    def run(scan):
        inputs = {name: value.clone().requires_grad_() for name, value in values.items()}
        y, state = scan(**inputs)
        (y.float().square().mean() + state.square().mean()).backward()
        return y, state, {name: value.grad for name, value in inputs.items()}

    kernel = ssd._cuda_kernel()
    assert kernel is not None
    ours = run(lambda x, dt, A, B, C, initial_state: ssd.ssd_scan(
        x, dt, A, B, C, block_tokens=64, initial_state=initial_state))  # fmt: skip
    torch_own = run(lambda x, dt, A, B, C, initial_state: ssd._scan_torch(
        x, dt, A, B, C, 64, None, initial_state))  # fmt: skip

    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(ours[0].float(), torch_own[0].float(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours[1], torch_own[1], atol=tolerance, rtol=tolerance)
    for name, gradient in ours[2].items():
        torch.testing.assert_close(gradient.float(), torch_own[2][name].float(), atol=tolerance, rtol=tolerance)


def test_imported_model_when_on_cuda_then_the_same_tokens_to_rounding(tmp_path):
    save_source("internvl", tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "storm")
    frames = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)

    on_cpu = load_model(tmp_path / "storm", device="cpu")
    on_cuda = load_model(tmp_path / "storm", device="cuda", dtype="float32")

    assert on_cuda.fingerprint == on_cpu.fingerprint
    expected = on_cpu.model.encode_clip(frames)
    torch.testing.assert_close(on_cuda.model.encode_clip(frames), expected, atol=5e-3, rtol=5e-3)
