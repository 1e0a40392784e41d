//! Every kernel against plain sums.

use super::*;

fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// (M, K) times (N, K) transposed.
fn plain(x: &[f32], w: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
    let at = |row: usize, column: usize| {
        (0..k).map(|k_at| f64::from(x[row * k + k_at]) * f64::from(w[column * k + k_at])).sum()
    };
    (0..m * n).map(|index| at(index / n, index % n)).collect()
}

fn close(found: &[f32], exact: &[f64]) {
    assert_eq!(found.len(), exact.len());
    for (at, (found, exact)) in found.iter().zip(exact).enumerate() {
        assert!((f64::from(*found) - exact).abs() < 1e-4, "{found} at {at} should be {exact}");
    }
}

fn turned(x: &[f32], columns: usize) -> Vec<f32> {
    (0..x.len()).map(|at| x[at % (x.len() / columns) * columns + at / (x.len() / columns)]).collect()
}

fn modes() -> Vec<Mode> {
    let mut modes = vec![Mode { level: Level::Portable, pairs: false }];
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx512 {
        modes.push(Mode { level: Level::Avx2, pairs: false });
    }
    modes.push(Mode { level: level(), pairs: false });
    modes.push(Mode::best());
    modes
}

#[test]
fn every_width_and_level_is_the_plain_product_and_rows_stand_alone() {
    for (n, k) in [(70, 45), (33, 20), (16, 64), (1100, 96)] {
        let weight = numbers(n * k, 1);
        let halves = Width::Bf16(weight.iter().map(|value| bf16::from_f32(*value)).collect());
        let thin = Width::F16(weight.iter().map(|value| f16::from_f32(*value)).collect());
        for width in [Width::F32(weight), halves, thin] {
            let packed = Packed::new(&width, n, k);
            let mut rows = vec![0f32; n * k];
            rows.chunks_mut(k).enumerate().for_each(|(row, out)| packed.row(row, out));
            for (mode, m) in modes().into_iter().flat_map(|mode| [1, 2, 3, 5, 7, 13, 100].map(|m| (mode, m))) {
                let (x, dy) = (numbers(m * k, 2), numbers(m * n, 3));
                // What the kernel reads: activations rounded where it takes pairs of bf16.
                let rounds = mode.pairs && matches!(width, Width::Bf16(_));
                let read =
                    |x: &[f32]| x.iter().map(|x| if rounds { bf16::from_f32(*x).to_f32() } else { *x }).collect();
                let (x_read, dy_read): (Vec<f32>, Vec<f32>) = (read(&x), read(&dy));
                // SAFETY: both write all numbers.
                let (y, dx) = unsafe {
                    (
                        filled(m * n, |y| packed.forward_to(&x, y, false, mode)),
                        filled(m * k, |dx| packed.backward_to(&dy, dx, mode)),
                    )
                };
                close(&y, &plain(&x_read, &rows, (m, n, k)));
                close(&dx, &plain(&dy_read, &turned(&rows, k), (m, k, n)));
                let mut twice = y.clone();
                packed.forward_to(&x, Out(twice.as_mut_ptr()), true, mode);
                close(&twice, &plain(&x_read, &rows, (m, n, k)).iter().map(|y| 2.0 * y).collect::<Vec<_>>());
                for row in [0, m / 2, m - 1] {
                    let x = &x[row * k..(row + 1) * k];
                    // SAFETY: all numbers are written.
                    let alone = unsafe { filled(n, |y| packed.forward_to(x, y, false, mode)) };
                    assert_eq!(alone, y[row * n..(row + 1) * n], "row {row} of {m} stands alone");
                }
            }
        }
    }
}

#[test]
fn plain_matrices_multiply_from_both_sides() {
    for (m, k, n) in [(1, 3, 5), (16, 33, 40), (37, 16, 16), (5, 7, 64), (200, 20, 50)] {
        let (left, right) = (numbers(m * k, 6), numbers(k * n, 7));
        let exact = plain(&left, &turned(&right, n), (m, n, k));
        let mut out = vec![0f32; m * n];
        multiply(Left::Rows(&left), &right, (m, k, n), &mut out, false);
        close(&out, &exact);
        let mut other = vec![1f32; m * n];
        multiply(Left::Turned(&turned(&left, k)), &right, (m, k, n), &mut other, true);
        close(&other, &exact.iter().map(|value| value + 1.0).collect::<Vec<_>>());
    }
}

#[test]
fn avx2_has_the_bits_of_avx512() {
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx512 {
        let (m, n, k) = (7, 33, 20);
        let packed = Packed::new(&Width::F32(numbers(n * k, 4)), n, k);
        let x = numbers(m * k, 5);
        let of = |level| {
            let mode = Mode { level, pairs: false };
            // SAFETY: all numbers are written.
            unsafe { filled(m * n, |y| packed.forward_to(&x, y, false, mode)) }
        };
        assert_eq!(of(Level::Avx512), of(Level::Avx2), "one chain of fused multiply-adds each");
    }
}
