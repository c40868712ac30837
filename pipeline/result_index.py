"""The committed results of an output folder in one SQLite file: in order of stream and time, and by their words.

    OUT/search/results.sqlite    a copy of what the tables hold; it may be deleted at any time, and is made anew

Whoever needs it first takes in what was committed since the last time: each page of rows in one transaction with the
place reached in the tables, so that none is missed or doubled, however many processes do so at once and wherever one
of them is killed. Where the folder cannot be written to, the copy is a temporary one.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ..operators.errors import StormlineError
from .durations import moment_ns
from .result_tail import Cursor, ResultEvent, ResultTail, newest_cursor
from .table_reader import check_kind, check_output_folder, check_text

logger = logging.getLogger(__name__)

FOLDER = "search"
FILE_NAME = "results.sqlite"
VERSION = 1  # raise it with every change of `_TABLES`; another version's file is made anew
WAIT_S = 120.0  # for another process that takes in a page
ROWS_AT_ONCE = 2_000  # of one transaction, or of one reading

_TABLES = """
CREATE TABLE streams (id INTEGER PRIMARY KEY, stream_id TEXT, session TEXT, UNIQUE (stream_id, session));
CREATE TABLE queries (id INTEGER PRIMARY KEY, query_id TEXT, kind TEXT, prompt TEXT, UNIQUE (query_id, kind, prompt));
CREATE TABLE results (
    id INTEGER PRIMARY KEY, stream INTEGER, start_us INTEGER, end_us INTEGER, query INTEGER, answer TEXT, alert INTEGER,
    UNIQUE (stream, start_us, end_us, query)
);
CREATE TABLE place (cursor TEXT);
INSERT INTO place VALUES ('');
CREATE VIRTUAL TABLE words USING fts5(
    answer, content = 'results', content_rowid = 'id', tokenize = 'porter unicode61 remove_diacritics 2'
);
CREATE TRIGGER added AFTER INSERT ON results BEGIN
    INSERT INTO words (rowid, answer) VALUES (new.id, new.answer);
END;
CREATE TRIGGER changed AFTER UPDATE ON results BEGIN
    INSERT INTO words (words, rowid, answer) VALUES ('delete', old.id, old.answer);
    INSERT INTO words (rowid, answer) VALUES (new.id, new.answer);
END;
"""
# A row that is seen again, as after a damaged checkpoint, takes the place of itself.
_ADD = """
INSERT INTO results (stream, start_us, end_us, query, answer, alert) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET answer = excluded.answer, alert = excluded.alert
"""
_COLUMNS = "s.stream_id, s.session, r.start_us, r.end_us, q.query_id, q.kind, q.prompt, r.answer, r.alert"
_JOINED = "JOIN streams s ON s.id = r.stream JOIN queries q ON q.id = r.query"


class Session(NamedTuple):
    """One session of one stream: of an archive, one version of one video."""

    stream_id: str
    session: str


@dataclass(frozen=True)
class IndexedResult:
    """One row of the results table."""

    stream_id: str
    session: str
    start_us: int  # since 1970, UTC
    end_us: int
    query_id: str
    kind: str
    prompt: str
    answer: str
    alert: bool


class Hit(NamedTuple):
    """What a search found."""

    score: float  # BM25; larger is better, and only comparable within one search
    result: IndexedResult


@dataclass(frozen=True)
class Wanted:
    """Which results; all that are given must hold.

    Raises:
        SettingsError: If no result is of this kind, or a name is no text.
    """

    stream: str | None = None  # a name, or a pattern with * ? [ ]
    kind: str | None = None
    query_ids: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_kind(self.kind)
        for name in (self.stream, *self.query_ids):
            check_text(name or "")


@contextmanager
def open_result_index(root: Path) -> Iterator[ResultIndex]:
    """Open the index of an output folder, up to date with what is committed.

    Raises:
        SettingsError: If stormline has not written to the folder.
        StormlineError: If this Python's SQLite has no full-text search; or, from within the block, if the file proves
            damaged as it is read. Then it is deleted, for the next one to make anew.
    """
    check_output_folder(root)
    with ExitStack() as stack:
        path = root / FOLDER / FILE_NAME
        try:
            path.parent.mkdir(exist_ok=True)
            connection = _open(path, root)
        except (OSError, sqlite3.OperationalError) as error:
            logger.info("no index beside the tables, a temporary one: path=%s error=%s", path, error)
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stormline-search-"))) / FILE_NAME
            connection = _open(path, root)
        stack.callback(connection.close)
        try:
            yield ResultIndex(connection)
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # its kinds tell of locks, of what is asked, of a full disk…
                raise
            _delete(path)
            raise StormlineError(
                f"the index {path} was damaged ({error}) and is deleted; the tables, which it is made from, are not "
                "concerned. Give the command again: it makes the index anew."
            ) from error


class ResultIndex:
    """Reads an index; see `open_result_index`.

    Args:
        connection: To its file.
    """

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def sessions(self) -> list[Session]:
        """Return the sessions that have results, sorted."""
        rows = self._connection.execute("SELECT stream_id, session FROM streams ORDER BY stream_id, session")
        return [Session(*row) for row in rows]

    def extent_us(self, session: Session) -> tuple[int, int]:
        """Return when a session's first window begins and its last one ends.

        Raises:
            KeyError: If it has no results.
        """
        of_stream = "FROM results WHERE stream = (SELECT id FROM streams WHERE (stream_id, session) = (?, ?))"
        first, last = self._connection.execute(f"SELECT min(start_us), max(end_us) {of_stream}", session).fetchone()
        if first is None:
            raise KeyError(session)
        return first, last

    def results(self, session: Session, wanted: Wanted = Wanted()) -> Iterator[IndexedResult]:
        """Yield a session's results by start, then end; no lock is held between two pages of them.

        Args:
            session: Which.
            wanted: Leaves others out; its `stream` means nothing here.
        """
        conditions, values = _conditions(wanted)
        text = (
            f"SELECT {_COLUMNS}, r.stream, r.query FROM results r {_JOINED} WHERE r.stream = "
            "(SELECT id FROM streams WHERE (stream_id, session) = (?, ?)) "
            f"AND (r.start_us, r.end_us, r.query) > (?, ?, ?){conditions} "
            f"ORDER BY r.start_us, r.end_us, r.query LIMIT {ROWS_AT_ONCE}"
        )
        after = (-(2**62), 0, 0)
        while page := self._connection.execute(text, (*session, *after, *values)).fetchall():
            yield from (_result(row[:-2]) for row in page)
            after = page[-1][2], page[-1][3], page[-1][-1]

    def search(self, text: str, wanted: Wanted = Wanted(), limit: int = 20) -> list[Hit]:
        """Return the windows whose text fits best, the best first.

        Args:
            text: Words, of which a text should have many and rare ones; "words in quotes" stand beside each other,
                and ``word*`` is how a word begins, up to its ending, which the index leaves out.
            wanted: Leaves others out.
            limit: At most so many.

        Raises:
            SettingsError: If it is no text.
        """
        check_text(text)
        match = match_expression(text)
        if not match:
            return []
        conditions, values = _conditions(wanted)
        if wanted.stream is not None:
            self._connection.create_function("fits", 2, lambda name, pattern: fnmatchcase(name, pattern))
            conditions += " AND r.stream IN (SELECT id FROM streams WHERE fits(stream_id, ?))"
            values = (*values, wanted.stream)
        rows = self._connection.execute(
            f"SELECT {_COLUMNS}, -bm25(words) AS score FROM words JOIN results r ON r.id = words.rowid {_JOINED} "
            f"WHERE words MATCH ?{conditions} "
            "ORDER BY score DESC, s.stream_id, s.session, r.start_us, r.end_us, q.query_id LIMIT ?",
            (match, *values, limit),
        )
        return [Hit(row[-1], _result(row[:-1])) for row in rows]


def match_expression(text: str) -> str:
    """Return a text as FTS5 wants it: any of its words, and nothing in it is an operator.

    >>> match_expression('red car* "turns left" NOT(')
    '"red" OR "car"* OR "turns left" OR "NOT("'
    """
    terms = re.findall(r'"([^"]*)"?|([^\s"]+)', text)
    quoted = [f'"{phrase}"' if phrase else f'"{word.rstrip("*")}"{"*" * word.endswith("*")}' for phrase, word in terms]
    return " OR ".join(term for term in quoted if re.search(r"\w", term))


def _conditions(wanted: Wanted) -> tuple[str, tuple[str, ...]]:
    conditions, values = "", ()
    if wanted.kind is not None:
        conditions, values = " AND q.kind = ?", (wanted.kind,)
    if wanted.query_ids:
        conditions += f" AND q.query_id IN ({', '.join('?' * len(wanted.query_ids))})"
        values = (*values, *wanted.query_ids)
    return conditions, values


def _result(row: Sequence) -> IndexedResult:
    return IndexedResult(*row[:-1], alert=bool(row[-1]))


def _open(path: Path, root: Path) -> sqlite3.Connection:
    """Open a file and bring it up to date; one that is damaged, or of another version, is made anew.

    Raises:
        sqlite3.OperationalError: If it cannot be written to.
        OSError: Likewise.
    """
    try:
        return _opened(path, root)
    except sqlite3.OperationalError:  # a kind of `DatabaseError`: nothing is wrong with the file
        raise
    except sqlite3.DatabaseError as error:
        logger.warning("index is damaged and made anew: path=%s error=%s", path, error)
        _delete(path)
        return _opened(path, root)


def _delete(path: Path) -> None:
    """Delete a file, and first what was to be undone in it, which would spoil the next one of its name."""
    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _opened(path: Path, root: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)
    try:
        with _transaction(connection):
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != VERSION:
                _make_tables(connection)
        _Refresh(connection, root).run()
    except BaseException:
        connection.close()
        raise
    return connection


def _make_tables(connection: sqlite3.Connection) -> None:
    """Drop what another version made, and begin anew."""
    for kind in ("trigger", "table"):  # a virtual table's own tables go with it
        names = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = ? AND name NOT LIKE 'words_%' AND name NOT LIKE 'sqlite_%'",
            (kind,),
        )
        for (name,) in names.fetchall():
            connection.execute(f'DROP {kind} "{name}"')
    for statement in _statements(_TABLES):
        try:
            connection.execute(statement)
        except sqlite3.OperationalError as error:
            if "fts5" not in str(error):
                raise
            raise StormlineError(
                f"this Python's SQLite {sqlite3.sqlite_version} has no full-text search ({error}), which search and "
                "subtitles want. Use a Python whose sqlite3 has FTS5, as those of Debian, Fedora, conda and uv have."
            ) from error
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _statements(script: str) -> Iterator[str]:
    """Yield a script's statements; `executescript` would commit before it begins."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Be the only one who writes, within the block; it happens altogether or not at all."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


class _Refresh:
    """Takes in what was committed since the last time."""

    def __init__(self, connection: sqlite3.Connection, root: Path):
        self._connection = connection
        self._root = root
        self._ids: dict[tuple[str, ...], int] = {}  # of streams and queries, as far as they were needed

    def run(self) -> None:
        tail: ResultTail | None = None
        events: Iterator[ResultEvent] = iter(())
        while True:
            with _transaction(self._connection):
                (cursor,) = self._connection.execute("SELECT cursor FROM place").fetchone() or (None,)
                if tail is None or str(tail.cursor) != cursor:  # the first page, or another process was here
                    self._ids.clear()
                    tail = ResultTail(self._root, self._place(cursor))
                    events = tail.poll()
                page = list(islice(events, ROWS_AT_ONCE))
                self._connection.executemany(_ADD, [self._row(event) for event in page])
                self._connection.execute("UPDATE place SET cursor = ?", (str(tail.cursor),))
            if len(page) < ROWS_AT_ONCE:
                return

    def _place(self, cursor: object) -> Cursor | None:
        """Return where to go on, None for the start; make all anew where the place is damaged or not to be reached.

        That is where the tables are behind, as when recovery took rows back.
        """
        if cursor == "":
            return None
        try:
            place = Cursor.parse(cursor) if isinstance(cursor, str) else None
        except ValueError:
            place = None
        if place is None or place.is_ahead_of(newest_cursor(self._root)):
            _make_tables(self._connection)
            return None
        return place

    def _row(self, event: ResultEvent) -> tuple[int | str, ...]:
        row = event.values
        stream = self._id("streams", "stream_id, session", row["stream_id"], row["session"])
        query = self._id("queries", "query_id, kind, prompt", row["query_id"], row["kind"], row["prompt"])
        start_us, end_us = (moment_ns(row[name]) // 1_000 for name in ("start_time", "end_time"))
        return stream, start_us, end_us, query, row["answer"], int(row["alert"])

    def _id(self, table: str, columns: str, *values: str) -> int:
        key = (table, *values)
        if key not in self._ids:
            marks = ", ".join("?" * len(values))
            self._connection.execute(f"INSERT OR IGNORE INTO {table} ({columns}) VALUES ({marks})", values)
            found = self._connection.execute(f"SELECT id FROM {table} WHERE ({columns}) = ({marks})", values)
            self._ids[key] = found.fetchone()[0]
        return self._ids[key]
