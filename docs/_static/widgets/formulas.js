// The library's formulas, as its pages print them. Angles in radians; tests/test_widgets.py holds them to the library.

export const degrees = radians => radians * 180 / Math.PI;
export const radians = degrees => degrees * Math.PI / 180;

function logSumExp(values) {
  const top = Math.max(...values);
  return top + Math.log(values.reduce((sum, x) => sum + Math.exp(x - top), 0));
}

// --- losses of one sample, whose angle to its own prototype is θ ---

// cos u on [0, π], and falling on
export function fallingCosine(u) {
  const n = Math.floor(u / Math.PI);
  return (1 - 2 * (n % 2)) * Math.cos(u) - 2 * n;
}

// the target's logit over s
export const logits = {
  'NormFace': angle => Math.cos(angle),
  'CosFace, m = 0.35': angle => Math.cos(angle) - 0.35,
  'ArcFace, m = 0.5': angle => fallingCosine(angle + 0.5),
};

// the other cosines of the sample are all 0, of k classes
export const marginLoss = (logit, angle, s, k) =>
  logSumExp([s * logit(angle), Math.log(k - 1)]) - s * logit(angle);

export const lmSoftmaxLoss = (angle, s, k) => Math.log(k - 1) / s - Math.cos(angle);

// --- LM-Softmax of prototypes on the circle, features at their prototypes ---

export const octagon = [0, 1, 2, 3, 4, 5, 6, 7].map(n => n * Math.PI / 4);
export const stack = [0, 0, 0, 0, 0, 1, 2, 3].map(n => n * Math.PI / 2);

export function lmSoftmaxOnCircle(angles, s) {
  const losses = angles.map((own, i) =>
    logSumExp(angles.filter((_, j) => j !== i).map(other => s * (Math.cos(own - other) - 1))) / s);
  return losses.reduce((sum, x) => sum + x, 0) / losses.length;
}

// --- how far apart k prototypes can be in d dimensions ---

// the closed forms that hold, each an upper bound on the class margin
export function closedBounds(k, d) {
  const bounds = [['simplex', Math.acos(Math.max(-1, -1 / (k - 1)))]];
  if (d === 2) bounds.push(['circle', 2 * Math.PI / k]);
  if (k > d + 1) bounds.push(['Rankin', Math.PI / 2]);
  if (d === 3 && k > 2) {
    const cotangent = 1 / Math.tan(k * Math.PI / (6 * (k - 2)));
    bounds.push(['Fejes Tóth', Math.acos((cotangent ** 2 - 1) / 2)]);
  }
  return bounds.reduce((least, bound) => bound[1] < least[1] ? bound : least);
}

// the class margin of a best arrangement, where a formula for one is known
export function closedMargin(k, d) {
  if (k <= d + 1) return ['simplex', Math.acos(Math.max(-1, -1 / (k - 1)))];
  if (d === 2) return ['regular polygon', 2 * Math.PI / k];
  if (k <= 2 * d) return ['points ±eᵢ', Math.PI / 2];
  return null;
}

// the smallest scale at which a sample at the best place has this probability under NormFace
export const suggestedScale = (k, probability) =>
  (k - 1) / k * Math.log((k - 1) * probability / (1 - probability));

// --- which smallest sample margin a scale guarantees, for NormFace and k classes of one size ---

// the least of all minimizers, where `largest` is the largest possible in this dimension
export function guaranteedMargin(k, largest, s) {
  const logX = Math.log(k - 1) - s * largest;
  const power = k * Math.log1p(Math.exp(logX));        // log (1 + x)^k
  const logGrown = power > 1e-300 ? power + Math.log(-Math.expm1(-power)) : logX + Math.log(k);
  return largest - (Math.log(k - 1) + logGrown - logX) / s;
}

// the smallest scale that guarantees this fraction of the largest
export function scaleForMargin(k, largest, fraction) {
  const enough = s => guaranteedMargin(k, largest, s) >= fraction * largest;
  let low = 0, high = 1;
  while (!enough(high)) [low, high] = [high, 2 * high];
  for (let n = 0; n < 60; n++) {
    const middle = (low + high) / 2;
    if (enough(middle)) high = middle; else low = middle;
  }
  return high;
}

// --- Levenshtein's bound, for any k and d ≥ 4 ---

// log of the binomial coefficient, by Stirling's series for log Γ
function logGamma(x) {
  let shift = 0;
  for (; x < 15; x++) shift -= Math.log(x);
  const y = 1 / (x * x);
  return shift + (x - 0.5) * Math.log(x) - x + 0.9189385332046727 + (1 / 12 - y * (1 / 360 - y / 1260)) / x;
}
const logChoose = (n, m) => logGamma(n + 1) - logGamma(m + 1) - logGamma(n - m + 1);

// how many points a spherical design of strength m has at least
function designSize(d, m) {
  const n = Math.floor(m / 2), first = Math.exp(logChoose(d + n - 1, d - 1));
  return m % 2 ? 2 * first : first + (n ? Math.exp(logChoose(d + n - 2, d - 1)) : 0);
}

// the largest zero of the Jacobi polynomial of degree n, by counting the sign changes of its Sturm sequence
function largestZero(n, a, b) {
  const diagonal = i => i === 0 ? (b - a) / (a + b + 2) : (b * b - a * a) / ((2 * i + a + b) * (2 * i + a + b + 2));
  const square = i => {
    const t = 2 * i + a + b;
    return 4 * i * (i + a) * (i + b) * (i + a + b) / (t * t * (t + 1) * (t - 1));
  };
  const above = x => {   // zeros above x
    let count = 0, ratio = 1;
    for (let i = 0; i < n; i++) {
      ratio = diagonal(i) - x - (i ? square(i) / ratio : 0);
      if (ratio === 0) ratio = 1e-300;
      if (ratio > 0) count++;
    }
    return count;
  };
  let low = -1, high = 1;
  for (let step = 0; step < 60; step++) {
    const middle = (low + high) / 2;
    if (above(middle)) low = middle; else high = middle;
  }
  return (low + high) / 2;
}

// Gegenbauer polynomials of the sphere in d dimensions, 1 at 1: P_0(t) to P_n(t)
function gegenbauer(d, n, t) {
  const P = [1, t];
  for (let i = 1; i < n; i++) P.push(((2 * i + d - 2) * t * P[i] - i * P[i - 1]) / (i + d - 2));
  return P;
}

// no k points in d dimensions have a class margin above this, radians
export function levenshteinBound(k, d) {
  if (k <= d + 1 || d <= 3) return closedBounds(k, d)[1];     // in 3 dimensions Fejes Tóth is at least as good
  let m = 1;
  while (designSize(d, m + 1) < k * (1 - 1e-9)) m++;
  const n = Math.floor((m + 1) / 2), even = m % 2 === 0, a = (d - 3) / 2;
  const points = s => {
    const P = gegenbauer(d, n + 1, s);
    return even
      ? Math.exp(logChoose(n + d - 2, n)) * ((2 * n + d - 1) / (d - 1)
        - (1 + s) * (P[n] - P[n + 1]) / ((1 - s) * (P[n] + P[n + 1])))
      : Math.exp(logChoose(n + d - 3, n - 1)) * ((2 * n + d - 3) / (d - 1) - (P[n - 1] - P[n]) / ((1 - s) * P[n]));
  };
  let low = even ? largestZero(n, a + 1, a) : n > 1 ? largestZero(n - 1, a + 1, a + 1) : -1;
  let high = largestZero(n, a + 1, a + (even ? 1 : 0));
  for (let step = 0; step < 60; step++) {
    const s = (low + high) / 2;
    if (points(s) < k) low = s; else high = s;
  }
  return Math.acos(Math.max(-1, low));
}

// --- a class margin that can be had: caps of this radius around k − 1 points leave room for one more ---

// the share of the sphere in d dimensions within an angle of at most π/2 of a point
export function capShare(d, angle) {
  const a = (d - 1) / 2, x = Math.sin(angle) ** 2;
  return 0.5 * incompleteBeta(x, a, 0.5);
}

// the regularized incomplete beta function, by its continued fraction (Lentz)
function incompleteBeta(x, a, b) {
  if (x <= 0) return 0;
  if (x >= 1) return 1;
  const front = Math.exp(logGamma(a + b) - logGamma(a) - logGamma(b) + a * Math.log(x) + b * Math.log1p(-x));
  if (x > (a + 1) / (a + b + 2)) return 1 - incompleteBeta(1 - x, b, a);
  let c = 1, d = 1 / (1 - (a + b) * x / (a + 1) || 1e-30), h = d;
  for (let m = 1; m < 500; m++) {
    for (const t of [m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                     -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))]) {
      d = 1 / (1 + t * d || 1e-30);
      c = 1 + t / c || 1e-30;
      h *= c * d;
    }
    if (Math.abs(c * d - 1) < 1e-14) break;
  }
  return front * h / a;
}

export function greedyMargin(k, d) {
  if (k <= 2) return Math.PI;
  let low = 0, high = Math.PI / 2;
  for (let step = 0; step < 60; step++) {
    const middle = (low + high) / 2;
    if (capShare(d, middle) * (k - 1) < 1) low = middle; else high = middle;
  }
  return low;
}
