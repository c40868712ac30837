"""Where a stream's scenes begin: an online detector on the distances between neighbouring chunks.

After SceneTilling, which is TextTiling (Hearst 1997) on frames: a cut lies where the distance stands out from its
surroundings, not where it is large as such. Each chunk carries its distance from the one before (`Chunk.scene_score`).
Its *depth* is how far one climbs down from it on either side as long as the way leads down:

    depth(i) = (d(i) - low on the left) + (d(i) - low on the right)

On the left the whole way down counts; on the right only one chunk is waited for, so that a cut is known one chunk late.
A cut must be a peak, and deeper than mean + sensitivity * deviation of what the stream has shown lately.

Cuts follow from a session's chunks alone, and those do not depend on how the stream was cut into segments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .rows import Chunk

FLOOR = 1e-4  # of a depth: below lies what a codec makes of a picture that stands still
MEMORY_CHUNKS = 32  # over which mean and deviation forget, about a minute
WARM_UP_CHUNKS = 3  # whose distances must be known before a cut can stand out from them


@dataclass(frozen=True)
class SceneSpec:
    """How scenes are told apart."""

    min_ns: int  # a scene is at least so long, but for a session's last
    max_ns: int  # and no longer, in whole chunks: then the next one begins without a cut
    sensitivity: float  # deviations; a smaller number finds more cuts


class SceneCuts(NamedTuple):
    """What a chunk's arrival tells."""

    previous: bool = False  # a scene began with the chunk before this one
    here: bool = False  # one begins with this chunk


@dataclass(frozen=True)
class SceneState:
    """What the detector keeps of one stream: a few numbers."""

    session: str
    scene_start_ns: int
    chunk_start_ns: int  # of the newest chunk
    score: float = math.nan  # its distance from the one before; nan for a session's first chunk
    low: float = math.nan  # where one ends up climbing down to the left from it
    mean: float = 0.0  # of the distances before it
    variance: float = 0.0
    n: int = 0

    def to_header(self) -> dict[str, Any]:
        """Return it for a snapshot; JSON has no nan."""
        return {name: None if value != value else value for name, value in vars(self).items()}

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> SceneState:
        """Read it back."""
        fields: dict[str, Any] = {name: math.nan if value is None else value for name, value in header.items()}
        return cls(**fields)


def step_scenes(state: SceneState | None, chunk: Chunk, spec: SceneSpec) -> tuple[SceneState, SceneCuts]:
    """Take a stream's next chunk; return the state after it, and where scenes began."""
    if state is None or state.session != chunk.session:
        return SceneState(chunk.session, chunk.start_ns, chunk.start_ns), SceneCuts()
    previous = _is_cut(state, chunk, spec)
    if previous:
        state = replace(state, scene_start_ns=state.chunk_start_ns)
    here = chunk.start_ns - state.scene_start_ns >= spec.max_ns
    score, before = chunk.scene_score, state.score
    return replace(
        _remember(state, spec),
        scene_start_ns=chunk.start_ns if here else state.scene_start_ns,
        chunk_start_ns=chunk.start_ns,
        score=score,
        low=state.low if score > before else score,  # false where there is nothing before
    ), SceneCuts(previous, here)


def _is_cut(state: SceneState, chunk: Chunk, spec: SceneSpec) -> bool:
    """Tell whether a scene began with the newest chunk, now that the one after it has come."""
    if state.n < WARM_UP_CHUNKS or state.chunk_start_ns - state.scene_start_ns < spec.min_ns:
        return False
    left, right = state.score - state.low, state.score - chunk.scene_score
    return left > 0 and right >= 0 and left + right > _threshold(state, spec)


def _threshold(state: SceneState, spec: SceneSpec) -> float:
    return max(FLOOR, state.mean + spec.sensitivity * math.sqrt(state.variance))


def _remember(state: SceneState, spec: SceneSpec) -> SceneState:
    """Take the newest distance into mean and deviation; a cut counts no more than the threshold."""
    if math.isnan(state.score):
        return state
    value = min(state.score, _threshold(state, spec)) if state.n >= WARM_UP_CHUNKS else state.score
    share = max(1.0 / MEMORY_CHUNKS, 1.0 / (state.n + 1))
    difference = value - state.mean
    return replace(
        state,
        mean=state.mean + share * difference,
        variance=(1 - share) * (state.variance + share * difference * difference),
        n=min(state.n + 1, MEMORY_CHUNKS),
    )
