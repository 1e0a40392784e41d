//! Kernels at the shapes of SmolLM2-135M: GFLOP/s are criterion's `Gelem/s`, one element a floating-point operation; the
//! element-wise ones and products of a few rows count the bytes they touch.

use std::hint::black_box;
use std::time::Duration;

use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput};
use half::{bf16, f16};
use rdpo::kernels::cpu::{Activation, Codes, Heads, Packed, Rows, Width, attention, attention_backward, gated};
use rdpo::ops::{FrozenLinear, record, rms_norm, token_logprobs};

const HIDDEN: usize = 576;
const INNER: usize = 1536;
const VOCABULARY: usize = 49_152;
const HEADS: Heads = Heads { query: 9, key: 3, dim: 64, scale: 0.125 };

fn numbers(count: usize) -> Vec<f32> {
    (0..count as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0).collect()
}

/// Codes in groups of 32, as `Q4_1` and `Q8_0` have them.
fn codes(n: usize, k: usize, four_bits: bool) -> Codes {
    let some = |count| vec![f16::from_f32(0.01); count];
    Codes {
        four_bits,
        group: 32,
        codes: (0..n * k).map(|at| (at * 7 % 16) as i8).collect(),
        scales: some(n * k / 32),
        offsets: four_bits.then(|| some(n * k / 32)),
    }
}

fn matmul(criterion: &mut Criterion) {
    for (n, k) in [(HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)] {
        let weight = numbers(n * k);
        let halves = weight.iter().map(|value| bf16::from_f32(*value)).collect();
        let widths = [
            ("f32", Width::F32(weight)),
            ("bf16", Width::Bf16(halves)),
            ("8 bits", Width::Codes(codes(n, k, false))),
            ("4 bits", Width::Codes(codes(n, k, true))),
        ];
        for (name, width) in widths {
            let packed = Packed::new(&width, n, k);
            let mut group = criterion.benchmark_group(format!("matmul {name} {k} to {n}"));
            for m in [1, 8, 32, 256] {
                let (x, dy) = (numbers(m * k), numbers(m * n));
                group.throughput(match m {
                    1 => Throughput::Bytes(packed.bytes() as u64),
                    _ => Throughput::Elements((2 * m * n * k) as u64),
                });
                group.bench_function(BenchmarkId::new("forward", m), |b| b.iter(|| packed.forward(black_box(&x))));
                if m > 1 {
                    group.bench_function(BenchmarkId::new("backward", m), |b| {
                        b.iter(|| packed.backward(black_box(&dy), None));
                    });
                }
            }
        }
    }
}

fn attend(criterion: &mut Criterion) {
    let (h, kv, d) = (HEADS.query, HEADS.key, HEADS.dim);
    let mut group = criterion.benchmark_group("attention");
    for n in [256, 1024] {
        let (q, k, v, dout) = (numbers(n * h * d), numbers(n * kv * d), numbers(n * kv * d), numbers(n * h * d));
        let slots: Vec<usize> = (0..n).collect();
        let rows = [Rows { start: 0, slots: &slots, seen: (1..=n).map(|end| 0..end).collect() }];
        let pairs = h * n * (n + 1) / 2;
        group.throughput(Throughput::Elements((4 * pairs * d) as u64));
        group.bench_function(BenchmarkId::new("forward", n), |b| {
            b.iter(|| attention(HEADS, &rows, black_box(&q), &k, &v))
        });
        let out = attention(HEADS, &rows, &q, &k, &v);
        group.throughput(Throughput::Elements((10 * pairs * d) as u64));
        group.bench_function(BenchmarkId::new("backward", n), |b| {
            b.iter(|| attention_backward(HEADS, &[&rows], (black_box(&q), &k, &v), (&out, &dout)));
        });
    }
    for (sequences, context) in [(1, 512), (8, 512), (32, 512)] {
        let width = kv * d;
        let (k, v) = (numbers(sequences * context * width), numbers(sequences * context * width));
        let q = numbers(sequences * h * d);
        // Blocks of 16 slots, in reverse order.
        let slot = |at: usize| (sequences * context / 16 - 1 - at / 16) * 16 + at % 16;
        let slots: Vec<usize> = (0..sequences * context).map(slot).collect();
        let rows: Vec<Rows<'_>> = slots
            .chunks(context)
            .enumerate()
            .map(|(start, slots)| Rows { start, slots, seen: std::iter::once(0..context).collect() })
            .collect();
        group.throughput(Throughput::Bytes(8 * (sequences * context * width) as u64));
        group.bench_function(BenchmarkId::new("decode", sequences), |b| {
            b.iter(|| attention(HEADS, &rows, black_box(&q), &k, &v));
        });
    }
}

fn elementwise(criterion: &mut Criterion) {
    let rows = 256;
    let mut group = criterion.benchmark_group("rows of 256");
    let (gate, up) = (numbers(rows * INNER), numbers(rows * INNER));
    let mut out = vec![0f32; rows * INNER];
    group.throughput(Throughput::Bytes(12 * (rows * INNER) as u64));
    group.bench_function("swiglu, one thread", |b| {
        b.iter(|| gated(Activation::Silu, black_box(&gate), &up, &mut out));
    });
    let tensor = |shape: (usize, usize)| Tensor::from_vec(numbers(shape.0 * shape.1), shape, &Device::Cpu);
    let (Ok(x), Ok(weight)) = (tensor((rows, HIDDEN)), Tensor::from_vec(numbers(HIDDEN), HIDDEN, &Device::Cpu)) else {
        return;
    };
    group.throughput(Throughput::Bytes(8 * (rows * HIDDEN) as u64));
    group.bench_function("rms_norm", |b| b.iter(|| rms_norm(black_box(&x), &weight, 1e-5)));
}

fn head(criterion: &mut Criterion) -> rdpo::error::Result<()> {
    let rows = 128;
    let weight = Tensor::from_vec(numbers(VOCABULARY * HIDDEN), (VOCABULARY, HIDDEN), &Device::Cpu)?;
    let x = Tensor::from_vec(numbers(rows * HIDDEN), (rows, HIDDEN), &Device::Cpu)?;
    let targets: Vec<u32> = (0..rows as u32).collect();
    let ones = Tensor::ones(rows, candle_core::DType::F32, &Device::Cpu)?;
    let mut group = criterion.benchmark_group("head of 128 rows");
    for dtype in [candle_core::DType::F32, candle_core::DType::BF16] {
        let head = FrozenLinear::new(&weight.to_dtype(dtype)?, None)?;
        group.throughput(Throughput::Elements((2 * rows * HIDDEN * VOCABULARY) as u64));
        group.bench_function(BenchmarkId::new("log-probs", dtype.as_str()), |b| {
            b.iter(|| token_logprobs(black_box(&x), &head, &targets, &mut || Ok(())));
        });
        group.throughput(Throughput::Elements((4 * rows * HIDDEN * VOCABULARY) as u64));
        group.bench_function(BenchmarkId::new("log-probs and gradient", dtype.as_str()), |b| {
            b.iter(|| -> rdpo::error::Result<_> {
                let work = || token_logprobs(black_box(&x), &head, &targets, &mut || Ok(()));
                let (values, tape) = record([&x], work)?;
                tape.backward([(&values, ones.clone())])
            });
        });
    }
    Ok(())
}

/// Every group.
pub(crate) fn run(criterion: &mut Criterion) -> rdpo::error::Result<()> {
    matmul(criterion);
    attend(criterion);
    elementwise(criterion);
    head(criterion)
}

/// Short measurements: the minimum is what counts on a shared machine.
pub(crate) fn criterion() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20)
        .configure_from_args()
}
