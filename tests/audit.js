// What a test asks of a page. Each function returns a list of what is wrong, or plain data.

function shown(element) {
  return element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true}) && element.getClientRects().length > 0;
}

function describe(element) {
  const words = (element.innerText || element.getAttribute('aria-label') || '').trim().slice(0, 40);
  return `${element.tagName.toLowerCase()}${element.id && '#' + element.id}.${[...element.classList].join('.')} "${words}"`;
}

// --- contrast, as WCAG 2 defines it ---

const pixel = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
const parsed = new Map();

function colour(text) {   // any CSS colour as [red, green, blue, alpha], 0 to 255 and 0 to 1
  if (!parsed.has(text)) {
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = text;
    pixel.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pixel.getImageData(0, 0, 1, 1).data;
    parsed.set(text, [r, g, b, a / 255]);
  }
  return parsed.get(text);
}

function over(top, below) {
  return [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]);
}

function luminance(rgb) {
  const [r, g, b] = rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
}

function contrast(one, other) {
  const [light, dark] = [luminance(one), luminance(other)].sort((a, b) => b - a);
  return (light + .05) / (dark + .05);
}

const backgrounds = new Map(), opacities = new Map();

function background(element) {
  if (!element) return [255, 255, 255];
  if (!backgrounds.has(element)) {
    backgrounds.set(element, over(colour(getComputedStyle(element).backgroundColor), background(element.parentElement)));
  }
  return backgrounds.get(element);
}

function opacity(element) {
  if (!element) return 1;
  if (!opacities.has(element)) {
    opacities.set(element, Number(getComputedStyle(element).opacity) * opacity(element.parentElement));
  }
  return opacities.get(element);
}

// the elements with visible text of their own, and the formulas
function written() {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = new Set(document.querySelectorAll('mjx-container'));
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (walker.currentNode.data.trim() && !parent.closest('script, style, noscript, mjx-container')) found.add(parent);
  }
  return [...found].filter(shown);
}

function faint(least) {   // in each theme
  const still = document.head.appendChild(document.createElement('style'));
  still.textContent = '* { transition: none !important; animation: none !important }';
  const found = {light: faintIn('light', least), dark: faintIn('dark', least)};
  still.remove();
  return found;
}

function faintIn(theme, least) {
  document.documentElement.dataset.theme = theme;
  backgrounds.clear();
  opacities.clear();
  const bad = new Map();
  const elements = written();
  for (const element of elements) {
    const behind = background(element);
    const ink = getComputedStyle(element).color;
    const [r, g, b, a] = colour(ink);
    const ratio = contrast(over([r, g, b, a * opacity(element)], behind), behind);
    const key = `${ink} on ${behind.map(Math.round)}: ${ratio.toFixed(2)}`;
    if (ratio < least && !bad.has(key)) bad.set(key, describe(element));
  }
  return {checked: elements.length, bad: [...bad].map(([key, where]) => `${key} ${where}`)};
}

function inFigure(theme, ink) {   // the contrast of a colour in a transparent figure, through the page's filter
  document.documentElement.dataset.theme = theme;
  backgrounds.clear();
  const image = document.querySelector('.cell_output img');
  const drawn = new OffscreenCanvas(1, 1).getContext('2d');
  drawn.filter = getComputedStyle(image).filter;
  drawn.fillStyle = ink;
  drawn.fillRect(0, 0, 1, 1);
  return contrast([...drawn.getImageData(0, 0, 1, 1).data].slice(0, 3), background(image));
}

// --- the page as a whole ---

function facts() {
  return {
    lang: document.documentElement.lang,
    titles: document.querySelectorAll('h1').length,
    formulas: document.querySelectorAll('mjx-container').length,
    badFormulas: document.querySelectorAll('mjx-merror, [data-mjx-error]').length,
    // a picture in the text says what it shows; an empty alt is for decoration, as beside the name in the header
    withoutAlt: [...document.images].filter(i => i.closest('article') ? !i.alt.trim() || i.alt.includes('_images/')
      : !i.hasAttribute('alt')).map(i => i.src),
    unloaded: [...document.images].filter(i => i.loading != 'lazy' && !i.naturalWidth).map(i => i.src),
    rawTables: [...document.querySelectorAll('article p')].map(p => p.innerText).filter(text => /^\|.*\|/.test(text)),
    // the columns beside the text scroll down, not sideways
    sideways: [...document.querySelectorAll('.bd-sidebar-primary, .bd-sidebar-secondary')].filter(e => e.scrollWidth > e.clientWidth).map(describe),
    width: document.documentElement.scrollWidth,
    window: document.documentElement.clientWidth,
  };
}

function wide() {   // what sticks out at the right, outside everything that scrolls by itself
  const limit = document.documentElement.clientWidth + 1;
  const scrolls = e => e && (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  return [...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > limit)
    .filter(e => shown(e) && !scrolls(e.parentElement)).slice(0, 5).map(describe);
}

// --- the keyboard ---

function reachable() {
  return [...document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex]')]
    .filter(e => e.tabIndex >= 0 && !e.disabled && !e.closest('[inert]') && e.checkVisibility({checkVisibilityCSS: true})
      && !e.closest('dialog:not([open])'));
}

function watchFocus() {
  window.visited = new Set();
  window.invisible = [];
  document.activeElement.blur();
  window.watching?.abort();
  window.watching = new AbortController();
  document.addEventListener('focusin', ({target}) => {
    visited.add(target);
    const {outlineStyle, outlineWidth, boxShadow} = getComputedStyle(target);
    const marked = outlineStyle != 'none' && parseFloat(outlineWidth) > 0 || boxShadow != 'none';
    if (!marked || !shown(target)) invisible.push(describe(target));
  }, {signal: watching.signal});
  return reachable().length;
}

function walked() {
  const all = reachable();
  return {
    visited: visited.size,
    first: visited.size ? describe([...visited][0]) : '',
    missed: all.filter(e => !visited.has(e)).map(describe),
    invisible,
    positive: [...document.querySelectorAll('[tabindex]')].filter(e => e.tabIndex > 0).map(describe),
    mouseOnly: [...document.querySelectorAll('[onclick]')].filter(e => shown(e) && e.tabIndex < 0).map(describe),
    nameless: all.filter(e => e.matches('a, button, input'))
      .filter(e => !(e.innerText?.trim() || e.getAttribute('aria-label') || e.title || e.labels?.length || e.placeholder
                     || e.querySelector('img[alt], svg title'))).map(describe),
  };
}
