//! Attention against sums in f64, and rows alone against rows together.

use super::*;
use crate::kernels::cpu::has_bf16_products;

fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Output of one head of one row, and its weights.
fn plain(heads: Heads, head: usize, q: &[f32], (k, v): (&[f32], &[f32]), slots: &[usize]) -> (Vec<f64>, Vec<f64>) {
    let (kv, d) = (head / (heads.query / heads.key), heads.dim);
    let of = |x: &[f32], slot: usize| x[(slot * heads.key + kv) * d..][..d].to_vec();
    let score = |slot: &usize| {
        let sum: f64 = q.iter().zip(of(k, *slot)).map(|(a, b)| f64::from(*a) * f64::from(b)).sum();
        sum * f64::from(heads.scale)
    };
    let scores: Vec<f64> = slots.iter().map(score).collect();
    let sum: f64 = scores.iter().map(|score| score.exp()).sum();
    let weights: Vec<f64> = scores.iter().map(|score| score.exp() / sum).collect();
    let mut out = vec![0f64; d];
    for (weight, slot) in weights.iter().zip(slots) {
        out.iter_mut().zip(of(v, *slot)).for_each(|(out, value)| *out += weight * f64::from(value));
    }
    (out, weights)
}

/// A prompt of 37 rows with two answers of 40 and 9 that share it, and a run of its own of 600, enough for slices; `window` keys are seen.
fn step(window: usize) -> Vec<(Vec<usize>, usize, Vec<Range<usize>>)> {
    let run = |prefix: Range<usize>, start: usize, len: usize| {
        let slots: Vec<usize> = prefix.clone().chain(start..start + len).collect();
        let seen = (1..=len).map(|at| (prefix.len() + at).saturating_sub(window)..prefix.len() + at).collect();
        (slots, start, seen)
    };
    vec![run(0..0, 0, 37), run(0..37, 37, 40), run(0..37, 77, 9), run(0..0, 86, 600)]
}

#[test]
fn rows_are_the_plain_sums_and_stand_alone() {
    for (query, key, dim) in [(6, 2, 64), (2, 2, 8), (4, 1, 80), (3, 3, 16)] {
        let heads = Heads { query, key, dim, scale: 0.3 };
        let n = 686;
        let (q, k, v) = (numbers(n * query * dim, 1), numbers(n * key * dim, 2), numbers(n * key * dim, 3));
        for window in [1000, 20] {
            let lists = step(window);
            let rows: Vec<Rows<'_>> =
                lists.iter().map(|(slots, start, seen)| Rows { start: *start, slots, seen: seen.clone() }).collect();
            let [found, _] = attention(heads, &rows, &q, &k, &v);
            let [portable, _] = attention_at(Level::Portable, heads, &rows, &q, &k, &v);
            assert!(found.iter().zip(&portable).all(|(a, b)| (a - b).abs() < 1e-5));
            // The same keys in other places: slots reversed.
            let (mut k_moved, mut v_moved) = (k.clone(), v.clone());
            for slot in 0..n {
                let (from, to, width) = (slot * key * dim, (n - 1 - slot) * key * dim, key * dim);
                k_moved[to..to + width].copy_from_slice(&k[from..from + width]);
                v_moved[to..to + width].copy_from_slice(&v[from..from + width]);
            }
            for (slots, start, seen) in &lists {
                for (at, seen) in seen.iter().enumerate() {
                    let row = (start + at) * query * dim;
                    let mine = &q[row..row + query * dim];
                    let keys = &slots[seen.clone()];
                    let moved: Vec<usize> = keys.iter().map(|slot| n - 1 - slot).collect();
                    let seen = std::iter::once(0..keys.len()).collect();
                    let [alone, _] =
                        attention(heads, &[Rows { start: 0, slots: &moved, seen }], mine, &k_moved, &v_moved);
                    assert_eq!(alone, found[row..row + query * dim], "row {} stands alone", start + at);
                    for head in 0..query {
                        let (exact, _) = plain(heads, head, &mine[head * dim..][..dim], (&k, &v), keys);
                        let found = &found[row + head * dim..][..dim];
                        assert!(found.iter().zip(&exact).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5));
                    }
                }
            }
        }
    }
}

/// In bf16, too, where the processor multiplies it: each of some hundred products is off by 2⁻⁹ of itself at most.
#[test]
fn gradients_are_the_plain_sums() {
    for (query, key, dim, window) in [(6, 2, 64, 1000), (3, 1, 32, 33), (2, 2, 8, 20), (4, 1, 80, 33)] {
        let heads = Heads { query, key, dim, scale: 0.3 };
        let n = 686;
        let (q, k, v) = (numbers(n * query * dim, 1), numbers(n * key * dim, 2), numbers(n * key * dim, 3));
        let dout = numbers(n * query * dim, 4);
        let lists = step(window);
        let rows: Vec<Rows<'_>> =
            lists.iter().map(|(slots, start, seen)| Rows { start: *start, slots, seen: seen.clone() }).collect();
        let [out, softmax] = attention(heads, &rows, &q, &k, &v);
        let back = |in_bf16| {
            attention_backward(heads, &[&rows[..3], &rows[3..]], (&q, &k, &v), ([&out, &softmax], &dout), in_bf16)
        };
        let (found, rounded) = (back(false), back(true));
        assert_eq!(found != rounded, has_bf16_products() && dim % 32 == 0);
        let mut exact = [vec![0f64; q.len()], vec![0f64; k.len()], vec![0f64; v.len()]];
        for (slots, start, seen) in &lists {
            for (at, head) in (0..seen.len()).flat_map(|at| (0..query).map(move |head| (at, head))) {
                let (row, keys) = (((start + at) * query + head) * dim, &slots[seen[at].clone()]);
                let (mine, dout) = (&q[row..row + dim], &dout[row..row + dim]);
                let (out, weights) = plain(heads, head, mine, (&k, &v), keys);
                let pull: f64 = out.iter().zip(dout).map(|(out, dout)| out * f64::from(*dout)).sum();
                for (weight, slot) in weights.iter().zip(keys) {
                    let place = (slot * key + head / (query / key)) * dim;
                    let along: f64 = (0..dim).map(|d| f64::from(dout[d]) * f64::from(v[place + d])).sum();
                    let dscore = weight * (along - pull) * 0.3;
                    for d in 0..dim {
                        exact[0][row + d] += dscore * f64::from(k[place + d]);
                        exact[1][place + d] += dscore * f64::from(mine[d]);
                        exact[2][place + d] += weight * f64::from(dout[d]);
                    }
                }
            }
        }
        for ((found, rounded), exact) in found.iter().zip(&rounded).zip(&exact) {
            assert!(found.iter().zip(exact).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-4));
            let gap =
                |found: &[f32]| -> f64 { found.iter().zip(exact).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum() };
            let size: f64 = exact.iter().map(|b| b * b).sum();
            assert!((gap(rounded) / size).sqrt() < 4e-3, "{}", (gap(rounded) / size).sqrt());
        }
    }
}
