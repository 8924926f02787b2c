// What a picture shows, kept in the page's address, so that a link brings it back.

export const kept = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

export function keep(state) {
  const text = new URLSearchParams(state).toString();
  history.replaceState(null, '', `#${text}`);
}

const button = text => {
  const made = document.createElement('button');
  Object.assign(made, {type: 'button', textContent: text});
  return made;
};

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {   // no permission, or no clipboard: show the link instead
    return false;
  }
}

export function linkButton() {
  const made = button('Copy link');
  made.addEventListener('click', async () => {
    const done = await copy(location.href);
    made.textContent = done ? 'Link copied' : 'The link is in the address bar';
    setTimeout(() => { made.textContent = 'Copy link'; }, 2500);
  });
  return made;
}

const styles = ['fill', 'fill-opacity', 'stroke', 'stroke-width', 'stroke-opacity', 'stroke-dasharray', 'opacity',
                'font-size', 'font-family', 'font-weight', 'paint-order', 'display'];

// an SVG as a PNG of `size` pixels, with the looks that the page gives it
async function asPicture(svg, size) {
  const copied = svg.cloneNode(true), from = svg.querySelectorAll('*'), to = copied.querySelectorAll('*');
  from.forEach((element, n) => {
    const look = getComputedStyle(element);
    to[n].setAttribute('style', styles.map(name => `${name}:${look.getPropertyValue(name)}`).join(';'));
  });
  const {width, height} = svg.viewBox.baseVal;
  copied.setAttribute('width', size);
  copied.setAttribute('height', size * height / width);
  copied.setAttribute('xmlns', 'http://www.w3.org/2000/svg');
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copied))}`;
  await image.decode();
  const canvas = Object.assign(document.createElement('canvas'), {width: size, height: size * height / width});
  const context = canvas.getContext('2d');
  context.fillStyle = getComputedStyle(document.body).backgroundColor;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0);
  return canvas.toDataURL('image/png');
}

export function pictureButton(svg, name) {
  const made = button('Save picture');
  made.addEventListener('click', async () => {
    const link = document.createElement('a');
    Object.assign(link, {href: await asPicture(svg, 1200), download: `${name}.png`});
    link.click();
    made.dataset.saved = link.href.length;
  });
  return made;
}

export const calm = () => matchMedia('(prefers-reduced-motion: reduce)').matches;
