//! Every kernel against plain sums.

use super::together::forward_in;
use super::*;

/// One product as `mode` does it.
fn forward(packed: &Packed, x: &[f32], parts: &[LowRank<'_>], mode: Mode) -> Vec<f32> {
    forward_in(mode, x, &[Adapted { weight: packed, parts }], &[]).remove(0)
}

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
    let mut levels = vec![Level::Portable];
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx512 {
        levels.push(Level::Avx2);
    }
    levels.push(level());
    let of_level = |level| [false, true].map(|sixteens| Mode { level, pairs: false, sixteens });
    levels.into_iter().flat_map(of_level).chain([Mode::best()]).collect()
}

#[test]
fn every_width_and_level_is_the_plain_product_and_rows_stand_alone() {
    for (n, k) in [(70, 45), (33, 20), (16, 64), (9, 45), (1100, 96)] {
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
                let y = forward(&packed, &x, &[], mode);
                // SAFETY: all numbers are written.
                let dx = unsafe { filled(m * k, |dx| packed.backward_in(mode, &dy, None, dx, false)) };
                close(&y, &plain(&x_read, &rows, (m, n, k)));
                close(&dx, &plain(&dy_read, &turned(&rows, k), (m, k, n)));
                for row in [0, m / 2, m - 1] {
                    let x = &x[row * k..(row + 1) * k];
                    let alone = forward(&packed, x, &[], mode);
                    assert_eq!(alone, y[row * n..(row + 1) * n], "row {row} of {m} stands alone");
                }
            }
        }
    }
}

#[test]
fn many_small_numbers_are_not_lost_beside_a_large_one() {
    let (long, some, small) = (8192, 20, 1e-8);
    let numbers: Vec<f32> = std::iter::once(1.0).chain(std::iter::repeat_n(small, long - 1)).collect();
    let ones = |n, k| Packed::new(&Width::F32(vec![1.0; n * k]), n, k);
    let (wide, high) = (ones(some, long), ones(long, some));
    let exact = vec![1.0 + (long - 1) as f64 * f64::from(small); some];
    for mode in modes() {
        let forward = forward(&wide, &numbers, &[], mode);
        // SAFETY: all numbers are written.
        let backward = unsafe { filled(some, |dx| high.backward_in(mode, &numbers, None, dx, false)) };
        for (found, exact) in forward.iter().chain(&backward).zip(exact.iter().cycle()) {
            // One chain gives 1: it is off by 8e-5.
            assert!((f64::from(*found) - exact).abs() < 1e-5, "{mode:?}: {found} should be {exact}");
        }
    }
}

#[test]
fn gradients_of_low_rank_parts_go_on_top() {
    // 150 rows of 1100 columns are more than one block.
    for (n, k, rank, m) in [(70, 45, 3, 5), (1100, 96, 16, 150), (33, 48, 40, 13)] {
        let weight: Vec<bf16> = numbers(n * k, 1).into_iter().map(bf16::from_f32).collect();
        let wide = Width::F32(weight.iter().map(|value| value.to_f32()).collect());
        let (dy, dlow, a) = (numbers(m * n, 2), numbers(m * rank, 3), numbers(rank * k, 4));
        let low = plain(&dlow, &turned(&a, k), (m, k, rank));
        for (width, mode) in [&wide, &Width::Bf16(weight)]
            .into_iter()
            .flat_map(|width| modes().into_iter().map(move |mode| (width, mode)))
        {
            let packed = Packed::new(width, n, k);
            let back = |low, to: &mut [f32], add| packed.backward_in(mode, &dy, low, Out(to.as_mut_ptr()), add);
            let (mut alone, mut fresh, mut onto) = (vec![0f32; m * k], vec![7f32; m * k], vec![2f32; m * k]);
            back(None, &mut alone, false);
            back(Some([&dlow, &a]), &mut fresh, false);
            back(Some([&dlow, &a]), &mut onto, true);
            let exact: Vec<f64> = alone.iter().zip(&low).map(|(alone, low)| f64::from(*alone) + low).collect();
            close(&fresh, &exact);
            close(&onto, &exact.iter().map(|value| value + 2.0).collect::<Vec<_>>());
        }
    }
}

#[test]
fn bias_and_low_rank_parts_go_on_top_of_their_rows() {
    let bf16s = |values: Vec<f32>| Width::Bf16(values.into_iter().map(bf16::from_f32).collect());
    for (n, k, rank) in [(70, 45, 4), (96, 64, 16), (40, 32, 40)] {
        for (width, mode) in [&Width::F32 as &dyn Fn(Vec<f32>) -> Width, &bf16s]
            .into_iter()
            .flat_map(|width| modes().into_iter().map(move |mode| (width, mode)))
        {
            let [weight, a1, b1, a2, b2] = [(n, k), (rank, k), (n, rank), (rank, k), (n, rank)]
                .map(|(n, k)| Packed::new(&width(numbers(n * k, (n + 3 * k) as u32)), n, k));
            for m in [5, 250] {
                let (x, bias) = (numbers(m * k, 2), numbers(n, 3));
                let cut = [0..m / 5, m / 5..m / 5, m / 2..m];
                let parts = [(&a1, &b1), (&a2, &b1), (&a2, &b2)];
                let parts: Vec<_> =
                    cut.iter().cloned().zip(parts).map(|(rows, (a, b))| LowRank { rows, a, b }).collect();
                let biased = weight.clone().with_bias(bias.clone());
                let found = forward(&biased, &x, &parts, mode);
                let mut exact: Vec<f64> = forward(&weight, &x, &[], mode).into_iter().map(f64::from).collect();
                exact.iter_mut().enumerate().for_each(|(at, y)| *y += f64::from(bias[at % n]));
                for LowRank { rows, a, b } in &parts {
                    let low = forward(a, &x[rows.start * k..rows.end * k], &[], mode);
                    let high = forward(b, &low, &[], mode);
                    exact[rows.start * n..].iter_mut().zip(high).for_each(|(y, high)| *y += f64::from(high));
                }
                close(&found, &exact);
                let alone = LowRank { rows: 0..1, ..parts[2].clone() };
                let last = forward(&biased, &x[(m - 1) * k..], &[alone], mode);
                assert_eq!(last, found[(m - 1) * n..], "a row with its part stands alone");
            }
        }
    }
}

#[test]
fn products_together_have_the_bits_of_products_alone() {
    let k = 64;
    let widths = [(70, true), (16, false), (200, true), (33, false)];
    let weights = widths.map(|(n, is_bf16)| {
        let numbers = numbers(n * k, n as u32);
        let halves = || Width::Bf16(numbers.iter().copied().map(bf16::from_f32).collect());
        Packed::new(&if is_bf16 { halves() } else { Width::F32(numbers.clone()) }, n, k).with_bias(vec![0.5; n])
    });
    let (a, b) =
        (Packed::new(&Width::F32(numbers(4 * k, 1)), 4, k), Packed::new(&Width::F32(numbers(16 * 4, 2)), 16, 4));
    for (mode, m) in modes().into_iter().flat_map(|mode| [0, 1, 3, 300].map(|m| (mode, m))) {
        let x = numbers(m * k, 3);
        let part = [LowRank { rows: m / 2..m, a: &a, b: &b }];
        let parts: [&[LowRank<'_>]; 4] = [&[], &part, &[], &[]];
        let products: Vec<_> = weights.iter().zip(parts).map(|(weight, parts)| Adapted { weight, parts }).collect();
        let alone: Vec<_> = products.iter().map(|product| forward(product.weight, &x, product.parts, mode)).collect();
        assert!(forward_in(mode, &x, &products, &[]) == alone, "{mode:?} {m} rows");
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

/// Codes of every layout, and the numbers they stand for.
fn coded(n: usize, k: usize) -> Vec<(Codes, Vec<f32>)> {
    let layouts = [(true, 32, true), (true, 16, true), (true, 32, false), (false, 32, false), (false, 16, true)];
    let make = |(four_bits, group, has_offsets): (bool, usize, bool)| {
        let low = if four_bits { 0 } else { -128 };
        let span = if four_bits { 16.0 } else { 256.0 };
        let code = |value: f32| (low as f32 + (value + 1.0) / 2.0 * (span - 0.01)) as i8;
        let codes: Vec<i8> = numbers(n * k, 1).into_iter().map(code).collect();
        let small = |seed, by: f32| numbers(n * k / group, seed).into_iter().map(|x| f16::from_f32(x / by)).collect();
        let scales: Vec<f16> = small(2, span);
        let offsets: Option<Vec<f16>> = has_offsets.then(|| small(3, 1.0));
        let number = |(at, code): (usize, &i8)| {
            let offset = offsets.as_ref().map_or(0.0, |offsets| offsets[at / group].to_f32());
            scales[at / group].to_f32() * f32::from(*code) + offset
        };
        let plain = codes.iter().enumerate().map(number).collect();
        (Codes { four_bits, group, codes, scales, offsets }, plain)
    };
    layouts.into_iter().map(make).collect()
}

#[test]
fn codes_have_the_bits_of_their_numbers() {
    for (n, k) in [(70, 32), (33, 576), (64, 288)] {
        for (codes, plain) in coded(n, k) {
            let layout = (codes.four_bits, codes.group, codes.offsets.is_some());
            let coded = Packed::new(&Width::Codes(codes), n, k);
            let rounded = Packed::new(&Width::Bf16(plain.iter().copied().map(bf16::from_f32).collect()), n, k);
            let exact = Packed::new(&Width::F32(plain), n, k);
            assert!(coded.bytes() < rounded.bytes());
            let read = |mode: Mode| if mode.pairs { &rounded } else { &exact };
            let rows = |packed: &Packed| {
                let mut rows = vec![0f32; n * k];
                rows.chunks_mut(k).enumerate().for_each(|(row, out)| packed.row(row, out));
                rows
            };
            assert_eq!(rows(&coded), rows(read(Mode::best())), "{layout:?}");
            let modes = modes().into_iter().filter(|mode| !mode.sixteens);
            for (mode, m) in modes.flat_map(|mode| [1, 2, 3, 4, 5, 8, 13, 100].map(|m| (mode, m))) {
                let (x, dy) = (numbers(m * k, 4), numbers(m * n, 5));
                let products = |packed: &Packed| {
                    let y = forward(packed, &x, &[], mode);
                    // SAFETY: all numbers are written.
                    (y, unsafe { filled(m * k, |dx| packed.backward_in(mode, &dy, None, dx, false)) })
                };
                assert!(products(&coded) == products(read(mode)), "{layout:?} {mode:?} {m} rows");
            }
        }
    }
}

#[test]
fn codes_times_sixteen_bits_are_off_by_half_a_step_at_most() {
    for (n, k) in [(70, 32), (33, 576), (16, 288)] {
        for (codes, weights) in coded(n, k) {
            let layout = (codes.four_bits, codes.group, codes.offsets.is_some());
            let packed = Packed::new(&Width::Codes(codes), n, k).with_bias(numbers(n, 9));
            let (a, b) = (numbers(4 * k, 6), numbers(n * 4, 7));
            let halves = |numbers: &[f32]| Width::Bf16(numbers.iter().map(|x| bf16::from_f32(*x)).collect());
            let (a, b) = (Packed::new(&halves(&a), 4, k), Packed::new(&halves(&b), n, 4));
            let modes = modes().into_iter().filter(|mode| mode.sixteens);
            for (mode, m) in modes.flat_map(|mode| [1, 2, 3, 4, 5, 6, 8, 13, 250].map(|m| (mode, m))) {
                // Blocks of all sizes, one of zeros among them.
                let sized = |(at, x): (usize, f32)| x * [1.0, 1e3, 0.0, 1e-4, 1e-35][at / 32 % 5];
                let x: Vec<f32> = numbers(m * k, 4).into_iter().enumerate().map(sized).collect();
                let part = [LowRank { rows: m / 2..m, a: &a, b: &b }];
                let (y, low) = (forward(&packed, &x, &part, mode), forward(&a, &x, &[], mode));
                let low = forward(&b, &low, &[], mode);
                for (at, exact) in plain(&x, &weights, (m, n, k)).into_iter().enumerate() {
                    let (row, column) = (at / n, at % n);
                    let blocks = x[row * k..][..k].chunks(32).zip(weights[column * k..][..k].chunks(32));
                    let (mut bound, mut size) = (0.0, 1.0);
                    for (x, w) in blocks {
                        let of_w: f32 = w.iter().map(|w| w.abs()).sum();
                        let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
                        (bound, size) = (bound + 0.5 / 32767.0 * most * of_w, size + most * of_w);
                    }
                    let extra = numbers(n, 9)[column] + if row >= m / 2 { low[at] } else { 0.0 };
                    let off = (f64::from(y[at]) - exact - f64::from(extra)).abs() as f32;
                    assert!(
                        off <= bound + 1e-6 * size + 1e-6 * extra.abs(),
                        "{layout:?} {mode:?} {m} rows: {off}, {bound}"
                    );
                }
                for row in [0, m / 2, m - 1] {
                    let x = &x[row * k..][..k];
                    let part = [LowRank { rows: 0..1, a: &a, b: &b }];
                    let alone = forward(&packed, x, if row >= m / 2 { &part } else { &[] }, mode);
                    assert_eq!(alone, y[row * n..][..n], "{layout:?} {mode:?} row {row} of {m} stands alone");
                }
                for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut x = x.clone();
                    x[m / 2 * k + 3] = broken;
                    let y = forward(&packed, &x, &[], mode);
                    let lost = |row: usize| y[row * n..][..n].iter().all(|y| y.is_nan());
                    assert!((0..m).all(|row| lost(row) == (row == m / 2)), "{broken} is seen in its row alone");
                }
            }
        }
    }
}

#[test]
fn avx2_has_the_bits_of_avx512() {
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx512 {
        let (m, n, k) = (7, 33, 20);
        let packed = Packed::new(&Width::F32(numbers(n * k, 4)), n, k);
        let x = numbers(m * k, 5);
        let of = |level| forward(&packed, &x, &[], Mode { level, pairs: false, sixteens: false });
        assert_eq!(of(Level::Avx512), of(Level::Avx2), "one chain of fused multiply-adds each");
    }
}
