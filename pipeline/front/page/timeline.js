// The timeline: what was found when, and a range chosen by dragging, by its two handles, or whole.

const STEPS = 1000;
const MINUTE = 60_000;
export const VIEWS = [["1 min", MINUTE], ["10 min", 10 * MINUTE], ["1 h", 60 * MINUTE], ["6 h", 360 * MINUTE], ["1 day", 1440 * MINUTE], ["all", null]];
const MAX_ASKED_MS = 7 * 1440 * MINUTE; // what the service takes by default

export class Timeline {
  /** @param onView called when another stretch of time is shown; a range chosen within it is no such change. */
  constructor(onView) {
    this.onView = onView;
    this.viewMs = 10 * MINUTE;
    this.chosen = null; // {start, end} in ms, or null for all that is shown
    this.span = null; // {start, end} of the stream
    this.element = (id) => document.getElementById(id);
    this.buildViews();
    this.listen();
  }

  buildViews() {
    for (const [name, ms] of VIEWS) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.dataset.ms = ms ?? "";
      button.addEventListener("click", () => {
        this.viewMs = ms;
        this.chosen = null;
        this.draw();
        this.onView();
      });
      document.querySelector(".views").append(button);
    }
  }

  listen() {
    const track = this.element("track");
    const [from, until] = [this.element("from"), this.element("until")];
    from.addEventListener("input", () => this.choose(Math.min(+from.value, +until.value - 1), +until.value));
    until.addEventListener("input", () => this.choose(+from.value, Math.max(+until.value, +from.value + 1)));
    this.element("whole").addEventListener("click", () => this.reset());
    const place = (event) => {
      const box = track.getBoundingClientRect();
      return Math.round(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * STEPS);
    };
    let begun = null;
    track.addEventListener("pointerdown", (event) => {
      if (event.target instanceof HTMLInputElement) return;
      begun = place(event);
      track.setPointerCapture(event.pointerId);
    });
    track.addEventListener("pointermove", (event) => {
      if (begun === null) return;
      const now = place(event);
      if (Math.abs(now - begun) > 4) this.choose(Math.min(begun, now), Math.max(begun, now));
    });
    track.addEventListener("pointerup", () => { begun = null; });
    track.addEventListener("pointercancel", () => { begun = null; });
    track.addEventListener("dblclick", () => this.reset());
  }

  /** Show a stream's time; `span` is {start, end} in ms, or null. */
  show(span) {
    this.span = span;
    this.draw();
  }

  reset() {
    this.chosen = null;
    this.draw();
  }

  /** What is shown: {start, end} in ms. */
  get view() {
    if (!this.span) return null;
    const ms = this.viewMs ?? Math.max(MINUTE / 6, this.span.end - this.span.start);
    return { start: this.span.end - ms, end: this.span.end };
  }

  /** What is asked about: {start, end} in ms; all that is shown, or as much of it as a question may be about. */
  get asked() {
    return this.chosen ?? { start: Math.max(this.view.start, this.view.end - MAX_ASKED_MS), end: this.view.end };
  }

  choose(from, until) {
    const view = this.view;
    if (!view) return;
    const at = (step) => view.start + ((view.end - view.start) * step) / STEPS;
    this.chosen = from <= 0 && until >= STEPS ? null : { start: at(from), end: at(until) };
    this.draw();
  }

  /** Put the range into the query of an address: last=… where none was chosen, which goes on with the stream. */
  query() {
    const { start, end } = this.asked;
    return this.chosen ? `start=${iso(start)}&end=${iso(end)}` : `last=${Math.ceil((end - start) / 1000)}s`;
  }

  draw() {
    for (const button of document.querySelectorAll(".views button")) {
      button.setAttribute("aria-pressed", String(button.dataset.ms === String(this.viewMs ?? "")));
    }
    const view = this.view;
    this.element("track").toggleAttribute("inert", !view);
    if (!view) return;
    const length = view.end - view.start;
    if (this.chosen && this.chosen.end <= view.start) this.chosen = null; // it has left the view
    const step = (ms) => Math.round(Math.min(1, Math.max(0, (ms - view.start) / length)) * STEPS);
    const asked = this.asked;
    const [from, until] = [step(asked.start), step(asked.end)];
    for (const [id, value, ms] of [["from", from, asked.start], ["until", until, asked.end]]) {
      this.element(id).value = value;
      this.element(id).setAttribute("aria-valuetext", clock(ms));
    }
    this.element("selection").style.left = `${from / 10}%`;
    this.element("selection").style.width = `${(until - from) / 10}%`;
    this.element("whole").hidden = !this.chosen;
    const askedText = lengthText(asked.end - asked.start);
    this.element("range-text").textContent = this.chosen
      ? `Asks about ${clock(asked.start)} to ${clock(asked.end)} (${askedText})`
      : this.viewMs ? `Asks about its last ${askedText}`
        : asked.start === view.start ? `Asks about all of it (${askedText})`
          : `Asks about its last ${askedText} of ${lengthText(length)}, the most that a question may`;
    this.element("ticks").replaceChildren(...[0, 0.5, 1].map((part) => {
      const tick = document.createElement("span");
      tick.textContent = clock(view.start + length * part, length > 1440 * MINUTE);
      return tick;
    }));
  }

  /** Draw what was found: rows with start_time, end_time, kind, answer. */
  mark(rows) {
    const view = this.view;
    if (!view) return;
    const percent = (ms) => ((ms - view.start) / (view.end - view.start)) * 100;
    this.element("marks").replaceChildren(...rows.flatMap((row) => {
      const [start, end] = [Date.parse(row.start_time), Date.parse(row.end_time)];
      if (end < view.start || start > view.end) return [];
      const mark = document.createElement("div");
      mark.className = row.kind === "alert" ? "mark alert-mark" : "mark";
      mark.style.left = `${Math.max(0, percent(start))}%`;
      if (row.kind !== "alert") mark.style.width = `calc(${percent(end) - Math.max(0, percent(start))}% - 1px)`;
      mark.title = `${clock(start)} ${row.answer}`;
      return [mark];
    }));
  }
}

const iso = (ms) => new Date(ms).toISOString();

const PLACES_UNTIL_MS = 3650 * 1440 * MINUTE; // times before 1980 are places in an archive's video, told from 1970 on in UTC

/** Return a time of day here, with the date where that helps; of an archive's video, the place in it. */
export function clock(ms, withDate = Date.now() - ms > 20 * 3600_000) {
  const time = new Date(ms);
  const isPlace = ms < PLACES_UNTIL_MS;
  const zone = isPlace ? { timeZone: "UTC" } : {};
  const clockText = time.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23", ...zone });
  if (!withDate || (isPlace && ms < 1440 * MINUTE)) return clockText;
  return `${time.toLocaleDateString([], { month: "short", day: "numeric", ...zone })} ${clockText}`;
}

export function lengthText(ms) {
  const seconds = Math.round(ms / 1000);
  if (seconds < 90) return `${seconds} s`;
  if (seconds < 5400) return `${Math.round(seconds / 6) / 10} min`;
  if (seconds < 129600) return `${Math.round(seconds / 360) / 10} h`;
  return `${Math.round(seconds / 8640) / 10} days`;
}
