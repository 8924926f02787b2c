// Points on the sphere in space: how far apart they are, and losses that move them. A point is [x, y, z], of norm 1.

export const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
export const unit = v => {
  const norm = Math.hypot(...v) || 1;
  return v.map(x => x / norm);
};

// the angle by the chord, exact where points nearly coincide
export const angle = (a, b) => 2 * Math.asin(Math.min(1, Math.hypot(a[0] - b[0], a[1] - b[1], a[2] - b[2]) / 2));

// the class margin, radians, and the pair that has it
export function closest(points) {
  let least = {angle: Math.PI, pair: [0, 1]};
  for (let i = 0; i < points.length; i++) {
    for (let j = 0; j < i; j++) {
      const found = angle(points[i], points[j]);
      if (found < least.angle) least = {angle: found, pair: [j, i]};
    }
  }
  return least;
}

// numbers in [0, 1) that a seed repeats
export function random(seed) {
  let state = (seed * 2654435761 + 1013904223) >>> 0;
  return () => {
    state = (state + 0x6D2B79F5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

export function scattered(k, seed) {
  const draw = random(seed);
  return Array.from({length: k}, () => {
    const z = 2 * draw() - 1, turn = 2 * Math.PI * draw(), r = Math.sqrt(1 - z * z);
    return [r * Math.cos(turn), r * Math.sin(turn), z];
  });
}

// --- losses of k prototypes, one feature a class, at its prototype ---

// the slopes of the loss in the cosines c_ij, i the feature, j another prototype
const softmaxSlopes = (s, margin) => (cosines, i) => {
  const powers = cosines.map((c, j) => j === i ? 0 : Math.exp(s * (c - 1 + margin)));
  const total = 1 + powers.reduce((a, b) => a + b, 0);
  return powers.map(p => s * p / total);
};
const largestMarginSlopes = s => (cosines, i) => {
  const top = Math.max(...cosines.filter((_, j) => j !== i));
  const powers = cosines.map((c, j) => j === i ? 0 : Math.exp(s * (c - top)));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map(p => p / total);
};

export const losses = {
  softmax: {name: 'Softmax', slopes: softmaxSlopes(20, 0), rate: 0.05},
  cosface: {name: 'CosFace', slopes: softmaxSlopes(20, 0.35), rate: 0.05},
  lm: {name: 'LM-Softmax', slopes: largestMarginSlopes(20), rate: 0.12},
};

// one step of gradient descent on the sphere; no point moves further than `most` radians
export function descend(points, slopes, rate, most = 0.06) {
  const pulls = points.map(() => [0, 0, 0]);
  points.forEach((own, i) => {
    const row = slopes(points.map(other => dot(own, other)), i);
    row.forEach((g, j) => {
      for (let axis = 0; axis < 3; axis++) {
        pulls[i][axis] += g * points[j][axis];
        pulls[j][axis] += g * own[axis];
      }
    });
  });
  return points.map((p, i) => {
    const along = dot(p, pulls[i]), side = pulls[i].map((x, axis) => x - along * p[axis]);
    const size = Math.hypot(...side);
    const step = size ? Math.min(rate, most / size) : 0;
    return unit(p.map((x, axis) => x - step * side[axis]));
  });
}

// the solver: the soft maximum of all cosines, sharpened step by step
function sharpen(points) {
  let found = points;
  for (let s = 5; s < 6000; s *= 2) {
    for (let n = 0; n < 40; n++) {
      let total = 0;
      const pulls = found.map(() => [0, 0, 0]), top = Math.cos(closest(found).angle);
      for (let i = 0; i < found.length; i++) {
        for (let j = 0; j < i; j++) {
          const power = Math.exp(s * (dot(found[i], found[j]) - top));
          if (power < 1e-9) continue;
          total += power;
          for (let axis = 0; axis < 3; axis++) {
            pulls[i][axis] += power * found[j][axis];
            pulls[j][axis] += power * found[i][axis];
          }
        }
      }
      const step = Math.min(0.3, 1 / s) * found.length / total / 2 * (1 - n / 40);
      found = found.map((p, i) => {
        const along = dot(p, pulls[i]), side = pulls[i].map((x, axis) => x - along * p[axis]);
        const size = Math.hypot(...side) * step, shorter = size > 0.1 ? 0.1 / size : 1;
        return unit(p.map((x, axis) => x - step * shorter * side[axis]));
      });
    }
  }
  return found;
}

// the library's packing, turned to be near the points at hand; where there is none, the best of some starts
export function solve(points, packing, starts = 4) {
  if (packing) return turned(packing, points);
  let best = points;
  for (let n = 0; n < starts; n++) {
    const found = sharpen(n ? scattered(points.length, 1000 + n) : points);
    if (closest(found).angle > closest(best).angle) best = found;
  }
  return matched(best, points);
}

// the nearest to `before` of some rotations of `points`
function turned(points, before) {
  const draw = random(1), near = found => found.reduce((sum, p, i) => sum + dot(p, before[i]), 0);
  let best = matched(points, before);
  for (let n = 0; n < 150; n++) {
    const q = unit4([0, 0, 0, 0].map(() => draw() + draw() + draw() - 1.5));
    const found = matched(points.map(p => rotated(p, q)), before);
    if (near(found) > near(best)) best = found;
  }
  return best;
}

const unit4 = q => q.map(x => x / Math.hypot(...q));

function rotated([x, y, z], [w, a, b, c]) {
  const [u, v, t] = [2 * (b * z - c * y), 2 * (c * x - a * z), 2 * (a * y - b * x)];
  return [x + w * u + b * t - c * v, y + w * v + c * u - a * t, z + w * t + a * v - b * u];
}

// the same points, numbered so that each is near where its number was
function matched(points, before) {
  const free = new Set(points.keys());
  return before.map(p => {
    const next = [...free].reduce((a, b) => dot(points[a], p) >= dot(points[b], p) ? a : b);
    free.delete(next);
    return points[next];
  });
}

// --- points as text for an address: longitude and latitude, three digits of base 36 each ---

const steps = 36 ** 3 - 1;
const digits = share => Math.round(share * steps).toString(36).padStart(3, '0');

export const encode = points => points.map(([x, y, z]) =>
  digits((Math.atan2(y, x) / Math.PI + 1) / 2) + digits((Math.asin(Math.max(-1, Math.min(1, z))) * 2 / Math.PI + 1) / 2))
  .join('');

export function decode(text) {
  if (!/^([0-9a-z]{6}){2,30}$/.test(text ?? '')) return null;
  return text.match(/.{6}/g).map(pair => {
    const [turn, tilt] = [pair.slice(0, 3), pair.slice(3)].map(part => parseInt(part, 36) / steps * 2 - 1);
    const up = tilt * Math.PI / 2;
    return [Math.cos(turn * Math.PI) * Math.cos(up), Math.sin(turn * Math.PI) * Math.cos(up), Math.sin(up)];
  });
}
