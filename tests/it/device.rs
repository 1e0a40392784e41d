//! The device that the tests of the model's numbers run on, and the ops with a kernel of their own against plain loops.
//!
//! `RDPO_TEST_DEVICE=cuda:0` picks a GPU, where the numbers are in bf16, or as `RDPO_TEST_DTYPE` says (`f32`, `f16`); without it, f32 on the CPU.

use std::path::PathBuf;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use rdpo::ops::{KvLayer, PagedBatch, PagedSequence, kv_write, paged_attention, record, rms_norm};

/// One handle for the whole process: candle takes two handles of one GPU for two devices.
pub(super) fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| match std::env::var("RDPO_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok(name) => {
            let ordinal = name.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
            rdpo::ops::gpu(ordinal.expect("RDPO_TEST_DEVICE is `cpu` or `cuda:N`")).unwrap()
        }
    })
}

/// Dtype of weights and activations.
pub(super) fn dtype() -> DType {
    match std::env::var("RDPO_TEST_DTYPE").as_deref() {
        Ok("f32") => DType::F32,
        Ok("bf16") => DType::BF16,
        Ok("f16") => DType::F16,
        Ok(other) => panic!("RDPO_TEST_DTYPE is `f32`, `bf16` or `f16`, not `{other}`"),
        Err(_) if device().is_cpu() => DType::F32,
        Err(_) => DType::BF16,
    }
}

/// How far off numbers may be in the test's dtype, of what they may be in f32 and in bf16: f16 keeps three bits more than bf16.
pub(super) fn tolerance(in_f32: f32, in_bf16: f32) -> f32 {
    match dtype() {
        DType::F32 => in_f32,
        DType::F16 => in_bf16 / 8.0,
        _ => in_bf16,
    }
}

/// The fixtures: beside the sources, or where `RDPO_TEST_ROOT` has the repository when the binary was built elsewhere.
pub(super) fn fixtures() -> PathBuf {
    let root = std::env::var_os("RDPO_TEST_ROOT").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    root.join("tests/fixtures")
}

/// f32 numbers of a tensor of any device and dtype.
pub(super) fn numbers(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Numbers in (-1, 1) in the test's dtype on its device, and as that dtype has rounded them.
fn given(shape: &[usize], seed: u64) -> (Tensor, Vec<f32>) {
    let of = |index: usize| {
        let mixed = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ seed.wrapping_mul(0xbf58_476d_1ce4_e5b9));
        (mixed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(of).collect();
    let tensor = Tensor::from_vec(values, shape, device()).unwrap().to_dtype(dtype()).unwrap();
    let rounded = numbers(&tensor);
    (tensor, rounded)
}

fn assert_near(what: &str, got: &Tensor, wanted: &[f32]) {
    let got = numbers(got);
    assert_eq!(got.len(), wanted.len(), "{what}");
    // bf16 keeps 8 bits: results near 1 are rounded by 2^-9, and weights of a softmax are once more.
    let most = tolerance(2e-5, 2e-2);
    for (index, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let off = (got - wanted).abs();
        assert!(off <= most * wanted.abs().max(1.0), "{what}, number {index}: {got}, plain loops {wanted}");
    }
}

#[test]
fn rms_norm_is_that_of_plain_loops() {
    for (rows, width) in [(1, 8), (3, 64), (5, 576), (2, 4096), (7, 100)] {
        let (x, values) = given(&[rows, width], 1);
        let weight: Vec<f32> = (0..width).map(|index| 0.5 + (index % 7) as f32 / 5.0).collect();
        let wanted: Vec<f32> = values
            .chunks(width)
            .flat_map(|row| {
                let mean = row.iter().map(|x| f64::from(x * x)).sum::<f64>() / width as f64;
                let scale = 1.0 / (mean + 1e-5).sqrt();
                row.iter().zip(&weight).map(|(x, w)| (f64::from(*x) * scale) as f32 * w).collect::<Vec<_>>()
            })
            .collect();
        let weight = Tensor::from_vec(weight.clone(), width, device()).unwrap();
        let got = rms_norm(&x, &weight, 1e-5).unwrap();
        assert_eq!(got.dtype(), x.dtype());
        assert_near(&format!("{rows} rows of {width}"), &got, &wanted);
    }
}

#[test]
fn rms_norm_has_the_gradient_of_a_difference() {
    let (x, values) = given(&[2, 16], 3);
    let weight = Tensor::ones(16, DType::F32, device()).unwrap();
    let (y, tape) = record([&x], || rms_norm(&x, &weight, 1e-5)).unwrap();
    let first: Vec<f32> = (0..32).map(|index| f32::from(index % 16 == 0)).collect();
    let first = Tensor::from_vec(first, (2, 16), device()).unwrap();
    let gradient = tape.backward([(&y, first)]).unwrap().remove(&x).unwrap();
    // d(x₀/r)/dxᵢ = δ₀ᵢ/r − x₀·xᵢ/(C·r³)
    let wanted: Vec<f32> = values
        .chunks(16)
        .flat_map(|row| {
            let r = (row.iter().map(|x| x * x).sum::<f32>() / 16.0 + 1e-5).sqrt();
            let of = |(index, x): (usize, &f32)| f32::from(index == 0) / r - row[0] * x / (16.0 * r.powi(3));
            row.iter().enumerate().map(of).collect::<Vec<_>>()
        })
        .collect();
    assert_near("gradient", &gradient, &wanted);
}

/// Attention of `row` over `seen` slots, head by head.
fn plain_attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    seen: &[usize],
    (h, kv, d): (usize, usize, usize),
    scale: f32,
) -> Vec<f32> {
    let mut out = vec![0f32; h * d];
    for head in 0..h {
        let group = head / (h / kv);
        let at = |slot: usize| (slot * kv + group) * d;
        let dot = |slot: &usize| (0..d).map(|i| f64::from(q[head * d + i] * k[at(*slot) + i])).sum::<f64>();
        let scores: Vec<f64> = seen.iter().map(|slot| dot(slot) * f64::from(scale)).collect();
        let largest = scores.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
        for (slot, score) in seen.iter().zip(&scores) {
            let weight = ((score - largest).exp() / sum) as f32;
            (0..d).for_each(|i| out[head * d + i] += weight * v[at(*slot) + i]);
        }
    }
    out
}

/// A chunk of a prompt after others, a whole prompt, a decode step over a long context; grouped heads; with and without a window.
#[test]
fn paged_attention_is_that_of_plain_loops() {
    const BLOCK: usize = 16;
    for (h, kv, d) in [(4, 4, 16), (2, 1, 10), (6, 2, 64), (8, 2, 128), (4, 1, 256), (2, 1, 320)] {
        let blocks = 48;
        let ((k, mut keys), (v, mut values)) = (given(&[blocks, BLOCK, kv, d], 5), given(&[blocks, BLOCK, kv, d], 6));
        let cache = KvLayer { k, v };
        let order = |from: u32, count: u32| (0..count).map(|at| (from + at * 7) % blocks as u32).collect::<Vec<_>>();
        let sequence = |start, len, context: usize, from| PagedSequence {
            start,
            len,
            context,
            blocks: order(from, context.div_ceil(BLOCK) as u32),
        };
        let sequences =
            vec![sequence(0, 5, 40, 3), sequence(5, 9, 9, 1), sequence(14, 1, 500, 2), sequence(15, 1, 1, 0)];
        let slot = |sequence: &PagedSequence, at: usize| sequence.blocks[at / BLOCK] as usize * BLOCK + at % BLOCK;
        let slots: Vec<usize> = sequences
            .iter()
            .flat_map(|one| (one.context - one.len..one.context).map(move |at| slot(one, at)))
            .collect();
        let batch = PagedBatch::new(BLOCK, slots.iter().map(|slot| *slot as u32).collect(), sequences);
        let ((q, queries), (new_k, fresh_k), (new_v, fresh_v)) =
            (given(&[16, h, d], 7), given(&[16, kv, d], 8), given(&[16, kv, d], 9));
        kv_write(&cache, &new_k, &new_v, &batch).unwrap();
        for (row, slot) in slots.iter().enumerate() {
            let (from, to) = (row * kv * d..(row + 1) * kv * d, slot * kv * d..(slot + 1) * kv * d);
            keys[to.clone()].copy_from_slice(&fresh_k[from.clone()]);
            values[to].copy_from_slice(&fresh_v[from]);
        }
        assert!(numbers(&cache.k) == keys && numbers(&cache.v) == values, "the cache is not what was written");
        for window in [None, Some(33)] {
            let got = paged_attention(&q, &cache, &batch, 0.2, window).unwrap();
            let mut wanted = Vec::new();
            for one in &batch.sequences {
                for row in 0..one.len {
                    let end = one.context - one.len + row + 1;
                    let seen: Vec<usize> =
                        (window.map_or(0, |window| end.saturating_sub(window))..end).map(|at| slot(one, at)).collect();
                    let q = &queries[(one.start + row) * h * d..][..h * d];
                    wanted.extend(plain_attention(q, &keys, &values, &seen, (h, kv, d), 0.2));
                }
            }
            assert_near(&format!("{h} heads on {kv} of {d}, window {window:?}"), &got, &wanted);
        }
    }
}
