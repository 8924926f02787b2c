// The moving picture of the home page can be stopped. It stands in a shadow tree, so that its styles stay its own.
const hero = document.querySelector('img[alt^="Prototypes move apart"]');

if (hero && !matchMedia('(prefers-reduced-motion: reduce)').matches) {
  const button = Object.assign(document.createElement('button'), {type: 'button', textContent: 'Pause', className: 'pause btn'});
  let svg = null, paused = false;
  button.addEventListener('click', async () => {
    if (!svg) {
      const text = await (await fetch(hero.src)).text(), host = document.createElement('div');
      host.attachShadow({mode: 'open'}).innerHTML = text;
      host.className = 'hero';
      host.setAttribute('role', 'img');
      host.setAttribute('aria-label', hero.alt);
      hero.replaceWith(host);
      svg = host.shadowRoot.querySelector('svg');
    }
    paused = !paused;
    if (paused) svg.pauseAnimations(); else svg.unpauseAnimations();
    button.textContent = paused ? 'Go on' : 'Pause';
    button.setAttribute('aria-pressed', String(paused));
  });
  button.setAttribute('aria-pressed', 'false');
  hero.after(button);
}

// The sidebar shows where the page stands.
const here = document.querySelector('.kinds [aria-current=page]'), bar = here?.closest('.bd-sidebar-primary');
if (bar && here.offsetTop > bar.clientHeight) bar.scrollTop = here.offsetTop - bar.clientHeight / 2;
