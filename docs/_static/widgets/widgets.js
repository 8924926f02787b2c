// Starts each `<div data-widget="name">` of the page when it comes near the window, with the numbers that its notebook
// left in it. Until then, and if anything is missing, the still picture of the cell before it stays.

async function start(widget) {
  const data = JSON.parse(widget.querySelector('script').textContent);
  const still = widget.closest('.cell')?.previousElementSibling?.querySelector('.cell_output img');
  try {
    const {default: draw} = await import(`./${widget.dataset.widget}.js`);
    await draw(widget, data);
    if (still) still.hidden = true;
    widget.dataset.state = 'ready';
  } catch (error) {
    widget.textContent = `The picture cannot be made to move in this browser (${error.message}).`;
    widget.dataset.state = 'failed';
  }
}

const watch = new IntersectionObserver(entries => {
  for (const {isIntersecting, target} of entries) {
    if (!isIntersecting) continue;
    watch.unobserve(target);
    start(target);
  }
}, {rootMargin: '600px'});

for (const widget of document.querySelectorAll('[data-widget]')) watch.observe(widget);
