// Puts the page together: what the person sees, from the camera, the sensors and the computer.

import { Camera } from "./camera.js";
import { Link } from "./link.js";
import { PlanView } from "./plan.js";
import { keepAwake, Place, screenAngle, Tilt } from "./sensors.js";

const TITLES = {
  waiting: "Getting ready…",
  hold_still: "Hold still…",
  begin: "Move sideways",
  mapping: "Mapping",
  slower: "Move slower",
  join: "Find the map",
  lost: "Come back, lost here",
  paused: "Paused",
  ended: "The run has ended",
};
const DOUBT_TITLES = {
  good: "It can be better",
  doubtful: "Part of the map may be wrong",
  wrong: "The map is wrong",
};
const CAMERA_ERRORS = {
  NotAllowedError: "The camera is not allowed. Allow it in the browser's settings of this page.",
  NotFoundError: "This device has no camera.",
  NotReadableError: "Another app uses the camera. Close it, then try again.",
};
const RATE_WINDOW_MS = 3000;

const byId = (id) => document.getElementById(id);
const settings = document.body.dataset;

let sequence = 0;
let isPausedHere = false;
let hasStarted = false;
let state = { advice: "waiting", hint: "", verdict: "good", doubt: "", doubt_age_s: null, frames: 0, keyframes: 0, registered: 0, points: 0 };
let sentAtMs = [];

// The secret of the invitation was used; nobody needs to see it.
history.replaceState(null, "", location.pathname);

const plan = new PlanView(byId("plan"));
const tilt = new Tilt();
const link = new Link({ onNews: takeNews, onChange: showLink });
const place = new Place({
  onPosition: (message) => link.sendText(message),
  onLevel: (level, words) => showChip("place-chip", level, words),
});
const camera = new Camera(byId("camera"), {
  edgePx: Number(settings.edgePx),
  rateHz: Number(settings.rateHz),
  jpegQuality: Number(settings.jpegQuality),
});

camera.mayTake = () => hasStarted && !isPausedHere && link.isFree;
camera.onPicture = ({ jpeg, width, height, capturedAtMs }) => {
  sequence += 1;
  const header = {
    seq: sequence,
    captured_at_ms: capturedAtMs,
    width,
    height,
    angle: screenAngle(),
    ...tilt.now,
  };
  if (link.sendPicture(header, jpeg)) sentAtMs.push(performance.now());
};
camera.onLost = () => {
  if (!link.isOver) cover("The camera stopped", "Another app may have taken it.", "Start again");
};

function takeNews(news) {
  if (news.plan) plan.setPlan(news.plan);
  if (!news.state) return;
  const before = state.advice;
  state = news.state;
  plan.setState(state);
  show();
  if (state.advice === "lost" && before !== "lost") navigator.vibrate?.([90, 60, 90]);
}

function show() {
  let { advice, hint } = state;
  let title = TITLES[advice] ?? advice;
  if (link.state === "lost") {
    [advice, title, hint] = ["offline", "Reconnecting…", "The computer cannot be reached"];
  } else if (isPausedHere && advice !== "ended") {
    [advice, title, hint] = ["paused", "Paused", "No pictures are sent"];
  }
  document.body.dataset.advice = advice;
  setText("title", title);
  setText("hint", hint);
  showDoubt();
  for (const name of ["keyframes", "points", "frames"]) setText(name, short(state[name]));
  setText("plan-note", state.plan ? "" : "The map appears here");
}

/** What the computer doubts about the map, and what the person can do about it. */
function showDoubt() {
  const { verdict, doubt, doubt_age_s: ageS } = state;
  byId("doubt").hidden = !doubt;
  document.body.dataset.verdict = verdict;
  setText("doubt-title", DOUBT_TITLES[verdict] ?? "");
  setText("doubt-text", doubt);
  setText("doubt-age", ageS == null ? "" : `filmed ${age(ageS)} ago`);
}

/** 40 s or 3 min. */
function age(seconds) {
  return seconds < 100 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
}

/** 1,234 or 123k. */
function short(number) {
  const isLong = number >= 100_000;
  return isLong ? `${Math.round(number / 1000)}k` : number.toLocaleString("en");
}

function setText(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

function showChip(id, level, words) {
  byId(id).dataset.level = level;
  setText(id, words);
}

function showLink() {
  show();
  showRate();
  if (link.state === "ended") end();
  if (link.state === "replaced") {
    camera.stop();
    cover("Continued elsewhere", "This page is open in another tab of this phone.", "Use this tab");
  }
  if (link.state === "refused") {
    camera.stop();
    cover("This run is over", "Scan the code of the new run.", "");
  }
}

function showRate() {
  const nowMs = performance.now();
  sentAtMs = sentAtMs.filter((sentMs) => nowMs - sentMs < RATE_WINDOW_MS);
  const rateHz = (1000 * sentAtMs.length) / RATE_WINDOW_MS;
  const words = {
    connecting: ["wait", "Connecting"],
    open: rateHz ? ["good", `Live ${rateHz.toFixed(rateHz < 10 ? 1 : 0)} fps`] : ["wait", "Connected"],
    lost: ["bad", "No connection"],
  };
  showChip("link-chip", ...(words[link.state] ?? ["off", "Ended"]));
}

function cover(title, text, button) {
  setText("cover-title", title);
  setText("cover-text", text);
  byId("cover-asks").hidden = byId("cover-note").hidden = true;
  byId("start").hidden = !button;
  byId("start").disabled = false;
  setText("start", button);
  byId("cover").hidden = false;
}

function end() {
  camera.stop();
  hasStarted = false;
  cover("The run has ended", "The computer finishes the map. You can close this page.", "");
  const figures = [
    [state.registered, "keyframes in the map"],
    [state.points, "points"],
  ];
  byId("cover-figures").replaceChildren(
    ...figures.map(([number, name]) => {
      const [group, value, term] = ["div", "dd", "dt"].map((tag) => document.createElement(tag));
      value.textContent = short(number);
      term.textContent = name;
      group.append(value, term);
      return group;
    }),
  );
  byId("cover-figures").hidden = false;
}

async function start() {
  if (link.state === "replaced") return location.reload();
  byId("start").disabled = true;
  if (!navigator.mediaDevices?.getUserMedia) {
    return cover("No camera here", "This browser gives pages no camera.", "");
  }
  await tilt.start();
  try {
    await camera.start();
  } catch (error) {
    const text = CAMERA_ERRORS[error.name] ?? `The camera cannot be opened: ${error.message}`;
    return cover("No camera", text, "Try again");
  }
  hasStarted = true;
  byId("cover").hidden = true;
  keepAwake();
  place.start();
  return show();
}

byId("start").addEventListener("click", start);
byId("pause").addEventListener("click", () => {
  isPausedHere = !isPausedHere;
  byId("pause").setAttribute("aria-pressed", String(isPausedHere));
  setText("pause-word", isPausedHere ? "Resume" : "Pause");
  show();
});
document.addEventListener("visibilitychange", () => {
  // Phones take the camera away from pages in the background.
  if (!document.hidden && hasStarted && !camera.isRunning) camera.start().catch(camera.onLost);
});
setInterval(showRate, 500);
link.open();
