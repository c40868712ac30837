"""The Ray Serve side of a run: starting it, and what the lanes call it through."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from ..models.prompts import VideoAnswer, VideoPrompt
from ..operators.errors import PromptError, ServiceError
from ..operators.rows import LaneNews, Picture
from .chunk_index import PastChunk
from .front.address import check_port
from .settings import ModelSettings, Settings
from .video_llm import ModelDescription, describe

if TYPE_CHECKING:
    from .stream_activity import StreamActivity
    from .token_store import HeldStream

logger = logging.getLogger(__name__)

LLM_APP = "stormline-llm"
STORE_APP = "stormline-store"
FRONT_APP = "stormline-front"  # with `serve.enabled` alone
APPS = (LLM_APP, STORE_APP)
ATTEMPTS = 4  # of one answer; a replica that died is back within the waits between them
DESCRIBE_TIMEOUT_S = 30.0
# How soon a replica that died is missed, and another started; Serve's ten seconds are a third of the time it may take.
MISSED_AFTER_S = 1.0
HEAD_NODE = "node:__internal_head__"  # a resource that Ray gives its first node
RETRY_WAIT_S = 2.0  # doubles from attempt to attempt: 2, 4, 8
CONNECT_WITHIN_S = 60.0  # of a lane that starts beside the services: they need seconds
_CONNECT_EVERY_S = 0.05


class StartingServices:
    """Services that come up beside other work."""

    def __init__(self, settings: Settings):
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._wanted: set[str] = {*APPS, FRONT_APP} if settings.serve.enabled else set(APPS)
        if self._wanted <= _running_apps():
            logger.info("services_reused apps=%s", ",".join(sorted(self._wanted)))
            return
        if settings.serve.enabled:
            check_port(settings.serve)
        self._thread = threading.Thread(target=self._run, args=(settings,), name="services", daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        """Tell whether they answer.

        Raises:
            Exception: Whatever kept them from it.
        """
        if self._thread is not None and self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def wait(self) -> None:
        """Wait until they answer; raises as `ready` does."""
        if self._thread is not None:
            self._thread.join()
        self.ready()

    def take_down(self) -> None:
        """End them, but for those that ran before; and Serve, where nobody else uses it."""
        if self._thread is not None:
            self._thread.join()
            end_apps(self._wanted)

    def _run(self, settings: Settings) -> None:
        try:
            _deploy(settings)
        except Exception as error:  # noqa: BLE001 (raised where it is waited for)
            self._error = error


@contextmanager
def starting_services(settings: Settings) -> Iterator[StartingServices]:
    """Have the LLM, the token store and, where the settings say so, the HTTP front come up beside the block.

    Where they run already on this Ray, they are used as they are and left running; else they are deployed, and
    taken down after the block.
    """
    starting = StartingServices(settings)
    try:
        yield starting
    finally:
        starting.take_down()


@contextmanager
def services(settings: Settings) -> Iterator[None]:
    """Have them answer within the block, see `starting_services`."""
    with starting_services(settings) as starting:
        starting.wait()
        yield


def _running_apps() -> set[str]:
    return {name for name, app in serve.status().applications.items() if app.status == "RUNNING"}


def end_apps(apps: set[str]) -> None:
    """End applications that run, and Serve with them, where nobody else uses it."""
    status = serve.status()
    if status.applications.keys() <= apps and not status.proxies:  # ours alone, and we start no proxy
        serve.shutdown()
        return
    for name in sorted(status.applications.keys() & apps):
        serve.delete(name)


def _deploy(settings: Settings) -> None:
    from .token_store import TokenStore
    from .video_llm import VideoLLM

    _start_serve()
    llm = VideoLLM.options(  # type: ignore[attr-defined]
        num_replicas=settings.llm.replicas,
        ray_actor_options={"num_cpus": 0.5, "num_gpus": settings.llm.num_gpus},
        health_check_period_s=MISSED_AFTER_S,
    ).bind(settings.model, settings.llm)
    store = TokenStore.options(ray_actor_options={"num_cpus": 0.1}, health_check_period_s=MISSED_AFTER_S)  # type: ignore[attr-defined]
    targets = [
        serve.RunTarget(llm, name=LLM_APP, route_prefix=None),
        serve.RunTarget(store.bind(settings.store.max_bytes), name=STORE_APP, route_prefix=None),
    ]
    if settings.serve.enabled:
        targets.append(serve.RunTarget(_bind_front(settings), name=FRONT_APP, route_prefix=None))
    serve.run_many(targets)


def _bind_front(settings: Settings) -> serve.Application:
    from .front.deployment import Front
    from .front.queries import QueryRules

    # Absolute: a replica's working folder is its own.
    where = {"num_cpus": 0, "resources": {HEAD_NODE: 0.001}}  # where clients look for it; it may have no CPU to give
    front = Front.options(ray_actor_options=where, health_check_period_s=MISSED_AFTER_S)  # type: ignore[attr-defined]
    rules = QueryRules(settings.delivery.allow_private, tuple(settings.kafka.topics))
    return front.bind(settings.serve, settings.output.path.resolve(), rules)


def _start_serve() -> None:
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    logging.disable(logging.INFO)  # as it starts, Serve sets its logger's level here to INFO and tells each step
    try:
        serve.start(proxy_location="Disabled", logging_config=quiet)  # the front listens itself
    finally:
        logging.disable(logging.NOTSET)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def describe_model() -> ModelDescription:
    """Return what the running LLM deployment holds."""
    return serve.get_deployment_handle("VideoLLM", LLM_APP).describe.remote().result(timeout_s=DESCRIBE_TIMEOUT_S)


def describing_apart(model: ModelSettings) -> Callable[[], ModelDescription]:
    """Begin to find out what the LLM deployment will hold, in a process of its own: that is not waited for.

    Returns:
        What waits for the answer and returns it.
    """
    answer = ray.remote(_load_and_describe).options(num_cpus=0).remote(model)
    return lambda: ray.get(answer, timeout=DESCRIBE_TIMEOUT_S)


def _load_and_describe(model: ModelSettings) -> ModelDescription:
    from ..models.loading import load_model

    return describe(load_model(model.path, device=model.device, dtype=model.dtype))


class _Deployment:
    """A Serve deployment that is called; picklable, connects where it is first used."""

    _NAME: str
    _APP: str
    _DIRECT = False  # called in an event loop alone: past Ray's object store and past Serve's own thread, which cost

    def __init__(self) -> None:
        self._handle: Any = None

    def _deployment(self) -> Any:
        if self._handle is None:
            handle: Any = serve.get_deployment_handle(self._NAME, self._APP)
            if self._DIRECT:
                handle._init(_run_router_in_separate_loop=False)
                handle = handle.options(_by_reference=False)
            self._handle = handle
        return self._handle

    def _connect(self) -> Any:
        """Return the handle; waits for services that are being started."""
        patience_ends_s = time.monotonic() + CONNECT_WITHIN_S
        while True:
            try:
                return self._deployment()
            except (RayServeException, KeyError):  # no Serve yet, or no such deployment
                if time.monotonic() > patience_ends_s:
                    raise
            time.sleep(_CONNECT_EVERY_S)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": None}


class _Llm(_Deployment):
    _NAME, _APP = "VideoLLM", LLM_APP


class _Store(_Deployment):
    _NAME, _APP = "TokenStore", STORE_APP


class LlmClient(_Llm):
    """Ask the LLM deployment for a lane.

    Retries when a replica dies or an answer takes too long; then raises, so that the lane restarts rather than
    leaving a caption out.
    """

    def __init__(self, timeout_s: float, at_once: int = 16):
        super().__init__()
        self._timeout_s = timeout_s
        self._at_once = at_once
        self._room: asyncio.Semaphore | None = None  # belongs to the loop that it is first used in

    async def __call__(self, prompt: VideoPrompt) -> VideoAnswer:
        """Return the answer.

        No more than `at_once` are under way: others wait here, the oldest first, where no limit on an answer's time
        runs yet.

        Raises:
            PromptError: If the question does not fit the model.
            ServiceError: After `ATTEMPTS` failures; carries the last one as its cause.
        """
        self._room = self._room or asyncio.Semaphore(self._at_once)
        async with self._room:
            return await self._ask(prompt)

    async def _ask(self, prompt: VideoPrompt) -> VideoAnswer:
        last: Exception | None = None
        for attempt in range(ATTEMPTS):
            try:
                return await self._attempt(prompt)
            except ValueError as e:  # of this class is Ray's error, where the model's own check raised one
                raise PromptError(str(getattr(e, "cause", None) or e)) from e
            except Exception as e:  # noqa: BLE001 (the edge to another process: whatever came out of it)
                last = e
                logger.warning("llm_attempt_failed attempt=%d error=%r", attempt + 1, e)
                if attempt + 1 < ATTEMPTS:
                    await asyncio.sleep(RETRY_WAIT_S * 2**attempt)
        raise ServiceError(
            f"The LLM deployment {LLM_APP!r} gave no answer in {ATTEMPTS} attempts of up to {self._timeout_s:.0f} s; "
            f"last: {last!r}. See its logs; the lane restarts from its checkpoint."
        ) from last

    async def _attempt(self, prompt: VideoPrompt) -> VideoAnswer:
        llm = self._handle or await asyncio.to_thread(self._connect)
        response = llm.answer.remote(prompt)
        try:
            return await asyncio.wait_for(response, self._timeout_s)
        except (TimeoutError, asyncio.CancelledError):
            response.cancel()  # who stops waiting stops nothing in the deployment: it would be written to its end
            raise


class StoreClient(_Store):
    """Push chunks, and what else is new, to the token store without waiting.

    The store is a cache of what the tokens table holds, so a push that fails is logged and not repeated.
    """

    def __call__(self, news: LaneNews) -> None:
        """Send the news."""
        self._connect().push.remote(news)


class LlmReader(_Llm):
    """Ask the LLM deployment for people who wait: one attempt, and who stops waiting stops what is written for them."""

    _DIRECT = True

    async def describe(self) -> ModelDescription:
        """Return what the model is."""
        return await self._deployment().describe.remote()

    async def embed(self, text: str) -> np.ndarray:
        """Return a text's embedding (d_model,) float32."""
        return await self._deployment().embed.remote(text)

    async def answer(self, prompt: VideoPrompt) -> VideoAnswer:
        """Return the whole answer.

        Raises:
            ValueError: If the prompt does not fit the model.
        """
        return await self._deployment().answer.remote(prompt)

    async def stream(self, prompt: VideoPrompt) -> AsyncIterator[str | VideoAnswer]:
        """Yield the answer's pieces, and at last the whole answer.

        Raises:
            ValueError: If the prompt does not fit the model.
        """
        async for piece in self._deployment().options(stream=True).stream.remote(prompt):
            yield piece


class StoreReader(_Store):
    """Ask the token store for what it holds."""

    _DIRECT = True

    async def held(self, stream_id: str) -> HeldStream | None:
        """Return what is held of a stream, without the tokens."""
        return await self._deployment().held.remote(stream_id)

    async def pick(self, stream_id: str, starts_ns: np.ndarray) -> list[PastChunk]:
        """Return the chunks that start at these times, those that are still there."""
        return await self._deployment().pick.remote(stream_id, starts_ns)

    async def streams(self) -> dict[str, tuple[int, int, int]]:
        """Return for each stream: first start_ns, last end_ns, number of chunks."""
        return await self._deployment().streams.remote()

    async def activity(self) -> dict[str, StreamActivity]:
        """Return what was last heard of each stream."""
        return await self._deployment().activity.remote()

    async def picture(self, stream_id: str) -> Picture | None:
        """Return a stream's newest picture."""
        return await self._deployment().picture.remote(stream_id)
