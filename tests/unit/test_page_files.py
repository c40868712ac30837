"""The page's files: there without a key, and unable to load or run anything but themselves."""

import re

import pytest
from starlette.testclient import TestClient

from stormline.pipeline.front.access import hash_key
from stormline.pipeline.front.answering import Answerer
from stormline.pipeline.front.app import Backend, build_app
from stormline.pipeline.front.page_files import FILES, FOLDER
from stormline.pipeline.settings import ServeSettings
from stormline.pipeline.token_files import TokenFiles
from stormline.pipeline.token_source import TokenSource

from .test_front import EchoLlm, MemoryStore

SOURCES = {name: (FOLDER / name).read_text() for name, _ in FILES.values()}


@pytest.fixture
def client(tmp_path):
    limits = ServeSettings.model_validate({"keys": [hash_key("sk-right")]})
    source = TokenSource(TokenFiles(tmp_path), MemoryStore())
    app = build_app(Backend(Answerer(source, EchoLlm(), limits), source, tmp_path, limits))
    return TestClient(app, base_url="http://localhost")


@pytest.mark.parametrize("path", FILES)
def test_page_when_there_are_keys_then_its_files_need_none_and_allow_nothing_from_elsewhere(client, path):
    answer = client.get(path)

    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert client.get("/v1/streams").status_code == 401


def test_page_when_looked_through_then_every_file_is_served_and_none_is_missing():
    assert {file.name for file in FOLDER.iterdir()} == set(SOURCES)
    named = re.findall(r'(?:src|href)="([^"#]+)"', SOURCES["index.html"])
    assert named
    assert {f"/{name}" for name in named} <= FILES.keys()
    for name, source in SOURCES.items():
        if name.endswith(".js"):
            assert {f"/page/{other}" for other in re.findall(r'from "\./([^"]+)"', source)} <= FILES.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_page_when_looked_through_then_no_html_from_text_and_nothing_from_elsewhere(name):
    source = SOURCES[name].replace("http://www.w3.org/2000/svg", "")

    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "http://",
        "https://",
        "//cdn",
    ):
        assert word not in source
    assert not re.search(r"\son\w+=|style=|javascript:", source)
