// D3, fetched once and only by pages that draw. Its file is a plain script, not a module.
await new Promise((resolve, reject) => {
  const script = document.createElement('script');
  script.src = new URL('d3.min.js', import.meta.url);
  script.onload = resolve;
  script.onerror = () => reject(new Error('D3 is missing'));
  document.head.append(script);
});

export default window.d3;

// one element for each entry of `data`, the old ones reused
export function marks(parent, tag, name, data) {
  const old = parent.selectAll(`${tag}.${name}`).data(data);
  old.exit().remove();
  return old.enter().append(tag).classed(name, true).merge(old);
}
