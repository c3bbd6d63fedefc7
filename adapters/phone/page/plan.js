// The map from above: what was seen, the way, and where the phone is or was lost.

const PADDING_PX = 18;
const EASE = 0.14; // of the remaining way, each time it is drawn

/** A small picture of the coverage, as its cells came. */
function picture({ width, height, cells }) {
  const bytes = Uint8ClampedArray.from(atob(cells), (char) => char.charCodeAt(0));
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(new ImageData(bytes, width, height), 0, 0);
  return canvas;
}

export class PlanView {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.plan = null;
    this.state = {};
    this.view = null; // centre and scale, easing towards what fits
    const draw = () => {
      this.#draw();
      requestAnimationFrame(draw);
    };
    requestAnimationFrame(draw);
  }

  setPlan(plan) {
    this.plan = { ...plan, picture: picture(plan) };
  }

  /** Places are on the plan whose version the state names. */
  setState(state) {
    this.state = state;
  }

  #fitting(width, height) {
    let [left, top, right, bottom] = [0, 0, this.plan.width, this.plan.height];
    for (const place of [this.state.here, this.state.lost_at]) {
      if (!place) continue;
      left = Math.min(left, place[0]);
      right = Math.max(right, place[0]);
      top = Math.min(top, place[1]);
      bottom = Math.max(bottom, place[1]);
    }
    const scale = Math.min(
      (width - 2 * PADDING_PX) / (right - left),
      (height - 2 * PADDING_PX) / (bottom - top),
    );
    return { x: (left + right) / 2, y: (top + bottom) / 2, scale };
  }

  #draw() {
    const { canvas, context } = this;
    const density = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (canvas.width !== Math.round(width * density)) canvas.width = Math.round(width * density);
    if (canvas.height !== Math.round(height * density)) canvas.height = Math.round(height * density);
    context.setTransform(density, 0, 0, density, 0, 0);
    context.clearRect(0, 0, width, height);
    if (!this.plan || !width) return;
    const wanted = this.#fitting(width, height);
    this.view ??= wanted;
    for (const key of ["x", "y", "scale"]) {
      this.view[key] += EASE * (wanted[key] - this.view[key]);
    }
    const { x, y, scale } = this.view;
    const onScreen = ([px, py]) => [(px - x) * scale + width / 2, (py - y) * scale + height / 2];
    this.#drawCoverage(onScreen, scale);
    const here = this.state.lost_at ? null : this.state.here;
    this.#drawPaths(onScreen, here);
    if (this.state.lost_at) this.#drawLost(onScreen(this.state.lost_at));
    else if (here) this.#drawHere(onScreen(here), this.state.heading);
  }

  #drawCoverage(onScreen, scale) {
    const [left, top] = onScreen([0, 0]);
    const { width, height } = this.plan;
    this.context.imageSmoothingEnabled = false;
    this.context.drawImage(this.plan.picture, left, top, width * scale, height * scale);
  }

  /** Every phone's way; this one's goes on from its last keyframe to where it is now. */
  #drawPaths(onScreen, here) {
    const { context } = this;
    context.lineJoin = context.lineCap = "round";
    for (const [color, thickness] of [["rgb(4 8 12 / 75%)", 6], ["#3ddc97", 2.5]]) {
      context.strokeStyle = color;
      context.lineWidth = thickness;
      for (const path of this.plan.paths) {
        context.beginPath();
        for (const place of path.places) context.lineTo(...onScreen(place));
        if (here && path.phone === this.state.phone) context.lineTo(...onScreen(here));
        context.stroke();
      }
    }
  }

  #drawHere([x, y], heading) {
    const { context } = this;
    const angle = heading ? Math.atan2(heading[1], heading[0]) : -Math.PI / 2;
    context.save();
    context.translate(x, y);
    context.rotate(angle);
    const reach = 46;
    const fan = context.createRadialGradient(0, 0, 4, 0, 0, reach);
    fan.addColorStop(0, "rgb(255 255 255 / 65%)");
    fan.addColorStop(1, "rgb(255 255 255 / 0%)");
    context.fillStyle = fan;
    context.beginPath();
    context.moveTo(0, 0);
    context.arc(0, 0, reach, -0.5, 0.5);
    context.fill();
    context.restore();
    this.#dot(x, y, 7, "#ffffff", "#1583ff");
  }

  #drawLost([x, y]) {
    const { context } = this;
    const phase = (performance.now() % 1400) / 1400;
    context.strokeStyle = `rgb(255 93 93 / ${Math.round(100 * (1 - phase))}%)`;
    context.lineWidth = 3;
    context.beginPath();
    context.arc(x, y, 8 + 24 * phase, 0, 2 * Math.PI);
    context.stroke();
    this.#dot(x, y, 8, "#ffffff", "#ff5d5d");
  }

  #dot(x, y, radius, rim, fill) {
    const { context } = this;
    for (const [size, color] of [[radius, rim], [radius - 2.5, fill]]) {
      context.fillStyle = color;
      context.beginPath();
      context.arc(x, y, size, 0, 2 * Math.PI);
      context.fill();
    }
  }
}
