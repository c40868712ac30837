"""What the interface's own description allows is asked of it; none of it may be an error of the service."""

import pytest
from hypothesis import HealthCheck, given, settings

from stormline.pipeline.front.answering import Answerer
from stormline.pipeline.front.app import Backend, build_app
from stormline.pipeline.settings import ServeSettings
from stormline.pipeline.token_files import TokenFiles
from stormline.pipeline.token_source import TokenSource

from .test_front import EchoLlm, MemoryStore
from .test_result_feed import Lanes

schemathesis = pytest.importorskip("schemathesis", reason="no schemathesis: pip install 'stormline[dev]'")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    out = tmp_path_factory.mktemp("served")
    Lanes(out).commit(3)
    limits = ServeSettings.model_validate({"token_budget": 64, "max_listeners": 0})  # events do not end
    source = TokenSource(TokenFiles(out), MemoryStore())
    return build_app(Backend(Answerer(source, EchoLlm(), limits, retry_wait_s=0), source, out, limits))


def test_description_when_read_then_it_has_bodies_parameters_and_errors(app):
    description = app.openapi()

    chat = description["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatBody")
    body = description["components"]["schemas"]["ChatBody"]
    assert {"messages", "stream", "seed", "token_policy"} <= body["properties"].keys()
    assert {"200", "400", "404", "413", "429", "503", "504"} <= chat["responses"].keys()
    assert {p["name"] for p in description["paths"]["/v1/events"]["get"]["parameters"]} == {
        "stream", "kind", "last-event-id", "after",
    }  # fmt: skip
    assert "422" not in str(description)  # the framework's own, which the service never gives


HOST = {"Host": "localhost"}
EXAMPLES = 25  # of each operation; with 400 it was clean, too


@pytest.fixture(scope="module")
def api(app):
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=HOST)


def test_interface_when_asked_whatever_it_describes_then_answers_as_described(api):
    checks = [
        schemathesis.checks.not_a_server_error,
        schemathesis.checks.status_code_conformance,
        schemathesis.checks.content_type_conformance,
        schemathesis.checks.response_schema_conformance,
    ]
    operations = [found.ok() for found in api.get_all_operations()]
    assert len(operations) >= 8

    for operation in operations:

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def ask(case):
            case.call_and_validate(headers=HOST, checks=checks)

        ask()
