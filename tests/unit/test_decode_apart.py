"""Records that end the process that decodes them: decoded apart, and set aside after three deaths."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from small_media import make_meta, make_video

from stormline.operators.decode import REASONS, Decode
from stormline.operators.decode_apart import DecodeProcess, ProcessDiedError
from stormline.operators.in_hand import MarkFile, Suspect, read_mark, read_set_aside
from stormline.operators.rows import DeadLetter, DecodedSegment, Segment, block_of, rows_of

PLUGINS = Path(__file__).parents[1] / "plugins"
HW = (32, 40)
GOOD = make_meta()
BAD = make_meta(seq=2, offset=9, stream_id="kills-decoder")  # see tests/plugins
HANGS = make_meta(seq=2, offset=9, stream_id="hangs-decoder")


@pytest.fixture
def traps(monkeypatch):
    """Have further processes die of certain records."""
    monkeypatch.syspath_prepend(PLUGINS)


@pytest.fixture
def make_step():
    made = []

    def make(**changes):
        made.append(Decode(fps=Fraction(7, 2), frame_hw=HW, dead_letter_bytes=100, **changes))
        return made[-1]

    yield make
    for step in made:
        step.apart.close()


def suspect_of(meta, deaths=1, step="decode", **changes):
    return Suspect(meta.topic, meta.partition, meta.offset, meta.stream_id, step, deaths, **changes)


def untimed(table):
    """Return the rows without how long they took."""
    return block_of([replace(row, header={**row.header, "decode_s": 0.0}) for row in rows_of(table)])


def run(step, *segments):
    table = block_of([segment.to_row(i) for i, segment in enumerate(segments)])
    return [DecodedSegment.from_row(row) for row in rows_of(step(table))]


def marks_in(folder):
    return [read_mark(path) for path in folder.glob("*.json")]


def test_decode_when_a_suspect_is_innocent_then_comes_out_the_same_and_its_stream_stays_apart(make_step, tmp_path):
    earlier = DeadLetter.of(GOOD, "gap", "seq 0 is missing")
    segments = [
        Segment(GOOD, make_video(), (earlier,)),
        Segment(replace(GOOD, seq=1, offset=8), b"junk" * 50),
        Segment(replace(GOOD, seq=2, offset=9, end=True), b""),
    ]
    plain = make_step()

    step = make_step(suspects=[suspect_of(GOOD, 2)], marks=tmp_path)
    table = block_of([segment.to_row(i) for i, segment in enumerate(segments)])
    apart = step(table)

    assert untimed(apart).equals(untimed(plain(table)))
    assert step.apart.pid is not None
    assert plain.apart.pid is None
    assert [mark.in_hand for mark in marks_in(tmp_path)] == [None]
    assert list(tmp_path.glob("*.jsonl")) == []


def test_decode_when_a_suspect_kills_every_process_then_set_aside_with_its_bytes(traps, make_step, tmp_path):
    data = make_video()
    earlier = DeadLetter.of(BAD, "gap", "seq 1 is missing")
    step = make_step(suspects=[suspect_of(BAD)], marks=tmp_path)

    before, bad, after = run(
        step,
        Segment(replace(BAD, seq=1, offset=8), data),
        Segment(replace(BAD, n_bytes=len(data)), data, (earlier,)),
        Segment(replace(BAD, seq=3, offset=10), data),
    )

    assert bad.failed
    assert [d.reason for d in bad.dead_letters] == ["gap", "crashes"]
    letter = bad.dead_letters[1]
    assert letter.reason in REASONS
    assert (letter.topic, letter.partition, letter.offset, letter.n_bytes) == ("t", 0, 9, len(data))
    assert bytes(letter.data) == data[:100]
    assert "died 3 times, at last by SIGSEGV" in letter.detail
    assert before.n_frames == after.n_frames == 60
    (noted,) = [s for path in tmp_path.glob("*.jsonl") for s in read_set_aside(path)]
    assert noted == suspect_of(BAD, 3, cause="SIGSEGV")

    (again,) = run(make_step(suspects=[noted]), Segment(replace(BAD, n_bytes=len(data)), data, (earlier,)))
    assert again.dead_letters == bad.dead_letters  # the next life says the same, and touches it no more


def test_decode_when_a_suspect_hangs_then_its_process_ends_and_the_lane_restarts_until_it_is_set_aside(
    traps, make_step, tmp_path
):
    segment = Segment(HANGS, make_video())
    suspects = [suspect_of(HANGS, 1)]
    step = make_step(suspects=suspects, marks=tmp_path, limit_s=0.5)

    with pytest.raises(ProcessDiedError, match=r"no end after 0\.5 s") as error:
        run(step, segment)
    (mark,) = marks_in(tmp_path)
    (bad,) = run(make_step(suspects=[suspect_of(HANGS, 2)], limit_s=0.5), segment)

    assert error.value.hung
    assert (mark.in_hand.key, mark.in_hand.deaths) == (suspects[0].key, 1)  # that of this process makes it two
    assert [d.reason for d in bad.dead_letters] == ["crashes"]
    assert "no end after 0.5 s" in bad.dead_letters[0].detail


DECODE_HERE = """
import sys, time
from pathlib import Path
from small_media import make_meta, make_video
from stormline.operators.decode import Decode
from stormline.operators.rows import Segment, block_of
from stormline.operators.worker_limits import ended_after

step = Decode(fps=2, frame_hw=(32, 40), limit_s=0.5, marks=Path(sys.argv[1]))
hangs = Segment(make_meta(seq=2, offset=9, stream_id="hangs-decoder"), make_video())
with ended_after(0.5):
    pass
time.sleep(0.7)
print("what was in time goes on", flush=True)
step(block_of([hangs.to_row(0)]))
print("came back", flush=True)
"""


def test_decode_when_a_record_that_nobody_suspects_hangs_then_the_process_ends_and_its_mark_names_the_record(tmp_path):
    path = os.pathsep.join(str(folder) for folder in (PLUGINS, PLUGINS.parent))

    ended = subprocess.run(
        [sys.executable, "-c", DECODE_HERE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (ended.stdout, ended.returncode) == ("what was in time goes on\n", 1), ended.stderr
    assert "Timeout (0:00:00.500000)!" in ended.stderr
    assert "in hang" in ended.stderr
    (mark,) = marks_in(tmp_path)
    assert mark.in_hand == suspect_of(HANGS, 0)


def test_decode_when_the_encoder_died_of_a_record_then_it_is_set_aside_and_its_stream_decoded_here(make_step):
    poison = suspect_of(replace(GOOD, seq=1, offset=8), 3, step="encode")
    step = make_step(suspects=[poison, suspect_of(replace(GOOD, offset=10), 2, step="encode")])

    first, bad, after = run(step, *(Segment(replace(GOOD, seq=i, offset=7 + i), make_video()) for i in range(3)))

    assert [d.detail for d in bad.dead_letters] == [poison.detail]
    assert first.n_frames == after.n_frames == 60
    assert step.apart.pid is None


def test_decode_when_the_record_that_is_set_aside_showed_another_streams_silence_then_that_ends_without_a_row(
    make_step,
):
    poison = suspect_of(GOOD, 3, step="encode")
    end = replace(GOOD, stream_id="quiet", end=True, by_silence=True)

    quiet, bad = run(make_step(suspects=[poison]), Segment(end, b""), Segment(GOOD, make_video()))

    assert (quiet.meta, quiet.dead_letters) == (end, ())
    assert [d.reason for d in bad.dead_letters] == ["crashes"]


def test_decode_when_the_process_itself_runs_out_of_memory_then_its_mark_tells(make_step, tmp_path, monkeypatch):
    def no_memory(*args, **options):
        raise MemoryError

    monkeypatch.setattr("stormline.operators.decode.decode_segment", no_memory)

    with pytest.raises(MemoryError):
        run(make_step(marks=tmp_path), Segment(GOOD, make_video()))

    assert [mark.in_hand.key for mark in marks_in(tmp_path)] == [suspect_of(GOOD).key]


def test_decode_process_when_killed_between_two_blocks_then_says_so_and_starts_anew(make_step):
    process = make_step(suspects=[suspect_of(GOOD)]).apart
    block = block_of([Segment(GOOD, make_video()).to_row(0)])
    expected = process(block)

    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ProcessDiedError) as error:
        process(block)

    assert (error.value.cause, error.value.hung) == ("SIGKILL", False)
    assert process.pid is None
    assert untimed(process(block)).equals(untimed(expected))


def test_decode_process_when_closed_then_has_ended(make_step):
    process = DecodeProcess({"fps": "2", "frame_hw": HW, "limits": {}})
    process(block_of([Segment(GOOD, make_video()).to_row(0)]))

    assert process.close() == "exit status 0"
    assert process.close() == ""


def test_mark_file_when_two_workers_share_a_folder_then_each_has_its_own(tmp_path):
    for _ in range(2):
        MarkFile(tmp_path, "decode")

    assert len(list(tmp_path.iterdir())) == 2
