//! Norm, rotation, gate, cache writes, dropout and the optimizer's update.

use super::super::rows;
use super::{Array, KINDS, assert_near, given, queue, random};
use crate::kernels::cpu::{self, Activation, AdamWUpdate, Dropout};

#[test]
fn rms_norm_and_its_gradient() {
    let Some(queue) = queue() else { return };
    for kind in KINDS {
        for (count, c) in [(3, 8), (2, 100), (4, 256), (2, 576), (1, 2050)] {
            let ((x, xs), (dy, dys)) = (given(kind, count * c, 1), given(kind, count * c, 2));
            let weights: Vec<f32> = random(c, 3).iter().map(|value| 1.0 + value / 2.0).collect();
            let weight = Array::of(super::Kind::F32, &weights);
            let [y, dx, onto] = [(); 3].map(|()| Array::blank(kind, count * c));
            // SAFETY: the arrays have these sizes.
            unsafe {
                rows::rms_norm(queue, kind, (count, c), 1e-5, [x.at(), weight.at(), y.at()]).unwrap();
                let places = [x.at(), weight.at(), dy.at(), 0, dx.at()];
                rows::rms_norm_backward(queue, kind, (count, c), 1e-5, places).unwrap();
                let places = [x.at(), weight.at(), dy.at(), dy.at(), onto.at()];
                rows::rms_norm_backward(queue, kind, (count, c), 1e-5, places).unwrap();
            }
            let (mut ys, mut dxs) = (vec![0f32; count * c], vec![0f32; count * c]);
            for row in 0..count {
                let range = row * c..(row + 1) * c;
                cpu::rms_norm_row(&xs[range.clone()], &weights, 1e-5, &mut ys[range.clone()]);
                let (x, dy) = (&xs[range.clone()], &dys[range.clone()]);
                cpu::rms_norm_backward_row(x, &weights, 1e-5, dy, &mut dxs[range]);
            }
            assert_near("norm", &y, &ys, 1e-6);
            assert_near("gradient of the norm", &dx, &dxs, 1e-6);
            let sums: Vec<f32> = dxs.iter().zip(&dys).map(|(dx, before)| dx + before).collect();
            assert_near("gradient of the norm on top of another", &onto, &sums, 1e-6);
        }
    }
}

#[test]
fn rope_both_ways() {
    let Some(queue) = queue() else { return };
    for kind in KINDS {
        for (n, h, d) in [(3, 2, 8), (5, 3, 64), (1, 1, 12), (9, 4, 128)] {
            let (x, xs) = given(kind, n * h * d, 1);
            let (coss, sins) = (random(n * d / 2, 2), random(n * d / 2, 3));
            let (cos, sin) = (Array::of(super::Kind::F32, &coss), Array::of(super::Kind::F32, &sins));
            for sign in [1.0, -1.0] {
                let y = Array::blank(kind, n * h * d);
                // SAFETY: the arrays have these sizes.
                unsafe { rows::rope(queue, kind, (n, h, d), sign, [x.at(), cos.at(), sin.at(), y.at()]) }.unwrap();
                let mut ys = vec![0f32; n * h * d];
                for row in 0..n {
                    let (here, angles) = (row * h * d..(row + 1) * h * d, row * d / 2..(row + 1) * d / 2);
                    cpu::rope_row(&xs[here.clone()], &coss[angles.clone()], &sins[angles], sign, &mut ys[here]);
                }
                assert_near("rotation", &y, &ys, 1e-6);
            }
        }
    }
}

#[test]
fn sums_beside_and_onto() {
    let Some(queue) = queue() else { return };
    for (kind, count) in KINDS.into_iter().flat_map(|kind| [(kind, 8), (kind, 1003)]) {
        let ((a, left), (b, right)) = (given(kind, count, 1), given(kind, count, 2));
        let y = Array::blank(kind, count);
        let wanted: Vec<f32> = left.iter().zip(&right).map(|(a, b)| a + b).collect();
        // SAFETY: the arrays have these sizes.
        unsafe {
            rows::sum(queue, kind, count, [a.at(), b.at(), y.at()]).unwrap();
            rows::sum(queue, kind, count, [a.at(), b.at(), a.at()]).unwrap();
        }
        assert_near("sum", &y, &wanted, 1e-6);
        assert_eq!(a.bytes(), y.bytes());
    }
}

#[test]
fn gate_and_its_gradients() {
    let Some(queue) = queue() else { return };
    for kind in KINDS {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let count = 1000;
            let wide = |seed| random(count, seed).iter().map(|value| value * 9.0).collect::<Vec<_>>();
            let gate = Array::of(kind, &wide(1));
            let ((up, ups), (dout, douts), gates) = (given(kind, count, 2), given(kind, count, 3), gate.numbers());
            let [out, dgate, dup] = [(); 3].map(|()| Array::blank(kind, count));
            // SAFETY: the arrays have these sizes.
            unsafe {
                rows::gated(queue, kind, activation, count, [gate.at(), up.at(), out.at()]).unwrap();
                let places = [gate.at(), up.at(), dout.at(), dgate.at(), dup.at()];
                rows::gated_backward(queue, kind, activation, count, places).unwrap();
            }
            let mut wanted = [(); 3].map(|()| vec![0f32; count]);
            cpu::gated(activation, &gates, &ups, &mut wanted[0]);
            let [_, dgates, dups] = &mut wanted;
            cpu::gated_backward(activation, &gates, &ups, &douts, dgates, dups);
            assert_near("gate", &out, &wanted[0], 1e-6);
            assert_near("gradient of the gate", &dgate, &wanted[1], 1e-6);
            assert_near("gradient of what it gates", &dup, &wanted[2], 1e-6);
        }
    }
}

#[test]
fn cache_writes_go_to_their_slots_alone() {
    let Some(queue) = queue() else { return };
    for kind in KINDS {
        let (width, slots) = (24, [7u32, 0, 11]);
        let ((k, ks), (v, vs)) = (given(kind, 3 * width, 1), given(kind, 3 * width, 2));
        let ((k_cache, mut keys), (v_cache, mut values)) = (given(kind, 12 * width, 3), given(kind, 12 * width, 4));
        let ids = Array::of_ids(&slots);
        let places = [k.at(), v.at(), ids.at(), k_cache.at(), v_cache.at()];
        // SAFETY: the arrays have these sizes, the slots are rows of the caches.
        unsafe { rows::kv_write(queue, kind, (3, width), places) }.unwrap();
        for (row, slot) in slots.iter().enumerate() {
            let (from, to) = (row * width..(row + 1) * width, *slot as usize * width..(*slot as usize + 1) * width);
            keys[to.clone()].copy_from_slice(&ks[from.clone()]);
            values[to].copy_from_slice(&vs[from]);
        }
        assert!(k_cache.numbers() == keys && v_cache.numbers() == values);
    }
}

#[test]
fn dropout_has_its_twins_mask() {
    let Some(queue) = queue() else { return };
    for kind in KINDS {
        for (p, seed) in [(0.3, 5), (0.05, u64::MAX), (0.9, 1 << 40)] {
            let count = 3000;
            let (x, xs) = given(kind, count, 1);
            let (y, dropout) = (Array::blank(kind, count), Dropout::new(p, seed));
            // SAFETY: the arrays have this size.
            unsafe { rows::dropout(queue, kind, dropout, count, [x.at(), y.at()]) }.unwrap();
            let mut wanted = vec![f32::NAN; count];
            dropout.row(0, &xs, &mut wanted);
            // One product each: to the last bit.
            assert!(y.bytes() == Array::of(kind, &wanted).bytes(), "{kind:?}, {p}");
        }
    }
}

#[test]
fn an_update_of_the_optimizer() {
    let Some(queue) = queue() else { return };
    let count = 1000;
    let update = AdamWUpdate {
        scale: 0.25,
        first: [0.9, 0.1],
        second: [0.999, 0.001],
        inverse_root: 1.7,
        eps: 1e-8,
        step_size: 0.3,
        left: 0.997,
    };
    let kind = super::Kind::F32;
    let ((gradient, gradients), (parameter, mut parameters)) = (given(kind, count, 1), given(kind, count, 2));
    let (first, mut firsts) = given(kind, count, 3);
    let mut seconds: Vec<f32> = random(count, 4).iter().map(|value| value * value).collect();
    let second = Array::of(kind, &seconds);
    // SAFETY: the arrays have these sizes.
    unsafe { rows::adamw(queue, update, count, [gradient.at(), parameter.at(), first.at(), second.at()]) }.unwrap();
    cpu::adamw_row(update, &gradients, &mut parameters, &mut firsts, &mut seconds);
    assert_near("parameter", &parameter, &parameters, 1e-6);
    assert_near("first moment", &first, &firsts, 1e-6);
    assert_near("second moment", &second, &seconds, 1e-6);
}
