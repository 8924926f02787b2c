// k classes in d dimensions: how far apart, how far at most, and at which scale.
import {closedBounds, closedMargin, degrees, suggestedScale} from './formulas.js';

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

export function margins(data, k, d) {
  const [method, radians] = closedBounds(k, d), found = tableBound(data, k, d);
  const bound = {degrees: degrees(radians), source: `${method}, a closed form`};
  if (found && found.degrees < bound.degrees) {
    bound.degrees = found.degrees;
    bound.source = found.k === k && found.d === d ? 'certified, from the table' : `certified for ${found.k} classes in ` +
      `${found.d} dimensions, and so for more classes or fewer dimensions`;
  }
  const closed = closedMargin(k, d), searched = data.best[d]?.[k];
  const best = closed ? {degrees: degrees(closed[1]), source: `${closed[0]}, exact`}
    : searched ? {degrees: searched, source: 'best packing found'} : null;
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
    const most = 1 - Math.cos(bound.degrees * Math.PI / 180);
    const rows = [
      ['largest class margin known here', best ? `${angle(best.degrees)} (${best.source})`
        : `not computed on this page; the command <code>largest-margins prototypes ${k} ${d}</code> searches`],
      ['no arrangement exceeds', `${angle(bound.degrees)} (${bound.source})`],
      ['gap', best ? angle(Math.max(0, bound.degrees - best.degrees)) : 'unknown'],
      ['smallest sample margin at most', most.toFixed(4)],
      ['suggested scale, at least', p > 1 / k ? suggestedScale(k, p).toFixed(2) : 'none: p must exceed 1/k'],
    ];
    results.innerHTML = rows.map(([name, value]) => `<dt>${name}</dt><dd>${value}</dd>`).join('');
  }

  form.addEventListener('input', redraw);
  form.addEventListener('submit', event => event.preventDefault());
  redraw();
}
