"""README's table of measurements, made from `results/*.json`: no figure stands there that was not measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- made by `make bench` -->\n", "<!-- until here -->\n"
PROFILES_NAME = "profiles.md"
PROFILES = {"spent_on": "{:.0%}", "cpu_ms_a_row": "{:.1f} ms", "cpu_s_by_part": "{:.1f} s"}  # key of a result: unit
Rows = Iterator[tuple[str, str, str]]  # what was measured, what came out, the goal or limit


def of_scan(d: dict[str, Any]) -> Rows:
    """One row for the scan by itself and one for the layer, at STORM's size and at the built-in model's."""
    cases = ("STORM's vision width, 4 frames", "STORM's vision width, 1 frame of a live stream")
    for part in ("scan", "layer"):
        told = [d[part][case] for case in cases]
        faster = " and ".join(f"{each['over transformers']:.1f}" for each in told)
        trains = " and ".join(f"{each['training, over transformers']:.1f}" for each in told)
        share = " and ".join(f"{each['of its matrix products']:.0%}" for each in told)
        what = "Mamba-2 scan alone" if part == "scan" else "whole Mamba-2 layer, whose projections are alike"
        yield (
            f"{what}, width 1152, 4 frames and 1 frame of 256 tokens, state in and out: over transformers' own",
            f"{faster} times; training {trains}",
            f"5 times, training 3; {share} of the speed of its matrix products alone (60 %)",
        )
    told = [d["scan"][f"the built-in model, a chunk of {of}"] for of in ("a stream", "each of 8 streams")]
    default, best, train, train_best = (
        " and ".join(f"{each[f'{what}over transformers{at}']:.{digits}f}" for each in told)
        for what, at, digits in (
            ("", "", 0),
            ("", " at its best block", 1),
            ("training, ", "", 0),
            ("training, ", " at its best block", 1),
        )
    )
    yield (
        "Mamba-2 scan of the built-in model, 16 places over 4 frames, of a stream and of 8: over transformers' own",
        f"{default} times; training {train}",
        f"with the block of tokens that suits transformers best {best}, training {train_best} times",
    )


def of_encode(d: dict[str, Any]) -> Rows:
    """The encoder's own speed."""
    one = d["streams"]["1"]
    share, gain = one["of its matrix products"], d["streams"]["32"]["a batch over one by one"]
    yield (
        "encoder of the built-in model: live streams at 2 fps that one core encodes",
        f"{one['live_streams_a_core']:.0f} ({one['chunk_ms']:.1f} ms a chunk of 2 s)",
        f"{share:.0%} of its matrix products alone; 32 streams as one batch: {gain:.2f} times",
    )
    if told := d.get("captions"):
        yield (
            f"a caption of {', '.join(told)} frames by the built-in model, from tokens to text",
            f"{', '.join(str(round(each['caption_ms'])) for each in told.values())} ms median",
            f"500 ms; the longest {max(each['longest_ms'] for each in told.values()):.0f}",
        )


def of_lane(d: dict[str, Any]) -> Rows:
    """One lane on all cores."""
    yield (
        "one lane without a model, segments of 1 s decoded from 640×272",
        f"{d['lane_rows_per_s']:.0f} rows a second",
        f"{d['goal_rows_per_s']}; {d['lane_over_decode_limit']:.0%} of decoding alone on all cores",
    )
    if m := d.get("with_model"):
        yield (
            "one lane with the built-in model: live streams it keeps up with",
            f"{m['live_streams']:.0f}",
            f"{m['lane_over_limit']:.0%} of decoding and encoding alone on all cores",
        )


def of_flat(d: dict[str, Any]) -> Rows:
    """What length costs."""
    last = max(map(int, d["chunk_ms"]))
    anew = next(value for key, value in d.items() if key.startswith("encode the newest"))
    yield (
        f"a stream's chunk {last:,} against its 10th: {', '.join(d['last_over_first'])}",
        ", ".join(f"{ratio:.2f}" for ratio in d["last_over_first"].values()) + " times",
        f"{d['goal_last_over_first']}; encoding the newest 128 frames anew costs {anew['over ours']:.0f} times as much",
    )


def of_gpu(d: dict[str, Any]) -> Rows:
    """STORM's headline."""
    told = {each["frames"]: each for each in d["headline"]}
    faster = "; ".join(" and ".join(f"{f:.1f}" for f in told[n]["faster"]) for n in (128, 256))
    paper = "; ".join(" and ".join(f"{f:.1f}" for f in told[n]["faster_in_the_paper"]) for n in (128, 256))
    yield (
        f"from 128; 256 frames to 16 words with 4 and 8 times fewer tokens, a small random model ({d['device']})",
        f"{faster} times as fast",
        f"STORM's paper, a 7B model on one A100: {paper}",
    )


def of_llm(d: dict[str, Any]) -> Rows:
    """The language model by itself."""
    own, same = d["each its own video"], d["the same video"]
    yield (
        "answers of 8 to 48 tokens about video, 1, 4 and 16 at once: tokens a second over `generate` one by one",
        ", ".join(f"{own[n]['over one by one']:.1f}" for n in ("1", "4", "16")) + " times",
        "about the same video: " + ", ".join(f"{same[n]['over one by one']:.1f}" for n in ("1", "4", "16"))
        + f"; 16 over static batches of {d['static_batch']}: {own['16']['over static batches']:.1f}",
    )  # fmt: skip


def of_kafka_source(d: dict[str, Any]) -> Rows:
    """The source by itself."""
    told = d["messages"]
    yield (
        f"Kafka source, messages of {', '.join(told)}: against a bare poll loop",
        ", ".join(f"{each['ours_over_bare']:.2f}" for each in told.values()),
        f"{d['goal_ours_over_bare']}; over `ray.data.read_kafka` without its start: "
        + ", ".join(f"{each['ours_over_ray_without_its_start']:.1f}" for each in told.values()),
    )
    yield "from sending a message to its row", f"{d['latency_ms']['p50']:.0f} ms median", "a poll waits 50 ms at most"


CODEC_NAMES = {"h264": "H.264", "hevc": "HEVC", "vp9": "VP9", "av1": "AV1"}


def of_decode(d: dict[str, Any]) -> Rows:
    """Decoding by itself."""
    ratios = [each["ours_over_bare"] for each in d["segments"].values()]
    all_frames = [each["ours_all_over_bare"] for each in d["segments"].values()]
    codecs = dict.fromkeys(CODEC_NAMES[name.rpartition(", ")[2]] for name in d["segments"])
    yield (
        f"decoding to sampled frames, {', '.join(codecs)} at two sizes: against bare PyAV",
        f"{min(ratios):.1f} to {max(ratios):.1f} times",
        f"{d['goal_ours_over_bare']}; {min(all_frames):.2f} to {max(all_frames):.2f} where no frame is left out",
    )


MOTION_KINDS = ("direction", "size change", "stop or start", "speed", "moves", "motion")
OTHER_VARIANTS = {
    "unpooled": "not pooled over time, four times the tokens (at 128 frames as many: 512 at most)",
    "unpooled, tokens of full": "the same, as many tokens as pooled ones",
    "both-ways": "a backward scan in each chunk, too",
    "pooled-2x2": "2 × 2 places pooled, too, a quarter of the tokens",
}


def of_ablation(d: dict[str, Any]) -> Rows:
    """What the temporal encoder and pooling are worth."""
    of = {name: variant["lengths"] for name, variant in d["variants"].items()}
    lengths = tuple(of["full"])
    steps = sum(stage["steps"] for stage in d["stages"])
    alike = f"after the same {steps:,} steps, on the same clips"

    def shares(name: str) -> str:
        return ", ".join(f"{of[name][n]['order']:.0%}" for n in lengths)

    def of_motion(name: str) -> str:
        asked = [kinds for kinds in (of[name][n]["kinds"] for n in lengths) if kinds.keys() >= set(MOTION_KINDS)]
        return ", ".join(f"{sum(kinds[kind] for kind in MOTION_KINDS) / len(MOTION_KINDS):.0%}" for kinds in asked)

    yield (
        f"questions that need order, at {', '.join(lengths)} frames: with the temporal encoder; without it, {alike}",
        f"{shares('full')}; {shares('still')}",
        "20 points from 32 frames on; with every other chunk left out of the answer "
        f"{shares('full, one in two')}; {shares('still, one in two')}",
    )
    yield (
        f"those about motion alone ({', '.join(MOTION_KINDS)}), at 8 and 32 frames",
        f"{of_motion('full')}; {of_motion('still')}",
        "20 points",
    )

    def cost(n: str) -> str:
        return f"{100 * (of['unpooled'][n]['order'] - of['full'][n]['order']):.1f}"

    if "unpooled" in of:
        yield (
            "questions that need order, of other variants",
            "; ".join(f"{told}: {shares(name)}" for name, told in OTHER_VARIANTS.items() if name in of),
            f"pooling costs 2 points or less; here {', '.join(cost(n) for n in lengths)}",
        )


def of_short_ablation(d: dict[str, Any]) -> Rows:
    """The same after little training, for variants that were not trained longer."""
    of = {name: variant["lengths"] for name, variant in d["variants"].items()}
    lengths = ("8", "32")  # after so little it is chance at more

    def shares(name: str) -> str:
        return ", ".join(f"{of[name][n]['order']:.0%}" for n in lengths)

    names = [name for name in OTHER_VARIANTS if name in of]
    minutes = d["variants"]["full"]["train_seconds"] / 60
    asked = f"questions that need order, at {' and '.join(lengths)} frames after {minutes:.0f} minutes of training"
    yield (
        f"{asked}: as it is; " + "; ".join(OTHER_VARIANTS[name] for name in names),
        "; ".join(shares(name) for name in ("full", *names)),
        "",
    )


def of_soak(d: dict[str, Any]) -> Rows:
    """Minutes of live streams."""
    yield (
        f"{d['streams']} live streams, {d['minutes']:.0f} minutes: from Kafka to the token store; to a committed row",
        f"{d['pushed_p50_ms'] / 1e3:.2f} s median, {d['pushed_p95_ms'] / 1e3:.2f} s for 95 %; "
        f"{d['committed_p50_ms'] / 1e3:.1f} and {d['committed_p95_ms'] / 1e3:.1f} s",
        f"a commit every {d['barrier_interval_s']:.0f} s",
    )
    if "proportional" in d:
        whole, each = d["proportional"], [p["proportional_slope_mb_per_h"] for p in d["processes"].values()]
        yield (
            "memory of that whole job, pages that forked workers share counted once: after five minutes, at the end",
            f"{whole['settled_mb'] / 1e3:.2f} and {whole['at_the_end_mb'] / 1e3:.2f} GB; {whole['slope_mb_per_h']:.0f} "
            f"MB/h, {whole['second_half_slope_mb_per_h']:.0f} in the second half; {min(each):.0f} to {max(each):.0f} "
            "in each process",
            f"{d['restarts']} restarts",
        )
    elif "all" in d["memory"]:
        whole, lane = d["memory"]["all"], d["memory"]["lane"]
        yield (
            "memory of that whole job, Ray included, and of the lane's process: after the first minute, at the end",
            f"{whole['after_a_minute_mb'] / 1e3:.2f} and {whole['at_the_end_mb'] / 1e3:.2f} GB; "
            f"{lane['after_a_minute_mb']:.0f} and {lane['at_the_end_mb']:.0f} MB",
            f"{d['restarts']} restarts",
        )


def of_ask(d: dict[str, Any]) -> Rows:
    """Asking over HTTP."""
    yield (
        "a question about ten hours of a stream, against one about a minute: time to the first token, same budget",
        f"{d['ten_hours_over_one_minute']:.2f} times",
        f"{d['goal_ten_hours_over_one_minute']}",
    )
    one, eight = d["answers_per_s"]["one questioner"], d["answers_per_s"]["eight questioners"]
    yield (
        "eight people who ask without a pause, against one: answers of 24 tokens a second",
        f"{eight:.0f} and {one:.0f}",
        f"{d['goal_eight_over_one']:.0f} times; {d['eight_over_one']:.1f}",
    )
    load = d["first_token_under_load_ms"]
    yield (
        f"time to the first token about a stretch that nobody asked about before, beside {', '.join(load)} who ask on",
        ", ".join(f"{each['p50']:.0f}" for each in load.values()) + " ms median",
        "95 %: " + ", ".join(f"{each['p95']:.0f}" for each in load.values()) + " ms",
    )


def of_alerts(d: dict[str, Any]) -> Rows:
    """A standing alert."""
    p50, p95 = d["event_to_webhook_p50_s"], d["event_to_webhook_p95_s"]
    yield (
        f"an alert on the generated feed, windows of {d['window_s']:.0f} s: from the event's frame to the webhook",
        f"{p50:.1f} s median, {p95:.1f} s for 95 %",
        f"precision {d['precision']:.1%}, recall {d['recall']:.1%}",
    )


def of_archive_folder(d: dict[str, Any]) -> Rows:
    """A folder of all kinds of files, good and bad, in peace and under kills."""
    kills = sum(start["killed"] != "no" for start in d["starts_under_kills"])
    yield (
        f"an archive of {d['files']} files in {len(d['containers'])} containers and {len(d['codecs'])} codecs, "
        f"{kills} kills: rows that differ from a run in peace",
        str(len(d["differences"])),
        f"0; {d['states']['done']} done, {d['states']['failed'] + d['states']['damaged']} bad ones listed",
    )
    short, long = (d["memory"][key]["peak_mb"] / 1e3 for key in ("600 s", "7200 s"))
    yield (
        "memory of an archive's whole job, Ray and both models included, with a video of ten minutes and of two hours",
        f"{short:.2f} and {long:.2f} GB at most",
        "no growth with length",
    )


def of_compact(d: dict[str, Any]) -> Rows:
    """Few large files."""
    before, after = d["query_ms_before"], d["query_ms_after"]
    yield (
        f"DuckDB counts, and filters, {d['files_before'] // 2:,} commits before and after `stormline compact`",
        f"{before['count']:.0f} and {before['filter']:.0f} ms; {after['count']:.0f} and {after['filter']:.0f} ms",
        f"compacting took {d['compact_s']:.0f} s",
    )


def of_chaos(d: dict[str, Any]) -> Rows:
    """Kills."""
    yield (
        f"{d['faults']} kills, pauses and failed writes from {len(d['seeds'])} seeds: rows lost, doubled or other",
        str(d["rows_lost_doubled_or_other"]),
        "0",
    )
    kinds = ("annotate", "commit step 1 kill", "commit step 3 kill", "decoder", "encoder", "source")
    quiet, busy, earlier = (
        [told[kind]["next_row_s"]["median"] for kind in kinds if told.get(kind, {}).get("alone")]
        for told in (d["by_kind_quiet"], d["by_kind"], d["by_kind_without_fork_workers"])
    )
    yield (
        "a process of a lane killed: until the next committed row",
        f"{min(quiet):.1f} to {max(quiet):.1f} s",
        f"15 s; on a busy machine, too, {min(busy):.0f} to {max(busy):.0f} s, and {min(earlier):.0f} to "
        f"{max(earlier):.0f} s without `ray.fork_workers`",
    )


def of_starts(d: dict[str, Any]) -> Rows:
    """Kills after which everything starts again."""
    told = [kind["next_row_s"] for kind in d["by_kind"].values() if kind["alone"]]
    medians = [each["median"] for each in told]
    yield (
        "the supervisor, Ray or the machine killed: until the next committed row, by what died",
        f"{min(medians):.1f} to {max(medians):.1f} s median",
        f"15 s; the longest of {d['faults']}: {max(each['worst'] for each in told):.1f} s",
    )


def of_archive(d: dict[str, Any]) -> Rows:
    """A folder from end to end, against other ways."""
    mine, faster = d["ways"]["stormline"], d["faster_than"]
    yield (
        f"`stormline archive`, {d['video_minutes']} minutes of video, captions and tokens: speed without start-up",
        f"{mine['times_real_time']:.0f} times real time; {d['over_slowest_stage']:.2f} of its slowest stage alone "
        f"({d['slowest_stage']}, one process)",
        f"{d['goal_over_slowest_stage']}; a loop with PyAV and transformers {1 / faster['loop']:.2f}, `read_videos` "
        f"{1 / faster['read_videos']:.2f} of its speed; {d['over_decode_on_all_cores']:.2f} of decoding alone on all "
        "cores",
    )
    yield (
        "its start-up: Ray, Serve, two models",
        f"{mine['startup_s']:.0f} s",
        f"the loop's {d['ways']['loop']['startup_s']:.0f} s",
    )


ROWS: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "lane": of_lane,
    "soak": of_soak,
    "soak-8-streams": of_soak,
    "flat": of_flat,
    "ask": of_ask,
    "alerts": of_alerts,
    "chaos": of_chaos,
    "chaos-starts": of_starts,
    "compact": of_compact,
    "archive": of_archive,
    "archive_folder": of_archive_folder,
    "ablation": of_ablation,
    "ablation-quarter-hour": of_short_ablation,
    "encode": of_encode,
    "scan": of_scan,
    "decode": of_decode,
    "kafka_source": of_kafka_source,
    "llm": of_llm,
    "gpu-cpu-x86-64": of_gpu,
}


def lines() -> Iterator[str]:
    """Yield the table's lines, of the results that are there."""
    yield "| | measured | goal, limit or peer |"
    yield "|---|---|---|"
    for name, rows_of in ROWS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            for row in rows_of(json.loads(path.read_text())):
                yield f"| {' | '.join(row)} |"


def profiles() -> Iterator[str]:
    """Yield what each measurement's time goes to, of the results that tell."""
    yield "# What the time goes to"
    yield ""
    yield "Made by `make bench` beside the table in README. Shares are of a function's own time, by Python's profiler;"
    yield "what C does counts for the function that called it, and `acquire` is waiting for another thread."
    yield "CPU times are of processes, by what they are."
    for name in ROWS:
        path = RESULTS / f"{name}.json"
        found = list(_profiles_in(json.loads(path.read_text()))) if path.exists() else []
        if found:
            yield from ("", f"## {name}", "", "| | |", "|---|---|", *found)


def _profiles_in(told: dict[str, Any], where: tuple[str, ...] = ()) -> Iterator[str]:
    for key, value in told.items():
        if key in PROFILES:
            largest = sorted(value.items(), key=lambda item: -item[1])
            text = ", ".join(f"`{name}` {PROFILES[key].format(each)}" for name, each in largest)
            yield f"| {', '.join(where) or 'all'} | {text} |"
        elif isinstance(value, dict):
            yield from _profiles_in(value, (*where, key))


def write() -> None:
    """Put the table into README, between its two marks, and the profiles beside the results.

    Raises:
        ValueError: If README has not both of them.
    """
    text = README.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{README} has not the marks {BEGIN.strip()} and {END.strip()}, once each")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    (RESULTS / PROFILES_NAME).write_text("\n".join(profiles()) + "\n")
    README.write_text(before + BEGIN + "\n".join(lines()) + "\n" + END + after)


if __name__ == "__main__":
    write()
