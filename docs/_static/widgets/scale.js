// One slider over the scale s: what it does to the losses, and to LM-Softmax's choice of eight prototypes on the circle.
import d3, {marks} from './d3.js';
import {lmSoftmaxLoss, lmSoftmaxOnCircle, logits, marginLoss, octagon, radians, stack} from './formulas.js';

const width = 420, height = 274, margin = {left: 64, right: 10, top: 10, bottom: 54};
const classes = 10;
const scaleOf = position => 2 ** position;
const signed = (x, digits) => x.toFixed(digits).replace('-', '−');

const markup = `
<form class="widget-controls" aria-label="The scale">
  <label class="widget-wide">scale s <input type="range" name="position" min="0" max="8" step="0.05" value="4.3">
  <output name="shown"></output></label>
</form>
<div class="widget-charts">
  <figure><svg class="losses" viewBox="0 0 ${width} ${height}" role="img"></svg>
    <figcaption>Loss divided by s of one sample, by its angle to its own prototype; the cosines with the nine other
    prototypes are 0.</figcaption></figure>
  <figure><svg class="circle" viewBox="0 0 ${width} ${height}" role="img"></svg>
    <figcaption aria-live="polite"></figcaption></figure>
</div>`;

function chart(svg, x, y, xLabel, yLabel, xAxis) {
  svg.append('g').attr('class', 'axis').attr('transform', `translate(0,${height - margin.bottom})`).call(xAxis);
  svg.append('g').attr('class', 'axis').attr('transform', `translate(${margin.left},0)`).call(d3.axisLeft(y).ticks(5));
  svg.append('text').attr('x', (margin.left + width) / 2).attr('y', height - 5).attr('text-anchor', 'middle').text(xLabel);
  svg.append('text').attr('transform', `translate(14,${height / 2 - 10}) rotate(-90)`).attr('text-anchor', 'middle')
    .text(yLabel);
}

function legend(svg, names, left, top) {
  const rows = marks(svg.append('g'), 'g', 'row', names)
    .attr('transform', (_, n) => `translate(${left},${top + 17 * n})`);
  rows.append('line').attr('class', (_, n) => `curve series-${n}`).attr('x2', 26);
  rows.append('text').attr('x', 32).attr('y', 4).text(name => name);
}

// k prototypes on a small circle, as spokes
function spokes(svg, angles, series, cx, cy) {
  const group = svg.append('g').attr('transform', `translate(${cx},${cy})`);
  group.append('circle').attr('class', 'ring').attr('r', 22);
  marks(group, 'line', 'curve', angles).classed(`series-${series}`, true)
    .attr('x2', a => 22 * Math.cos(a)).attr('y2', a => -22 * Math.sin(a));
  const stacked = angles.filter(a => a === angles[0]).length;
  if (stacked > 1) group.append('text').attr('x', 27).attr('y', 4).text(`${stacked} classes`);
}

export default function draw(widget) {
  widget.innerHTML = markup;
  const form = widget.querySelector('form'), {position, shown} = form.elements;
  const said = widget.querySelectorAll('figcaption')[1];
  const [left, right] = ['losses', 'circle'].map(name => d3.select(widget.querySelector(`svg.${name}`)));
  const across = [margin.left, width - margin.right], down = [height - margin.bottom, margin.top];

  const linear = (domain, range) => d3.scaleLinear().domain(domain).range(range);
  const angle = linear([0, 180], across), loss = linear([-1.1, 2.7], down);
  chart(left, angle, loss, 'angle θ to the own prototype (degrees)', 'loss / s',
    d3.axisBottom(angle).tickValues(d3.range(0, 181, 30)));
  const curves = Object.entries(logits).map(([name, logit]) => [name, (t, s) => marginLoss(logit, t, s, classes) / s]);
  curves.push(['LM-Softmax', (t, s) => lmSoftmaxLoss(t, s, classes)]);
  legend(left, curves.map(([name]) => name), margin.left + 12, margin.top + 8);
  const series = (selection, look) => selection.attr('class', (_, n) => `${look} series-${n}`);
  const lines = series(marks(left.append('g'), 'path', 'curve', curves), 'curve');
  const thetas = d3.range(0, 181, 2);

  const scale = d3.scaleLog().base(2).domain([1, 256]).range(across), value = linear([-0.4, 1.35], down);
  chart(right, scale, value, 'scale s', 'LM-Softmax',
    d3.axisBottom(scale).tickValues([1, 4, 16, 64, 256]).tickFormat(d3.format('d')));
  const both = [['octagon', octagon], ['stack', stack]];
  const steps = d3.range(0, 8.01, 0.1).map(scaleOf);
  series(marks(right.append('g'), 'path', 'curve', both), 'curve')
    .attr('d', ([, angles]) => d3.line()(steps.map(s => [scale(s), value(lmSoftmaxOnCircle(angles, s))])));
  legend(right, both.map(([name]) => name), 138, margin.top + 20);
  spokes(right, octagon, 0, 262, 38);
  spokes(right, stack, 1, 313, 38);
  const here = right.append('line').attr('class', 'here').attr('y1', down[0]).attr('y2', down[1]);
  const dots = series(marks(right.append('g'), 'circle', 'dot', both), 'dot').attr('r', 4);

  function redraw() {
    const s = scaleOf(+position.value);
    shown.value = s.toFixed(1);
    position.setAttribute('aria-valuetext', `s = ${s.toFixed(1)}`);
    lines.attr('d', ([, curve]) => d3.line()(thetas.map(t => [angle(t), loss(curve(radians(t), s))])));
    here.attr('x1', scale(s)).attr('x2', scale(s));
    dots.attr('cx', scale(s)).attr('cy', ([, angles]) => value(lmSoftmaxOnCircle(angles, s)));
    const [even, uneven] = [octagon, stack].map(angles => lmSoftmaxOnCircle(angles, s));
    const chosen = uneven < even ? 'the stack, whose class margin is 0°' : 'the octagon, whose class margin is 45°';
    said.textContent = `s = ${s.toFixed(1)}: octagon ${signed(even, 4)}, stack ${signed(uneven, 4)}. ` +
      `LM-Softmax prefers ${chosen}.`;
    left.attr('aria-label', `Four losses at s = ${s.toFixed(1)}. At 60 degrees, divided by s: ` +
      curves.map(([name, curve]) => `${name} ${signed(curve(radians(60), s), 3)}`).join(', '));
    right.attr('aria-label', `The loss of the octagon and of the stack by scale. ${said.textContent}`);
  }

  form.addEventListener('input', redraw);
  form.addEventListener('submit', event => event.preventDefault());
  redraw();
}
