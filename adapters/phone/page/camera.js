// The rear camera, and JPEG pictures of what it sees.

export class Camera {
  /** settings: longer edge in px, pictures a second, JPEG quality 1..100. */
  constructor(video, { edgePx, rateHz, jpegQuality }) {
    this.video = video;
    this.edgePx = edgePx;
    this.periodMs = 1000 / rateHz;
    this.quality = jpegQuality / 100;
    this.canvas = document.createElement("canvas");
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.stream = null;
    this.nextMs = 0;
    this.isEncoding = false;
    this.isWatching = false;
    this.mayTake = () => false;
    this.onPicture = () => {};
    this.onLost = () => {};
  }

  async start() {
    this.stop();
    this.stream = await navigator.mediaDevices.getUserMedia({
      audio: false,
      video: {
        facingMode: { ideal: "environment" },
        width: { ideal: this.edgePx },
        height: { ideal: Math.round((this.edgePx * 3) / 4) },
        frameRate: { ideal: 30 },
      },
    });
    for (const track of this.stream.getVideoTracks()) {
      track.addEventListener("ended", () => this.onLost());
    }
    this.video.srcObject = this.stream;
    await this.video.play();
    if (!this.isWatching) {
      this.isWatching = true;
      this.#next();
    }
  }

  stop() {
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.stream = null;
  }

  get isRunning() {
    return this.stream?.getVideoTracks().some((track) => track.readyState === "live") ?? false;
  }

  #next() {
    if (this.video.requestVideoFrameCallback) {
      this.video.requestVideoFrameCallback((nowMs, shown) => {
        this.#see(shown.captureTime ?? nowMs);
        this.#next();
      });
    } else {
      requestAnimationFrame((nowMs) => {
        this.#see(nowMs);
        this.#next();
      });
    }
  }

  /** Takes a picture of the video if one is due and can go out. */
  #see(capturedMs) {
    const nowMs = performance.now();
    if (nowMs < this.nextMs || this.isEncoding || !this.isRunning || !this.mayTake()) return;
    const { videoWidth, videoHeight } = this.video;
    if (!videoWidth || this.video.readyState < HTMLMediaElement.HAVE_CURRENT_DATA) return;
    // In step with the rate; after a pause from now on.
    this.nextMs = Math.max(this.nextMs + this.periodMs, nowMs + this.periodMs / 2);
    const scale = Math.min(1, this.edgePx / Math.max(videoWidth, videoHeight));
    const width = Math.round(videoWidth * scale);
    const height = Math.round(videoHeight * scale);
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    this.context.drawImage(this.video, 0, 0, width, height);
    // performance.timeOrigin would be wrong after the phone slept: performance.now() may stop.
    const capturedAtMs = Date.now() - (nowMs - capturedMs);
    this.isEncoding = true;
    this.canvas.toBlob(
      (jpeg) => {
        this.isEncoding = false;
        if (jpeg) this.onPicture({ jpeg, width, height, capturedAtMs });
      },
      "image/jpeg",
      this.quality,
    );
  }
}
