//! Criterion groups of the engine's parts and of whole steps: scheduler, sampler, a decode step and a training step.
//!
//! The steps run on SmolLM2-135M-Instruct where `models/fetch.sh` has brought it, else they are left out and said to be.

use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use rdpo::engine::{Draw, Limits, SamplingParams, Scheduler, Sequence, sample};
use rdpo::error::Result;
use rdpo::train::{LoraOptions, LossKind, LossOptions, TokenPair, TrainJob, Trainer, TrainingOptions};

use super::{engine, train};

const MODEL: &str = "models/smollm2-135m-instruct";
/// A text that is always at hand.
const LICENCE: &str = include_str!("../../LICENSE");
const VOCABULARY: usize = 49_152;

/// A step of a full batch: what the owner thread does besides the model.
fn scheduler(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scheduler");
    for sequences in [1u64, 8, 64] {
        group.throughput(Throughput::Elements(sequences));
        group.bench_with_input(BenchmarkId::new("decode step", sequences), &sequences, |bencher, &sequences| {
            let limits = Limits { max_batch_tokens: 4096, max_sequences: 64, block_size: 16, prefix_caching: true };
            let mut scheduler = Scheduler::new(limits, 1 << 16);
            for id in 0..sequences {
                scheduler.add(Sequence::new(id, vec![id as u32; 33], None, true));
            }
            let step = scheduler.schedule();
            scheduler.complete(&step);
            let mut position = 0;
            bencher.iter(|| {
                position += 1;
                (0..sequences).for_each(|id| scheduler.push_token(id, position));
                let step = scheduler.schedule();
                scheduler.complete(&step);
                black_box(step.len())
            });
        });
    }
    group.finish();
}

/// One token out of a row of logits.
fn sampler(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sampler");
    group.throughput(Throughput::Bytes(4 * VOCABULARY as u64));
    // Peaked as a language model's are: ten nats between the best and the bulk.
    let logits: Vec<f32> = (0..VOCABULARY)
        .map(|id| {
            let noise = ((id * 2_654_435_761) % 1_000_003) as f32 / 1_000_003.0;
            10.0 * noise.powi(40) + noise
        })
        .collect();
    let plain = SamplingParams::default();
    let cases = [
        ("greedy", SamplingParams { temperature: 0.0, ..plain.clone() }),
        ("temperature", plain.clone()),
        ("top_p 0.9", SamplingParams { top_p: 0.9, ..plain.clone() }),
        ("top_k 40", SamplingParams { top_k: 40, ..plain.clone() }),
        ("greedy, 5 logprobs", SamplingParams { temperature: 0.0, logprobs: Some(5), ..plain }),
    ];
    for (name, params) in &cases {
        let mut row = logits.clone();
        let mut seed = 0;
        group.bench_function(*name, |bencher| {
            bencher.iter(|| {
                seed += 1;
                row.copy_from_slice(&logits);
                sample(&mut row, &Draw { params, prompt: &[1, 2], output: &[3], seed, banned: &[], mask: None })
            });
        });
    }
    group.finish();
}

/// Tokens of answers that run together, one step at a time.
fn decode(criterion: &mut Criterion) -> Result<()> {
    let engine = engine::start(Path::new(MODEL), "auto".parse()?)?;
    let mut group = criterion.benchmark_group("decode");
    for batch in [1u64, 8, 32] {
        group.throughput(Throughput::Elements(batch)).sample_size(10);
        group.bench_with_input(BenchmarkId::new("tokens", batch), &batch, |bencher, &batch| {
            bencher.iter_custom(|steps| {
                let tokens = steps.max(2) as usize + 1;
                let params = SamplingParams {
                    temperature: 0.0,
                    max_tokens: Some(tokens),
                    ignore_eos: true,
                    ..SamplingParams::default()
                };
                match engine::measure(&engine, &[], batch as usize, 32, &params) {
                    Ok((_, time, made)) if made > 0 => time.mul_f64(steps as f64 * batch as f64 / made as f64),
                    _ => Duration::MAX,
                }
            });
        });
    }
    group.finish();
    Ok(())
}

/// One optimizer step of four pairs, reference pass done before.
fn train_step(criterion: &mut Criterion) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut group = criterion.benchmark_group("train");
    for dtype in ["f32", "bf16", "auto"] {
        let (model, pairs) = train::load(Path::new(MODEL), dtype.parse()?, LICENCE, train::Shape::default())?;
        let mut trainer = Trainer::open(&TrainJob {
            model: &model,
            lora: LoraOptions::default().config(None),
            init: None,
            pairs: &pairs,
            eval_pairs: &[],
            loss: LossOptions { kind: LossKind::Dpo, ..LossOptions::default() },
            options: TrainingOptions { epochs: 1e6, batch_size: 4, shuffle: false, ..TrainingOptions::default() },
            seed: 0,
            folder: folder.path().join(dtype),
        })?;
        let batch = [0, 1, 2, 3];
        trainer.forward_backward(&batch, &mut || Ok(()))?;
        trainer.optim_step(&mut || Ok(()))?;
        // As TRL counts: the prompt once for each answer.
        let of = |pair: &TokenPair| 2 * pair.prompt.len() + pair.chosen.len() + pair.rejected.len();
        let counted = batch.iter().map(|index| of(&pairs[*index]) as u64).sum();
        group.throughput(Throughput::Elements(counted)).sample_size(10);
        group.bench_function(format!("step of 4 pairs, {}", dtype), |bencher| {
            bencher.iter(|| {
                trainer.forward_backward(&batch, &mut || Ok(())).and_then(|_| trainer.optim_step(&mut || Ok(())))
            });
        });
    }
    group.finish();
    Ok(())
}

/// Runs the groups.
pub(crate) fn run(criterion: &mut Criterion) -> Result<()> {
    scheduler(criterion);
    sampler(criterion);
    if Path::new(MODEL).exists() {
        decode(criterion)?;
        train_step(criterion)?;
    } else {
        eprintln!("decode and train are left out: run `make model` first");
    }
    Ok(())
}
