// k classes in d dimensions: how far apart, how far at most, with which margins, and at which scale.
import d3 from './d3.js';
import {closedBounds, closedMargin, degrees, greedyMargin, levenshteinBound, radians, scaleForMargin,
        suggestedScale} from './formulas.js';
import {keep, kept, linkButton} from './state.js';

const width = 640, height = 316, edge = {left: 52, right: 16, top: 14, bottom: 60};
const mostClasses = 1e7, mostDimensions = 4096;

const markup = `
<form class="widget-controls" aria-label="Margin calculator">
  <label>dimensions d <input type="number" name="d" min="2" max="4096" value="3" required inputmode="numeric"></label>
  <label>classes k <input type="number" name="k" min="2" max="10000000" value="8" required inputmode="numeric"></label>
  <label>probability p <input type="number" name="p" min="0.5" max="0.9999" step="any" value="0.99" required></label>
  <span class="widget-buttons"></span>
</form>
<dl class="widget-results" aria-live="polite"></dl>
<figure class="widget-plot"><svg viewBox="0 0 ${width} ${height}" role="img"></svg>
  <figcaption>Class margin against the number of classes. Between the lines is what nobody knows: the upper one is
  proved, the lower one can be had. The dot is your number of classes.</figcaption></figure>`;

// A bound for fewer classes or more dimensions holds here too; of those in the table take the smallest.
const tableBound = ({bounds}, k, d) => bounds
  .map(([classes, dimensions, bound]) => ({k: classes, d: dimensions, degrees: bound}))
  .filter(bound => bound.k <= k && bound.d >= d)
  .reduce((least, bound) => least && least.degrees <= bound.degrees ? least : bound, null);

// What was found for more classes or fewer dimensions can be had here too; of those take the largest.
const tablePacking = ({best}, k, d) => best
  .map(([classes, dimensions, found]) => ({k: classes, d: dimensions, degrees: found}))
  .filter(found => found.k >= k && found.d <= d)
  .reduce((most, found) => most && most.degrees >= found.degrees ? most : found, null);

// where a number of the table stands, if not just here
const borrowed = (found, k, d, otherwise) => found.k === k && found.d === d ? null
  : `for ${found.k} classes in ${found.d} dimensions, and so for ${otherwise}`;

export function margins(data, k, d) {
  const [method, radians] = closedBounds(k, d), table = tableBound(data, k, d);
  const bound = {degrees: degrees(radians), source: `${method}, a closed form`};
  if (table && table.degrees < bound.degrees) {
    bound.degrees = table.degrees;
    bound.source = `certified ${borrowed(table, k, d, 'more classes or fewer dimensions') ?? 'by the table'}`;
  }
  const formula = degrees(levenshteinBound(k, d)) + 1e-4;    // rounded up
  if (formula < bound.degrees) Object.assign(bound, {degrees: formula, source: 'Levenshtein, a formula'});
  const closed = closedMargin(k, d);
  if (closed) return {best: {degrees: degrees(closed[1]), source: `${closed[0]}, exact`}, bound};
  const found = tablePacking(data, k, d), from = found && borrowed(found, k, d, 'fewer classes or more dimensions');
  const greedy = degrees(greedyMargin(k, d));
  if (!found || greedy > found.degrees) {
    return {best: {degrees: Math.min(greedy, bound.degrees), source: 'a greedy choice has it', least: true}, bound};
  }
  const source = `found${from ? ` ${from}` : ', the best packing known here'}`;
  return {best: {degrees: found.degrees, source, least: Boolean(from)}, bound};
}

// the two lines over the number of classes, for one dimension
function plot(svg, data, k, d) {
  const x = d3.scaleLog().domain([2, mostClasses]).range([edge.left, width - edge.right]);
  const y = d3.scaleLinear().domain([0, 180]).range([height - edge.bottom, edge.top]);
  const sizes = [...new Set(d3.range(0, 111).map(n => Math.round(2 * (mostClasses / 2) ** (n / 110))))];
  const found = sizes.map(n => [n, margins(data, n, d)]);
  svg.selectAll('*').remove();
  svg.append('g').attr('class', 'axis').attr('transform', `translate(0,${height - edge.bottom})`)
    .call(d3.axisBottom(x).tickValues([10, 100, 1e3, 1e4, 1e5, 1e6, 1e7]).tickFormat(d3.format('~s')));
  svg.append('g').attr('class', 'axis').attr('transform', `translate(${edge.left},0)`)
    .call(d3.axisLeft(y).tickValues([0, 30, 60, 90, 120, 150, 180]).tickFormat(v => `${v}°`));
  svg.append('text').attr('x', (edge.left + width) / 2).attr('y', height - 6).attr('text-anchor', 'middle')
    .text(`classes k, in ${d} dimensions`);
  const line = which => d3.line()(found.map(([n, m]) => [x(n), y(m[which].degrees)]));
  svg.append('path').attr('class', 'between').attr('d', `${line('bound')}L${d3.line()(
    found.map(([n, m]) => [x(n), y(m.best.degrees)]).reverse()).slice(1)}Z`);
  svg.append('path').attr('class', 'curve series-1').attr('d', line('bound'));
  svg.append('path').attr('class', 'curve series-0').attr('d', line('best'));
  const here = margins(data, k, d);
  svg.append('circle').attr('class', 'dot series-0').attr('r', 5).attr('cx', x(k)).attr('cy', y(here.best.degrees));
  svg.attr('aria-label', `Class margin against classes in ${d} dimensions: for ${k} classes between ` +
    `${here.best.degrees.toFixed(1)} and ${here.bound.degrees.toFixed(1)} degrees.`);
}

export default function draw(widget, data) {
  widget.innerHTML = markup;
  const form = widget.querySelector('form'), results = widget.querySelector('dl');
  const chart = d3.select(widget.querySelector('.widget-plot svg'));
  widget.querySelector('.widget-buttons').append(linkButton());
  for (const [name, value] of Object.entries(kept())) if (form.elements[name]) form.elements[name].value = value;

  function redraw() {
    const wrong = [...form.elements].find(input => !input.checkValidity());
    if (wrong) {
      results.innerHTML = '<dt>Not a number of this range</dt><dd></dd>';
      results.querySelector('dd').textContent = `${wrong.parentElement.textContent.trim()}: ${wrong.validationMessage}`;
      return;
    }
    const [k, d, p] = ['k', 'd', 'p'].map(name => form.elements[name].valueAsNumber);
    const {best, bound} = margins(data, k, d);
    const angle = x => `${x.toFixed(3)}°`;
    const [reached, most] = [best, bound].map(x => x && 1 - Math.cos(radians(x.degrees)));
    const exact = best && most - reached < 5e-5;
    const enough = best && scaleForMargin(k, reached, 0.9).toFixed(2);
    const search = `<code>largest-margins prototypes ${k} ${d}</code>`;
    const gap = best && angle(Math.max(0, bound.degrees - best.degrees));
    const rows = [
      ['best class margin', !best ? `not in the table; ${search} searches`
        : `${best.least ? 'at least ' : ''}${angle(best.degrees)} (${best.source})` +
          (best.least ? `; ${search} searches for more` : '')],
      ['no arrangement exceeds', `${angle(bound.degrees)} (${bound.source})`],
      ['gap', best ? (best.least ? `at most ${gap}` : gap) : 'unknown'],
      ['largest possible smallest sample margin', exact ? most.toFixed(4)
        : `${best ? `at least ${reached.toFixed(4)}, ` : ''}at most ${most.toFixed(4)}`],
      ['suggested scale, at least', p > 1 / k ? suggestedScale(k, p).toFixed(2) : 'none: p must exceed 1/k'],
      ['largest margin m for CosFace', exact ? `below ${most.toFixed(4)}`
        : `${best ? `any below ${reached.toFixed(4)}, ` : ''}none above ${most.toFixed(4)}`],
      ['scale that guarantees 90 % of this sample margin', !best ? 'unknown'
        : `${enough}${k <= d + 1 ? '; with classes of one size any scale has the simplex as its optimum' : ''}`],
    ];
    plot(chart, data, k, d);
    keep({k, d, p});
    results.innerHTML = rows.map(([name, value]) => `<dt>${name}</dt><dd>${value}</dd>`).join('');
  }

  form.addEventListener('input', redraw);
  form.addEventListener('submit', event => event.preventDefault());
  redraw();
}
