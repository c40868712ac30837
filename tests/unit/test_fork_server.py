"""Workers are copies of one process; where that cannot be, they start as Ray starts them."""

import os
import subprocess
import sys
from contextlib import ExitStack, suppress

import psutil
import pytest

from stormline.pipeline.fork_server import WORKER_FILE, fork_server_ahead
from stormline.pipeline.fork_worker import ADDRESS

RUN = """
import subprocess, sys
from stormline.pipeline.fork_server import fork_server

modules, command = sys.argv[1].split(), sys.argv[2:]
with fork_server(modules):
    print(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode())  # ends with the worker, or copy
"""
WORKER = """
import os, sys
own_group = os.getpgid(0) == os.getpid()
assert ("ray" in sys.modules) == ("RAY_JOB_ID" in os.environ)
print("{way}", sys.argv[1:], "loaded" in sys.modules, os.environ["MINE"], os.getcwd(), own_group, __name__)
"""
NESTED = """
import os, socket
from stormline.pipeline.fork_server import fork_server
from stormline.pipeline.fork_worker import ADDRESS

with fork_server(["json"]):
    outer = os.environ[ADDRESS]
    with fork_server(["json"]):
        print("same" if os.environ[ADDRESS] == outer else "another")
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(os.environ[ADDRESS])
        print("alive")
print("left" if ADDRESS in os.environ or os.path.exists(outer) else "gone")
"""
AHEAD = """
import os
from stormline.pipeline.fork_server import fork_server_ahead
from stormline.pipeline.fork_worker import ADDRESS

with fork_server_ahead() as ahead:
    print("began" if ADDRESS in os.environ else "not")
    ahead.close()
    print("ended" if ADDRESS not in os.environ else "not")
"""
LASTING = """
import fcntl, os, time
held = open(os.path.join(os.path.dirname(__file__), "held"), "a")
fcntl.flock(held, fcntl.LOCK_EX)
ballast = b"x" * (200 << 20)  # to give back takes a while, before the lock goes
print(os.getpid(), flush=True)
time.sleep(600)
"""
RUN_ON = """
import subprocess, sys, time
from stormline.pipeline.fork_server import fork_server

with fork_server(["json"]):
    subprocess.run(sys.argv[1:], check=True)
    time.sleep(600)
"""
BEGIN_AGAIN = """
import fcntl, os, subprocess, sys, time
from stormline.pipeline import fork_server as package
from stormline.pipeline.ray_watch import SHORT_LIFE_S, SHORT_LIVES, begin_again

again = SHORT_LIVES in package.os.environ
if again and sys.argv[1] == "edited":
    package._code = lambda: 0
with package.fork_server(["json"]):
    print(*(server.pid for server in package._running.values()), flush=True)
    with open(os.path.join(os.path.dirname(sys.argv[4]), "held"), "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free at once
    subprocess.run(sys.argv[2:], check=True, stdin=subprocess.DEVNULL)
    if not again:
        sys.stdin.readline()
        begin_again("Ray died (raylet)", SHORT_LIFE_S, lambda text: None)
    time.sleep(600)
"""
PARENT = """
import os
print(os.environ["RAY_RAYLET_PID"], os.getppid())
"""
BUSY = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""
IMPORTED = """
import sys
from stormline.pipeline.fork_server import MODULES, RAY_MODULES, import_all, import_ray, unfit
import_all(MODULES)
print([name for name in MODULES if name not in sys.modules], "ray" in sys.modules, repr(unfit()))
import_ray()
print([name for name in RAY_MODULES if name not in sys.modules], repr(unfit()))
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that starts a worker below a fork server and returns what it printed."""
    (tmp_path / "default_worker.py").write_text(WORKER.format(way="copy"))
    (tmp_path / "setup_worker.py").write_text(WORKER.format(way="anew"))
    (tmp_path / "loaded.py").touch()
    (tmp_path / "busy.py").write_text(BUSY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(modules, *options, mine="7"):
        worker = [sys.executable, str(WORKER_FILE), str(tmp_path / "default_worker.py"), *options]
        command = ["env", "--chdir", str(tmp_path), f"MINE={mine}", *worker]
        done = subprocess.run(
            [sys.executable, "-c", RUN, modules, *command], capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.strip(), done.stderr.strip()

    return start


def test_worker_when_ordered_then_it_is_a_copy_with_the_environment_folder_and_options_of_the_order(start, tmp_path):
    said, complained = start("loaded", "--language=PYTHON", "--worker-id=5", mine="8")

    assert said == f"copy ['--worker-id=5'] True 8 {tmp_path} True __main__"
    assert complained == ""


def test_worker_when_it_wants_an_environment_of_its_own_then_ray_starts_it(start, tmp_path):
    context = "--serialized-runtime-env-context={}"

    said, _ = start("loaded", "--language=PYTHON", context)

    options = [f"{tmp_path}/default_worker.py", "--language=PYTHON", context]
    assert said == f"anew {options} False 7 {tmp_path} False __main__"


def test_server_when_one_of_the_same_modules_runs_then_it_serves_and_outlives_the_inner_block():
    done = subprocess.run([sys.executable, "-c", NESTED], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.split() == ["same", "alive", "gone"]


def test_server_when_ray_is_imported_then_none_is_started_ahead(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", sys)

    with fork_server_ahead():
        assert ADDRESS not in os.environ


def test_server_when_it_is_started_ahead_then_closing_ends_it():
    done = subprocess.run([sys.executable, "-c", AHEAD], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.split() == ["began", "ended"]


@pytest.fixture(params=["", "01000000"], ids=["any job", "one job"])
def lasting(tmp_path, request):
    """Return a function that runs a program with a lasting worker, which prints its number as it begins."""
    (tmp_path / "default_worker.py").write_text(LASTING)
    command = [sys.executable, str(WORKER_FILE), str(tmp_path / "default_worker.py"), "--language=PYTHON"]
    environment = os.environ | ({"RAY_JOB_ID": request.param} if request.param else {})
    with ExitStack() as stack:

        def run(program, *arguments):
            started = [sys.executable, "-c", program, *arguments, *command]
            process = stack.enter_context(
                subprocess.Popen(started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            )
            stack.callback(process.kill)
            return process

        yield run


def next_process(run):
    """Return the process whose number a program prints next."""
    return psutil.Process(int(run.stdout.readline()))


def wait_gone(process):
    """Wait until a process is gone, which may be another's to wait for."""
    try:
        process.wait(timeout=20)
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def test_worker_when_who_started_the_server_is_killed_then_it_ends_too(lasting):
    run = lasting(RUN_ON)
    worker = next_process(run)

    run.kill()

    wait_gone(worker)


def test_server_when_the_program_begins_again_then_it_serves_on_and_its_workers_are_gone(lasting):
    run = lasting(BEGIN_AGAIN, "same")
    server, worker = next_process(run), next_process(run)
    print(file=run.stdin, flush=True)

    next_server, next_worker = next_process(run), next_process(run)

    assert next_server == server
    wait_gone(worker)
    assert next_worker.is_running()
    run.kill()
    wait_gone(next_worker)
    wait_gone(server)


def test_server_when_the_package_was_edited_meanwhile_then_another_one_is_started(lasting):
    run = lasting(BEGIN_AGAIN, "edited")
    server, worker = next_process(run), next_process(run)
    print(file=run.stdin, flush=True)

    next_server = next_process(run)

    assert next_server.pid != server.pid
    wait_gone(worker)
    wait_gone(server)


def test_server_when_an_import_leaves_a_thread_then_it_says_so_and_ray_starts_the_workers(start):
    said, complained = start("loaded busy", "--language=PYTHON")

    assert said.startswith("anew")
    assert "no fork server: threads run after the imports" in complained


def test_server_when_an_import_brings_ray_then_it_says_so_and_ray_starts_the_workers(start):
    said, complained = start("ray", "--language=PYTHON")

    assert said.startswith("anew")
    assert "no fork server: Ray was imported" in complained


def test_worker_of_a_job_when_ordered_then_it_is_a_copy_of_the_one_that_has_ray(start, monkeypatch):
    monkeypatch.setenv("RAY_JOB_ID", "01000000")

    said, complained = start("loaded", "--language=PYTHON")

    assert said.startswith("copy [] True")
    assert complained == ""


def test_workers_when_of_the_same_job_of_another_ray_then_they_are_copies_of_another_process(tmp_path):
    (tmp_path / "parent_worker.py").write_text(PARENT)
    worker = f"{sys.executable} {WORKER_FILE} {tmp_path}/parent_worker.py --language=PYTHON"
    orders = "; ".join(f"RAY_JOB_ID=01000000 RAY_RAYLET_PID={raylet} {worker}" for raylet in (7, 8, 7))

    done = subprocess.run(
        [sys.executable, "-c", RUN, "json", "sh", "-c", orders], capture_output=True, text=True, check=True, timeout=60
    )

    told = [line.split() for line in done.stdout.split("\n") if line]
    parents = {raylet: {parent for of, parent in told if of == raylet} for raylet in "78"}
    assert [len(told), len(parents["7"]), len(parents["8"])] == [3, 1, 1], done.stderr
    assert parents["7"] != parents["8"]


def test_modules_when_imported_then_all_are_there_and_the_process_may_be_copied(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["[] False ''", "[] ''"], done.stderr
