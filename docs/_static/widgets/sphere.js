// Two spheres that turn together: an arrangement of k prototypes against another.
import d3, {marks} from './d3.js';

const size = 320, radius = 150;
const names = {
  packing: 'best packing found', simplex: 'simplex', ce: 'trained with cross-entropy',
  cosface: 'trained with CosFace', lm: 'trained with LM-Softmax',
};

const options = chosen => Object.entries(names)
  .map(([value, name]) => `<option value="${value}"${value === chosen ? ' selected' : ''}>${name}</option>`).join('');

const markup = (least, most) => `
<form class="widget-controls" aria-label="What the spheres show">
  <label>classes <input type="range" name="k" min="${least}" max="${most}" value="8"> <output name="kShown"></output></label>
  <label>turn <input type="range" name="turn" min="-180" max="180" value="-35"></label>
  <label>tilt <input type="range" name="tilt" min="-90" max="90" value="20"></label>
  <span class="widget-checks">
    <label><input type="checkbox" name="caps" checked> caps</label>
    <label><input type="checkbox" name="contacts" checked> contacts</label>
    <label><input type="checkbox" name="features" checked> features</label>
    <button type="button" name="spin" aria-pressed="false">Keep turning</button>
  </span>
</form>
<div class="widget-spheres">
  ${['packing', 'lm'].map((chosen, n) => `
  <figure>
    <label>${n ? 'against' : 'show'} <select>${options(chosen)}</select></label>
    <svg viewBox="0 0 ${size} ${size}" tabindex="0" role="img" aria-label="A sphere"></svg>
    <figcaption aria-live="polite"></figcaption>
  </figure>`).join('')}
</div>
<p class="widget-help">Drag a sphere, press the arrow keys on it, or move the sliders. Orange points are prototypes,
hollow ones rattlers; a cap reaches half the class margin around each, so that caps touch where a blue contact joins
two prototypes. Green points are features of images.</p>`;

const place = ([x, y, z]) => [Math.atan2(y, x) * 180 / Math.PI, Math.asin(Math.max(-1, Math.min(1, z))) * 180 / Math.PI];

// what there is to say about an arrangement
function caption(name, k, found, bound) {
  if (!found) {
    return name === 'simplex'
      ? `No simplex: in three dimensions at most four prototypes are all equally far apart, not ${k}.`
      : `No run: the digits have ten classes, not ${k}.`;
  }
  const text = `${names[name]}: class margin ${found.margin.toFixed(3)}°, no arrangement exceeds ${bound.toFixed(3)}°`;
  if (found.accuracy !== undefined) return `${text}; ${(100 * found.accuracy).toFixed(1)} % of the images right`;
  const loose = found.rattlers.length;
  const count = (n, word) => `${n || 'no'} ${word}${n === 1 ? '' : 's'}`;
  return `${text}; ${count(found.contacts.length, 'contact')}, ${count(loose, 'rattler')}`;
}

// one hemisphere: the far one is the near one from the opposite direction, in a layer that mirrors it
function hemisphere(layer, found, front, turn, tilt, show) {
  const projection = d3.geoOrthographic().scale(radius).translate([size / 2, size / 2]).clipAngle(90).precision(0.1)
    .rotate(front ? [turn, -tilt] : [turn + 180, tilt]);
  const path = d3.geoPath(projection).pointRadius(1.7);
  const draw = (name, shapes) => marks(layer, 'path', name, shapes).attr('d', shape => path(shape) || '');
  draw('graticule', [d3.geoGraticule().step([30, 30])()]);
  const places = found ? found.points.map(place) : [];
  const cap = d3.geoCircle().radius(found ? found.margin / 2 : 0);
  draw('cap', show.caps ? places.map(p => cap.center(p)()) : []);
  draw('contact', show.contacts && found
    ? found.contacts.map(([i, j]) => ({type: 'LineString', coordinates: [places[i], places[j]]})) : []);
  draw('feature', show.features && found?.features
    ? [{type: 'MultiPoint', coordinates: found.features.map(place)}] : []);
  const [toX, toY] = projection.invert([size / 2, size / 2]);
  const seen = places.map((p, i) => ({at: projection(p), i, loose: found.rattlers?.includes(i)}))
    .filter(({i}) => d3.geoDistance(places[i], [toX, toY]) <= Math.PI / 2);
  marks(layer, 'circle', 'prototype', seen).classed('rattler', p => p.loose).attr('r', front ? 6 : 4)
    .attr('cx', p => p.at[0]).attr('cy', p => p.at[1]);
  marks(layer, 'text', 'number', front ? seen : []).text(p => p.i)
    .attr('x', p => p.at[0] + 9).attr('y', p => p.at[1] - 7);
}

export default function draw(widget, data) {
  const sizes = Object.keys(data.bounds).map(Number);
  widget.innerHTML = markup(Math.min(...sizes), Math.max(...sizes));
  const form = widget.querySelector('form'), {k, turn, tilt, spin, kShown} = form.elements;
  const figures = [...widget.querySelectorAll('figure')].map(figure => {
    const svg = d3.select(figure.querySelector('svg'));
    svg.append('circle').attr('class', 'ball').attr('cx', size / 2).attr('cy', size / 2).attr('r', radius);
    const [back, front] = ['back', 'front'].map(name => svg.append('g').attr('class', name));
    back.attr('transform', `translate(${size},0) scale(-1,1)`);
    return {svg, back, front, select: figure.querySelector('select'), caption: figure.querySelector('figcaption')};
  });

  function redraw() {
    const show = Object.fromEntries(['caps', 'contacts', 'features'].map(name => [name, form.elements[name].checked]));
    kShown.value = k.value;
    for (const {back, front, svg, select, caption: below} of figures) {
      const found = data.arrangements[k.value][select.value];
      hemisphere(back, found, false, +turn.value, +tilt.value, show);
      hemisphere(front, found, true, +turn.value, +tilt.value, show);
      const text = caption(select.value, k.value, found, data.bounds[k.value]);
      if (below.textContent !== text) {
        below.textContent = text;
        svg.attr('aria-label', `Sphere with ${k.value} classes, ${text}. Arrow keys turn it.`);
      }
    }
  }

  function turnBy(right, up) {
    turn.value = ((+turn.value + right + 540) % 360) - 180;
    tilt.value = +tilt.value + up;
    redraw();
  }

  const steps = {ArrowLeft: [-5, 0], ArrowRight: [5, 0], ArrowUp: [0, -5], ArrowDown: [0, 5]};
  for (const {svg, select} of figures) {
    const sphere = svg.node();
    select.addEventListener('change', redraw);
    sphere.addEventListener('pointerdown', event => sphere.setPointerCapture(event.pointerId));
    sphere.addEventListener('pointermove', event => {
      if (event.buttons) turnBy(event.movementX * 0.4, event.movementY * 0.4);
    });
    sphere.addEventListener('keydown', event => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      turnBy(...steps[event.key]);
    });
  }
  let timer = null;
  spin.addEventListener('click', () => {
    timer = timer ? timer.stop() : d3.interval(() => turnBy(0.5, 0), 30);
    spin.setAttribute('aria-pressed', String(Boolean(timer)));
  });
  form.addEventListener('input', redraw);
  form.addEventListener('submit', event => event.preventDefault());
  redraw();
}
