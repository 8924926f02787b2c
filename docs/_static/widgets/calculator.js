// k classes in d dimensions: how far apart, how far at most, with which margins, and at which scale.
import {closedBounds, closedMargin, degrees, radians, scaleForMargin, suggestedScale} from './formulas.js';

const markup = `
<form class="widget-controls" aria-label="Margin calculator">
  <label>dimensions d <input type="number" name="d" min="2" max="512" value="3" required inputmode="numeric"></label>
  <label>classes k <input type="number" name="k" min="2" max="1000" value="8" required inputmode="numeric"></label>
  <label>probability p <input type="number" name="p" min="0.5" max="0.9999" step="any" value="0.99" required></label>
</form>
<dl class="widget-results" aria-live="polite"></dl>`;

// A bound for fewer classes or more dimensions holds here too; of those in the table take the smallest.
function tableBound({classes, bounds}, k, d) {
  let least = null;
  for (const [dimension, row] of Object.entries(bounds)) {
    if (+dimension < d) continue;
    const first = classes.findIndex(n => n > 2 * dimension);
    row.forEach((bound, n) => {
      const fewer = classes[first + n];
      if (fewer <= k && (!least || bound < least.degrees)) least = {degrees: bound, k: fewer, d: +dimension};
    });
  }
  return least;
}

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
  const closed = closedMargin(k, d);
  if (closed) return {best: {degrees: degrees(closed[1]), source: `${closed[0]}, exact`}, bound};
  const found = tablePacking(data, k, d), from = found && borrowed(found, k, d, 'fewer classes or more dimensions');
  const best = found && {degrees: found.degrees, source: `found${from ? ` ${from}` : ', the best packing known here'}`,
                         least: Boolean(from)};
  return {best, bound};
}

export default function draw(widget, data) {
  widget.innerHTML = markup;
  const form = widget.querySelector('form'), results = widget.querySelector('dl');

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
    results.innerHTML = rows.map(([name, value]) => `<dt>${name}</dt><dd>${value}</dd>`).join('');
  }

  form.addEventListener('input', redraw);
  form.addEventListener('submit', event => event.preventDefault());
  redraw();
}
