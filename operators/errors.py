"""What can go wrong in a lane, as a few classes that say what their reader must do.

A message says what happened, what was got, what was expected, where (``topic[partition]@offset``,
stream), and the next step. Bad settings raise `SettingsError` on the driver, before anything starts.
"""

from __future__ import annotations


class StormlineError(Exception):
    """Base of every error that stormline raises on purpose."""


class SettingsError(StormlineError):
    """A setting is missing, unknown or impossible. Correct the file or `--set`; nothing was started."""


class SourceError(StormlineError):
    """Kafka cannot be read: unreachable, refused, no such topic. Check the broker and `kafka:`."""


class TopicAnewError(SourceError):
    """A partition ends before where it was read to: give back the old topic, or set `output.path` to a new folder."""


class PublishError(StormlineError):
    """A video cannot be published: unreadable, or too large for the topic. The message says what helps."""


class MediaError(StormlineError):
    """A segment's bytes are no video that we can decode. It becomes a dead letter and the stream goes on.

    Attributes:
        reason: One word for counting and filtering, from `REASONS` in `operators.decode`.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class OrderError(StormlineError):
    """A lane's rows arrived out of order. The lane restarts from its checkpoint; report it if it repeats."""


class CheckpointError(StormlineError):
    """A checkpoint is damaged or belongs to other settings. The message names the file and the choices."""


class CommitError(StormlineError):
    """An epoch could not be written: disk full, not writable. Free space; the lane then restarts."""


class TableError(StormlineError):
    """A Parquet file of a table cannot be read. Bring it back from a copy, or move it out of the output folder."""


class OutputLockedError(StormlineError):
    """Another stormline writes to this output folder. Stop that one, or choose another `output.path`."""


class PromptError(StormlineError):
    """A question does not fit the model, and never will. It becomes a dead letter; give its query other limits."""


class ServiceError(StormlineError):
    """The LLM deployment did not answer. The lane retries, then restarts; look at the Serve logs."""
