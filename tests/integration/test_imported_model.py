"""A small imported model, through the whole of `stormline run`, `stormline archive` and `stormline ask`."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pyarrow.dataset as ds
import pytest
from archive_clips import write_clip
from kafka.admin import KafkaAdminClient, NewTopic
from lane_runs import run_until_idle, run_within
from ray import serve
from small_sources import save_source
from typer.testing import CliRunner

from stormline.models.loading import load_model
from stormline.operators.decode import decode_file
from stormline.operators.rows import SegmentMeta
from stormline.operators.sampling import GridSpec
from stormline.pipeline.archive.feed import ArchiveFeed, ArchiveOptions
from stormline.pipeline.cli import app
from stormline.pipeline.publish.publisher import publish_source
from stormline.pipeline.serving import LLM_APP
from stormline.pipeline.settings import Settings
from stormline.pipeline.supervisor import Supervisor
from stormline.pipeline.video_llm import VideoLLM

RUN_LIMIT_S = 240  # of each of two runs: on a busy machine a start alone takes a minute
START_NS = 1_700_000_000_000_000_000


def deploy_llm(settings: Settings) -> None:
    """Put another model in the place of the session's; returns when it answers."""
    llm = VideoLLM.options(ray_actor_options={"num_cpus": 0.5})
    serve.run(llm.bind(settings.model, settings.llm), name=LLM_APP, route_prefix=None)


def archive(settings: Settings, source: Path) -> None:
    """Archive a folder to its end."""
    feed = ArchiveFeed(settings.output.path, ArchiveOptions([str(source)]), lambda text: None)
    supervisor = Supervisor(settings, lambda text: None, archive=feed)
    run_within(supervisor, RUN_LIMIT_S)


def rows_of(settings: Settings, table: str) -> list[dict[str, Any]]:
    return ds.dataset(settings.output.path / table, format="parquet").to_table().to_pylist()


@pytest.mark.timeout(600)
def test_imported_model_when_run_and_archived_and_asked_then_as_any_other(broker, services, make_settings, tmp_path):
    save_source("internvl", tmp_path / "tiny-internvl")
    imported = CliRunner().invoke(app, ["import", str(tmp_path / "tiny-internvl"), str(tmp_path / "storm")])
    assert imported.exit_code == 0, imported.output
    admin = KafkaAdminClient(bootstrap_servers=broker)
    admin.create_topics([NewTopic(name="imported", num_partitions=1, replication_factor=1)])
    admin.close()
    publish_source("shapes:?seed=5&size=64&fps=8&duration=9", bootstrap=broker, topic="imported", stream_id="shapes",
                   session="s", speed=0, start_ns=START_NS, segment_s=1.0)  # fmt: skip
    settings = make_settings("imported", "out", f"model.path={tmp_path / 'storm'}")
    deploy_llm(settings)
    try:
        run_until_idle(settings, idle_s=1.0, limit_s=RUN_LIMIT_S)

        tokens = rows_of(settings, "tokens")
        results = [row for row in rows_of(settings, "results") if row["query_id"] == "caption"]
        config = load_model(tmp_path / "storm", device="cpu").model.config
        assert {(row["token_count"], row["token_dim"]) for row in tokens} == {(config.n_tokens(4), config.d_model)}
        assert len(tokens) == 5  # of 18 frames: four chunks and a short one
        assert np.isfinite([row["tokens"] for row in tokens]).all()
        assert [row["start_time"] for row in results] == sorted(row["start_time"] for row in results)
        assert len(results) == 3  # windows of 4 s
        assert {row["model"] for row in tokens + results} == {"tiny-internvl"}

        asked = ["ask", "shapes", "What moves?", "--last", "10s", "--max-tokens", "6"]
        answered = CliRunner().invoke(app, [*asked, "--url", services.url, "--key", services.key])
        assert answered.exit_code == 0, answered.output
        with openai.OpenAI(base_url=f"{services.url}/v1", api_key=services.key, timeout=60) as client:
            assert [model.id for model in client.models.list()] == ["tiny-internvl", "stormline"]

        write_clip(tmp_path / "videos" / "clip.mp4", 9)
        archived = make_settings("imported", "archived", f"model.path={tmp_path / 'storm'}")
        archive(archived, tmp_path / "videos")
        whole = decode_file(
            tmp_path / "videos" / "clip.mp4",
            SegmentMeta("clip", "s", 0, 0, 0, "", True, 0, "t", 0, 0, 0, 0),
            grid=GridSpec(Fraction(2)),
            frame_hw=(config.image_size, config.image_size),
        )
        expected = load_model(tmp_path / "storm", device="cpu").model.encode_clip(whole.frames[:-1])
        tokens = sorted(rows_of(archived, "tokens"), key=lambda row: row["chunk_index"])
        found = np.concatenate([np.asarray(row["tokens"], np.float16).reshape(-1, config.d_model) for row in tokens])
        np.testing.assert_array_equal(found, expected.numpy())
        results = [row for row in rows_of(archived, "results") if row["query_id"] == "caption"]
        assert len(results) == 3
        assert {row["model"] for row in tokens + results} == {"tiny-internvl"}
    finally:
        deploy_llm(make_settings("imported"))
