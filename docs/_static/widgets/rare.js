// Rare classes: the optimum of a loss for every imbalance ratio and scale, as a map, and as four prototypes.
import d3, {marks} from './d3.js';
import {keep, kept, linkButton, pictureButton} from './state.js';

const width = 340, height = 270, edge = {left: 46, right: 12, top: 10, bottom: 42};
const ball = 300, radius = 115;

const markup = data => `
<form class="widget-controls" aria-label="Rare classes">
  <label>loss <select name="loss">${Object.entries(data.losses).map(([key, {name}]) =>
    `<option value="${key}">${name}</option>`).join('')}</select></label>
  <label><input type="checkbox" name="repair"> average over classes (class mean)</label>
  <label class="widget-wide">imbalance ratio <input type="range" name="ratio" min="0" max="${data.ratios.length - 1}"
    step="0.25" value="8"> <output name="ratioShown"></output></label>
  <label class="widget-wide">scale s <input type="range" name="scale" min="0" max="${data.scales.length - 1}"
    step="0.25" value="6"> <output name="scaleShown"></output></label>
  <span class="widget-buttons"></span>
</form>
<div class="widget-charts">
  <figure><svg class="map" viewBox="0 0 ${width} ${height}" role="img"></svg>
    <figcaption>The angle between two rare prototypes at the optimum: blue is ${data.simplex.toFixed(1)}°, as without
    imbalance, orange is 0°. The dashed line is the threshold that the theory proves. Right of it the rare classes have
    collapsed. Drag on the map, or move the sliders.</figcaption></figure>
  <figure><svg class="four" viewBox="0 0 ${ball} ${ball}" role="img"></svg>
    <figcaption aria-live="polite"></figcaption></figure>
</div>`;

// a value between the entries of a grid, at real-valued places
function between(grid, row, column) {
  const [r, c] = [Math.min(Math.floor(row), grid.length - 2), Math.min(Math.floor(column), grid[0].length - 2)];
  const [u, v] = [row - r, column - c];
  return (1 - u) * ((1 - v) * grid[r][c] + v * grid[r][c + 1]) + u * ((1 - v) * grid[r + 1][c] + v * grid[r + 1][c + 1]);
}
const along = (values, at) => Math.exp(between([values, values].map(row => row.map(Math.log)), 0, at));
const plain = x => x >= 10 || Number.isInteger(x) ? Math.round(x).toLocaleString('en') : x.toFixed(1);

export default function draw(widget, data) {
  widget.innerHTML = markup(data);
  const form = widget.querySelector('form'), {loss, repair, ratio, scale, ratioShown, scaleShown} = form.elements;
  const map = d3.select(widget.querySelector('.map')), four = d3.select(widget.querySelector('.four'));
  const said = widget.querySelectorAll('figcaption')[1];
  widget.querySelector('.widget-buttons').append(linkButton(), pictureButton(map.node(), 'minority-collapse'));

  const rows = data.scales.length, columns = data.ratios.length;
  const x = d3.scaleLinear().domain([-0.5, columns - 0.5]).range([edge.left, width - edge.right]);
  const y = d3.scaleLinear().domain([-0.5, rows - 0.5]).range([height - edge.bottom, edge.top]);
  const colour = d3.scaleLinear().domain([0, data.simplex / 2, data.simplex]).range(['#d55e00', '#f0c9a8', '#0072b2'])
    .interpolate(d3.interpolateRgb);
  const cells = d3.cross(d3.range(rows), d3.range(columns));
  const squares = marks(map.append('g'), 'rect', 'square', cells).attr('x', ([, c]) => x(c - 0.5))
    .attr('y', ([r]) => y(r + 0.5)).attr('width', x(1) - x(0) + 0.5).attr('height', y(0) - y(1) + 0.5);
  const ticks = (values, wanted) => wanted.map(v => [v, values.indexOf(v)]).filter(([, n]) => n >= 0);
  const across = ticks(data.ratios, [1, 10, 100, 1000, 10000, 100000]), up = ticks(data.scales, [0.5, 1, 2, 4, 8, 16, 32]);
  map.append('g').attr('class', 'axis').attr('transform', `translate(0,${height - edge.bottom})`)
    .call(d3.axisBottom(x).tickValues(across.map(([, n]) => n)).tickFormat(n => plain(data.ratios[n])));
  map.append('g').attr('class', 'axis').attr('transform', `translate(${edge.left},0)`)
    .call(d3.axisLeft(y).tickValues(up.map(([, n]) => n)).tickFormat(n => data.scales[n]));
  map.append('text').attr('x', (edge.left + width) / 2).attr('y', height - 8).attr('text-anchor', 'middle')
    .text('imbalance ratio');
  map.append('text').attr('transform', `translate(12,${(height - edge.bottom) / 2}) rotate(-90)`)
    .attr('text-anchor', 'middle').text('scale s');
  const line = map.append('path').attr('class', 'threshold');
  const here = map.append('circle').attr('class', 'you').attr('r', 7);

  // --- four prototypes: the frequent two up, the rare two down ---

  four.append('circle').attr('class', 'ball').attr('cx', ball / 2).attr('cy', ball / 2).attr('r', radius);
  const layer = four.append('g');
  function prototypes(frequent, rare) {
    const [f, r] = [frequent, rare].map(degrees => degrees * Math.PI / 360), turn = 0.6, tilt = 0.3;
    const points = [[Math.sin(f), 0, Math.cos(f)], [-Math.sin(f), 0, Math.cos(f)],
                    [0, Math.sin(r), -Math.cos(r)], [0, -Math.sin(r), -Math.cos(r)]];
    const at = points.map(([a, b, c], i) => {
      const side = a * Math.cos(turn) - b * Math.sin(turn), away = a * Math.sin(turn) + b * Math.cos(turn);
      return {x: ball / 2 + radius * side, y: ball / 2 - radius * (c * Math.cos(tilt) + away * Math.sin(tilt)), i};
    });
    marks(layer, 'line', 'spoke', at).attr('x1', ball / 2).attr('y1', ball / 2).attr('x2', p => p.x).attr('y2', p => p.y)
      .classed('rare', p => p.i > 1);
    marks(layer, 'circle', 'class', at).attr('cx', p => p.x).attr('cy', p => p.y).attr('r', 9).classed('rare', p => p.i > 1);
    const side = p => p.i < 2 ? 0 : p.x < ball / 2 ? -1 : 1;     // frequent: above the point; rare: beside it
    marks(layer, 'text', 'number', at).attr('x', p => p.x + 14 * side(p)).attr('y', p => p.y + (side(p) ? 5 : -15))
      .attr('text-anchor', p => ['end', 'middle', 'start'][side(p) + 1])
      .text(p => p.i > 1 ? 'rare' : 'frequent');
  }

  function redraw() {
    const {rare, frequent, threshold, name} = data.losses[loss.value];
    const value = (grid, r, c) => repair.checked ? data.simplex : between(grid, r, c);
    squares.attr('fill', ([r, c]) => colour(repair.checked ? data.simplex : rare[r][c]));
    const places = threshold.map((t, r) => [t, r]).filter(([t]) => t && t <= data.ratios.at(-1))
      .map(([t, r]) => [x(Math.log(t / data.ratios[0]) / Math.log(data.ratios[1] / data.ratios[0])), y(r)]);
    line.attr('d', repair.checked ? null : d3.line()(places));
    here.attr('cx', x(+ratio.value)).attr('cy', y(+scale.value));
    const [R, s] = [along(data.ratios, +ratio.value), along(data.scales, +scale.value)];
    const [angle, wide] = [rare, frequent].map(grid => value(grid, +scale.value, +ratio.value));
    prototypes(wide, angle);
    [ratioShown.value, scaleShown.value] = [plain(R), s.toFixed(1)];
    ratio.setAttribute('aria-valuetext', `ratio ${plain(R)}`);
    scale.setAttribute('aria-valuetext', `s = ${s.toFixed(1)}`);
    const text = `${repair.checked ? `${name}, averaged over classes` : name}, s = ${s.toFixed(1)}, ratio ${plain(R)}: ` +
      `rare classes ${angle.toFixed(1)}° apart, frequent ones ${wide.toFixed(1)}°. ` +
      (angle < 0.5 ? 'The rare classes have collapsed into one.' : `Without imbalance all are ${data.simplex.toFixed(1)}° apart.`);
    if (said.textContent !== text) said.textContent = text;
    map.attr('aria-label', `Angle between rare prototypes by imbalance ratio and scale. ${text}`);
    four.attr('aria-label', `Four prototypes. ${text}`);
    keep({loss: loss.value, repair: +repair.checked, ratio: ratio.value, scale: scale.value});
  }

  const node = map.node();
  function choose(event) {
    const box = node.getBoundingClientRect(), unit = width / box.width;
    ratio.value = x.invert((event.clientX - box.x) * unit);
    scale.value = y.invert((event.clientY - box.y) * unit);
    redraw();
  }
  node.addEventListener('pointerdown', event => { node.setPointerCapture(event.pointerId); choose(event); });
  node.addEventListener('pointermove', event => { if (event.buttons) choose(event); });
  const was = kept();
  for (const name of ['loss', 'ratio', 'scale']) if (was[name]) form.elements[name].value = was[name];
  if (!loss.value) loss.selectedIndex = 0;
  repair.checked = was.repair === '1';
  form.addEventListener('input', redraw);
  form.addEventListener('submit', event => event.preventDefault());
  redraw();
}
