"""The standing queries of an output folder: those of the settings, and those added over the API.

They stand in one small file, ``queries.json``, beside the tables. The supervisor writes the settings' ones into it at
its start, the API adds, changes and removes its own, and the lanes read it as each barrier passes. It is replaced in
one step, so that whoever reads it finds the old queries or the new ones, also after a power cut.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..operators.errors import SettingsError, StormlineError
from ..operators.queries import StandingQuery
from .durable_files import replace_file
from .query_settings import Query
from .result_tail import newest_cursor

FILE_NAME = "queries.json"
LOCK_NAME = ".queries.lock"
MAX_QUERIES = 256  # of a folder: each costs the LLM an answer for each window of each stream that it watches

Clock = Callable[[], datetime]


class QueryNotFoundError(StormlineError):
    """There is no query of this id. List them, and ask for one that is there."""


class QueryConflictError(StormlineError):
    """A query cannot be added or changed over the API: its id is taken, or it belongs to the settings."""


class StoredQuery(BaseModel):
    """A query, and where it is from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    query: Query
    source: Literal["settings", "api"]
    created: datetime
    changed: datetime
    since: str  # what was committed when it was made, or given other sinks: those get what comes after


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    queries: list[StoredQuery] = []


class QueryRegistry:
    """The queries of one output folder. Any number of processes may read it, and change it one after the other.

    Args:
        root: The output folder.
        clock: For `created` and `changed` alone.
    """

    def __init__(self, root: Path, clock: Clock = lambda: datetime.now(timezone.utc)):
        self._path = root / FILE_NAME
        self._lock_path = root / LOCK_NAME
        self._clock = clock
        self._read: tuple[tuple[int, ...], list[StoredQuery]] | None = None

    def stored(self) -> list[StoredQuery]:
        """Return all queries, the settings' first, in the order in which they were added; none without a file.

        Raises:
            SettingsError: If the file cannot be read, or is not ours.
        """
        try:
            with self._path.open("rb") as file:
                stat = os.fstat(file.fileno())
                version = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                if self._read is None or self._read[0] != version:
                    self._read = (version, _File.model_validate_json(file.read()).queries)
        except FileNotFoundError:
            return []
        except (OSError, ValidationError) as error:
            raise SettingsError(
                f"{self._path} cannot be read as the list of standing queries: {_first_line(error)}. Restore it from "
                f"a backup, or remove it: the settings' queries come back at the next start, those of the API do not."
            ) from error
        return list(self._read[1])

    def get(self, query_id: str) -> StoredQuery:
        """Return one query.

        Raises:
            QueryNotFoundError: If there is none of this id.
            SettingsError: As `stored`.
        """
        return _find(query_id, self.stored())

    def for_lanes(self) -> list[StandingQuery]:
        """Return what the lanes ask.

        Raises:
            SettingsError: As `stored`, and where there is no file: that is no list without queries.
        """
        if not self._path.exists():
            raise SettingsError(f"{self._path} is gone; it comes back at the next start, without the API's queries")
        return [stored.query.for_lanes() for stored in self.stored()]

    def hidden(self) -> frozenset[str]:
        """Return the queries whose results are not for the event stream; none where the file cannot be read."""
        try:
            return frozenset(each.query.id for each in self.stored() if not each.query.sinks.events)
        except SettingsError:
            return frozenset()

    def take_settings(self, queries: Sequence[Query]) -> None:
        """Have the settings' queries in place of those that an earlier run's settings had.

        Raises:
            SettingsError: If one has the id of a query that was added over the API.
        """
        with self._change() as stored:
            before = {s.query.id: s for s in stored if s.source == "settings"}
            others = [s for s in stored if s.source == "api"]
            taken = {s.query.id for s in others} & {query.id for query in queries}
            if taken:
                raise SettingsError(
                    f"queries: the id {min(taken)!r} is taken by a query that was added over the API "
                    f"({self._path}). Give the settings' one another id, or take the other out of that file."
                )
            stored[:] = [self._made(query, "settings", before.get(query.id)) for query in queries] + others

    def add(self, query: Query) -> StoredQuery:
        """Add a query.

        Raises:
            QueryConflictError: If its id is taken, or there are too many.
        """
        with self._change() as stored:
            if any(s.query.id == query.id for s in stored):
                raise QueryConflictError(
                    f"there is a query {query.id!r} already; choose another id, or change that one"
                )
            if len(stored) >= MAX_QUERIES:
                raise QueryConflictError(f"there are {len(stored)} queries already, and no more than that may be")
            stored.append(self._made(query, "api", None))
            return stored[-1]

    def replace(self, query: Query) -> StoredQuery:
        """Put a query in the place of the one with its id.

        Raises:
            QueryNotFoundError: If there is none.
            QueryConflictError: If that one belongs to the settings.
        """
        with self._change() as stored:
            old = _changeable(query.id, stored)
            new = self._made(query, "api", old)
            stored[stored.index(old)] = new
            return new

    def remove(self, query_id: str) -> None:
        """Remove a query.

        Raises:
            QueryNotFoundError: If there is none of this id.
            QueryConflictError: If it belongs to the settings.
        """
        with self._change() as stored:
            stored.remove(_changeable(query_id, stored))

    def _made(self, query: Query, source: Literal["settings", "api"], old: StoredQuery | None) -> StoredQuery:
        if old is not None and old.query == query:
            return old
        now = self._clock()
        if old is not None and old.query.sinks == query.sinks:
            return old.model_copy(update={"query": query, "changed": now})
        since = str(newest_cursor(self._path.parent))
        return StoredQuery(
            query=query, source=source, created=now if old is None else old.created, changed=now, since=since
        )

    @contextmanager
    def _change(self) -> Iterator[list[StoredQuery]]:
        """Give the list to be changed in place, and write it where it was; one at a time over all processes."""
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            before = self.stored()
            after = list(before)
            yield after
            if after != before or not self._path.exists():
                replace_file(self._path, _File(queries=after).model_dump_json(indent=1).encode())
        finally:
            os.close(descriptor)  # the lock goes with it


def _find(query_id: str, stored: Sequence[StoredQuery]) -> StoredQuery:
    for each in stored:
        if each.query.id == query_id:
            return each
    known = ", ".join(each.query.id for each in stored) or "none"
    raise QueryNotFoundError(f"no query {query_id!r} here; there: {known}")


def _changeable(query_id: str, stored: Sequence[StoredQuery]) -> StoredQuery:
    found = _find(query_id, stored)
    if found.source == "settings":
        raise QueryConflictError(
            f"the query {query_id!r} stands in the settings file, and can be changed there alone; then start again"
        )
    return found


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return str(error)
