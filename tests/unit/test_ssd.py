import pytest
import torch
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from stormline.models.ssd import ssd_scan, ssd_scan_ref

# b, length, n_heads, head_dim, n_groups, d_state, block_tokens
SHAPES = [
    pytest.param(1, 64, 4, 16, 1, 32, 16, id="blocks-fit"),
    pytest.param(2, 37, 6, 8, 2, 16, 16, id="last-block-short"),
    pytest.param(3, 5, 4, 8, 4, 16, 64, id="one-short-block"),
    pytest.param(64, 1, 4, 8, 1, 16, 64, id="one-token"),
    pytest.param(1, 9, 3, 5, 3, 7, 1, id="block-of-one"),
]
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def scan_inputs(b, length, n_heads, head_dim, n_groups, d_state, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "x": normal(b, length, n_heads, head_dim),
        "dt": torch.nn.functional.softplus(normal(b, length, n_heads) - 1),
        "A": -1 - 15 * torch.rand(n_heads, generator=g, dtype=torch.float64).to(dtype),
        "B": normal(b, length, n_groups, d_state),
        "C": normal(b, length, n_groups, d_state),
        "D": normal(n_heads),
        "initial_state": normal(b, n_heads, head_dim, d_state),
    }


def scan_hf(inputs, block_tokens):
    """Run transformers' fallback, which always computes in float32."""
    args = dict(inputs)
    return mamba2_chunk_scan(
        args["x"],
        args["dt"],
        args["A"],
        args["B"],
        args["C"],
        chunk_size=block_tokens,
        D=args["D"],
        initial_states=args["initial_state"],
        return_final_states=True,
    )


def gradients_of(scan, inputs):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    y, state = scan(leaves)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    loss = (y * weight).sum() + state.square().mean()
    return torch.autograd.grad(loss, [leaves[name] for name in NAMES])


def slice_time(inputs, start, stop):
    return {k: v[:, start:stop] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize(("b", "length", "n_heads", "head_dim", "n_groups", "d_state", "block_tokens"), SHAPES)
def test_ssd_scan_when_run_in_blocks_then_output_and_state_are_the_recurrence(
    b, length, n_heads, head_dim, n_groups, d_state, block_tokens, dtype, tolerance
):
    inputs = scan_inputs(b, length, n_heads, head_dim, n_groups, d_state, dtype)

    y, state = ssd_scan(**inputs, block_tokens=block_tokens)

    y_ref, state_ref = ssd_scan_ref(**inputs)
    assert y.dtype == state.dtype == dtype
    torch.testing.assert_close(y, y_ref, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state, state_ref, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("b", "length", "n_heads", "head_dim", "n_groups", "d_state", "block_tokens"), SHAPES)
def test_ssd_scan_when_run_in_blocks_then_gradients_are_those_of_the_recurrence(
    b, length, n_heads, head_dim, n_groups, d_state, block_tokens
):
    inputs = scan_inputs(b, length, n_heads, head_dim, n_groups, d_state)

    got = gradients_of(lambda leaves: ssd_scan(**leaves, block_tokens=block_tokens), inputs)

    expected = gradients_of(lambda leaves: ssd_scan_ref(**leaves), inputs)
    for name, g, e in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-9, rtol=1e-9, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("b", "length", "n_heads", "head_dim", "n_groups", "d_state", "block_tokens"), SHAPES)
def test_ssd_scan_when_compared_with_transformers_then_output_state_and_gradients_agree(
    b, length, n_heads, head_dim, n_groups, d_state, block_tokens, dtype
):
    inputs = scan_inputs(b, length, n_heads, head_dim, n_groups, d_state, dtype)

    y, state = ssd_scan(**inputs, block_tokens=block_tokens)
    gradients = gradients_of(lambda leaves: ssd_scan(**leaves, block_tokens=block_tokens), inputs)

    y_hf, state_hf = scan_hf(inputs, block_tokens)
    gradients_hf = gradients_of(lambda leaves: scan_hf(leaves, block_tokens), inputs)
    torch.testing.assert_close(y.float(), y_hf.float(), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(state.float(), state_hf.float(), atol=2e-4, rtol=2e-4)
    for name, g, e in zip(NAMES, gradients, gradients_hf, strict=True):
        scale = e.abs().max().clamp(min=1)
        torch.testing.assert_close(
            g / scale,
            e / scale,
            atol=2e-5,
            rtol=2e-3,
            check_dtype=False,
            msg=lambda m, name=name: f"gradient of {name}: {m}",
        )


@pytest.mark.parametrize("cut", [16, 32, 48])
def test_ssd_scan_when_cut_at_a_block_then_it_gives_the_same_bits(cut):
    inputs = scan_inputs(2, 53, 6, 8, 2, 16, torch.float32)
    y, state = ssd_scan(**inputs, block_tokens=16)

    y_head, carried = ssd_scan(**slice_time(inputs, 0, cut), block_tokens=16)
    y_tail, state_cut = ssd_scan(**{**slice_time(inputs, cut, 53), "initial_state": carried}, block_tokens=16)

    assert torch.equal(torch.cat([y_head, y_tail], dim=1), y)
    assert torch.equal(state_cut, state)


@pytest.mark.parametrize("cut", range(1, 20))
def test_ssd_scan_when_cut_anywhere_then_it_gives_what_one_pass_gives(cut):
    inputs = scan_inputs(2, 20, 4, 8, 2, 16)
    y, state = ssd_scan(**inputs, block_tokens=8)

    y_head, carried = ssd_scan(**slice_time(inputs, 0, cut), block_tokens=8)
    y_tail, state_cut = ssd_scan(**{**slice_time(inputs, cut, 20), "initial_state": carried}, block_tokens=8)

    torch.testing.assert_close(torch.cat([y_head, y_tail], dim=1), y, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state_cut, state, atol=1e-12, rtol=1e-12)


def test_ssd_scan_when_no_state_is_given_then_it_starts_from_zeros_and_changes_no_input():
    inputs = scan_inputs(2, 12, 4, 8, 2, 16, torch.float32)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    zeros = torch.zeros_like(inputs["initial_state"])

    y, state = ssd_scan(**{**inputs, "initial_state": None}, block_tokens=8)
    y_zeros, state_zeros = ssd_scan(**{**inputs, "initial_state": zeros}, block_tokens=8)
    ssd_scan(**inputs, block_tokens=8)

    assert torch.equal(y, y_zeros)
    assert torch.equal(state, state_zeros)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_ssd_scan_when_decay_is_extreme_then_output_and_gradients_stay_finite():
    # Over a block the decay spans exp(±6000): its two factors taken apart would be 0 and inf.
    inputs = scan_inputs(1, 32, 2, 4, 1, 8, torch.float32)
    inputs["dt"] = torch.full_like(inputs["dt"], 12.0)

    y, state = ssd_scan(**inputs, block_tokens=32)
    gradients = gradients_of(lambda leaves: ssd_scan(**leaves, block_tokens=32), inputs)

    y_ref, state_ref = ssd_scan_ref(**inputs)
    torch.testing.assert_close(y, y_ref, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(state, state_ref, atol=1e-3, rtol=1e-3)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_ssd_scan_when_some_heads_decay_steeply_then_output_state_and_gradients_are_the_recurrence(n_groups):
    inputs = scan_inputs(2, 40, 4, 8, n_groups, 16)
    inputs["A"] = torch.tensor([-0.1, -40.0, -0.5, -9.0], dtype=torch.float64)  # over a block: exp(-1) to exp(-600)

    y, state = ssd_scan(**inputs, block_tokens=16)
    y_single, _ = ssd_scan(**{name: tensor.float() for name, tensor in inputs.items()}, block_tokens=16)
    gradients = gradients_of(lambda leaves: ssd_scan(**leaves, block_tokens=16), inputs)

    y_ref, state_ref = ssd_scan_ref(**inputs)
    torch.testing.assert_close(y, y_ref, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(state, state_ref, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(y_single, y_ref.float(), atol=2e-4, rtol=2e-4)
    for g, e in zip(gradients, gradients_of(lambda leaves: ssd_scan_ref(**leaves), inputs), strict=True):
        torch.testing.assert_close(g, e, atol=1e-9, rtol=1e-9)


def test_ssd_scan_when_input_is_bfloat16_or_autocast_then_the_state_is_computed_in_float32():
    inputs = scan_inputs(2, 20, 4, 8, 2, 16, torch.bfloat16)
    exact = {name: tensor.float() for name, tensor in inputs.items()}

    y, state = ssd_scan(**inputs, block_tokens=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_autocast, state_autocast = ssd_scan(**exact, block_tokens=8)

    y_exact, state_exact = ssd_scan(**exact, block_tokens=8)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, y_exact.bfloat16())
    assert torch.equal(state, state_exact)
    assert torch.equal(y_autocast, y_exact)
    assert torch.equal(state_autocast, state_exact)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("dt", (2, 8, 3), "dt has shape"),
        ("A", (3,), "A has shape"),
        ("B", (2, 8, 3, 16), "dividing"),
        ("C", (2, 7, 2, 16), "C has shape"),
        ("initial_state", (1, 4, 8, 16), "initial_state has shape"),
        ("x", (2, 0, 4, 8), "l of 1 or more"),
    ],
)
def test_ssd_scan_when_a_shape_does_not_fit_then_the_error_names_it(name, shape, message):
    inputs = scan_inputs(2, 8, 4, 8, 2, 16)

    with pytest.raises(ValueError, match=message):
        ssd_scan(**{**inputs, name: torch.zeros(shape)}, block_tokens=8)


def test_ssd_scan_when_the_block_is_empty_then_it_raises():
    with pytest.raises(ValueError, match="block_tokens is 0"):
        ssd_scan(**scan_inputs(1, 4, 2, 4, 1, 8), block_tokens=0)
