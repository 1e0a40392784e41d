//! Log-probs of targets and their gradient.

use super::super::head;
use super::super::launch::Kind;
use super::{Array, KINDS, assert_near, device, given, queue, random};
use crate::kernels::cpu::softmax_row;

#[test]
fn token_logprobs_and_their_gradient() {
    let Some(queue) = queue() else { return };
    for kind in KINDS {
        let mut shapes = vec![(3, 40), (2, 1503), (2, 4200)];
        // Llama 3's vocabulary takes the emulation too long.
        shapes.extend(device().map(|_| (5, 128_256)));
        for (rows, v) in shapes {
            let wide: Vec<f32> = random(rows * v, 5).iter().map(|value| value * 8.0).collect();
            let targets: Vec<u32> = (0..rows).map(|row| (row * 977 % v) as u32).collect();
            let ids = Array::of_ids(&targets);
            for wanted in [false, true] {
                let logits = Array::of(kind, &wide);
                let given = logits.numbers();
                let logprobs = Array::blank(Kind::F32, rows);
                let places = [logits.at(), ids.at(), logprobs.at()];
                // SAFETY: the arrays have these sizes.
                unsafe { head::token_logprobs(queue, kind, (rows, v), wanted, places) }.unwrap();
                let (mut values, mut slopes) = (Vec::new(), given.clone());
                for (row, target) in slopes.chunks_mut(v).zip(&targets) {
                    let aim = row[*target as usize];
                    let (max, sum) = softmax_row(row, 1.0);
                    values.push((f64::from(aim - max) - sum.ln()) as f32);
                    row.iter_mut().for_each(|value| *value *= -(1.0 / sum) as f32);
                    row[*target as usize] += 1.0;
                }
                assert_near("log-probs", &logprobs, &values, 1e-5);
                match wanted {
                    true => assert_near("slopes", &logits, &slopes, 1e-5),
                    false => assert_eq!(logits.numbers(), given, "nothing else is written"),
                }
            }
        }
    }
}

#[test]
fn rows_are_scaled() {
    let Some(queue) = queue() else { return };
    for kind in KINDS {
        let ((x, xs), (factors, by)) = (given(kind, 5 * 70, 1), given(Kind::F32, 5, 2));
        let y = Array::blank(kind, 5 * 70);
        // SAFETY: the arrays have these sizes.
        unsafe { head::scale_rows(queue, kind, (5, 70), [x.at(), factors.at(), y.at()]) }.unwrap();
        let wanted: Vec<f32> = xs.chunks(70).zip(&by).flat_map(|(row, by)| row.iter().map(move |x| x * by)).collect();
        assert_near("rows", &y, &wanted, 1e-6);
    }
}
