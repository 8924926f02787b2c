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

// the least of all minimisers, where `largest` is the largest possible in this dimension
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
