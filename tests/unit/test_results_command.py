"""`stormline results`: what it shows, of what, and how it says that there is nothing."""

import csv
import io
import json
import re
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from output_folder import StoppedError, StopsBeforeManifest
from typer.testing import CliRunner

from stormline.operators.errors import SettingsError, TableError
from stormline.operators.rows import Chunk, DeadLetter, Position, Result
from stormline.pipeline import file_times, table_reader
from stormline.pipeline.cli import app
from stormline.pipeline.commands.results import follow_rows, parse_since
from stormline.pipeline.compacted_files import read_table
from stormline.pipeline.compaction import Compaction, CompactionSpec
from stormline.pipeline.file_times import FileTimes
from stormline.pipeline.parquet_sink import EpochWriter
from stormline.pipeline.recovery import recover
from stormline.pipeline.table_reader import RowFilter, TableReader

NOON_NS = 1_769_860_800 * 10**9  # 2026-01-31T12:00:00Z
HOUR_NS = 3_600 * 10**9


def make_result(n, stream="gate-1", kind="caption", answer=None):
    start_ns = NOON_NS + n * HOUR_NS
    answer = answer or f"answer {n}"
    return Result(
        kind, kind, stream, "s", start_ns, start_ns + 4 * 10**9, "?", answer, kind == "alert", 16, "", 1, "m", 0
    )


def make_writer(root, cls=EpochWriter):
    return cls(recover(root, lanes=1, identity={}).for_lane(0, [("video", 0)]), model="m", identity={})


def commit(writer, *results, at=1, **rows):
    writer.commit(results=results, positions=[Position("video", 0, at)], snapshots={}, **rows)


def show(*arguments, expect=0):
    run = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["results", *map(str, arguments)])
    assert run.exit_code == expect, run.output
    return run


def answers(*arguments):
    return [json.loads(line)["answer"] for line in show(*arguments, "--format", "jsonl").stdout.splitlines()]


@pytest.fixture
def out(tmp_path):
    """Five epochs of one result an hour, the last one on the next day."""
    writer = make_writer(tmp_path)
    for n, (stream, kind) in enumerate(
        [("gate-1", "caption"), ("yard", "caption"), ("gate-2", "alert"), ("yard", "answer"), ("gate-1", "caption")]
    ):
        commit(writer, make_result(n * 4, stream, kind), at=n + 1)
    return tmp_path


def test_results_when_shown_then_the_newest_come_last(out):
    lines = show(out).stdout.splitlines()

    assert re.split(r"  +", lines[0].strip()) == ["start (UTC)", "length", "stream", "kind", "answer"]
    assert re.split(r"  +", lines[1].strip()) == ["2026-01-31 12:00:00", "4.0 s", "gate-1", "caption", "answer 0"]
    assert [line.split()[-1] for line in lines[1:]] == ["0", "4", "8", "12", "16"]


def test_results_when_filtered_then_only_matching_rows_are_shown(out):
    assert answers(out, "--kind", "alert") == ["answer 8"]
    assert answers(out, "--stream", "yard") == ["answer 4", "answer 12"]
    assert answers(out, "--stream", "gate-*", "--kind", "caption") == ["answer 0", "answer 16"]
    assert answers(out, "--since", "2026-01-31T20:00") == ["answer 8", "answer 12", "answer 16"]
    assert answers(out, "--since", "2026-02-01T02:00+02:00") == ["answer 12", "answer 16"]
    assert answers(out, "--limit", "2") == ["answer 12", "answer 16"]
    assert answers(out, "--limit", "2", "--stream", "g*") == ["answer 8", "answer 16"]
    assert answers(out, "--limit", "0") == []


def test_results_when_an_epoch_is_not_committed_then_its_rows_are_not_shown(out):
    with pytest.raises(StoppedError):
        commit(make_writer(out, StopsBeforeManifest), make_result(20), at=9)

    assert answers(out)[-1] == "answer 16"


def test_results_when_csv_then_programs_read_it_back(out):
    rows = list(csv.DictReader(io.StringIO(show(out, "--format", "csv").stdout)))

    assert len(rows) == 5
    assert rows[2]["kind"] == "alert"
    assert rows[2]["start_time"] == "2026-01-31T20:00:00+00:00"


def test_results_when_text_could_steer_the_terminal_then_it_cannot(tmp_path):
    commit(make_writer(tmp_path), make_result(0, answer="a\x1b[2Jcar\n [bold]goes[/] by"))

    shown = show(tmp_path).stdout

    assert "\x1b" not in shown
    assert "a�[2Jcar [bold]goes[/] by" in shown


def test_results_when_tokens_or_dead_letters_are_asked_for_then_those_are_shown(tmp_path):
    chunk = Chunk("yard", "s", 7, NOON_NS, NOON_NS + 10**9, 0, 4, 0.25, "video", 0, 3, 0, np.zeros((16, 8), np.float16))
    letter = DeadLetter("corrupt", "no keyframe", "gate", "s", 1, "video", 0, 42, NOON_NS, 5_000, b"x")
    commit(make_writer(tmp_path), chunks=[chunk], dead_letters=[letter])

    assert re.search(r"yard +7 +16 × 8 +0\.25 +video\[0\]@3", show(tmp_path, "--tokens").stdout)
    assert re.search(r"gate +video\[0\]@42 +corrupt +5,000 +no keyframe", show(tmp_path, "--dead-letters").stdout)
    letters = show(tmp_path, "--dead-letters", "--format", "jsonl").stdout
    assert json.loads(letters)["detail"] == "no keyframe"


@pytest.mark.parametrize(
    ("since", "until", "expected", "n_files"),
    [
        (None, None, [0, 4, 8, 12, 16], 5),
        (8, None, [8, 12, 16], 3),
        (None, 8, [0, 4], 2),
        (5, 12.5, [8, 12], 2),
        (17, None, [], 0),
    ],
)
def test_reader_when_it_knows_files_times_then_it_opens_those_that_a_stretch_of_time_is_in(
    out, monkeypatch, since, until, expected, n_files
):
    opened, asked, times = [], [], FileTimes()

    def read(rows, *args):
        opened.extend(rows)
        return read_table(rows, *args)

    def at(hours):
        return None if hours is None else datetime.fromtimestamp(NOON_NS / 1e9 + hours * 3600, timezone.utc)

    monkeypatch.setattr(table_reader, "read_table", read)
    read_span = file_times._read_span
    monkeypatch.setattr(file_times, "_read_span", lambda path: asked.append(path) or read_span(path))
    for _ in range(2):
        reader = TableReader(out, "results", RowFilter(since=at(since), until=at(until)), times=times)
        assert [row["answer"] for row in reader.newest(99)] == [f"answer {n}" for n in expected]

    assert len(opened) == 2 * n_files
    assert len(asked) == len(set(asked))  # once each


def test_follow_when_rows_are_committed_then_each_is_shown_once(out):
    writer = make_writer(out)
    reader = TableReader(out, "results", RowFilter(stream="gate-*"))
    shown = [row["answer"] for row in reader.newest(1)]
    waits = iter([[make_result(20)], [], [make_result(24), make_result(28, "yard")], [make_result(22)]])

    def commit_something(seconds):
        rows = next(waits, None)
        if rows is None:
            raise KeyboardInterrupt
        if rows:
            commit(writer, *rows, at=writer.next_epoch)

    follow_rows(reader, lambda rows: shown.extend(row["answer"] for row in rows), commit_something)

    assert shown == ["answer 16", "answer 20", "answer 24", "answer 22"]


def test_follow_when_old_checkpoints_were_pruned_between_then_no_row_is_missed(out):
    reader = TableReader(out, "results")
    reader.newest(0)
    writer = make_writer(out)
    for n in range(20, 26):
        commit(writer, make_result(n), at=n)

    assert [row["answer"] for row in reader.fresh()] == [f"answer {n}" for n in range(20, 26)]
    assert reader.fresh() == []


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:200], lambda data: b"\xff" * 400 + data[400:]])
@pytest.mark.parametrize("command", ["results", "search", "export"])
def test_command_when_a_file_is_damaged_then_the_error_names_it(out, tmp_path_factory, command, damage):
    path = sorted(out.glob("results/*/*.parquet"))[2]
    path.write_bytes(damage(path.read_bytes()))
    arguments = {"search": ["answer"], "export": [tmp_path_factory.mktemp("to") / "a.jsonl", "--to", "jsonl"]}

    run = CliRunner().invoke(app, [command, str(out), *map(str, arguments.get(command, []))])

    assert isinstance(run.exception, TableError)
    assert f"{path} is damaged" in str(run.exception)


def test_results_when_a_compacted_file_is_damaged_then_the_error_names_it(out):
    assert Compaction(out, CompactionSpec(min_age_s=0, min_files=2, grace_s=0)).run().dates
    (path,) = (path for path in out.glob("results/*/*.parquet") if path.name.startswith("epochs-"))
    path.write_bytes(path.read_bytes()[:-9])

    assert f"{path} is damaged" in str(show(out, expect=1).exception)
    with pytest.raises(TableError, match=path.name):
        list(TableReader(out, "results").batches())


def test_results_when_there_are_none_yet_then_it_says_so(tmp_path):
    commit(make_writer(tmp_path))

    run = show(tmp_path)

    assert run.stdout == ""
    assert f"no results in {tmp_path} yet" in run.stderr
    assert "everything could be used" in show(tmp_path, "--dead-letters").stderr
    assert "that match" in show(tmp_path, "--kind", "alert").stderr


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda p: p, (), "is no output folder of stormline: expected checkpoints/ in it, got nothing"),
        (lambda p: p / "missing", (), "no folder"),
        (lambda p: make_writer(p).root, ("--tokens", "--dead-letters"), "two tables"),
        (lambda p: make_writer(p).root, ("--tokens", "--kind", "alert"), "have no kind"),
        (lambda p: make_writer(p).root, ("--since", "yesterday"), "'yesterday' is no time"),
        (lambda p: make_writer(p).root, ("--since", "1066-10-14"), "expected a year from 1700 to 2199"),
        (lambda p: make_writer(p).root, ("--since", "9999999d"), "is before the calendar begins"),
    ],
)
def test_results_when_asked_for_the_impossible_then_the_error_says_what_to_give(tmp_path, make, arguments, message):
    run = show(make(tmp_path), *arguments, expect=1)

    assert isinstance(run.exception, SettingsError)
    assert message in str(run.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["results", "{out}", "--format", "jsonl"], "stormline: No space left on device"),
        (["archive", ".", "--out", "{out}/results.jsonl/x"], "/x/archive/work.jsonl: Not a directory"),
    ],
)
def test_command_when_a_file_or_its_output_cannot_be_written_then_one_line_says_so(out, arguments, said):
    (out / "results.jsonl").touch()
    command = [sys.executable, "-m", "stormline.pipeline", *(text.format(out=out) for text in arguments)]

    with open("/dev/full", "w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=out, check=False)

    assert run.returncode == 1
    assert said in run.stderr
    assert run.stderr.count("\n") == 1
    assert "Traceback" not in run.stderr


def test_since_when_relative_or_absolute_then_it_is_a_time_with_a_zone():
    now = datetime(2026, 1, 31, 12, tzinfo=timezone.utc)

    assert parse_since(None, now) is None
    assert parse_since("90s", now) == now - timedelta(seconds=90)
    assert parse_since("1.5h", now) == now - timedelta(minutes=90)
    assert parse_since("2026-01-31T12:00:00Z", now) == now
    assert parse_since("2026-01-31", now) == now - timedelta(hours=12)
    assert parse_since("2026-01-31T13:00+01:00", now) == now


@pytest.mark.parametrize("command", ["results", "search", "export"])
def test_kind_when_no_result_is_of_it_then_said_rather_than_nothing_found(out, tmp_path, command):
    arguments = {
        "results": [],
        "search": ["answer"],
        "export": [str(tmp_path.parent / f"{tmp_path.name}-x"), "--to", "srt"],
    }[command]

    run = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, str(out), *arguments, "--kind", "captions"])

    assert isinstance(run.exception, SettingsError) or run.exit_code != 0
    assert "expected caption or alert" in f"{run.output}{run.exception}"
