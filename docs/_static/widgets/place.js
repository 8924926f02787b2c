// Place k points yourself: drag them on a sphere, watch the class margin, and let a loss or the solver do it.
import d3, {marks} from './d3.js';
import {degrees} from './formulas.js';
import {angle, closest, decode, descend, encode, losses, scattered, solve, unit} from './points.js';
import {calm, keep, kept, linkButton, pictureButton} from './state.js';

const size = 420, radius = 190, centre = size / 2, most = 30;

const markup = `
<form class="widget-controls" aria-label="Points">
  <label>points k <input type="number" name="k" min="2" max="${most}" value="8" required inputmode="numeric"></label>
  <label>seed <input type="number" name="seed" min="0" max="9999" value="0" required inputmode="numeric"></label>
  <button type="button" name="start">New start</button>
  <button type="button" name="undo" disabled>Undo</button>
</form>
<div class="widget-place">
  <figure>
    <svg class="sphere" viewBox="0 0 ${size} ${size}" tabindex="0" role="application"
         aria-roledescription="sphere with points" aria-label="A sphere"></svg>
  </figure>
  <div>
    <div class="widget-score"><output name="margin" class="margin"></output>
      <span class="bar"><span class="fill"></span><span class="best" title="best found"></span></span>
      <span class="limit"></span></div>
    <p class="said" aria-live="polite"></p>
    <p class="widget-label" id="let">Let one of these do it:</p>
    <div class="widget-buttons" role="group" aria-labelledby="let">
      ${Object.entries(losses).map(([key, {name}]) => `<button type="button" data-loss="${key}">${name}</button>`).join('')}
      <button type="button" data-loss="solver">Solver</button>
    </div>
    <label>turn <input type="range" name="turn" min="-180" max="180" value="-35"></label>
    <label>tilt <input type="range" name="tilt" min="-90" max="90" value="20"></label>
    <div class="widget-buttons shared"></div>
    <p class="widget-help">Drag a point; drag elsewhere to turn the sphere. By keyboard: click or Tab to the sphere,
    Page Down picks the next point, arrow keys move it (with Shift a little), Escape lets go; without a point
    the arrow keys turn the sphere.</p>
  </div>
</div>`;

// --- the view: a turn about the vertical axis, then a tilt ---

function toView([x, y, z], turn, tilt) {
  const [ct, st, cu, su] = [Math.cos(turn), Math.sin(turn), Math.cos(tilt), Math.sin(tilt)];
  const across = x * ct - y * st, away = x * st + y * ct;
  return [across, z * cu - away * su, away * cu + z * su];     // right, up, toward the reader
}

function fromView([right, up, near], turn, tilt) {
  const [ct, st, cu, su] = [Math.cos(turn), Math.sin(turn), Math.cos(tilt), Math.sin(tilt)];
  const z = up * cu + near * su, away = near * cu - up * su;
  return [right * ct + away * st, away * ct - right * st, z];
}

const circles = [-60, -30, 0, 30, 60].map(latitude => d3.range(0, 361, 6).map(longitude => {
  const [u, v] = [latitude, longitude].map(x => x * Math.PI / 180);
  return [Math.cos(u) * Math.cos(v), Math.cos(u) * Math.sin(v), Math.sin(u)];
}));

export default function draw(widget, data) {
  widget.innerHTML = markup;
  const form = widget.querySelector('form'), {k, seed, start, undo} = form.elements;
  const [turn, tilt] = ['turn', 'tilt'].map(name => widget.querySelector(`[name=${name}]`));
  const svg = d3.select(widget.querySelector('svg.sphere')), sphere = svg.node();
  const [margin, fill, best, limit, said] = ['.margin', '.fill', '.best', '.limit', '.said']
    .map(name => widget.querySelector(name));
  widget.querySelector('.shared').append(linkButton(), pictureButton(sphere, 'points-on-a-sphere'));
  svg.append('circle').attr('class', 'ball').attr('cx', centre).attr('cy', centre).attr('r', radius);
  const layers = Object.fromEntries(['grid', 'behind', 'pair', 'front'].map(name => [name, svg.append('g').attr('class', name)]));

  let points, chosen = null, running = null;
  const before = [];
  const view = () => [+turn.value, +tilt.value].map(x => x * Math.PI / 180);
  const place = p => {
    const [right, up, near] = toView(p, ...view());
    return {x: centre + radius * right, y: centre - radius * up, near: near >= 0};
  };

  function remember() {
    before.push({points, seed: seed.value});
    if (before.length > 60) before.shift();
    undo.disabled = false;
  }

  function tell() {
    const found = closest(points), known = data.best[points.length];
    const reached = degrees(found.angle);
    const [i, j] = found.pair;
    let text = `${reached.toFixed(2)}° between points ${i} and ${j}, the closest two. `;
    if (known && reached > known - 0.02) text += 'Nobody knows a better arrangement.';
    else if (known) text += `The best known is ${known.toFixed(2)}°.`;
    said.textContent = text;
    sphere.setAttribute('aria-label', `Sphere with ${points.length} points. Class margin ${text}`);
    keep({k: points.length, seed: seed.value, turn: turn.value, tilt: tilt.value, p: encode(points)});
  }

  function redraw() {
    const found = closest(points), reached = degrees(found.angle), possible = data.bounds[points.length];
    const line = rows => rows.map(place).reduce((path, {x, y, near}, n, all) =>
      path + (near ? `${n && all[n - 1].near ? 'L' : 'M'}${x.toFixed(1)},${y.toFixed(1)}` : ''), '');
    marks(layers.grid, 'path', 'graticule', circles).attr('d', line);
    const at = points.map((p, i) => ({...place(p), i, close: found.pair.includes(i)}));
    const arc = d3.range(0, 25).map(n => {
      const [a, b] = found.pair.map(i => points[i]);
      return place(unit(a.map((x, axis) => x * (1 - n / 24) + b[axis] * n / 24)));
    });
    marks(layers.pair, 'path', 'contact', [arc]).attr('d', a => d3.line(p => p.x, p => p.y)(a))
      .attr('stroke-dasharray', arc[12].near ? null : '4 4');
    const dots = (layer, shown, r) => {
      const size = p => r + (p.i === chosen ? 3 : 0);
      marks(layer, 'circle', 'prototype', shown).attr('cx', p => p.x).attr('cy', p => p.y).attr('r', size)
        .attr('data-i', p => p.i).classed('close', p => p.close).classed('chosen', p => p.i === chosen);
      marks(layer, 'text', 'number', layer === layers.front ? shown : []).text(p => p.i).attr('x', p => p.x).attr('y', p => p.y + 4);
    };
    dots(layers.behind, at.filter(p => !p.near), 8);
    dots(layers.front, at.filter(p => p.near), 11);
    margin.textContent = `${reached.toFixed(2)}°`;
    fill.style.width = `${100 * reached / possible}%`;
    best.style.left = `${100 * (data.best[points.length] ?? possible) / possible}%`;
    limit.textContent = `nothing exceeds ${possible.toFixed(2)}°`;
  }

  function show() {
    redraw();
    tell();
  }

  // --- by hand ---

  function towards(event) {    // the point of the near side under the pointer, or the nearest on the rim
    const box = sphere.getBoundingClientRect(), scale = size / box.width / radius;
    let right = (event.clientX - box.x - box.width / 2) * scale, up = (box.y + box.height / 2 - event.clientY) * scale;
    const out = Math.hypot(right, up);
    if (out > 1) [right, up] = [right / out, up / out];
    return unit(fromView([right, up, Math.sqrt(Math.max(0, 1 - right * right - up * up))], ...view()));
  }

  let drag = null;
  sphere.addEventListener('pointerdown', event => {
    stop();
    const hit = event.target.closest('.front circle[data-i]');
    sphere.setPointerCapture(event.pointerId);
    drag = hit ? {i: +hit.dataset.i} : {x: event.clientX, y: event.clientY};
    if (!hit) { chosen = null; redraw(); return; }
    remember();
    chosen = drag.i;
    redraw();
  });
  sphere.addEventListener('pointermove', event => {
    if (!drag) return;
    if ('i' in drag) {
      points = points.map((p, i) => i === drag.i ? towards(event) : p);
    } else {
      turnBy((event.clientX - drag.x) * 0.4, (event.clientY - drag.y) * 0.4);
      [drag.x, drag.y] = [event.clientX, event.clientY];
    }
    redraw();
  });
  for (const end of ['pointerup', 'pointercancel']) {
    sphere.addEventListener(end, () => {
      if (!drag) return;
      drag = null;
      tell();
    });
  }

  function turnBy(right, down) {
    turn.value = ((+turn.value - right + 540) % 360) - 180;
    tilt.value = +tilt.value + down;
  }

  // --- by keyboard ---

  const arrows = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]};
  sphere.addEventListener('keydown', event => {
    const n = points.length;
    if (event.key === 'PageDown') chosen = chosen === null ? 0 : (chosen + 1) % n;
    else if (event.key === 'PageUp') chosen = chosen === null ? n - 1 : (chosen + n - 1) % n;
    else if (event.key === 'Escape') chosen = null;
    else if (!(event.key in arrows)) return;
    event.preventDefault();
    stop();
    if (event.key in arrows && chosen === null) turnBy(5 * arrows[event.key][0], -5 * arrows[event.key][1]);
    else if (event.key in arrows) {
      const step = (event.shiftKey ? 0.2 : 2) * Math.PI / 180, [right, up, near] = toView(points[chosen], ...view());
      const [dx, dy] = arrows[event.key];
      if (!event.repeat) remember();
      points = points.map((p, i) => i === chosen
        ? unit(fromView(unit([right + step * dx, up + step * dy, near]), ...view())) : p);
    }
    show();
  });

  // --- by a loss, or by the solver ---

  function stop() {
    if (!running) return;
    running.timer?.stop();
    running.button.setAttribute('aria-pressed', 'false');
    running = null;
    show();
  }

  function animate(button, frames, step) {
    remember();
    running = {button};
    button.setAttribute('aria-pressed', 'true');
    said.textContent = `${button.textContent} moves the points. Press the button again to stop.`;
    if (calm()) {      // no motion: only the end
      for (let n = 0; n < frames; n++) step(n);
      return stop();
    }
    let n = 0;
    running.timer = d3.timer(() => {
      step(n++);
      redraw();
      if (n >= frames) stop();
    });
  }

  for (const button of widget.querySelectorAll('[data-loss]')) {
    button.setAttribute('aria-pressed', 'false');
    button.addEventListener('click', () => {
      const again = running?.button === button;
      stop();
      if (again) return;
      const loss = losses[button.dataset.loss];
      if (loss) {
        animate(button, 400, n => { points = descend(points, loss.slopes, loss.rate * (1 - n / 400)); });
        return;
      }
      const from = points, to = solve(points, data.packings[points.length]);
      animate(button, 60, n => {
        const t = (n + 1) / 60;
        points = from.map((p, i) => t === 1 ? to[i] : between(p, to[i], t * t * (3 - 2 * t)));
      });
    });
  }

  const between = (a, b, t) => {
    const whole = angle(a, b);
    if (whole < 1e-9 || whole > Math.PI - 1e-6) return b;
    const [u, v] = [(1 - t) * whole, t * whole].map(Math.sin);
    return unit(a.map((x, axis) => u * x + v * b[axis]));
  };

  // --- the form ---

  function anew() {
    if (!k.checkValidity() || !seed.checkValidity()) return;
    stop();
    if (points) remember();
    chosen = null;
    points = scattered(+k.value, +seed.value);
    show();
  }

  undo.addEventListener('click', () => {
    stop();
    const last = before.pop();
    if (!last) return;
    points = last.points;
    [k.value, seed.value, undo.disabled] = [points.length, last.seed, !before.length];
    chosen = null;
    show();
  });
  start.addEventListener('click', () => {
    seed.value = (+seed.value + 1) % 10000;
    anew();
  });
  for (const input of [k, seed]) input.addEventListener('change', anew);
  for (const input of [turn, tilt]) input.addEventListener('input', show);
  form.addEventListener('submit', event => event.preventDefault());

  const {p, ...rest} = kept();
  for (const [name, value] of Object.entries(rest)) {
    const input = widget.querySelector(`input[name=${CSS.escape(name)}]`);
    if (input) input.value = value;
  }
  points = decode(p);
  if (points) {
    k.value = points.length;
    show();
  } else {
    points = scattered(+k.value || 8, +seed.value || 0);
    show();
  }
}
