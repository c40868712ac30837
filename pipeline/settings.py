"""The one settings model: a YAML file plus `--set a.b=c`, checked before anything starts.

Unknown keys are errors. A secret is named by reference, ``${env:NAME}`` or ``${file:/path}``, resolved where it
is used, and shown as ``***``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..models.strict_yaml import load_yaml
from ..operators.errors import SettingsError
from .query_settings import Query, check_sinks
from .secret_references import is_reference

SECRET_WORDS = ("password", "secret", "token", "key", "jaas")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class KafkaSettings(_Section):
    """Where the streams arrive."""

    bootstrap_servers: str = Field("127.0.0.1:9092", description="host:port[,host:port…] of the brokers.")
    topics: list[str] = Field(
        ["video"], min_length=1, description="Topics that carry segments; cam-* for all that are called so."
    )
    discover_s: float = Field(
        30.0,
        gt=0,
        description="How often new topics and partitions are looked for; read from their beginning.",
    )
    group_id: str = Field(
        "stormline",
        description="Consumer group that offsets are reported to, for lag tools. Never read back.",
    )
    start: Literal["earliest", "latest"] = Field(
        "earliest", description="Where a partition that no checkpoint knows begins."
    )
    client: dict[str, Any] = Field(
        default_factory=dict,
        description="Passed to kafka-python as it is: security_protocol, sasl_mechanism, ssl_cafile… "
        "Values may be ${env:NAME} or ${file:/path}.",
    )


class OutputSettings(_Section):
    """Where results, tokens, dead letters and checkpoints go."""

    path: Path = Field(Path("out"), description="Folder; made if it is not there. One stormline at a time.")
    keep_tokens: bool = Field(True, description="Write the tokens table: needed to ask about the past.")
    dead_letter_bytes: int = Field(
        1 << 20, ge=0, description="How many bytes of an unusable record to keep with its reason."
    )


class SamplingSettings(_Section):
    """Which frames are looked at."""

    fps: Fraction = Field(Fraction(2), description="Grid of sampled frames a second of the stream: 2, 0.5, 30000/1001.")
    max_hold_s: float = Field(
        10.0,
        gt=0,
        description="A frame stands for later grid times this long; a longer silence gives no frames.",
    )

    @field_validator("fps", mode="before")
    @classmethod
    def _exact(cls, value: Any) -> Any:
        try:
            return Fraction(str(value)) if isinstance(value, float | int | str) else value
        except ZeroDivisionError:
            raise ValueError("expected a number such as 2, 0.5 or 30000/1001") from None

    @field_validator("fps")
    @classmethod
    def _in_range(cls, value: Fraction) -> Fraction:
        if not 0 < value <= 120:
            raise ValueError(f"got {value}, expected more than 0 and at most 120 frames a second")
        return value


class SceneSettings(_Section):
    """Where the scenes of a stream begin, for queries with `scenes: true`."""

    min_s: float = Field(4.0, ge=0, le=86_400, description="A scene is at least so long.")
    max_s: float = Field(60.0, gt=0, le=86_400, description="After that the next one begins, also without a cut.")
    sensitivity: float = Field(
        3.0, ge=0, le=100, description="How far a cut must stand out, in deviations; a smaller number finds more."
    )

    @model_validator(mode="after")
    def _in_order(self) -> SceneSettings:
        if self.min_s > self.max_s:
            raise ValueError(f"min_s is {self.min_s:g} and max_s {self.max_s:g}; expected min_s to be the smaller one")
        return self


class ModelSettings(_Section):
    """The network that encodes and answers."""

    path: str | None = Field(None, description="Checkpoint folder or hub id; nothing: the built-in small model.")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$", description="auto, cpu, cuda, cuda:1…")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class LaneSettings(_Section):
    """How the lanes run."""

    count: int = Field(1, ge=1, le=1024, description="Lanes; each reads its share of the partitions.")
    decode_workers: int = Field(2, ge=1, le=256, description="Decoder processes a lane.")
    encode_threads: int = Field(1, ge=1, description="CPU threads of a lane's encoder.")
    barrier_interval_s: float = Field(2.0, gt=0, description="Time between commits.")
    picture_interval_s: float = Field(
        2.0,
        ge=0,
        description="A decoder makes a small picture of each of its streams so often, for the page; 0: none.",
    )
    max_rows_in_flight: int = Field(32, ge=1, description="Records waiting for the LLM at once, a lane.")
    renew_after_segments: int = Field(
        100_000,
        ge=1,
        description="A lane stops at a commit and starts again after so many: Ray keeps about 1 kB of each.",
    )
    stall_s: float = Field(120.0, gt=0, description="A lane without a barrier for so long is restarted.")
    decode_limit_s: float = Field(
        90.0,
        gt=0,
        description="A record that takes longer to decode ends its decoder, and after three times is set aside; at "
        "most 3/4 of stall_s.",
    )
    decode_memory_bytes: int = Field(
        4 << 30,
        ge=256 << 20,
        description="A decoder gets no more memory than this, beyond what it starts with; 8K video takes 2 GB.",
    )
    session_idle_s: float = Field(
        3600.0,
        gt=0,
        description="A stream without a record for so long has ended, by the timestamps of its partition's records.",
    )
    restart_backoff_s: float = Field(
        1.0, gt=0, description="A lane restarts at once; again with no commit between, after this; doubles up to 30 s."
    )
    max_restarts: int = Field(
        10, ge=0, description="Restarts in a row, with no commit between, before a lane is given up."
    )

    @property
    def longest_decode_s(self) -> float:
        """Return `decode_limit_s`, or less: a lane must not be taken for stalled while one record is decoded."""
        return min(self.decode_limit_s, 0.75 * self.stall_s)


class VllmSettings(_Section):
    """A vLLM server that writes the answers in place of the model's own language model."""

    url: str = Field(pattern=r"^https?://", description="Its OpenAI-compatible address, such as http://gpu-1:8000/v1.")
    model: str = Field(min_length=1, description="The name under which it serves the language model.")
    api_key: str | None = Field(None, description="Where it wants one: ${env:NAME} or ${file:/path}.")

    @field_validator("api_key")
    @classmethod
    def _by_reference(cls, value: str | None) -> str | None:
        if value is not None and not is_reference(value):
            raise ValueError("expected ${env:NAME} or ${file:/path}: settings are shown and logged")
        return value


class LagRule(_Section):
    """What becomes of some streams' records when the lane is slower than its feeds."""

    streams: str | list[str] = Field("*", description="Name or patterns (* ? [ ]); the first rule that fits counts.")
    policy: Literal["wait", "skip"] = Field(
        "wait", description="wait: every record is looked at, however late; skip: those that are too old are not."
    )
    max_lag_s: float = Field(
        60.0, gt=0, description="With skip: a record that is older when its turn comes, by its Kafka timestamp, goes."
    )
    resume_lag_s: float | None = Field(
        None, ge=0, description="Once one goes, so do the next ones up to this age; nothing: half of max_lag_s."
    )

    @model_validator(mode="after")
    def _is_whole(self) -> LagRule:
        if not self.patterns or not all(self.patterns):
            raise ValueError("streams names none; expected a name or a pattern, * for all")
        if self.resume_s > self.max_lag_s:
            raise ValueError(
                f"resume_lag_s is {self.resume_s:g} and max_lag_s {self.max_lag_s:g}; expected the first to be smaller"
            )
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        """Return the patterns that a stream's name may fit."""
        return (self.streams,) if isinstance(self.streams, str) else tuple(self.streams)

    @property
    def resume_s(self) -> float:
        """Return up to which age records are skipped, once they are."""
        return self.max_lag_s / 2 if self.resume_lag_s is None else self.resume_lag_s


class LlmSettings(_Section):
    """The LLM deployment on Ray Serve."""

    replicas: int = Field(1, ge=1)
    max_batch_size: int = Field(
        8, ge=1, le=1024, description="Answers written at once. On a CPU all rows are computed, empty ones too."
    )
    num_threads: int = Field(1, ge=1, description="CPU threads of a replica.")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of a replica.")
    timeout_s: float = Field(120.0, gt=0, description="An answer slower than this fails the attempt.")
    vllm: VllmSettings | None = Field(None, description="A vLLM server to have the answers written by; None: here.")
    prefix_cache_bytes: int = Field(
        256 << 20, ge=0, description="Memory of a replica for video that it has read, for the next question about it."
    )


class StoreSettings(_Section):
    """Recent tokens in memory, for questions."""

    max_bytes: int = Field(256 << 20, ge=1 << 20, description="Oldest chunks leave beyond this.")


class ServeSettings(_Section):
    """The HTTP service: questions about streams, in the form of OpenAI's chat completions."""

    enabled: bool = Field(False, description="Whether `stormline run` starts it; `stormline serve` always does.")
    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen at; other than this machine: with keys."
    )
    port: int = Field(8000, ge=1, le=65_535)
    keys: list[str] = Field(
        default_factory=list,
        description="SHA-256 of each bearer key that is let in, in hex: `stormline serve --new-key` makes one. "
        "None: everybody on this machine is.",
    )
    token_budget: int = Field(512, ge=1, le=1_000_000, description="Video tokens given to the LLM for a question.")
    token_policy: Literal["auto", "recent", "uniform", "global_local", "relevant", "changes"] = Field(
        "auto",
        description="How they are chosen; auto: all of a range that fits the budget, else changes, or global_local of "
        "more than 256 chunks.",
    )
    max_tokens: int = Field(256, ge=1, le=100_000, description="Longest answer that may be asked for.")
    timeout_s: float = Field(
        120.0, gt=0, description="A question that is not answered by then, its wait for a turn included, is given up."
    )
    max_body_bytes: int = Field(1 << 20, ge=1024, description="Of a request; a longer one gets 413.")
    max_prompt_chars: int = Field(16_000, ge=1, description="Of all messages of a request together.")
    max_parts: int = Field(8, ge=1, description="Video parts of a request.")
    max_range_s: float = Field(7 * 86_400.0, gt=0, description="Of one video part.")
    max_listeners: int = Field(64, ge=0, le=4000, description="Who follow events at once; further ones get 429.")
    max_concurrent: int = Field(8, ge=1, le=256, description="Questions answered at once.")
    max_queued: int = Field(32, ge=0, le=1024, description="Questions waiting beyond those; further ones get 429.")

    @field_validator("keys")
    @classmethod
    def _are_hashes(cls, keys: list[str]) -> list[str]:
        for key in keys:
            if not re.fullmatch(r"[0-9a-f]{64}", key):
                raise ValueError(
                    "expected SHA-256 hashes, 64 digits 0-9a-f each, never a key itself; "
                    "`stormline serve --new-key` makes a key and its hash"
                )
        return keys

    @model_validator(mode="after")
    def _strangers_need_a_key(self) -> ServeSettings:
        if not self.keys and not self.is_local:
            raise ValueError(
                f"host is {self.host!r}, which others can reach, and there are no keys; expected serve.keys with one "
                "hash or more (`stormline serve --new-key` makes one), or host 127.0.0.1"
            )
        return self

    @property
    def is_local(self) -> bool:
        """Return whether only this machine can reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class DeliverySettings(_Section):
    """How results go to webhooks and Kafka topics, which each query names in its `sinks`."""

    allow_private: bool = Field(False, description="Whether a webhook may be on this machine or in a private network.")
    timeout_s: float = Field(10.0, gt=0, le=300, description="For one attempt.")
    retry_wait_s: float = Field(1.0, gt=0, description="First wait before another attempt; doubles up to 60 s.")
    give_up_after_s: float = Field(
        86_400.0,
        gt=0,
        description="Then the result is set down in deliveries/undelivered.jsonl, and the next one sent.",
    )


class RaySettings(_Section):
    """The Ray cluster."""

    address: str | None = Field(None, description="Nothing: an embedded one on this machine. auto or ray://…")
    num_cpus: int | None = Field(
        None, ge=1, description="Logical CPUs of the embedded one; nothing: as many as the lanes need."
    )
    object_store_bytes: int = Field(512 << 20, ge=80 << 20, description="Shared memory of the embedded one.")
    fork_workers: bool = Field(
        True, description="Have the embedded one fork its workers off one that has imported all (Linux, without GPUs)."
    )
    encode_num_gpus: float = Field(0.0, ge=0, description="GPUs of each lane's encoder.")


class Settings(_Section):
    """Everything that can be set; see `stormline run --show-settings` for all with their defaults."""

    kafka: KafkaSettings = Field(default_factory=lambda: KafkaSettings.model_validate({}))
    output: OutputSettings = Field(default_factory=lambda: OutputSettings.model_validate({}))
    sampling: SamplingSettings = Field(default_factory=lambda: SamplingSettings.model_validate({}))
    scenes: SceneSettings = Field(default_factory=lambda: SceneSettings.model_validate({}))
    model: ModelSettings = Field(default_factory=lambda: ModelSettings.model_validate({}))
    lanes: LaneSettings = Field(default_factory=lambda: LaneSettings.model_validate({}))
    lag: list[LagRule] = Field(
        default_factory=list, description="What becomes of streams that the lanes cannot keep up with; else they wait."
    )
    llm: LlmSettings = Field(default_factory=lambda: LlmSettings.model_validate({}))
    store: StoreSettings = Field(default_factory=lambda: StoreSettings.model_validate({}))
    serve: ServeSettings = Field(default_factory=lambda: ServeSettings.model_validate({}))
    queries: list[Query] = Field(default_factory=lambda: [Query.model_validate({"id": "caption"})])
    delivery: DeliverySettings = Field(default_factory=lambda: DeliverySettings.model_validate({}))
    ray: RaySettings = Field(default_factory=lambda: RaySettings.model_validate({}))

    @model_validator(mode="after")
    def _queries_have_own_ids(self) -> Settings:
        seen: set[str] = set()
        for query in self.queries:
            if query.id in seen:
                raise ValueError(f"queries: the id {query.id!r} stands twice; give each query its own")
            seen.add(query.id)
            check_sinks(query, allow_private=self.delivery.allow_private, input_topics=self.kafka.topics)
        return self


def load_settings(
    path: Path | None,
    overrides: list[str] | tuple[str, ...] = (),
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> Settings:
    """Read settings from a YAML file and `a.b=c` overrides, later ones winning.

    Args:
        path: YAML file; None for the defaults.
        overrides: Each ``section.key=value``, the value in YAML (``lanes.count=2``, ``kafka.topics=[a,b]``).
        defaults: By section and key, for what neither of them says.

    Raises:
        SettingsError: What is wrong, where, and what was expected: one line for each mistake.
    """
    where = str(path) if path else "the defaults"
    data = _read_yaml(path) if path else {}
    for override in overrides:
        _apply_override(data, override)
    for section, values in (defaults or {}).items():
        said = data.get(section) or {}
        if isinstance(said, dict):
            data[section] = {**values, **said}
    try:
        return Settings.model_validate(data)
    except ValidationError as e:
        raise SettingsError(_explain(e, where)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as e:
        raise SettingsError(f"{path} is not UTF-8 text: {e}. Save it as UTF-8.") from e
    except OSError as e:
        raise SettingsError(f"Cannot read the settings file {path}: {e.strerror}. Give an existing YAML file.") from e
    except ValueError as e:
        raise SettingsError(f"{path} is not YAML: {e}") from e
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SettingsError(f"{path} holds a {type(data).__name__}, expected sections such as `kafka:` and `queries:`.")
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key.strip():
        raise SettingsError(f"--set {override!r}: expected section.key=value, for example lanes.count=2.")
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = data[section] = {} if data.get(section) is None else data[section]  # a section may stand empty
        if not isinstance(inner, dict):
            raise SettingsError(f"--set {override!r}: {section!r} is not a section.")
        data = inner
    try:
        data[last] = load_yaml(value)
    except ValueError as e:
        raise SettingsError(f"--set {override!r}: {value!r} is not a YAML value: {e}") from e


def _explain(error: ValidationError, where: str) -> str:
    lines = [f"{error.error_count()} wrong in {where}:"]
    for e in error.errors():
        key = ".".join(str(part) for part in e["loc"]) or "settings"
        if e["type"] == "extra_forbidden":
            lines.append(f"  {key}: unknown key; known here: {', '.join(_known_keys(e['loc'][:-1]))}")
        else:
            got = "" if isinstance(e["input"], dict) else f" (got {_masked_value(key, e['input'])!r})"
            lines.append(f"  {key}: {e['msg']}{got}")
    return "\n".join(lines)


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    section: Any = Settings
    for name in (part for part in loc if not isinstance(part, int)):
        annotation = section.model_fields[name].annotation
        # As it is, or what the list or the "or None" is of.
        section = next(t for t in (annotation, *get_args(annotation)) if hasattr(t, "model_fields"))
    return list(section.model_fields)


def _masked_value(key: str, value: Any) -> Any:
    last = key.rpartition(".")[2].lower()
    return "***" if value is not None and any(word in last for word in SECRET_WORDS) else value


def masked(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain data to print, secrets as ``***``."""

    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: walk(v, k) for k, v in value.items()}
        return _masked_value(key, value)

    data = settings.model_dump(mode="json")
    data["kafka"]["client"] = walk(data["kafka"]["client"])
    data["serve"]["keys"] = ["***"] * len(data["serve"]["keys"])
    return data
