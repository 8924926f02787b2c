// D3, fetched once and only by pages that draw.
await import('./d3.min.js');
export default globalThis.d3;
