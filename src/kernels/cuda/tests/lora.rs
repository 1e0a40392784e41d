//! Low-rank parts of many adapters at once.

use std::ops::Range;

use super::super::launch::Kind;
use super::super::lora::{self, Part};
use super::{Array, KINDS, assert_near, device, given, queue};
use crate::kernels::cpu::{LowRank, Packed, Width};

/// Parts of ranks `of` of products with `outs` outputs, beside their twin.
fn check(kind: Kind, n: usize, c: usize, outs: &[usize], of: &[(Range<usize>, usize)]) {
    let Some(queue) = queue() else { return };
    let (x, xs) = given(kind, n * c, 1);
    let packed = |values: &[f32], n, k| Packed::new(&Width::F32(values.to_vec()), n, k);
    let (mut parts, mut held, mut products) = (Vec::new(), Vec::new(), Vec::new());
    for (at, &out) in outs.iter().enumerate() {
        let (y, mut wanted) = given(kind, n * out, 2 + at as u32);
        let mut pairs = Vec::new();
        for (seed, (rows, rank)) in (100 * (at as u32 + 1)..).zip(of) {
            let ((a, down), (b, up)) = (given(kind, rank * c, 2 * seed), given(kind, out * rank, 2 * seed + 1));
            let (first, rows_of) = (rows.start, rows.len());
            parts.push(Part { a: a.at(), b: b.at(), y: y.at(), first, rows: rows_of, rank: *rank, out });
            pairs.push((rows.clone(), packed(&down, *rank, c), packed(&up, out, *rank)));
            held.extend([a, b]);
        }
        let twins: Vec<_> = pairs.iter().map(|(rows, a, b)| LowRank { rows: rows.clone(), a, b }).collect();
        let added = packed(&vec![0.0; out * c], out, c).forward_adapted(&xs, &twins);
        wanted.iter_mut().zip(added).for_each(|(wanted, added)| *wanted += added);
        products.push((y, wanted));
    }
    let low = Array::blank(Kind::F32, lora::scratch(&parts));
    // SAFETY: the arrays have these sizes, and no row of a product is in two parts.
    unsafe { lora::add(queue, kind, c, x.at(), &parts, low.at()) }.unwrap();
    low.bytes();
    // Sums of thousands are rounded more often.
    let most = if c > 2000 { 1e-5 } else { 1e-6 };
    for (y, wanted) in &products {
        assert_near("rows", y, wanted, most);
    }
}

#[test]
fn rows_of_several_adapters_and_of_none() {
    for kind in KINDS {
        // Rows 0, 3, 4 and 15.. have none; ranks that are no multiple of what a block takes.
        let of = [(1..2, 8), (2..3, 5), (5..14, 16), (14..15, 1)];
        check(kind, 20, 64, &[48], &of);
        check(kind, 20, 1030, &[130, 7, 300], &of);
        check(kind, 20, 45, &[33], &of);
        check(kind, 20, 600, &[20], &[(0..20, 12)]);
    }
}

#[test]
fn more_adapters_than_a_launch_takes() {
    let of: Vec<_> = (0..70).map(|row| (row..row + 1, 1 + row % 9)).collect();
    check(Kind::F32, 70, 12, &[10, 6], &of);
}

/// Llama 3's widest products, for a step of decoding and a chunk of a prompt: too slow for the emulation.
#[test]
fn products_of_a_large_model_on_a_gpu() {
    if device().is_none() {
        return;
    }
    for kind in KINDS {
        check(kind, 8, 4096, &[14336, 14336], &[(0..3, 16), (3..8, 16)]);
        check(kind, 200, 14336, &[4096], &[(0..150, 16), (160..200, 8)]);
    }
}
