"""Brings committed results to webhooks and Kafka topics: each at least once, under an id that stays the same.

A *route* is one query's one sink. It goes through the committed rows in their order (`result_feed`), sends those of its
query, and keeps the place that it has reached in ``deliveries/QUERY.SINK.json``:

    1 send      with the result's id; again, with longer and longer waits, while the receiver is away
    2 remember  the place after it: temporary name, sync, rename

A crash between the two sends once more what was sent, under the same id. Routes do not wait for each other, and lanes
wait for none of them: they only write the rows. A receiver that is away for too long, or wants no such message, has
its results set down in ``deliveries/undelivered.jsonl``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..operators.errors import StormlineError
from .durable_files import make_folder, replace_file, sync_folder
from .kafka_results import KafkaResultSender
from .query_registry import QueryRegistry, StoredQuery
from .query_settings import KafkaSink, WebhookSink
from .result_feed import ResultFeed
from .result_tail import Cursor, ResultEvent
from .settings import DeliverySettings, KafkaSettings
from .webhooks import DeliveryError, WebhookSender

logger = logging.getLogger(__name__)

FOLDER = "deliveries"
UNDELIVERED_NAME = "undelivered.jsonl"
ROUTES_EVERY_S = 1.0  # between two looks at the queries
IDLE_S = 1.0  # without a result, after which the place is kept all the same
MAX_WAIT_S = 60.0  # between two attempts
REFUSED_ATTEMPTS = 3  # of what the receiver does not want
CLOSE_WAIT_S = 5.0  # for what is committed and not sent; the rest is sent after the next start

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class Route:
    """One query's one sink."""

    query_id: str
    sink: WebhookSink | KafkaSink
    since: str  # where it begins that has no place of its own yet

    @property
    def kind(self) -> str:
        """Return webhook or kafka."""
        return "webhook" if isinstance(self.sink, WebhookSink) else "kafka"

    @property
    def target(self) -> str:
        """Return where it goes: another target is another route, which goes on where the one before had come to."""
        return self.sink.url if isinstance(self.sink, WebhookSink) else self.sink.topic

    def wants(self, event: ResultEvent) -> bool:
        """Tell whether a result is to be sent: every caption, and of an alert where it begins to hold."""
        values = event.values
        return values["query_id"] == self.query_id and (values["kind"] != "alert" or values["alert"])


def routes_of(stored: list[StoredQuery]) -> list[Route]:
    """Return the routes that queries ask for."""
    return [
        Route(each.query.id, sink, each.since)
        for each in stored
        for sink in (each.query.sinks.webhook, each.query.sinks.kafka)
        if sink is not None
    ]


def result_id(values: Mapping[str, Any]) -> str:
    """Return a result's own id: the same whenever and from wherever it is sent.

    It follows from which query it is of which window of which session, so that it also stays when damage had a lane
    take an epoch back and commit the row again.
    """
    names = ("query_id", "kind", "alert", "stream_id", "session", "start_time", "end_time")
    return "res_" + hashlib.sha256(json.dumps([str(values[name]) for name in names]).encode()).hexdigest()[:32]


def message_of(event: ResultEvent) -> bytes:
    """Return what is sent of a result."""
    row = event.to_json()
    body = {"type": row["kind"], "id": result_id(event.values), "timestamp": row["emitted_time"], "data": row}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


class Deliverer:
    """Runs the routes of an output folder; belongs to one event loop.

    Args:
        root: The output folder.
        settings: How often and how long to try.
        kafka: Where topics are.
        sleep: Waits between attempts.
        clock_s: Tells how long a result has been tried.
    """

    def __init__(
        self,
        root: Path,
        settings: DeliverySettings,
        kafka: KafkaSettings,
        *,
        sleep: Sleep = asyncio.sleep,
        clock_s: Callable[[], float] = time.monotonic,
    ):
        self._root = root
        self._settings = settings
        self._sleep = sleep
        self._clock_s = clock_s
        self._registry = QueryRegistry(root)
        self._feed = ResultFeed(root)
        self._webhooks = WebhookSender(allow_private=settings.allow_private, timeout_s=settings.timeout_s)
        self._kafka = KafkaResultSender(kafka, timeout_s=settings.timeout_s)
        self._routes: dict[Route, asyncio.Task[None]] = {}

    async def run(self, closing: asyncio.Event) -> None:
        """Deliver until `closing` is set and what was committed by then is sent, or cannot be sent soon."""
        make_folder(self._root / FOLDER)
        try:
            while not closing.is_set():
                self._follow_queries(closing)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(closing.wait(), ROUTES_EVERY_S)
            if self._routes:
                await asyncio.wait(self._routes.values(), timeout=CLOSE_WAIT_S)
        finally:
            await self._end(list(self._routes))
            await self._webhooks.close()
            await asyncio.to_thread(self._kafka.close)

    def _follow_queries(self, closing: asyncio.Event) -> None:
        """Start the routes that are new, and end those that are gone."""
        try:
            wanted = routes_of(self._registry.stored())
        except StormlineError as error:
            logger.warning("queries_not_read routes_kept=%d error=%s", len(self._routes), error)
            return
        for route in [route for route in self._routes if route not in wanted]:
            self._routes.pop(route).cancel()
        # A sink that was taken out and comes back later gets what comes after that.
        places = {place_name(route) for route in wanted}
        for path in (self._root / FOLDER).glob("*.json"):
            if path.name not in places:
                path.unlink(missing_ok=True)
        for route in wanted:
            if route not in self._routes:
                name = f"deliver-{route.query_id}-{route.kind}"
                self._routes[route] = asyncio.create_task(self._keep_delivering(route, closing), name=name)

    async def _end(self, routes: list[Route]) -> None:
        tasks = [self._routes.pop(route) for route in routes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_delivering(self, route: Route, closing: asyncio.Event) -> None:
        wait_s = self._settings.retry_wait_s
        while True:
            try:
                await self._deliver(route, closing)
                return
            except Exception as error:  # noqa: BLE001 (the edge of a task: a route must not end)
                logger.error("delivery_broke query=%s sink=%s error=%r", route.query_id, route.kind, error)
            await self._sleep(wait_s)
            wait_s = min(MAX_WAIT_S, 2 * wait_s)

    async def _deliver(self, route: Route, closing: asyncio.Event) -> None:
        place = DeliveryPlace(self._root, route)
        async for item in self._feed.listen(place.cursor, idle_s=IDLE_S):
            if isinstance(item, Cursor):
                place.keep(item)
                if closing.is_set():
                    return
            elif route.wants(item):
                await self._send_for_long(route, item)
                place.keep(item.cursor)

    async def _send_for_long(self, route: Route, event: ResultEvent) -> None:
        """Send a result, trying again for as long as the settings say; then set it down as undelivered."""
        began_s, wait_s, refused = self._clock_s(), self._settings.retry_wait_s, 0
        while True:
            try:
                await self._send(route, event)
                return
            except StormlineError as error:
                refused += isinstance(error, DeliveryError) and error.refused
                asked_s = error.retry_after_s if isinstance(error, DeliveryError) else None
                waited_s = self._clock_s() - began_s
                if refused >= REFUSED_ATTEMPTS or waited_s >= self._settings.give_up_after_s:
                    self._set_down(route, event, str(error))
                    return
                if wait_s == self._settings.retry_wait_s:
                    logger.warning("delivery_failed query=%s sink=%s error=%s", route.query_id, route.kind, error)
                await self._sleep(max(wait_s, asked_s or 0.0))
                wait_s = min(MAX_WAIT_S, 2 * wait_s)

    async def _send(self, route: Route, event: ResultEvent) -> None:
        body, message_id = message_of(event), result_id(event.values)
        if isinstance(route.sink, WebhookSink):
            await self._webhooks.send(route.sink, message_id, body)
        else:
            await self._kafka.send(route.sink.topic, event.values["stream_id"], message_id, body)

    def _set_down(self, route: Route, event: ResultEvent, why: str) -> None:
        path = self._root / FOLDER / UNDELIVERED_NAME
        logger.error("undelivered query=%s sink=%s path=%s error=%s", route.query_id, route.kind, path, why)
        line = {"query_id": route.query_id, "sink": route.kind, "error": why, **json.loads(message_of(event))}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)


def place_name(route: Route) -> str:
    """Return the name of the file that says how far a route has come."""
    return f"{route.query_id}.{route.kind}.json"


class DeliveryPlace:
    """How far a route has come, in a file of its own.

    Args:
        root: The output folder.
        route: Whose. Where an address was corrected, what waited for the old one goes to the new one.
    """

    def __init__(self, root: Path, route: Route):
        self._path = root / FOLDER / place_name(route)
        self._target = route.target
        begun = self._read()
        self.cursor = begun or Cursor.parse(route.since)
        if begun is None:  # set down before anything is sent, which may take days
            self._write(self.cursor)

    def _read(self) -> Cursor | None:
        try:
            return Cursor.parse(json.loads(self._path.read_text())["cursor"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            logger.warning("place_not_read path=%s; results since the query's last change are sent again", self._path)
            return None

    def keep(self, cursor: Cursor) -> None:
        """Remember a place, so that it outlasts a power cut."""
        if cursor != self.cursor:
            self._write(cursor)
            self.cursor = cursor

    def _write(self, cursor: Cursor) -> None:
        replace_file(self._path, json.dumps({"target": self._target, "cursor": str(cursor)}).encode())


class DeliveryThread:
    """A `Deliverer` in a thread of its own; a context manager. What fails in it stays in it."""

    def __init__(self, root: Path, settings: DeliverySettings, kafka: KafkaSettings):
        self._args = (root, settings, kafka)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Event | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)

    def __enter__(self) -> DeliveryThread:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop is not None and self._closing is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it has just ended
                self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(2 * CLOSE_WAIT_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception as error:  # noqa: BLE001 (the edge of a thread)
            logger.error("delivery_ended error=%r; results are committed, and sent after the next start", error)
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        await Deliverer(*self._args).run(self._closing)
