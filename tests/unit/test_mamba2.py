from dataclasses import fields

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from stormline.models.mamba2 import GatedRMSNorm, Mamba2, Mamba2State

SIZES = {"d_state": 16, "head_dim": 8, "n_groups": 2, "block_tokens": 8}
D_MODEL = 32


def trained_looking_mixer(d_model=D_MODEL, **sizes):
    """Return a mixer none of whose parameters is still a constant."""
    torch.manual_seed(0)
    mixer = Mamba2(d_model, **{**SIZES, **sizes})
    with torch.no_grad():
        for parameter in (mixer.D, mixer.norm.weight):
            parameter.add_(torch.randn_like(parameter) / 4)
    return mixer


def hf_mixer_like(mixer):
    config = Mamba2Config(
        hidden_size=mixer.d_model,
        num_heads=mixer.n_heads,
        head_dim=mixer.head_dim,
        state_size=mixer.d_state,
        n_groups=mixer.n_groups,
        conv_kernel=mixer.d_conv,
        expand=2,
        chunk_size=mixer.block_tokens,
        num_hidden_layers=1,
        layer_norm_epsilon=mixer.norm.eps,
    )
    hf = Mamba2Mixer(config, 0)
    hf.load_state_dict(mixer.state_dict())
    return hf, DynamicCache(config=config)


def run_in_pieces(mixer, u, lengths):
    state, outputs = None, []
    for piece in u.split(lengths, dim=1):
        y, state = mixer(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def assert_same_bits(state: Mamba2State, other: Mamba2State):
    for field in fields(Mamba2State):
        assert torch.equal(getattr(state, field.name), getattr(other, field.name)), field.name


def assert_states_close(state: Mamba2State, other: Mamba2State, tolerance: float):
    for field in fields(Mamba2State):
        torch.testing.assert_close(
            getattr(state, field.name), getattr(other, field.name), atol=tolerance, rtol=tolerance
        )


def test_mamba2_when_built_as_mamba2_130m_then_parameters_have_mamba_ssms_names_and_shapes():
    # mamba_ssm.Mamba2(d_model=768, d_state=128, d_conv=4, expand=2, headdim=64, ngroups=1): the mixers of
    # state-spaces/mamba2-130m. d_inner 1536, 24 heads, in_proj 2·1536 + 2·128 + 24, convolution 1536 + 2·128.
    expected = {
        "dt_bias": (24,),
        "A_log": (24,),
        "D": (24,),
        "in_proj.weight": (3352, 768),
        "conv1d.weight": (1792, 1, 4),
        "conv1d.bias": (1792,),
        "norm.weight": (1536,),
        "out_proj.weight": (768, 1536),
    }

    mixer = Mamba2(768, d_state=128, d_conv=4, expand=2, head_dim=64, n_groups=1)

    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == expected


def test_mamba2_when_fresh_then_steps_and_decays_lie_in_mamba_ssms_ranges():
    torch.manual_seed(0)

    mixer = Mamba2(256, head_dim=2)  # 256 heads: enough to see a distribution

    dt = nn.functional.softplus(mixer.dt_bias.detach())
    a = mixer.A_log.detach().exp()
    assert 1e-3 * 0.999 <= dt.min() < 2e-3
    assert 5e-2 < dt.max() <= 1e-1 * 1.001
    assert dt.median() == pytest.approx(1e-2, rel=0.5)  # log-uniform: the middle of 0.001 and 0.1 is 0.01
    assert 1 <= a.min() < 2
    assert 15 < a.max() <= 16
    assert torch.equal(mixer.D, torch.ones(256))


def test_mamba2_when_reset_after_a_load_then_only_parameters_not_marked_as_loaded_change():
    mixer = trained_looking_mixer()
    before = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    mixer.dt_bias._is_hf_initialized = True

    mixer.reset_parameters()

    kept = {name for name, p in mixer.named_parameters() if torch.equal(p, before[name])}
    assert kept == {"dt_bias"}


@pytest.mark.parametrize("n_groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 7, 8, 21])
def test_mamba2_when_compared_with_transformers_then_output_state_and_gradients_agree(length, n_groups):
    mixer = trained_looking_mixer(n_groups=n_groups)
    hf, cache = hf_mixer_like(mixer)
    u = torch.randn(2, length, D_MODEL)
    weight = torch.randn(2, length, D_MODEL)

    y, state = mixer(u)
    (y * weight).sum().backward()

    y_hf = hf(u, cache_params=cache)
    (hf(u) * weight).sum().backward()
    conv_hf = cache.get_conv_state(0, state_idx=0)[..., 1:].transpose(1, 2)  # theirs also keeps the oldest, unused
    torch.testing.assert_close(y, y_hf, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.conv, conv_hf, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(state.ssm, cache.get_recurrent_state(0, state_idx=0), atol=1e-5, rtol=1e-5)
    theirs = dict(hf.named_parameters())
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_mamba2_when_a_second_piece_follows_then_it_goes_on_as_transformers_one_pass():
    mixer = trained_looking_mixer()
    hf, _ = hf_mixer_like(mixer)
    u = torch.randn(2, 19, D_MODEL)

    y, _ = run_in_pieces(mixer, u, [7, 1, 11])

    torch.testing.assert_close(y, hf(u), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[1, 18], [2, 1, 16], [8, 11], [13, 3, 3], [1] * 19], ids=str)
def test_mamba2_when_cut_anywhere_then_it_gives_what_one_pass_gives(lengths):
    mixer = trained_looking_mixer().double()
    u = torch.randn(2, 19, D_MODEL, dtype=torch.float64)

    y_cut, state_cut = run_in_pieces(mixer, u, lengths)

    y, state = mixer(u)
    torch.testing.assert_close(y_cut, y, atol=1e-12, rtol=1e-12)
    assert_states_close(state_cut, state, 1e-12)


def test_mamba2_when_cut_then_gradients_flow_through_the_carried_state():
    mixer = trained_looking_mixer().double()
    u = torch.randn(2, 12, D_MODEL, dtype=torch.float64)
    weight = torch.randn_like(u)

    def gradients(y):
        return torch.autograd.grad((y * weight).sum(), list(mixer.parameters()))

    for cut, whole in zip(gradients(run_in_pieces(mixer, u, [5, 7])[0]), gradients(mixer(u)[0]), strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("n_sequences", [1, 2])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 8, 16, 50])
def test_mamba2_when_one_call_keeps_to_a_chunk_grid_then_bits_equal_those_of_calls_by_chunk(chunk_tokens, n_sequences):
    # An odd width: pieces inside the long input start at odd addresses, those of a stream do not.
    mixer = trained_looking_mixer(d_model=35, head_dim=7)
    u = torch.randn(n_sequences, 43, 35)

    with torch.no_grad():
        y, state = mixer(u, chunk_tokens=chunk_tokens)

        outputs, state_calls = [], None
        for piece in u.split(chunk_tokens, dim=1):
            y_piece, state_calls = mixer(piece.clone(memory_format=torch.contiguous_format), state_calls)
            outputs.append(y_piece)
    assert torch.equal(y, torch.cat(outputs, dim=1))
    assert_same_bits(state, state_calls)


def test_mamba2_when_two_sequences_interleave_then_each_goes_as_if_alone():
    mixer = trained_looking_mixer()
    first, second = torch.randn(2, 1, 18, D_MODEL)

    with torch.no_grad():
        states, outputs = [None, None], [[], []]
        for pieces in zip(first.split(6, dim=1), second.split(6, dim=1), strict=True):
            for i, piece in enumerate(pieces):
                y, states[i] = mixer(piece, states[i])
                outputs[i].append(y)

        for i, u in enumerate((first, second)):
            y_alone, state_alone = run_in_pieces(mixer, u, 6)
            assert torch.equal(torch.cat(outputs[i], dim=1), y_alone)
            assert_same_bits(states[i], state_alone)


def test_mamba2_when_called_then_the_given_state_is_left_as_it_was():
    mixer = trained_looking_mixer()
    _, state = mixer(torch.randn(2, 5, D_MODEL))
    before = Mamba2State(state.conv.clone(), state.ssm.clone())

    mixer(torch.randn(2, 9, D_MODEL), state)

    assert_same_bits(state, before)


def test_mamba2_when_the_model_is_bfloat16_then_the_state_is_float32_and_near_the_exact_one():
    mixer = trained_looking_mixer()
    u = torch.randn(2, 19, D_MODEL)
    y, state = mixer(u)

    y_half, state_half = mixer.bfloat16()(u.bfloat16())

    assert (y_half.dtype, state_half.conv.dtype, state_half.ssm.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    torch.testing.assert_close(y_half.float(), y, atol=3e-2, rtol=3e-2)
    assert_states_close(state_half, state, 3e-2)


def test_gated_rms_norm_when_there_are_groups_then_each_is_normed_by_itself():
    norm = GatedRMSNorm(8, n_groups=2, eps=0.0)
    x, z = torch.randn(2, 3, 8)

    y = norm(x, z)

    gated = x * z * torch.sigmoid(z)
    for half in (slice(0, 4), slice(4, 8)):
        expected = gated[:, half] / gated[:, half].square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(y[:, half], expected)


def test_mamba2_when_the_state_is_of_another_batch_then_it_raises():
    mixer = trained_looking_mixer()

    with pytest.raises(ValueError, match="conv has shape"):
        mixer(torch.randn(2, 4, D_MODEL), mixer.init_state(3))


@pytest.mark.parametrize("sizes", [{"head_dim": 7}, {"n_groups": 3}, {"d_conv": 1}], ids=str)
def test_mamba2_when_sizes_do_not_fit_then_it_raises(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        Mamba2(D_MODEL, **{**SIZES, **sizes})
