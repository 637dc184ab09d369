/**
 * Follows a stream of ff_fast in a browser: an ES module without dependencies, for any page.
 *
 *   import { follow } from "/ff_fast.js";
 *   const stream = follow("/streams/" + id, { element: document.querySelector("output") });
 *   button.onclick = () => stream.stop();
 *   const end = await stream.done;
 *
 * It reads what `StreamResponse` with `EventFraming` sends. A connection that is lost, or silent for too long, is
 * replaced, and the new one goes on after the last event: every character comes once, in order.
 */

const JSON_EVENTS = new Set(["snapshot", "attempt", "gap", "end"]);
const FIRST_RETRY_MS = 200;
const LONGEST_RETRY_MS = 10_000;
/** How long the head of a response may take at first. A browser may send a request on a connection that has died. */
const FIRST_ANSWER_MS = 4_000;

/** The server refused for good: it does not know the stream, or this client may not read it. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.name = "Refused";
    this.status = status;
  }
}

/**
 * Follow a stream.
 *
 * @param {string|URL} url Where the stream is served.
 * @param {object} [options]
 * @param {Node} [options.element] Its content becomes the text, by at most one change an animation frame.
 * @param {function(string, Stream)} [options.onText] Called as often as `element` changes, with the text so far.
 * @param {function(string, Stream)} [options.onState] Called with each new `state`.
 * @param {function(object)} [options.onAttempt] A worker has begun anew: `{attempt_index}`.
 * @param {function(object)} [options.onGap] Frames are missing: `{first_missing, next_sequence, reason}`.
 * @param {function(object)} [options.onEvent] Called with every other event that has a name: `{type, data, id}`.
 * @param {boolean} [options.json] The server's framing has `data="json"`.
 * @param {function(object): string} [options.documentText] The text in a summary document; `document.text` by default.
 * @param {object|function(): (object|Promise<object>)} [options.headers] Headers of every request; a function is asked
 *   before each, so that it can renew a token.
 * @param {RequestCredentials} [options.credentials] As for `fetch`.
 * @param {string|URL} [options.stopUrl] Where `stop` posts to; `url` and `/stop` by default.
 * @param {string} [options.after] The `id` to go on after, of a stream that `text` was read from.
 * @param {string} [options.text] The text up to there.
 * @param {number} [options.silence] After how many milliseconds without a byte a connection is replaced; twice the server's
 *   heartbeat, or more.
 * @param {function} [options.fetch] In place of the global `fetch`.
 * @returns {Stream}
 */
export function follow(url, options) {
  return new Stream(url, options);
}

/** A stream that is followed; see `follow`. */
export class Stream {
  #url;
  #options;
  #state = "connecting";
  #text;
  #id;
  #end = null;
  #attempt = null;
  #gaps = 0;
  /** The connection in use, and when it gave its last byte; by the clock on the wall, which does not sleep. */
  #connection = null;
  #heardAt = 0;
  /** Ends the pause between two connections. */
  #resume = null;
  #retryMs = FIRST_RETRY_MS;
  /** The connection is to be replaced, and at once. */
  #again = false;
  #hurry = false;
  #failures = 0;
  /** The connection began without an id: what it brings replaces the text. */
  #whole = false;
  #events = 0;
  #gapRead = null;
  #settle;
  #watch;
  /** What the page shows, and whether the text was replaced since. */
  #node = null;
  #shown = "";
  #replaced = false;
  #frame = null;

  constructor(url, options = {}) {
    this.#url = new URL(url, globalThis.document?.baseURI ?? globalThis.location?.href);
    this.#options = { silence: 40_000, ...options };
    this.#id = options.after || null;
    this.#text = options.text ?? "";
    this.done = new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
    });
    // A refusal shows in `state` too; who does not wait for `done` need not catch it.
    this.done.catch(() => {});
    if (options.element) {
      this.#node = options.element.ownerDocument.createTextNode(this.#text);
      this.#shown = this.#text;
      options.element.replaceChildren(this.#node);
    }
    this.#listen(true);
    this.#watch = setInterval(() => this.#look(), Math.min(1000, this.#options.silence / 4));
    this.#run();
  }

  /** `connecting`, `open`, `waiting` or `offline` before it connects again, `ended`, `refused`, or `closed`. */
  get state() {
    return this.#state;
  }

  /** The text so far. The page shows it with the next animation frame. */
  get text() {
    return this.#text;
  }

  /** The id of the last event; null before the first. */
  get id() {
    return this.#id;
  }

  /** The attempt that the text is of; null before it is known. */
  get attempt() {
    return this.#attempt;
  }

  /** How the stream has ended: `{reason, outcome, error}`; null while it has not. */
  get end() {
    return this.#end;
  }

  /** Whether no part of the text is missing. */
  get complete() {
    return this.#gaps === 0;
  }

  /** Ask the server to stop the stream, which then ends for all readers. */
  async stop() {
    let url = this.#options.stopUrl;
    if (url === undefined) {
      url = new URL(this.#url);
      url.pathname += "/stop";
    }
    const answer = await this.#request(url, { method: "POST" }, await this.#headers());
    if (!answer.ok) {
      throw await refusal(answer);
    }
  }

  /** Stop following. The stream goes on, and `done` becomes null. */
  close() {
    if (!this.#over) {
      this.#finish("closed");
      this.#settle.resolve(null);
    }
  }

  // -- connections ---------------------------------------------------------------------------------------------------

  get #over() {
    return this.#state === "ended" || this.#state === "refused" || this.#state === "closed";
  }

  async #run() {
    let refusals = 0;
    while (!this.#over) {
      const events = this.#events;
      let waitMs = 0;
      this.#again = this.#hurry = false;
      this.#become("connecting");
      try {
        waitMs = await this.#connect();
        refusals = 0;
      } catch (error) {
        if (error instanceof Refused && !this.#again) {
          refusals += 1;
          if (refusals > 1 || !this.#curable(error)) {
            this.#refuse(error);
            return;
          }
        }
        // All else is a connection that could not be made, or was lost.
      } finally {
        this.#connection?.abort();
        this.#connection = null;
      }
      this.#failures = this.#events > events ? 0 : this.#failures + 1;
      if (!this.#over && !(this.#hurry && this.#failures < 2)) {
        await this.#pause(Math.max(waitMs, this.#backoff()));
      }
    }
  }

  /** Make one connection, and read it to its end. Returns the shortest wait that the server asks for. */
  async #connect() {
    const connection = new AbortController();
    this.#connection = connection;
    this.#heardAt = Date.now();
    const headers = await this.#headers();
    headers.set("accept", "text/event-stream");
    const whole = this.#id === null;
    if (!whole) {
      headers.set("last-event-id", this.#id);
    }
    const answer = await this.#request(
      this.#url,
      { cache: "no-store", signal: connection.signal },
      headers,
    );
    if (answer.status === 204) {
      // The end was read before, and nothing follows it.
      this.#finishAt({ reason: null, outcome: null, error: null });
      return 0;
    }
    if (!answer.ok || !/^text\/event-stream\b/i.test(answer.headers.get("content-type") ?? "")) {
      if (answer.ok || !isPassing(answer.status)) {
        throw await refusal(answer);
      }
      return 1000 * (Number(answer.headers.get("retry-after")) || 0);
    }
    this.#become("open");
    this.#whole = whole;
    if (whole) {
      this.#replace("");
    }
    const reader = answer.body.getReader();
    const decoder = new TextDecoder();
    const parse = parser((event) => this.#take(event), (ms) => (this.#retryMs = ms));
    for (;;) {
      const { value, done } = await reader.read();
      if (done || this.#over || this.#connection !== connection || connection.signal.aborted) {
        return 0;
      }
      this.#heardAt = Date.now();
      parse(decoder.decode(value, { stream: true }));
    }
  }

  async #headers() {
    const { headers } = this.#options;
    return new Headers(typeof headers === "function" ? await headers() : headers);
  }

  #request(url, init, headers) {
    const { credentials, fetch = globalThis.fetch } = this.#options;
    return fetch.call(globalThis, url, { ...init, headers, ...(credentials && { credentials }) });
  }

  /** Whether another request may pass: from the beginning, or with other headers. */
  #curable(refused) {
    if (refused.status === 400 && this.#id !== null) {
      this.#id = null;
      return true;
    }
    return [401, 403].includes(refused.status) && typeof this.#options.headers === "function";
  }

  #backoff() {
    const grown = Math.min(FIRST_RETRY_MS * 2 ** this.#failures, LONGEST_RETRY_MS);
    const most = Math.max(this.#retryMs, grown);
    return most * (0.5 + Math.random() / 2);
  }

  async #pause(ms) {
    const offline = globalThis.navigator?.onLine === false;
    this.#become(offline ? "offline" : "waiting");
    await new Promise((resolve) => {
      this.#resume = resolve;
      // Also where a browser believes that it is offline: it may be wrong.
      setTimeout(resolve, offline ? Math.max(ms, 5000) : ms);
    });
    this.#resume = null;
  }

  /** Replace the connection, or make the next one without waiting. */
  #reconnect(hurry = true) {
    this.#again = true;
    this.#hurry = hurry;
    this.#connection?.abort();
    this.#resume?.();
  }

  // -- sleep, and changes of the network -----------------------------------------------------------------------------

  #listen(on) {
    const change = on ? "addEventListener" : "removeEventListener";
    globalThis[change]?.("online", this.#wake);
    globalThis[change]?.("offline", this.#wake);
    globalThis[change]?.("pageshow", this.#wake);
    globalThis.document?.[change]("visibilitychange", this.#wake);
    globalThis.document?.[change]("resume", this.#wake);
  }

  #wake = ({ type }) => {
    if (type === "offline") {
      if (this.#state === "waiting") {
        this.#become("offline");
      }
    } else if (type === "online") {
      // A connection of the network before may be dead without a word.
      this.#reconnect();
    } else if (globalThis.document?.visibilityState !== "hidden") {
      this.#look(this.#options.silence / 2);
      this.#resume?.();
    }
  };

  #look(silence = this.#options.silence) {
    if (this.#state === "connecting") {
      silence = Math.min(silence, FIRST_ANSWER_MS * 2 ** this.#failures);
    }
    if (this.#connection !== null && Date.now() - this.#heardAt > silence) {
      this.#reconnect();
    }
  }

  // -- events --------------------------------------------------------------------------------------------------------

  #take({ type, data, id }) {
    if (this.#over || this.#again) {
      return;
    }
    const value = JSON_EVENTS.has(type) ? JSON.parse(data) : data;
    if (type === "gap" && this.#restartsFor(value)) {
      return;
    }
    this.#events += 1;
    this.#id = id ?? this.#id;
    if (type === "message") {
      this.#text += this.#options.json ? JSON.parse(data) : data;
      this.#draw();
    } else if (type === "snapshot") {
      this.#attempt = value.attempt_index;
      this.#gaps = 0;
      const { documentText = (document) => document.text ?? "" } = this.#options;
      this.#replace(documentText(value.document));
    } else if (type === "attempt") {
      this.#attempt = value.attempt_index;
      this.#gaps = 0;
      this.#replace("");
      this.#tell("onAttempt", value);
    } else if (type === "gap") {
      this.#gaps += 1;
      this.#tell("onGap", value);
    } else if (type === "end") {
      this.#finishAt(value);
    } else {
      this.#tell("onEvent", { type, data, id });
    }
  }

  /** Read all again because of a gap; but not when that has shown the gap already. */
  #restartsFor(gap) {
    if (this.#whole && (this.#text === "" || this.#gapRead === gap.first_missing)) {
      return false;
    }
    this.#gapRead = gap.first_missing;
    this.#id = null;
    this.#reconnect(!this.#whole);
    return true;
  }

  #finishAt(end) {
    this.#end = end;
    this.#finish("ended");
    this.#settle.resolve(end);
  }

  #refuse(error) {
    this.#finish("refused");
    this.#settle.reject(error);
  }

  #finish(state) {
    this.#listen(false);
    clearInterval(this.#watch);
    this.#become(state);
    this.#connection?.abort();
    this.#resume?.();
    this.#paint();
  }

  #become(state) {
    if (this.#state !== state && !this.#over) {
      this.#state = state;
      this.#tell("onState", state, this);
    }
  }

  /** Call a function of the page; its errors are its own. */
  #tell(name, ...args) {
    try {
      this.#options[name]?.(...args);
    } catch (error) {
      (globalThis.reportError ?? console.error)(error);
    }
  }

  // -- the page ------------------------------------------------------------------------------------------------------

  #replace(text) {
    this.#text = text;
    this.#replaced = true;
    this.#draw();
  }

  /** Paint with the next animation frame; a hidden page has none, and paints when it is seen. */
  #draw() {
    if (this.#frame === null && (this.#node !== null || this.#options.onText)) {
      const later = globalThis.requestAnimationFrame ?? ((paint) => setTimeout(paint, 16));
      this.#frame = later(() => this.#paint());
    }
  }

  #paint() {
    this.#frame = null;
    const text = this.#text;
    if (this.#replaced) {
      // What is read again, or written by another worker, mostly begins as before: it is not taken away meanwhile.
      if (!this.#over && text.length < this.#shown.length && this.#shown.startsWith(text)) {
        return;
      }
      if (!text.startsWith(this.#shown)) {
        this.#shown = "";
        if (this.#node !== null) {
          this.#node.data = "";
        }
      }
      this.#replaced = false;
    } else if (text.length === this.#shown.length) {
      return;
    }
    this.#node?.appendData(text.slice(this.#shown.length));
    this.#shown = text;
    this.#tell("onText", text, this);
  }
}

/** Whether a request with this status may pass later. */
function isPassing(status) {
  return status >= 500 || [408, 425, 429].includes(status);
}

async function refusal(answer) {
  let message = `The server answered ${answer.status}.`;
  try {
    message = (await answer.json()).error.message ?? message;
  } catch {
    // It is not an answer of ff_fast.
  }
  return new Refused(answer.status, message);
}

/** Returns a function that takes text, in pieces of any size, and calls `take` with each event that they complete. */
function parser(take, retry) {
  let rest = "";
  let data = [];
  let type = "";
  let id = null;
  return (text) => {
    // A carriage return at the end may be one half of a line end.
    const lines = (rest + text).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length) {
          take({ type: type || "message", data: data.join("\n"), id });
        }
        data = [];
        type = "";
        continue;
      }
      const colon = line.indexOf(":");
      const name = colon < 0 ? line : line.slice(0, colon);
      let value = colon < 0 ? "" : line.slice(colon + 1);
      if (value.startsWith(" ")) {
        value = value.slice(1);
      }
      if (name === "data") {
        data.push(value);
      } else if (name === "event") {
        type = value;
      } else if (name === "id" && !value.includes("\0")) {
        id = value || null;
      } else if (name === "retry" && /^\d+$/.test(value)) {
        retry(Number(value));
      }
    }
  };
}
