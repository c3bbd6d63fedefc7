// The line to the computer: a WebSocket, or plain requests where the browser refuses that one.
//
// Both count pictures: the computer reports how many it is done with, and no more than a few are on
// their way at any time, so that what arrives is fresh.

const MAX_ON_THE_WAY = 3;
const MAX_BUFFERED_BYTES = 256 * 1024;
const STUCK_MS = 6000; // with pictures on the way and no news of them
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 4000;
const POLL_MS = 500;
const CLOSED_REPLACED = 4000;
const CLOSED_ENDED = 4001;

/** Length of the header as 32 bits, big-endian; the header; the JPEG. */
function asMessage(header, jpeg) {
  const text = new TextEncoder().encode(JSON.stringify(header));
  const length = new DataView(new ArrayBuffer(4));
  length.setUint32(0, text.length);
  return new Blob([length.buffer, text, jpeg]);
}

export class Link {
  /** onNews gets what the computer sends, onChange the state of the line. */
  constructor({ onNews, onChange }) {
    this.onNews = onNews;
    this.onChange = onChange;
    this.state = "connecting"; // open, lost, ended, replaced, refused
    this.socket = null;
    this.isPosting = false;
    this.hasEverOpened = false;
    this.numFailures = 0;
    this.retryMs = FIRST_RETRY_MS;
    this.timer = 0;
    this.knownPlan = 0;
    this.reset();
    window.addEventListener("online", () => this.#retryNow());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.#retryNow();
    });
    setInterval(() => this.#watch(), 1000);
  }

  open() {
    if (this.isOver) return;
    clearTimeout(this.timer);
    if (this.isPosting) this.#poll();
    else this.#connect();
  }

  get isOver() {
    return this.state === "ended" || this.state === "replaced" || this.state === "refused";
  }

  get isFree() {
    if (this.state !== "open" || this.numSent - this.numLeft >= MAX_ON_THE_WAY) return false;
    return this.isPosting || this.socket.bufferedAmount < MAX_BUFFERED_BYTES;
  }

  sendPicture(header, jpeg) {
    if (!this.isFree) return false;
    this.numSent += 1;
    this.lastNewsMs = this.numSent - this.numLeft === 1 ? Date.now() : this.lastNewsMs;
    const message = asMessage(header, jpeg);
    if (this.isPosting) this.#post(message, "application/octet-stream");
    else this.socket.send(message);
    return true;
  }

  sendText(message) {
    if (this.state !== "open") return;
    const text = JSON.stringify(message);
    if (this.isPosting) this.#post(text, "application/json");
    else this.socket.send(text);
  }

  reset() {
    this.numSent = 0;
    this.numLeft = 0;
    this.leftBefore = null; // pictures the computer was done with before, when posting
    this.lastNewsMs = Date.now();
  }

  #become(state) {
    if (this.state === state || this.isOver) return;
    this.state = state;
    this.onChange(state);
  }

  #opened() {
    this.hasEverOpened = true;
    this.numFailures = 0;
    this.retryMs = FIRST_RETRY_MS;
    this.reset();
    this.#become("open");
  }

  #take(news) {
    this.lastNewsMs = Date.now();
    if (news.left !== undefined) {
      this.leftBefore = this.isPosting ? this.leftBefore ?? news.left : 0;
      this.numLeft = news.left - this.leftBefore;
    }
    if (news.plan) this.knownPlan = news.plan.version;
    this.onNews(news);
    if (news.state?.advice === "ended") this.#become("ended");
  }

  #connect() {
    this.knownPlan = 0;
    const socket = new WebSocket(`wss://${location.host}/frames`);
    this.socket = socket;
    let hasOpened = false;
    socket.onopen = () => {
      hasOpened = true;
      socket.send(JSON.stringify({ type: "hello" }));
      this.#opened();
    };
    socket.onmessage = (event) => this.#take(JSON.parse(event.data));
    socket.onclose = (event) => {
      if (event.code === CLOSED_ENDED) return this.#become("ended");
      if (event.code === CLOSED_REPLACED) return this.#become("replaced");
      if (!hasOpened) this.numFailures += 1;
      return this.#lost();
    };
  }

  /** Tries again later, the other way if a WebSocket never worked though the page was loaded. */
  #lost() {
    this.#become("lost");
    if (this.isOver) return;
    if (!this.hasEverOpened && this.numFailures >= 2) this.isPosting = true;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.open(), this.retryMs * (0.75 + 0.5 * Math.random()));
    this.retryMs = Math.min(2 * this.retryMs, LAST_RETRY_MS);
  }

  #retryNow() {
    if (this.state === "lost") this.open();
  }

  /** A network that went away says nothing: the browser believes in the connection for minutes. */
  #watch() {
    const isWaiting = this.state === "open" && this.numSent > this.numLeft;
    if (!isWaiting || Date.now() - this.lastNewsMs < STUCK_MS) return;
    if (this.socket) {
      this.socket.onclose = this.socket.onmessage = this.socket.onopen = null;
      this.socket.close();
    }
    this.#lost();
  }

  async #poll() {
    if (this.state === "open") await this.#post(null, "application/json");
    else if (await this.#post(JSON.stringify({ type: "hello" }), "application/json")) this.#opened();
    if (this.isOver || this.state === "lost") return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#poll(), POLL_MS);
  }

  async #post(body, type) {
    try {
      const answer = await fetch("/frames", {
        method: "POST",
        body: body ?? "",
        headers: { "Content-Type": type, "X-Plan": String(this.knownPlan) },
        signal: AbortSignal.timeout?.(STUCK_MS),
      });
      if (answer.status === 403) this.#become("refused");
      if (!answer.ok) throw new Error(answer.statusText);
      this.#take(await answer.json());
      return true;
    } catch {
      this.isPosting = this.hasEverOpened; // nothing works: begin again with a WebSocket
      this.numFailures = 0;
      this.#lost();
      return false;
    }
  }
}
