// D3, fetched once and only by pages that draw. Its file is a plain script, not a module.
await new Promise((resolve, reject) => {
  const script = document.createElement('script');
  script.src = new URL('../vendor/d3.min.js', import.meta.url);
  script.onload = resolve;
  script.onerror = () => reject(new Error('D3 is missing'));
  document.head.append(script);
});

export default window.d3;

// one element for each entry of `data`, the old ones reused
export const marks = (parent, tag, name, data) =>
  parent.selectAll(`${tag}.${name}`).data(data).join(tag).classed(name, true);
