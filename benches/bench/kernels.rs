//! Kernels at the shapes of SmolLM2-135M: products count floating-point operations; those of one row, and what goes number by number, the
//! bytes they touch.

use std::hint::black_box;

use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput};
use half::{bf16, f16};
use rdpo::kernels::cpu::{
    Activation, AdamWUpdate, Codes, Heads, Left, LowRank, Packed, Rows, Width, attention, attention_backward, multiply,
};
use rdpo::ops::{FrozenLinear, adamw, dropout, gated, record, rms_norm, rope, token_logprobs};

use super::rates::Rates;

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

fn matmul(criterion: &mut Criterion<Rates>) {
    for (n, k) in [(HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)] {
        let weight = numbers(n * k);
        let halves = weight.iter().map(|value| bf16::from_f32(*value)).collect();
        let others = weight.iter().map(|value| f16::from_f32(*value)).collect();
        let widths = [
            ("f32", Width::F32(weight)),
            ("bf16", Width::Bf16(halves)),
            ("f16", Width::F16(others)),
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

/// What an adapter of rank 16 adds to a product, and the gradients of its two matrices.
fn low_rank(criterion: &mut Criterion<Rates>) {
    const RANK: usize = 16;
    let (n, k) = (INNER, HIDDEN);
    let mut group = criterion.benchmark_group(format!("rank {RANK} at {k} to {n}"));
    let of = |n: usize, k: usize| Packed::new(&Width::F32(numbers(n * k)), n, k);
    let (weight, a, b) = (of(n, k), of(RANK, k), of(n, RANK));
    for m in [1, 256] {
        let x = numbers(m * k);
        let parts = [LowRank { rows: 0..m, a: &a, b: &b }];
        group.throughput(Throughput::Elements((2 * m * (n * k + RANK * (n + k))) as u64));
        group.bench_function(BenchmarkId::new("adapted product", m), |bencher| {
            bencher.iter(|| weight.forward_adapted(black_box(&x), &parts));
        });
    }
    let m = 256;
    for (name, rows, columns) in [("gradient of A", RANK, k), ("gradient of B", n, RANK)] {
        let (left, right) = (numbers(m * rows), numbers(m * columns));
        let mut out = vec![0f32; rows * columns];
        group.throughput(Throughput::Elements((2 * m * rows * columns) as u64));
        group.bench_function(BenchmarkId::new(name, m), |bencher| {
            bencher.iter(|| multiply(Left::Turned(black_box(&left)), &right, (rows, m, columns), &mut out, false));
        });
    }
}

fn attend(criterion: &mut Criterion<Rates>) {
    let (h, kv, d) = (HEADS.query, HEADS.key, HEADS.dim);
    let mut group = criterion.benchmark_group("attention");
    for n in [256, 1024, 4096] {
        let (q, k, v, dout) = (numbers(n * h * d), numbers(n * kv * d), numbers(n * kv * d), numbers(n * h * d));
        let slots: Vec<usize> = (0..n).collect();
        let rows = [Rows { start: 0, slots: &slots, seen: (1..=n).map(|end| 0..end).collect() }];
        let pairs = h * n * (n + 1) / 2;
        group.throughput(Throughput::Elements((4 * pairs * d) as u64));
        group.bench_function(BenchmarkId::new("forward", n), |b| {
            b.iter(|| attention(HEADS, &rows, black_box(&q), &k, &v))
        });
        let [out, softmax] = attention(HEADS, &rows, &q, &k, &v);
        group.throughput(Throughput::Elements((10 * pairs * d) as u64));
        for (name, in_bf16) in [("backward", false), ("backward in bf16", true)] {
            group.bench_function(BenchmarkId::new(name, n), |b| {
                b.iter(|| {
                    attention_backward(HEADS, &[&rows], (black_box(&q), &k, &v), ([&out, &softmax], &dout), in_bf16)
                });
            });
        }
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

/// Number by number or row by row, forward and backward: every tensor that is read or written counts once.
fn elementwise(criterion: &mut Criterion<Rates>) -> rdpo::error::Result<()> {
    let rows = 256;
    let mut group = criterion.benchmark_group(format!("{rows} rows"));
    let tensor = |shape: &[usize]| Tensor::from_vec(numbers(shape.iter().product()), shape, &Device::Cpu);
    type Op<'a> = &'a dyn Fn(&[Tensor]) -> rdpo::error::Result<Tensor>;
    let mut op = |name: &str, inputs: &[Tensor], forward: usize, backward: usize, op: Op<'_>| {
        let numbers = inputs[0].elem_count();
        group.throughput(Throughput::Bytes(4 * (forward * numbers) as u64));
        group.bench_function(name, |bencher| bencher.iter(|| op(black_box(inputs))));
        group.throughput(Throughput::Bytes(4 * ((forward + backward) * numbers) as u64));
        group.bench_function(format!("{name} and its gradient"), |bencher| {
            bencher.iter(|| -> rdpo::error::Result<_> {
                let (y, tape) = record(inputs, || op(inputs))?;
                let dy = y.detach();
                tape.backward([(&y, dy)])
            });
        });
    };
    let (hidden, inner) = ([rows, HIDDEN], [rows, INNER]);
    let weight = tensor(&[HIDDEN])?;
    op("rms_norm", &[tensor(&hidden)?], 2, 3, &|of| rms_norm(&of[0], &weight, 1e-5));
    op("swiglu", &[tensor(&inner)?, tensor(&inner)?], 3, 5, &|of| gated(&of[0], &of[1], Activation::Silu));
    op("dropout", &[tensor(&hidden)?], 2, 2, &|of| dropout(&of[0], 0.1, 7));
    let (half, heads) = (HEADS.dim / 2, [rows, HEADS.query, HEADS.dim]);
    let [cos, sin] = [tensor(&[rows, half])?, tensor(&[rows, half])?];
    op("rope", &[tensor(&heads)?], 2, 2, &|of| rope(&of[0], &cos, &sin));
    let update = AdamWUpdate {
        scale: 1.0,
        first: [0.9, 0.1],
        second: [0.999, 0.001],
        inverse_root: 1.0,
        eps: 1e-8,
        step_size: 1e-4,
        left: 1.0,
    };
    let of: [Tensor; 4] = [tensor(&inner)?, tensor(&inner)?, tensor(&inner)?, tensor(&inner)?.sqr()?];
    let [gradient, parameter, moments @ ..] = of;
    group.throughput(Throughput::Bytes(4 * 7 * gradient.elem_count() as u64));
    group.bench_function("adamw", |bencher| bencher.iter(|| adamw(update, black_box(&gradient), &parameter, &moments)));
    Ok(())
}

fn head(criterion: &mut Criterion<Rates>) -> rdpo::error::Result<()> {
    let rows = 128;
    let weight = Tensor::from_vec(numbers(VOCABULARY * HIDDEN), (VOCABULARY, HIDDEN), &Device::Cpu)?;
    let x = Tensor::from_vec(numbers(rows * HIDDEN), (rows, HIDDEN), &Device::Cpu)?;
    let targets: Vec<u32> = (0..rows as u32).collect();
    let ones = Tensor::ones(rows, candle_core::DType::F32, &Device::Cpu)?;
    let mut group = criterion.benchmark_group("head of 128 rows");
    let heads = [
        ("f32", FrozenLinear::new(&weight, None)?),
        ("bf16", FrozenLinear::new(&weight.to_dtype(candle_core::DType::BF16)?, None)?),
        ("8 bits", FrozenLinear::from_codes(codes(VOCABULARY, HIDDEN, false), (VOCABULARY, HIDDEN), None)?),
    ];
    for (name, head) in heads {
        group.throughput(Throughput::Elements((2 * rows * HIDDEN * VOCABULARY) as u64));
        group.bench_function(BenchmarkId::new("log-probs", name), |b| {
            b.iter(|| token_logprobs(black_box(&x), &head, &targets, &mut || Ok(())));
        });
        group.throughput(Throughput::Elements((4 * rows * HIDDEN * VOCABULARY) as u64));
        group.bench_function(BenchmarkId::new("log-probs and gradient", name), |b| {
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
pub(crate) fn run(criterion: &mut Criterion<Rates>) -> rdpo::error::Result<()> {
    matmul(criterion);
    low_rank(criterion);
    attend(criterion);
    elementwise(criterion)?;
    head(criterion)
}
