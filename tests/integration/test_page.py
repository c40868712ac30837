"""The page in a real browser, over the real service: what a person sees and does."""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.request
from datetime import datetime, timedelta, timezone
from pathlib import Path
from urllib.parse import urlsplit

import av
import numpy as np
import pytest

from stormline.models.loading import load_model
from stormline.models.training.evaluate import stream_clip
from stormline.models.training.shapes import ShapesSpec, ShapesWorld
from stormline.operators.pictures import make_jpeg
from stormline.operators.rows import Chunk, LaneNews, Picture, Position, Result
from stormline.pipeline.front.page_files import FILES, FOLDER, HEADERS
from stormline.pipeline.parquet_sink import EpochWriter
from stormline.pipeline.query_registry import QueryRegistry
from stormline.pipeline.query_settings import Query
from stormline.pipeline.recovery import recover
from stormline.pipeline.serving import StoreClient

playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install 'stormline[dev]'")

S_NS = 10**9
IDENTITY = {"model": "m"}
HOSTILE = "<img src=x onerror=alert(1)>"
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
WAIT_MS = 30_000
SHOTS = os.environ.get("STORMLINE_SCREENSHOTS")  # a folder to keep pictures of the page in


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        own = Path(running.chromium.executable_path)
        path = own if own.exists() else shutil.which("chromium") or shutil.which("chromium-browser")
        if path is None:
            pytest.skip("no Chromium: `playwright install chromium`, or `apt-get install chromium`")
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Streams:
    """Two streams of a lane that goes on: chunks and pictures in the store, rows in the folder."""

    def __init__(self, root):
        recovery = recover(root, lanes=1, identity=IDENTITY)
        QueryRegistry(root).add(Query.model_validate({"id": "van", "kind": "alert", "prompt": "Is there a van?"}))
        frames = ShapesWorld(ShapesSpec(seed=3, size_px=64)).render_many(np.arange(32) / 2)
        self._tokens = [chunk.tokens for chunk in stream_clip(load_model(None, device="cpu"), frames)]
        self._writer = EpochWriter(recovery.for_lane(0, (("page", 0),)), model="m", identity=IDENTITY)
        self._now_s = int(time.time()) - 120
        self._offset = 0
        self.begin_s = self._now_s

    def go_on(self, seconds, *results):
        chunks, pictures = [], {}
        for seed, name in enumerate(("page-gate", HOSTILE)):
            for start_s in range(self._now_s, self._now_s + seconds, 2):
                tokens = self._tokens[start_s % len(self._tokens)]
                at_ns = start_s * S_NS
                chunks.append(Chunk(name, "s", start_s, at_ns, at_ns + 2 * S_NS, 0, 4, 0.5, "page", 0, 0, 0, tokens))
            image = ShapesWorld(ShapesSpec(seed=seed + 3, size_px=256)).render(float(self._offset))
            jpeg = make_jpeg(av.VideoFrame.from_ndarray(image, "rgb24"))
            pictures[name] = Picture((self._now_s + seconds) * S_NS, jpeg)
        self._offset += 1
        self._writer.commit(chunks=chunks, results=results, positions=[Position("page", 0, self._offset)], snapshots={})
        StoreClient()(LaneNews(tuple(chunks), pictures=pictures))
        self._now_s += seconds

    def result(self, kind, answer, stream="page-gate"):
        start_ns = (self._now_s - 10) * S_NS
        return Result("van" if kind == "alert" else "caption", kind, stream, "s", start_ns, start_ns + 10 * S_NS,
                      "?", answer, kind == "alert", 16, "recent", 1.0, "m", time.time_ns())  # fmt: skip


@pytest.fixture(scope="module")
def streams(services):
    made = Streams(services.out)
    made.go_on(100, made.result("caption", "an old caption"))
    return made


def open_page(browser, services, size, scheme="light", locale="en-GB", zone="UTC"):
    page = browser.new_page(viewport=size, color_scheme=scheme, timezone_id=zone, locale=locale)
    page.set_default_timeout(WAIT_MS)
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("dialog", lambda dialog: page.wrong.append(dialog.message))
    page.on("request", lambda r: None if r.url.startswith((services.url, "blob:")) else page.wrong.append(r.url))
    page.goto(services.url)
    return page


def give_key(page, key):
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use it").click()


def shot(page, name):
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


@pytest.mark.timeout(240)
def test_page_when_a_person_uses_it_then_everything_comes_without_reloading(browser, services, streams):
    expect = playwright.expect
    page = open_page(browser, services, DESKTOP)

    # A key is asked for, again where it is wrong, and kept for this tab alone.
    give_key(page, "sk-wrong")
    expect(page.get_by_text("this key is not known here")).to_be_visible(timeout=WAIT_MS)
    give_key(page, services.key)
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]

    # Streams appear, a hostile name as text, with their pictures.
    gate = page.get_by_role("button", name="page-gate")
    expect(gate.locator("img")).to_be_visible(timeout=WAIT_MS)
    expect(page.get_by_role("button", name=HOSTILE)).to_be_visible()
    expect(page.locator("#feed")).to_contain_text("an old caption")
    expect(page.locator("#connection")).to_have_text("connected")

    # A caption and an alert come by themselves, and the picture changes.
    picture = gate.locator("img").get_attribute("src")
    streams.go_on(4, streams.result("caption", f"a van {HOSTILE} comes"), streams.result("alert", "a van is there"))
    expect(page.locator("#feed li").first).to_contain_text("a van", timeout=WAIT_MS)
    expect(page.locator("#feed")).to_contain_text(HOSTILE)
    expect(page.locator("#alerts")).to_contain_text("page-gate: van")
    expect(page.locator("#feed .is-alert")).to_contain_text("a van is there")
    expect(gate.locator("img")).not_to_have_attribute("src", picture, timeout=WAIT_MS)

    # A question by keyboard alone; the range is the last ten minutes.
    gate.click()
    page.locator("body").press("/")
    page.keyboard.type("Describe what happens.")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.keyboard.press("Enter")
    assert url_of(asked.value) == "stream://page-gate?last=600s"
    answer = page.locator(".answer").first
    expect(answer.locator(".looked")).to_contain_text("tokens of page-gate", timeout=60_000)
    assert answer.locator(".text").inner_text()
    expect(gate).to_have_class("stream alerting")  # still, after some more lists of streams
    shot(page, "desktop")

    # The range picker changes what is asked: half of the last minute, by dragging, then by the keyboard.
    page.get_by_role("button", name="1 min").click()
    track = page.locator("#track").bounding_box()
    looked_up = []
    page.on("request", lambda request: looked_up.append(request.url) if "/captions" in request.url else None)
    page.mouse.move(track["x"] + track["width"] * 0.25, track["y"] + 20)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"] * 0.75, track["y"] + 20, steps=5)
    page.mouse.up()
    expect(page.locator("#range-text")).to_contain_text("(30 s)")
    assert looked_up == []  # what is shown stays the same
    page.get_by_label("End of the range").press("ArrowLeft")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_role("button", name="Ask", exact=True).click()
    assert url_of(asked.value).startswith("stream://page-gate?start=20")
    expect(page.locator(".answer").first.locator(".looked")).to_contain_text("tokens of page-gate", timeout=60_000)

    # A follow-up tells the model what was said before; the question after it does not.
    asked_first = "Describe what happens."
    said = page.locator(".answer").first.locator(".text").inner_text()
    page.get_by_role("button", name="Follow up").first.click()
    expect(page.locator("#following")).to_contain_text(asked_first)
    page.keyboard.type("And then?")
    for before in ([{"role": "user", "content": asked_first}, {"role": "assistant", "content": said}], []):
        with page.expect_request("**/v1/chat/completions") as asked:
            page.get_by_role("button", name="Ask", exact=True).click()
        assert asked.value.post_data_json["messages"][:-1] == before
        expect(page.locator(".answer").first.get_by_role("button", name="Follow up")).to_be_visible(timeout=60_000)
    assert page.wrong == []
    page.close()


@pytest.mark.parametrize(("locale", "zone"), [("en-US", "America/New_York"), ("de-DE", "Europe/Berlin")])
def test_page_when_times_are_told_then_the_viewers_own_but_of_an_archive_the_place_in_the_video(
    browser, services, locale, zone
):
    page = open_page(browser, services, DESKTOP, locale=locale, zone=zone)

    def clock(ms):
        return page.evaluate(f"import('/page/timeline.js').then(({{ clock }}) => clock({ms}))")

    midnight_ms = {"en-US": 1_769_835_600_000, "de-DE": 1_769_814_000_000}[locale]  # 2026-01-31, there
    assert clock(midnight_ms + 610_000).endswith("00:10:10")
    assert clock(610_000) == "00:10:10"
    assert clock(25 * 3600_000).endswith("01:00:00")  # the second day of a long one
    page.close()


def url_of(request):
    return url_in(request.post_data_json)


def url_in(question):
    (video, _) = question["messages"][-1]["content"]
    return video["video_url"]["url"]


def test_page_when_on_a_phone_in_the_dark_then_it_fits(browser, services, streams):
    page = open_page(browser, services, PHONE, "dark")
    give_key(page, services.key)
    playwright.expect(page.locator(".stream img").first).to_be_visible(timeout=WAIT_MS)

    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 20, 25)"
    shot(page, "phone")
    assert page.wrong == []
    page.close()


def test_events_when_a_listener_leaves_and_comes_again_then_it_misses_nothing(services, streams):
    first = listen(services, {})
    place = read_until(first, b"\n\n").split(b"id: ")[1].strip().decode()
    streams.go_on(2, streams.result("caption", "while it listens"))
    assert "while it listens" in read_until(first, b"while it listens").decode()
    first.close()
    streams.go_on(2, streams.result("caption", "while it is away"))

    again = listen(services, {"Last-Event-ID": place})
    heard = read_until(again, b"while it is away")
    again.close()

    assert heard.count(b"while it listens") == heard.count(b"while it is away") == 1


def listen(services, headers):
    request = urllib.request.Request(
        f"{services.url}/v1/events?stream=page-*", headers={"Authorization": f"Bearer {services.key}", **headers}
    )
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)


def read_until(response, mark):
    heard = b""
    while mark not in heard:
        line = response.readline()
        assert line, f"the events ended: {heard!r}"
        heard += line
    return heard


class StandIn:
    """Answers in the service's place: the page's own files, and what a test says of streams, results and questions."""

    URL = "http://stormline.test/"

    def __init__(self, browser, *, key=None):
        self.states, self.session, self.queries, self.span_s = (
            {"a": "live", "b": "live", "c": "live"},
            "1",
            ["smoke"],
            600,
        )
        self.key, self.fails, self.hold_events, self.events_status = key, False, False, 200
        self.hidden = []  # queries of which no event tells
        self.results = []  # what is listed, the oldest first
        self.asked = []  # questions; none is ever answered
        self._rows = []
        self._n_rows = 0
        self.page = browser.new_page(viewport=DESKTOP)
        self.page.set_default_timeout(WAIT_MS)
        self.wrong = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.route("**/*", self._answer)
        self.page.goto(self.URL)

    def say(self, stream, kind="caption", *, alert=False, session="1", answer="a van", query="smoke"):
        """Have a row come over the event stream; return it."""
        self._n_rows += 1
        row = _row(self._n_rows, stream, kind, alert=alert, session=session, answer=answer, query=query)
        self._rows.append(row)
        return row

    def card(self, stream):
        return self.page.locator(f".stream[data-stream={stream}]")

    def _answer(self, route):
        path = urlsplit(route.request.url).path
        if path in FILES:
            name, kind = FILES[path]
            route.fulfill(body=(FOLDER / name).read_bytes(), headers={**HEADERS, "Content-Type": kind})
        elif self.key and route.request.headers.get("authorization") != f"Bearer {self.key}":
            route.fulfill(status=401, json={"error": {"message": "no such key"}})
        elif path == "/v1/chat/completions":
            self.asked.append(route.request.post_data_json)
        elif path == "/v1/events" and self.events_status != 200:
            route.fulfill(status=self.events_status, json={})
        elif path == "/v1/events" and not self.hold_events:
            rows, self._rows = self._rows, []
            body = "".join(f"data: {json.dumps(row)}\n\n" for row in rows)
            route.fulfill(body=f"retry: 1000\nid: {self._n_rows}\n\n{body}", content_type="text/event-stream")
        elif path == "/v1/streams":
            listed = (
                {"status": 500, "json": {}} if self.fails else {"json": {"data": list(map(self._entry, self.states))}}
            )
            route.fulfill(**listed)
        elif path == "/v1/queries":
            queries = [{"id": name, "sinks": {"events": name not in self.hidden}} for name in self.queries]
            route.fulfill(json={"data": queries})
        elif path != "/v1/events":
            found = [row for row in self.results if path in ("/v1/results", f"/v1/streams/{row['stream_id']}/captions")]
            route.fulfill(json={"data": found})

    def _entry(self, name):
        entry = {"id": name, "state": self.states[name], "session": self.session, "lag_s": 0.1, "lag_records": 0}
        return {**entry, "first_time": _moment(-self.span_s), "last_time": _moment(0), "picture_time": None}


def _row(at_s, stream, kind="caption", *, alert=False, session="1", answer="a van", query="smoke"):
    """Return a result whose window begins so many seconds from now, as the service tells it."""
    row = {"query_id": query, "kind": kind, "stream_id": stream, "session": session, "answer": answer}
    return {**row, "alert": alert, "start_time": _moment(at_s), "end_time": _moment(at_s + 4)}


def _moment(seconds):
    """Return the time so many seconds from now, as the service tells it."""
    moment = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@pytest.fixture
def stand_in(browser):
    made = StandIn(browser)
    yield made
    assert made.wrong == []
    made.page.close()


def over_the_session(stand_in):
    stand_in.session = "2"


def over_the_stream(stand_in):
    stand_in.states["a"] = "ended"


def over_the_query(stand_in):
    stand_in.queries = ["another"]


def over_as_no_event_tells(stand_in):
    stand_in.hidden = ["smoke"]


def over_by_a_caption(stand_in):
    stand_in.say("a", session="2")


@pytest.mark.parametrize(
    "end", [over_the_session, over_the_stream, over_the_query, over_as_no_event_tells, over_by_a_caption]
)
def test_alert_when_what_it_was_of_is_over_then_its_stream_is_no_longer_marked(stand_in, end):
    expect = playwright.expect
    if end is over_by_a_caption:
        stand_in.session = None  # as while the store is away
    stand_in.say("a", "alert", alert=True)
    expect(stand_in.card("a")).to_have_class("stream alerting")

    end(stand_in)

    expect(stand_in.card("a")).to_have_class("stream", timeout=WAIT_MS)


def test_results_when_they_are_not_for_the_events_then_the_page_has_them_nowhere_after_a_reload(stand_in):
    expect, page = playwright.expect, stand_in.page
    stand_in.queries, stand_in.hidden = ["smoke", "secret"], ["secret"]
    secret = _row(-40, "a", "alert", alert=True, answer="a secret", query="secret")
    stand_in.results = [secret, _row(-20, "a", answer="a van")]

    page.reload()

    expect(page.locator("#feed li .what")).to_have_text(["a van"])
    expect(page.locator("#marks .mark")).to_have_count(1)
    expect(stand_in.card("a")).to_have_class("stream")


def test_key_when_escape_is_pressed_again_and_again_then_it_can_still_be_given(browser):
    expect = playwright.expect
    stand_in = StandIn(browser, key="sk-right")
    page, dialog = stand_in.page, stand_in.page.get_by_role("dialog")
    expect(dialog).to_be_visible()

    for _ in range(3):
        page.keyboard.press("Escape")
        page.wait_for_timeout(100)
    give_key(page, "sk-right")

    expect(stand_in.card("a")).to_be_visible()
    expect(dialog).to_be_hidden()
    assert stand_in.wrong == []
    page.close()


def test_connection_when_the_list_of_streams_failed_once_then_connected_again_with_the_next(stand_in):
    expect, connection = playwright.expect, stand_in.page.locator("#connection")
    expect(connection).to_have_text("connected")
    stand_in.hold_events = True  # they go on as they are

    stand_in.fails = True
    expect(connection).to_have_text("connecting again")
    stand_in.fails = False

    expect(connection).to_have_text("connected")


def test_events_when_they_open_late_then_what_was_committed_before_is_shown(stand_in):
    expect, page = playwright.expect, stand_in.page
    stand_in.events_status = 503
    with page.expect_response("**/v1/results*"), page.expect_response("**/v1/events"):
        page.reload()

    stand_in.results = [_row(-40, "a", "alert", alert=True, answer="smoke"), _row(-20, "a", answer="a van")]
    stand_in.events_status = 200

    expect(page.locator("#feed li .what")).to_have_text(["a van", "Alert: smoke smoke"], timeout=WAIT_MS)
    expect(page.locator("#marks .mark")).to_have_count(2)
    expect(stand_in.card("a")).to_have_class("stream alerting")


def test_events_when_their_place_is_no_longer_taken_then_what_was_committed_meanwhile_is_shown_once(stand_in):
    expect, page = playwright.expect, stand_in.page
    before = stand_in.say("a", answer="before")
    expect(page.locator("#feed li .what")).to_have_text(["before"])
    stand_in.events_status = 400
    expect(page.locator("#connection")).to_have_text("connecting again")

    stand_in.results = [before, _row(1.5, "a", answer="meanwhile")]
    stand_in.say("a", answer="after")
    stand_in.events_status = 200

    expect(page.locator("#feed li .what")).to_have_text(["after", "meanwhile", "before"], timeout=WAIT_MS)


@pytest.mark.parametrize("focused", ["a", "b", "c"])
def test_streams_when_their_order_changes_then_the_focus_stays(stand_in, focused):
    expect, page = playwright.expect, stand_in.page
    stand_in.card(focused).focus()

    for states in ({"a": "quiet", "b": "live", "c": "live", "d": "live"}, {"a": "live", "b": "ended", "c": "quiet"}):
        stand_in.states = states
        order = sorted(states, key=lambda name: (("live", "quiet", "ended").index(states[name]), name))
        expect(page.locator(".stream .name span:first-child")).to_have_text(order)
        expect(stand_in.card(focused)).to_be_focused()


def test_range_when_all_is_more_than_may_be_asked_about_then_it_says_what_is_asked_about(stand_in):
    expect, page = playwright.expect, stand_in.page
    stand_in.span_s = 30 * 86_400
    expect(stand_in.card("a")).to_be_visible()

    page.get_by_role("button", name="all", exact=True).click()
    expect(page.locator("#range-text")).to_have_text(
        "Asks about its last 7 days of 30 days, the most that a question may", timeout=WAIT_MS
    )
    page.get_by_label("Question").fill("What happened?")
    page.keyboard.press("Enter")

    expect(page.locator("#send")).to_have_text("Stop")
    assert url_in(stand_in.asked[0]) == "stream://a?last=604800s"
    assert page.get_by_label("Start of the range").input_value() == "767"


def test_enter_when_an_answer_is_being_written_then_the_next_question_is_asked_in_its_place(stand_in):
    expect, page = playwright.expect, stand_in.page
    expect(stand_in.card("a")).to_be_visible()
    looked = page.locator(".answer .looked")

    for question in ("first?", "second?", ""):
        page.get_by_label("Question").fill(question)
        page.keyboard.press("Enter")
    expect(looked).to_have_text(["", "stopped"])
    expect(page.locator("#send")).to_have_text("Stop")
    page.get_by_role("button", name="Stop").click()

    expect(looked).to_have_text(["stopped", "stopped"])
    expect(page.locator("#send")).to_have_text("Ask")
    assert [question["messages"][-1]["content"][-1]["text"] for question in stand_in.asked] == ["first?", "second?"]
