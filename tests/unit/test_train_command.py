"""`stormline train`: what cannot work is said before hours of training, not after them."""

import pytest
import torch
from typer.testing import CliRunner

from stormline.models.training.trainer import Trainer
from stormline.operators.errors import SettingsError
from stormline.pipeline.cli import app


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*args):
        raise AssertionError("it trained")

    monkeypatch.setattr(Trainer, "run", refuse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{folder}/file"], "cannot write to {folder}/file: File exists"),
        (["--out", "{folder}/file/deeper"], "cannot write to {folder}/file/deeper: Not a directory"),
        (["--out", "{folder}/new", "--device", "nope"], "device is 'nope'; expected 'auto', 'cpu'"),
    ],
)
def test_train_when_it_could_not_work_then_refused_before_it_trains(options, message, no_training, tmp_path):
    (tmp_path / "file").write_text("mine")
    options = [option.format(folder=tmp_path) for option in options]

    run = CliRunner().invoke(app, ["train", *options, "--threads", str(torch.get_num_threads())])

    assert isinstance(run.exception, SettingsError)
    assert message.format(folder=tmp_path) in str(run.exception)
