import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from stormline.models.temporal import TemporalConfig, TemporalEncoder, TemporalState

ROWS, COLS = 3, 4
SMALL = TemporalConfig(
    d_model=24,
    d_temporal=16,
    n_layers=2,
    d_state=8,
    head_dim=8,
    bidirectional=True,
    scan_orders=("location", "sweep"),
    block_tokens=16,
)
ONE_WAY = replace(SMALL, bidirectional=False)
EQUAL_WIDTH = replace(SMALL, d_temporal=24)
# The default small model's sizes, which streams really run.
TYPICAL = TemporalConfig(d_model=192, d_temporal=128)


def trained_looking_encoder(config, seed=0):
    """Return an encoder whose last projections are no longer zero."""
    torch.manual_seed(seed)
    encoder = TemporalEncoder(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return encoder.eval().requires_grad_(False)


def clip(n_frames, n_streams=1, d_model=24, rows=ROWS, cols=COLS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_streams, n_frames, rows, cols, d_model, generator=generator)


def run_in_chunks(encoder, x, lengths, state=None):
    outputs = []
    for chunk in x.split(lengths, dim=1):
        y, state = encoder(chunk, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def same_bits(state: TemporalState, other: TemporalState) -> bool:
    ours, theirs = state.to_tensors(), other.to_tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def largest_difference(state: TemporalState, other: TemporalState) -> float:
    ours, theirs = state.to_tensors(), other.to_tensors()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.parametrize(
    "config", [SMALL, ONE_WAY, EQUAL_WIDTH, TYPICAL], ids=["two-way", "one-way", "equal", "typical"]
)
def test_temporal_encoder_when_fresh_then_it_changes_nothing(config):
    x = clip(5, n_streams=2, d_model=config.d_model)
    encoder = TemporalEncoder(config)

    y, state = encoder(x)

    assert torch.equal(y, x)
    assert any(tensor.any() for name, tensor in state.to_tensors().items() if name.endswith("ssm"))


@pytest.mark.parametrize("config", [SMALL, EQUAL_WIDTH], ids=["narrow", "equal-width"])
def test_temporal_encoder_when_fresh_then_its_last_projections_get_gradients(config):
    encoder = TemporalEncoder(config)

    encoder(clip(4))[0].square().sum().backward()

    for block in encoder.blocks:
        last = block.proj_out if block.proj_out is not None else block.forward_mixer.out_proj
        assert last.weight.grad.abs().max() > 0


def test_temporal_encoder_when_reset_then_it_changes_nothing_again():
    encoder = trained_looking_encoder(SMALL)
    x = clip(4)
    assert not torch.equal(encoder(x)[0], x)

    encoder.reset_parameters()

    assert torch.equal(encoder(x)[0], x)


@pytest.mark.parametrize("config", [SMALL, ONE_WAY, EQUAL_WIDTH], ids=["two-way", "one-way", "equal-width"])
@pytest.mark.parametrize("chunk_frames", [1, 3, 4, 20])
def test_temporal_encoder_when_a_clip_goes_in_one_call_then_bits_equal_those_of_the_stream(config, chunk_frames):
    encoder = trained_looking_encoder(config)
    x = clip(11, n_streams=2)

    y, state = encoder(x, chunk_frames=chunk_frames)

    y_stream, state_stream = run_in_chunks(encoder, x, chunk_frames)
    assert torch.equal(y, y_stream)
    assert same_bits(state, state_stream)


@pytest.mark.parametrize("lengths", [[1, 10], [4, 4, 3], [2, 8, 1], [1] * 11], ids=str)
def test_temporal_encoder_when_one_way_and_cut_anywhere_then_it_gives_what_one_call_gives(lengths):
    encoder = trained_looking_encoder(ONE_WAY).double()
    x = clip(11, n_streams=2).double()

    y_cut, state_cut = run_in_chunks(encoder, x, lengths)

    y, state = encoder(x)
    torch.testing.assert_close(y_cut, y, atol=1e-11, rtol=1e-11)
    assert largest_difference(state_cut, state) < 1e-11


def test_temporal_encoder_when_the_past_differs_then_so_do_later_chunks_and_never_earlier_ones():
    encoder = trained_looking_encoder(SMALL)
    x = clip(12)
    changed = x.clone()
    changed[:, 5, 1, 2] += 1.0

    y, _ = encoder(x, chunk_frames=4)
    y_changed, _ = encoder(changed, chunk_frames=4)

    assert torch.equal(y[:, :4], y_changed[:, :4])
    assert not torch.equal(y[:, 4], y_changed[:, 4])  # the backward scan looks ahead inside the chunk
    assert not torch.equal(y[:, 8:], y_changed[:, 8:])  # the state remembers


def test_temporal_encoder_when_one_way_then_a_frame_never_depends_on_a_later_one():
    encoder = trained_looking_encoder(ONE_WAY)
    x = clip(8)
    changed = x.clone()
    changed[:, 5] += 1.0

    y, y_changed = encoder(x)[0], encoder(changed)[0]

    assert torch.equal(y[:, :5], y_changed[:, :5])
    assert not torch.equal(y[:, 5:], y_changed[:, 5:])


@pytest.mark.parametrize(("order", "reaches_others"), [("location", False), ("sweep", True)])
def test_temporal_encoder_when_one_place_changes_then_only_a_sweep_carries_it_to_others(order, reaches_others):
    encoder = trained_looking_encoder(replace(SMALL, n_layers=1, scan_orders=(order,)))
    x = clip(4)
    changed = x.clone()
    changed[:, 1, 1, 2] += 1.0

    differs = (encoder(x)[0] != encoder(changed)[0]).any(-1)[0]  # (T, rows, cols)

    assert differs[:, 1, 2].all()  # over time, forward and backward
    differs[:, 1, 2] = False
    assert bool(differs.any()) == reaches_others


def test_temporal_encoder_when_two_streams_interleave_then_each_goes_as_if_alone():
    encoder = trained_looking_encoder(SMALL)
    streams = [clip(12, seed=1), clip(12, seed=2)]

    states, outputs = [None, None], [[], []]
    for chunks in zip(*(x.split(4, dim=1) for x in streams), strict=True):
        for i, chunk in enumerate(chunks):
            y, states[i] = encoder(chunk, states[i])
            outputs[i].append(y)

    for i, x in enumerate(streams):
        y_alone, state_alone = run_in_chunks(encoder, x, 4)
        assert torch.equal(torch.cat(outputs[i], dim=1), y_alone)
        assert same_bits(states[i], state_alone)


@pytest.mark.parametrize("order", ["location", "sweep"])
@pytest.mark.parametrize("n_streams", [2, 8])
def test_temporal_encoder_when_streams_share_a_batch_then_each_agrees_with_itself_alone(n_streams, order):
    # At these widths the bits were the same too, on an AVX-512 machine; at widths that are no multiple of 16 they
    # were not (2e-7). Which of the two holds is up to the matrix library, so only the rounding is promised.
    encoder = trained_looking_encoder(replace(TYPICAL, scan_orders=(order,)))
    streams = [clip(8, d_model=192, rows=8, cols=8, seed=i) for i in range(n_streams)]

    y, state = run_in_chunks(encoder, torch.cat(streams), 4)

    for i, (x, own_state) in enumerate(zip(streams, state.unstack(), strict=True)):
        y_alone, state_alone = run_in_chunks(encoder, x, 4)
        torch.testing.assert_close(y[i : i + 1], y_alone, atol=1e-5, rtol=1e-5)
        assert largest_difference(own_state, state_alone) < 1e-5


def test_temporal_state_when_streams_join_and_part_then_each_keeps_its_own():
    encoder = trained_looking_encoder(SMALL)
    alone = [run_in_chunks(encoder, clip(4 * (i + 1), seed=i), 4)[1] for i in range(3)]

    parted = TemporalState.stack([TemporalState.stack(alone[:2]), alone[2]]).unstack()

    assert [state.n_streams for state in parted] == [1, 1, 1]
    assert all(same_bits(a, b) for a, b in zip(parted, alone, strict=True))
    sizes = {block.ssm.untyped_storage().nbytes() for state in parted for block in state.blocks}
    assert sizes == {block.ssm.nbytes for block in alone[0].blocks}  # no view of the joined batch


@pytest.mark.parametrize("config", [SMALL, ONE_WAY], ids=["two-way", "one-way"])
def test_temporal_state_when_restored_from_a_snapshot_then_the_stream_goes_on_as_if_never_stopped(config):
    encoder = trained_looking_encoder(config)
    x = clip(12, n_streams=2)
    whole, final = run_in_chunks(encoder, x, 4)
    _, state = run_in_chunks(encoder, x[:, :8], 4)

    snapshot = safetensors.torch.save(state.to_tensors())
    restored = TemporalState.from_tensors(safetensors.torch.load(snapshot))
    tail, state_after = encoder(x[:, 8:], restored)

    assert same_bits(restored, state)
    assert torch.equal(tail, whole[:, 8:])
    assert same_bits(state_after, final)


def test_temporal_state_when_the_stream_goes_on_then_an_old_state_stays_a_valid_snapshot():
    encoder = trained_looking_encoder(SMALL)
    _, state = encoder(clip(4))
    before = {name: tensor.clone() for name, tensor in state.to_tensors().items()}

    encoder(clip(4, seed=1), state)

    assert all(torch.equal(tensor, before[name]) for name, tensor in state.to_tensors().items())


def test_temporal_state_when_the_stream_grows_then_its_size_does_not():
    encoder = trained_looking_encoder(SMALL)
    start = encoder.init_state(2, ROWS, COLS)

    _, later = run_in_chunks(encoder, clip(40, n_streams=2), 4)

    # conv: 3 inputs of 32 + 2·8 channels; ssm: 32 channels of 8; one location block and one sweep block, two streams
    assert start.n_bytes == later.n_bytes == 4 * (3 * 48 + 32 * 8) * 2 * (ROWS * COLS + 1)


def test_temporal_state_when_the_snapshot_is_of_another_version_then_it_raises():
    tensors = TemporalEncoder(SMALL).init_state(1, ROWS, COLS).to_tensors()
    other = {name.replace(".v1.", ".v0."): tensor for name, tensor in tensors.items()}
    incomplete = {name: tensor for name, tensor in tensors.items() if name != "temporal.v1.block1.ssm"}

    for damaged in (other, incomplete, {}):
        with pytest.raises(ValueError, match="another version or is damaged"):
            TemporalState.from_tensors(damaged)


def test_temporal_state_when_stacked_with_another_frame_size_then_it_raises():
    encoder = TemporalEncoder(SMALL)

    with pytest.raises(ValueError, match="state 1 is"):
        TemporalState.stack([encoder.init_state(1, 3, 4), encoder.init_state(1, 4, 3)])
    with pytest.raises(ValueError, match="no states"):
        TemporalState.stack([])


def test_temporal_encoder_when_input_or_state_does_not_fit_then_it_raises():
    encoder = TemporalEncoder(SMALL)

    with pytest.raises(ValueError, match="x has shape"):
        encoder(torch.zeros(1, 4, ROWS, COLS, 23))
    with pytest.raises(ValueError, match="the state is for"):
        encoder(clip(4), encoder.init_state(2, ROWS, COLS))
    with pytest.raises(ValueError, match="chunk_frames is 0"):
        encoder(clip(4), chunk_frames=0)


def test_temporal_config_when_sent_through_json_then_it_is_the_same():
    assert TemporalConfig.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layers": 3}, "one per layer"),
        ({"scan_orders": ["location", "spiral"]}, "spiral"),
        ({"d_state": 0}, "d_state is 0"),
        ({"layers": 2}, "unknown keys"),
    ],
    ids=str,
)
def test_temporal_config_when_a_value_is_impossible_then_it_raises(values, message):
    with pytest.raises(ValueError, match=message):
        TemporalConfig.from_dict({**SMALL.to_dict(), **values})
