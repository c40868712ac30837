// Speaks with the service: JSON, server-sent events with a key, and where a key is asked for.

const KEY = "stormline-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let askForKey = async () => null;

/** @param ask called with what is wrong with the key so far ("" for none yet); resolves when one was given. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

let asking = null;

/** Fetch with the key; where there is none, or a wrong one, ask for it and try again. */
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers, cache: "no-store" });
    if (response.status === 401) {
      const said = await messageOf(response);
      if (key === sessionStorage.getItem(KEY)) {
        asking ??= askForKey(key ? said : "").finally(() => { asking = null; });
      }
      await asking;
      continue;
    }
    if (!response.ok) throw new ApiError(response.status, await messageOf(response));
    return response;
  }
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the service answers ${response.status}`;
  }
}

export async function get(path, options = {}) {
  return (await call(path, options)).json();
}

/** Yield {id, event, data} of a response in the form of server-sent events; an event without data has data null. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) yield parseEvent(block);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parseEvent(block) {
  const event = { id: null, event: "message", data: null };
  for (const line of block.split("\n")) {
    const at = line.indexOf(": ");
    const name = line.slice(0, at);
    if (name === "data") event.data = (event.data === null ? "" : event.data + "\n") + line.slice(at + 2);
    else if (name === "id" || name === "event") event[name] = line.slice(at + 2);
  }
  return event;
}

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 15000;

/**
 * Follow results for ever, from where it broke off; tells how the connection is: open or waiting. Where there is no
 * place to go on from, it begins with what is new, and calls `onBegin`: what was committed before comes from elsewhere.
 */
export async function follow(onResult, onState, onBegin) {
  let lastId = null;
  let waitMs = FIRST_WAIT_MS;
  for (;;) {
    try {
      const headers = lastId ? { "Last-Event-ID": lastId } : {};
      const response = await call("v1/events", { headers });
      onState("open");
      if (!lastId) onBegin();
      for await (const event of eventsOf(response)) {
        waitMs = FIRST_WAIT_MS;
        if (event.data !== null) onResult(JSON.parse(event.data));
        if (event.id !== null) lastId = event.id;
      }
    } catch (error) {
      if (error.status === 400) lastId = null; // another output folder: from now on
      onState("waiting");
      waitMs = Math.min(LONGEST_WAIT_MS, waitMs * 2);
    }
    await new Promise((done) => setTimeout(done, waitMs));
  }
}
