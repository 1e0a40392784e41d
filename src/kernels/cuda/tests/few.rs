//! Products of few rows.

use super::super::few::{self, MOST_ROWS, Product};
use super::super::launch::Kind;
use super::{Array, KINDS, assert_near, given, queue};

/// Products with `outs` outputs, every other one with a bias, beside sums in f64.
fn check(kind: Kind, rows: usize, k: usize, outs: &[usize]) {
    let Some(queue) = queue() else { return };
    let (x, xs) = given(kind, rows * k, 1);
    let (mut products, mut held, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
    for (at, &out) in outs.iter().enumerate() {
        let (w, ws) = given(kind, out * k, 2 + 2 * at as u32);
        let (bias, biases) = given(kind, out, 3 + 2 * at as u32);
        let y = Array::blank(kind, rows * out);
        let is_biased = at % 2 == 1;
        products.push(Product { w: w.at(), bias: if is_biased { bias.at() } else { 0 }, y: y.at(), out });
        let one = |row: usize, column: usize| {
            let (x, w) = (&xs[row * k..(row + 1) * k], &ws[column * k..(column + 1) * k]);
            let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            (sum + if is_biased { f64::from(biases[column]) } else { 0.0 }) as f32
        };
        wanted.push((0..rows * out).map(|at| one(at / out, at % out)).collect::<Vec<f32>>());
        held.push((w, bias, y));
    }
    // SAFETY: the arrays have these sizes and are aligned to 16 bytes.
    unsafe { few::products(queue, kind, (rows, k), x.at(), &products) }.unwrap();
    for ((_, _, y), wanted) in held.iter().zip(&wanted) {
        assert_near("product", y, wanted, 1e-6);
    }
}

#[test]
fn products_of_few_rows() {
    for kind in KINDS {
        for rows in 1..=MOST_ROWS {
            check(kind, rows, 64, &[48]);
        }
        // Outputs that fill no block and no warp, and columns that leave lanes without work.
        check(kind, 1, 584, &[33, 7, 130]);
        check(kind, 3, 8, &[1, 18]);
        check(kind, 8, 1032, &[65, 16]);
        // More products than a launch takes.
        check(kind, 2, 16, &[3; 19]);
    }
}
