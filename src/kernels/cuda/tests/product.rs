//! How products are asked of cuBLAS: an emulation that follows its definition, by columns, beside sums by rows.

use super::super::launch::Kind;
use super::super::product::{self, Place};
use super::{KINDS, assert_near, given, queue};

#[test]
fn products_of_views_and_transposes() {
    let Some(queue) = queue() else { return };
    let (m, n, k) = (5, 7, 16);
    for (kind, to) in KINDS.into_iter().flat_map(|kind| [(kind, kind), (kind, Kind::F32)]) {
        for (turned, onto) in [([false, false], true), ([false, true], false), ([true, false], true)] {
            // Every matrix is some columns of a wider one.
            let matrix = |(rows, columns): (usize, usize), turned: bool, seed| {
                let (rows, width) = if turned { (columns, rows) } else { (rows, columns) };
                let pitch = width + 8;
                let (array, numbers) = given(kind, rows * pitch, seed);
                let size = if kind == Kind::F32 { 4 } else { 2 };
                let place = Place { at: array.at() + 8 * size, kind, pitch, turned };
                let value = move |row: usize, column: usize| {
                    let (row, column) = if turned { (column, row) } else { (row, column) };
                    f64::from(numbers[8 + row * pitch + column])
                };
                (array, place, value)
            };
            let (_left, left, left_value) = matrix((m, k), turned[0], 1);
            let (_right, right, right_value) = matrix((k, n), turned[1], 2);
            let (y, before) = given(to, m * n, 3);
            let place = Place { at: y.at(), kind: to, pitch: n, turned: false };
            // SAFETY: the arrays have these sizes.
            unsafe { product::multiply(queue, (m, n, k), [left, right, place], 1.5, onto) }.unwrap();
            let sum = |row, column| (0..k).map(|at| left_value(row, at) * right_value(at, column)).sum::<f64>();
            let one = |at: usize| {
                let kept = if onto { f64::from(before[at]) } else { 0.0 };
                (1.5 * sum(at / n, at % n) + kept) as f32
            };
            assert_near("product", &y, &(0..m * n).map(one).collect::<Vec<_>>(), 1e-6);
        }
    }
}
