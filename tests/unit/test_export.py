"""What is exported is read back by those who read such things: parsers of subtitles, FFmpeg, `datasets`."""

import io
import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import PurePosixPath

import av
import pyarrow.parquet as pq
import pytest
import srt
import webvtt
from output_folder import Folder, caption, chunk, list_videos
from typer.testing import CliRunner

from stormline.operators.rows import DeadLetter
from stormline.pipeline import durable_files
from stormline.pipeline.archive.work_list import WorkItem, WorkList
from stormline.pipeline.cli import app
from stormline.pipeline.compaction import Compaction, CompactionSpec
from stormline.pipeline.export import row_files
from stormline.pipeline.export.file_names import file_names
from stormline.pipeline.export.subtitle_files import write_subtitles
from stormline.pipeline.export.subtitles import Cue, disjoint, srt_lines, vtt_lines
from stormline.pipeline.result_index import Wanted, open_result_index
from stormline.pipeline.table_reader import RowFilter, TableReader

NASTY = 'a --> b <i>& "c" {\\an8} &amp; \n\n 2\r\n00:00:01,000 --> 00:00:02,000\x00 ü漢 <v Bob>'


def export(*arguments, expect=0):
    run = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert run.exit_code == expect or expect is None, run.output
    return run


def ms(time):
    return round(time.total_seconds() * 1000)


def read_srt(path):
    return [(ms(c.start), ms(c.end), c.content) for c in srt.parse(path.read_text(), ignore_errors=False)]


def read_vtt(path):
    return [(c.start, c.end, c.text) for c in webvtt.read(str(path)).captions]


def read_with_ffmpeg(path):
    """Return (start in ms, ASS event) of each subtitle."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(container.streams.subtitles[0]) if packet.size]
        return [
            (round(packet.pts * packet.time_base * 1000), subtitle.ass)
            for packet in packets
            for subtitle in packet.decode()
        ]


def shown_at(cues, time_ms):
    return sorted(line for cue in cues if cue.start_ms <= time_ms < cue.end_ms for line in cue.lines)


@pytest.fixture
def archive(tmp_path):
    """Two videos: one with windows of 10 s, a question about each, one about all; one that says awkward things."""
    out = tmp_path / "out"
    out.mkdir()
    list_videos(out, "holiday/beach.mp4", "b.mkv", start_ns=1_000 * 10**9)
    folder = Folder(out, topic="archive")
    origin = {"session": "v1", "origin_s": 1000}
    asked = {"query": "red", "prompt": "Is it red?", **origin}
    folder.commit(
        caption("holiday/beach.mp4", 0, 10, "a boat", **origin),
        caption("holiday/beach.mp4", 0, 10, "no", **asked),
        caption("b.mkv", 0, 10, NASTY, **origin),
        caption("b.mkv", 10, 20, " \n\t\x07 ", **origin),
    )
    folder.commit(
        caption("holiday/beach.mp4", 10, 17.5, "a bird", **origin),
        caption("holiday/beach.mp4", 10, 17.5, "yes", **asked),
        caption("holiday/beach.mp4", 0, 17.5, "a day out", query="all", prompt="What is it?", **origin),
        dead_letters=[DeadLetter("not_media", "no", "x", "v1", 0, "archive", 0, 5, 0, 3, b"abc")],
    )
    return out


def test_subtitles_when_written_then_parsers_read_each_window_from_the_first_frame_on(archive, tmp_path):
    export(archive, tmp_path / "srt", "--to", "srt")
    export(archive, tmp_path / "vtt", "--to", "vtt")

    lines = [(0, 10_000, "a boat\nIs it red? no"), (10_000, 17_500, "a bird\nIs it red? yes")]
    assert read_srt(tmp_path / "srt" / "holiday" / "beach.srt") == lines
    vtt = tmp_path / "vtt" / "holiday" / "beach.vtt"
    assert read_vtt(vtt) == [
        ("00:00:00.000", "00:00:10.000", "a boat\nIs it red? no"),
        ("00:00:10.000", "00:00:17.500", "a bird\nIs it red? yes"),
    ]
    assert "NOTE What is it? a day out" in vtt.read_text()
    assert sorted(p.name for p in (tmp_path / "srt").rglob("*.*")) == ["b.srt", "beach.srt"]


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_subtitles_when_read_by_ffmpeg_then_times_and_texts_are_the_same(kind, archive, tmp_path):
    export(archive, tmp_path / "subs", "--to", kind)

    events = read_with_ffmpeg(tmp_path / "subs" / "holiday" / f"beach.{kind}")

    assert [start for start, _ in events] == [0, 10_000]
    assert b"a boat\\NIs it red? no" in events[0][1]


def test_subtitles_when_texts_are_awkward_then_one_cue_with_all_of_it(archive, tmp_path):
    export(archive, tmp_path / "subs", "--to", "srt")
    export(archive, tmp_path / "subs", "--to", "vtt")

    [(start, end, text)] = read_srt(tmp_path / "subs" / "b.srt")
    assert (start, end) == (0, 10_000)
    assert text == 'a --› b ‹i›& "c" { \\an8} &amp; 2 00:00:01,000 --› 00:00:02,000 ü漢 ‹v Bob›'
    [(_, _, text)] = read_vtt(tmp_path / "subs" / "b.vtt")
    assert (
        text == 'a --&gt; b &lt;i&gt;&amp; "c" {\\an8} &amp;amp; 2 00:00:01,000 --&gt; 00:00:02,000 ü漢 &lt;v Bob&gt;'
    )
    assert (tmp_path / "subs" / "b.vtt").read_text().count("-->") == 1
    [(_, event)] = read_with_ffmpeg(tmp_path / "subs" / "b.vtt")
    assert b"a --> b <i>&" in event


def test_subtitles_when_a_query_is_named_then_only_its_results_also_about_the_whole(archive, tmp_path):
    export(archive, tmp_path / "subs", "--to", "srt", "--query", "all")

    assert read_srt(tmp_path / "subs" / "holiday" / "beach.srt") == [(0, 17_500, "What is it? a day out")]
    assert not (tmp_path / "subs" / "b.srt").exists()


def test_subtitles_when_only_the_whole_video_is_described_then_that_is_shown(tmp_path):
    Folder(tmp_path / "out").commit(caption("a", 0, 30, "all of it", query="whole"))

    export(tmp_path / "out", tmp_path / "subs", "--to", "vtt")

    assert read_vtt(tmp_path / "subs" / "a.vtt") == [("00:00:00.000", "00:00:30.000", "all of it")]


def test_subtitles_when_a_live_query_came_late_then_times_are_from_the_first_chunk(tmp_path):
    folder = Folder(tmp_path / "out")
    start_s = 1_700_000_000
    folder.commit(chunks=[chunk("gate", i, start_s + 2 * i) for i in range(5)])
    folder.commit(caption("gate", 6, 8, "late", origin_s=start_s), caption("gate", 8, 10, "later", origin_s=start_s))

    export(tmp_path / "out", tmp_path / "subs", "--to", "srt")

    assert read_srt(tmp_path / "subs" / "gate.srt") == [(6_000, 8_000, "late"), (8_000, 10_000, "later")]


def test_subtitles_when_a_stream_has_sessions_then_a_file_for_each(tmp_path):
    folder = Folder(tmp_path / "out")
    folder.commit(
        *(caption("gate", 0, t, f"{s}{t}", session=s, origin_s=o) for s, o in (("x", 10), ("y", 90)) for t in (2, 4))
    )

    export(tmp_path / "out", tmp_path / "subs", "--to", "srt")

    assert read_srt(tmp_path / "subs" / "gate.x.srt") == [(0, 2_000, "x2")]
    assert read_srt(tmp_path / "subs" / "gate.y.srt") == [(0, 2_000, "y2")]


def test_disjoint_when_windows_overlap_then_each_moment_shows_the_same():
    cues = [Cue(0, 10, ("a",)), Cue(0, 4, ("b",)), Cue(2, 30, ("c",)), Cue(10, 12, ("d",)), Cue(40, 41, ("e",))]

    cut = list(disjoint(cues))

    assert all(before.end_ms <= after.start_ms for before, after in pairwise(cut))
    assert all(cue.start_ms < cue.end_ms and cue.lines for cue in cut)
    for time_ms in range(50):
        assert shown_at(cut, time_ms) == shown_at(cues, time_ms), time_ms


def test_subtitles_when_long_or_overlapping_then_both_formats_say_when(tmp_path):
    cues = [Cue(0, 400_000_000, ("long",)), Cue(359_999_999, 360_000_001, ("short",))]

    (tmp_path / "a.srt").write_text("".join(srt_lines(cues)))
    (tmp_path / "a.vtt").write_text("".join(vtt_lines(cues)))

    assert [(s, e) for s, e, _ in read_srt(tmp_path / "a.srt")] == [
        (0, 359_999_999), (359_999_999, 360_000_001), (360_000_001, 400_000_000)
    ]  # fmt: skip
    assert [(s, e) for s, e, _ in read_vtt(tmp_path / "a.vtt")] == [
        ("00:00:00.000", "111:06:40.000"), ("99:59:59.999", "100:00:00.001")
    ]  # fmt: skip


def test_subtitles_when_a_file_is_there_then_nothing_is_written_unless_told_to(archive, tmp_path):
    mine = tmp_path / "subs" / "holiday" / "beach.srt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")

    run = export(archive, tmp_path / "subs", "--to", "srt", expect=None)

    assert "beach.srt is there already" in str(run.exception)
    assert [p for p in (tmp_path / "subs").rglob("*") if p.is_file()] == [mine]
    assert mine.read_text() == "mine"
    export(archive, tmp_path / "subs", "--to", "srt", "--overwrite")
    assert len(read_srt(mine)) == 2


def test_subtitles_when_one_stream_is_exported_again_then_anothers_file_stays(tmp_path):
    out, subs = tmp_path / "out", tmp_path / "subs"
    list_videos(out, "a.mp4", "a.mkv")
    Folder(out, topic="archive").commit(
        caption("a.mp4", 0, 10, "of mp4", session="v1"), caption("a.mkv", 0, 10, "of mkv", session="v1")
    )
    export(out, subs, "--to", "srt")
    before = {path.name: path.read_text() for path in subs.iterdir()}

    for name in ("a.mkv", "a.mp4"):
        export(out, subs, "--to", "srt", "--stream", name, "--overwrite")

    assert {path.name: path.read_text() for path in subs.iterdir()} == before
    assert before.keys() == {"a.mp4.srt", "a.mkv.srt"}


def test_subtitles_when_live_streams_differ_in_case_then_each_keeps_its_file_whichever_is_wanted(tmp_path):
    out, subs = tmp_path / "out", tmp_path / "subs"
    Folder(out).commit(caption("Gate", 0, 10, "of Gate"), caption("gate", 0, 10, "of gate"))
    export(out, subs, "--to", "srt")
    before = {path.name: path.read_text() for path in subs.iterdir()}

    export(out, subs, "--to", "srt", "--stream", "gate", "--overwrite")

    assert {path.name: path.read_text() for path in subs.iterdir()} == before


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/b.mp4", "a/c.MKV", "d"], ["a/b.srt", "a/c.srt", "d.srt"]),
        (["a/b.mp4", "a/b.mkv", "a/b.txt"], ["a/b.mp4.srt", "a/b.mkv.srt", "a/b.txt.srt"]),
        (["../x", "/etc/passwd", "a//b", ".", ""], ["%2E%2E/x.srt", "etc/passwd.srt", "a/b.srt", "%2E.srt", "_.srt"]),
        (["rtsp://u:p@h/s?x=1", "a\n\0b"], ["rtsp:/u:p@h/s?x=1.srt", "a%0A%00b.srt"]),
    ],
)
def test_file_names_when_streams_are_called_anything_then_paths_stay_inside(names, expected):
    paths = file_names({name: name for name in names}, ".srt")

    assert [str(paths[name]) for name in names] == expected


def test_file_names_when_they_would_meet_then_each_has_its_own_and_can_be_made(tmp_path):
    names = ["A.mp4", "a.mp4", "a/b", "/a/b", "a", "a.srt/x", "é", "é", "x" * 900, "x" * 901, "ü/" * 40, "a/b.srt/c"]

    paths = file_names(dict(enumerate(names)), ".srt")

    for path in paths.values():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    assert len({str(path).casefold() for path in paths.values()}) == len(names)
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == len(names)
    assert max(len(os.fsencode(part)) for path in paths.values() for part in PurePosixPath(path).parts) < 255


def test_jsonl_when_exported_then_every_committed_row_once_also_after_a_compaction(archive, tmp_path):
    folder = Folder(archive, topic="archive")
    for i in range(3, 9):
        folder.commit(caption("c.mkv", i, i + 1, "later", session="v1"), next_offset=i)
    export(archive, tmp_path / "a.jsonl", "--to", "jsonl")
    assert Compaction(archive, CompactionSpec(min_age_s=0, min_files=2, grace_s=0)).run().dates
    run = export(archive, "-", "--to", "jsonl")

    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [json.loads(line) for line in run.stdout.splitlines()] == rows
    assert [row["answer"] for row in rows][:2] == ["a boat", "no"]
    assert len(rows) == 7 + 6
    assert rows[0]["start_time"] == "1970-01-01T00:16:40Z"
    assert rows[0].keys() == set(pq.read_schema(next(archive.glob("results/*/*.parquet"))).names)


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_jsonl_when_written_to_a_pipe_then_it_goes_through_and_the_pipe_stays(options, archive, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    export(archive, pipe, "--to", "jsonl", *options)

    assert pipe.is_fifo()
    with open(reader, encoding="utf-8") as lines:
        assert [json.loads(line)["answer"] for line in lines][:2] == ["a boat", "no"]


def test_jsonl_when_written_to_a_link_then_what_it_leads_to_is_replaced(archive, tmp_path):
    (tmp_path / "real.jsonl").write_text("before")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")

    export(archive, tmp_path / "link.jsonl", "--to", "jsonl", "--overwrite")

    assert (tmp_path / "link.jsonl").is_symlink()
    assert len((tmp_path / "real.jsonl").read_text().splitlines()) == 7


def test_batches_when_files_are_compacted_between_them_then_every_row_comes_once(tmp_path, monkeypatch):
    monkeypatch.setattr("stormline.pipeline.table_reader._EPOCHS_AT_ONCE", 3)
    folder = Folder(tmp_path)
    for i in range(20):
        folder.commit(caption("gate", i, i + 1, f"number {i}"))
    batches = TableReader(tmp_path, "results").batches()

    first = next(batches).to_pylist()
    assert Compaction(tmp_path, CompactionSpec(min_age_s=0, min_files=2, grace_s=0)).run().dates
    rest = [row for batch in batches for row in batch.to_pylist()]

    assert len(first) == 3
    assert [row["answer"] for row in first + rest] == [f"number {i}" for i in range(20)]


def test_batches_when_asked_for_columns_of_some_streams_then_no_more(tmp_path):
    folder = Folder(tmp_path)
    folder.commit(chunks=[chunk("gate", 0, 0), chunk("yard", 0, 0), chunk("gate", 1, 2)])

    batches = TableReader(tmp_path, "tokens", RowFilter(stream="ga*"), ["stream_id", "chunk_index", "tokens"]).batches()

    rows = [row for batch in batches for row in batch.to_pylist()]
    assert [(row["stream_id"], row["chunk_index"], len(row["tokens"])) for row in rows] == [
        ("gate", 0, 8),
        ("gate", 1, 8),
    ]


def test_dataset_when_exported_then_load_dataset_reads_each_of_its_tables(archive, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = Folder(archive, topic="archive")
    folder.commit(chunks=[chunk("b.mkv", i, 2 * i) for i in range(3)], next_offset=9)
    export(archive, tmp_path / "ds", "--to", "datasets", "--tokens")
    from datasets import load_dataset

    def load(name):
        return load_dataset(str(tmp_path / "ds"), name, cache_dir=str(tmp_path / "cache"), split="train")

    results, tokens = load("results"), load("tokens")
    assert results["answer"][:2] == ["a boat", "no"]
    assert (len(results), len(tokens)) == (7, 3)
    assert tokens.features["tokens"].feature.dtype == "float16"
    assert tokens.with_format("numpy")[0]["tokens"].reshape(2, 4)[1].tolist() == [4, 5, 6, 7]
    assert load("dead_letters")["reason"] == ["not_media"]
    assert load("videos")["stream_id"] == ["holiday/beach.mp4", "b.mkv"]


def test_dataset_when_exported_again_then_old_files_go_and_others_are_safe(archive, tmp_path):
    export(archive, tmp_path / "ds", "--to", "datasets", "--tokens")
    (tmp_path / "ds" / "results" / "part-00001.parquet").write_text("of a larger export")

    refused = export(archive, tmp_path / "ds", "--to", "datasets", expect=None)
    wrong = export(archive, tmp_path / "ds", "--to", "datasets", "--overwrite", "--kind", "captions", expect=None)
    before = (tmp_path / "ds" / "README.md").read_text()
    export(archive, tmp_path / "ds", "--to", "datasets", "--overwrite", "--stream", "b.mkv")

    assert "earlier export" in str(refused.exception)
    assert "no result is of kind" in str(wrong.exception)
    assert "config_name: results" in before
    assert [p.name for p in (tmp_path / "ds" / "results").iterdir()] == ["part-00000.parquet"]
    assert set(pq.read_table(tmp_path / "ds" / "results" / "part-00000.parquet")["stream_id"].to_pylist()) == {"b.mkv"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    refused = export(archive, tmp_path / "other", "--to", "datasets", "--overwrite", expect=None)
    assert "has other files in it" in str(refused.exception)


def test_dataset_when_an_export_was_ended_then_nobody_reads_half_and_another_one_repairs_it(
    archive, tmp_path, monkeypatch
):
    dataset = tmp_path / "ds"
    export(archive, dataset, "--to", "datasets", "--tokens")
    real = row_files._ParquetFiles._finish_file

    def ends(sink):
        if sink.n_rows and sink._folder.name == "dead_letters":
            raise OSError(28, "No space left on device")
        real(sink)

    monkeypatch.setattr(row_files._ParquetFiles, "_finish_file", ends)
    export(archive, dataset, "--to", "datasets", "--overwrite", "--stream", "b.mkv", expect=None)
    export(archive, dataset, "--to", "datasets", "--overwrite", expect=None)
    monkeypatch.undo()

    assert "config_name" not in (dataset / "README.md").read_text()
    assert "not finished" in (dataset / "README.md").read_text()
    refused = export(archive, dataset, "--to", "datasets", expect=None)
    assert "an unfinished export; --overwrite" in str(refused.exception)
    export(archive, dataset, "--to", "datasets", "--overwrite")
    assert sorted(str(path.relative_to(dataset)) for path in dataset.rglob("*") if path.is_file()) == [
        "README.md",
        "dead_letters/part-00000.parquet",
        "results/part-00000.parquet",
        "videos/part-00000.parquet",
    ]
    assert pq.read_table(dataset / "results" / "part-00000.parquet").num_rows == 7


@pytest.mark.parametrize(
    ("kind", "module", "left"),
    [
        ("srt", durable_files, []),
        ("vtt", durable_files, []),
        ("jsonl", durable_files, []),
        ("datasets", row_files, ["README.md"]),  # which says that the export is unfinished
    ],
)
def test_export_when_the_disk_is_full_then_no_draft_is_left(kind, module, left, archive, tmp_path, monkeypatch):
    real = durable_files.temporary_path

    def full(final):
        draft = real(final)
        draft.unlink(missing_ok=True)
        draft.symlink_to("/dev/full")
        return draft

    to = tmp_path / "to" / "part-00000.jsonl" if kind == "jsonl" else tmp_path / "to"
    with monkeypatch.context() as on_a_full_disk:
        on_a_full_disk.setattr(module, "temporary_path", full)
        run = export(archive, to, "--to", kind, expect=None)

    assert "No space left on device" in str(run.exception)
    assert [path.name for path in (tmp_path / "to").rglob("*") if not path.is_dir()] == left


def test_dataset_when_there_are_no_rows_then_its_columns_can_be_loaded_and_the_card_says_how(tmp_path):
    Folder(tmp_path / "out").commit(caption("gate", 0, 10, "a car"))
    export(tmp_path / "out", tmp_path / "ds", "--to", "datasets", "--tokens", "--stream", "yard")
    from datasets import load_dataset

    for name, column in (("results", "answer"), ("tokens", "tokens")):
        loaded = load_dataset(
            str(tmp_path / "ds"), name, cache_dir=str(tmp_path / "cache"), split="train", streaming=True
        )
        assert (list(loaded), column in loaded.features) == ([], True)
        assert pq.read_table(tmp_path / "ds" / name).num_rows == 0
    assert (tmp_path / "ds" / "README.md").read_text().count("There are none") == 2
    assert not (tmp_path / "ds" / "dead_letters").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{out}/results", "--to", "datasets"], "whose folders are read as tables"),
        (["x", "--to", "datasets", "--query", "a"], "--query is for subtitles"),
        (["x", "--to", "vtt", "--tokens"], "--tokens is for"),
        (["-", "--to", "vtt"], "give a folder"),
        (["{out}/..", "--to", "jsonl"], "is a folder"),
    ],
)
def test_export_when_asked_for_what_makes_no_sense_then_refused(options, message, archive):
    run = export(archive, *(option.format(out=archive) for option in options), expect=None)

    assert message in str(run.exception)


def test_write_jsonl_when_a_stream_is_named_then_no_other(archive):
    from stormline.pipeline.export.row_files import write_jsonl

    file = io.StringIO()

    assert write_jsonl(archive, file, RowFilter(stream="b.*")).n_rows == 2
    assert file.getvalue().count("\n") == 2


@pytest.mark.parametrize("stream", [None, "a/clip.mp4", "a/clip.mp4@2", "a/*"])
def test_subtitles_when_a_video_was_done_again_then_its_name_is_that_of_the_newest_version(stream, tmp_path):
    root = tmp_path / "out"
    folder = Folder(root)
    folder.commit(caption("a/clip.mp4", 0, 4, "what it showed before", session="v1"))
    folder.commit(caption("a/clip.mp4@2", 0, 4, "what it shows now", session="v2"))
    item = WorkItem(0, 0, "/videos/a/clip.mp4", "a/clip.mp4", "v1", 1, 10, 0, 0)
    WorkList(root).append([item, replace(item, number=1, stream_id="a/clip.mp4@2", session="v2", version=2)])

    with open_result_index(root) as index:
        write_subtitles(index, root, tmp_path / "subs", "srt", Wanted(stream, "caption"), overwrite=False)

    (path,) = (tmp_path / "subs").rglob("*.srt")
    assert path == tmp_path / "subs" / "a" / "clip.srt"
    assert "what it shows now" in path.read_text()
