//! Attention of one query row over any keys, forward and backward. The sums of a row run over its keys in order, whatever else
//! is in the step and however the keys are stored.

use super::rowwise::{dot, exp};

/// Shape of the heads.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// H.
    pub query: usize,
    /// K.
    pub key: usize,
    /// D.
    pub dim: usize,
    /// Softmax scale.
    pub scale: f32,
}

/// The keys a row sees: for each, the index of its `(K, D)` slot in the key and value arrays, in order.
pub trait Keys {
    /// How many.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Slot of the `index`-th.
    fn slot(&self, index: usize) -> usize;
}

impl<F: Fn(usize) -> usize> Keys for (usize, F) {
    fn len(&self) -> usize {
        self.0
    }
    fn slot(&self, index: usize) -> usize {
        self.1(index)
    }
}

#[inline(always)]
fn probabilities(heads: Heads, head: usize, q: &[f32], k: &[f32], keys: &impl Keys, weights: &mut Vec<f32>) {
    let (group, d) = (heads.query / heads.key, heads.dim);
    let kv = head / group;
    weights.clear();
    weights
        .extend((0..keys.len()).map(|index| dot(q, &k[(keys.slot(index) * heads.key + kv) * d..][..d]) * heads.scale));
    let max = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0f32;
    for weight in weights.iter_mut() {
        *weight = exp(*weight - max);
        sum += *weight;
    }
    weights.iter_mut().for_each(|weight| *weight /= sum);
}

/// One head of one row. q, out: (D); k, v: slots of (K, D).
#[inline(always)]
pub fn attend_row(
    heads: Heads,
    head: usize,
    q: &[f32],
    (k, v): (&[f32], &[f32]),
    keys: &impl Keys,
    weights: &mut Vec<f32>,
    out: &mut [f32],
) {
    probabilities(heads, head, q, k, keys, weights);
    let kv = head / (heads.query / heads.key);
    out.fill(0.0);
    for (index, weight) in weights.iter().enumerate() {
        let value = &v[(keys.slot(index) * heads.key + kv) * heads.dim..][..heads.dim];
        for (out, value) in out.iter_mut().zip(value) {
            *out += weight * value;
        }
    }
}

/// Gradients of [`attend_row`]: writes dq: (D), adds to dk and dv of one kv head: slots of (D).
#[inline(always)]
#[allow(clippy::too_many_arguments)] // three inputs, their three gradients, and where they lie
pub fn attend_row_backward(
    heads: Heads,
    head: usize,
    q: &[f32],
    (k, v): (&[f32], &[f32]),
    keys: &impl Keys,
    weights: &mut Vec<f32>,
    dout: &[f32],
    (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
) {
    probabilities(heads, head, q, k, keys, weights);
    let (kv, d) = (head / (heads.query / heads.key), heads.dim);
    let value = |index: usize| &v[(keys.slot(index) * heads.key + kv) * d..][..d];
    // Σ_j p_j·(dout·v_j), the softmax's own pull.
    let pull: f32 = weights.iter().enumerate().map(|(index, weight)| weight * dot(dout, value(index))).sum();
    dq.fill(0.0);
    for (index, weight) in weights.iter().enumerate() {
        let slot = keys.slot(index);
        let dscore = weight * (dot(dout, value(index)) - pull) * heads.scale;
        let key = &k[(slot * heads.key + kv) * d..][..d];
        for at in 0..d {
            dq[at] += dscore * key[at];
            dk[slot * d + at] += dscore * q[at];
            dv[slot * d + at] += weight * dout[at];
        }
    }
}
