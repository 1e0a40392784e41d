//! What serving and training cost each other on one device: `cargo bench --bench bench -- share-run [DTYPE] [SHARE] [STREAMS]`.
//!
//! Prints the inter-token latency of the streams with and without a training run beside them, and the training speed with and
//! without the streams, through the gate that a job uses.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rdpo::engine::{Gate, GateGuard, SamplingParams};
use rdpo::error::{Error, Result};
use rdpo::train::{LoraOptions, LossKind, LossOptions, TokenPair, TrainJob, Trainer, TrainingOptions};

use super::{engine, train};

const MODEL: &str = "models/smollm2-135m-instruct";
const SECONDS: u64 = 15;

/// Trains until told to stop; counts tokens as TRL does.
fn training(
    trainer: &mut Trainer<'_>,
    pairs: &[TokenPair],
    gate: &Gate,
    stop: &AtomicBool,
    done: &AtomicUsize,
) -> Result<()> {
    let mut guard = None;
    let mut slices = Vec::new();
    let mut pace = || {
        if let Some((guard, since)) = guard.take() {
            drop::<GateGuard<'_>>(guard);
            slices.push(Instant::elapsed(&since).as_secs_f64());
        }
        if stop.load(Ordering::Relaxed) {
            return Err(Error::cancelled());
        }
        guard = Some((gate.train(), Instant::now()));
        Ok(())
    };
    let outcome = steps(trainer, pairs, stop, done, &mut pace);
    drop(guard);
    slices.sort_by(f64::total_cmp);
    let at = |share: f64| slices[((slices.len() - 1) as f64 * share) as usize] * 1e3;
    println!(
        "slices of training           p50 {:6.1} ms  p95 {:6.1} ms  longest {:4.1} ms",
        at(0.5),
        at(0.95),
        at(1.0)
    );
    outcome
}

fn steps(
    trainer: &mut Trainer<'_>,
    pairs: &[TokenPair],
    stop: &AtomicBool,
    done: &AtomicUsize,
    pace: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        for batch in trainer.next_batches() {
            trainer.forward_backward(&batch, pace)?;
            let of = |pair: &TokenPair| 2 * pair.prompt.len() + pair.chosen.len() + pair.rejected.len();
            done.fetch_add(batch.iter().map(|index| of(&pairs[*index])).sum(), Ordering::Relaxed);
        }
        trainer.optim_step(pace)?;
    }
    Ok(())
}

/// Runs the measurement with the arguments after `share-run`.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let argument = |index: usize, default: &'static str| arguments.get(index).map_or(default, String::as_str);
    let number =
        |text: &str| text.parse::<f64>().map_err(|_| Error::invalid("SHARE", format!("`{text}` is no number")));
    let dtype = argument(0, "auto").parse()?;
    let share = number(argument(1, "0.5"))?;
    let streams = number(argument(2, "4"))? as usize;
    let gate = Arc::new(Gate::on_cores(share));
    let (engine, model) = engine::start_with(Path::new(MODEL), dtype, gate.clone())?;
    let text = include_str!("../../LICENSE");
    let (_, pairs) = train::load(Path::new(MODEL), dtype, text, train::Shape::default())?;
    let folder = tempfile::tempdir()?;
    let mut trainer = Trainer::open(&TrainJob {
        model: &model,
        lora: LoraOptions::default().config(None),
        init: None,
        pairs: &pairs,
        eval_pairs: &[],
        loss: LossOptions { kind: LossKind::Dpo, ..LossOptions::default() },
        options: TrainingOptions {
            epochs: 1e4,
            batch_size: 1,
            gradient_accumulation_steps: 4,
            ..TrainingOptions::default()
        },
        seed: 0,
        folder: folder.path().to_path_buf(),
    })?;
    // The reference pass is no part of the comparison.
    trainer.forward_backward(&(0..pairs.len()).collect::<Vec<_>>(), &mut || Ok(()))?;
    trainer.optim_step(&mut || Ok(()))?;

    let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    let params = SamplingParams { temperature: 0.0, ignore_eos: true, ..SamplingParams::default() };
    let serve = |until: Duration| -> Result<Vec<f64>> {
        let (begin, mut gaps) = (Instant::now(), Vec::new());
        while begin.elapsed() < until {
            let params = SamplingParams { max_tokens: Some(64), ..params.clone() };
            gaps.extend(engine::gaps(&engine, streams, 32, &params)?);
        }
        gaps.sort_by(f64::total_cmp);
        Ok(gaps)
    };
    let at = |gaps: &[f64], share: f64| gaps[((gaps.len() - 1) as f64 * share) as usize] * 1e3;
    let show = |name: &str, gaps: &[f64]| {
        println!(
            "{name:<28} p50 {:6.1} ms  p95 {:6.1} ms  p99 {:6.1} ms",
            at(gaps, 0.5),
            at(gaps, 0.95),
            at(gaps, 0.99)
        );
    };
    serve(Duration::from_secs(1))?;
    let alone = serve(Duration::from_secs(SECONDS))?;
    show("serving alone", &alone);

    // Training alone, then the same beside the streams.
    let mut rates = Vec::new();
    let mut beside = Vec::new();
    for serving in [false, true] {
        stop.store(false, Ordering::Relaxed);
        let (before, begin) = (done.load(Ordering::Relaxed), Instant::now());
        std::thread::scope(|threads| -> Result<()> {
            let worker = threads.spawn(|| gate.training(|| training(&mut trainer, &pairs, &gate, &stop, &done)));
            if serving {
                beside = serve(Duration::from_secs(SECONDS))?;
            } else {
                std::thread::sleep(Duration::from_secs(SECONDS));
            }
            rates.push((done.load(Ordering::Relaxed) - before) as f64 / begin.elapsed().as_secs_f64());
            stop.store(true, Ordering::Relaxed);
            match worker.join().map_err(|_| Error::internal("the training thread panicked"))? {
                Err(error) if error.code == rdpo::error::Code::Cancelled => Ok(()),
                other => other,
            }
        })?;
    }
    show("serving beside training", &beside);
    println!("p95 with training / without: {:.2}", at(&beside, 0.95) / at(&alone, 0.95));
    println!(
        "training alone {:.0} tok/s, beside {streams} streams {:.0} tok/s: {:.2}",
        rates[0],
        rates[1],
        rates[1] / rates[0]
    );
    Ok(())
}
