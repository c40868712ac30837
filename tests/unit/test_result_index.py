"""The index over results: never behind, nothing twice, whoever else uses it; and what a search finds."""

import json
import multiprocessing
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
from output_folder import Folder, caption, list_videos
from typer.testing import CliRunner

from stormline.operators.errors import SettingsError, StormlineError
from stormline.pipeline import result_index
from stormline.pipeline.cli import app
from stormline.pipeline.compaction import Compaction, CompactionSpec
from stormline.pipeline.parquet_sink import find_data_files
from stormline.pipeline.result_index import Session, Wanted, match_expression, open_result_index
from stormline.pipeline.table_reader import TableReader


def everything(root):
    with open_result_index(root) as index:
        return [(r.stream_id, r.start_us // 10**6, r.answer) for s in index.sessions() for r in index.results(s)]


def found(root, text, **wanted):
    with open_result_index(root) as index:
        return [hit.result.answer for hit in index.search(text, Wanted(**wanted))]


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path)
    folder.commit(
        caption("gate", 0, 10, "a red car turns left"),
        caption("gate", 10, 20, "a blue car waits"),
        caption("yard", 0, 10, "a dog turns around; a red ball rolls"),
        caption("yard", 10, 20, "nothing happens"),
    )
    return folder


def test_search_when_several_fit_then_the_best_comes_first_in_any_form_of_a_word(folder):
    assert found(folder.root, "a red car turns")[0] == "a red car turns left"
    assert found(folder.root, "turning")[:2] == found(folder.root, "turn")[:2]
    assert found(folder.root, "Waiting") == ["a blue car waits"]
    assert found(folder.root, '"red ball"') == ["a dog turns around; a red ball rolls"]
    assert found(folder.root, "noth*") == ["nothing happens"]
    assert found(folder.root, "zebra") == []


def test_search_when_a_word_is_cut_short_then_found_as_far_as_its_ending(folder):
    assert len(found(folder.root, "tur*")) == len(found(folder.root, "turn*")) == 2
    assert found(folder.root, "turni*") == []


def test_search_when_asked_of_some_streams_then_of_no_others(folder):
    assert found(folder.root, "red", stream="ya*") == ["a dog turns around; a red ball rolls"]
    assert found(folder.root, "red", stream="[gate]") == []
    assert found(folder.root, "red", kind="alert") == []
    assert found(folder.root, "red", query_ids=["caption"], stream="gate") == ["a red car turns left"]


@pytest.mark.parametrize(
    "text", ['"', '"""', "NEAR(red", "answer:red", "* - + ^ ( )", "red AND", "a'); DROP TABLE results;--", ""]
)
def test_search_when_the_text_looks_like_an_operator_then_it_is_words(text, folder):
    found(folder.root, text)

    assert len(everything(folder.root)) == 4


def test_match_expression_when_nothing_is_a_word_then_empty():
    assert match_expression('!!! "..." *') == ""


def test_index_when_more_is_committed_then_only_that_is_read(folder, monkeypatch):
    assert len(everything(folder.root)) == 4
    folder.commit(caption("gate", 20, 30, "a cat sits"))
    for file in find_data_files(folder.root, ["results"]):
        if file.epoch == 1:
            file.path.unlink()  # it is not needed any more

    assert found(folder.root, "cat") == ["a cat sits"]
    assert len(everything(folder.root)) == 5


def test_index_when_rows_are_not_committed_then_they_are_not_found(folder):
    class StoppedError(Exception):
        pass

    def stop(number):
        if number == 3:
            raise StoppedError

    folder._writer.step_done = stop
    with pytest.raises(StoppedError):
        folder.commit(caption("gate", 20, 30, "a cat sits"))
    assert found(folder.root, "cat") == []

    folder.restart()
    folder.commit(caption("gate", 20, 30, "a cat sits"))

    assert found(folder.root, "cat") == ["a cat sits"]


def test_index_when_pages_are_small_then_all_is_there_in_order(folder, monkeypatch):
    monkeypatch.setattr(result_index, "ROWS_AT_ONCE", 3)
    folder.commit(*(caption("gate", 20 + i, 21 + i, f"number {i}") for i in range(20)))

    rows = everything(folder.root)

    assert [row for row in rows if row[0] == "gate"][2:] == [("gate", 20 + i, f"number {i}") for i in range(20)]
    assert len(rows) == len(set(rows)) == 24


def test_index_when_a_page_fails_then_the_next_reading_goes_on_there(folder, monkeypatch):
    monkeypatch.setattr(result_index, "ROWS_AT_ONCE", 2)
    folder.commit(*(caption("gate", 20 + i, 21 + i, f"number {i}") for i in range(9)))
    real, calls = result_index._Refresh._row, []

    def dies(refresh, event):
        calls.append(event)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(refresh, event)

    monkeypatch.setattr(result_index._Refresh, "_row", dies)
    with pytest.raises(KeyboardInterrupt):
        everything(folder.root)
    rows = everything(folder.root)

    assert len(rows) == len(set(rows)) == 13
    assert len(calls) == 6 + 13 - 4  # two pages of two were kept


def test_index_when_the_folder_is_compacted_then_nothing_changes(folder):
    for i in range(9):
        folder.commit(caption("gate", 20 + i, 21 + i, f"number {i}"))
    before = everything(folder.root)
    (folder.root / "search" / "results.sqlite").unlink()
    report = Compaction(folder.root, CompactionSpec(min_age_s=0, min_files=2, grace_s=0)).run()

    assert report.dates
    assert everything(folder.root) == before


@pytest.mark.parametrize("damage", [b"no database at all" * 100, b""])
def test_index_when_its_file_is_damaged_then_it_is_made_anew(damage, folder):
    before = everything(folder.root)
    (folder.root / "search" / "results.sqlite").write_bytes(damage)

    assert everything(folder.root) == before


@pytest.mark.parametrize(
    "damage", ["UPDATE place SET cursor = 'no cursor'", "UPDATE place SET cursor = x'00ff'", "DELETE FROM place"]
)
def test_index_when_the_place_in_it_cannot_be_read_then_it_is_made_anew(damage, folder):
    before = everything(folder.root)
    with sqlite3.connect(folder.root / "search" / "results.sqlite") as other:
        other.execute(damage)

    assert everything(folder.root) == before
    assert found(folder.root, "dog") == ["a dog turns around; a red ball rolls"]


def test_index_when_it_proves_damaged_as_it_is_read_then_told_once_and_made_anew(folder):
    before = everything(folder.root)
    path = folder.root / "search" / "results.sqlite"
    with sqlite3.connect(path) as other:
        (page,) = other.execute("SELECT rootpage FROM sqlite_master WHERE name = 'results'").fetchone()
        (page_bytes,) = other.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * page_bytes)
        file.write(b"\xff" * page_bytes)

    with pytest.raises(StormlineError, match=r"results.sqlite was damaged .* Give the command again"):
        found(folder.root, "dog")

    assert found(folder.root, "dog") == ["a dog turns around; a red ball rolls"]
    assert everything(folder.root) == before


def test_index_when_another_process_holds_it_as_it_is_read_then_it_stays(folder):
    path = folder.root / "search" / "results.sqlite"

    def search_beside_another():
        with open_result_index(folder.root) as index, sqlite3.connect(path) as other:
            index._connection.execute("PRAGMA busy_timeout = 0")
            other.execute("BEGIN EXCLUSIVE")
            index.search("dog")

    with pytest.raises(sqlite3.OperationalError, match="locked"):
        search_beside_another()

    assert path.exists()
    assert found(folder.root, "dog") == ["a dog turns around; a red ball rolls"]


def test_index_when_another_version_made_it_then_it_is_made_anew(folder):
    before = everything(folder.root)
    with sqlite3.connect(folder.root / "search" / "results.sqlite") as other:
        other.execute("DROP TABLE queries")
        other.execute("PRAGMA user_version = 999")

    assert everything(folder.root) == before
    assert found(folder.root, "dog") == ["a dog turns around; a red ball rolls"]


def test_index_when_the_tables_are_behind_it_then_it_is_made_anew(folder, tmp_path_factory):
    folder.commit(caption("gate", 20, 30, "a cat sits"))
    everything(folder.root)
    other = Folder(tmp_path_factory.mktemp("other"))
    other.commit(caption("gate", 0, 10, "a bird sings"))
    (other.root / "search").mkdir()
    (folder.root / "search" / "results.sqlite").rename(other.root / "search" / "results.sqlite")

    assert everything(other.root) == [("gate", 0, "a bird sings")]
    assert found(other.root, "cat") == []


def test_index_when_it_cannot_be_written_beside_the_tables_then_a_temporary_one_is(folder):
    (folder.root / "search").write_text("in the way")

    assert len(everything(folder.root)) == 4
    assert (folder.root / "search").read_text() == "in the way"


def test_index_when_used_then_no_table_and_no_recovery_sees_it(folder):
    everything(folder.root)
    folder.restart()

    assert (folder.root / "search" / "results.sqlite").exists()
    assert len(TableReader(folder.root, "results").newest(99)) == 4


def count(root):
    return len(everything(root))


def test_index_when_processes_and_threads_make_it_at_once_then_each_sees_all_once(folder, monkeypatch):
    monkeypatch.setattr(result_index, "ROWS_AT_ONCE", 7)  # in the children, too, which are forked
    for epoch in range(12):
        folder.commit(*(caption(f"s{epoch}", i, i + 1, f"number {i}") for i in range(40)))

    with multiprocessing.get_context("fork").Pool(3) as pool, ThreadPoolExecutor(2) as threads:
        children = [pool.apply_async(count, (folder.root,)) for _ in range(6)]
        mine = [threads.submit(count, folder.root) for _ in range(4)]
        counts = [child.get(timeout=60) for child in children] + [thread.result(timeout=60) for thread in mine]

    assert counts == [484] * 10


def test_index_when_sessions_are_asked_for_then_sorted_with_their_extent(folder):
    folder.commit(caption("gate", 0, 10, "again", session="t"))

    with open_result_index(folder.root) as index:
        assert index.sessions() == [Session("gate", "s"), Session("gate", "t"), Session("yard", "s")]
        assert index.extent_us(Session("yard", "s")) == (0, 20 * 10**6)


def test_search_command_when_an_archive_then_times_are_places_in_the_video(tmp_path):
    list_videos(tmp_path, "holiday/beach.mp4", start_ns=10**12)
    folder = Folder(tmp_path, topic="archive")
    folder.commit(
        caption("holiday/beach.mp4", 70, 80, "a red\x1b[2J car", session="v1", origin_s=1000),
        caption("holiday/beach.mp4", 80, 90, "yes", session="v1", origin_s=1000, query="q", prompt="Is it red?"),
    )

    lines = CliRunner().invoke(app, ["search", str(tmp_path), "car"])
    rows = CliRunner().invoke(app, ["search", str(tmp_path), "car yes", "--json"])

    assert lines.exit_code == 0, lines.output
    assert "holiday/beach.mp4  0:01:10–0:01:20  a red[2J car" in lines.stdout
    told = {row["answer"]: row for row in map(json.loads, rows.stdout.splitlines())}
    assert (told["yes"]["start_s"], told["yes"]["end_s"], told["yes"]["prompt"]) == (80, 90, "Is it red?")
    assert told["yes"]["start_time"] == "1970-01-01T00:18:00.000Z"


def test_search_command_when_nothing_fits_then_it_says_so(folder):
    run = CliRunner().invoke(app, ["search", str(folder.root), "zebra"])

    assert (run.exit_code, run.stdout) == (0, "")
    assert "says nothing like 'zebra'" in run.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["search", "{out}", "car", "--stream", "\udcff"],
        ["search", "{out}", "car", "--query", "\udcff"],
        ["search", "{out}", "car\udcff"],
        ["export", "{out}", "{out}-subs", "--to", "srt", "--query", "\udcff"],
    ],
)
def test_command_when_a_name_is_no_text_then_refused(arguments, folder):
    run = CliRunner().invoke(app, [argument.format(out=folder.root) for argument in arguments])

    assert isinstance(run.exception, SettingsError)
    assert "is no text" in str(run.exception)


def test_search_command_when_more_are_wanted_than_can_be_then_refused(folder):
    run = CliRunner().invoke(app, ["search", str(folder.root), "car", "--limit", str(10**20)])

    assert run.exit_code == 2
    assert "less than or equal to 1000000" in " ".join(run.output.split())


def test_search_when_the_folder_is_none_of_ours_then_refused(tmp_path):
    with pytest.raises(SettingsError, match="no output folder"), open_result_index(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
