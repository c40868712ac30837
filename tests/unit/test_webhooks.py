import pytest

from stormline.pipeline.delivery import result_id, routes_of
from stormline.pipeline.query_registry import QueryRegistry
from stormline.pipeline.query_settings import Query
from stormline.pipeline.webhooks import DeliveryError, sign


def test_signature_when_made_then_that_of_the_specifications_example():
    signature = sign(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    )

    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_signature_when_the_secret_is_not_as_it_says_then_said_without_it():
    with pytest.raises(DeliveryError, match="no base64 after whsec_") as raised:
        sign("whsec_hunter2!", "id", 1, b"")

    assert "hunter2" not in str(raised.value)


def row(**fields):
    names = ("query_id", "kind", "alert", "stream_id", "session", "start_time", "end_time")
    return {name: name for name in names} | fields


def test_result_id_when_the_row_is_the_same_then_the_same_and_else_another():
    assert result_id(row()) == result_id(row(answer="said otherwise the second time"))
    assert len({result_id(row()), *(result_id(row(**{name: "other"})) for name in row())}) == 8


def test_routes_when_only_a_querys_question_changes_then_the_same_and_with_other_sinks_new_ones(tmp_path):
    registry = QueryRegistry(tmp_path)
    hook = {"webhook": {"url": "https://example.org/a"}, "kafka": {"topic": "alerts"}}

    def asked(**fields):
        return Query.model_validate({"id": "q", "sinks": hook, **fields})

    registry.add(asked())
    registry.add(Query.model_validate({"id": "quiet"}))
    before = routes_of(registry.stored())
    registry.replace(asked(prompt="Else?"))
    same = routes_of(registry.stored())
    registry.replace(asked(sinks={"webhook": {"url": "https://example.org/b"}}))
    other = routes_of(registry.stored())

    assert [(r.query_id, r.kind, r.target) for r in before] == [
        ("q", "webhook", "https://example.org/a"),
        ("q", "kafka", "alerts"),
    ]
    assert same == before
    assert [r.target for r in other] == ["https://example.org/b"]
