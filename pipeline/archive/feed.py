"""What a supervisor runs in place of Kafka: the work list, brought up to date from the sources."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ...operators.errors import SettingsError
from .find_videos import FoundVideo, content_hash, find_videos
from .outcomes import failed_items
from .work_list import TOPIC, WorkItem, WorkList, committed_offsets, is_done, newest_versions, readable, spread

logger = logging.getLogger(__name__)

RANGE_S = 10.0  # of a file, for one row of the lane: its frames at 2 fps and 448 x 448 take 12 MB


@dataclass(frozen=True)
class ArchiveOptions:
    """What to archive, and how."""

    sources: Sequence[str]
    start_ns: int | None = 0  # of every video's first frame; None: when its file was last changed
    by_hash: bool = False  # tell contents apart by their SHA-256
    retry_failed: bool = False
    watch_s: float = 0.0  # look for new videos this often, for ever; 0: finish with those that are there
    range_s: float = RANGE_S


@dataclass(frozen=True)
class ArchivePlan:
    """What a lane's source needs to know."""

    root: Path
    range_s: float
    follow: bool  # wait for more at the list's end


class ArchiveFeed:
    """Keeps the work list of one output folder up to date; for a `Supervisor`.

    Args:
        root: The output folder.
        options: What to archive.
        tell: Told what is found, in a sentence.
        now_ns: The clock that tells how old a file is.

    Attributes:
        is_listed: Whether the work list was brought up to date: before, it tells nothing of what is to do.
    """

    identity: Mapping[str, str] = MappingProxyType({"source": TOPIC})  # such a folder is not one of live streams

    def __init__(
        self,
        root: Path,
        options: ArchiveOptions,
        tell: Callable[[str], None],
        now_ns: Callable[[], int] = time.time_ns,
    ):
        self.root = root.absolute()
        self.options = options
        self.is_listed = False
        self._list = WorkList(self.root)
        self._tell = tell
        self._now_ns = now_ns
        self._n_partitions = 1
        self._seen: dict[str, tuple[int, int]] = {}  # size and date by address, at the last look
        self._hashes: dict[str, tuple[FoundVideo, str]] = {}  # by address, and of what: each look meets known copies

    @property
    def plan(self) -> ArchivePlan:
        """Return what the lanes' sources need."""
        return ArchivePlan(self.root, self.options.range_s, follow=self.options.watch_s > 0)

    def has_work(self) -> bool:
        """Tell whether a run would do anything; changes nothing.

        Raises:
            SettingsError: If a source names nothing, or all together no video.
        """
        found = find_videos(self.options.sources)
        items = self._list.read()
        if not found and not items and not self.options.watch_s:
            raise SettingsError(
                f"{', '.join(self.options.sources)} holds no videos (files named .mp4, .mkv, .mov…); "
                "for others, give a glob such as 'folder/*.bin'."
            )
        if self.options.watch_s or self._drafts(found, items):
            return True
        offsets = committed_offsets(self.root)
        return not all(is_done(item, offsets) for item in items) or bool(self._to_retry(items))

    def partitions(self, lanes: int) -> list[tuple[str, int]]:
        """Bring the list up to date, and return its partitions; the supervisor calls it before lanes start."""
        items = self._list.read()
        count = max(lanes, *(item.partition + 1 for item in items)) if items else lanes
        self._n_partitions = count
        self._add(find_videos(self.options.sources), items, count)
        self.is_listed = True
        return [(TOPIC, partition) for partition in range(count)]

    def recovered(self) -> None:
        """Add what is to be tried again; the supervisor calls it once recovery has removed what never happened."""
        items = self._list.read()
        again = self._to_retry(items)
        if again:
            count = max(item.partition for item in items) + 1
            self._list.append(_placed(items, [_Draft.again(item) for item in again], count))
            self._tell(f"{len(again)} video(s) that failed are tried again")

    def watch(self) -> ArchiveWatch:
        """Return what looks for new videos while lanes run."""
        return ArchiveWatch(self)

    def look_again(self) -> None:
        """Add what is new to the list, which the running lanes follow."""
        self._add(find_videos(self.options.sources), self._list.read(), self._n_partitions)

    def _to_retry(self, items: Sequence[WorkItem]) -> list[WorkItem]:
        if not self.options.retry_failed:
            return []
        newest = newest_versions(items)
        offsets = committed_offsets(self.root)
        failed = failed_items(self.root, items)
        return [item for item in newest.values() if item in failed and is_done(item, offsets)]

    def _add(self, found: Sequence[FoundVideo], items: Sequence[WorkItem], count: int) -> None:
        new = _placed(items, self._drafts(self._settled(found), items), count)
        self._list.append(new)
        if new:
            changed = sum(item.version > 1 for item in new)
            more = f", {changed} of them changed" if changed else ""
            self._tell(f"{len(new):,} new video(s){more}; {len(items):,} known before")

    def _settled(self, found: Sequence[FoundVideo]) -> list[FoundVideo]:
        """Leave out what somebody may still be writing, where there will be another look.

        That is what has changed since the last look, or is new, unless its date is older than a look ago.
        """
        if not self.options.watch_s:
            return list(found)
        before, self._seen = self._seen, {video.uri: (video.n_bytes, video.mtime_ns) for video in found}
        old_ns = self._now_ns() - round(self.options.watch_s * 1e9)
        return [v for v in found if v.mtime_ns < old_ns or before.get(v.uri) == (v.n_bytes, v.mtime_ns)]

    def _drafts(self, found: Sequence[FoundVideo], items: Sequence[WorkItem]) -> list[_Draft]:
        """Return what is to be added to the list: what is new, and what has changed."""
        newest = newest_versions(items)
        hashes = {item.sha256 for item in items if item.sha256}
        names = {item.stream_id for item in items}
        drafts = []
        for video in found:
            before = newest.get(video.uri)
            if before is not None and (before.n_bytes, before.mtime_ns) == (video.n_bytes, video.mtime_ns):
                continue
            sha256 = self._hash_of(video)
            if sha256 and sha256 in hashes:
                continue
            hashes.add(sha256)
            start_ns = video.mtime_ns if self.options.start_ns is None else self.options.start_ns
            stream_id = _stream_id(video, before, names)
            names.add(stream_id)
            drafts.append(_Draft(video, stream_id, before.version + 1 if before else 1, start_ns, sha256))
        return drafts

    def _hash_of(self, video: FoundVideo) -> str:
        if not self.options.by_hash or video.n_bytes < 0:
            return ""
        hashed, sha256 = self._hashes.get(video.uri, (None, ""))
        if hashed == video:
            return sha256
        try:
            sha256 = content_hash(video.uri)
        except OSError as error:  # the lane will say so, in a dead letter
            logger.info("not hashed uri=%s error=%s", video.uri, error)
            return ""
        self._hashes[video.uri] = video, sha256
        return sha256


@dataclass(frozen=True)
class _Draft:
    """An item that has no place yet."""

    video: FoundVideo
    stream_id: str
    version: int
    start_ns: int
    sha256: str

    @classmethod
    def again(cls, item: WorkItem) -> _Draft:
        """Return the next version of an item with the same content."""
        video = FoundVideo(item.uri, item.stream_id, item.n_bytes, item.mtime_ns)
        version = item.version + 1
        return cls(video, _versioned(item, version), version, item.start_ns, item.sha256)


def _placed(items: Sequence[WorkItem], drafts: Sequence[_Draft], count: int) -> list[WorkItem]:
    """Give drafts their places behind what is in the list."""
    numbers = [0] * count
    for item in items:
        numbers[item.partition] = item.number + 1
    placed = []
    partitions = spread([draft.video.n_bytes for draft in drafts], [0] * count)
    for draft, partition in zip(drafts, partitions, strict=True):
        item = WorkItem(
            partition=partition,
            number=numbers[partition],
            uri=draft.video.uri,
            stream_id=draft.stream_id,
            session=f"v{draft.version}",
            version=draft.version,
            n_bytes=draft.video.n_bytes,
            mtime_ns=draft.video.mtime_ns,
            start_ns=draft.start_ns,
            sha256=draft.sha256,
        )
        numbers[partition] += 1
        placed.append(item)
    return placed


def _stream_id(video: FoundVideo, before: WorkItem | None, taken: set[str]) -> str:
    """Return a name that no other video has: the path below the source, with more of its folders if need be."""
    if before is not None:
        return _versioned(before, before.version + 1)
    name = readable(video.name)
    if name not in taken:
        return name
    parts = readable(video.uri).strip("/").split("/")
    longer = ("/".join(parts[-n:]) for n in range(name.count("/") + 2, len(parts) + 1))
    return next((name for name in longer if name not in taken), readable(video.uri))


def _versioned(before: WorkItem, version: int) -> str:
    """Return the stream of a video's later version: its own, because its times are those of the first one's, too."""
    return f"{before.video_name}@{version}"


class ArchiveWatch:
    """Looks for new videos every so often, in a thread of its own; stands where `PartitionWatch` does for Kafka."""

    def __init__(self, feed: ArchiveFeed):
        self._feed = feed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="archive-watch", daemon=True)

    def start(self) -> None:
        """Begin to look, where that is wanted."""
        if self._feed.options.watch_s > 0:
            self._thread.start()

    def stop(self) -> None:
        """Stop looking; the list is not written to any more at return."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def take(self) -> list[tuple[str, int]]:
        """Return no new partitions: what is new goes into those that there are."""
        return []

    def take_gone(self) -> list[tuple[str, int]]:
        """Return no partitions: those of an archive stay."""
        return []

    def _run(self) -> None:
        while not self._stop.wait(self._feed.options.watch_s):
            try:
                self._feed.look_again()
            except (SettingsError, OSError) as error:  # a folder that is away for a while
                logger.warning("not looked for new videos: %s", error)
            except Exception:  # the edge of the thread: nobody would notice that it looks no more
                logger.exception("not looked for new videos")
