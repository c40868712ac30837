"""A folder of videos from end to end: against its slowest stage alone, a plain loop, and Ray Data's `read_videos`.

    python benchmarks/archive.py [--videos 16] [--rounds 2]

Real videos of a minute (a street at 640 x 272, a cartoon at 1280 x 720, H.264, 25 fps), the default model, a caption
for every 30 s, tokens kept. All in one run and in turns:

    decode       PyAV decoding and resizing on the same grid, nothing around it, in one process
    decode on all cores   the same in a process for each core: the limit of any way that decodes every frame
    needed on all cores   likewise our own decoding, which leaves out what the grid does not need
    encode       the model's encoder over frames that lie in memory, one thread, as in a lane
    llm          the captions of the same windows, as the deployment writes them
    stormline    `stormline archive`
    loop, read_videos   `archive_peers.py`

Each whole way is run over one short video, too; that is its start-up, and speed and CPU are told without it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pyarrow.dataset as ds
import ray
import torch
from archive_peers import CHUNK_FRAMES, FPS, MAX_NEW_TOKENS, Watcher, bare_frames, describe, windows_of
from measuring import CpuLog

from stormline.operators.decode import decode_file
from stormline.operators.rows import SegmentMeta
from stormline.operators.sampling import GridSpec
from stormline.pipeline.commands.demo import street_video

RESULT = Path(__file__).parent / "results" / "archive.json"
SIDE_PX = 64  # of the default model
VIDEO_S = 60
LOOK_S = 0.2
SHORT_S = 2  # of the video that start-up is measured with
GOAL_OF_SLOWEST_STAGE = 0.8


def write_repeated(source: Path, target: Path, seconds: int) -> None:
    """Write a video of exactly so long, by repeating the packets of a short one."""
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        assert stream.average_rate is not None
        packets = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in container.demux(stream) if p.size]
        ticks = round(len(packets) / stream.average_rate / stream.time_base)
        with av.open(str(target), "w") as out:
            copy = out.add_stream_from_template(stream)
            n_left, turn = round(seconds * stream.average_rate), 0
            while n_left > 0:
                for data, pts, dts, is_key in packets[:n_left]:
                    packet = av.Packet(data)
                    packet.pts, packet.dts = (pts or 0) + turn * ticks, (dts or 0) + turn * ticks
                    packet.time_base, packet.is_keyframe, packet.stream = stream.time_base, is_key, copy
                    out.mux(packet)
                n_left, turn = n_left - len(packets), turn + 1


def make_videos(folder: Path, n: int, seconds: int) -> None:
    """Fill a folder: three streets, then a cartoon, and so on."""
    folder.mkdir()
    street = street_video()
    cartoon = street.with_name("bigbuckbunny.mp4")
    for i in range(n):
        write_repeated(cartoon if i % 4 == 3 else street, folder / f"{i:03}.mp4", seconds)


def decode_one(path: str) -> int:
    """Return how many frames a video gives."""
    return sum(1 for _ in bare_frames(path, SIDE_PX))


def decode_needed(path: str) -> int:
    """Return how many frames a video gives, of which only the needed ones are decoded."""
    meta = SegmentMeta("bench", "s", 0, 0, 0, "", True, 0, "bench", 0, 0, 0, 0)
    return len(decode_file(path, meta, grid=GridSpec(Fraction(FPS)), frame_hw=(SIDE_PX, SIDE_PX)).grid_indices)


def decode_alone(pool: Any, files: list[str], decode: Callable[[str], int] = decode_one) -> float:
    """Return the seconds that a pool takes to decode and resize, each of its processes a video at a time."""
    began_s = time.perf_counter()
    counts = pool.map(decode, files, chunksize=1)
    took_s = time.perf_counter() - began_s
    assert all(abs(n - VIDEO_S * FPS) <= 1 for n in counts), counts
    return took_s


def encode_alone(watcher: Watcher, images: list, n_videos: int) -> tuple[float, list]:
    """Return the seconds that the encoder takes, and a video's chunks."""
    began_s = time.perf_counter()
    chunks = []
    for _ in range(n_videos):
        watcher.begin("")
        chunks = [c for image in images if (c := watcher.take(image))]
    return time.perf_counter() - began_s, chunks


def llm_alone(watcher: Watcher, chunks: list, n_videos: int) -> float:
    """Return the seconds that all captions take, eight at a time."""
    began_s = time.perf_counter()
    describe(watcher.loaded, windows_of(chunks) * n_videos)
    return time.perf_counter() - began_s


def command_of(way: str, folder: Path, out: Path) -> list[str]:
    """Return a way's command."""
    if way == "stormline":
        return [sys.executable, "-m", "stormline.pipeline", "archive", str(folder), "--out", str(out)]
    return [sys.executable, str(Path(__file__).with_name("archive_peers.py")), way, str(folder), str(out)]


@dataclass(frozen=True)
class Took:
    """What a way took, from its start to its end."""

    wall_s: float
    parts_s: dict[str, float]  # CPU seconds of its processes: what other work on the machine says least in

    @property
    def cpu_s(self) -> float:
        return sum(self.parts_s.values())

    def __sub__(self, other: Took) -> Took:
        parts_s = {part: s - other.parts_s.get(part, 0.0) for part, s in self.parts_s.items()}
        return Took(self.wall_s - other.wall_s, parts_s)


def whole(way: str, folder: Path, out: Path, ray_folder: Path) -> Took:
    """Run a way over a folder."""
    shutil.rmtree(out, ignore_errors=True)
    environ = {**os.environ, "RAY_TMPDIR": str(ray_folder), "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    began_s = time.perf_counter()
    cpu = CpuLog()
    with out.with_suffix(".log").open("w+") as log:
        ran = subprocess.Popen(command_of(way, folder, out), env=environ, stdout=log, stderr=subprocess.STDOUT)
        while ran.poll() is None:
            cpu.look(ran.pid)
            time.sleep(LOOK_S)
        log.seek(0)
        if ran.returncode:
            raise SystemExit(f"{way} ended with {ran.returncode}:\n{log.read()[-3000:]}")
    return Took(time.perf_counter() - began_s, cpu.seconds())


def rows_written(way: str, out: Path) -> tuple[int, int]:
    """Return the chunks and captions that a way wrote."""
    if way == "stormline":
        return ds.dataset(out / "tokens").count_rows(), ds.dataset(out / "results").count_rows()
    if way == "loop":
        kinds = [list(out.glob(f"*.{kind}.parquet")) for kind in ("tokens", "captions")]
        return ds.dataset(kinds[0]).count_rows(), ds.dataset(kinds[1]).count_rows()
    table = ds.dataset(out, format="parquet").to_table(columns=["caption"]).column("caption").to_pylist()
    return len(table), sum(bool(text) for text in table)


def medians(series: list[Took]) -> Took:
    """Return the median of each."""
    parts = {part for took in series for part in took.parts_s}
    parts_s = {part: statistics.median(took.parts_s.get(part, 0.0) for took in series) for part in parts}
    return Took(statistics.median(t.wall_s for t in series), parts_s)


def startup_spread_s(startup: list[Took], took: list[Took]) -> float:
    """Return the least seconds of work that start-up does not hide: a quarter of the whole, or how much it varies."""
    walls = [one.wall_s for one in startup]
    return max(max(walls) - min(walls), statistics.median(one.wall_s for one in took) / 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default="stormline,loop,read_videos")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    n_cores, ways = os.cpu_count() or 1, options.ways.split(",")
    video_s = options.videos * VIDEO_S
    stages = ("decode", "decode on all cores", "needed on all cores", "encode", "llm")
    alone: dict[str, list[float]] = {stage: [] for stage in stages}
    startup: dict[str, list[Took]] = {way: [] for way in ways}
    took: dict[str, list[Took]] = {way: [] for way in ways}
    load = [os.getloadavg()[0]]
    watcher = Watcher(1)
    assert watcher.side_px == SIDE_PX
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as name:
        folder, short, out, ray_folder = (Path(name) / part for part in ("videos", "short", "out", "ray"))
        ray_folder.mkdir()
        make_videos(folder, options.videos, VIDEO_S)
        make_videos(short, 1, SHORT_S)
        files = [str(path) for path in sorted(folder.iterdir())]
        images = list(bare_frames(files[0], SIDE_PX))
        images += images[-1:] * (VIDEO_S * FPS - len(images))
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as one, context.Pool(n_cores) as all_cores:
            for pool in (one, all_cores):
                pool.map(decode_one, files[:1] * n_cores, chunksize=1)  # their imports
            for turn in range(options.rounds):
                alone["decode"].append(decode_alone(one, files))
                alone["decode on all cores"].append(decode_alone(all_cores, files))
                alone["needed on all cores"].append(decode_alone(all_cores, files, decode_needed))
                encode_s, chunks = encode_alone(watcher, images, options.videos)
                alone["encode"].append(encode_s)
                alone["llm"].append(llm_alone(watcher, chunks, options.videos))
                for way in ways:
                    startup[way].append(whole(way, short, out, ray_folder))
                    took[way].append(whole(way, folder, out, ray_folder))
                    rows, wanted = rows_written(way, out), (video_s * FPS // CHUNK_FRAMES, video_s // 30)
                    if rows != wanted:
                        raise SystemExit(f"{way} wrote {rows} chunks and captions, expected {wanted}")
                    print(f"round {turn + 1}: {way} {took[way][-1]}, start-up {startup[way][-1]}", flush=True)
                load.append(os.getloadavg()[0])
    speed = {name: video_s / statistics.median(series) for name, series in alone.items()}
    slowest = min(("decode", "encode", "llm"), key=lambda name: speed[name])
    work = {way: medians(took[way]) - medians(startup[way]) for way in ways}
    unclear = [way for way in ways if work[way].wall_s < startup_spread_s(startup[way], took[way])]
    if unclear:
        raise SystemExit(f"{', '.join(unclear)}: start-up takes most of the time; more --videos, or a quieter machine")
    stages_cpu_s = sum(video_s / speed[name] for name in ("decode", "encode", "llm"))
    report: dict[str, Any] = {
        "machine": f"{n_cores} cores, {platform.machine()}",
        "ray": ray.__version__,
        "torch": torch.__version__,
        "video_minutes": video_s // 60,
        "caption_every_s": 30,
        "max_new_tokens": MAX_NEW_TOKENS,
        "stages_alone_times_real_time": {name: round(x, 1) for name, x in speed.items()},
        "slowest_stage": slowest,
        "stages_cpu_s": round(stages_cpu_s, 1),
        "ways": {
            way: {
                "times_real_time": round(video_s / work[way].wall_s, 1),
                "with_startup_times_real_time": round(video_s / medians(took[way]).wall_s, 1),
                "startup_s": round(medians(startup[way]).wall_s, 1),
                "cpu_s": round(work[way].cpu_s, 1),
                "cpu_s_by_part": {part: round(s, 1) for part, s in sorted(work[way].parts_s.items())},
                "startup_cpu_s": round(medians(startup[way]).cpu_s, 1),
            }
            for way in ways
        },
        "goal_over_slowest_stage": GOAL_OF_SLOWEST_STAGE,
        "load_average": [round(x, 1) for x in load],
    }
    if "stormline" in ways:
        mine = work["stormline"]
        report["over_slowest_stage"] = round(video_s / mine.wall_s / speed[slowest], 2)
        for stage in ("decode on all cores", "needed on all cores"):
            report[f"over_{stage.replace(' ', '_')}"] = round(video_s / mine.wall_s / speed[stage], 2)
        report["stages_cpu_over_cpu"] = round(stages_cpu_s / mine.cpu_s, 2)
        report["faster_than"] = {w: round(work[w].wall_s / mine.wall_s, 2) for w in ways if w != "stormline"}
        report["cpu_of_others_over_cpu"] = {w: round(work[w].cpu_s / mine.cpu_s, 2) for w in ways if w != "stormline"}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
