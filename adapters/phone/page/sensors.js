// What a phone knows besides pictures, as far as the person allows it; and a screen that stays on.

/** How far the screen's content is turned against the device: 0, 90, 180 or 270. */
export function screenAngle() {
  const angle = screen.orientation?.angle ?? window.orientation ?? 0;
  return ((Math.round(angle / 90) * 90) % 360 + 360) % 360;
}

/** Which way is up. */
export class Tilt {
  constructor() {
    this.beta = null;
    this.gamma = null;
  }

  /** Has to be called in answer to a touch: Safari asks only then. */
  async start() {
    const asks = window.DeviceOrientationEvent?.requestPermission;
    try {
      if (asks && (await asks.call(window.DeviceOrientationEvent)) !== "granted") return;
    } catch {
      return;
    }
    window.addEventListener("deviceorientation", (event) => {
      if (!Number.isFinite(event.beta) || !Number.isFinite(event.gamma)) return;
      this.beta = event.beta;
      this.gamma = event.gamma;
    });
    document.addEventListener("visibilitychange", () => {
      this.beta = this.gamma = null; // a hidden page gets nothing
    });
  }

  /** { beta, gamma } in degrees, or nothing where it is not known. A phone held still is silent. */
  get now() {
    return this.beta === null ? {} : { beta: this.beta, gamma: this.gamma };
  }
}

/** Where the phone is. onPosition gets messages, onLevel words for the person. */
export class Place {
  constructor({ onPosition, onLevel }) {
    this.onPosition = onPosition;
    this.onLevel = onLevel;
    this.watch = null;
  }

  start() {
    if (this.watch !== null || !navigator.geolocation) return;
    this.onLevel("wait", "Locating");
    this.watch = navigator.geolocation.watchPosition(
      (position) => this.#take(position),
      (error) => {
        const isDenied = error.code === error.PERMISSION_DENIED;
        this.onLevel(isDenied ? "off" : "wait", isDenied ? "No location" : "Locating");
      },
      { enableHighAccuracy: true, maximumAge: 0 },
    );
  }

  #take({ coords, timestamp }) {
    const message = {
      type: "position",
      captured_at_ms: timestamp,
      latitude: coords.latitude,
      longitude: coords.longitude,
      accuracy: coords.accuracy,
    };
    const hasAltitude = Number.isFinite(coords.altitude);
    if (hasAltitude) message.altitude = coords.altitude;
    this.onPosition(message);
    const words = `GPS ±${Math.max(1, Math.round(coords.accuracy))} m`;
    this.onLevel("good", hasAltitude ? words : `${words}, no height`);
  }
}

/** Keeps the screen on where the browser can. */
export function keepAwake() {
  const ask = () => {
    if (!document.hidden) navigator.wakeLock?.request("screen").catch(() => {});
  };
  ask();
  document.addEventListener("visibilitychange", ask); // it is let go when the page is hidden
}
