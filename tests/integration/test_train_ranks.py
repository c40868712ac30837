"""Two processes train one model, as `torchrun` starts them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_sources import TINY_SIZES

from stormline.models.training.ranks import Ranks
from stormline.models.training.recipe import recipe_from_dict
from stormline.models.training.trainer import Trainer

SEE = {"name": "see", "task": "places", "train": ["vision_tower"], "steps": 3, "batch": 4, "clip_frames": 2}
SPEAK = {
    "name": "speak",
    "task": "text",
    "train": ["language_model"],
    "steps": 2,
    "batch": 2,
    "clip_frames": 8,
    "window_chunks": [2],
    "cached_streams": 2,
}


def recipe(*stages):
    return {"name": "tiny", "seed": 1, "model": TINY_SIZES, "stages": list(stages)}


@pytest.mark.timeout(240)
def test_train_when_two_processes_share_the_batches_then_the_model_of_one(tmp_path):
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(recipe(SEE, SPEAK)))
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = ["stormline.pipeline", "train", "both.yaml", "--out", "two", "--device", "cpu", "--threads", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*two, *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)

    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model in two/model") == 1
    alone = Trainer(recipe_from_dict(recipe(SEE)), tmp_path / "one", device="cpu")
    start = {name: p.detach().clone() for name, p in alone.model.named_parameters()}
    alone.run()
    one, both = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))

    def apart(a, b, part):
        return torch.cat([(a[name] - b[name]).flatten() for name in start if name.startswith(part)]).norm()

    # Each process weighs the places of its own clips, so it is not quite the same step; half the batch is 0.7 apart.
    assert apart(one, both, "vision_tower") < 0.5 * apart(one, start, "vision_tower")
    assert apart(both, start, "language_model") > 0


def test_trainer_when_the_processes_do_not_divide_a_batch_then_says_so(tmp_path):
    with pytest.raises(ValueError, match="a batch of 4 for 3 processes; expected a multiple of 3"):
        Trainer(recipe_from_dict(recipe(SEE)), tmp_path, device="cpu", ranks=Ranks(0, 3))
