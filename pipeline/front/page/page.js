// The page: streams and their pictures, captions running in, alerts, and a box to ask in.
// Every text that comes from outside is put in as text, never as HTML.

import { ApiError, call, eventsOf, follow, get, keepKey, onKeyWanted } from "./api.js";
import { Timeline, clock } from "./timeline.js";

const STREAMS_EVERY_MS = 2000;
const MAX_ROWS = 200; // of the feed
const MAX_ALERTS = 4; // shown on top; older ones are in the feed
const MAX_MARKS = 500;
const MAX_ANSWERS = 20;
const STATES = ["live", "quiet", "ended"]; // in the order of the page

const $ = (id) => document.getElementById(id);

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

const keyOf = (row) => [row.query_id, row.stream_id, row.session, row.start_time, row.kind, row.alert].join("\n");

// Streams.

const cards = new Map(); // id → {entry, button, …}
const chosen = new Set();

class Card {
  constructor(id) {
    this.id = id;
    this.entry = null;
    this.pictureTime = null;
    this.button = make("button", "stream");
    this.button.type = "button";
    this.button.dataset.stream = id;
    this.alerts = new Map(); // query → the row of its alert that stands
    const picture = make("span", "picture");
    this.noPicture = make("span", "", "no picture");
    this.image = make("img");
    this.image.alt = "";
    this.image.hidden = true;
    picture.append(this.noPicture, this.image);
    const about = make("span", "about");
    const name = make("span", "name");
    this.state = make("span", "state");
    name.append(make("span", "", id), this.state);
    this.caption = make("span", "caption");
    about.append(name, this.caption);
    this.button.append(picture, about);
    this.button.addEventListener("click", (event) => choose(id, event.ctrlKey || event.metaKey || event.shiftKey));
  }

  update(entry) {
    this.entry = entry;
    this.button.dataset.state = this.state.dataset.state = entry.state;
    this.state.textContent = stateText(entry);
    this.state.title = entry.lag_records === null ? "" : `${entry.lag_records} records wait in its partition`;
    if (entry.picture_time && entry.picture_time !== this.pictureTime) this.loadPicture(entry.picture_time);
    this.keepAlerts((alert) => entry.state !== "ended" && (entry.session ?? alert.session) === alert.session);
  }

  async loadPicture(time) {
    this.pictureTime = time;
    try {
      const response = await call(`v1/streams/${encodeURIComponent(this.id)}/picture`);
      const url = URL.createObjectURL(await response.blob());
      const old = this.image.src;
      this.image.src = url;
      this.image.hidden = false;
      this.noPicture.hidden = true;
      this.image.alt = `Newest picture of ${this.id}, ${clock(Date.parse(time))}`;
      if (old) URL.revokeObjectURL(old);
    } catch {
      this.pictureTime = null; // tried again with the next list
    }
  }

  say(row) {
    if (row.kind !== "alert") this.caption.textContent = row.answer;
    else if (row.alert) this.alerts.set(row.query_id, row);
    else this.alerts.delete(row.query_id);
    this.keepAlerts((alert) => alert.session === row.session || alert.start_time > row.start_time);
  }

  /** Of a session that is over, or a query that is gone or hidden, nothing tells that its alert is over, too. */
  keepAlerts(stands) {
    for (const [query, alert] of this.alerts) if (!stands(alert)) this.alerts.delete(query);
    this.button.classList.toggle("alerting", this.alerts.size > 0);
  }
}

function stateText(entry) {
  if (entry.state !== "live") return entry.state;
  return entry.lag_s > 15 ? `live, ${lagText(entry.lag_s)} behind` : "live"; // a chunk and its caption take a few
}

function lagText(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

async function refreshStreams() {
  const { data } = await get("v1/streams");
  data.sort((a, b) => STATES.indexOf(a.state) - STATES.indexOf(b.state)); // by name within a state, as they come
  const here = new Set(data.map((entry) => entry.id));
  for (const [id, card] of cards) {
    if (here.has(id)) continue;
    card.button.remove();
    cards.delete(id);
    chosen.delete(id);
  }
  for (const entry of data) {
    if (!cards.has(entry.id)) {
      const card = new Card(entry.id);
      cards.set(entry.id, card);
      for (const row of rows.filter((row) => row.stream_id === entry.id).reverse()) card.say(row);
    }
    cards.get(entry.id).update(entry);
  }
  arrange($("streams"), data.map((entry) => cards.get(entry.id).button));
  $("no-streams").hidden = data.length > 0;
  const live = data.filter((entry) => entry.state === "live").length;
  $("summary").textContent = data.length ? `${data.length} stream${data.length > 1 ? "s" : ""}, ${live} live` : "";
  if (!chosen.size && data.length) choose((data.find((entry) => entry.state === "live") ?? data[0]).id);
  showTime();
  if ([...cards.values()].some((card) => card.alerts.size)) await dropAlertsOfGoneQueries();
}

/** Bring children into an order; the one with the focus, which it would lose, is moved around rather than moved. */
function arrange(parent, order) {
  order.forEach((child, i) => {
    if (child === document.activeElement) while (parent.children[i] !== child) parent.append(parent.children[i]);
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i]);
  });
}

async function dropAlertsOfGoneQueries() {
  const listed = await get("v1/queries").catch(() => null);
  if (!listed) return; // looked at again with the next list
  const ids = new Set(listed.data.filter((query) => query.sinks.events).map((query) => query.id));
  for (const card of cards.values()) card.keepAlerts((alert) => ids.has(alert.query_id));
}

/** Return the ids of the queries that no event tells of; none where they cannot be read, as the service does it. */
async function hiddenQueries(options = {}) {
  const { data } = await get("v1/queries", options).catch(() => ({ data: [] }));
  return new Set(data.filter((query) => !query.sinks.events).map((query) => query.id));
}

function choose(id, more = false) {
  if (more && chosen.has(id) && chosen.size > 1) chosen.delete(id);
  else {
    if (!more) chosen.clear();
    chosen.add(id);
  }
  for (const card of cards.values()) card.button.setAttribute("aria-pressed", String(chosen.has(card.id)));
  $("asked-streams").textContent = [...chosen].join(", ");
  timeline.chosen = null;
  showTime();
  loadMarks();
  drawFeed();
}

function neighbour(step) {
  const ids = [...$("streams").children].map((button) => button.dataset.stream);
  if (!ids.length) return;
  const at = ids.indexOf([...chosen].at(-1));
  const id = ids[(at + step + ids.length) % ids.length];
  choose(id);
  cards.get(id).button.scrollIntoView({ block: "nearest", inline: "nearest" });
}

// The timeline, of the streams that are chosen.

const timeline = new Timeline(() => loadMarks());
let marks = [];
let loadingMarks = null; // an AbortController

function showTime() {
  const spans = [...chosen].map((id) => cards.get(id)?.entry).filter(Boolean);
  if (!spans.length) return timeline.show(null);
  timeline.show({
    start: Math.min(...spans.map((entry) => Date.parse(entry.first_time))),
    end: Math.max(...spans.map((entry) => Date.parse(entry.last_time))),
  });
  timeline.mark(marks);
}

async function loadMarks() {
  const view = timeline.view;
  if (!view) return;
  loadingMarks?.abort();
  const { signal } = (loadingMarks = new AbortController());
  const since = new Date(view.start - 60_000).toISOString();
  const [hidden, ...lists] = await Promise.all([hiddenQueries({ signal }), ...[...chosen].map((id) =>
    get(`v1/streams/${encodeURIComponent(id)}/captions?limit=${MAX_MARKS}&since=${since}`, { signal }).catch(() => ({ data: [] })))]);
  if (signal.aborted) return;
  marks = lists.flatMap((list) => list.data).filter((row) => !hidden.has(row.query_id));
  timeline.mark(marks);
}

// What was found.

let rows = []; // the newest first
const known = new Set();

function take(row, fresh) {
  if (known.has(keyOf(row))) return;
  known.add(keyOf(row));
  rows.unshift(row);
  for (const old of rows.splice(MAX_ROWS)) known.delete(keyOf(old));
  cards.get(row.stream_id)?.say(row);
  if (fresh && chosen.has(row.stream_id)) {
    marks = [...marks, row].slice(-MAX_MARKS);
    timeline.mark(marks);
  }
  if (fresh && row.kind === "alert" && row.alert) showAlert(row);
  if (wanted(row)) $("feed").prepend(line(row, fresh));
  while ($("feed").children.length > MAX_ROWS) $("feed").lastElementChild.remove();
  $("no-feed").hidden = $("feed").children.length > 0;
}

let behind = false; // the list of results could not be had

/** Take in what is listed: events tell only of what is committed once they are open. */
async function catchUp() {
  try {
    const [hidden, { data }] = await Promise.all([hiddenQueries(), get("v1/results?limit=100")]);
    behind = false;
    const missed = data.filter((row) => !hidden.has(row.query_id) && !known.has(keyOf(row)));
    if (!missed.length) return;
    const all = [...missed, ...rows.reverse()].sort((a, b) => Date.parse(a.start_time) - Date.parse(b.start_time));
    rows = [];
    known.clear();
    for (const row of all) take(row, false);
    drawFeed();
    loadMarks();
  } catch {
    behind = true; // tried again with the next list of streams
  }
}

function wanted(row) {
  return (!$("only-chosen").checked || chosen.has(row.stream_id)) && (!$("only-alerts").checked || row.kind === "alert");
}

function drawFeed() {
  $("feed").replaceChildren(...rows.filter(wanted).map((row) => line(row, false)));
  $("no-feed").hidden = $("feed").children.length > 0;
}

function line(row, fresh) {
  const item = make("li", fresh ? "fresh" : "");
  const time = make("time", "", clock(Date.parse(row.start_time)));
  time.dateTime = row.start_time;
  const what = make("span", "what");
  if (row.kind === "alert") {
    item.classList.toggle("is-alert", row.alert);
    what.append(make("b", "", row.alert ? `Alert: ${row.query_id}` : `Over: ${row.query_id}`), " ");
  }
  what.append(row.answer);
  item.append(time, make("span", "who", row.stream_id), what);
  return item;
}

function showAlert(row) {
  const alert = make("div", "alert");
  const dismiss = make("button", "", "Dismiss");
  dismiss.type = "button";
  dismiss.addEventListener("click", () => {
    alert.remove();
    $("alerts").hidden = !$("alerts").children.length;
  });
  alert.append(make("b", "", `${row.stream_id}: ${row.query_id}`),
    make("span", "", `${row.answer} (${clock(Date.parse(row.start_time))})`), dismiss);
  $("alerts").prepend(alert);
  while ($("alerts").children.length > MAX_ALERTS) $("alerts").lastElementChild.remove();
  $("alerts").hidden = false;
}

// Asking.

let asking = null; // an AbortController
let turns = []; // the conversation that the next question goes on with: messages of text

function converse(messages) {
  turns = messages;
  $("following").hidden = !messages.length;
  $("following-text").textContent = messages.length ? `Follows up on “${messages.at(-2).content}”` : "";
}

async function ask(question) {
  const before = turns;
  converse([]);
  const videos = [...chosen].map((id) => ({
    type: "video_url",
    video_url: { url: `stream://${encodeURIComponent(id)}?${timeline.query()}` },
  }));
  const answer = make("div", "answer writing");
  const [asked, text, looked] = [make("p", "asked", question), make("p", "text"), make("p", "looked")];
  asked.append(` · ${[...chosen].join(", ")}`);
  answer.append(asked, text, looked);
  $("answers").prepend(answer);
  while ($("answers").children.length > MAX_ANSWERS) $("answers").lastElementChild.remove();
  const mine = (asking = new AbortController());
  $("send").textContent = "Stop";
  try {
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        messages: [...before, { role: "user", content: [...videos, { type: "text", text: question }] }],
        stream: true,
      }),
      signal: mine.signal,
    });
    await write(response, text, looked);
    const said = [{ role: "user", content: question }, { role: "assistant", content: text.textContent }];
    answer.append(followUp([...before, ...said]));
  } catch (error) {
    if (error.name === "AbortError") looked.textContent = "stopped";
    else {
      answer.classList.add("failed");
      looked.textContent = error instanceof ApiError ? error.message : "the connection broke; ask again";
    }
  } finally {
    if (asking === mine) {
      asking = null;
      $("send").textContent = "Ask";
    }
    answer.classList.remove("writing");
  }
}

function followUp(messages) {
  const button = make("button", "follow-up", "Follow up");
  button.type = "button";
  button.addEventListener("click", () => {
    converse(messages);
    $("question").value = "";
    $("question").focus();
  });
  return button;
}

async function write(response, text, looked) {
  let whole = false;
  for await (const event of eventsOf(response)) {
    if (event.data === "[DONE]") { whole = true; continue; }
    const piece = JSON.parse(event.data);
    if (piece.error) throw new ApiError(500, piece.error.message);
    for (const choice of piece.choices) text.append(choice.delta.content ?? "");
    if (piece.stormline) looked.textContent = lookedText(piece.stormline.video);
  }
  if (!whole) throw new Error("broke off");
}

function lookedText(uses) {
  const each = uses.map((use) => {
    const span = `${clock(Date.parse(use.first))} to ${clock(Date.parse(use.last))}`;
    return `looked at ${use.tokens_used} of ${use.tokens_in_range} tokens of ${use.stream}, ${span} (${use.token_policy})`;
  });
  const zero = Math.min(...uses.map((use) => Date.parse(use.start))); // one clock for all streams of a question
  return [...each, `[00:00] is ${clock(zero)}`].join("; ");
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (asking) {
    const byKey = !event.submitter; // else by the button, which says Stop
    if (byKey && !question) return;
    asking.abort();
    if (!byKey) return;
  }
  if (chosen.size) ask(question || $("question").placeholder);
});

$("anew").addEventListener("click", () => converse([]));

$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!event.repeat) $("ask").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (asking) asking.abort();
    else if (document.activeElement === $("question")) $("question").blur();
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("textarea, input, dialog")) return;
  if (event.key === "/") {
    event.preventDefault();
    $("question").focus();
  } else if (event.key === "j") neighbour(1);
  else if (event.key === "k") neighbour(-1);
});

for (const id of ["only-chosen", "only-alerts"]) $(id).addEventListener("change", drawFeed);

// The key, where the service wants one.

onKeyWanted((wrong) => new Promise((given) => {
  const dialog = $("key-dialog");
  $("key-error").textContent = wrong;
  $("key").value = dialog.returnValue = "";
  dialog.showModal();
  dialog.onclose = () => {
    if (!dialog.returnValue) return dialog.showModal(); // a second Escape closes what cannot be cancelled
    keepKey($("key").value.trim());
    given();
  };
}));
$("key-dialog").addEventListener("cancel", (event) => event.preventDefault());

// Going.

const reached = { streams: true, events: false }; // their list, as it was last asked for; results, as they come

function showReached(what, is) {
  if (reached[what] === is) return;
  reached[what] = is;
  const all = reached.streams && reached.events;
  $("connection").dataset.state = all ? "open" : "waiting";
  $("connection").textContent = all ? "connected" : "connecting again";
}

async function keepStreamsFresh() {
  for (;;) {
    if (!document.hidden) {
      try {
        await refreshStreams();
        showReached("streams", true);
        if (behind) await catchUp();
      } catch {
        showReached("streams", false);
      }
    }
    await new Promise((done) => setTimeout(done, STREAMS_EVERY_MS));
  }
}

follow((row) => take(row, true), (state) => showReached("events", state === "open"), catchUp);
catchUp(); // also where no event ever comes
keepStreamsFresh();
