//! Loops over one row: norm, rotation, activations, softmax, the optimizer's update, compiled for what the processor at hand has.

/// Functions of plain loops, compiled for AVX-512, for AVX2 and for any processor, and chosen when they are called. Multiply and add
/// stay apart, so the numbers are the same either way.
macro_rules! at_every_level {
    ($($(#[$about:meta])* $seen:vis fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => {$(
        $(#[$about])*
        #[allow(clippy::too_many_arguments)]
        $seen fn $name($($argument: $kind),*) $(-> $result)? {
            #[inline(always)]
            fn plain($($argument: $kind),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512vl,avx512bw")]
                fn widest($($argument: $kind),*) $(-> $result)? {
                    plain($($argument),*)
                }
                #[target_feature(enable = "avx2")]
                fn wide($($argument: $kind),*) $(-> $result)? {
                    plain($($argument),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bw")
                {
                    // SAFETY: the processor has what the function is compiled for.
                    return unsafe { widest($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    return unsafe { wide($($argument),*) };
                }
            }
            plain($($argument),*)
        }
    )*};
}

pub(super) use at_every_level;

/// The gate's activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x·σ(x)`.
    Silu,
    /// Gaussian error linear unit, tanh approximation.
    GeluTanh,
}

/// What one update of AdamW (arXiv 1711.05101) is made of, beside the numbers it changes.
#[derive(Clone, Copy, Debug)]
pub struct AdamWUpdate {
    /// The gradient is that many times what is given.
    pub scale: f32,
    /// β1 and `1 − β1`: what stays of the first moment, and what comes of the gradient.
    pub first: [f32; 2],
    /// β2 and `1 − β2`, of the second moment and the gradient's square.
    pub second: [f32; 2],
    /// `1 / sqrt(1 − β2ᵗ)`.
    pub inverse_root: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// The learning rate over `1 − β1ᵗ`.
    pub step_size: f32,
    /// What the decay of weights leaves: one minus learning rate times decay.
    pub left: f32,
}

/// Numbers that are summed in f32.
pub const PIECE: usize = 1024;

at_every_level! {
    /// `act(gate) ⊙ up`, number by number.
    pub fn gated(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
        match activation {
            Activation::Silu => gate_by(|x| silu(x).0, gate, up, out),
            Activation::GeluTanh => gate_by(|x| gelu_tanh(x).0, gate, up, out),
        }
    }

    /// Gradients of [`gated`].
    pub fn gated_backward(
        activation: Activation, gate: &[f32], up: &[f32], dout: &[f32], dgate: &mut [f32], dup: &mut [f32],
    ) {
        match activation {
            Activation::Silu => gate_back(silu, gate, up, dout, dgate, dup),
            Activation::GeluTanh => gate_back(gelu_tanh, gate, up, dout, dgate, dup),
        }
    }

    /// `x / sqrt(mean(x²) + eps) · weight`. x, weight, out: (C).
    pub fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let scale = inverse_root(x, eps);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }

    /// Gradient of [`rms_norm_row`] in x. x, weight, dy, dx: (C).
    pub fn rms_norm_backward_row(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let scale = inverse_root(x, eps);
        for ((dx, dy), weight) in dx.iter_mut().zip(dy).zip(weight) {
            *dx = weight * dy;
        }
        let pull = dot(x, dx) * scale * scale / x.len() as f32;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = scale * (*dx - x * pull);
        }
    }

    /// Rotates `(i, i + D/2)` of every head of a row by the angle whose cosine and sine are given; `sign` −1 rotates back.
    /// x, out: (H, D); cos, sin: (D/2).
    pub fn rope_row(x: &[f32], cos: &[f32], sin: &[f32], sign: f32, out: &mut [f32]) {
        let half = cos.len();
        for (x, out) in x.chunks_exact(2 * half).zip(out.chunks_exact_mut(2 * half)) {
            let ((a, b), (left, right)) = (x.split_at(half), out.split_at_mut(half));
            for at in 0..half {
                let sin = sign * sin[at];
                left[at] = a[at] * cos[at] - b[at] * sin;
                right[at] = b[at] * cos[at] + a[at] * sin;
            }
        }
    }

    /// `exp(scale·(x − max x))` in place; gives the maximum and the sum. Long rows are summed in f64, a piece at a time. scale > 0.
    pub fn softmax_row(x: &mut [f32], scale: f32) -> (f32, f64) {
        let max = largest(x);
        (max, x.chunks_mut(PIECE).map(|piece| f64::from(exp_row(piece, max, scale))).sum())
    }

    /// Σ x of at most [`PIECE`] numbers, with the bits of a piece of [`softmax_row`].
    pub fn sum_row(x: &[f32]) -> f32 {
        let mut sums = [0f32; 16];
        let (chunks, rest) = x.as_chunks::<16>();
        for chunk in chunks {
            for lane in 0..16 {
                sums[lane] += chunk[lane];
            }
        }
        rest.iter().zip(&mut sums).for_each(|(x, sum)| *sum += x);
        sums.iter().sum()
    }

    /// `exp(scale·(x − max x))` in place; gives the largest and the sum. scale > 0.
    pub(super) fn weigh_row(x: &mut [f32], scale: f32) -> [f32; 2] {
        let max = largest(x);
        [max, exp_row(x, max, scale)]
    }

    /// Turns products `q·k` into weights, given the largest and one over the sum, and `dout·v` into the gradient of the scores:
    /// `dscore = weight·(dscore − pull)·scale`.
    pub(super) fn score_gradient_row(
        weights: &mut [f32], dscores: &mut [f32], softmax: [f32; 2], pull: f32, scale: f32,
    ) {
        for (weight, dscore) in weights.iter_mut().zip(dscores) {
            *weight = exp((*weight - softmax[0]) * scale) * softmax[1];
            *dscore = *weight * (*dscore - pull) * scale;
        }
    }

    /// `x ← factor·x`.
    pub fn scale_row(x: &mut [f32], factor: f32) {
        x.iter_mut().for_each(|x| *x *= factor);
    }

    /// `y ← y + x`.
    pub fn add_row(x: &[f32], y: &mut [f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
    }

    /// One update of some parameters and their moments, in PyTorch's order of operations.
    pub fn adamw_row(
        update: AdamWUpdate, gradient: &[f32], parameter: &mut [f32], first: &mut [f32], second: &mut [f32],
    ) {
        let AdamWUpdate { scale, first: [keep1, take1], second: [keep2, take2], inverse_root, eps, step_size, left } = update;
        let moments = first.iter_mut().zip(second);
        for ((parameter, gradient), (first, second)) in parameter.iter_mut().zip(gradient).zip(moments) {
            let gradient = gradient * scale;
            *first = *first * keep1 + gradient * take1;
            *second = *second * keep2 + gradient * gradient * take2;
            *parameter = *parameter * left - *first / (second.sqrt() * inverse_root + eps) * step_size;
        }
    }

    /// Σ a·b, see [`dot`].
    pub(super) fn dot_row(a: &[f32], b: &[f32]) -> f32 {
        dot(a, b)
    }
}

#[inline(always)]
fn gate_by(activation: impl Fn(f32) -> f32, gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = activation(*gate) * up;
    }
}

#[inline(always)]
fn gate_back(
    activation: impl Fn(f32) -> (f32, f32),
    gate: &[f32],
    up: &[f32],
    dout: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    let len = gate.len();
    let (up, dout, dgate, dup) = (&up[..len], &dout[..len], &mut dgate[..len], &mut dup[..len]);
    for at in 0..len {
        let (value, slope) = activation(gate[at]);
        dgate[at] = dout[at] * up[at] * slope;
        dup[at] = dout[at] * value;
    }
}

/// `exp(x)` to about one unit in the last place, zero where that would be no normal number, in plain arithmetic that vectorises: 2^n · p(r) with |r| ≤ ln 2 / 2.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let vanishes = x < -87.3;
    let x = x.clamp(-87.3, 88.7);
    // Adding 1.5·2²³ leaves no bits below one: rounding without the instruction that a portable build lacks, and the integer is in the
    // low bits. A cast would be done number by number, for what does not fit an integer.
    const ROUND: f32 = 12_582_912.0;
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let (n, whole) = (rounded - ROUND, rounded.to_bits().wrapping_sub(ROUND.to_bits()) as i32);
    // ln 2 in two parts, so that r keeps its low bits.
    let r = x - n * 0.693_359_4;
    let r = r + n * 2.121_944_4e-4;
    // The least largest relative error of this degree, 3e-9 (Lawson's iteration over the interval).
    let p = 4.166_839e-2 + r * (8.368_717e-3 + r * 1.381_459_9e-3);
    let p = 1.0 + r * (1.0 + r * (4.999_999_4e-1 + r * (1.666_652_1e-1 + r * p)));
    // It is in -126..=128 here, but for NaN; split so that neither factor leaves the exponent's range.
    let half = whole >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let value = p * power(half) * power(whole.wrapping_sub(half));
    if vanishes { 0.0 } else { value }
}

/// `x·σ(x)` and its derivative.
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let sigmoid = 1.0 / (1.0 + exp(-x));
    (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
}

/// GELU by its tanh approximation (arXiv 1606.08415), and its derivative.
#[inline(always)]
fn gelu_tanh(x: f32) -> (f32, f32) {
    const ROOT: f32 = 0.797_884_6; // √(2/π)
    const CUBIC: f32 = 0.044_715;
    let inner = ROOT * (x + CUBIC * x * x * x);
    let tanh = 1.0 - 2.0 / (1.0 + exp(2.0 * inner));
    let slope = ROOT * (1.0 + 3.0 * CUBIC * x * x);
    (0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope)
}

#[inline(always)]
fn inverse_root(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// The largest number of a row.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let mut largest = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for lane in 0..16 {
            largest[lane] = if chunk[lane] > largest[lane] { chunk[lane] } else { largest[lane] };
        }
    }
    largest.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// `exp(scale·(x − max))` in place; gives their sum, in sixteen interleaved sums added in a fixed order.
#[inline(always)]
fn exp_row(x: &mut [f32], max: f32, scale: f32) -> f32 {
    let mut sums = [0f32; 16];
    let (chunks, rest) = x.as_chunks_mut::<16>();
    for chunk in chunks {
        for lane in 0..16 {
            chunk[lane] = exp((chunk[lane] - max) * scale);
            sums[lane] += chunk[lane];
        }
    }
    for (value, sum) in rest.iter_mut().zip(&mut sums) {
        *value = exp((*value - max) * scale);
        *sum += *value;
    }
    sums.iter().sum()
}

/// Σ a·b in sixteen interleaved sums, added in a fixed order.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..16 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        for step in -8700..8800 {
            let x = step as f32 / 100.0;
            let exact = f64::from(x).exp();
            assert!(((f64::from(exp(x)) - exact) / exact).abs() < 1.2e-7, "exp({x})");
        }
        assert_eq!((exp(-1e30), exp(f32::NEG_INFINITY)), (0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn derivatives_of_the_activations() {
        for function in [silu, gelu_tanh] {
            for step in -40..40 {
                let x = step as f32 / 8.0;
                let slope = (f64::from(function(x + 1e-2).0) - f64::from(function(x - 1e-2).0)) / 2e-2;
                assert!((slope - f64::from(function(x).1)).abs() < 2e-3, "at {x}");
            }
        }
    }
}
